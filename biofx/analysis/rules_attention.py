"""Attention: values are passed on, mixed over positions; queries and keys are compared, and exempt."""

from __future__ import annotations

import operator

import torch
from torch.nn import functional as F

from biofx.analysis.flow import NOTHING, RULES, Call, Flow
from biofx.analysis.rules_elementwise import declare


def weighed(call: Call) -> Flow:
    """``softmax``: of scores it makes weights that are not negative; of units, new ones."""
    if call.x.has_units:
        return call.ends("each unit's share depends on all others").replace(nonnegative=True)
    return NOTHING.replace(nonnegative=True, rank=call.x.rank)


def multiplied(call: Call) -> Flow:
    """A product of matrices: ``query @ key`` compares; ``weights @ value`` passes the values' units on."""
    left_argument, right_argument = (
        call.argument(0, "input"),
        call.argument(1, "mat2", call.argument(1, "other")),
    )
    left, right = call.flow(left_argument), call.flow(right_argument)
    if left.has_units and right.has_units:
        call.compares(left_argument, right_argument)
        return Flow(rank=left.rank if left.rank is not None else right.rank)
    if not left.has_units and not right.has_units:
        return Flow(rank=left.rank, nonnegative=left.nonnegative and right.nonnegative)
    mixed, weights, axis = (right, left, -2) if right.has_units else (left, right, -1)
    if not weights.nonnegative:
        return call.ends("it mixes units by weights that may be negative")
    if mixed.layout is None or mixed.layout.axis_at(axis) is not None:
        return call.ends("it mixes along the axis of the units")
    return call.keeps(mixed)


def attended(call: Call) -> Flow:
    """``scaled_dot_product_attention``: the units of the values."""
    query, key, value = (call.argument(place, name) for place, name in enumerate(("query", "key", "value")))
    call.compares(query, key)
    flow = call.flow(value)
    if flow.layout is None or flow.layout.axis_at(-2) is not None:
        return call.ends("it mixes along the axis of the units, or they are not known")
    return call.keeps(flow)


declare(("softmax",), weighed)
declare(("matmul", "bmm"), multiplied)
for _target in (operator.matmul, torch.matmul):
    RULES[_target] = multiplied
RULES[F.scaled_dot_product_attention] = attended
RULES[F.softmax] = weighed
