"""Small parameters that take steps of an optimizer's own rule, with and without factors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.plasticity.optimizer_options import without_decay
from biofx.plasticity.optimizer_wrappers import inner_optimizer
from biofx.plasticity.trial_optimizer import ROWS, Kind, small_parameters, trial_of
from biofx.plasticity.update_scaling import Way, remember, rescale

FACTORS = (0.0, 0.3, 0.6, 1.0, 1.7)
"""Of the rows of each parameter, as many rows to each."""
_STEPS, _MORE, _MOST = 30, 10, 200
_SCALES = (1.0, 0.1, 10.0)  # of the gradients, in turn: what clips or normalises shows
_RATES = (
    1e-3,
    1e-1,
    1.0,
    10.0,
)  # the first at which weights move visibly; the less, the less depends on them
_LEAST_MOVED = 1e-3  # relative to the weights; less drowns in rounding
_LIKENESS = 0.7  # cosine, from which on a tensor is another iterate of the weight


@dataclass
class Run:
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
            for place in (end, *iterates_of(state, start).values())
        ]


class Trial:
    """Small parameters that a copy of an optimizer steps."""

    def __init__(
        self, optimizer: Optimizer, group: Mapping[str, Any], kinds: Sequence[Kind], known: frozenset[str]
    ) -> None:
        self.name = type(optimizer).__name__
        self.counters = known
        self._is_sparse = False
        self._optimizer, self._group, self._kinds = optimizer, group, kinds
        self._rate = _RATES[0]
        counts = [value for value in group.values() if type(value) is int and value <= _MOST]
        self._steps = max(_STEPS, _MORE + max(counts, default=0))  # past what is done every so many steps

    def run_plainly(self) -> Run:
        """Run without factors, with a learning rate at which weights move visibly."""
        try:
            return self._run_visibly()
        except PlasticityError:
            raise
        except Exception:
            self._is_sparse = True  # as the gradients of embeddings can be, which some optimizers insist on
            run: Run | None = None
            with suppress(Exception):
                run = self._run_visibly()
            if run is None:
                raise
            return run

    def _run_visibly(self) -> Run:
        run: Run | None = None
        for rate in _RATES:
            self._rate, last = rate, run
            run = self.run()
            in_the_middle = any(self._has_gone_on(name) for name in run.changed - self.counters)
            self.counters |= run.changed
            if in_the_middle:
                run = self.run()
            if not all(math.isfinite(distance) for distance in run.distances()) and last is not None:
                run, self._rate = last, _RATES[_RATES.index(rate) - 1]
                break
            if min(run.distances()) >= _LEAST_MOVED:
                break
        distances = [] if run is None else run.distances()
        if run is None or not all(0 < distance < math.inf for distance in distances):
            raise PlasticityError(
                f"{self.name} moved small weights of {told(self._kinds)} by {distances}, relative to their "
                f"size; expected finite steps, to see whether a factor acts{remedy(self._optimizer)}"
            )
        return run

    def run(self, way: Way | None = None, *, scaled_in_graph: bool = False) -> Run:
        """Take the steps, and multiply what is asked for, if anything, by the factors.

        Args:
            way: what to multiply.
            scaled_in_graph: whether the gradients of the updates that are multiplied have had the factors
                multiplied in, and divided out again, but for those of 0.
        """
        generator = torch.Generator().manual_seed(0)
        parameters = small_parameters(self._kinds, generator)
        starts = [parameter.detach().clone() for parameter in parameters]
        options, left_out = self._options()
        trial = trial_of(self._optimizer, self._group, parameters, options, left_out)
        (group,) = trial.param_groups
        before = dict(group)
        drifts = [torch.randn(parameter.shape[1:], generator=generator).sign() for parameter in parameters]
        factors = torch.tensor(FACTORS).repeat_interleave(ROWS // len(FACTORS))
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
                    if way is Way.GRADIENT:
                        gradient = gradient * shaped
                    elif scaled_in_graph:
                        gradient = torch.where(shaped > 0, gradient * shaped / shaped, gradient)
                    parameter.grad = gradient.to_sparse(1) if self._is_sparse else gradient
                    befores.append((remember(trial, group, parameter), shaped))
                trial.step()
                for parameter, (earlier, shaped) in zip(parameters, befores, strict=True):
                    if way is Way.UPDATE:
                        rescale(earlier, trial, parameter, shaped)
        if min(hooked.count("before"), hooked.count("after")) < self._steps:
            raise PlasticityError(
                f"{self.name} takes steps without running its step hooks, which attach lives on"
                f"{remedy(self._optimizer)}"
            )
        return Run(
            starts,
            [parameter.detach().clone() for parameter in parameters],
            [dict(trial.state.get(parameter, {})) for parameter in parameters],
            {name: value for name, value in group.items() if name != "params"},
            frozenset(name for name in group if name not in before or not same(group[name], before[name])),
        )

    def _has_gone_on(self, name: str) -> bool:
        """Whether an option is no longer what it began with, because the optimizer has changed it."""
        defaults = self._optimizer.defaults
        return name in self._group and not (name in defaults and same(self._group[name], defaults[name]))

    def _options(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Return the options that the trial begins with, and the names of those that it begins without."""
        begun = {name: value for name, value in self._optimizer.defaults.items() if name in self.counters}
        options = {**without_decay(self._group), **begun}
        if "train_mode" in options:  # of schedule-free ones, which step in no other
            options["train_mode"] = True
        if (rate := options.get("lr")) is not None:
            options["lr"] = torch.full_like(rate, self._rate) if isinstance(rate, Tensor) else self._rate
        return options, self.counters - begun.keys()


def iterates_of(state: Mapping[str, Any], start: Tensor) -> dict[str, Tensor]:
    """Return what an optimizer keeps that lies where the weight lies: a mean, a sequence, a copy."""
    found = {}
    for name, value in state.items():
        if is_like(value, start):
            pair = (value.real.flatten(), start.real.flatten())
            if float(torch.nn.functional.cosine_similarity(*pair, 0)) > _LIKENESS:
                found[name] = value
    return found


def is_like(value: Any, parameter: Tensor) -> bool:
    """Whether something is a tensor with an entry for each of a parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == parameter.dtype


def same(value: Any, other: Any) -> bool:
    """Whether options, or what is remembered, are equal; False of what cannot be told."""
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, tuple | list):
        return isinstance(other, tuple | list) and all(map(same, value, other)) and len(value) == len(other)
    return value is other or (isinstance(value, bool | int | float | str) and bool(value == other))


def remedy(optimizer: Optimizer) -> str:
    """Return what to do instead of attaching to an optimizer, as the end of a message."""
    inner = inner_optimizer(optimizer)
    if inner is not None:
        return (
            f"; attach to optimizer.{inner[0]}, the {type(inner[1]).__name__} inside it, if that alone "
            "changes weights"
        )
    return "; use another optimizer, as AdamW or SGD"


def told(kinds: Sequence[Kind]) -> str:
    """Return how many axes parameters of some kinds have, in words."""
    axes = sorted({axes for axes, _, _ in kinds})
    return f"{' or '.join(map(str, axes))} {'axis' if axes == [1] else 'axes'}"
