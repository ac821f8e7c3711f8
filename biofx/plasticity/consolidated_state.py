"""The part of a weight's state that holds it back: importance for earlier tasks, and the initial weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biofx.errors import NonFiniteWeightError, PlasticityError
from biofx.operators.mask_ops import existing
from biofx.operators.parts import is_sharded, local, local_part
from biofx.operators.sampling import generator_for, handed_over
from biofx.plasticity.bio_state import BioState
from biofx.plasticity.consolidation import (
    PENALTIES,
    add_pull,
    follow_utility,
    gate_of,
    importance_of_path,
    noise_of,
    rates_of,
)
from biofx.plasticity.found_out import FoundOut
from biofx.plasticity.shards import flat_span, sum_over_ranks

RULES = {
    "synaptic_intelligence": "synaptic-intelligence",
    "elastic_consolidation": "elastic",
    "memory_aware": "memory-aware",
    "upgd": "upgd",
}
"""The rules of consolidation, with the value of ``consolidation`` that each needs."""
OF_TASKS = frozenset(RULES) - {"upgd"}
"""Those that consolidate at the end of a task."""
HOLDING = (*RULES, "l2_to_initial")
"""All rules that hold weights back."""
_BEGUN, _STEPS = 0, 1


class ConsolidatedState(BioState):
    """What is kept of a weight to hold it back, and what that makes of gradients and rates."""

    only_held = False
    """Whether no other rules act on it, because it is no weight of a layer, look-up or product."""

    if TYPE_CHECKING:

        def _require(self, rule: str) -> None: ...
        def _gradient(self) -> Tensor: ...

    def keep_consolidation(self) -> None:
        """Add or remove the buffers that the options of consolidation ask for."""
        config, weight = self.config, self.parameter
        method = "off" if weight is None or weight.is_complex() else config.consolidation
        pulls = weight is not None and not weight.is_complex() and config.l2_to_initial_strength > 0
        names = {
            "importance": method != "off",
            "anchor_weight": method in PENALTIES,
            "task_importance": method in ("synaptic-intelligence", "elastic"),
            "initial_weight": pulls,
        }
        for name, needed in names.items():
            held = self._buffers[name]
            if not needed or weight is None:
                self._buffers[name] = None
            elif held is None or held.shape != weight.shape:
                dtype = torch.promote_types(weight.dtype, torch.float32)
                made = weight.detach().to(dtype, copy=True)
                self._buffers[name] = made if name.endswith("weight") else made.zero_()
        if method == "off" or weight is None:
            self.task_counts = None
        elif self.task_counts is None:
            self.task_counts = torch.zeros(2, dtype=torch.int64, device=weight.device)

    @torch.no_grad()
    def hold_from_here(self) -> None:
        """Take the weight as it is now as the one that it began with."""
        for held in (self.anchor_weight, self.initial_weight):
            if held is not None:
                held.copy_(self.weight.detach())

    def why_not_held(self, rule: str) -> str | None:
        """Return why a rule that holds weights back leaves this one alone, None if it does not."""
        if self.weight.is_complex():
            return f"it is complex ({self.weight.dtype})"
        if rule == "l2_to_initial":
            kept = self.initial_weight is not None
            return None if kept else "its initial weight is not kept (l2_to_initial_strength=0)"
        if self.config.consolidation != RULES[rule] or self.importance is None:
            return (
                f"its importance is kept for another method, or not at all (consolidation="
                f"{self.config.consolidation!r}, where the rule needs {RULES[rule]!r})"
            )
        return None

    # tasks

    @property
    def has_begun_task(self) -> bool:
        """Whether a task has been begun, without which nothing is consolidated."""
        counts = self.task_counts
        return counts is not None and bool(counts[_BEGUN] > 0)

    @property
    def steps_of_task(self) -> int:
        """Steps whose gradient was seen since the task began, a count."""
        return 0 if self.task_counts is None else int(self.task_counts[_STEPS])

    @torch.no_grad()
    def see_gradient(self, gradient: Tensor) -> None:
        """Learn from the gradient of a step what importance, or utility, can tell from it.

        Args:
            gradient: this rank's part, as backward left it.
        """
        if (counts := self.task_counts) is None:
            return
        counts[_STEPS].add_(1)
        method, seen = self.config.consolidation, self.task_importance
        if method == "elastic" and seen is not None:
            slope = self.loss_gradient(gradient).to(seen.dtype)
            local(seen).addcmul_(slope, slope)
        if method == "upgd":
            weight, decay = local(self.weight.detach()), self.config.upgd_utility_decay
            follow_utility(local(self._utilities()), self.loss_gradient(gradient), weight, decay)

    @torch.no_grad()
    def importance_after(self, found: Tensor | None) -> Tensor:
        """Return this rank's part of what the importance becomes at the end of the task; changes nothing.

        Args:
            found: what data gave for this task, on this rank's part; None where the steps are to tell.

        Raises:
            NonFiniteWeightError: it is not finite.
        """
        if self.importance is None or self.anchor_weight is None:
            raise PlasticityError(f"{self.path!r} has no tasks (consolidation={self.config.consolidation!r})")
        earlier, config, seen = local(self.importance), self.config, self.task_importance
        if config.consolidation == "synaptic-intelligence" and seen is not None:
            distance = local(self.weight.detach()) - local(self.anchor_weight)
            result = importance_of_path(earlier, local(seen), distance, config.consolidation_damping)
        elif config.consolidation == "elastic":
            if found is None and seen is not None and self.steps_of_task:
                found = local(seen) / self.steps_of_task
            result = earlier if found is None else earlier * config.consolidation_decay + found
        else:
            result = earlier if found is None else earlier + found
        wrong = 0 if bool(result.sum().isfinite()) else int((~result.isfinite()).sum())
        if wrong:
            raise NonFiniteWeightError(
                f"{self.path}: expected a finite importance at the end of a task, found {wrong} that are NaN "
                "or infinite, since a gradient was; go on from a sound checkpoint"
            )
        return result

    @torch.no_grad()
    def begin_task(self, importance: Tensor) -> None:
        """Begin a task: hold on to the weights as they are now.

        Args:
            importance: what :meth:`importance_after` has returned.
        """
        counts, kept, anchor = self.task_counts, self.importance, self.anchor_weight
        if counts is None or kept is None or anchor is None:
            return
        counts[_BEGUN] += 1
        counts[_STEPS] = 0
        local(kept).copy_(importance)
        local(anchor).copy_(local(self.weight.detach()))
        if self.task_importance is not None:
            local(self.task_importance).zero_()

    @torch.no_grad()
    def forget_importance(self, places: Tensor) -> None:
        """Let new synapses in the place of old ones be of no importance, and begin where they are.

        Args:
            places: their flat positions, int64, or a bool for each synapse.
        """
        chosen = places.reshape(-1)
        for held in (self.importance, self.task_importance):
            if held is not None:
                _put(held, chosen, torch.zeros_like(held))
        if self.anchor_weight is not None:
            _put(self.anchor_weight, chosen, self.weight.detach())

    @torch.no_grad()
    def move_anchor(self, distance: Tensor) -> None:
        """Follow a change of the weight that the rest of the network makes up for.

        Args:
            distance: that the weight was moved by, shaped like it.
        """
        if self.anchor_weight is not None:
            self.anchor_weight.add_(distance)

    # the rules, called by hand

    def synaptic_intelligence(self) -> int:
        """Pull the weight back by its importance; call it between backward and step.

        Paths, and with them importance, are followed in the steps of an attached optimizer alone. Formula
        and source: :mod:`biofx.plasticity.consolidation`.

        When: at every step, with ``begin_task`` of the attachment called before the first one and at each
        change of the task.
        """
        return self._hold("synaptic_intelligence")

    def elastic_consolidation(self) -> int:
        """Pull the weight back by its importance; call it between backward and step.

        Importance is the Fisher information at the end of a task: :mod:`biofx.plasticity.consolidation`.

        When: at every step, with ``begin_task`` of the attachment called before the first one and at each
        change of the task; without batches of the task that ends it takes the gradients of the steps.
        """
        return self._hold("elastic_consolidation")

    def memory_aware(self) -> int:
        """Pull the weight back by its importance; call it between backward and step.

        Importance is how much the output depends on the weight: :mod:`biofx.plasticity.consolidation`.

        When: at every step, with ``begin_task`` of the attachment called before the first one and at each
        change of the task, with batches of the task that ends.
        """
        return self._hold("memory_aware")

    @torch.no_grad()
    def upgd(self) -> int:
        """Add noise to the gradient, and gate both by utility; call it between backward and step.

        Weights of high utility move less, the others more (:mod:`biofx.plasticity.consolidation`).

        When: at every step of a training that goes on; it needs no tasks.

        Raises:
            PlasticityError: utilities are relative to those of the network, which a layer does not know.
        """
        self._require("upgd")
        if self.config.upgd_scaling != "layer":
            raise PlasticityError(
                f"upgd cannot act on {self.path!r} alone: its utility is relative to the largest of the "
                "network; attach the optimizer (biofx.attach), or take upgd_scaling='layer'"
            )
        gradient = local(self._gradient())
        self.see_gradient(gradient)
        noise, scale = self.noise_on_gradient(), self.graph_scale()
        if noise is not None:
            gradient.add_(noise if scale is None else noise.mul_(scale))
        gradient.mul_(self.utility_gate(self.largest_utility()).to(gradient.dtype))
        return self.weight.numel()

    def l2_to_initial(self) -> int:
        """Pull the weight to where it began; call it between backward and step.

        λ (w - w0)² is added to the loss (:mod:`biofx.plasticity.consolidation`).

        When: at every step of a training that goes on.
        """
        return self._hold("l2_to_initial")

    @torch.no_grad()
    def _hold(self, rule: str) -> int:
        self._require(rule)
        gradient = local(self._gradient())
        if rule in OF_TASKS:
            self.see_gradient(gradient)
        self.add_pulls(gradient, gradient, [rule], self.graph_scale())
        rates = self.consolidated_rates() if rule in OF_TASKS else None
        if rates is not None:
            gradient.mul_(rates.to(gradient.dtype))
        return self.weight.numel()

    # what acts at a step

    def loss_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the loss itself; the same tensor where the graph has not multiplied it.

        Args:
            gradient: this rank's part, as backward left it. Where a factor is 0, so is the result.
        """
        scale = self.graph_scale()
        return (
            gradient if scale is None else gradient / torch.where(scale == 0, 1.0, scale).to(gradient.dtype)
        )

    def graph_scale(self, *, level: bool = True, factors: bool = True) -> Tensor | None:
        """Return what the graph multiplies the gradient of this rank's part by; None for 1.

        Args:
            level: whether the number that holds for all synapses is asked for.
            factors: whether learning-rate factors are.
        """
        weight, scale = self.weight.detach(), None
        if factors and self.scaled_in_graph:
            held = self.fuzzy_learning_rate_parameters
            scale = None if held is None else local_part(held, weight)
        if level and self.gradient_level != 1:
            number = torch.full((), self.gradient_level, dtype=weight.dtype, device=local(weight).device)
            scale = number if scale is None else scale.to(weight.dtype) * number
        return scale

    def pulls(self, rules: list[str]) -> bool:
        """Whether one of some rules pulls the weight at present."""
        if "l2_to_initial" in rules and self.initial_weight is not None:
            return True
        pulls = self.config.consolidation_effect == "pull" and not OF_TASKS.isdisjoint(rules)
        return pulls and self.anchor_weight is not None and self._total_importance() > 0

    @torch.no_grad()
    def add_pulls(self, gradient: Tensor, own: Tensor, rules: list[str], scale: Tensor | None) -> None:
        """Add the gradients of the penalties of rules to a gradient.

        Args:
            gradient: this rank's part.
            own: where the sum is written, also if there is nothing to add; possibly the gradient itself.
            rules: some of :data:`HOLDING`.
            scale: what the graph has multiplied the gradient by, broadcastable to it; None for 1.
        """
        weight, config = local(self.weight.detach()), self.config
        each = None if scale is None else scale.expand_as(weight)
        if "l2_to_initial" in rules and self.initial_weight is not None:
            strength = 2 * config.l2_to_initial_strength
            add_pull(gradient, weight, local(self.initial_weight), strength, scale=each, out=own)
            gradient = own
        anchor, importance = self.anchor_weight, self.importance
        if anchor is None or importance is None or not self.pulls([*OF_TASKS.intersection(rules)]):
            if own is not gradient:
                own.copy_(gradient)
            return
        strength = PENALTIES[config.consolidation] * config.consolidation_strength
        if config.consolidation == "elastic":
            strength *= config.consolidation_decay
        add_pull(gradient, weight, local(anchor), strength, local(importance), each, out=own)

    @torch.no_grad()
    def consolidated_rates(self) -> Tensor | None:
        """Return what importance multiplies the rates of this rank's part by; None for nothing."""
        importance, config = self.importance, self.config
        if importance is None or config.consolidation_effect != "rates":
            return None
        total = self._total_importance()
        count = self.weight.numel() if self.connections is None else self.connections
        rates = rates_of(local(importance), total / max(1, count), config.consolidation_strength)
        return rates if total else None

    def _total_importance(self) -> float:
        """Return the sum of importance over all of the weight; summed anew when it has changed."""
        if (importance := self.importance) is None:
            return 0.0
        part = local(importance)
        known: FoundOut[float] = self.__dict__.setdefault("_total", FoundOut())
        return known.of(part, lambda held: float(sum_over_ranks(held.sum(dtype=torch.float64), importance)))

    @torch.no_grad()
    def largest_utility(self) -> Tensor:
        """Return the largest utility of UPGD of this rank's part, its bias corrected, of shape ``()``."""
        held = self._utilities()
        part = local(held)
        if not part.numel():
            return torch.full((), -torch.inf, dtype=held.dtype, device=part.device)
        return part.max() / self._correction()

    @torch.no_grad()
    def utility_gate(self, largest: Tensor) -> Tensor:
        """Return what UPGD multiplies updates of this rank's part by.

        Args:
            largest: utility that others are relative to, of shape ``()``.
        """
        return gate_of(local(self._utilities()), largest * self._correction())

    def _utilities(self) -> Tensor:
        if self.importance is None:
            raise PlasticityError(f"{self.path!r} has no utility (consolidation='upgd')")
        return self.importance

    def _correction(self) -> Tensor:
        counts = self.task_counts
        if counts is None:
            return torch.ones(())
        return 1 - self.config.upgd_utility_decay ** counts[_STEPS].to(self._utilities().dtype)

    @torch.no_grad()
    def noise_on_gradient(self) -> Tensor | None:
        """Sample the noise that UPGD adds to the gradient of this rank's part; None without any."""
        config, weight = self.config, self.weight.detach()
        if not config.upgd_noise:
            return None
        generator = generator_for(config.seed, self.path, self.memory.events, purpose="upgd")
        self.memory.events += 1
        span = flat_span(weight)
        drawn = noise_of(weight.numel(), config.upgd_noise, generator, span)
        part = local(weight)
        if span is None:
            drawn = local_part(drawn.reshape(weight.shape), weight)
        drawn = handed_over(drawn.reshape(part.shape), part.device, part.dtype)
        mask = self.connection_mask
        return drawn if mask is None else drawn.mul_(existing(local_part(mask, weight)))


def _put(held: Tensor, chosen: Tensor, values: Tensor) -> None:
    """Copy values to some places of a tensor, in any layout."""
    if is_sharded(held):
        raise PlasticityError("expected whole tensors of a weight to replace synapses, found parts of them")
    flat, new = held.reshape(-1), values.reshape(-1).to(held.dtype)
    flat[chosen] = new[chosen]
    if flat.data_ptr() != held.data_ptr():
        held.copy_(flat.view(held.shape))
