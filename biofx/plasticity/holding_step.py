"""What rules that hold weights back do around an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from biofx.operators.parts import is_sharded, local, local_part
from biofx.plasticity.agreement import Ranks
from biofx.plasticity.binding import Bound
from biofx.plasticity.consolidated_state import HOLDING
from biofx.plasticity.consolidation import follow_path
from biofx.plasticity.updates import Way


class HoldingStep:
    """One step of the rules of consolidation, and of the pull towards the initial weight.

    Args:
        due: names of the rules that are due.
        acts: whether one of them runs on a weight.
        ranks: those that agree, None for this one alone.
    """

    def __init__(self, due: Iterable[str], acts: Callable[[str, Any], bool], ranks: Ranks | None) -> None:
        self._due = [name for name in due if name in HOLDING]
        self._acts = acts
        self._ranks = ranks
        self._rules: dict[str, list[str]] = {}
        self._slopes: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def observe(self, bound: Iterable[Bound]) -> None:
        """Look at the gradients that are there, before anything changes them."""
        gated = []
        for each in bound if self._due else ():
            state, gradient = each.state, each.weight.grad
            rules = [name for name in self._due if self._acts(name, state) and state.why_not(name) is None]
            if gradient is None or not rules:
                continue
            self._rules[state.path] = rules
            part = local(gradient.detach())
            if rules != ["l2_to_initial"]:
                state.see_gradient(part)
            if "synaptic_intelligence" in rules:
                self._slopes[state.path] = state.loss_gradient(part)
            if "upgd" in rules:
                gated.append(each)
        if gated:
            self._compare_utilities(gated)

    def _compare_utilities(self, gated: list[Bound]) -> None:
        """Find the utility that those of each weight are relative to."""
        device, dtype = local(gated[0].weight).device, torch.float64
        largest = torch.stack([each.state.largest_utility().to(device, dtype) for each in gated])
        if self._ranks is not None and any(is_sharded(each.weight) for each in gated):
            self._ranks.take_largest(largest)
        whole = [each.state.config.upgd_scaling == "network" for each in gated]
        chosen = [own for own, is_whole in zip(largest, whole, strict=True) if is_whole]
        of_network = torch.stack(chosen).max() if chosen else largest[0]
        for each, own, is_whole in zip(gated, largest, whole, strict=True):
            self._largest[each.state.path] = of_network if is_whole else own

    def follows(self, state: Any) -> bool:
        """Whether what the step does to a weight is needed."""
        return state.path in self._slopes

    def change(
        self,
        bound: Bound,
        touched: dict[str, int | Tensor],
        changing: Callable[[], tuple[Tensor, Tensor]],
        multiplier: Tensor | None,
        *,
        in_graph: bool,
    ) -> Tensor | None:
        """Add pulls and noise to a gradient; return what update or gradient is to be multiplied by then.

        Args:
            bound: the weight.
            touched: how many synapses each rule touched, which is noted in it.
            changing: returns this rank's part of the gradient, and of the one that takes its place, to which
                all is written; the same tensor where that is there already.
            multiplier: broadcastable to the whole weight, or to this rank's part; None for 1.
            in_graph: whether the gradient is multiplied by the factors of the graph.
        """
        state, weight, rules = bound.state, bound.weight, self._rules.get(bound.state.path)
        if rules is None:
            return multiplier
        scale = state.graph_scale(level=bound.way is Way.GRADIENT, factors=in_graph)
        if self.follows(state) or state.pulls(rules):
            state.add_pulls(*changing(), rules, scale)  # else the optimizer may change that of the path
        rates = state.consolidated_rates()
        if "upgd" in rules:
            noise = state.noise_on_gradient()
            if noise is not None:
                found, own = changing()
                torch.add(found, noise if scale is None else noise.mul_(scale), out=own)
            rates = state.utility_gate(self._largest[state.path])
        for name in rules:
            touched[name] = weight.numel()
        if rates is None:
            return multiplier
        rates = rates.to(weight.dtype)
        return rates if multiplier is None else rates.mul_(local_part(multiplier, weight).to(rates.dtype))

    def finish(self, state: Any, before: Tensor, after: Tensor) -> None:
        """Follow what the step has done to a weight.

        Args:
            state: of the weight.
            before: this rank's part of it, before the step.
            after: the same, after it.
        """
        slope = self._slopes.pop(state.path, None)
        if slope is not None and state.task_importance is not None:
            follow_path(local(state.task_importance), slope, before, after)
