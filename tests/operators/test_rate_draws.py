from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from biofx.errors import OptionError, PlasticityError
from biofx.operators.distributions import GRANULARITIES, INDEPENDENT, Distribution
from biofx.operators.randomness import generator_for
from biofx.operators.rate_draws import RateDraw, rate_draw
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.rate_rules import initial_factors

CPU = torch.device("cpu")


def a_draw(distribution: str = "uniform", granularity: str = "element", **options: float) -> RateDraw:
    given = {"nu": 0.3, "low": 0.8, "high": 1.25, "depth": 0.5, **options}
    return rate_draw(distribution, seed=4, path="fc.weight", granularity=granularity, output_axis=1, **given)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("distribution", INDEPENDENT)
def test_the_numbers_are_those_of_a_stored_draw_to_the_bit(
    distribution: Distribution, granularity: str
) -> None:
    weight = torch.empty(70, 90, 3)
    stored, _ = initial_factors(
        distribution,
        weight,
        nu=0.3,
        low=0.8,
        high=1.25,
        generator=generator_for(4, "fc.weight", purpose="scale-gradients"),
        depth=0.5,
        granularity=granularity,
        output_axis=1,
    )
    found = a_draw(distribution.value, granularity).factors(weight.shape, CPU)
    assert found.shape == stored.shape
    assert torch.equal(found, stored)
    assert (distribution is Distribution.BASELINE) == bool((found == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["rows", "columns", "in place"])
def test_products_block_by_block_are_those_with_the_whole(
    dtype: torch.dtype, threads: int, layout: str
) -> None:
    shape = torch.Size((500, 1100))  # three blocks
    values = torch.randn(shape).to(dtype)
    if layout == "columns":
        values = values.t().contiguous().t()
    expected = values * a_draw().factors(shape, CPU).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = values if layout == "in place" else torch.empty_like(values)
        assert a_draw().multiply(values, out=out) is out
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, expected)


def test_neither_the_default_type_nor_other_draws_change_the_numbers() -> None:
    shape, before = torch.Size((40, 30)), torch.get_rng_state()
    expected = a_draw("gamma").factors(shape, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    torch.set_default_dtype(torch.float64)
    try:
        found = a_draw("gamma").factors(shape, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("distribution", INDEPENDENT)
def test_a_draw_is_written_down_whole(distribution: Distribution) -> None:
    for granularity in GRANULARITIES:
        draw = a_draw(distribution.value, granularity, high=math.inf, nu=1 / 3)
        numbers = draw.to_tensor(CPU)
        assert (numbers.shape, numbers.dtype) == ((8,), torch.int64)
        assert RateDraw.from_tensor(numbers) == draw


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.full((8,), 99), torch.full((8,), -1)])
def test_other_numbers_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(PlasticityError, match="expected what factors are drawn from, found"):
        RateDraw.from_tensor(wrong)


def test_bounds_without_room_are_refused() -> None:
    values = torch.ones(4, 4)
    with pytest.raises(OptionError, match="leave room for normal"):
        a_draw("normal", low=1.0, high=1.0).multiply(values, out=values)


def test_the_order_that_files_rely_on() -> None:
    assert [member.value for member in INDEPENDENT] == [
        *("baseline", "uniform", "normal", "lognormal", "gamma", "beta", "layer_adaptive")
    ]
    assert GRANULARITIES == ("element", "neuron", "layer")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inputs", [5, 300_000])
def test_a_state_draws_when_it_is_read(inputs: int, threads: int) -> None:
    layer = nn.Linear(inputs, 3)
    state = BioModule(layer)
    state.draw_factors_from(a_draw())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        read_from(state, layer)
    finally:
        torch.set_num_threads(before)


def read_from(state: BioModule, layer: nn.Linear) -> None:
    assert state.is_drawn
    assert state.has_factors
    assert state.rate_draw == a_draw()
    expected = a_draw().factors(layer.weight.shape, CPU)
    assert torch.equal(state.fuzzy_learning_rate_parameters, expected)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="inference tensor"):
        state.fuzzy_learning_rate_parameters.fill_(0)  # type: ignore[union-attr]
    with pytest.raises(PlasticityError, match="nothing to assign to"):
        state.fuzzy_learning_rate_parameters = expected
