"""Branches of a graph, each of which runs in one mode only.

A forward that does one thing in training and another in evaluation is captured as one graph. What it does in
both modes is in the graph once, what it does in one mode is between :func:`begin_branch` and
:func:`end_branch`, and :func:`by_mode` selects the value that is used afterwards. A rewrite thereby sees both
modes. The code of the graph has an ``if`` for each branch (:class:`BranchCodeGen`).
"""

from __future__ import annotations

import textwrap
from typing import Any, NoReturn

from torch.fx import Graph, Node
from torch.fx.graph import CodeGen, PythonCode
from torch.fx.node import has_side_effect, map_arg
from torch.overrides import handle_torch_function, has_torch_function

from biofx.errors import PassError
from biofx.graph.node_kinds import changes_in_place
from biofx.torch_private import codegen_of


@has_side_effect
def begin_branch(training: bool, taken: bool) -> NoReturn:
    """Mark where a branch begins that runs where a module's ``training`` is ``taken``.

    Raises:
        PassError: always; the code of the graph has an ``if`` instead, and an interpreter that runs the graph
            node by node would run every branch.
    """
    raise PassError(
        "a graph with branches for training and evaluation runs as code, not node by node; biofx.export "
        "gives programs of torch.export, one for each mode"
    )


@has_side_effect
def end_branch(branch: Any) -> None:
    """Mark where a branch ends."""


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """Return the value that a forward uses in the mode that its module is in."""
    if has_torch_function((training,)):
        return handle_torch_function(by_mode, (training,), training, in_training, in_evaluation)
    return in_training if training else in_evaluation


def has_branches(graph: Graph) -> bool:
    """Whether a part of a graph runs in one mode only."""
    return bool(graph.find_nodes(op="call_function", target=begin_branch))


def branch_of_nodes(graph: Graph) -> dict[Node, Node]:
    """Return for each node in a branch the node that begins it."""
    found: dict[Node, Node] = {}
    current: Node | None = None
    for node in graph.nodes:
        if node.target is end_branch:
            current = None
        elif current is not None:
            found[node] = current
        if node.target is begin_branch:
            current = node
    return found


def hoist_shared_nodes(graph: Graph) -> None:
    """Move nodes out of their branch that are read where the branch has not run.

    Raises:
        PassError: such a node has a side effect, and so cannot run in both modes.
    """
    branches = branch_of_nodes(graph)
    moving: set[Node] = set()
    for node in reversed(graph.nodes):
        branch = branches.get(node)
        if branch is None or not any(u in moving or _is_outside(u, node, branches) for u in node.users):
            continue
        if node.op == "call_module" or node.is_impure() or changes_in_place(node):
            raise PassError(f"{node.name!r} runs in one mode only, and is read in the other too")
        moving.add(node)
    for node in [node for node in graph.nodes if node in moving]:
        branches[node].prepend(node)


def _is_outside(user: Node, node: Node, branches: dict[Node, Node]) -> bool:
    """Whether a user reads a node of a branch even where the branch has not run."""
    branch, around = branches[node], branches.get(user)
    if around is not None and around.args == branch.args:
        return False
    if user.target is not by_mode or user.args[0] is not branch.args[0]:
        return True
    read: list[Node] = []
    map_arg(user.args[2 if branch.args[1] else 1], read.append)
    return node in read


def take_branches(graph: Graph, *, training: bool) -> None:
    """Reduce a graph, in place, to what it does in one mode."""
    branches = branch_of_nodes(graph)
    chosen = 1 if training else 2
    for node in list(graph.find_nodes(op="call_function", target=by_mode)):
        taken: Any = node.args[chosen]
        for user in list(node.users):
            _replace_input(user, node, taken)
        graph.erase_node(node)
    for node in list(reversed(graph.nodes)):
        is_mark = node.target in (begin_branch, end_branch)
        if is_mark or (node in branches and branches[node].args[1] is not training):
            graph.erase_node(node)
    if isinstance(codegen_of(graph), BranchCodeGen):
        graph.set_codegen(CodeGen())


def _replace_input(user: Node, node: Node, value: Any) -> None:
    """Replace an input of a node by a value, which may be a constant."""

    def replaced(source: Node) -> Any:
        return value if source is node else source

    user.args, user.kwargs = map_arg(user.args, replaced), map_arg(user.kwargs, replaced)


class BranchCodeGen(CodeGen):
    """Generates the code of a graph with an ``if`` in the place of the marks of each branch."""

    def _gen_python_code(self, nodes: Any, *args: Any, **options: Any) -> PythonCode:
        registered = self._body_transformer

        def transformed(body: list[str]) -> list[str]:
            written = _with_branches(body, list(nodes))
            return written if registered is None else registered(written)

        self._body_transformer = transformed
        try:
            return super()._gen_python_code(nodes, *args, **options)
        finally:
            self._body_transformer = registered


def _with_branches(body: list[str], nodes: list[Node]) -> list[str]:
    """Return the body of a graph's code with an ``if`` for each branch.

    ``torch.fx`` writes the nodes in order, each after a comment with its place. While it does, ``repr`` of
    a node is its name in the code.
    """
    branches = branch_of_nodes(nodes[0].graph)
    inside: dict[Node, list[Node]] = {}
    for node, begin in branches.items():
        inside.setdefault(begin, []).append(node)
    pieces: list[list[str]] = [[]]
    for text in body:
        if text.startswith("# COUNTER: "):
            pieces.append([])
        pieces[-1].append(text)
    written, *pieces = pieces
    for node, (place, *code) in zip(nodes, pieces, strict=True):
        written.append(place)
        if node.target is begin_branch:
            written += _opening(node, inside.get(node, []), branches)
        elif node in branches:
            written.append(textwrap.indent("".join(code), "    "))
        elif node.target is not end_branch:
            written += code
    return written


def _opening(begin: Node, inside: list[Node], branches: dict[Node, Node]) -> list[str]:
    """Return the code that opens a branch; what is read after it must have a value if it does not run."""
    flag, taken = begin.args
    read = [repr(node) for node in inside if any(branches.get(user) is not begin for user in node.users)]
    defaults = [f"{' = '.join(read)} = None\n"] if read else []
    return [*defaults, f"if {'' if taken else 'not '}{flag!r}:\n", *([] if inside else ["    pass\n"])]
