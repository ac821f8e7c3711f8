"""Normalisation, pooling, padding and resampling: channels stay channels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from biofx.analysis.forward import CannotFollow, declare
from biofx.analysis.layout import UnitLayout
from biofx.analysis.replication import Outcome, Replication, ReplicationCall
from biofx.analysis.rules_elementwise import keeps, perhaps_negative
from biofx.analysis.units import NOTHING, UnitCall, UnitValue
from biofx.operators.norm_ops import affine_synapses, batch_norm, batch_norm_synapses, instance_norm
from biofx.operators.split_ops import pool_synapses

# units


def normalised(call: UnitCall) -> UnitValue:
    """A normalisation moves a unit's zero and scales it; a negative gain would turn its sign over."""
    call.normalises()
    return call.keeps(nonnegative=False)


def pooled_over_space(call: UnitCall) -> UnitValue:
    """Pooling: each channel by itself, over axes behind it."""
    axes = _spatial_axes(call)
    if call.layout is not None and any(axis.position >= -axes for axis in call.layout.axes):
        return call.ends("it pools along the axis of the units")
    return UnitValue(parts=(call.keeps(), NOTHING)) if _returns_indices(call) else call.keeps()


def _returns_indices(call: UnitCall) -> bool:
    """Whether a maximum comes with the place where it was found."""
    name = call.name
    if call.module is not None:
        return getattr(call.module, "return_indices", False) is True
    if "max_pool" not in name:
        return False
    place = 6 if name.startswith("m") else 2
    return name.endswith("_with_indices") or call.argument(place, "return_indices") is True


def padded(call: UnitCall) -> UnitValue:
    """``pad``: what is added along the axis of the units is no unit's."""
    given = call.module.padding if call.module is not None else call.argument(1, "pad")
    sizes = call.numbers(given) if isinstance(given, Sequence) else [given] * 2
    layout = call.layout
    if layout is None:
        return call.keeps()
    value = call.argument(3, "value")
    nonnegative = call.x.nonnegative and (value is None or call.value(value).nonnegative)
    for axis in layout.axes:
        before, after = 2 * (-1 - axis.position), 2 * (-1 - axis.position) + 1
        if after >= len(sizes) or sizes[before] == sizes[after] == 0:
            continue
        first, last = sizes[before], sizes[after]
        if first is None or last is None or min(first, last) < 0 or axis.dims != (0,):
            raise CannotFollow("it pads the axis of the units by a number that is not known")
        labels = torch.cat([call.constants(first), layout.labels, call.constants(last)])
        layout = UnitLayout(labels, layout.axes)
    return call.keeps(nonnegative=nonnegative, layout=layout)


def _spatial_axes(call: UnitCall) -> int:
    found = re.search(r"([123])[dD]", call.name)
    return int(found[1]) if found else 1


def shuffled(call: UnitCall) -> UnitValue:
    """``channel_shuffle``: the groups are interleaved."""
    groups, layout = _number(call, "groups", "number of groups"), _feature_maps(call)
    labels = layout.labels.reshape(groups, -1).T.flatten()
    return call.keeps(layout=UnitLayout(labels, layout.axes))


def pixels_shuffled(call: UnitCall) -> UnitValue:
    """``pixel_shuffle``: channels that become pixels of one channel are one unit."""
    factor, layout = _number(call, "upscale_factor"), _feature_maps(call)
    table = layout.labels.reshape(-1, factor**2)
    call.unify_rows(table)
    return call.keeps(layout=UnitLayout(table[:, 0], layout.axes))


def pixels_unshuffled(call: UnitCall) -> UnitValue:
    """``pixel_unshuffle``: a channel's pixels become channels of the same unit."""
    factor, layout = _number(call, "downscale_factor"), _feature_maps(call)
    return call.keeps(layout=UnitLayout(layout.labels.repeat_interleave(factor**2), layout.axes))


def _number(call: UnitCall, name: str, words: str = "") -> int:
    number = call.option(1, name) if call.module is not None else call.value(call.argument(1, name)).number
    if not isinstance(number, int):
        raise CannotFollow(f"its {words or name} is computed in the graph")
    return number


def _feature_maps(call: UnitCall) -> UnitLayout:
    layout = call.layout
    axis = None if layout is None else layout.axis_at(-3)
    if layout is None or layout.labels.dim() != 1 or axis is None or axis.dims != (0,):
        raise CannotFollow("its argument has no known channels along axis -3")
    return layout


