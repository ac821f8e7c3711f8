"""Make every unit excitatory or inhibitory: ``weight`` becomes ``constrain_sign(weight, sign)``.

A neuron releases the same transmitters at all of its outgoing synapses (Dale's principle), so the sign of
a weight belongs to the presynaptic unit: a column of a weight of shape ``(out, in, *)``.

Source: Song, Yang, Wang, "Training excitatory-inhibitory recurrent neural networks for cognitive tasks",
PLOS Computational Biology 12 (2016); Cornford et al., "Learning to live with Dale's principle", ICLR 2021.

Deviations: the signs are drawn for each layer's inputs by themselves, so two layers that read the same
units may give them different signs. Inputs of the model and the synapses onto its outputs are free unless
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from biofx import ops
from biofx.dataflow import input_facing_nodes, readout_nodes, synaptic_nodes
from biofx.graph_module import BioGraphModule
from biofx.lowering import Lowering
from biofx.plasticity.placement import bio_module_at, bio_module_path
from biofx.plasticity.randomness import generator_for
from biofx.regions import region_of_nodes
from biofx.report import Remark, applied
from biofx.sites import Weight, WeightSite
from biofx.validate import FRACTION, SEED, check_choice, check_flag
from biofx.weight_pass import WeightPass


@dataclass(frozen=True)
class Ends:
    """The weight sites at the two ends of a model."""

    inputs: set[Node]
    readout: set[Node]
    regions: Mapping[Node, str]


@dataclass(frozen=True, kw_only=True)
class ConstrainSigns(WeightPass):
    """Give each presynaptic unit of a layer one sign, which its weights carry at every forward."""

    name: ClassVar[str] = "constrain-signs"
    after: ClassVar[tuple[str, ...]] = ("split-weights",)

    method: str = "project"
    """``"project"``: wrong signs become 0 and may come back; ``"abs"``: they are mirrored."""
    axis: str = "presynaptic"
    """Whose sign it is; ``"postsynaptic"`` signs rows, and kernels of convolutions, for comparison only."""
    excitatory_fraction: float = 0.5
    """Fraction of the units that are excitatory, dimensionless, in [0, 1]; rounded to whole units."""
    constrain_inputs: bool = False
    """Whether layers whose presynaptic units are the model's inputs are constrained too."""
    constrain_readout: bool = False
    """Whether layers that lead straight to the model's outputs are constrained too."""
    seed: int = 0
    """Seed of the draw that decides which units are excitatory, a whole number."""

    def __post_init__(self) -> None:
        check_choice(f"{self.name}: method", self.method, ops.SIGN_METHODS)
        check_choice(f"{self.name}: axis", self.axis, ops.SIGN_AXES)
        check_flag(f"{self.name}: constrain_inputs", self.constrain_inputs)
        check_flag(f"{self.name}: constrain_readout", self.constrain_readout)
        for option, permitted in (("excitatory_fraction", FRACTION), ("seed", SEED)):
            object.__setattr__(self, option, permitted.check(f"{self.name}: {option}", getattr(self, option)))
        super().__post_init__()

    def survey(self, graph_module: BioGraphModule) -> Ends:
        """Find the two ends of the model."""
        synaptic = synaptic_nodes(graph_module)
        inputs, readout = input_facing_nodes(graph_module, synaptic), readout_nodes(graph_module, synaptic)
        return Ends(inputs, readout, region_of_nodes(graph_module.graph))

    def reason_against(self, site: WeightSite, survey: Ends) -> str | None:
        """Leave alone what is constrained already, and the free ends of the model."""
        if site.has(ops.constrain_sign):
            return "its signs are constrained already"
        if site.has(ops.scale_gradient):
            return "its gradient is scaled already, and signs must be constrained before that"
        region = survey.regions.get(site.node)
        if region and site.node in survey.inputs and not self.constrain_inputs:
            return f"what feeds it is not known: Python calls {region!r} (constrain_inputs=False)"
        if region and site.node in survey.readout and not self.constrain_readout:
            return f"what follows it is not known: Python calls {region!r} (constrain_readout=False)"
        if site.node in survey.inputs and not self.constrain_inputs:
            return "its presynaptic units are the model's inputs, which have no sign (constrain_inputs=False)"
        if site.node in survey.readout and not self.constrain_readout:
            return "it is a readout: no weights between it and the model's output (constrain_readout=False)"
        return site.obstacle

    def wrap(self, lowering: Lowering, weight: Weight) -> Iterator[Remark]:
        """Draw the signs, unless another use of the weight has brought them, and insert them."""
        state = bio_module_at(lowering.graph_module, weight.path)
        first = weight.sites[0]
        if state.sign is None:
            state.sign = self._drawn(first)
        for site in weight.sites:
            lowering.lower(site)
        options = {"axis": first.kind.input_axis} if first.kind.input_axis != 1 else {}
        if first.groups > 1 and not first.kind.transposed and state.sign.dim() == 1:
            options["groups"] = first.groups
        state.sign_layout = options
        sign = (f"{bio_module_path(weight.path)}.sign", "sign")
        lowering.wrap_weight(weight.sites, ops.constrain_sign, sign, "signed", **options, method=self.method)
        excitatory = int((state.sign > 0).sum())
        wrong = int((weight.parameter.detach() * state.signs() < 0).sum())
        numbers = {"excitatory": excitatory, "inhibitory": state.sign.numel() - excitatory, "wrong": wrong}
        fate = "held at 0" if self.method == "project" else "mirrored"
        for site in weight.sites:
            yield applied(
                site.node,
                site.layer,
                f"{numbers['excitatory']} excitatory and {numbers['inhibitory']} inhibitory "
                f"{'units' if self.axis == 'presynaptic' else 'rows'}; {wrong} of {weight.parameter.numel()} "
                f"weights had the other sign and are {fate}",
                **numbers,
            )

    def _drawn(self, site: WeightSite) -> Tensor:
        """Return signs for the presynaptic units, or for rows (and kernels) of the weight."""
        weight = site.parameter
        shape: tuple[int, ...] = (site.input_channels,)
        if self.axis == "postsynaptic":
            shape = (
                (weight.shape[0], 1) if weight.dim() == 2 else (*weight.shape[:2], *(1,) * (weight.dim() - 2))
            )
        count = int(torch.Size(shape).numel())
        signs = torch.full((count,), -1, dtype=torch.int8)
        generator = generator_for(self.seed, site.parameter_path, purpose=self.name)
        chosen = torch.randperm(count, generator=generator)[: round(count * self.excitatory_fraction)]
        signs[chosen] = 1
        return signs.reshape(shape).to(weight.device)
