"""What happens to weights around one step of their optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from biofx.plasticity.binding import Bound
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.exponentiated import exponentiate
from biofx.plasticity.ranks import average_activity
from biofx.plasticity.schedule import LayerStep, Rule
from biofx.plasticity.sharded_state import whole
from biofx.plasticity.shards import is_sharded, local, local_part, norm_of_part
from biofx.plasticity.update_scaling import BeforeStep, Way, remember, rescale

_BEFORE_STEP = ("crystallize", "update_fuzzy_learning_rates")
_BUILT_IN = ("fuzzy_learning_rates", "volume_dependent_lr", *_BEFORE_STEP)
_ON_WEIGHTS = ("rejuvenate_weights", "synaptic_scaling")


@dataclass
class _Weight:
    """A weight that is being stepped."""

    bound: Bound
    layer: LayerStep
    before: BeforeStep | None = None
    multiplier: Tensor | None = None
    """What the update is multiplied by."""
    frozen: Tensor | None = None
    """Where this rank's part keeps its values, whatever the optimizer remembers of earlier gradients."""


class OptimizerStep:
    """One step of an optimizer: :meth:`prepare` comes before it, :meth:`finish` after it.

    Args:
        number: of the step, from 0.
        rules: of the schedule.
        group: ranks that agree on activity, None for this one alone.
        watched: whether norms are asked for.
        exponentiated: whether updates of constrained weights are multiplicative.
    """

    def __init__(
        self, number: int, rules: tuple[Rule, ...], group: Any, *, watched: bool, exponentiated: bool
    ) -> None:
        self._number, self._rules, self._group = number, rules, group
        self._watched, self._exponentiated = watched, exponentiated
        self._weights: dict[str, _Weight] = {}
        self._gradients: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def layers(self) -> dict[str, LayerStep]:
        """What the step did to each weight that it stepped, by path."""
        return {path: stepped.layer for path, stepped in self._weights.items()}

    @torch.no_grad()
    def prepare(self, optimizer: Optimizer, bound: Mapping[str, Bound]) -> None:
        """Run the rules on gradients, then scale what is to be scaled."""
        try:
            for path, weight in bound.items():
                if weight.weight.grad is not None:
                    layer = LayerStep(weight.state, float("nan"), float("nan"))
                    stepped = self._weights[path] = _Weight(weight, layer)
                    self._prepare(optimizer, stepped, weight.weight.grad)
        except BaseException:
            self.restore_gradients()
            raise

    @torch.no_grad()
    def finish(self, optimizer: Optimizer) -> None:
        """Rescale updates, write signs back, then run the rules on weights."""
        self.restore_gradients()
        for stepped in self._weights.values():
            self._finish(optimizer, stepped)
        for rule in self._rules:
            if rule.name not in _BUILT_IN and rule.is_due(self._number):
                self._run_on_weights(rule.name, optimizer)

    def restore_gradients(self) -> None:
        """Put the gradients back as the backward left them."""
        for weight, original, own in self._gradients:
            if weight.grad is own:  # else the optimizer has taken it away
                weight.grad = original
        self._gradients = []

    def _prepare(self, optimizer: Optimizer, stepped: _Weight, gradient: Tensor) -> None:
        bound, layer = stepped.bound, stepped.layer
        state, weight = bound.state, bound.weight
        if self._watched:
            layer.gradient_norm = norm_of_part(local(gradient), gradient)
        in_parts = not self._reads_values(state)
        if is_sharded(weight) and not in_parts:
            self._own_gradient(bound)
        with nullcontext() if in_parts else whole(state):
            unscaled = self._change_factors(bound, layer)
            multiplier = self._multiplier(bound, layer, done_in_graph=not unscaled)
            if bound.way is Way.GRADIENT and _remembers(optimizer, weight):
                stepped.frozen = _frozen(state, weight)
        in_full = multiplier is not None and bound.way is Way.UPDATE
        exponential = self._exponentiated and state.is_constrained
        if in_full or self._watched or exponential or stepped.frozen is not None:
            stepped.before = remember(optimizer, bound.group, weight)
        if in_full:
            stepped.multiplier = multiplier
        elif multiplier is not None:
            scaled = self._own_gradient(bound)
            local(scaled).mul_(local_part(multiplier, scaled).to(scaled.dtype))

    def _own_gradient(self, bound: Bound) -> Tensor:
        """Give a weight a copy of its gradient, which may be changed until the step is over."""
        weight = bound.weight
        for known, _, given in self._gradients:
            if known is weight:
                return given
        gradient: Any = weight.grad
        own: Tensor = gradient.detach().clone()
        self._gradients.append((weight, gradient, own))
        weight.grad = own
        return own

    def _reads_values(self, state: BioModule) -> bool:
        """Whether a rule that is due before this step must see all of a layer's weight or gradient."""
        follows = state.is_dynamic and not state.follows_in_parts
        dampens = self._is_due("crystallize") and not state.crystallizes_in_parts
        return follows or dampens or self._is_due("volume_dependent_lr")

    def _change_factors(self, bound: Bound, layer: LayerStep) -> bool:
        """Run the rules that change factors; return whether the gradient now is without factors.

        Where the graph has scaled the gradient, it did so with the factors from before.
        """
        state = bound.state
        scheduled = any(rule.name == "update_fuzzy_learning_rates" for rule in self._rules)
        names = ["crystallize"] if self._is_due("crystallize") else []
        if state.is_dynamic and (not scheduled or self._is_due("update_fuzzy_learning_rates")):
            names.append("update_fuzzy_learning_rates")
        able = [name for name in names if state.why_not(name) is None]
        dampened = state.memory.dampening is not None
        needed = state.scaled_in_graph and (able or bound.way is Way.UPDATE or dampened)
        factors = state.fuzzy_learning_rate_parameters if needed else None
        used = factors.clone() if factors is not None and able else factors
        if "update_fuzzy_learning_rates" in able:
            average_activity(state, self._group)
        for name in able:
            result = getattr(state, name)()
            layer.touched[name] = result if isinstance(result, int) else 0
        if not state.scaled_in_graph:
            return True
        if used is not None:
            self._own_gradient(bound)
            state.unscale_gradient(used)
            return True
        return False

    def _multiplier(self, bound: Bound, layer: LayerStep, *, done_in_graph: bool) -> Tensor | None:
        """Return what gradient or update is to be multiplied by, None for nothing."""
        state = bound.state
        factors = None if done_in_graph else state.acting_factors
        if not self._is_due("volume_dependent_lr"):
            return factors
        volume = state.volume_factors()
        layer.touched["volume_dependent_lr"] = volume.numel()
        return volume if factors is None else volume.mul_(factors.to(volume.dtype))

    def _is_due(self, name: str) -> bool:
        return any(rule.name == name and rule.is_due(self._number) for rule in self._rules)

    def _finish(self, optimizer: Optimizer, stepped: _Weight) -> None:
        bound, layer, before = stepped.bound, stepped.layer, stepped.before
        weight = local(bound.weight)
        if before is not None and stepped.multiplier is not None:
            rescale(before, optimizer, bound.weight, stepped.multiplier, decay=bound.decay)
        if before is not None and stepped.frozen is not None:
            weight.copy_(torch.where(stepped.frozen, before.weight, weight))
        if self._exponentiated and layer.state.is_constrained and before is not None:
            signs = layer.state.signs().expand(bound.weight.shape)
            exponentiate(weight, before.weight, local_part(signs, bound.weight))
        if self._watched and before is not None:
            layer.update_norm = norm_of_part(weight - before.weight, bound.weight)
        stepped.before = stepped.multiplier = stepped.frozen = None
        if layer.state.is_constrained:
            layer.touched["enforce_dales_principle"] = layer.state.enforce_dales_principle()

    def _run_on_weights(self, name: str, optimizer: Optimizer) -> None:
        able = [layer for layer in self.layers.values() if layer.state.why_not(name) is None]
        for layer in able:
            with whole(layer.state, factors=False):
                layer.state.check(name)
        for layer in able:
            rule = getattr(layer.state, name)
            with whole(layer.state, optimizer, factors=name not in _ON_WEIGHTS):
                result = rule(optimizer) if name == "rejuvenate_weights" else rule()
            layer.touched[name] = result if isinstance(result, int) else 0


def _remembers(optimizer: Optimizer, weight: Tensor) -> bool:
    """Whether an optimizer keeps anything that could move a synapse whose gradient is 0."""
    state = optimizer.state.get(weight, {})
    return any(not isinstance(value, Tensor) or value.dim() > 0 for value in state.values())


def _frozen(state: BioModule, weight: Tensor) -> Tensor | None:
    """Return where the factors are 0 in this rank's part of a weight, None for nowhere."""
    if state.is_drawn or not state.has_factors:
        return None
    factors: Any = state.fuzzy_learning_rate_parameters
    part = local(factors)
    if not part.numel() or float(part.min()) > 0:  # in a tenth of the time of all()
        return None
    return (local_part(factors, weight) == 0).expand_as(local(weight.detach()))
