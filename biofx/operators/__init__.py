"""The functions that rewritten graphs call, a file a mechanism or family of layers, and how they sample."""
