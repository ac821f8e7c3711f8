"""Trial runs: small parameters take steps of an optimizer's own rule, with and without factors."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.plasticity.optimizers import remedy, without_decay
from biofx.plasticity.updates import Way, remember, rescale

Kind = tuple[int, torch.dtype, torch.device]
"""What optimizers distinguish parameters by: number of axes, dtype, device."""
ROWS = 10
"""Size of a trial parameter along its first axis."""
FACTORS = (0.0, 0.3, 0.6, 1.0, 1.7)
"""Factors of the rows of each parameter, each for as many rows."""
_COLUMNS, _KERNEL = 6, 3
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_STEPS, _MORE, _MOST = 30, 10, 200
_SCALES = (1.0, 0.1, 10.0)
"""Of the gradients, in turn, so that clipping and normalising show."""
_RATES = (1e-3, 1e-1, 1.0, 10.0)
"""Learning rates; the first at which weights move visibly is used, since small ones depend on less."""
_LEAST_MOVED = 1e-3
"""Relative to the weights; smaller moves drown in rounding."""
_LIKENESS = 0.7
"""Cosine above which a tensor is another iterate of the weight."""


def kinds_of(parameters: Iterable[Tensor]) -> tuple[Kind, ...]:
    """Return the kinds of some parameters, each once; half precision is tried in single."""
    found: dict[Kind, None] = {}
    for parameter in parameters:
        dtype = torch.float32 if parameter.dtype in _LOW_PRECISION else parameter.dtype
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        found[parameter.dim(), dtype, device] = None
    return tuple(found)


def describe_kinds(kinds: Sequence[Kind]) -> str:
    """Return how many axes parameters of some kinds have, in words."""
    axes = sorted({axes for axes, _, _ in kinds})
    return f"{' or '.join(map(str, axes))} {'axis' if axes == [1] else 'axes'}"


@dataclass
class Run:
    """Where small parameters started and ended, and the optimizer's state and options at the end."""

    starts: list[Tensor]
    ends: list[Tensor]
    states: list[dict[str, Any]]
    options: dict[str, Any]
    changed: frozenset[str]
    """Names of the options that the optimizer has changed or added."""

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
    """Small parameters that a copy of an optimizer steps.

    Args:
        optimizer: not changed.
        group: the parameter group whose options hold.
        kinds: of the parameters, one each.
        counters: names of the options that the optimizer is known to change at its steps.
    """

    def __init__(
        self, optimizer: Optimizer, group: Mapping[str, Any], kinds: Sequence[Kind], counters: frozenset[str]
    ) -> None:
        self.name = type(optimizer).__name__
        self.counters = counters
        self._optimizer, self._group, self._kinds = optimizer, group, kinds
        self._rate, self._is_sparse = _RATES[0], False
        counts = [value for value in group.values() if type(value) is int and value <= _MOST]
        self._steps = max(_STEPS, _MORE + max(counts, default=0))  # past what happens every so many steps

    def run_plainly(self) -> Run:
        """Run without factors, at a learning rate at which weights move visibly.

        Raises:
            PlasticityError: no learning rate makes the steps visible and finite.
        """
        try:
            return self._run_visibly()
        except PlasticityError:
            raise
        except Exception:
            self._is_sparse = True  # as the gradients of embeddings can be, which some optimizers insist on
            with suppress(Exception):
                return self._run_visibly()
            raise

    def _run_visibly(self) -> Run:
        run: Run | None = None
        for number, rate in enumerate(_RATES):
            self._rate, last = rate, run
            run = self.run()
            new = run.changed - self.counters
            self.counters |= run.changed
            if any(map(self._was_changed_before, new)):
                run = self.run()  # from the value that the option starts with
            if last is not None and not all(map(math.isfinite, run.distances())):
                run, self._rate = last, _RATES[number - 1]
                break
            if min(run.distances()) >= _LEAST_MOVED:
                break
        distances = [] if run is None else run.distances()
        if run is None or not all(0 < distance < math.inf for distance in distances):
            raise PlasticityError(
                f"{self.name} moved small weights of {describe_kinds(self._kinds)} by {distances}, relative "
                "to their size; expected finite steps, to see whether a factor acts"
                f"{remedy(self._optimizer)}"
            )
        return run

    def run(self, way: Way | None = None, *, scaled_in_graph: bool = False) -> Run:
        """Take the steps, and multiply gradients or updates by the factors.

        Args:
            way: what to multiply, None for nothing.
            scaled_in_graph: whether gradients come multiplied by the factors and divided by them again,
                except for factors of 0.

        Raises:
            PlasticityError: the optimizer does not run its step hooks.
        """
        generator = torch.Generator().manual_seed(0)
        parameters = _small_parameters(self._kinds, generator)
        starts = [parameter.detach().clone() for parameter in parameters]
        trial = self._copy_for(parameters)
        (group,) = trial.param_groups
        before = dict(group)
        drifts = [torch.randn(parameter.shape[1:], generator=generator).sign() for parameter in parameters]
        by_rows = torch.tensor(FACTORS).repeat_interleave(ROWS // len(FACTORS))
        factors = [by_rows.reshape(-1, *[1] * (p.dim() - 1)).to(p.device) for p in parameters]
        hooked: list[str] = []
        trial.register_step_pre_hook(lambda *_: hooked.append("before"))
        trial.register_step_post_hook(lambda *_: hooked.append("after"))
        cuda = [parameter.device for parameter in parameters if parameter.device.type == "cuda"]
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            for number in range(self._steps):
                earlier = []
                for parameter, drift, own in zip(parameters, drifts, factors, strict=True):
                    noise = torch.randn(parameter.shape, generator=generator)
                    gradient = (noise + drift) * _SCALES[number % len(_SCALES)]
                    gradient = gradient.to(parameter.device, parameter.dtype)
                    if way is Way.GRADIENT:
                        gradient = gradient * own
                    elif scaled_in_graph:
                        gradient = torch.where(own > 0, gradient * own / own, gradient)
                    parameter.grad = gradient.to_sparse(1) if self._is_sparse else gradient
                    earlier.append(remember(trial, group, parameter))
                trial.step()
                if way is Way.UPDATE:
                    for parameter, seen, own in zip(parameters, earlier, factors, strict=True):
                        rescale(seen, trial, parameter, own)
        if min(hooked.count("before"), hooked.count("after")) < self._steps:
            raise PlasticityError(
                f"{self.name} takes steps without running its step hooks, which attach relies on"
                f"{remedy(self._optimizer)}"
            )
        return Run(
            starts,
            [parameter.detach().clone() for parameter in parameters],
            [dict(trial.state.get(parameter, {})) for parameter in parameters],
            {name: value for name, value in group.items() if name != "params"},
            frozenset(name for name in group if name not in before or not same(group[name], before[name])),
        )

    def _was_changed_before(self, name: str) -> bool:
        """Whether the optimizer has changed an option before the trial."""
        defaults = self._optimizer.defaults
        return name in self._group and not (name in defaults and same(self._group[name], defaults[name]))

    def _copy_for(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Return an optimizer of the same class, without state, that steps other parameters.

        Attributes that the class has added are copied, with the trial parameters in the place of others.
        """
        known: Any = self._optimizer
        of_axes = {parameter.dim(): parameter for parameter in parameters}
        trial: Optimizer = object.__new__(type(known))
        memo: dict[int, Any] = {
            id(parameter): of_axes.get(parameter.dim(), parameters[0])
            for group in known.param_groups
            for parameter in group["params"]
        }
        memo[id(known)] = trial
        hooks = [name for name in vars(known) if name.startswith("_optimizer_") and name.endswith("_hooks")]
        left_out = ("step", "state", "defaults", "param_groups", *hooks)
        own = {name: value for name, value in vars(known).items() if name not in left_out}
        trial.__dict__.update(
            copy.deepcopy({**own, "defaults": dict(known.defaults)}, memo),
            state=defaultdict(dict),
            **{name: OrderedDict() for name in hooks},
        )
        trial.param_groups = [{**copy.deepcopy(self._options()), "params": parameters}]
        return trial

    def _options(self) -> dict[str, Any]:
        """Return the options of the trial's group, without decay; counters start at their defaults."""
        options = without_decay(self._group)
        options |= {name: value for name, value in self._optimizer.defaults.items() if name in self.counters}
        if "train_mode" in options:  # of schedule-free optimizers, which step in no other mode
            options["train_mode"] = True
        if (rate := options.get("lr")) is not None:
            options["lr"] = torch.full_like(rate, self._rate) if isinstance(rate, Tensor) else self._rate
        return options


def _small_parameters(kinds: Sequence[Kind], generator: torch.Generator) -> list[nn.Parameter]:
    """Return one parameter of each kind, about as large as 1, whose rows have signs in turn.

    Nothing that an optimizer computes from gradients has such signs: state that looks like the parameter is
    another iterate of it.
    """
    made = []
    signs = torch.tensor((1.0, -1.0)).repeat(ROWS // 2)
    for axes, dtype, device in kinds:
        row = (_COLUMNS, *[_KERNEL] * axes)[: max(axes - 1, 0)]
        values = torch.rand((ROWS, *row), generator=generator, dtype=torch.float64) + 0.5
        made.append(nn.Parameter((signs.reshape(-1, *[1] * len(row)) * values).to(device, dtype)))
    return made


def iterates_of(state: Mapping[str, Any], start: Tensor) -> dict[str, Tensor]:
    """Return the state that lies close to where the weight lies: a mean, a sequence, a copy."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_like(value, start):
            pair = (value.real.flatten(), start.real.flatten())
            if float(torch.nn.functional.cosine_similarity(*pair, 0)) > _LIKENESS:
                found[name] = value
    return found


def is_like(value: Any, parameter: Tensor) -> bool:
    """Whether a value is a tensor with an entry for each of a parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == parameter.dtype


def same(value: Any, other: Any) -> bool:
    """Whether options or states are equal; False where that cannot be known."""
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, tuple | list):
        return isinstance(other, tuple | list) and all(map(same, value, other)) and len(value) == len(other)
    return value is other or (isinstance(value, bool | int | float | str) and bool(value == other))
