"""Random numbers that depend on what they are for: keyed, in blocks, from the distributions of rates."""
