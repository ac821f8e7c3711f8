"""Random numbers that depend on what they are for: keyed, drawn in blocks, from the distributions of rates."""
