"""Where the sign of each unit is kept, once, and how the weights that read the unit get at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.analysis.unit_groups import UnitGroups
from biofx.analysis.units import Reading, Source
from biofx.errors import OptionError
from biofx.layers.lowering import Lowering, node_stem
from biofx.layers.weight_site import WeightSite
from biofx.operators.sampling import generator_for
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import bio_module_at, bio_module_path, kept_state

_PURPOSE = "constrain-signs"


class SignOptions(Protocol):
    """What decides the signs of the units of one layer."""

    @property
    def excitatory_fraction(self) -> float:
        """Fraction of the units that are excitatory."""

    @property
    def signs(self) -> tuple[int, ...] | None:
        """The signs themselves, in order of the layer's outputs, or None."""

    @property
    def constrain_inputs(self) -> bool:
        """Whether the model's inputs have signs."""

    @property
    def seed(self) -> int:
        """Seed of the draw."""


@dataclass(frozen=True)
class KeptSigns:
    """Where the signs of the units that a weight reads are kept."""

    places: list[tuple[str, str]]
    """Paths of the weights whose states keep them, and names of the buffers there."""
    index: Tensor | None
    """Which of them, laid one after another, belongs to each input channel; None for all, in order."""


class SignStore:
    """Draws signs when they are first asked for; what a state keeps already stays.

    Args:
        graph_module: the model, whose plasticity states keep the signs.
        groups: its units.
        options_of: the options that hold for a layer, by the path of its weight.
    """

    def __init__(
        self, graph_module: GraphModule, groups: UnitGroups, options_of: Callable[[str], SignOptions]
    ) -> None:
        self._graph_module = graph_module
        self._groups = groups
        self._options_of = options_of
        self._local: dict[Source, tuple[str, int]] = {}
        self._local_sources: dict[str, list[Source]] = {}
        self._given = self._given_signs()
        for reading in groups.readings:
            path = reading.site.parameter_path
            for source in groups.sources_of(reading.units).sources:
                if source.kind != "layer" and source not in self._local:
                    kept = self._local_sources.setdefault(path, [])
                    self._local[source] = (path, sum(entry.count for entry in kept))
                    kept.append(source)

    def keep(self, reading: Reading) -> KeptSigns:
        """Return where the signs that a weight reads are kept, drawn now if they were not before.

        Raises:
            OptionError: signs or fractions given for layers whose units are one contradict each other.
        """
        home = self._groups.sources_of(reading.units)
        first = home.sources[0]
        if len(home.sources) == 1 and first.kind == "layer" and self._are_all_of(first.name, reading.units):
            self._signs(first.name, "sign")
            return KeptSigns([(first.name, "sign")], None)
        places: list[tuple[str, str]] = []
        start: dict[tuple[str, str], int] = {}
        offsets = []
        for source in home.sources:
            path, before = self._local.get(source, (source.name, 0))
            place = (path, "sign" if source.kind == "layer" else "local_sign")
            if place not in start:
                start[place] = sum(self._signs(*known).numel() for known in places)
                places.append(place)
            if source.kind == "input" and self._options_of(reading.site.parameter_path).constrain_inputs:
                self._refuse_free(path, self._signs(*place)[before : before + source.count])
            offsets.append(start[place] + before)
        counts = [source.count for source in home.sources]
        begins = torch.tensor([sum(counts[:number]) for number in range(len(counts))])
        which = torch.bucketize(home.index, begins, right=True) - 1
        index = home.index - begins[which] + torch.tensor(offsets)[which]
        total = sum(self._signs(*place).numel() for place in places)
        whole = torch.equal(index, torch.arange(total))
        return KeptSigns(places, None if whole else index)

    def _refuse_free(self, path: str, kept: Tensor) -> None:
        """Refuse to constrain inputs that another weight reads as free."""
        if bool((kept == 0).any()):
            raise OptionError(
                f"constrain_inputs: inputs of the model were left free where {path!r} reads them, and a unit "
                "has one sign everywhere; transform the original once, with constrain_inputs=True for all"
            )

    def _are_all_of(self, path: str, units: Tensor) -> bool:
        """Whether units are all those that a layer makes, in order; members of a pool count as one."""
        made = self._groups.made_by(path)
        representatives = self._groups.representatives
        return len(made) == len(units) and torch.equal(representatives(made), representatives(units))

    def knows(self, reading: Reading) -> bool:
        """Whether all the signs that a weight would read are kept already."""
        return all(
            self._kept(self._local.get(source, (source.name, 0))[0], of_layer=source.kind == "layer")
            is not None
            for source in self._groups.sources_of(reading.units).sources
        )

    def has_signs(self, path: str) -> bool:
        """Whether the units that a layer makes have signs, kept with it or with whoever else makes them."""
        sources = self._groups.sources_of(self._groups.made_by(path)).sources
        places = [
            (self._local.get(source, (source.name, 0))[0], source.kind == "layer") for source in sources
        ]
        return any(self._kept(place, of_layer=of_layer) is not None for place, of_layer in places)

    def _kept(self, path: str, *, of_layer: bool) -> Tensor | None:
        """Return the signs that the state of a weight keeps already, None if it keeps none."""
        state = kept_state(self._graph_module, path)
        kept: Tensor | None = None if state is None else getattr(state, "sign" if of_layer else "local_sign")
        return None if of_layer and _is_free(kept) else kept

    def leave_free(self, reading: Reading) -> None:
        """Have room for the signs of the units that a weight reads, 0 where nothing has asked for them."""
        for source in self._groups.sources_of(reading.units).sources:
            state = bio_module_at(self._graph_module, source.name) if source.kind == "layer" else None
            if state is not None and state.sign is None:
                units = len(self._groups.made_by(source.name))
                device = "cpu" if state.parameter is None else state.parameter.device
                state.sign = torch.zeros(units, device=device)

    def _signs(self, path: str, buffer: str) -> Tensor:
        """Return what a state keeps."""
        state = bio_module_at(self._graph_module, path)
        kept: Tensor | None = getattr(state, buffer)
        if kept is None or (buffer == "sign" and _is_free(kept)):
            kept = self._layer_signs(path) if buffer == "sign" else self._local_signs(path)
            # not whole numbers: averages of models are taken in place, and would be cut to 0
            kept = kept.to(state.weight.device if state.parameter is not None else "cpu", torch.float32)
            setattr(state, buffer, kept)
        return kept

    def _check_kept(self, path: str, kept: Tensor) -> None:
        """Refuse signs that a user gives for units that have others."""
        given = self._options_of(path).signs
        if given is not None and kept.sign().tolist() != list(given):
            raise OptionError(
                f"signs: those given for {path!r} are not the ones that its {len(kept)} units have already, "
                "from expand-units or an earlier transform, and other weights hold to those; leave them out"
            )

    def _layer_signs(self, path: str) -> Tensor:
        """Return signs for the outputs of a layer; 0 for those kept elsewhere, and for those exempt."""
        options = self._options_of(path)
        units = self._groups.made_by(path)
        own = self._groups.representatives(units)
        here = (own >= units[0]) & (own <= units[-1]) & ~self._groups.is_exempt(units)
        distinct = own[here].unique()
        drawn = _draw(len(distinct), options.excitatory_fraction, options.seed, path)
        signs = torch.zeros(len(units), dtype=torch.int8)
        signs[here] = drawn[torch.bucketize(own[here], distinct)]
        given = self._given[own]
        return torch.where(given != 0, given, signs)

    def _local_signs(self, path: str) -> Tensor:
        options = self._options_of(path)
        parts = []
        for number, source in enumerate(self._local_sources[path]):
            free = source.kind == "constant" or (source.kind == "input" and not options.constrain_inputs)
            purpose = f"{path} {number}"
            drawn = _draw(source.count, options.excitatory_fraction, options.seed, purpose)
            parts.append(torch.zeros_like(drawn) if free else drawn)
        return torch.cat(parts)

    def _given_signs(self) -> Tensor:
        """Return the signs that a user gave, by unit, 0 where none; contradictions are found here."""
        taken = torch.zeros(self._groups.count, dtype=torch.int8)
        fractions: dict[str, float] = {}
        for path in self._groups.producers():
            options, units = self._options_of(path), self._groups.made_by(path)
            kept = self._kept(path, of_layer=True)
            if kept is not None:
                self._check_kept(path, kept)
            elif options.signs is not None:
                _take(taken, path, options.signs, self._groups.representatives(units))
            if options.signs is not None:
                continue
            for source in self._groups.sources_of(units).sources:
                first = fractions.setdefault(source.name, options.excitatory_fraction)
                if source.kind == "layer" and first != options.excitatory_fraction:
                    raise OptionError(
                        f"excitatory_fraction: {path!r} is given {options.excitatory_fraction} and "
                        f"{source.name!r} {first}, but their outputs are added up and so are the "
                        "same units; give them the same"
                    )
        return taken


