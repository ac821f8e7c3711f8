"""Decide which connections of a weight exist: ``weight`` becomes ``mask_weight(weight, mask)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from biofx.analysis.unit_groups import unit_groups
from biofx.analysis.units import Reading
from biofx.errors import OptionError
from biofx.layers.lowering import Lowering, node_stem
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import READ, Weight, WeightSite, whole_weight
from biofx.operators.mask_ops import mask_weight
from biofx.operators.sampling import generator_for
from biofx.plasticity.connections import Areas, ConnectionLayout, draw_connections, mask_of, rescaled
from biofx.plasticity.model_states import bio_module_path, kept_state, state_of

PURPOSE = "mask-weights"


def layer_site(weight: Weight) -> WeightSite:
    """Return the first use of a weight by a layer."""
    return next(site for site in weight.sites if site.kind is not READ)


def layout_of(site: WeightSite) -> ConnectionLayout:
    """Return how connections lie in the weight of a site; query, key and value have their own."""
    gates = 1 if site.role == "query_key_value" else site.slot.blocks
    return ConnectionLayout(site.kind.output_axis, site.groups, gates)


def units_of(site: WeightSite) -> tuple[int, int]:
    """Return how many outputs and inputs a weight has, gates left out, counts."""
    outputs = layout_of(site).split(site.parameter.detach()).shape[1]
    return outputs, site.input_channels


class MaskSurvey:
    """What must be known of a model before its weights are masked: all uses of each, and who reads whom."""

    def __init__(self, graph_module: GraphModule) -> None:
        weights = find_sites(graph_module).weights_and_reads(directly=False)
        self._graph_module, self._groups = graph_module, unit_groups(graph_module)
        self._weights = {id(weight.parameter): weight for weight in weights}

    def weight_at(self, site: WeightSite) -> Weight:
        """Return a site's weight with all of its uses."""
        return self._weights[id(site.parameter)]

    def why_no_units(self, site: WeightSite) -> str:
        """Return why the entries of a weight are no connections between units, empty where they are."""
        kinds = [use.kind for use in self.weight_at(site).sites if use.kind is not READ] or [READ]
        return next((kind.why_no_units for kind in kinds if kind.why_no_units), "")

    def is_of_pairs(self, site: WeightSite) -> bool:
        """Whether a weight makes or reads units that were expanded to pairs."""
        units = [reading.units for reading in self._readings(site)]
        sources = [source for each in units for source in self._groups.sources_of(each).sources]
        paths = (site.parameter_path, *(source.name for source in sources if source.kind == "layer"))
        states = [kept_state(self._graph_module, path) for path in paths]
        return any(state is not None and state.is_expanded for state in states)

    def self_connections(self, site: WeightSite) -> Tensor | None:
        """Return which connections lead from a unit to itself, bool, ``(units, connections of a unit)``.

        None where no use of the weight reads a unit that it makes.
        """
        if site.whole_path not in self._groups.producers():
            return None
        of_layer = layer_site(self.weight_at(site))
        presynaptic = layout_of(of_layer).presynaptic(site.parameter.shape)
        made = self._groups.representatives(self._groups.made_by(site.whole_path))
        found = torch.zeros(presynaptic.shape, dtype=torch.bool)
        for reading in self._readings(site):
            if len(made) == len(presynaptic):
                found |= self._groups.representatives(reading.units)[presynaptic] == made[:, None]
        return found if bool(found.any()) else None

    def why_not_known(self, site: WeightSite) -> str | None:
        """Return why it is not known whether a weight reads units that it makes, None if it is.

        A weight with fewer inputs than outputs is taken not to.
        """
        outputs, inputs = units_of(site)
        if inputs < outputs or self.self_connections(site) is not None:
            return None
        readings = self._readings(site)
        if not readings:
            return "what feeds it is not known"
        for reading in readings:
            if reason := self._groups.why_not_known(reading.site):
                return reason
            if region := self._groups.region_that_feeds(reading.site):
                return f"what feeds it is not known: Python calls {region!r}"
            for source in self._groups.sources_of(reading.units).sources:
                if source.kind == "open":
                    return f"its units begin at {source.name!r}, and what comes before is not known"
        return None

    def _readings(self, site: WeightSite) -> list[Reading]:
        return [entry for entry in self._groups.readings if entry.site.whole_path == site.whole_path]


@dataclass(frozen=True)
class Wiring:
    """What decides which connections of a weight exist; the options of the pass of these names."""

    density: float
    blocks: tuple[tuple[float, ...], ...] | None
    areas: tuple[Any, ...] | None
    mask: str | None
    rescales: bool
    probes: bool
    """Whether the gradient of missing connections can be asked for."""
    seed: int


