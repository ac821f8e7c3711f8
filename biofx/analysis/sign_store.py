"""Where the sign of each unit is kept, once, and how the weights that read the unit read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.analysis.unit_groups import UnitGroups
from biofx.analysis.units import Reading, Source
from biofx.errors import OptionError
from biofx.layers.computed_weight import SignFate
from biofx.layers.lowering import Lowering, node_stem
from biofx.layers.weight_site import WeightSite
from biofx.operators.sampling import generator_for
from biofx.option_names import named_option
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
        """Seed from which the signs are sampled."""


Place: TypeAlias = tuple[str, str]
"""Path of the weight whose state keeps signs, and name of the buffer there."""


CONSTRAIN = "constrain-signs"
SIGNS = named_option(CONSTRAIN, "signs")


@dataclass(frozen=True)
class KeptSigns:
    """Where the signs of the units that a weight reads are kept."""

    places: list[Place]
    index: Tensor | None
    """Which of the signs, laid one after another, belongs to each input channel; None for all, in order."""


class SignStore:
    """Samples signs when they are first needed; those that a state keeps already stay.

    The signs of a layer's units are kept with the layer, those of other units with the first weight that
    reads them.

    Args:
        graph_module: the model, whose plasticity states keep the signs.
        groups: its units.
        options_of: returns the options that hold for a layer, by the path of its weight.
    """

    def __init__(
        self, graph_module: GraphModule, groups: UnitGroups, options_of: Callable[[str], SignOptions]
    ) -> None:
        self._graph_module = graph_module
        self._groups = groups
        self._options_of = options_of
        self._local: dict[Source, tuple[str, int]] = {}
        self._local_sources: dict[str, list[Source]] = {}
        self._contradicted = torch.zeros(groups.count, dtype=torch.bool)
        self._given = self._given_signs()
        for reading in groups.readings:
            path = reading.site.parameter_path
            for source in groups.sources_of(reading.units).sources:
                if source.kind != "layer" and source not in self._local:
                    kept = self._local_sources.setdefault(path, [])
                    self._local[source] = (path, sum(entry.count for entry in kept))
                    kept.append(source)

    def keep(self, reading: Reading) -> KeptSigns:
        """Return where the signs that a weight reads are kept, sampled now if they were not before.

        Raises:
            OptionError: signs or fractions given for layers whose units are one contradict each other.
        """
        found = self._groups.sources_of(reading.units)
        first = found.sources[0]
        if len(found.sources) == 1 and first.kind == "layer" and self._are_all_of(first.name, reading.units):
            self._signs((first.name, "sign"))
            return KeptSigns([(first.name, "sign")], None)
        start: dict[Place, int] = {}
        total, indices = 0, []
        for source in found.sources:
            place, before = self._place_of(source)
            signs = self._signs(place)
            if place not in start:
                start[place] = total
                total += signs.numel()
            if source.kind == "input" and self._options_of(reading.site.parameter_path).constrain_inputs:
                _refuse_free(place[0], signs[before : before + source.count])
            indices.append(start[place] + before + torch.arange(source.count))
        index = torch.cat(indices)[found.index]
        return KeptSigns([*start], None if torch.equal(index, torch.arange(total)) else index)

    def knows(self, reading: Reading) -> bool:
        """Whether all the signs that a weight would read are kept already."""
        return all(self._kept(source) is not None for source in self._sources_of(reading.units))

    def has_signs(self, path: str) -> bool:
        """Whether the units that a layer makes have signs, kept with it or with another maker of them."""
        return any(self._kept(source) is not None for source in self._sources_of(self._groups.made_by(path)))

    def has_given(self, reading: Reading) -> bool:
        """Whether signs were given for a unit that a weight reads."""
        return bool(self._given[self._groups.representatives(reading.units)].any())

    def contradicts_itself(self, reading: Reading) -> bool:
        """Whether the model builds both signs into weights that read a unit which a weight reads."""
        return bool(self._contradicted[self._groups.representatives(reading.units)].any())

    def leave_free(self, reading: Reading) -> None:
        """Make buffers for the signs of the units that a weight reads, 0 where they are not constrained."""
        for source in self._sources_of(reading.units):
            state = bio_module_at(self._graph_module, source.name) if source.kind == "layer" else None
            if state is not None and state.sign is None:
                units = len(self._groups.made_by(source.name))
                device = "cpu" if state.parameter is None else state.parameter.device
                state.sign = torch.zeros(units, device=device)

    def _sources_of(self, units: Tensor) -> list[Source]:
        return self._groups.sources_of(units).sources

    def _are_all_of(self, path: str, units: Tensor) -> bool:
        """Whether units are all those that a layer makes, in order; members of a pool count as one."""
        made, representatives = self._groups.made_by(path), self._groups.representatives
        return len(made) == len(units) and torch.equal(representatives(made), representatives(units))

    def _place_of(self, source: Source) -> tuple[Place, int]:
        """Return where the signs of some units are kept, and how many there are before them."""
        if source.kind == "layer":
            return (source.name, "sign"), 0
        path, before = self._local[source]
        return (path, "local_sign"), before

    def _kept(self, source: Source) -> Tensor | None:
        """Return the signs that are kept where those of some units belong, None if there are none."""
        (path, buffer), _ = self._place_of(source)
        state = kept_state(self._graph_module, path)
        kept: Tensor | None = None if state is None else getattr(state, buffer)
        return None if buffer == "sign" and _is_free(kept) else kept

    def _signs(self, place: Place) -> Tensor:
        """Return the signs that are kept at a place, sampled now if there are none."""
        path, buffer = place
        state = bio_module_at(self._graph_module, path)
        kept: Tensor | None = getattr(state, buffer)
        if kept is None or (buffer == "sign" and _is_free(kept)):
            kept = self._layer_signs(path) if buffer == "sign" else self._local_signs(path)
            # not whole numbers: averages of models are taken in place, and would be cut to 0
            kept = kept.to(state.weight.device if state.parameter is not None else "cpu", torch.float32)
            setattr(state, buffer, kept)
        return kept

    def _layer_signs(self, path: str) -> Tensor:
        """Return signs for the outputs of a layer; 0 for those kept elsewhere and for those only compared."""
        options = self._options_of(path)
        units = self._groups.made_by(path)
        own = self._groups.representatives(units)
        here = (own >= units[0]) & (own <= units[-1]) & ~self._groups.is_exempt(units)
        distinct = own[here].unique()
        sampled = _sample(len(distinct), options.excitatory_fraction, options.seed, path)
        signs = torch.zeros(len(units), dtype=torch.int8)
        signs[here] = sampled[torch.bucketize(own[here], distinct)]
        given = self._given[own]
        return torch.where(given != 0, given, signs)

    def _local_signs(self, path: str) -> Tensor:
        options = self._options_of(path)
        parts = []
        for number, source in enumerate(self._local_sources[path]):
            free = source.kind == "constant" or (source.kind == "input" and not options.constrain_inputs)
            purpose = f"{path} {number}"
            sampled = _sample(source.count, options.excitatory_fraction, options.seed, purpose)
            given = self._given[source.units]
            sampled = torch.where(given != 0, given, torch.zeros_like(sampled) if free else sampled)
            parts.append(sampled)
        return torch.cat(parts)

    def _given_signs(self) -> Tensor:
        """Return the signs that are given in options, by unit, 0 for none.

        Raises:
            OptionError: they contradict each other, or those that are kept.
        """
        taken = torch.zeros(self._groups.count, dtype=torch.int8)
        fractions: dict[str, float] = {}
        for path in self._groups.producers():
            options, units = self._options_of(path), self._groups.made_by(path)
            if options.signs is not None:
                state = kept_state(self._graph_module, path)
                kept = None if state is None or _is_free(state.sign) else state.sign
                if kept is None:
                    _enter(taken, path, options.signs, self._groups.representatives(units))
                elif kept.sign().tolist() != list(options.signs):
                    raise OptionError(
                        f"{SIGNS}: those given for {path!r} are not the ones that its {len(kept)} units have "
                        "already, from expand-units or an earlier transform, and other weights follow those; "
                        "leave them out"
                    )
                continue
            for source in self._groups.sources_of(units).sources:
                first = fractions.setdefault(source.name, options.excitatory_fraction)
                if source.kind == "layer" and first != options.excitatory_fraction:
                    raise OptionError(
                        f"{named_option(CONSTRAIN, 'excitatory_fraction')}: {path!r} is given "
                        f"{options.excitatory_fraction} and {source.name!r} {first}, but their outputs are "
                        "added up and so are the same units; give them the same"
                    )
        return self._with_built_in(taken)

    def _with_built_in(self, given: Tensor) -> Tensor:
        """Return signs by unit, those that the model itself has built into weights among them.

        Where the forward subtracts what a weight drives, the sign that acts is the other one. Units into
        which the model builds both have none (:meth:`contradicts_itself`).

        Raises:
            OptionError: those that are given contradict them.
        """
        built_in, both = torch.zeros_like(given), self._contradicted
        for reading in self._groups.readings:
            computation = reading.site.computation
            if computation is None:
                continue
            units, signs = self._groups.representatives(reading.units), computation.built_in
            if (
                signs is None
                and computation.fate is SignFate.LOST
                and self._groups.is_in_python(reading.site)
            ):
                signs = torch.ones(len(units), dtype=torch.int8)  # no sign can be put behind what Python does
            drive = self._groups.drive_sign(reading.site)
            if signs is None or drive == 0:
                continue
            signs = signs * drive
            if bool(((given[units] * signs) < 0).any()):
                raise OptionError(
                    f"{SIGNS}: those given contradict the ones that the forward builds into "
                    f"{reading.site.parameter_path!r} ({computation.words}); leave them out, or give the same"
                )
            both[units] |= (built_in[units] * signs) < 0
            built_in[units] = torch.where(built_in[units] == 0, signs, built_in[units])
        return torch.where((given == 0) & ~both, built_in, given)


def _refuse_free(path: str, kept: Tensor) -> None:
    """Refuse to constrain inputs that another weight reads as free."""
    if bool((kept == 0).any()):
        raise OptionError(
            f"{named_option(CONSTRAIN, 'constrain_inputs')}: inputs of the model were left free where "
            f"{path!r} reads them, and a unit has one sign everywhere; transform the original once, "
            "with constrain_inputs=True for all"
        )


def _is_free(kept: Tensor | None) -> bool:
    """Whether a buffer holds no signs, or only zeros."""
    return kept is None or not (kept.is_meta or bool(kept.any()))


def _enter(taken: Tensor, path: str, signs: tuple[int, ...], units: Tensor) -> None:
    """Enter the signs that are given for a layer's outputs, by the representatives of its units."""
    if len(signs) != len(units):
        raise OptionError(
            f"{SIGNS}: expected one for each of the {len(units)} outputs of {path!r}, found {len(signs)}"
        )
    wanted, known = torch.tensor(signs, dtype=torch.int8), taken[units]
    taken[units] = wanted
    if bool(((known != 0) & (known != wanted)).any()) or not torch.equal(taken[units], wanted):
        raise OptionError(
            f"{SIGNS}: those given for {path!r} contradict those of a layer whose outputs are added to its "
            "own, and so are the same units; give them the same"
        )


