"""States of random number generators: the global ones of Python, NumPy and torch, and those of modules."""

from __future__ import annotations

import ctypes
import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from biofx.static_inspection import is_of


class RandomGenerator:
    """A generator whose state can be compared and restored.

    Args:
        generator: a generator of Python, NumPy or torch; the module ``random`` or ``numpy.random`` for the
            global one.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def state(self) -> bytes:
        """Return the state, comparable."""
        if isinstance(self._generator, torch.Generator):
            state = self._generator.get_state()  # bytes on the CPU, of any device; torch may be without NumPy
            return ctypes.string_at(state.data_ptr(), state.numel())
        if hasattr(type(self._generator), "bit_generator"):
            return pickle.dumps(self._generator.bit_generator.state)
        return pickle.dumps(self._generator.getstate() if self._is_pythons else self._generator.get_state())

    def restore(self, state: bytes) -> None:
        """Set the state to an earlier one."""
        if isinstance(self._generator, torch.Generator):
            self._generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        elif hasattr(type(self._generator), "bit_generator"):
            self._generator.bit_generator.state = pickle.loads(state)
        elif self._is_pythons:
            self._generator.setstate(pickle.loads(state))
        else:
            self._generator.set_state(pickle.loads(state))

    @property
    def _is_pythons(self) -> bool:
        return self._generator is random or isinstance(self._generator, random.Random)


def generator_in(value: object) -> RandomGenerator | None:
    """Return the generator that a value is, None if it is something else."""
    kinds: tuple[Any, ...] = (random.Random, torch.Generator)
    numpy_random = _numpy_random()
    if numpy_random is not None:
        kinds += (numpy_random.Generator, numpy_random.RandomState)
    return RandomGenerator(value) if is_of(value, kinds) else None


def global_generators() -> dict[str, RandomGenerator]:
    """Return the global generators by the name of their library; NumPy's where NumPy is loaded."""
    found: dict[str, Any] = {"Python": random, "torch": torch.default_generator}
    numpy_random = _numpy_random()
    if numpy_random is not None:
        found["NumPy"] = numpy_random
    return {name: RandomGenerator(generator) for name, generator in found.items()}


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch at the end of the block."""
    before = {generator: generator.state() for generator in global_generators().values()}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            for generator, state in before.items():
                generator.restore(state)


def _numpy_random() -> Any:
    return getattr(sys.modules.get("numpy"), "random", None)
