"""Small modules, each with something in it that goes wrong where a forward is traced without care."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from idioms import asked, calls, hooks, modes, neighbours, outside, python_forms, returned, state, tensors
from idioms.body import Example, features, images, sequences

_OTHER_INPUTS: dict[type[nn.Module], Example] = {
    python_forms.LoopOverSteps: sequences,
    calls.LayersOfSeveralInputs: sequences,
    calls.ReadsAWeightOfALayer: sequences,
    tensors.PositionsByLength: sequences,
    tensors.Packed: sequences,
    tensors.Functional: images,
}


def _nested(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x,), _ = features(batch)
    return ({"x": x, "rest": [x * 2, 0.5]},), {}


def _keywords(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x,), _ = features(batch)
    return (x,), {"gain": 3.0}


def _list(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x,), _ = features(batch)
    return ([x],), {}


def _without_mask(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x,), _ = features(batch)
    return (x, None), {}


def _twice(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x,), _ = features(batch)
    return (x, x), {}


def _entry(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x,), _ = features(batch)
    return ({"x": x, "mask": None},), {}


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Example]]]]:
    """Yield names and builders of modules with an example for each."""
    groups = (modes, state, neighbours, hooks, calls, python_forms, returned, tensors, asked, outside)
    examples = {
        **{kind: features for group in groups for kind in group.IDIOMS},
        **_OTHER_INPUTS,
        python_forms.NestedInputs: _nested,
        asked.TypeAmongOthers: _list,
        asked.NeedsAMask: _without_mask,
        asked.HandsAMaskOn: _without_mask,
        asked.EntryThatIsNone: _entry,
        asked.EntryThatMayBeMissing: _entry,
        asked.OneOrTwo: _twice,
        outside.TakesFromItsArgument: _entry,
    }
    for kind, example in examples.items():
        yield f"idiom {kind.__name__}", lambda kind=kind, example=example: (_built(kind), example)  # type: ignore[misc]
    for kind in (asked.NeedsAMask, asked.HandsAMaskOn):
        yield f"idiom {kind.__name__} given one", lambda kind=kind: (_built(kind), _twice)  # type: ignore[misc]
    yield "idiom JugglesKeywords given some", lambda: (_built(python_forms.JugglesKeywords), _keywords)


def _built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()
