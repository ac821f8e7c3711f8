"""What a captured model is: a graph, its module tree, and the regions that stay in Python."""

from biofx.graph.changes import Change, diff_graphs, print_changed
from biofx.graph.graph_view import GraphView, ModuleView, NodeView
from biofx.graph.printing import format_graph

__all__ = ["Change", "GraphView", "ModuleView", "NodeView", "diff_graphs", "format_graph", "print_changed"]
