"""What comes out: a graph module that still is the user's model."""
