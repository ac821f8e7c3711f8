"""Which of a model's weights an optimizer steps, and how factors reach them: looked up at each step."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from biofx.errors import PlasticityError
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.optimizer_trial import kinds_of
from biofx.plasticity.optimizers import decoupled_decay, signature
from biofx.plasticity.scale_survival import find_way
from biofx.plasticity.updates import Way, refuse_decay

_HOLDERS: Any = WeakIdKeyDictionary()  # of each weight that is attached, a weak reference to its binding


@dataclass
class Bound:
    """A weight that an optimizer is about to step."""

    state: BioModule
    weight: nn.Parameter
    group: Mapping[str, Any]
    way: Way
    decay: float
    """The fraction of the weight that decays whatever its factors."""


class Binding:
    """The weights of a model that an optimizer steps.

    Args:
        states: plasticity of the model's weights, by path.
        free_decay: whether decoupled weight decay acts in full, whatever the factors.
        exponentiated: whether updates of constrained weights are multiplicative, which excludes decay.
        always_scales: whether a rule multiplies rates of weights that have no factors.
    """

    def __init__(
        self,
        states: Mapping[str, BioModule],
        *,
        free_decay: bool,
        exponentiated: bool,
        always_scales: bool = False,
    ) -> None:
        self.states = dict(states)
        self.free_decay = free_decay
        self.exponentiated = exponentiated
        self.always_scales = always_scales
        self._weights: dict[str, nn.Parameter] = {}
        self._ways: dict[Hashable, Way] = {}
        self._counters: frozenset[str] = frozenset()

    def bind(self, optimizer: Optimizer) -> dict[str, Bound]:
        """Return the weights that an optimizer holds now, by path, with its current options.

        Raises:
            PlasticityError: a weight has been replaced, or is attached to another optimizer; or factors
                cannot act under the optimizer's options. Nothing has been changed.
        """
        held = self._held(optimizer)
        of_group: dict[int, list[BioModule]] = {}
        for path, (_, group) in held.items():
            of_group.setdefault(id(group), []).append(self.states[path])
        found: dict[int, tuple[Way, float]] = {}
        bound: dict[str, Bound] = {}
        for path, (weight, group) in held.items():
            if id(group) not in found:
                way = self._way(optimizer, group, of_group[id(group)])
                found[id(group)] = way, decoupled_decay(optimizer, group) if self.free_decay else 0.0
            state = self.states[path]
            if self.exponentiated and state.is_constrained:
                refuse_decay(path, group)
            bound[path] = Bound(state, weight, group, *found[id(group)])
        for path, (weight, _) in held.items():
            if path not in self._weights:
                self._weights[path] = weight
                _HOLDERS[weight] = weakref.ref(self)
        return bound

    def left_alone(self, optimizer: Optimizer) -> dict[str, str]:
        """Return the weights that the optimizer does not step now, with the reason, by path."""
        held = {id(weight) for weight, _ in self._held(optimizer).values()}
        reasons = {}
        for path, state in self.states.items():
            weight = state.parameter
            if weight is None:
                reasons[path] = "it is computed by a parametrization"
            elif id(weight) not in held:
                reasons[path] = "the optimizer does not hold it"
            elif not weight.requires_grad:
                reasons[path] = "it is frozen"
        return reasons

    def release(self) -> None:
        """Allow other optimizers to be attached to the weights."""
        for weight in self._weights.values():
            _HOLDERS.pop(weight, None)
        self.states, self._weights = {}, {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for weight in self._weights.values():
            _HOLDERS[weight] = weakref.ref(self)

    def _held(self, optimizer: Optimizer) -> dict[str, tuple[nn.Parameter, dict[str, Any]]]:
        """Return the model's weights that the optimizer holds, with their groups, by path."""
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        held = {}
        for path, state in self.states.items():
            weight, known = state.parameter, self._weights.get(path)
            if known is not None and weight is not known:
                raise PlasticityError(
                    f"{path!r} is another parameter than the one that the optimizer was given; detach(), "
                    "build the optimizer from bio_model.parameters() and attach again"
                )
            group = None if weight is None else group_of.get(id(weight))
            if weight is None or group is None:
                continue
            holder = _HOLDERS.get(weight)
            if holder is not None and holder() not in (None, self):
                raise PlasticityError(
                    f"{path!r} is attached to an optimizer already; detach() that one first"
                )
            held[path] = weight, group
        return held

    def _way(self, optimizer: Optimizer, group: Mapping[str, Any], states: list[BioModule]) -> Way:
        if not self.always_scales and not any(state.has_rates for state in states):
            return Way.UPDATE  # nothing is multiplied, so a trial is not needed
        in_graph = any(state.scaled_in_graph for state in states)
        kinds = kinds_of(state.weight for state in states)
        key = signature(group, self._counters), kinds, in_graph
        if key not in self._ways:
            way, counters = find_way(optimizer, group, kinds, self._counters, scaled_in_graph=in_graph)
            self._counters |= counters
            key = signature(group, self._counters), kinds, in_graph
            self._ways[key] = way
        return self._ways[key]
