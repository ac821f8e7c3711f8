"""How a factor reaches the weights that an optimizer steps, found out by trying."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.plasticity.optimizer_options import has_decay
from biofx.plasticity.optimizer_trial import (
    FACTORS,
    Run,
    Trial,
    is_like,
    iterates_of,
    remedy,
    same,
    told,
)
from biofx.plasticity.trial_optimizer import ROWS, Kind
from biofx.plasticity.update_scaling import Way

_TOLERANCE = 0.01


@dataclass
class Found:
    """What a trial has shown of an optimizer and one of its groups."""

    way: Way
    counters: frozenset[str]
    """The options of a group that the optimizer itself changes as it goes."""


def find_way(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    kinds: Sequence[Kind],
    known: frozenset[str] = frozenset(),
    *,
    scaled_in_graph: bool = False,
) -> Found:
    """Return what factors have to multiply so that weights move in proportion to them.

    Small parameters take 30 or more steps of the optimizer's own rule, with another factor for each row:
    first without factors, then with the gradient scaled, and then, unless that is the same for all that the
    optimizer remembers too, with the updates scaled. A factor of 0 has to freeze a row to the bit.

    Args:
        optimizer: not changed; a copy without state takes the steps.
        group: the parameter group whose options hold. Its learning rate is set to a small one, and weight
            decay to 0: where there is any, gradients alone would not do.
        kinds: of the weights that are to be scaled.
        known: options that earlier trials have found the optimizer to change itself.
        scaled_in_graph: whether gradients come with the factors on them, so that those have to be divided out
            where updates are scaled.

    Raises:
        PlasticityError: neither way does, or the step cannot be tried: it needs a closure, fails, or runs no
            hooks.
    """
    refuse_closures(optimizer)
    try:
        trial = Trial(optimizer, group, kinds, known)
        plain = trial.run_plainly()
        if not has_decay(group):
            scaled = trial.run(Way.GRADIENT)
            if _is_in_proportion(scaled, plain) and _is_linear(scaled, plain):
                return Found(Way.GRADIENT, trial.counters)
        if _is_in_proportion(trial.run(Way.UPDATE, scaled_in_graph=scaled_in_graph), plain):
            return Found(Way.UPDATE, trial.counters)
        if scaled_in_graph and _is_in_proportion(trial.run(Way.UPDATE), plain):
            raise PlasticityError(
                f"{trial.name} makes much of rounding, and so of factors that the graph has put on a "
                "gradient and that are divided out again; convert the model with BioConverter, which leaves "
                "gradients as they are, or use another optimizer"
            )
        raise PlasticityError(
            f"under {trial.name} weights do not move in proportion to a factor, neither on the gradient nor "
            "on the update: its steps go by positions of weights that it keeps, or by how far they have moved"
            f"{remedy(optimizer)}"
        )
    except PlasticityError:
        raise
    except Exception as error:
        raise PlasticityError(
            f"{type(optimizer).__name__} cannot be tried on small weights of {told(kinds)}: "
            f"{type(error).__name__}: {error}{remedy(optimizer)}"
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


def _is_in_proportion(scaled: Run, plain: Run) -> bool:
    """Whether every iterate has moved by its factor times what it has without one.

    What the optimizer works out for itself, as a learning rate, has to come out the same.
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
    """Whether what is remembered is in proportion to the gradients as well, or the same without factors.

    What is not, acts sooner or later: second moments after a warm-up, statistics when they are used next.
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
