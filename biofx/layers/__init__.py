"""What each kind of layer does with its weights, and how they become visible in the graph."""
