"""Whether a factor on the gradient survives an optimizer's step, or has to multiply the update instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.plasticity.optimizer_trial import (
    FACTORS,
    ROWS,
    Kind,
    Run,
    Trial,
    describe_kinds,
    is_like,
    iterates_of,
    same,
)
from biofx.plasticity.optimizers import has_decay, refuse_closures, remedy
from biofx.plasticity.updates import Way

_TOLERANCE = 0.01


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
