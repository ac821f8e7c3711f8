"""The arithmetic behind the operators of rewritten graphs, where it is worth being quick."""
