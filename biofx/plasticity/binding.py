"""Which of a model's weights an optimizer steps, and what factors multiply there: gradients or updates.

Both are looked up at each step. A factor on the gradient may not survive the optimizer's step, which trial
runs find out.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from biofx.errors import PlasticityError
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.optimizer_trial import (
    FACTORS,
    ROWS,
    Kind,
    Run,
    Trial,
    describe_kinds,
    is_like,
    iterates_of,
    kinds_of,
    same,
)
from biofx.plasticity.optimizers import decoupled_decay, has_decay, refuse_closures, remedy, signature
from biofx.plasticity.updates import Way, refuse_decay

_HOLDERS: Any = WeakIdKeyDictionary()  # of each weight that is attached, a weak reference to its binding
_TOLERANCE = 0.01


@dataclass
class Bound:
    """A weight that an optimizer is about to step."""

    state: BioModule
    weight: nn.Parameter
    group: Mapping[str, Any]
    way: Way
    decay: float
    """The fraction of the weight that decays whatever its factors."""
    is_exponentiated: bool
    """Whether its update is multiplicative."""


_Held: TypeAlias = dict[str, tuple[nn.Parameter, dict[str, Any]]]
"""Weights that an optimizer holds, with their groups, by path."""
_ByGroup: TypeAlias = list[tuple[dict[str, Any], list[BioModule]]]
"""The groups of these, with the states of the weights in each."""


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
        always_scales: bool,
    ) -> None:
        self.states = dict(states)
        self.free_decay = free_decay
        self.exponentiated = exponentiated
        self.always_scales = always_scales
        self._weights: dict[str, nn.Parameter] = {}
        self._known: tuple[list[int], _Held, _ByGroup] = [], {}, []
        self._last: tuple[_Held, list[tuple[Way, float]], list[str], dict[str, Bound]] | None = None
        self._ways: dict[Hashable, Way] = {}
        self._counters: frozenset[str] = frozenset()

    def bind(self, optimizer: Optimizer) -> dict[str, Bound]:
        """Return the weights that an optimizer holds now, by path, with its current options.

        Raises:
            PlasticityError: a weight has been replaced, or is attached to another optimizer; or factors
                cannot act under the optimizer's options. Nothing has been changed.
        """
        held, of_group = self._held(optimizer)
        scaled = []
        for group, states in of_group:
            decay = decoupled_decay(optimizer, group) if self.free_decay else 0.0
            scaled.append((self._way(optimizer, group, states), decay))
        exponentiated = [path for path in held if self.exponentiated and self.states[path].is_constrained]
        for path in exponentiated:
            refuse_decay(path, held[path][1])
        last = self._last
        if last is None or last[0] is not held or last[1:3] != (scaled, exponentiated):
            found = {id(group): each for (group, _), each in zip(of_group, scaled, strict=True)}
            bound = {
                path: Bound(self.states[path], weight, group, *found[id(group)], path in exponentiated)
                for path, (weight, group) in held.items()
            }
            last = self._last = held, scaled, exponentiated, bound
        for path, (weight, _) in held.items() if len(held) != len(self._weights) else ():
            if path not in self._weights:
                self._weights[path] = weight
                _HOLDERS[weight] = weakref.ref(self)
        return last[3]

    def left_alone(self, optimizer: Optimizer) -> dict[str, str]:
        """Return the weights that the optimizer does not step now, with the reason, by path."""
        held = {id(weight) for weight, _ in self._held(optimizer)[0].values()}
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
        self.states, self._weights, self._known, self._last = {}, {}, ([], {}, []), None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_known", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._known, self._last = ([], {}, []), None
        for weight in self._weights.values():
            _HOLDERS[weight] = weakref.ref(self)

    def _held(self, optimizer: Optimizer) -> tuple[_Held, _ByGroup]:
        """Return the model's weights that the optimizer holds, and their states by group."""
        present = [*map(id, optimizer.param_groups)]
        for group in optimizer.param_groups:
            params = group["params"]
            present.append(len(params))
            present += map(id, params)
        present += [id(state.parameter) for state in self.states.values()]
        if present != self._known[0] or not self._weights:
            held = self._find(optimizer)
            of_group: dict[int, tuple[dict[str, Any], list[BioModule]]] = {}
            for path, (_, group) in held.items():
                of_group.setdefault(id(group), (group, []))[1].append(self.states[path])
            self._known = present, held, [*of_group.values()]
        return self._known[1:]

    def _find(self, optimizer: Optimizer) -> _Held:
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
        multiplied = [state.gradient_level != 1 or state.has_rates for state in states]
        if not self.always_scales and True not in multiplied:
            return Way.UPDATE  # so a trial is not needed
        levelled = any(state.gradient_level != 1 for state in states)
        in_graph = levelled or any(state.scaled_in_graph for state in states)
        kinds = kinds_of(state.weight for state in states)
        key = signature(group, self._counters), kinds, in_graph
        if key not in self._ways:
            way, counters = find_way(optimizer, group, kinds, self._counters, scaled_in_graph=in_graph)
            self._counters |= counters
            key = signature(group, self._counters), kinds, in_graph
            self._ways[key] = way
        return self._ways[key]