def _is_free(kept: Tensor | None) -> bool:
    """Whether units have no signs so far, and only room for them."""
    return kept is None or not (kept.is_meta or bool(kept.any()))


def _take(taken: Tensor, path: str, signs: tuple[int, ...], home: Tensor) -> None:
    """Enter the signs that a user gives for a layer's units."""
    if len(signs) != len(home):
        raise OptionError(
            f"signs: expected one for each of the {len(home)} outputs of {path!r}, found {len(signs)}"
        )
    wanted, known = torch.tensor(signs, dtype=torch.int8), taken[home]
    taken[home] = wanted
    if bool(((known != 0) & (known != wanted)).any()) or not torch.equal(taken[home], wanted):
        raise OptionError(
            f"signs: those given for {path!r} contradict those of a layer whose outputs are added to its "
            "own, and so are the same units; give them the same"
        )


def keep_row_signs(site: WeightSite, state: BioModule, fraction: float, seed: int) -> KeptSigns:
    """Draw a sign for each output of a weight, and for each kernel of a convolution, unless it has them."""
    if state.local_sign is None:
        shape = site.parameter.shape
        laid_out = (*shape[:2], *(1,) * (len(shape) - 2)) if len(shape) > 2 else (shape[0], 1)
        if site.kind.is_product:
            laid_out = (1, shape[1])
        drawn = _draw(int(torch.Size(laid_out).numel()), fraction, seed, site.parameter_path)
        state.local_sign = drawn.reshape(laid_out).to(site.parameter.device, torch.float32)
    return KeptSigns([(site.parameter_path, "local_sign")], None)


