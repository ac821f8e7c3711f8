"""Parts of a graph that run in one mode only.

A forward that does one thing in training and another in evaluation is one graph all the same. What it does
in both modes stands there once, what it does in one of them stands between :func:`begin_branch` and
:func:`end_branch`, and :func:`biofx.graph.guards.by_mode` takes from either what is gone on with. So a
rewrite sees both modes and treats them alike. The graph's code has an ``if`` for each branch.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from torch.fx import Graph, Node
from torch.fx.node import has_side_effect, map_arg

from biofx.errors import PassError
from biofx.graph.guards import by_mode
from biofx.graph.in_place import changes_in_place


@has_side_effect
def begin_branch(training: bool, taken: bool) -> NoReturn:
    """Mark where a branch begins that runs where a module's ``training`` is ``taken``.

    Raises:
        PassError: always; the graph's code has an ``if`` instead, and whoever runs node by node would run
            every branch.
    """
    raise PassError("a graph with branches for training and evaluation runs as code, not node by node")


@has_side_effect
def end_branch(branch: Any) -> None:
    """Mark where a branch ends."""


def has_branches(graph: Graph) -> bool:
    """Whether something in a graph runs in one mode only."""
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


def settle_branches(graph: Graph) -> None:
    """Move what a pass has put into a branch, but others read too, to where it runs in both modes.

    Raises:
        PassError: it is nothing that could run in both.
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
    """Whether a reader reads a node of a branch even where the branch has not run."""
    branch, around = branches[node], branches.get(user)
    if around is not None and around.args == branch.args:
        return False
    if user.target is not by_mode or user.args[0] is not branch.args[0]:
        return True
    read: list[Node] = []
    map_arg(user.args[2 if branch.args[1] else 1], read.append)
    return node in read


def take_branches(graph: Graph, *, training: bool) -> None:
    """Leave in a graph what it does in one mode, and take the rest out, in place."""
    branches = branch_of_nodes(graph)
    chosen = 1 if training else 2
    for node in list(graph.find_nodes(op="call_function", target=by_mode)):
        taken: Any = node.args[chosen]
        for user in list(node.users):
            _put(user, node, taken)
        graph.erase_node(node)
    for node in list(reversed(graph.nodes)):
        is_mark = node.target in (begin_branch, end_branch)
        if is_mark or (node in branches and branches[node].args[1] is not training):
            graph.erase_node(node)
    graph._codegen._body_transformer = None


def _put(user: Node, node: Node, value: Any) -> None:
    def put(source: Node) -> Any:
        return value if source is node else source

    user.args, user.kwargs = map_arg(user.args, put), map_arg(user.kwargs, put)


def with_branches(body: list[str]) -> list[str]:
    """Return the lines of a graph's code with an ``if`` in the place of each branch's marks."""
    lines = "".join(body).split("\n")
    written: list[str] = []
    place = 0
    while place < len(lines):
        begin = _BEGIN.match(lines[place])
        if begin is None:
            written.append(lines[place])
            place += 1
            continue
        end = next(n for n in range(place, len(lines)) if _END.match(lines[n]))
        inside = lines[place + 1 : end]
        names = [name for line in inside for name in _ASSIGNED.findall(line)]
        later = set(_WORD.findall("\n".join(lines[end + 1 :])))
        read = [name for name in names if name in later]
        if read:
            written.append(f"{' = '.join(read)} = None")
        written.append(f"if {'' if begin['taken'] == 'True' else 'not '}{begin['flag']}:")
        written += [f"    {line}" for line in inside]
        if not names:
            written.append("    pass")
        place = end + 1
    return ["\n".join(written)]


_BEGIN = re.compile(r"\w+ = \w*begin_branch\((?P<flag>\w+), (?P<taken>True|False)\)")
_END = re.compile(r"\w+ = \w*end_branch\(")
_ASSIGNED = re.compile(r"(?:^|; +)(\w+)(?: : [^=;]+)? = (?!None\b)")
_WORD = re.compile(r"\w+")
