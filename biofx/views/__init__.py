"""A report as a page, a picture, a tree, or a DOT graph."""
