from __future__ import annotations

import random
from collections.abc import Callable

import numpy
import pytest
import torch

from biofx.random_state import RandomGenerator, generator_in, preserved_random_state

NUMPY, LEGACY = numpy.random.default_rng(1), numpy.random.RandomState(1)
PYTHON, TORCH = random.Random(1), torch.Generator()
DRAWS: list[tuple[object, Callable[[], float]]] = [
    (random, random.random),
    (PYTHON, PYTHON.random),
    (numpy.random, lambda: float(numpy.random.random())),
    (NUMPY, NUMPY.random),
    (LEGACY, LEGACY.random_sample),
    (torch.default_generator, lambda: torch.rand(1).item()),
    (TORCH, lambda: torch.rand(1, generator=TORCH).item()),
]


@pytest.mark.parametrize(("generator", "draw"), DRAWS)
def test_a_restored_generator_draws_the_same_numbers(generator: object, draw: Callable[[], float]) -> None:
    with preserved_random_state():
        held = RandomGenerator(generator)
        before = held.state()
        first = draw()
        assert held.state() != before
        held.restore(before)
        assert held.state() == before
        assert draw() == first


def test_no_other_object_is_taken_for_a_generator() -> None:
    assert all(generator_in(each) is not None for each in (PYTHON, NUMPY, LEGACY, TORCH))
    assert all(generator_in(each) is None for each in (random, numpy.random, "text", None))


def test_the_global_states_are_restored_after_a_block_that_fails() -> None:
    with preserved_random_state():
        expected = random.random(), numpy.random.random(), torch.rand(1).item()

    def draw_and_fail() -> None:
        with preserved_random_state():
            random.random(), numpy.random.random(), torch.rand(1)
            raise RuntimeError("fails")

    with preserved_random_state():
        with pytest.raises(RuntimeError, match="fails"):
            draw_and_fail()
        assert (random.random(), numpy.random.random(), torch.rand(1).item()) == expected
