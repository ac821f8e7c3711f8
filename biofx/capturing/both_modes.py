"""One graph from two: a forward recorded in training and in evaluation."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from biofx.capturing.frames import Keep
from biofx.graph.guards import by_mode


def unified(path: str, training: Graph, evaluation: Graph) -> Graph:
    """Return the graph of a module in both modes, made from ``training``.

    Where only a constant differs (a rate of dropout, a flag), the graph takes the one of the mode that the
    module is in when it runs.

    Args:
        path: of the module, in the whole model.
        training: its graph as recorded in training; it is changed.
        evaluation: likewise in evaluation.

    Raises:
        Keep: the graphs differ in more than constants; names the innermost module in which they do.
    """
    pairs = zip(list(training.nodes), evaluation.nodes, strict=False)
    other: dict[Node, Node] = {}
    for ours, theirs in pairs:
        same = ours.op == theirs.op and ours.target == theirs.target
        if same:
            union = _Union(path, ours, theirs, other)
            ours.args = union.of(ours.args, theirs.args)
            ours.kwargs = union.of(ours.kwargs, theirs.kwargs)
        else:
            raise _differ(path, ours, theirs)
        other[ours] = theirs
    if len(other) != len(evaluation.nodes):
        raise _differ(path, *(next(iter(reversed(graph.nodes))) for graph in (training, evaluation)))
    return training


class _Union:
    """Puts the arguments of one node in training and in evaluation into one."""

    def __init__(self, path: str, ours: Node, theirs: Node, other: dict[Node, Node]) -> None:
        self._path = path
        self._ours = ours
        self._theirs = theirs
        self._other = other
        self._flag: Node | None = None

    def of(self, ours: Any, theirs: Any) -> Any:
        """Return what stands for both arguments."""
        if isinstance(ours, Node) and isinstance(theirs, Node):
            if self._other.get(ours) is theirs:
                return ours
        elif isinstance(ours, (tuple, list)) and type(ours) is type(theirs) and len(ours) == len(theirs):
            entries = [self.of(a, b) for a, b in zip(ours, theirs, strict=True)]
            return type(ours)(*entries) if hasattr(ours, "_fields") else type(ours)(entries)
        elif isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
            return {key: self.of(value, theirs[key]) for key, value in ours.items()}
        elif isinstance(ours, slice) and isinstance(theirs, slice):
            bounds = ((ours.start, theirs.start), (ours.stop, theirs.stop), (ours.step, theirs.step))
            return slice(*(self.of(a, b) for a, b in bounds))
        elif type(ours) is type(theirs) and (ours == theirs or ours != ours):
            return ours
        elif isinstance(ours, (bool, int, float)) and isinstance(theirs, (bool, int, float)):
            return self._chosen(ours, theirs)
        raise _differ(self._path, self._ours, self._theirs)

    def _chosen(self, in_training: Any, in_evaluation: Any) -> Node:
        if self._ours.op != "call_function" and self._ours.op != "call_method":
            raise _differ(self._path, self._ours, self._theirs)
        graph, inside = self._ours.graph, _innermost(self._ours)
        with graph.inserting_before(self._ours):
            flag = graph.create_node("get_attr", f"{inside}.training" if inside else "training")
            chosen = flag
            if (in_training, in_evaluation) != (True, False):
                chosen = graph.call_function(by_mode, (flag, in_training, in_evaluation))
        for node in (flag, chosen):
            node.meta["nn_module_stack"] = dict(self._ours.meta.get("nn_module_stack", {}))
        return chosen


def _innermost(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def _differ(path: str, ours: Node, theirs: Node) -> Keep:
    stacks = [
        [place for place, _ in (node.meta.get("nn_module_stack") or {}).values()] for node in (ours, theirs)
    ]
    if ours.op == "call_module":
        stacks[0] = stacks[0][:-1]
    if theirs.op == "call_module":
        stacks[1] = stacks[1][:-1]
    common = [a for a, b in zip(*stacks, strict=False) if a == b]
    inside = ".".join(part for part in (path, common[-1] if common else "") if part)
    found = f"{ours.format_node()} and {theirs.format_node()}"
    return Keep(inside, f"module {inside!r} does one thing in training and another in evaluation ({found})")
