"""Operations on several values: sums and products make units one, concatenation puts them side by side."""

from __future__ import annotations

import operator
from typing import cast

import torch

from biofx.analysis.flow import NOTHING, RULES, Call, Flow
from biofx.analysis.layout import Layout, LayoutError, concatenated
from biofx.analysis.rules_elementwise import declare
from biofx.graph.branches import by_mode


def added(call: Call) -> Flow:
    """``a + b``: the units of both are one, index by index."""
    left, right = call.flow(call.argument(0, "input")), call.flow(call.argument(1, "other"))
    number = _computed(call, left, right, operator.add)
    if number is not None:
        return number
    if call.node.kwargs.get("alpha", 1) != 1:
        return call.ends("it adds a multiple of unknown sign")
    if _is_one_for_many(left, right) or _is_one_for_many(right, left):
        return call.ends("it adds one unit to many others, at whose synapses it would have their signs")
    return call.unified((left, right)).replace(nonnegative=left.nonnegative and right.nonnegative)


def subtracted(call: Call) -> Flow:
    """``a - b``: b would speak with the opposite sign."""
    left, right = call.flow(call.argument(0, "input")), call.flow(call.argument(1, "other"))
    number = _computed(call, left, right, operator.sub)
    if number is not None:
        return number
    if right.has_units:
        return call.ends("it subtracts activity, and excitation turns into inhibition")
    return call.keeps(left, nonnegative=False)


def multiplied(call: Call) -> Flow:
    """``a * b``: one unit, as a gate and what it gates are; a factor of unknown sign ends the units."""
    left, right = call.flow(call.argument(0, "input")), call.flow(call.argument(1, "other"))
    number = _computed(call, left, right, operator.mul)
    if number is not None:
        return number
    if left.size_of is not None and right.size_of is not None:
        return Flow(nonnegative=True, size_of=left.size_of + right.size_of)
    if any(not flow.has_units and not flow.nonnegative for flow in (left, right)):
        if not (left.has_units or right.has_units):
            return NOTHING.replace(rank=_highest(left, right))
        return call.ends("it multiplies by something that may be negative")
    return call.unified((left, right)).replace(nonnegative=left.nonnegative and right.nonnegative)


def divided(call: Call) -> Flow:
    """``a / b``: a keeps its units where b is known to be positive."""
    left, right = call.flow(call.argument(0, "input")), call.flow(call.argument(1, "other"))
    if call.node.target is operator.floordiv:
        number = _computed(call, left, right, operator.floordiv)
        if number is not None:
            return number
    if right.has_units or (left.has_units and not right.nonnegative):
        return call.ends("it divides by something that may be negative")
    return call.keeps(left)


def chosen(call: Call) -> Flow:
    """``where(condition, a, b)``, ``maximum``: a unit of either is one."""
    first = 1 if call.node.target in (torch.where, "where") else 0
    if call.node.op == "call_method" and call.node.target == "where":
        flows = [call.flow(call.argument(0, "self")), call.flow(call.argument(2, "other"))]
    else:
        flows = [call.flow(call.argument(first, "input")), call.flow(call.argument(first + 1, "other"))]
    return call.unified(flows).replace(nonnegative=all(flow.nonnegative for flow in flows))


def chosen_by_mode(call: Call) -> Flow:
    """``by_mode(training, a, b)``: a unit of either is one; two of different forms go no further."""
    flows = [call.flow(call.argument(1, "in_training")), call.flow(call.argument(2, "in_evaluation"))]
    if any(flow.parts for flow in flows):
        return call.ends("its form is not the same in training and in evaluation")
    if not any(flow.has_units for flow in flows):
        return NOTHING
    return call.unified(flows).replace(nonnegative=all(flow.nonnegative for flow in flows))


def masked(call: Call) -> Flow:
    """``masked_fill``: what is filled in belongs to nobody."""
    fill = call.flow(call.argument(2, "value"))
    return call.keeps(nonnegative=call.x.nonnegative and fill.nonnegative)


def joined(call: Call) -> Flow:
    """``cat``: along the axis of the units they come side by side, along another they are one."""
    parts = call.flow(call.argument(0, "tensors")).parts
    axis = call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    if not parts or not any(part.has_units for part in parts):
        return NOTHING
    nonnegative = all(part.nonnegative for part in parts)
    known = [part for part in parts if part.layout is not None]
    if not known:
        if all(part.origin is parts[0].origin for part in parts):
            return call.keeps(parts[0], nonnegative=nonnegative)
        return call.ends("none of the values that it concatenates has known units")
    ranked = next((part for part in parts if part.rank is not None), parts[0])
    position = call.position(axis, ranked)
    pattern = known[0].layout
    if pattern is None or pattern.axis_at(position) is None:
        return call.unified(parts).replace(nonnegative=nonnegative)
    layouts = []
    for part in parts:
        if part.layout is not None:
            layouts.append(part.layout)
        else:
            found = call.known_layout(part, pattern.axes)
            if found is None:
                raise LayoutError("one of the values that it concatenates has units that are not known")
            layouts.append(found)
    return ranked.replace(layout=concatenated(layouts, position), origin=None, nonnegative=nonnegative)


