"""The state of a weight in a few words, as the text of a model shows it at the layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from biofx.operators.rate_sampling import Distribution


def describe_state(state: Any) -> str:
    """Return what a state has; empty if it has nothing. Nothing is computed from the tensors.

    Args:
        state: a :class:`~biofx.plasticity.bio_state.BioState`.
    """
    return ", ".join(_parts(state))


def _parts(state: Any) -> Iterator[str]:
    held = state._buffers
    if state.has_factors:
        yield _rates(state)
    for name, what in (("sign", "signs"), ("local_sign", "signs of inputs")):
        if held[name] is not None:
            yield f"{held[name].numel()} {what}"
    if state.is_constrained:
        yield "reads signs"
    if held["connection_mask"] is not None:
        yield "masked"
    if held["unit_age"] is not None:
        yield f"{held['unit_age'].numel()} units turn over ({state.config.unit_turnover})"
    if held["importance"] is not None:
        yield f"consolidation {state.config.consolidation}"
    if held["initial_weight"] is not None:
        yield "initial weight kept"
    if held["utility"] is not None:
        yield "utility by gradient"


def _rates(state: Any) -> str:
    """Return how the factors were drawn at first, as far as that is known."""
    sampling, factors = vars(state).get("_started_from"), state._buffers["fuzzy_learning_rate_parameters"]
    told = "rates"
    if sampling is not None and sampling.distribution is Distribution.LOG_UNIFORM:
        told += f" {sampling.distribution.value} in [{sampling.low:g}, {sampling.high:g}]"
    elif sampling is not None:
        told += f" {sampling.distribution.value} ν={sampling.nu:g}"
    if factors is None:
        return f"{told} from the seed"
    return f"{told} ({factors.dtype})".replace("torch.", "") if factors.element_size() != 4 else told
