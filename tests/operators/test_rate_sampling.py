from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import biofx
from biofx import Distribution, OptionError
from biofx.operators.rate_sampling import rate_sampling
from biofx.operators.sampling import generator_for

COUNT = 200_000
NU = 0.2
OPEN = {"low": 0.0, "high": math.inf}


DECADES = {"low": 1e-3, "high": 10.0}


def draw(
    name: str, weight: Tensor | None = None, *, seed: int = 0, nu: float = NU, **options: float
) -> Tensor:
    weight = torch.ones(COUNT) if weight is None else weight
    sampling = rate_sampling(
        name, nu, seed=seed, path="fc.weight", **{**(DECADES if name == "log_uniform" else OPEN), **options}
    )
    return sampling.sample(weight)[0].double()


@pytest.mark.parametrize(
    ("name", "std", "skewness"),
    [
        ("uniform", NU / math.sqrt(3), 0.0),
        ("normal", NU, 0.0),
        ("lognormal", math.sqrt(math.expm1(NU**2)), (math.exp(NU**2) + 2) * math.sqrt(math.expm1(NU**2))),
        ("gamma", NU, 2 * NU),
        ("beta", NU / math.sqrt(2 / NU + 1), 0.0),
        ("layer_adaptive", NU / math.sqrt(3), 0.0),
    ],
)
def test_moments_are_those_of_the_definition(name: str, std: float, skewness: float) -> None:
    factors = draw(name)
    standard_error = std / math.sqrt(COUNT)
    assert abs(factors.mean().item() - 1) < 4 * standard_error
    assert abs(factors.std().item() / std - 1) < 0.02
    standardised = (factors - factors.mean()) / factors.std()
    assert abs(standardised.pow(3).mean().item() - skewness) < 0.05


@pytest.mark.parametrize("name", ["uniform", "beta"])
def test_support_is_one_plus_minus_nu(name: str) -> None:
    factors = draw(name)
    assert 1 - NU - 1e-6 <= factors.min() < 1 - 0.9 * NU
    assert 1 + 0.9 * NU < factors.max() <= 1 + NU + 1e-6


def test_baseline_is_one() -> None:
    assert (draw("baseline") == 1).all()
    assert (draw("normal", nu=0) == 1).all()


