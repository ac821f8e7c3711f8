from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from biofx.errors import OptionError, PlasticityError
from biofx.operators.rate_sampling import (
    GRANULARITIES,
    INDEPENDENT,
    Distribution,
    RateSampling,
    rate_sampling,
)
from biofx.plasticity.bio_module import BioModule

CPU = torch.device("cpu")


def a_draw(distribution: str = "uniform", granularity: str = "element", **options: float) -> RateSampling:
    given = {"nu": 0.3, "low": 0.8, "high": 1.25, "depth": 0.5, **options}
    return rate_sampling(
        distribution, seed=4, path="fc.weight", granularity=granularity, output_axis=1, **given
    )


FIRST: dict[str, list[float]] = {
    "baseline": [1.0, 1.0, 1.0],
    "uniform": [0.965193, 0.885775, 1.195393],
    "normal": [0.977298, 0.869162, 1.054964],
    "lognormal": [0.934539, 0.838754, 1.010013],
    "gamma": [0.997073, 0.846761, 1.015921],
    "beta": [1.036009, 0.948019, 0.845075],
    "layer_adaptive": [1.198236, 0.914331, 1.224112],
    "weight_adaptive": [1.132157, 0.914331, 1.022424],
    "temporal": [0.977298, 0.869162, 1.054964],
    "log_uniform": [1.010854, 1.241225, 1.248940],
    "activity": [1.017939, 0.885775, 1.216319],
}


@pytest.mark.parametrize("distribution", Distribution)
def test_the_numbers_stay_those_of_the_version_that_brought_them(distribution: Distribution) -> None:
    weight = torch.linspace(-1, 1, 8).reshape(2, 4)
    factors, noise = a_draw(distribution.value).sample(weight)
    expected = torch.tensor(FIRST[distribution.value])
    torch.testing.assert_close(factors.flatten()[:3], expected, rtol=0, atol=1e-6)
    assert (noise is None) == (distribution.value not in ("weight_adaptive", "activity"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("distribution", INDEPENDENT)
def test_synapses_share_factors_as_asked(distribution: Distribution, granularity: str) -> None:
    weight = torch.empty(7, 9, 3)
    found, _ = a_draw(distribution.value, granularity).sample(weight)
    assert found.shape == {"element": (7, 9, 3), "neuron": (1, 9, 1), "layer": (1, 1, 1)}[granularity]
    assert torch.equal(found, a_draw(distribution.value, granularity).factors(weight.shape, CPU))
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
        assert RateSampling.from_tensor(numbers) == draw


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.full((8,), 99), torch.full((8,), -1)])
def test_other_numbers_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(PlasticityError, match="expected what factors are sampled from, found"):
        RateSampling.from_tensor(wrong)


def test_bounds_without_room_are_refused() -> None:
    values = torch.ones(4, 4)
    with pytest.raises(OptionError, match="leave room for normal"):
        a_draw("normal", low=1.0, high=1.0).multiply(values, out=values)


def test_the_order_that_files_rely_on() -> None:
    assert [member.value for member in INDEPENDENT] == [
        *("baseline", "uniform", "normal", "lognormal", "gamma", "beta", "layer_adaptive", "log_uniform")
    ]
    assert GRANULARITIES == ("element", "neuron", "layer")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inputs", [5, 300_000])
def test_a_state_draws_when_it_is_read(inputs: int, threads: int) -> None:
    layer = nn.Linear(inputs, 3)
    state = BioModule(layer)
    state.start_factors(a_draw(), "seed", state.weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        read_from(state, layer)
    finally:
        torch.set_num_threads(before)


def read_from(state: BioModule, layer: nn.Linear) -> None:
    assert state.is_drawn
    assert state.has_factors
    assert state.rate_sampling == a_draw()
    expected = a_draw().factors(layer.weight.shape, CPU)
    assert torch.equal(state.fuzzy_learning_rate_parameters, expected)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="inference tensor"):
        state.fuzzy_learning_rate_parameters.fill_(0)  # type: ignore[union-attr]
    with pytest.raises(PlasticityError, match="cannot be assigned"):
        state.fuzzy_learning_rate_parameters = expected