def _draw(count: int, fraction: float, seed: int, path: str) -> Tensor:
    """Return ``count`` signs of which a fraction is excitatory, rounded to whole units."""
    signs = torch.full((count,), -1, dtype=torch.int8)
    generator = generator_for(seed, path, purpose=_PURPOSE)
    signs[torch.randperm(count, generator=generator)[: round(count * fraction)]] = 1
    return signs


def bring_signs(lowering: Lowering, kept: KeptSigns, state: BioModule, weight: Node, stem: str) -> Node:
    """Put into the graph, ahead of a weight, what reads the signs of its presynaptic units."""
    nodes = [
        lowering.read(f"{bio_module_path(path)}.{buffer}", weight.next, f"{node_stem(path)}_{buffer}")
        for path, buffer in kept.places
    ]
    made = nodes[0]
    if len(nodes) > 1:
        with weight.graph.inserting_before(max((weight, *nodes)).next):
            made = weight.graph.call_function(torch.cat, (nodes,), name=f"{stem}_signs")
    if kept.index is not None:
        index = lowering.read(f"{bio_module_path(state.path)}.unit_index", weight.next, f"{stem}_units")
        with weight.graph.inserting_before(max((weight, made, index)).next):
            made = weight.graph.call_function(torch.index_select, (made, 0, index), name=f"{stem}_sign")
    made.meta = dict(weight.meta)
    return made


def states_of(graph_module: GraphModule, kept: KeptSigns) -> Iterator[tuple[BioModule, str]]:
    """Yield the states that keep signs, and the names of the buffers."""
    for path, buffer in kept.places:
        yield bio_module_at(graph_module, path), buffer