def insert_mask(weight: Weight, lowering: Lowering, wiring: Wiring, own: Tensor | None) -> dict[str, int]:
    """Draw the connections of a weight, and mask it wherever it is used.

    Args:
        weight: with all of its uses.
        lowering: of the graph.
        wiring: what decides.
        own: connections from a unit to itself, which must not exist; None where all may.

    Returns:
        Counts of weights: ``"connections"`` that exist, of ``"weights"``, and ``"forbidden"`` ones; of
        connections: the ``"fewest"`` and the ``"most"`` of a unit, and how many are ``"possible"``.

    Raises:
        OptionError: a mask, or areas, that do not fit the weight; areas without blocks.
    """
    site, state = layer_site(weight), state_of(lowering.graph_module, weight)
    layout = layout_of(site)
    values = state.weight.detach()
    shape = layout.split(values).shape[1:]
    allowed = torch.ones(shape, dtype=torch.bool)
    if wiring.mask is not None:
        allowed &= given_connections(wiring.mask, site, layout)
    if own is not None:
        allowed &= ~own
    if wiring.areas is not None and wiring.blocks is None:
        raise OptionError(
            f"weight_mask_areas: expected weight_mask_blocks with them, found none for {weight.path!r}; give "
            "the densities between the areas, or leave the areas out"
        )
    areas, blocks, densities = None, None, [wiring.density]
    if wiring.blocks is not None:
        areas = _areas(wiring.blocks, wiring.areas, site)
        blocks = layout.blocks(values.shape, areas)
        densities = [wiring.density * entry for row in wiring.blocks for entry in row]
        allowed &= torch.tensor(densities)[blocks] > 0
    # sub-weights are of the same connections
    generator = generator_for(wiring.seed, whole_weight(weight.path), purpose=PURPOSE)
    exists = draw_connections(allowed, blocks, densities, generator)
    mask = layout.join(mask_of(exists, allowed), values).contiguous().to(values.device)
    state.connection_mask, state.connection_layout, state.connection_areas = mask, layout, areas
    made = mask_weight(values, mask)
    if wiring.rescales:
        made = layout.join(rescaled(layout.split(values), exists.to(values.device)), values)
    lowering.parameters.replace(state.weight, made)
    for use in weight.sites:
        lowering.lower(use)
    kept = f"{bio_module_path(weight.path)}.connection_mask"
    places = [use.at_parameter for use in weight.sites]
    options: dict[str, Any] = {}
    if wiring.probes and (node := places[0].weight_node) is not None:
        state.connection_probe = torch.zeros((), device=values.device)
        probe = f"{bio_module_path(weight.path)}.connection_probe"
        options["probe"] = lowering.read(probe, node.next, f"{node_stem(weight.path)}_probe")
    lowering.wrap_weight(places, mask_weight, (kept, "mask"), "masked", **options)
    counts = exists.sum(1)
    return {
        "connections": layout.gates * int(counts.sum()),
        "weights": values.numel(),
        "forbidden": layout.gates * int((~allowed).sum()),
        "fewest": int(counts.min()),
        "most": int(counts.max()),
        "possible": exists.shape[1],
    }


def given_connections(rows: str, site: WeightSite, layout: ConnectionLayout) -> Tensor:
    """Return which connections a user's mask permits, bool, ``(units, connections of a unit)``.

    Args:
        rows: of 0 and 1, as :class:`biofx.options.MaskRows` checks them.
        site: of the weight.
        layout: of the weight.

    Raises:
        OptionError: they do not fit, or permit some of the gates of a connection only.
    """
    lines, shape = rows.split(), site.parameter.shape
    given = torch.tensor([[digit == "1" for digit in line] for line in lines])
    channels, kernel = (shape[0], shape[1]), shape[2:].numel()
    gates = layout.gates
    if (len(given) * gates, given.shape[1]) == channels:
        given = given.repeat(gates, 1)
    if tuple(given.shape) == channels:
        given = given[:, :, None].expand(*channels, kernel).reshape(shape)
    elif tuple(given.shape) == (channels[0], channels[1] * kernel):
        given = given.reshape(shape)
    else:
        raise OptionError(
            f"weight_mask: expected {channels[0] // gates} rows of {channels[1]} for {site.parameter_path!r} "
            f"of shape {tuple(shape)}, found {len(lines)} rows of {len(lines[0])}; give each layer its "
            f"own: config.override({site.layer!r}, weight_mask=…)"
        )
    each = layout.split(given)
    if not bool((each == each[0]).all()):
        raise OptionError(
            f"weight_mask: expected the same mask for the {gates} gates of {site.parameter_path!r}, which "
            f"are weights of one connection, found others; give {channels[0] // gates} rows"
        )
    return each[0]


def _areas(
    blocks: tuple[tuple[float, ...], ...],
    given: tuple[Any, ...] | None,
    site: WeightSite,
) -> Areas:
    """Return the sizes of the areas on both sides.

    Raises:
        OptionError: they do not fit the blocks, or the units.
    """
    counts, units = (len(blocks), len(blocks[0])), units_of(site)
    if given is None:
        if any(size % count for size, count in zip(units, counts, strict=True)):
            raise OptionError(
                f"weight_mask_blocks: expected {counts[0]} × {counts[1]} areas that divide the {units[0]} "
                f"outputs and {units[1]} inputs of {site.parameter_path!r} evenly; give weight_mask_areas, "
                "or the blocks in an override for the layers that they are meant for"
            )
        post, pre = ((size // count,) * count for size, count in zip(units, counts, strict=True))
        return post, pre
    post, pre = given if isinstance(given[0], tuple) else (given, given)
    if (len(post), len(pre)) != counts or (sum(post), sum(pre)) != units:
        raise OptionError(
            f"weight_mask_areas: expected {counts[0]} areas with the {units[0]} outputs and {counts[1]} with "
            f"the {units[1]} inputs of {site.parameter_path!r}, found {list(post)} and {list(pre)}; give "
            "them in an override for the layers that they are meant for"
        )
    return post, pre
