"""What normalisation makes of values that repeat each channel.

Statistics of the members of a connection are those of the connection, so they are computed once for all.
An affine map behind has entries of its own for each member, and sets them apart.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from biofx.analysis.replication import Call, Outcome, Replication, ReplicationEnds, Rule
from biofx.operators.norm_ops import affine_synapses, batch_norm_synapses

_BATCH_NORM_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
_SETTINGS = ("momentum", "eps", "track_running_stats")
"""What a layer may be told at any time, and is therefore read whenever the graph runs."""


def _batch_norm(call: Call) -> Outcome:
    """Normalises each channel over the batch."""
    source, module = call.source, call.module
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module) not in _BATCH_NORM_RANKS:
        raise ReplicationEnds("it has statistics for each channel")
    if source.inner:
        raise ReplicationEnds("it has statistics for each of several values of a channel")
    if module.track_running_stats != (module.running_mean is not None):
        raise ReplicationEnds("whether it tracks statistics was changed after it was made")
    if not module.affine and not module.track_running_stats:
        if source.axis != 1 - call.rank(source):
            raise ReplicationEnds("it normalises along another axis than the channels'")
        return Outcome(source)
    ranks = _BATCH_NORM_RANKS[type(module)]

    def normalise_compact(folding: Any) -> None:
        node, path = call.node, str(call.node.target)

        def read(name: str) -> Node | None:
            held = getattr(module, name, None)
            return None if held is None else folding.read(f"{path}.{name}", node)

        names = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias", "training")
        args = (*call.node.all_input_nodes, *(read(name) for name in names))
        settings = {name: folding.setting_of(node, name) for name in _SETTINGS}
        node.op, node.target, node.args = "call_function", batch_norm_synapses, args
        node.kwargs = {
            "gamma": source.gamma,
            "channel_axis": source.axis,
            "ranks": ranks,
            **settings,
        }

    return Outcome(None, normalise_compact, message=_statistics(source))


def lowered_batch_norm(call: Call) -> Outcome:
    """Normalises each channel over the batch, where an earlier pass has made the weight visible."""
    source, node = call.source, call.node
    if source.inner:
        raise ReplicationEnds("it has statistics for each of several values of a channel")
    options = {name: node.kwargs[name] for name in ("ranks", *_SETTINGS) if name in node.kwargs}

    def normalise_compact(folding: Any) -> None:
        x, weight, bias, mean, variance, count, training = node.args
        node.target, node.args = (
            batch_norm_synapses,
            (x, mean, variance, count, weight, bias, training),
        )
        node.kwargs = {"gamma": source.gamma, "channel_axis": source.axis, **options}

    return Outcome(None, normalise_compact, message=_statistics(source))


def _layer_norm(call: Call) -> Outcome:
    """Normalises over the last axes, whichever they are."""
    source = call.source
    shape = call.fixed("normalized_shape", 1)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(shape) < -source.axis:
        return Outcome(source)
    size = shape[source.axis]
    if size % (source.groups * source.gamma) or (size != source.groups * source.gamma and not source.inner):
        raise ReplicationEnds("its normalized_shape does not fit the channels")
    compact = list(shape)
    compact[source.axis] = size // source.gamma
    return _statistics_then_affine(
        call, source, lambda x, eps: (F.layer_norm, (x, tuple(compact), None, None, eps))
    )


def _group_norm(call: Call) -> Outcome:
    """Normalises over groups of channels, which must hold whole connections."""
    source = call.source
    if source.inner or source.axis != 1 - call.rank(source):
        raise ReplicationEnds("it normalises along another axis than the channels'")
    groups = call.fixed("num_groups", 1)
    if source.groups % groups:
        raise ReplicationEnds(f"its {groups} groups do not hold whole connections")
    return _statistics_then_affine(call, source, lambda x, eps: (F.group_norm, (x, groups, None, None, eps)))


def _instance_norm(call: Call) -> Outcome:
    """Normalises each channel of each sample."""
    source, module = call.source, call.module
    if source.inner or source.axis == -1 or source.axis != 1 - call.rank(source):
        raise ReplicationEnds("it normalises along another axis than the channels'")
    if module is None or getattr(module, "affine", True) or getattr(module, "track_running_stats", True):
        raise ReplicationEnds("it has parameters or statistics for each channel")

    def normalise_compact(folding: Any) -> None:
        node = call.node  # the module would warn of the number of channels
        eps = folding.setting_of(node, "eps")
        node.op, node.target, node.args = "call_function", F.instance_norm, tuple(node.all_input_nodes)
        node.kwargs = {"eps": eps}

    return Outcome(source, normalise_compact)


def _statistics_then_affine(call: Call, source: Replication, normalised: Any) -> Outcome:
    """Normalise the compact tensor without an affine map, and let that follow where there is one."""
    node, module = call.node, call.module
    given = {name: call.option(name, place) for name, place in (("weight", 2), ("bias", 3))}
    names = [name for name, value in given.items() if value is not None]

    def normalise_compact(folding: Any) -> None:
        path, x = str(node.target), node.all_input_nodes[0]
        behind = list(node.users)
        eps = call.option("eps", 4, 1e-5) if module is None else folding.setting_of(node, "eps")
        node.op, node.kwargs = "call_function", {}
        node.target, node.args = normalised(x, eps)
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


NORM_RULES: dict[str, Rule] = {
    **dict.fromkeys(("batchnorm1d", "batchnorm2d", "batchnorm3d"), _batch_norm),
    **dict.fromkeys(("layernorm", "layer_norm"), _layer_norm),
    **dict.fromkeys(("groupnorm", "group_norm"), _group_norm),
    **dict.fromkeys(("instancenorm1d", "instancenorm2d", "instancenorm3d"), _instance_norm),
}
