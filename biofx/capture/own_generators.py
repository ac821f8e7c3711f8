"""Generators of random numbers that a module holds itself: Python's, NumPy's and torch's."""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any

import torch

from biofx.static_inspection import is_of


class OwnGenerator:
    """One such generator, whose state can be compared and put back."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def state(self) -> bytes:
        """Return its state, comparable."""
        return pickle.dumps(self._read())

    def restore(self, state: bytes) -> None:
        """Put it back to a state."""
        found: Any = pickle.loads(state)
        if isinstance(self._generator, random.Random):
            self._generator.setstate(found)
        elif isinstance(self._generator, torch.Generator):
            self._generator.set_state(torch.tensor(found, dtype=torch.uint8))
        elif hasattr(self._generator, "bit_generator"):
            self._generator.bit_generator.state = found
        else:
            self._generator.set_state(found)

    def _read(self) -> Any:
        if isinstance(self._generator, random.Random):
            return self._generator.getstate()
        if isinstance(self._generator, torch.Generator):
            return self._generator.get_state().tolist()
        if hasattr(self._generator, "bit_generator"):
            return self._generator.bit_generator.state
        return self._generator.get_state()


def generator_in(value: object) -> OwnGenerator | None:
    """Return the generator that a value is, None if it is something else."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    kinds: tuple[Any, ...] = (random.Random, torch.Generator)
    if numpy_random is not None:
        kinds += (numpy_random.Generator, numpy_random.RandomState)
    return OwnGenerator(value) if is_of(value, kinds) else None
