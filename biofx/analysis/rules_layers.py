"""Normalisation, pooling, padding and resampling: channels stay channels."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from biofx.analysis.flow import NOTHING, RULES, Call, Flow
from biofx.analysis.layout import Layout, LayoutError
from biofx.analysis.rules_elementwise import declare, keeps, perhaps_negative
from biofx.analysis.rules_join import pooled
from biofx.operators.norm_ops import batch_norm, instance_norm
from biofx.operators.split_ops import pool_synapses

_SPATIAL = ("1d", "2d", "3d")


def normalised(call: Call) -> Flow:
    """A norm moves a unit's zero and scales it; where its gain is negative it would turn the unit over."""
    call.normalises()
    return call.keeps(nonnegative=False)


def looked_up(call: Call) -> Flow:
    """``embedding``: rows of numbers that are learned."""
    return call.ends("it looks up rows of a weight, which no unit makes")


def pooled_over_space(call: Call) -> Flow:
    """Pooling: each channel by itself, over axes behind it."""
    axes = _spatial_axes(call)
    if call.x.layout is not None and any(axis.position >= -axes for axis in call.x.layout.axes):
        return call.ends("it pools along the axis of the units")
    return Flow(parts=(call.keeps(), NOTHING)) if _returns_indices(call) else call.keeps()


def _returns_indices(call: Call) -> bool:
    """Whether a maximum comes with the place where it was found."""
    if call.module is not None:
        return getattr(call.module, "return_indices", False) is True
    name = getattr(call.node.target, "__name__", str(call.node.target))
    if "max_pool" not in name:
        return False
    return (
        name.endswith("_with_indices") or call.argument(6 if name[0] == "m" else 2, "return_indices") is True
    )


def padded(call: Call) -> Flow:
    """``pad``: what is added along the axis of the units belongs to nobody."""
    given = call.module.padding if call.module is not None else call.argument(1, "pad")
    sizes = call.numbers(given) if isinstance(given, Sequence) else [given] * 2
    layout = call.x.layout
    if layout is None:
        return call.keeps()
    value = call.argument(3, "value")
    nonnegative = call.x.nonnegative and (value is None or call.flow(value).nonnegative)
    for axis in layout.axes:
        before, after = 2 * (-1 - axis.position), 2 * (-1 - axis.position) + 1
        if after >= len(sizes) or sizes[before] == sizes[after] == 0:
            continue
        first, last = sizes[before], sizes[after]
        if first is None or last is None or min(first, last) < 0 or axis.dims != (0,):
            raise LayoutError("it pads the axis of the units by a number that is not known")
        labels = torch.cat([call.nobody(first), layout.labels, call.nobody(last)])
        layout = Layout(labels, layout.axes)
    return call.keeps(nonnegative=nonnegative).replace(layout=layout)


def _spatial_axes(call: Call) -> int:
    target = call.node.target
    name = type(call.module).__name__ if call.module is not None else getattr(target, "__name__", str(target))
    found = re.search(r"([123])[dD]", name)
    return int(found[1]) if found else 1


_NORMS = (
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LayerNorm", "GroupNorm", "RMSNorm"),
    *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LocalResponseNorm"),
)
for _name in _NORMS:
    RULES[getattr(nn, _name)] = normalised
for _function in (
    *(F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, F.local_response_norm),
    *(batch_norm, instance_norm),
):
    RULES[_function] = normalised

declare(
    [
        f"{kind}_pool{axes}"
        for axes in _SPATIAL
        for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")
    ]
    + [
        f"{kind}_pool{axes}_with_indices"  # what torch makes of return_indices=True
        for axes in _SPATIAL
        for kind in ("max", "adaptive_max", "fractional_max")
        if hasattr(F, f"{kind}_pool{axes}_with_indices")
    ],
    pooled_over_space,
)
for _axes in _SPATIAL:
    for _mode in ("Zero", "Reflection", "Replication", "Constant", "Circular"):
        RULES[getattr(nn, f"{_mode}Pad{_axes}")] = padded
RULES[F.pad] = padded
declare(("interpolate",), keeps)
for _module in (nn.Upsample, nn.UpsamplingNearest2d):
    RULES[_module] = keeps
RULES[nn.UpsamplingBilinear2d] = keeps
RULES[F.normalize] = perhaps_negative
RULES[pool_synapses] = pooled
for _lookup in (nn.Embedding, nn.EmbeddingBag, F.embedding, F.embedding_bag):
    RULES[_lookup] = looked_up
