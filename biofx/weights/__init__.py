"""What becomes of a weight between its parameter and the layer that uses it."""
