"""What a pass is, and what it says of a rewrite."""
