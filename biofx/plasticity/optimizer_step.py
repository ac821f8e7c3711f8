"""One step of an optimizer: the rules that are due, and what happens to weights around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from biofx.operators.dispatch import is_on_host
from biofx.operators.parts import is_sharded, local, local_part
from biofx.plasticity.agreement import Ranks
from biofx.plasticity.binding import Bound
from biofx.plasticity.bio_module import BioModule, unit_run_of
from biofx.plasticity.consolidated_state import HOLDING
from biofx.plasticity.holding_step import HoldingStep
from biofx.plasticity.lent_memory import LentMemory
from biofx.plasticity.optimizers import may_move_without_gradient
from biofx.plasticity.ranks import average_activity, average_inputs, sum_probe, whole
from biofx.plasticity.schedule import Schedule
from biofx.plasticity.shards import norm_of_part
from biofx.plasticity.unit_turnover import UnitTurnover
from biofx.plasticity.unit_turnover_run import turn_over_units
from biofx.plasticity.updates import BeforeStep, Way, exponentiate, remember, rescale

_BEFORE_STEP = ("crystallize", "update_fuzzy_learning_rates")
_ON_GRADIENTS = frozenset({"crystallize", "volume_dependent_lr", *HOLDING})
_BUILT_IN = ("fuzzy_learning_rates", "volume_dependent_lr", *_BEFORE_STEP)


@dataclass
class LayerStep:
    """What one optimizer step did to one weight."""

    state: BioModule
    gradient_norm: float = float("nan")
    """L2 norm of the gradient after backward, factors in the graph included; NaN if not requested."""
    update_norm: float = float("nan")
    """L2 norm of the change of the weight by the step, without rules on weights; NaN if not requested."""
    counts: dict[str, int | Tensor] = field(default_factory=dict)
    """What :attr:`touched` is read from."""

    @property
    def touched(self) -> dict[str, int]:
        """Synapses that each rule touched, by the rule's name; a device is waited for when this is read."""
        self.counts |= {name: int(count) for name, count in self.counts.items()}
        return cast(dict[str, int], self.counts)

    def run(self, name: str, *args: Any) -> None:
        """Run a rule and note how many synapses it touched."""
        if name == "enforce_dales_principle" and not is_on_host(self.state.weight):
            self.counts[name] = self.state.write_signs_back()
            return
        result = getattr(self.state, name)(*args)
        self.counts[name] = result if isinstance(result, int) else 0


