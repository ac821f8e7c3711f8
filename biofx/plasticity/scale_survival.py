"""How a factor reaches the weights that an optimizer steps, found out by trying."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.plasticity.optimizer_options import has_decay, without_decay
from biofx.plasticity.optimizer_wrappers import inner_optimizer
from biofx.plasticity.trial_optimizer import ROWS, Kind, small_parameters, trial_of
from biofx.plasticity.update_scaling import remember, rescale

_STEPS, _MORE, _MOST = 40, 10, 200
_SCALES = (1.0, 0.1, 10.0)  # of the gradients, in turn: what clips or normalises shows
_RATES = (
    1e-3,
    1e-1,
    1.0,
    10.0,
)  # the first at which weights move visibly; the less, the less depends on them
_LEAST_MOVED = 1e-3  # relative to the weights; less drowns in rounding
_FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0)
_TOLERANCE = 0.01
_LIKENESS = 0.7  # cosine, from which on a tensor is another iterate of the weight


class Way(Enum):
    """What factors multiply."""

    GRADIENT = "gradient"
    UPDATE = "update"


@dataclass
class _Run:
    """Where small parameters began and ended, and what the optimizer remembers then."""

    starts: list[Tensor]
    ends: list[Tensor]
    states: list[dict[str, Any]]
    options: dict[str, Any]
    changed: frozenset[str]

    def distances(self) -> list[float]:
        """Return how far each parameter has moved, relative to its size."""
        pairs = zip(self.starts, self.ends, strict=True)
        return [float((end - start).norm() / start.norm()) for start, end in pairs]

    def moved(self) -> list[Tensor]:
        """Return how far every iterate of every parameter has moved, one row per factor."""
        return [
            (place - start).reshape(ROWS, -1)
            for start, end, state in zip(self.starts, self.ends, self.states, strict=True)
            for place in (end, *_iterates(state, start).values())
        ]


@dataclass
class Found:
    """What a trial has shown of an optimizer and one of its groups."""

    way: Way
    counters: frozenset[str]
    """The options of a group that the optimizer itself changes as it goes."""


def find_way(
    optimizer: Optimizer, group: Mapping[str, Any], kinds: Sequence[Kind], known: frozenset[str] = frozenset()
) -> Found:
    """Return what factors have to multiply so that weights move in proportion to them.

    Small parameters take 40 or more steps of the optimizer's own rule, with another factor for each row:
    first without factors, then with the gradient scaled, and then, unless that is the same for all that the
    optimizer remembers too, with the updates scaled. A factor of 0 has to freeze a row to the bit.

    Args:
        optimizer: not changed; a copy without state takes the steps.
        group: the parameter group whose options hold. Its learning rate is set to a small one, and weight
            decay to 0: where there is any, gradients alone would not do.
        kinds: of the weights that are to be scaled.
        known: options that earlier trials have found the optimizer to change itself.

    Raises:
        PlasticityError: neither way does, or the step cannot be tried: it needs a closure, fails, or runs no
            hooks.
    """
    refuse_closures(optimizer)
    try:
        trial = _Trial(optimizer, group, kinds, known)
        plain = _first_run(trial)
        if not has_decay(group):
            scaled = trial.run(Way.GRADIENT)
            if _is_in_proportion(scaled, plain) and _is_linear(scaled, plain):
                return Found(Way.GRADIENT, trial.counters)
        scaled = trial.run(Way.UPDATE)
        if not _is_in_proportion(scaled, plain):
            raise PlasticityError(
                f"under {trial.name} weights do not move in proportion to a factor, neither on the gradient "
                "nor on the update: its steps go by positions of weights that it keeps, or by how far they "
                "have moved"
                f"{_remedy(optimizer)}"
            )
        return Found(Way.UPDATE, trial.counters)
    except PlasticityError:
        raise
    except Exception as error:
        raise PlasticityError(
            f"{type(optimizer).__name__} cannot be tried on small weights of {_told(kinds)}: "
            f"{type(error).__name__}: {error}{_remedy(optimizer)}"
        ) from error


def refuse_closures(optimizer: Optimizer) -> None:
    """Refuse optimizers that call the model several times a step.

    Raises:
        PlasticityError: the optimizer's step cannot do without a closure (LBFGS).
    """
    closure = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlasticityError(
            f"{type(optimizer).__name__} searches along a line and evaluates the model several times a "
            "step, so no update belongs to one gradient and factors have no meaning; use another optimizer"
        )


def _remedy(optimizer: Optimizer) -> str:
    inner = inner_optimizer(optimizer)
    if inner is not None:
        return (
            f"; attach to optimizer.{inner[0]}, the {type(inner[1]).__name__} inside it, if that alone "
            "changes weights"
        )
    return "; use another optimizer, as AdamW or SGD"


def _first_run(trial: _Trial) -> _Run:
    try:
        return trial.run_visibly()
    except PlasticityError:
        raise
    except Exception:
        trial.is_sparse = True  # as the gradients of embeddings can be, which some optimizers insist on
        with suppress(Exception):
            return trial.run_visibly()
        raise


class _Trial:
    """Small parameters that a copy of an optimizer steps."""

    def __init__(
        self, optimizer: Optimizer, group: Mapping[str, Any], kinds: Sequence[Kind], known: frozenset[str]
    ) -> None:
        self.name = type(optimizer).__name__
        self.counters = known
        self.is_sparse = False
        self._optimizer, self._group, self._kinds = optimizer, group, kinds
        self._rate = _RATES[0]
        counts = [value for value in group.values() if type(value) is int and value <= _MOST]
        self._steps = max(_STEPS, _MORE + max(counts, default=0))  # past what is done every so many steps

    def run_visibly(self) -> _Run:
        """Run without factors, with a learning rate at which weights move visibly."""
        run = None
        for rate in _RATES:
            self._rate, last = rate, run
            run = self.run()
            if not run.changed <= self.counters:  # options may have been in the middle of something
                self.counters |= run.changed
                run = self.run()
            if not all(math.isfinite(distance) for distance in run.distances()) and last is not None:
                run, self._rate = last, _RATES[_RATES.index(rate) - 1]
                break
            if min(run.distances()) >= _LEAST_MOVED:
                break
        distances = [] if run is None else run.distances()
        if run is None or not all(0 < distance < math.inf for distance in distances):
            raise PlasticityError(
                f"{self.name} moved small weights of {_told(self._kinds)} by {distances}, relative to their "
                f"size; expected finite steps, to see whether a factor acts{_remedy(self._optimizer)}"
            )
        return run

    def run(self, way: Way | None = None) -> _Run:
        """Take the steps, and multiply what is asked for, if anything, by the factors."""
        generator = torch.Generator().manual_seed(0)
        parameters = small_parameters(self._kinds, generator)
        starts = [parameter.detach().clone() for parameter in parameters]
        options, left_out = self._options()
        trial = trial_of(self._optimizer, self._group, parameters, options, left_out)
        (group,) = trial.param_groups
        before = dict(group)
        drifts = [torch.randn(parameter.shape[1:], generator=generator).sign() for parameter in parameters]
        factors = torch.tensor(_FACTORS).repeat_interleave(ROWS // len(_FACTORS))
        hooked: list[str] = []
        trial.register_step_pre_hook(lambda *_: hooked.append("before"))
        trial.register_step_post_hook(lambda *_: hooked.append("after"))
        cuda = [parameter.device for parameter in parameters if parameter.device.type == "cuda"]
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            for number in range(self._steps):
                befores = []
                for parameter, drift in zip(parameters, drifts, strict=True):
                    shaped = factors.reshape(-1, *[1] * drift.dim()).to(parameter.device)
                    noise = torch.randn(parameter.shape, generator=generator)
                    gradient = (noise + drift) * _SCALES[number % len(_SCALES)]
                    gradient = gradient.to(parameter.device, parameter.dtype)
                    gradient = gradient * shaped if way is Way.GRADIENT else gradient
                    parameter.grad = gradient.to_sparse(1) if self.is_sparse else gradient
                    befores.append((remember(trial, group, parameter), shaped))
                trial.step()
                for parameter, (earlier, shaped) in zip(parameters, befores, strict=True):
                    if way is Way.UPDATE:
                        rescale(earlier, trial, parameter, shaped)
        if min(hooked.count("before"), hooked.count("after")) < self._steps:
            raise PlasticityError(
                f"{self.name} takes steps without running its step hooks, which attach lives on"
                f"{_remedy(self._optimizer)}"
            )
        return _Run(
            starts,
            [parameter.detach().clone() for parameter in parameters],
            [dict(trial.state.get(parameter, {})) for parameter in parameters],
            {name: value for name, value in group.items() if name != "params"},
            frozenset(name for name in group if name not in before or not _same(group[name], before[name])),
        )

    def _options(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Return the options that the trial begins with, and the names of those that it begins without."""
        begun = {name: value for name, value in self._optimizer.defaults.items() if name in self.counters}
        options = {**without_decay(self._group), **begun}
        if "train_mode" in options:  # of schedule-free ones, which step in no other
            options["train_mode"] = True
        if (rate := options.get("lr")) is not None:
            options["lr"] = torch.full_like(rate, self._rate) if isinstance(rate, Tensor) else self._rate
        return options, self.counters - begun.keys()


