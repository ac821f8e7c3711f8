"""Operations that only move entries, in an observed run: they are run once more, on the numbers of the units.

Shapes and indices are known there, so nothing has to be said of how a ``view`` merges axes: each entry of a
value is replaced by the number of its unit, the operation moves them, and where they are then is read off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from biofx.analysis.forward import CannotFollow
from biofx.analysis.layout import Axis, UnitLayout
from biofx.analysis.units import NOTHING, UnitCall, UnitValue
from biofx.graph.observed_functions import SHAPE
from biofx.model.observed_runs import INDICES

_NOBODY = -1
"""In the place of a number, for an entry that is no unit's."""
_MOST_ENTRIES = 1 << 25
"""The largest value of which labels are made, a count of entries."""
_MOVES = frozenset(
    str.split(
        """view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t expand
        expand_as repeat repeat_interleave tile roll flip narrow select index_select getitem setitem chunk
        split tensor_split unbind stack cat concat concatenate unsqueeze squeeze view_as reshape_as
        broadcast_to gather take_along_dim pad unfold diagonal rot90 pixel_shuffle pixel_unshuffle
        channel_shuffle hstack vstack dstack unsafe_chunk unsafe_split split_with_sizes"""
    )
)
"""Names of the functions."""
_ATTRIBUTES = ("T", "mT", "H", "mH")


def moved(call: UnitCall) -> UnitValue | None:
    """Return where the units of a result are, None if the operation is not one that only moves entries.

    Raises:
        CannotFollow: the result cannot be computed from labels.
    """
    node = call.node
    if node.op != "call_function" or not (
        call.name in _MOVES or (node.target is getattr and node.args[1] in _ATTRIBUTES)
    ):
        return None
    indices = node.meta.get(INDICES, {})  # which activity may decide, as in mixtures of experts
    sources = {
        source: NOTHING if source.name in indices and source is not node.args[0] else call.value(source)
        for source in node.all_input_nodes
    }
    moving = [value for source, value in sources.items() if source.name not in indices or value.has_units]
    if any(SHAPE not in source.meta for source in sources) or any(
        value.origin is not None for value in moving
    ):
        return None  # it is open where some units are, or an entry of a tuple is taken
    if not any(value.layout is not None for value in moving):
        return None
    found = _run(call, sources)
    nonnegative = all(value.nonnegative for value in moving)
    if isinstance(found, Tensor):
        return _value(call, found, nonnegative)
    return UnitValue(parts=tuple(_value(call, entry, nonnegative) for entry in found))


def _run(call: UnitCall, sources: dict[Node, UnitValue]) -> Any:
    node = call.node
    indices = node.meta.get(INDICES, {})
    labels = {
        source: indices.get(source.name)
        if value.layout is None and source.name in indices
        # an index, or entries of nobody's
        else labels_of(value.layout, source.meta[SHAPE])
        for source, value in sources.items()
    }
    args: Any = map_arg(node.args, labels.__getitem__)
    kwargs: Any = dict(map_arg(node.kwargs, labels.__getitem__))
    function: Any = node.target
    if call.name == "pad":
        if (args[2] if len(args) > 2 else kwargs.get("mode", "constant")) != "constant":
            raise CannotFollow("it pads with entries of its argument")
        return F.pad(args[0], args[1] if len(args) > 1 else kwargs["pad"], value=_NOBODY)
    try:
        found = function(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise CannotFollow(f"the numbers of its units cannot be moved: {error}") from error
    return args[0] if call.name == "setitem" else found


def labels_of(layout: UnitLayout | None, shape: tuple[int, ...]) -> Tensor:
    """Return the number of the unit at each entry of a value, int64, of the shape of the value.

    Args:
        layout: of the value; None for a value without units, of which each entry is -1.
        shape: of the value.

    Raises:
        CannotFollow: the layout does not fit the shape.
    """
    if torch.Size(shape).numel() > _MOST_ENTRIES:
        raise CannotFollow("it moves more entries than are followed one by one")
    if layout is None:
        return torch.full(shape, _NOBODY)
    order: list[int] = []
    apart: list[int] = []
    whole: list[int] = []
    for place, size in enumerate(shape):
        axis = layout.axis_at(place - len(shape))
        dims: tuple[int | None, ...] = (None,) if axis is None else axis.dims
        known = torch.Size(layout.labels.shape[dim] for dim in dims if dim is not None).numel()
        if size % max(1, known) or dims.count(None) > 1 or (None not in dims and size != known):
            raise CannotFollow(f"{known} units were expected along an axis of size {size}")
        for dim in dims:
            apart.append(1 if dim is None else layout.labels.shape[dim])
            whole.append(size // max(1, known) if dim is None else layout.labels.shape[dim])
            order += [] if dim is None else [dim]
    if len(order) != layout.labels.dim():
        raise CannotFollow("its units lie along axes that the value does not have")
    return layout.labels.permute(order).reshape(apart).expand(whole).reshape(shape).clone()


def layout_of(call: UnitCall, labels: Tensor) -> UnitLayout | None:
    """Return the layout that says which unit each entry of a value is, None if it has none."""
    if bool((labels == _NOBODY).all()):
        return None
    axes = []
    rank = labels.dim()
    for place in range(rank):
        first = labels.narrow(place, 0, 1)
        if labels.shape[place] > 1 and bool((labels == first).all()):
            labels = first
        elif labels.shape[place] > 1:
            axes.append(place)
    labels = labels.reshape([labels.shape[place] for place in axes] or [1])
    nobody = labels == _NOBODY
    if bool(nobody.any()):
        labels = labels.clone()
        labels[nobody] = call.constants(int(nobody.sum()))
    positions = [place - rank for place in axes] or [-1]
    return UnitLayout(labels, tuple(Axis(position, (dim,)) for dim, position in enumerate(positions)))


def _value(call: UnitCall, labels: Tensor, nonnegative: bool) -> UnitValue:
    layout = layout_of(call, labels) if labels.numel() else None
    return UnitValue(layout=layout, rank=labels.dim(), nonnegative=nonnegative)