def test_small_weights_vary_more_than_large_ones() -> None:
    weight = torch.cat([torch.full((COUNT // 2,), 0.1), torch.full((COUNT // 2,), -1.0)])
    mean = weight.abs().mean().item()
    small, large = draw("weight_adaptive", weight).split(COUNT // 2)
    for factors, magnitude in ((small, 0.1), (large, 1.0)):
        reach = NU * min(max(2 - magnitude / mean, 0.5), 1.5)
        assert factors.std().item() == pytest.approx(reach / math.sqrt(3), rel=0.02)
        assert (factors - 1).abs().max().item() <= reach + 1e-6


def test_weights_of_zero_are_all_equally_small() -> None:
    factors = draw("weight_adaptive", torch.zeros(COUNT))
    assert factors.std().item() == pytest.approx(NU / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_layer_adaptive_spread_shrinks_with_depth(depth: float) -> None:
    factors = draw("layer_adaptive", depth=depth)
    assert factors.std().item() == pytest.approx(NU * (1 - depth / 2) / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("name", [d.value for d in Distribution])
def test_bounds_truncate_and_nothing_piles_up_on_them(name: str) -> None:
    factors = draw(name, low=0.9, high=1.1)
    assert factors.min() >= 0.9 - 1e-6
    assert factors.max() <= 1.1 + 1e-6
    assert ((factors == factors.min()).float().mean() < 0.001) or name == "baseline"


def test_truncation_leaves_the_shape_inside_the_bounds() -> None:
    free, bounded = draw("normal"), draw("normal", low=0.9, high=1.1, seed=1)
    inside = free[(free >= 0.9) & (free <= 1.1)]
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert bounded.quantile(quantile).item() == pytest.approx(inside.quantile(quantile).item(), abs=0.002)


def test_bounds_without_room_are_refused() -> None:
    with pytest.raises(OptionError, match=r"leave room for normal with nu=0.2, found \[1, 1\]"):
        draw("normal", torch.ones(10), low=1, high=1)


def test_factors_are_float32_on_the_weights_device_and_shape() -> None:
    weight = torch.ones(2, 3, 4, dtype=torch.float64)
    factors, _ = rate_sampling("gamma", nu=0.1, low=0, high=2, seed=0, path="w").sample(weight)
    assert (factors.shape, factors.dtype, factors.device) == (weight.shape, torch.float32, weight.device)


def test_draws_depend_on_the_key_alone_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    first = draw("beta")
    torch.manual_seed(123)
    assert torch.equal(first, draw("beta"))
    torch.set_rng_state(before)
    draw("gamma")
    assert torch.equal(torch.get_rng_state(), before)


def test_each_part_of_the_key_counts() -> None:
    keys = [
        (0, "a", 0, ""),
        (1, "a", 0, ""),
        (0, "b", 0, ""),
        (0, "a", 1, ""),
        (0, "a", 0, "x"),
        (0, "a0", 0, ""),
    ]
    draws = [
        torch.rand(4, generator=generator_for(seed, path, event, purpose=purpose)).tolist()
        for seed, path, event, purpose in keys
    ]
    assert len({tuple(values) for values in draws}) == len(keys)


MILLION = 1_000_000
SPREADS = (0.05, 0.16, 0.5)
CLOSED_FORMS: dict[str, Callable[[float], Any]] = {
    "uniform": lambda nu: stats.uniform(1 - nu, 2 * nu),
    "normal": lambda nu: stats.norm(1, nu),
    "lognormal": lambda nu: stats.lognorm(nu, scale=math.exp(-(nu**2) / 2)),
    "gamma": lambda nu: stats.gamma(nu**-2, scale=nu**2),
    "beta": lambda nu: stats.beta(1 / nu, 1 / nu, loc=1 - nu, scale=2 * nu),
    "layer_adaptive": lambda nu: stats.uniform(1 - nu, 2 * nu),
}


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.5, 2.0)], ids=["free", "default bounds"])
@pytest.mark.parametrize("nu", SPREADS)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_million_draws_follow_the_closed_form(name: str, nu: float, bounds: tuple[float, float]) -> None:
    low, high = bounds
    law = CLOSED_FORMS[name](nu)
    below, above = law.cdf(low), law.cdf(high)
    factors = draw(name, torch.ones(MILLION), nu=nu, low=low, high=high).numpy()
    # what a truncated variable's distribution function is, by definition
    result = stats.kstest(factors, lambda x: (law.cdf(x) - below) / (above - below))
    assert result.pvalue > 0.001
    mean = law.expect(lambda x: x, lb=max(low, law.support()[0]), ub=high, conditional=True)
    square = law.expect(lambda x: (x - mean) ** 2, lb=max(low, law.support()[0]), ub=high, conditional=True)
    fourth = law.expect(lambda x: (x - mean) ** 4, lb=max(low, law.support()[0]), ub=high, conditional=True)
    assert abs(factors.mean() - mean) < 4 * math.sqrt(square / MILLION)
    assert abs(factors.var() - square) < 4 * math.sqrt((fourth - square**2) / MILLION)
    if bounds == (0.0, math.inf) and name != "normal":
        assert mean == pytest.approx(1)


@pytest.mark.parametrize("nu", SPREADS)
def test_a_million_weight_adaptive_draws_follow_the_closed_form(nu: float) -> None:
    weight = torch.randn(MILLION, generator=torch.Generator().manual_seed(5))
    factors = draw("weight_adaptive", weight, nu=nu)
    magnitude = weight.abs().double()
    reach = nu * (2 - magnitude / magnitude.mean()).clamp(0.5, 1.5)
    standardised = ((factors - 1) / reach).numpy()
    assert stats.kstest(standardised, stats.uniform(-1, 2).cdf).pvalue > 0.001
    variance = (reach**2 / 3).mean().item()
    fourth = (reach**4 / 5).mean().item()
    assert abs(factors.mean().item() - 1) < 4 * math.sqrt(variance / MILLION)
    assert abs(factors.var().item() - variance) < 4 * math.sqrt((fourth - variance**2) / MILLION)


@pytest.mark.parametrize(("low", "high"), [(1e-3, 10.0), (1e-5, 1.0), (0.5, 2.0)])
def test_a_million_log_uniform_draws_follow_the_closed_form(low: float, high: float) -> None:
    factors = draw("log_uniform", torch.ones(MILLION), low=low, high=high, nu=0.01).numpy()
    assert low * (1 - 1e-6) <= factors.min()
    assert factors.max() <= high * (1 + 1e-6)
    assert stats.kstest(factors, stats.loguniform(low, high).cdf).pvalue > 0.001
    decades = math.log(high / low)
    mean, square = (high - low) / decades, (high**2 - low**2) / (2 * decades)
    assert abs(factors.mean() - mean) < 4 * math.sqrt((square - mean**2) / MILLION)
    if (low, high) == (1e-3, 10.0):
        assert mean == pytest.approx(1.086, abs=5e-4)  # as the documentation says


def test_equal_bounds_of_log_uniform_factors_are_their_value() -> None:
    assert (draw("log_uniform", low=1.0, high=1.0) == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "seed"])
@pytest.mark.parametrize("granularity", ["element", "neuron"])
def test_log_uniform_factors_of_a_model_have_bounds_of_their_own(dtype: str, granularity: str) -> None:
    config = biofx.BioConfig(
        fuzzy_lr_distribution=Distribution.LOG_UNIFORM,
        fuzzy_lr_dtype=dtype,
        fuzzy_lr_granularity=granularity,
        fuzzy_lr_log_min=1e-4,
        fuzzy_lr_log_max=50.0,
        seed=3,
    )
    model: Any = nn.Sequential(nn.Linear(30, 2000))
    expected = rate_sampling("log_uniform", 0.16, 1e-4, 50.0, 3, "0.weight", granularity=granularity)
    factors = expected.sample(model[0].weight)[0]
    assert factors.max() > 25
    assert factors.min() < 2e-4
    bio: Any
    for bio in (biofx.transform(model, config)[0], biofx.BioConverter(config)(model)):
        found = bio.get_submodule("0").bio_mod.fuzzy_learning_rate_parameters
        tolerance = 2**-8 if dtype == "bfloat16" else 0
        torch.testing.assert_close(found.float(), factors, rtol=tolerance, atol=0)
        assert biofx.check(bio).ok
    plain, bio = copy.deepcopy(model), biofx.transform(model, config)[0]
    inputs = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    for trained in (plain, bio):
        trained(inputs).square().sum().backward()
    held = bio.get_submodule("0").bio_mod.fuzzy_learning_rate_parameters
    torch.testing.assert_close(
        bio.get_parameter("0.weight").grad, plain[0].weight.grad * held.float(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("nu", SPREADS)
def test_spread_of_the_last_layer_is_half_of_the_first(nu: float) -> None:
    first = draw("layer_adaptive", torch.ones(MILLION), nu=nu, depth=0.0)
    last = draw("layer_adaptive", torch.ones(MILLION), nu=nu, depth=1.0, seed=1)
    assert (last.std() / first.std()).item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", [d.value for d in Distribution])
def test_numbers_do_not_depend_on_the_threads(name: str) -> None:
    weight = torch.randn(300_001, generator=torch.Generator().manual_seed(5))
    many, threads = draw(name, weight), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(draw(name, weight), many)
    finally:
        torch.set_num_threads(threads)