def _iterates(state: Mapping[str, Any], start: Tensor) -> dict[str, Tensor]:
    """Return what an optimizer keeps that lies where the weight lies: a mean, a sequence, a copy."""
    found = {}
    for name, value in state.items():
        if _is_like(value, start):
            pair = (value.real.flatten(), start.real.flatten())
            if float(torch.nn.functional.cosine_similarity(*pair, 0)) > _LIKENESS:
                found[name] = value
    return found


def _is_in_proportion(scaled: _Run, plain: _Run) -> bool:
    """Whether every iterate has moved by its factor times what it has without one."""
    moves, references = scaled.moved(), plain.moved()
    return len(moves) == len(references) and all(map(_are_multiples, moves, references))


def _are_multiples(rows: Tensor, references: Tensor) -> bool:
    for number, (row, reference) in enumerate(zip(rows, references, strict=True)):
        factor = _FACTORS[number // (ROWS // len(_FACTORS))]
        expected = factor * reference
        if factor == 0:
            if row.count_nonzero():
                return False
        elif not (row - expected).norm() <= _TOLERANCE * expected.norm():
            return False
    return True


def _is_linear(scaled: _Run, plain: _Run) -> bool:
    """Whether what is remembered is in proportion to the gradients as well, or the same without factors.

    What is not, acts sooner or later: second moments after a warm-up, statistics when they are used next.
    """
    if not all(_same(value, plain.options.get(name)) for name, value in scaled.options.items()):
        return False
    for start, state, other in zip(scaled.starts, scaled.states, plain.states, strict=True):
        iterates = _iterates(other, start)
        for name, value in state.items():
            if name in iterates or _same(value, other.get(name)):
                continue
            if not _is_like(value, start):
                return False
            if not _are_multiples(value.reshape(ROWS, -1), other[name].reshape(ROWS, -1)):
                return False
    return True


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == parameter.dtype


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, tuple | list):
        return isinstance(other, tuple | list) and all(map(_same, value, other)) and len(value) == len(other)
    return value is other or (isinstance(value, bool | int | float | str) and bool(value == other))


def _told(kinds: Sequence[Kind]) -> str:
    axes = sorted({axes for axes, _, _ in kinds})
    return f"{' or '.join(map(str, axes))} {'axis' if axes == [1] else 'axes'}"
