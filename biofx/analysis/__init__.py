"""What passes ask of a graph: units, replication, order."""
