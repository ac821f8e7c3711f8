"""Layers with weights, which read units and make new ones; attention, in one node or written out."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.nn import functional as F

from biofx.analysis.forward import CannotFollow, declare
from biofx.analysis.layout import Axis, UnitLayout
from biofx.analysis.replication import Outcome, Replication, ReplicationCall
from biofx.analysis.units import NOTHING, UnitCall, UnitValue
from biofx.layers.attention import ATTENTION
from biofx.layers.layer_kind import LayerKind
from biofx.layers.recurrent import CELL_KINDS, GRU, LSTM, RNN
from biofx.layers.single_weight import EMBEDDING, EMBEDDING_BAG
from biofx.layers.weight_site import WeightSite
from biofx.operators.compound_ops import GATES
from biofx.operators.split_ops import folded_shape

# units: layers with one weight, recurrent layers, attention


def layer(call: UnitCall) -> UnitValue:
    """A layer with one weight reads one unit at each input channel, and makes one at each output channel."""
    site = call.sites[0]
    source = call.argument(*site.kind.source)
    call.analysis.read(site, source)
    if call.analysis.is_turned(site):
        return call.ends(
            f"{site.parameter_path} is read the other way round before, and makes other units there"
        )
    made = call.analysis.made(site.parameter_path, site.output_channels, site.kind.channel_axis)
    rank = site.kind.kernel_axes + 2 if site.kind.kernel_axes else call.value(source).rank
    return UnitValue(layout=made, rank=rank)


def attention(call: UnitCall) -> UnitValue:
    """The units of the values are read by the output projection; queries and keys are compared."""
    analysis, sites = call.analysis, {site.role: site for site in call.sites}
    inputs = {name: call.argument(place, name) for place, name in enumerate(("query", "key", "value"))}
    joint = sites.get("query_key_value")
    if joint is not None:
        analysis.read(joint, inputs["value"])
        query, key, value = _made(call, joint, joint.parameter.shape[0]).chunk(3)
    else:
        made = []
        for name, source in inputs.items():
            analysis.read(sites[name], source)
            made.append(_made(call, sites[name], sites[name].parameter.shape[0]))
        query, key, value = made
    analysis.compared += (query, key)
    output = sites["attention_output"]
    analysis.read_units(output, value, nonnegative=False)
    labels = _made(call, output, output.output_channels)
    attended = UnitValue(layout=UnitLayout.along(labels, -1), rank=_rank(call.value(inputs["query"])))
    return UnitValue(parts=(attended, UnitValue(nonnegative=True)))


def recurrent(call: UnitCall) -> UnitValue:
    """Each unit is read one step later by its own layer, and by the layer above."""
    analysis, sites = call.analysis, call.sites
    source = call.argument(0, "input")
    mode = str(call.node.kwargs.get("mode", getattr(call.module, "mode", "")))
    nonnegative = mode == "RNN_RELU"
    below: Tensor | None = None
    visible: list[Tensor] = []
    inside: list[Tensor] = []
    for number in range(1 + max(site.slot.layer for site in sites)):
        outputs = []
        for direction in range(1 + max(site.slot.direction for site in sites)):
            own = {s.role: s for s in sites if (s.slot.layer, s.slot.direction) == (number, direction)}
            cells = output = _made(call, own["hidden"], own["hidden"].output_channels)
            if "projection" in own:
                output = _made(call, own["projection"], own["projection"].output_channels)
                analysis.read_units(own["projection"], cells, nonnegative=False)
            analysis.read_units(own["hidden"], output, nonnegative=nonnegative)
            if below is None:
                analysis.read(own["input"], source)
            else:
                analysis.read_units(own["stacked"], below, nonnegative=nonnegative)
            outputs.append(output)
            inside.append(cells)
        visible += outputs
        below = torch.cat(outputs)
    rank = _rank(call.value(source))
    final = below if below is not None else torch.empty(0, dtype=torch.int64)
    sequence = UnitValue(layout=UnitLayout.along(final, -1), rank=rank, nonnegative=nonnegative)
    states = [_state(units, nonnegative=nonnegative, unbatched=rank == 2) for units in (visible, inside)]
    return UnitValue(parts=(sequence, UnitValue(parts=tuple(states)) if mode == "LSTM" else states[0]))


def cell(call: UnitCall) -> UnitValue:
    """Each unit is read one step later by its own cell, whatever passes the state on."""
    analysis, own = call.analysis, {site.role: site for site in call.sites}
    source, state = call.argument(0, "input"), call.argument(1, "hx")
    units = _made(call, own["hidden"], own["hidden"].output_channels)
    given = call.value(state) if state is not None else NOTHING
    hidden = given.parts[0] if given.parts else given
    rectified = (
        call.node.kwargs.get("mode") == "RNN_RELU" or getattr(call.module, "nonlinearity", "") == "relu"
    )
    if hidden.has_units:
        axes = (Axis(-1, (0,)),)
        before = analysis.decide(hidden, axes, (len(units),)).columns(-1, len(units))
        analysis.join(before, units[:, None].expand_as(before))
    analysis.read_units(
        own["hidden"], units, nonnegative=rectified and (hidden.nonnegative or not hidden.has_units)
    )
    analysis.read(own["input"], source)
    made = UnitValue(layout=UnitLayout.along(units, -1), rank=call.value(source).rank, nonnegative=rectified)
    return UnitValue(parts=(made, made)) if own["hidden"].slot.blocks == GATES["LSTM"] else made


def _rank(value: UnitValue) -> int:
    """Return the rank of a sequence of vectors, with a batch axis where it is not known."""
    return 3 if value.rank is None else value.rank


def _state(units: list[Tensor], *, nonnegative: bool, unbatched: bool) -> UnitValue:
    """Return the value of the last state: one row of units for each layer and direction."""
    front = -2 if unbatched else -3
    layout = UnitLayout(torch.stack(units), (Axis(front, (0,)), Axis(-1, (1,))))
    return UnitValue(layout=layout, rank=-front, nonnegative=nonnegative)


def _made(call: UnitCall, site: WeightSite, count: int) -> Tensor:
    return call.analysis.made(site.parameter_path, count).labels


def looked_up(call: UnitCall) -> UnitValue:
    """``embedding``: rows of numbers that are learned."""
    return call.ends("it looks up rows of a weight, which no unit makes")


# units: attention written out. Values are passed on, mixed over positions; queries and keys are compared.


def weights_of_scores(call: UnitCall) -> UnitValue:
    """``softmax``: of scores it makes weights that are not negative; of units, new ones."""
    if call.x.has_units:
        return call.ends("each unit's share depends on all others").replace(nonnegative=True)
    return NOTHING.replace(nonnegative=True, rank=call.x.rank)


def product(call: UnitCall) -> UnitValue:
    """``query @ key`` compares; ``weights @ value`` passes the units of the values on."""
    arguments = call.argument(0, "input"), call.argument(1, "mat2", call.argument(1, "other"))
    left, right = map(call.value, arguments)
    if left.has_units and right.has_units:
        if call.analysis.is_observed and not _sums_over_units(left, right):
            return call.ends("it mixes units by the activity of others, which may be negative")
        call.compares(*arguments)
        return UnitValue(rank=left.rank if left.rank is not None else right.rank)
    if not left.has_units and not right.has_units:
        return UnitValue(rank=left.rank, nonnegative=left.nonnegative and right.nonnegative)
    mixed, weights, axis = (right, left, -2) if right.has_units else (left, right, -1)
    if not weights.nonnegative:
        return call.ends("it mixes units by weights that may be negative")
    if mixed.layout is None or mixed.layout.axis_at(axis) is not None:
        return call.ends("it mixes along the axis of the units")
    return call.keeps(mixed)


def _sums_over_units(left: UnitValue, right: UnitValue) -> bool:
    """Whether a product is known to sum over the axis of the units of both factors."""
    if left.layout is None or right.layout is None:
        return False
    return left.layout.axis_at(-1) is not None and right.layout.axis_at(-2) is not None


def attended(call: UnitCall) -> UnitValue:
    """``scaled_dot_product_attention``: the units of the values."""
    query, key, value = (call.argument(place, name) for place, name in enumerate(("query", "key", "value")))
    call.compares(query, key)
    known = call.value(value)
    if known.layout is None or known.layout.axis_at(-2) is not None:
        return call.ends("it mixes along the axis of the units, or they are not known")
    shared = call.node.kwargs.get("enable_gqa", False) is not False
    if shared and call.analysis.is_observed:  # a head of values for several of queries
        return call.keeps(known, layout=known.layout.with_runs(-3))
    return call.keeps(known)


# replication


def columns_of(site: WeightSite, source: Replication) -> tuple[int, int]:
    """Return the synapses for each connection among a layer's inputs, and how many inputs make up a channel.

    Raises:
        CannotFollow: the layer needs its inputs apart.
    """
    channels = source.groups * source.gamma
    inner, rest = divmod(site.input_channels, channels)
    if rest or (inner != 1 and not (source.inner and site.kind.kernel_axes == 0)):
        raise CannotFollow(f"it has {site.input_channels} inputs, which are not the {channels} channels")
    if folded_weight(site, columns=source.gamma) is None:
        raise CannotFollow(f"its {site.groups} groups do not hold whole connections of {source.gamma}")
    return source.gamma, inner


def folded_weight(site: WeightSite, *, rows: int = 1, columns: int = 1) -> tuple[tuple[int, ...], int] | None:
    """Return shape and groups of a folded weight, None where its groups cut connections apart."""
    return folded_shape(
        tuple(site.parameter.shape),
        rows=rows,
        columns=columns,
        groups=site.groups,
        transposed=site.kind.transposed,
    )


def _sums_columns(call: ReplicationCall) -> Outcome:
    """A layer with one weight sums columns, or works along another axis."""
    source, site = call.source, call.site
    if source.axis == site.kind.channel_axis:
        columns_of(site, source)
        return Outcome(None)
    if site.kind.kernel_axes:
        raise CannotFollow("it takes its channels from another axis")
    return Outcome(source)


# what rules an operation has

declare(LayerKind, units=layer, replication=_sums_columns)
declare(ATTENTION, units=attention)
declare(RNN, GRU, LSTM, units=recurrent)
declare(*CELL_KINDS, units=cell)
for _kind in (EMBEDDING, EMBEDDING_BAG):
    declare(_kind.module_type, _kind.function, units=looked_up)
declare("softmax", units=weights_of_scores)
declare("matmul", "bmm", operator.matmul, units=product)
declare(F.scaled_dot_product_attention, units=attended)