def pooled(call: UnitCall) -> UnitValue:
    """``pool_synapses``: the members of a group carry the same, so they are one unit."""
    position, gamma = (cast(int, call.node.kwargs[name]) for name in ("channel_axis", "gamma"))
    layout = call.layout
    if layout is None:
        return call.ends("it sums groups of units that are not known")
    axis = layout.axis_at(position)
    if axis is None or axis.dims != (0,) or layout.labels.dim() != 1:
        return call.ends("it sums across the axis of the units")
    call.unify_rows(layout.labels.reshape(-1, gamma))
    return call.keeps()


# replication: pooling, padding, resampling


def _over_last_axes(count: int) -> Callable[[ReplicationCall], Outcome]:
    """Pools over the last ``count`` axes, each channel by itself."""

    def rule(call: ReplicationCall) -> Outcome:
        source = call.source
        if call.option(6, "return_indices", False):
            raise CannotFollow("it returns indices too")
        return _leaving_channels_alone(source, count)

    return rule


def _leaving_channels_alone(source: Replication, count: int) -> Outcome:
    if -source.axis <= count:
        raise CannotFollow("it acts along the channels")
    return Outcome(source)


def _pad(call: ReplicationCall) -> Outcome:
    """Pads the last axes, two numbers for each."""
    padding = call.fixed(1, "pad" if call.module is None else "padding")
    count = len(padding) // 2 if isinstance(padding, (tuple, list)) else 1
    return _leaving_channels_alone(call.source, count)


def _resample(call: ReplicationCall) -> Outcome:
    """Resamples all axes behind that of the channels."""
    source = call.source
    if len(call.tensors) != 1:
        raise CannotFollow("an option of it is known only when it runs")
    if source.axis != 1 - call.rank(source):
        raise CannotFollow("it acts along the channels")
    return Outcome(source)


# replication: normalisation. Statistics of the members of a connection are those of the connection, so they
# are computed once for all. An affine map behind has entries of its own for each member, and sets them apart.

_BATCH_NORM_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
_SETTINGS = ("momentum", "eps", "track_running_stats")
"""Settings of a layer that may change at any time, and are therefore read whenever the graph runs."""
_SEVERAL_VALUES = "it has statistics for each of several values of a channel"


def _batch_norm(call: ReplicationCall) -> Outcome:
    """Normalises each channel over the batch."""
    source, module = call.source, call.module
    if type(module) not in _BATCH_NORM_RANKS:
        raise CannotFollow("it has statistics for each channel")
    if source.inner:
        raise CannotFollow(_SEVERAL_VALUES)
    if module.track_running_stats != (module.running_mean is not None):
        raise CannotFollow("whether it tracks statistics was changed after it was made")
    if not module.affine and not module.track_running_stats:
        if source.axis != 1 - call.rank(source):
            raise CannotFollow("it normalises along another axis than the channels'")
        return Outcome(source)

    def normalise_compact(folding: Any) -> None:
        node, path = call.node, str(call.node.target)
        names = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias", "training")
        read = [
            None if getattr(module, name, None) is None else folding.read(f"{path}.{name}", node)
            for name in names
        ]
        settings = {name: folding.setting_of(node, name) for name in _SETTINGS}
        _to_batch_norm_synapses(node, source, *node.all_input_nodes, *read)
        node.kwargs = {**node.kwargs, "ranks": _BATCH_NORM_RANKS[type(module)], **settings}

    return Outcome(None, normalise_compact, message=_statistics(source))


def _lowered_batch_norm(call: ReplicationCall) -> Outcome:
    """Normalises each channel over the batch, where an earlier pass has made the weight visible."""
    node, source = call.node, call.source
    if source.inner:
        raise CannotFollow(_SEVERAL_VALUES)
    options = {name: node.kwargs[name] for name in ("ranks", *_SETTINGS) if name in node.kwargs}

    def normalise_compact(folding: Any) -> None:
        x, weight, bias, mean, variance, count, training = node.args
        _to_batch_norm_synapses(node, source, x, mean, variance, count, weight, bias, training)
        node.kwargs = {**node.kwargs, **options}

    return Outcome(None, normalise_compact, message=_statistics(source))


def _to_batch_norm_synapses(node: Node, source: Replication, *args: Any) -> None:
    node.op, node.target, node.args = "call_function", batch_norm_synapses, args
    node.kwargs = {"gamma": source.gamma, "channel_axis": source.axis}


