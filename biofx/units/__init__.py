"""Who is one unit: from a graph to the presynaptic units of each weight."""
