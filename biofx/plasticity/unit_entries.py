"""Which entries of weights, biases and normalisations are a unit's, for the turnover of units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from biofx.errors import PlasticityError
from biofx.operators.mask_ops import mask_weight
from biofx.operators.parts import gathered, is_sharded, local, local_part
from biofx.plasticity.bio_state import BioState
from biofx.plasticity.shards import sum_over_ranks
from biofx.plasticity.unit_inputs import index_of_units, sum_units


@dataclass(frozen=True)
class Channels:
    """Which of some units each of several channels is."""

    units: Tensor
    """Of each channel its unit, int64; -1 where it is none of them."""

    @cached_property
    def own(self) -> Tensor | None:
        """The channels that are of the units, int64; None for all."""
        own = (self.units >= 0).nonzero().flatten()
        return None if len(own) == len(self.units) else own

    @cached_property
    def _of_own(self) -> Tensor:
        return self.units if self.own is None else self.units[self.own]

    @cached_property
    def _run(self) -> int:
        """How many neighbouring channels are each unit, in the order of the units; 0 if it is not so."""
        of_own = self._of_own
        count = int(of_own.max()) + 1 if len(of_own) else 0
        run = len(of_own) // max(1, count)
        return run if torch.equal(of_own, torch.arange(count).repeat_interleave(run)) else 0

    def sum_units(self, values: Tensor, count: int) -> Tensor:
        """Return the sum of a value of each channel over those of each unit, ``(count,)``."""
        own = values if self.own is None else values[self.own.to(values.device)]
        if self._run and self._run * count == len(own):
            return own if self._run == 1 else own.view(count, self._run).sum(1)
        made = torch.zeros(count, dtype=values.dtype, device=values.device)
        # index_add_ would add in an order of its own on some devices, and ranks would not agree
        return made.index_put_((self._of_own.to(values.device),), own, accumulate=True)

    def of(self, gone: Tensor) -> Tensor:
        """Return the channels of units, int64.

        Args:
            gone: of each unit whether it is meant, bool, on any device.
        """
        units = self.units.to(gone.device)
        return (gone[units.clamp(min=0)] & (units >= 0)).nonzero().flatten()


def bias_name(weight: str) -> str:
    """Return the name of the bias beside a weight.

    >>> bias_name("weight"), bias_name("weight_hh_l0"), bias_name("projection")
    ('bias', 'bias_hh_l0', 'bias')
    """
    return weight.replace("weight", "bias") if weight.startswith("weight") else "bias"


def bias_of(layer: nn.Module, weight: str) -> nn.Parameter | None:
    """Return the bias that a layer adds to the product with a weight, None for none."""
    return layer._parameters.get(bias_name(weight))


@dataclass(frozen=True)
class _UnitWeight:
    """A weight with entries of units."""

    state: BioState
    channels: Channels

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that its layer adds."""
        return bias_of(self.state.get_parent(), self.name)

    @cached_property
    def name(self) -> str:
        """Name of the weight in its layer."""
        return self.state.path.rpartition(".")[2]

    @property
    def places(self) -> Iterator[tuple[nn.Module, str]]:
        """The modules and names of its parameters."""
        owner = self.state.get_parent()
        yield owner, self.name
        if self.bias is not None:
            yield owner, bias_name(self.name)

    def index(self, channels: Tensor) -> tuple[Tensor, ...]:
        """Return where the synapses of channels are in the weight."""
        return index_of_units(channels.to(self.state.weight.device), self.state.weight, **self.layout)

    @property
    def layout(self) -> dict[str, int]:
        """How the channels lie in the weight, as functions on units take it."""
        raise NotImplementedError


@dataclass(frozen=True)
class UnitWriter(_UnitWeight):
    """A weight that makes units, with the unit of each of its outputs."""

    @property
    def layout(self) -> dict[str, int]:
        """How the outputs lie in the weight."""
        return {"output_axis": self.state.output_axis, "groups": self.state.groups}


@dataclass(frozen=True)
class UnitReader(_UnitWeight):
    """A weight that reads units, and perhaps others, with the unit at each of its input channels."""

    @property
    def layout(self) -> dict[str, int]:
        """How the input channels lie in the weight."""
        return {"output_axis": 1 - self.state.output_axis, "groups": self.state.groups}

    @property
    def seen(self) -> Tensor:
        """What it has read, ``(4, input channels)``."""
        held = self.state._buffers["input_activity"]
        if held is None:
            raise PlasticityError(
                f"{self.state.path!r}: what it reads is not watched; transform the model again"
            )
        return held

    @cached_property
    def _summed(self) -> list[int] | None:
        """The axes of the weight besides that of its inputs; None where groups divide it."""
        axes = range(self.state.weight.dim())
        return None if self.state.groups > 1 else [axis for axis in axes if axis != 1 - self._output_axis]

    @cached_property
    def _output_axis(self) -> int:
        return self.state.output_axis

    def strength(self) -> Tensor:
        """Return Σ |w| over the outputs, of each input channel; all ranks must call it together."""
        weight: Any = self.state.weight.detach()
        mask, summed = self.state._buffers["connection_mask"], self._summed
        if is_sharded(weight):
            shards = [placement.dim for placement in weight.placements if placement.is_shard()]
            if summed is not None and set(shards) <= {self._output_axis}:
                part = local(weight) if mask is None else mask_weight(local(weight), local_part(mask, weight))
                return sum_over_ranks(part.abs().sum(summed), weight)
            weight, mask = gathered(weight), None if mask is None else gathered(mask)
        magnitude = (weight if mask is None else mask_weight(weight, mask)).abs()
        return sum_units(magnitude, **self.layout) if summed is None else magnitude.sum(summed)


@dataclass(frozen=True)
class UnitNorm:
    """A normalisation that units pass through, and perhaps others, with the unit of each of its channels."""

    module: nn.Module
    channels: Channels

    @property
    def places(self) -> Iterator[tuple[nn.Module, str]]:
        """The module and names of its parameters."""
        for name, parameter in self.module._parameters.items():
            if parameter is not None:
                yield self.module, name


@dataclass(frozen=True)
class UnitEntries:
    """Some units, and everything that has entries of theirs."""

    count: int
    writers: Sequence[UnitWriter]
    readers: Sequence[UnitReader]
    norms: Sequence[UnitNorm]

    @cached_property
    def places(self) -> list[tuple[str, nn.Module, str]]:
        """What has entries of the units: a name, the module, and the parameter's name there."""
        found = []
        for weight in (*self.writers, *self.readers):
            found += [(weight.state.path.rpartition(".")[0], *place) for place in weight.places]
        for norm in self.norms:
            found += [(f"a {type(norm.module).__name__}", *place) for place in norm.places]
        return found

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter with entries of the units, with a name for it."""
        for path, module, name in self.places:
            parameter = module._parameters[name]
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def zero_rates(state: BioState) -> Tensor | None:
    """Return where a weight's learning rate is 0, shaped like it; None if it is nowhere.

    Of a sharded weight all of it; all ranks must call it together.
    """
    held = state.stored_factors
    if held is None or not is_sharded(held):
        return state.zero_rates()
    return (gathered(held) == 0).expand(state.weight.shape)