def _layer_norm(call: ReplicationCall) -> Outcome:
    """Normalises over the last axes, the channels' or not."""
    source = call.source
    shape = call.fixed(1, "normalized_shape")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(shape) < -source.axis:
        return Outcome(source)
    size = shape[source.axis]
    if size % (source.groups * source.gamma) or (size != source.groups * source.gamma and not source.inner):
        raise CannotFollow("its normalized_shape does not fit the channels")
    compact = list(shape)
    compact[source.axis] = size // source.gamma
    return _statistics_then_affine(call, F.layer_norm, tuple(compact))


def _group_norm(call: ReplicationCall) -> Outcome:
    """Normalises over groups of channels, which must hold whole connections."""
    source = call.source
    if source.inner or source.axis != 1 - call.rank(source):
        raise CannotFollow("it normalises along another axis than the channels'")
    groups = call.fixed(1, "num_groups")
    if source.groups % groups:
        raise CannotFollow(f"its {groups} groups do not hold whole connections")
    return _statistics_then_affine(call, F.group_norm, groups)


def _instance_norm(call: ReplicationCall) -> Outcome:
    """Normalises each channel of each sample."""
    source, module = call.source, call.module
    if source.inner or source.axis == -1 or source.axis != 1 - call.rank(source):
        raise CannotFollow("it normalises along another axis than the channels'")
    if module is None or getattr(module, "affine", True) or getattr(module, "track_running_stats", True):
        raise CannotFollow("it has parameters or statistics for each channel")

    def normalise_compact(folding: Any) -> None:
        node = call.node  # the module would warn of the number of channels
        eps = folding.setting_of(node, "eps")
        node.op, node.target, node.args = "call_function", F.instance_norm, tuple(node.all_input_nodes)
        node.kwargs = {"eps": eps}

    return Outcome(source, normalise_compact)


def _statistics_then_affine(call: ReplicationCall, function: Any, over: Any) -> Outcome:
    """Normalise the compact tensor without an affine map, and put that behind where there is one."""
    node, module, source = call.node, call.module, call.source
    given = {name: call.option(place, name) for name, place in (("weight", 2), ("bias", 3))}
    names = [name for name, value in given.items() if value is not None]

    def normalise_compact(folding: Any) -> None:
        path, x = str(node.target), node.all_input_nodes[0]
        behind = list(node.users)
        eps = call.option(4, "eps", 1e-5) if module is None else folding.setting_of(node, "eps")
        node.op, node.kwargs = "call_function", {}
        node.target, node.args = function, (x, over, None, None, eps)
        if names:
            affine = folding.insert_after(node, f"{node.name}_affine", affine_synapses)
            values = {
                name: given[name] if module is None else folding.read(f"{path}.{name}", affine)
                for name in names
            }
            affine.args = (node, values.get("weight"), values.get("bias"))
            affine.kwargs = source.spread
            for user in behind:
                user.replace_input_with(node, affine)

    return Outcome(None if names else source, normalise_compact, message=_statistics(source))


def _statistics(source: Replication) -> str:
    return f"statistics of {source.groups} of its {source.groups * source.gamma} channels, which repeat them"


# what rules an operation has

declare(*(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), units=normalised, replication=_batch_norm)
declare(batch_norm, units=normalised, replication=_lowered_batch_norm)
declare("layer_norm", units=normalised, replication=_layer_norm)
declare("group_norm", units=normalised, replication=_group_norm)
declare(
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), units=normalised, replication=_instance_norm
)
declare(
    *(nn.SyncBatchNorm, nn.RMSNorm, nn.LocalResponseNorm, F.batch_norm, F.instance_norm, F.rms_norm),
    *(F.local_response_norm, instance_norm),
    units=normalised,
)
for _axes in (1, 2, 3):
    declare(
        *(f"{kind}_pool{_axes}d" for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")),
        units=pooled_over_space,
        replication=_over_last_axes(_axes),
    )
    declare(  # what torch makes of return_indices=True
        *(f"{kind}_pool{_axes}d_with_indices" for kind in ("max", "adaptive_max", "fractional_max")),
        units=pooled_over_space,
    )
    for _mode in ("Zero", "Reflection", "Replication", "Constant", "Circular"):
        declare(getattr(nn, f"{_mode}Pad{_axes}d"), units=padded, replication=_pad)
declare(F.pad, units=padded, replication=_pad)
declare("interpolate", "upsample", units=keeps, replication=_resample)
declare(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, units=keeps, replication=_resample)
declare(F.normalize, units=perhaps_negative)
declare("channel_shuffle", "native_channel_shuffle", units=shuffled)
declare("pixel_shuffle", units=pixels_shuffled)
declare("pixel_unshuffle", units=pixels_unshuffled)
declare(pool_synapses, units=pooled)
