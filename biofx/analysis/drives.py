"""With which sign a layer's output acts: ``a - b`` turns what b drives over, and the effect of b's weights.

An inhibitory population is often written so: ``W_ee @ e - W_ei @ i`` with weights that are never negative.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch.fx import Node

from biofx.analysis.units import UnitAnalysis, UnitCall
from biofx.graph.node_kinds import changed_in_place

_REACH = 64
"""How many operations behind a layer are looked at, a count: a state that leaks has no last one."""
_KEPT = frozenset(
    str.split(
        """add iadd sub isub subtract cat concat concatenate stack setitem getitem chunk split tensor_split
        unbind view view_as reshape flatten unflatten transpose swapaxes permute movedim t squeeze unsqueeze
        expand expand_as narrow select index_select contiguous clone to float double half type type_as detach
        dropout roll flip sum mean exp expm1 log log1p copy lerp Dropout Identity Flatten Unflatten"""
    )
)
"""Operations whose result rises with each argument, but for what is subtracted."""
_SUBTRACTIONS = frozenset({"sub", "isub", "subtract"})
_SUMS = _SUBTRACTIONS | {"add", "iadd"}
_PRODUCTS = frozenset({"mul", "imul", "multiply"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "truediv", "itruediv"})
_TURNED = frozenset({"neg", "negative", "reciprocal"})


def drive_signs(analysis: UnitAnalysis) -> dict[Node, int]:
    """Return for each layer with which sign its output acts: 1, -1 where it is subtracted, 0 for both.

    Outputs are followed through sums and products up to the next operation that bends or weighs them. What
    the model returns counts where nothing else reads it.
    """
    return {node: _drive_sign(node, analysis) for node in analysis.sites}


def _drive_sign(layer: Node, analysis: UnitAnalysis) -> int:
    seen, pending = {layer: 1}, deque([layer])
    acts: set[int] = set()
    returned: set[int] = set()
    while pending and len(seen) < _REACH:
        source = pending.popleft()  # the shortest way counts: others lead through the leak of a state
        for user in source.users:
            if user.op == "output":
                returned.add(seen[source])
                continue
            factor = _factor(user, source, analysis)
            if factor is None:
                acts.add(seen[source])
            elif factor:
                for reached in (user, *changed_in_place(user)):
                    if reached not in seen:
                        seen[reached] = seen[source] * factor
                        pending.append(reached)
    found = acts or returned
    return 1 if not found else sum(found) if len(found) == 1 else 0


def _factor(node: Node, source: Node, analysis: UnitAnalysis) -> int | None:
    """Return with which sign a result follows an argument, 0 if not known, None where it is no sum of it."""
    if node in analysis.sites:
        return None
    call = UnitCall(node, analysis.module_of(node), analysis)
    name = call.name if node.op == "call_module" else call.name.strip("_")
    if name in _TURNED:
        return -1
    if name in ("getattr", "get"):
        return 1 if call.argument(1, "name") in ("T", "mT", "data", "real") else 0
    if name in _PRODUCTS or name in _QUOTIENTS:
        left, right = call.argument(0, "input"), call.argument(1, "other")
        turned = -1 if name in _QUOTIENTS and right is source else 1
        return turned * _sign_of(left if right is source else right, analysis)
    if name not in _KEPT or (name == "lerp" and call.argument(2, "weight") is source):
        return None
    if name == "setitem":
        return int(call.argument(2, "value") is source)
    if name in _SUMS and call.argument(1, "other") is source:
        return (-1 if name in _SUBTRACTIONS else 1) * _sign_of(node.kwargs.get("alpha", 1), analysis)
    return 1


def _sign_of(factor: Any, analysis: UnitAnalysis) -> int:
    """Return the sign of a factor, 0 if it is not known."""
    number = analysis.numbers.get(factor) if isinstance(factor, Node) else factor
    if isinstance(number, (int, float)):
        return (number > 0) - (number < 0)
    return int(isinstance(factor, Node) and analysis.values[factor].nonnegative)