def stacked(call: Call) -> Flow:
    """``stack``: side by side along a new axis, so one, index by index."""
    parts = call.flow(call.argument(0, "tensors")).parts
    if not parts or not any(part.has_units for part in parts):
        return NOTHING
    whole = call.unified(parts)
    if whole.layout is None:
        return call.ends("it stacks values whose units are not known")
    position = call.position(call.argument(1, "dim", 0), whole, added=1)
    rank = None if whole.rank is None else whole.rank + 1
    nonnegative = all(part.nonnegative for part in parts)
    layout = whole.layout.shifted(position, -1)
    return Flow(layout=layout, rank=rank, nonnegative=nonnegative)


def _computed(call: Call, left: Flow, right: Flow, function: object) -> Flow | None:
    """Return the result of arithmetic on sizes, None where it is not that."""
    if function is operator.add and right.parts is not None:  # a tuple of sizes, and more of them
        if left.parts is not None:
            return Flow(parts=left.parts + right.parts)
        if left.tail is not None:
            return Flow(nonnegative=True, tail=left.tail + right.parts)
    if left.number is not None and right.number is not None and callable(function):
        value = function(left.number, right.number)
        return Flow(number=value, nonnegative=value >= 0)
    return None


def _is_one_for_many(one: Flow, many: Flow) -> bool:
    if one.layout is None or many.layout is None:
        return False
    return one.layout.labels.numel() == 1 < many.layout.labels.numel()


def _highest(*flows: Flow) -> int | None:
    ranks = [flow.rank for flow in flows if flow.rank is not None]
    return max(ranks, default=None)


def shuffled(call: Call) -> Flow:
    """``channel_shuffle``: the groups are interleaved."""
    groups = call.module.groups if call.module is not None else call.flow(call.argument(1, "groups")).number
    layout = _feature_maps(call)
    if groups is None:
        raise LayoutError("its number of groups is computed in the graph")
    labels = layout.labels.reshape(groups, -1).T.flatten()
    return call.keeps().replace(layout=Layout(labels, layout.axes))


def pixels_shuffled(call: Call) -> Flow:
    """``pixel_shuffle``: channels that become pixels of one channel are one unit."""
    factor = _factor(call, "upscale_factor")
    layout = _feature_maps(call)
    table = layout.labels.reshape(-1, factor**2)
    call.unify_rows(table)
    return call.keeps().replace(layout=Layout(table[:, 0], layout.axes))


def pixels_unshuffled(call: Call) -> Flow:
    """``pixel_unshuffle``: a channel's pixels become channels of the same unit."""
    factor = _factor(call, "downscale_factor")
    layout = _feature_maps(call)
    return call.keeps().replace(layout=Layout(layout.labels.repeat_interleave(factor**2), layout.axes))


def pooled(call: Call) -> Flow:
    """``pool_synapses``: the members of a group carry the same, so they are one unit."""
    position, gamma = (cast(int, call.node.kwargs[name]) for name in ("channel_axis", "gamma"))
    layout = call.x.layout
    if layout is None:
        return call.ends("it sums groups of units that are not known")
    axis = layout.axis_at(position)
    if axis is None or axis.dims != (0,) or layout.labels.dim() != 1:
        return call.ends("it sums across the axis of the units")
    call.unify_rows(layout.labels.reshape(-1, gamma))
    return call.keeps()


def _factor(call: Call, name: str) -> int:
    number = (
        getattr(call.module, name) if call.module is not None else call.flow(call.argument(1, name)).number
    )
    if not isinstance(number, int):
        raise LayoutError(f"its {name} is computed in the graph")
    return number


def _feature_maps(call: Call) -> Layout:
    layout = call.x.layout
    axis = None if layout is None else layout.axis_at(-3)
    if layout is None or layout.labels.dim() != 1 or axis is None or axis.dims != (0,):
        raise LayoutError("its argument has no known channels along axis -3")
    return layout


declare(("add",), added)
declare(("sub", "subtract"), subtracted)
declare(("mul", "multiply"), multiplied)
declare(("div", "divide", "true_divide"), divided)
declare(("where", "maximum", "minimum"), chosen)
declare(("masked_fill",), masked)
RULES[by_mode] = chosen_by_mode
declare(("cat", "concat", "concatenate"), joined)
declare(("stack",), stacked)
declare(("channel_shuffle", "native_channel_shuffle"), shuffled)
declare(("pixel_shuffle",), pixels_shuffled)
declare(("pixel_unshuffle",), pixels_unshuffled)
for _name, _rule in (
    ("add", added),
    ("sub", subtracted),
    ("mul", multiplied),
    ("truediv", divided),
    ("floordiv", divided),
):
    for _spelled in (_name, f"i{_name}"):
        RULES[getattr(operator, _spelled)] = _rule