def keep_row_signs(site: WeightSite, state: BioModule, fraction: float, seed: int) -> KeptSigns:
    """Sample a sign for each output of a weight, or for each kernel of a convolution, unless it has them."""
    if state.local_sign is None:
        shape, kind = site.parameter.shape, site.where_signed.kind
        if kind.transposed is not site.kind.transposed:
            shape = shape[::-1]  # signs act on the weight transposed
        laid_out = (*shape[:2], *(1,) * (len(shape) - 2)) if len(shape) > 2 else (shape[0], 1)
        if kind.transposed and len(shape) == 2:
            laid_out = (1, shape[1])
        sampled = _sample(int(torch.Size(laid_out).numel()), fraction, seed, site.parameter_path)
        state.local_sign = sampled.reshape(laid_out).to(site.parameter.device, torch.float32)
    return KeptSigns([(site.parameter_path, "local_sign")], None)


def _sample(count: int, fraction: float, seed: int, path: str) -> Tensor:
    """Return ``count`` signs of which a fraction is excitatory, rounded to whole units."""
    signs = torch.full((count,), -1, dtype=torch.int8)
    generator = generator_for(seed, path, purpose=_PURPOSE)
    signs[torch.randperm(count, generator=generator)[: round(count * fraction)]] = 1
    return signs


def bring_signs(lowering: Lowering, kept: KeptSigns, state: BioModule, weight: Node, stem: str) -> Node:
    """Insert nodes ahead of a weight that read the signs of its presynaptic units; return the last."""
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