Observer = Callable[[int, Mapping[str, LayerStep]], object]
"""Called after each step with its number, from 0, and what it did to each weight, by path.

An observer may have two further methods: ``watch(model)``, called once by :func:`biofx.attach`, and
``is_due(step)``, whether it needs the norms of that step, which cost a pass over each weight.
"""


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
        schedule: which rules run, on which weights.
        ranks: those that agree on activity, None for this one alone.
        memory: for copies of weights and gradients.
        watched: whether norms are requested.
    """

    def __init__(
        self, number: int, schedule: Schedule, ranks: Ranks | None, memory: LentMemory, *, watched: bool
    ) -> None:
        self._memory = memory
        self._number = number
        self._schedule, self._due = schedule, schedule.due(number)
        self._ranks, self._watched = ranks, watched
        self._holding = HoldingStep(self._due, self._is_due, ranks)
        self._acts = watched or not _ON_GRADIENTS.isdisjoint(self._due)
        self._bound: Mapping[str, Bound] = {}
        self._stepped: dict[str, Bound] = {}
        self._weights: dict[str, _Weight] = {}
        self._gradients: list[tuple[Tensor, Tensor, Tensor]] = []

    @cached_property
    def layers(self) -> dict[str, LayerStep]:
        """What the step did to each weight that it stepped, by path."""
        return {path: LayerStep(bound.state) for path, bound in self._stepped.items()}

    def prepare(self, optimizer: Optimizer, bound: Mapping[str, Bound]) -> None:
        """Run the rules on gradients, then multiply the gradients that factors act on."""
        self._bound = bound
        self._stepped = {path: each for path, each in bound.items() if each.weight.grad is not None}
        for path, each in self._stepped.items():
            if self._acts or each.is_exponentiated or not each.state.is_stepped_plainly:
                self._weights[path] = _Weight(each, self.layers[path])
        if self._weights:
            self._prepare_weights(optimizer)

    def finish(self, optimizer: Optimizer) -> None:
        """Rescale updates, write signs back, then run the rules on weights."""
        self._restore_gradients()
        for path, each in self._stepped.items():
            if path not in self._weights and each.state.is_constrained:
                self._weights[path] = _Weight(each, self.layers[path])
        averages = self._ranks is not None and "rejuvenate_units" in self._schedule.names
        if self._weights or self._due or averages:
            self._finish_weights(optimizer, averages=averages)
        self._memory.settle()

    @torch.no_grad()
    def _prepare_weights(self, optimizer: Optimizer) -> None:
        try:
            with self._in_force():
                self._holding.observe(stepped.bound for stepped in self._weights.values())
                for stepped in self._weights.values():
                    self._prepare(optimizer, stepped)
        except BaseException:
            self._restore_gradients()
            raise

    @torch.no_grad()
    def _finish_weights(self, optimizer: Optimizer, *, averages: bool) -> None:
        with self._in_force():
            for stepped in self._weights.values():
                self._finish(optimizer, stepped)
            if averages:
                average_inputs([each.state for each in self._bound.values()], self._ranks)
            for name in self._due:
                if name == "rejuvenate_units":
                    self._turn_over_units(optimizer)
                elif name not in (*_BUILT_IN, *HOLDING):
                    self._run_on_weights(name, optimizer)

    def _in_force(self) -> AbstractContextManager[None]:
        """Let the options of the step's rules hold for their weights."""
        return self._schedule.in_force([each.state for each in self._bound.values()], self._number)

    def _is_due(self, name: str, state: BioModule) -> bool:
        """Whether a rule runs on a weight at this step."""
        return any(entry.covers(state) for entry in self._due.get(name, ()))

    def _restore_gradients(self) -> None:
        """Put the gradients back as the backward left them."""
        for weight, original, own in self._gradients:
            if weight.grad is own:  # else the optimizer has taken it away
                weight.grad = original
        self._gradients = []

    def _prepare(self, optimizer: Optimizer, stepped: _Weight) -> None:
        """Run the rules on the gradient of a weight, and keep what is needed of it after the step."""
        bound, layer = stepped.bound, stepped.layer
        state, weight = bound.state, bound.weight
        gradient: Any = weight.grad
        if state.connection_probe is not None:
            self._share_probe(state)
        if state.config.rejuvenation_utility == "gradient" and self._sees_utility(state):
            state.observe_utility()
        if self._watched:
            layer.gradient_norm = norm_of_part(local(gradient), gradient)
        in_parts = not self._reads_all(state)
        if is_sharded(weight) and not in_parts:
            self._own_gradient(bound)
        with nullcontext() if in_parts else whole(state):
            is_unscaled = self._change_factors(bound, layer)
            multiplier = self._multiplier(bound, layer, done_in_graph=not is_unscaled)
            if bound.way is Way.UPDATE and state.gradient_level != 1:
                multiplier = self._level_update(bound, multiplier)
            if bound.way is Way.GRADIENT and may_move_without_gradient(optimizer, weight):
                stepped.frozen = _frozen(state, weight)
        changing = partial(self._changing_gradient, bound)
        multiplier = self._holding.change(bound, layer.counts, changing, multiplier, in_graph=not is_unscaled)
        scales_update = multiplier is not None and bound.way is Way.UPDATE
        compares = scales_update or stepped.frozen is not None or self._holding.follows(state)
        if compares or self._watched or bound.is_exponentiated:
            copy = partial(self._memory.copy_of, ("weight", state.path))
            stepped.before = remember(optimizer, bound.group, weight, copy)
        if scales_update:
            stepped.multiplier = multiplier
        elif multiplier is not None:
            found, scaled = self._changing_gradient(bound)
            torch.mul(found, local_part(multiplier, weight).to(found.dtype), out=scaled)

    def _share_probe(self, state: BioModule) -> None:
        """Let ranks agree on the gradient of missing connections, as the graph gives it to one process."""
        sum_probe(state, self._ranks)
        state.unscale_probe()
        probe = state.connection_probe
        if self._ranks is not None and probe is not None and probe.grad is not None:
            with whole(state, factors=False):
                state.project_probe()

    def _own_gradient(self, bound: Bound) -> Tensor:
        """Give a weight a copy of its gradient, which may be changed until the step is over."""
        found, own = self._changing_gradient(bound)
        if own is not found:
            own.copy_(found)
        return cast(Tensor, bound.weight.grad)

    def _changing_gradient(self, bound: Bound) -> tuple[Tensor, Tensor]:
        """Return this rank's part of a gradient, and of one in its place, to which all has to be written.

        Both are the same tensor where the weight has a gradient that may be changed already.
        """
        weight = bound.weight
        gradient: Any = weight.grad
        if any(known is weight for known, _, _ in self._gradients):
            return local(gradient), local(gradient)
        key, is_dense = ("gradient", bound.state.path), gradient.layout is torch.strided
        own = self._memory.like(key, gradient) if is_dense else self._memory.copy_of(key, gradient)
        self._gradients.append((weight, gradient, own))
        weight.grad = own
        return local(gradient.detach() if is_dense else own), local(own)

    def _sees_utility(self, state: BioModule) -> bool:
        """Whether the running mean by which weights are judged takes this step's gradient."""
        rule, config = "rejuvenate_weights", state.config
        if config.rejuvenation_utility_decay == 0 and self._schedule.has(rule, state):
            return self._is_due(rule, state)  # no other gradient matters
        return self._number % config.rejuvenation_utility_every == 0

    def _reads_all(self, state: BioModule) -> bool:
        """Whether a rule that is due before this step needs all of a sharded weight or gradient."""
        follows = state.is_dynamic and not state.follows_in_parts
        dampens = self._is_due("crystallize", state) and not state.crystallizes_in_parts
        volume = "volume_dependent_lr"
        return follows or dampens or (self._is_due(volume, state) and not state.acts_in_parts(volume))

    def _change_factors(self, bound: Bound, layer: LayerStep) -> bool:
        """Run the rules that change factors; return whether the gradient is now without factors.

        Where the graph has scaled the gradient, it did so with the earlier factors.
        """
        state, update = bound.state, "update_fuzzy_learning_rates"
        names = ["crystallize"] if self._is_due("crystallize", state) else []
        if state.is_dynamic and (self._is_due(update, state) or not self._schedule.has(update, state)):
            names.append(update)
        able = [name for name in names if state.why_not(name) is None]
        dampened = state.memory.dampening is not None
        needed = state.scaled_in_graph and (able or bound.way is Way.UPDATE or dampened)
        factors = state.fuzzy_learning_rate_parameters if needed else None
        used = factors.clone() if factors is not None and able else factors
        if update in able:
            average_activity(state, self._ranks)
        for name in able:
            layer.run(name)
        if state.scaled_in_graph and used is not None:
            self._own_gradient(bound)
            state.unscale_gradient(used)
        return not state.scaled_in_graph or used is not None

    def _multiplier(self, bound: Bound, layer: LayerStep, *, done_in_graph: bool) -> Tensor | None:
        """Return what gradient or update is to be multiplied by, None for nothing."""
        state = bound.state
        factors = None if done_in_graph else state.acting_factors
        if state.only_held or not self._is_due("volume_dependent_lr", state):
            return factors
        volume = state.volume_factors()
        layer.counts["volume_dependent_lr"] = state.weight.numel()
        if factors is None:
            return volume
        return volume.mul_(local_part(factors, state.weight).to(volume.dtype))

    def _level_update(self, bound: Bound, multiplier: Tensor | None) -> Tensor:
        """Take what the graph divides a gradient by out of it, and into what the update is multiplied by."""
        level = bound.state.gradient_level
        local(self._own_gradient(bound)).div_(level)
        if multiplier is None:
            return torch.full((), level, device=local(bound.weight).device)
        return multiplier * level

    def _finish(self, optimizer: Optimizer, stepped: _Weight) -> None:
        bound, layer, before = stepped.bound, stepped.layer, stepped.before
        weight = bound.weight if before is None else local(bound.weight)
        if before is not None:
            if stepped.multiplier is not None:
                rescale(before, optimizer, bound.weight, stepped.multiplier, decay=bound.decay)
            if stepped.frozen is not None:
                weight.copy_(torch.where(stepped.frozen, before.weight, weight))
            if bound.is_exponentiated:
                signs = layer.state.signs().expand(bound.weight.shape)
                exponentiate(weight, before.weight, local_part(signs, bound.weight))
            if self._watched:
                layer.update_norm = norm_of_part(weight - before.weight, bound.weight)
        if layer.state.is_constrained:
            layer.run("enforce_dales_principle")
        if before is not None:
            self._holding.finish(layer.state, before.weight, weight)
            stepped.before = stepped.multiplier = stepped.frozen = None

    def _turn_over_units(self, optimizer: Optimizer) -> None:
        """Run the rule that gathers what it needs of sharded weights itself, and only where units go."""
        runs = {}
        for path, bound in self._stepped.items():
            state, turnover = bound.state, bound.state.turnover
            acts = isinstance(turnover, UnitTurnover) and self._is_due("rejuvenate_units", state)
            if acts and turnover.why_never(state) is None:
                runs[path] = unit_run_of(state)
        counts = turn_over_units([*runs.values()], optimizer, is_shared=self._ranks is not None)
        for path, replaced in zip(runs, counts, strict=True):
            self.layers[path].counts["rejuvenate_units"] = replaced

    def _run_on_weights(self, name: str, optimizer: Optimizer) -> None:
        layers = [layer for layer in self.layers.values() if self._is_due(name, layer.state)]
        able = [layer for layer in layers if layer.state.why_not(name) is None]
        in_parts = {id(layer): layer.state.acts_in_parts(name) for layer in able}
        for layer in able:
            with nullcontext() if in_parts[id(layer)] else whole(layer.state, factors=False):
                layer.state.check(name)
        factors = name != "synaptic_scaling"
        for layer in able:
            with nullcontext() if in_parts[id(layer)] else whole(layer.state, optimizer, factors=factors):
                layer.run(name, *[optimizer] if name == "rejuvenate_weights" else [])


def _frozen(state: BioModule, weight: Tensor) -> Tensor | None:
    """Return where the factors are 0 in this rank's part of a weight, None for nowhere."""
    if state.is_drawn or not state.has_factors:
        return None
    factors: Any = state.fuzzy_learning_rate_parameters
    if not state.has_zeros(local(factors)):
        return None
    return (local_part(factors, weight) == 0).expand_as(local(weight.detach()))