def is_attached(weight: Tensor) -> bool:
    """Whether an attachment acts on a weight."""
    holder = _HOLDERS.get(weight)
    return holder is not None and holder() is not None


def erases_factors(optimizer: Optimizer, group: Mapping[str, Any], weights: Sequence[Tensor]) -> bool:
    """Return whether weights do not move in proportion to factors on their gradients, as trial steps find.

    Weight decay is left out of it. False where no trial is possible.

    Args:
        optimizer: not changed.
        group: the parameter group whose options hold.
        weights: of the group.
    """
    try:
        refuse_closures(optimizer)
        trial = Trial(optimizer, group, kinds_of(weights), frozenset())
        plain = trial.run_plainly()
        return not _is_in_proportion(trial.run(Way.GRADIENT), plain)
    except Exception:
        return False


def find_way(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    kinds: Sequence[Kind],
    known: frozenset[str] = frozenset(),
    *,
    scaled_in_graph: bool = False,
) -> tuple[Way, frozenset[str]]:
    """Return what factors have to multiply so that weights move in proportion to them.

    Small parameters take 30 or more steps of the optimizer's own rule, with another factor for each row:
    first without factors, then with the gradient scaled, and then, unless weights and the optimizer's state
    were in proportion, with the updates scaled. A factor of 0 has to freeze a row to the bit.

    Args:
        optimizer: not changed; a copy without state takes the steps.
        group: the parameter group whose options hold. Its learning rate is replaced by a small one, and
            weight decay by 0: with decay, scaled gradients would not suffice.
        kinds: of the weights that are to be scaled.
        known: options that earlier trials have found the optimizer to change itself.
        scaled_in_graph: whether gradients come multiplied by the factors, which have to be divided out where
            updates are scaled.

    Returns:
        The way, and the names of the options that the optimizer changes at its steps.

    Raises:
        PlasticityError: neither works, or the step cannot be tried: it needs a closure, fails, or runs no
            hooks.
    """
    refuse_closures(optimizer)
    try:
        trial = Trial(optimizer, group, kinds, known)
        plain = trial.run_plainly()
        if not has_decay(group):
            scaled = trial.run(Way.GRADIENT)
            if _is_in_proportion(scaled, plain) and _is_linear(scaled, plain):
                return Way.GRADIENT, trial.counters
        if _is_in_proportion(trial.run(Way.UPDATE, scaled_in_graph=scaled_in_graph), plain):
            return Way.UPDATE, trial.counters
        if scaled_in_graph and _is_in_proportion(trial.run(Way.UPDATE), plain):
            raise PlasticityError(
                f"{trial.name} amplifies rounding errors, and so those of factors that the graph multiplies "
                "a gradient by and that are divided out again; convert the model with BioConverter, which "
                "leaves gradients as they are, or use another optimizer"
            )
        raise PlasticityError(
            f"under {trial.name} weights do not move in proportion to a factor, neither on the gradient nor "
            "on the update: its steps depend on positions of weights that it keeps, or on how far they have "
            f"moved{remedy(optimizer)}"
        )
    except PlasticityError:
        raise
    except Exception as error:
        raise PlasticityError(
            f"{type(optimizer).__name__} cannot be tried on small weights of {describe_kinds(kinds)}: "
            f"{type(error).__name__}: {error}{remedy(optimizer)}"
        ) from error


def _is_in_proportion(scaled: Run, plain: Run) -> bool:
    """Whether every iterate has moved by its factor times as far as without one.

    Options that the optimizer estimates itself, as a learning rate, have to come out the same.
    """
    if not all(_are_close(scaled.options.get(name), plain.options[name]) for name in plain.changed):
        return False
    moves, references = scaled.moved(), plain.moved()
    return len(moves) == len(references) and all(map(_are_multiples, moves, references))


def _are_close(value: Any, other: Any) -> bool:
    numbers = (bool, int, float)
    if not isinstance(value, numbers) or not isinstance(other, numbers):
        return True
    return math.isclose(value, other, rel_tol=_TOLERANCE) or value == other


def _are_multiples(rows: Tensor, references: Tensor) -> bool:
    for number, (row, reference) in enumerate(zip(rows, references, strict=True)):
        factor = FACTORS[number // (ROWS // len(FACTORS))]
        expected = factor * reference
        if factor == 0:
            if row.count_nonzero():
                return False
        elif not (row - expected).norm() <= _TOLERANCE * expected.norm():
            return False
    return True


def _is_linear(scaled: Run, plain: Run) -> bool:
    """Whether the optimizer's state is in proportion to the gradients as well, or the same without factors.

    State that is neither acts sooner or later: second moments after a warm-up, statistics at their next use.
    """
    if not all(same(value, plain.options.get(name)) for name, value in scaled.options.items()):
        return False
    for start, state, other in zip(scaled.starts, scaled.states, plain.states, strict=True):
        iterates = iterates_of(other, start)
        for name, value in state.items():
            if name in iterates or same(value, other.get(name)):
                continue
            if not is_like(value, start):
                return False
            if not _are_multiples(value.reshape(ROWS, -1), other[name].reshape(ROWS, -1)):
                return False
    return True
