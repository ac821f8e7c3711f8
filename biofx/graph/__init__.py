"""What a captured model is: a graph, its module tree, and the regions that stay in Python."""
