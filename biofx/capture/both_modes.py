"""One graph from two: a forward captured in training and in evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.fx.node import map_arg

from biofx.capture.attribute_reads import Read
from biofx.capture.graph_breaks import GraphBreak
from biofx.errors import PassError
from biofx.graph.branches import begin_branch, by_mode, end_branch, hoist_shared_nodes
from biofx.graph.contexts import is_of_a_context
from biofx.graph.node_kinds import IS_NUMBER
from biofx.graph.regions import is_inside, joined_path
from biofx.torch_private import codegen_of


@dataclass(frozen=True)
class OneMode:
    """What a forward did in one mode. Paths of modules are within the module whose forward it is."""

    graph: Graph
    asked: frozenset[str] | None
    """Modules whose ``training`` was read; None if a module read that of another, and of others too."""
    calls: Mapping[str, int]
    """How often each module was called."""
    reads: tuple[Read, ...] = ()
    """What the forward read from attributes."""


def unified(path: str, module: nn.Module, training: OneMode, evaluation: OneMode) -> Graph:
    """Return one graph of a module for both modes.

    Where only a constant differs (a rate of dropout, a flag), the graph selects that of the mode in which the
    module is when it runs. Where operations differ, they are in branches (:mod:`biofx.graph.branches`). Each
    follows the ``training`` of the module that decided, so a part of a model may be in another mode than the
    rest.

    Args:
        path: path of the module in the whole model.
        module: the module.
        training: what it did in training.
        evaluation: what it did in evaluation.

    Raises:
        GraphBreak: the graphs do not show which module decided, or it has no parameters, so that its call
            can as well be one node; names the innermost module to leave as it is.
    """
    return _Union(path, module, training, evaluation).graph


class _Union:
    def __init__(self, path: str, module: nn.Module, training: OneMode, evaluation: OneMode) -> None:
        self._path = path
        self._module = module
        self._modes = training, evaluation
        self._asked = _deciders(training, evaluation)
        self._to_union: tuple[dict[Node, Node], dict[Node, Node]] = ({}, {})
        self._decided_by: dict[Node, str] = {}
        self._flags: dict[str, Node] = {}
        self._numbers: dict[str, Node] = {}
        self.graph = Graph(tracer_cls=Tracer)
        self.graph.set_codegen(codegen_of(training.graph))
        for shared, pairs in self._stretches():
            if shared:
                for ours, theirs in pairs:
                    self._write_both(ours, theirs)
            else:
                for side, place in ((0, 0), (1, 1)):
                    self._write_branches(side, [pair[place] for pair in pairs if pair[place] is not None])
        try:
            hoist_shared_nodes(self.graph)
        except PassError as error:
            raise GraphBreak(path, f"module {path!r}: {error}") from None

    def _stretches(self) -> Iterator[tuple[bool, list[tuple[Any, Any]]]]:
        """Yield pairs of nodes that are one operation, and nodes that only one of the modes has."""
        ours, theirs = (list(mode.graph.nodes) for mode in self._modes)
        keys = [[_key(node) for node in nodes] for nodes in (ours, theirs)]
        if keys[0] == keys[1]:
            yield True, list(zip(ours, theirs, strict=True))
            return
        for kind, a, b, c, d in SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
            if kind == "equal":
                yield True, list(zip(ours[a:b], theirs[c:d], strict=True))
            else:
                yield False, [*((node, None) for node in ours[a:b]), *((None, node) for node in theirs[c:d])]

    def _write_both(self, ours: Node, theirs: Node) -> None:
        if ours.meta.get(IS_NUMBER):
            self._write_number(0, ours)
            self._write_number(1, theirs)
            return
        args = self._chosen(ours, theirs, ours.args, theirs.args)
        kwargs = self._chosen(ours, theirs, ours.kwargs, theirs.kwargs)
        made = self._copied(ours, args, kwargs)
        self._to_union[0][ours] = self._to_union[1][theirs] = made

    def _chosen(self, ours: Node, theirs: Node, a: Any, b: Any) -> Any:
        """Return the argument, in the united graph, of a node that both modes have."""
        if isinstance(a, Node) and isinstance(b, Node):
            mapped = self._to_union[0][a], self._to_union[1][b]
            return mapped[0] if mapped[0] is mapped[1] else self._by_mode(ours, theirs, *mapped)
        if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            entries = [self._chosen(ours, theirs, x, y) for x, y in zip(a, b, strict=True)]
            return type(a)(*entries) if hasattr(a, "_fields") else type(a)(entries)
        if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
            return {key: self._chosen(ours, theirs, value, b[key]) for key, value in a.items()}
        if isinstance(a, slice) and isinstance(b, slice):
            bounds = ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))
            return slice(*(self._chosen(ours, theirs, x, y) for x, y in bounds))
        if type(a) is type(b) and (a == b or a != a) and not _nodes_in((a, b)):
            return a
        return self._by_mode(ours, theirs, *(self._mapped(side, x) for side, x in enumerate((a, b))))

    def _by_mode(self, ours: Node, theirs: Node, in_training: Any, in_evaluation: Any) -> Any:
        """Write the selection of one of two values."""
        if ours.op not in ("call_function", "call_method", "call_module", "output"):
            raise self._differ(ours, theirs)
        chosen = _nodes_in((in_training, in_evaluation))
        deciders = {self._decided_by[node] for node in chosen if node in self._decided_by}
        if not deciders:
            numbers = all(node.meta.get(IS_NUMBER) for node in chosen)
            deciders = self._deciders_for(ours, only_constants=numbers)
        if len(deciders) != 1:
            raise self._differ(ours, theirs)
        flag = self._flag(deciders.pop(), ours)
        if in_training is True and in_evaluation is False:
            return flag
        made = self.graph.call_function(by_mode, (flag, in_training, in_evaluation))
        made.meta["nn_module_stack"] = flag.meta["nn_module_stack"]
        return made

    def _deciders_for(self, reader: Node, *, only_constants: bool) -> set[str]:
        """Return the modules that may have decided on an argument whose two values both modes know."""
        asked = self._asked or frozenset()
        inside = only_constants and reader.op in ("call_function", "call_method")
        nearest = _nearest(_places(reader), asked) if inside else None
        return set(asked) if nearest is None else {nearest}

    def _write_branches(self, side: int, nodes: list[Node]) -> None:
        """Write nodes that only one mode has, with a branch for each stretch on which one module decided."""
        branch: Node | None = None
        current: str | None = None
        for node in nodes:
            if node.meta.get(IS_NUMBER):  # which can be read in both modes
                self._write_number(side, node, before=branch)
                continue
            decider = self._decider_of_branch(node)
            if branch is None or decider != current:
                self._end(branch)
                current = decider
                flag = self._flag(decider, node)
                branch = self.graph.call_function(begin_branch, (flag, side == 0))
                branch.meta["nn_module_stack"] = flag.meta["nn_module_stack"]
            made = self._copied(node, self._mapped(side, node.args), self._mapped(side, node.kwargs))
            if {self._decided_by.get(source, decider) for source in made.all_input_nodes} - {decider}:
                raise self._differ(node, node)
            self._to_union[side][node] = made
            self._decided_by[made] = decider
        self._end(branch)

    def _decider_of_branch(self, node: Node) -> str:
        """Return the module whose forward decided on an operation."""
        asked = [path for path in self._asked or () if self._is_called_alike(path)]
        decider = _nearest(_places(node), asked)
        if decider is None or node.op in ("placeholder", "output") or is_of_a_context(node):
            raise self._differ(node, node)
        inner = self._module.get_submodule(decider)
        if decider and next(inner.parameters(), None) is None:
            raise self._differ(node, node)
        return decider

    def _is_called_alike(self, path: str) -> bool:
        times = [mode.calls.get(path, 0) for mode in self._modes]
        return not path or times[0] == times[1]

    def _end(self, branch: Node | None) -> None:
        if branch is not None:
            end = self.graph.call_function(end_branch, (branch,))
            end.meta["nn_module_stack"] = branch.meta["nn_module_stack"]

    def _write_number(self, side: int, node: Node, before: Node | None = None) -> None:
        """Write the read of a number, once for each attribute."""
        target = str(node.target)
        if target not in self._numbers:
            self._numbers[target] = made = self._copied(node, (), {})
            if before is not None:
                before.prepend(made)
        self._to_union[side][node] = self._numbers[target]

    def _copied(self, node: Node, args: Any, kwargs: Any) -> Node:
        made = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        made.meta = dict(node.meta)
        return made

    def _mapped(self, side: int, value: Any) -> Any:
        return map_arg(value, self._to_union[side].__getitem__)

    def _flag(self, decider: str, reader: Node) -> Node:
        """Return the node that reads a module's ``training``."""
        if decider not in self._flags:
            target = f"{decider}.training" if decider else "training"
            flag = self._flags[decider] = self.graph.create_node("get_attr", target)
            stack = reader.meta.get("nn_module_stack") or {}
            around = {key: entry for key, entry in stack.items() if entry[0] and is_inside(decider, entry[0])}
            flag.meta["nn_module_stack"] = around
        return self._flags[decider]

    def _differ(self, ours: Node, theirs: Node) -> GraphBreak:
        places = [a for a, b in zip(_places(ours), _places(theirs), strict=False) if a == b]
        inside = joined_path(self._path, places[-1] if places else "")
        found = " and ".join(dict.fromkeys(str(node.format_node()) for node in (ours, theirs)))
        what = "does one thing in training and another in evaluation"
        return GraphBreak(inside, f"module {inside!r} {what} ({found})")


def _deciders(training: OneMode, evaluation: OneMode) -> frozenset[str] | None:
    """Return the modules that may have decided, None if one of them is called in one mode only.

    Such a call would be in a branch, and the module may be in the other mode when it is called.
    """
    if training.asked is None or evaluation.asked is None:
        return None
    asked = training.asked | evaluation.asked
    calls = training.calls, evaluation.calls
    alike = all(calls[0].get(path, 0) == calls[1].get(path, 0) for path in asked if path)
    return asked if alike else None


def _key(node: Node) -> tuple[Any, ...]:
    """Return what two nodes must have in common to be one operation, except for their arguments."""
    return node.op, node.target, tuple(_places(node)), len(node.args), tuple(node.kwargs)


def _places(node: Node) -> list[str]:
    """Return the modules in whose forward a node lies, outermost first."""
    places = [place for place, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return places[:-1] if node.op == "call_module" and places and places[-1] == node.target else places


def _nearest(places: Sequence[str], among: Collection[str]) -> str | None:
    """Return the innermost of some modules that is around a node."""
    return next((place for place in reversed(["", *places]) if place in among), None)


def _nodes_in(value: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(value, found.append)
    return found
