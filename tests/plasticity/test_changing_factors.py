from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

import biofx
from biofx import Distribution, OptionError
from biofx.operators.rate_sampling import (
    following_factors,
    pooled_magnitude,
    rate_sampling,
    relative_smallness,
)
from biofx.operators.sampling import BLOCK, generator_for
from biofx.plasticity.rate_rules import evolve

COUNT = 30_000  # below what torch splits between threads, whose waiting would cost more than the work


def factors_of(model: nn.Module, layer: str) -> Tensor:
    factors: Tensor = model.get_submodule(layer).bio_mod.acting_factors  # type: ignore[assignment, union-attr]
    return factors


def temporal(nu: float, low: float, high: float) -> Tensor:
    sampling = rate_sampling("temporal", nu, low, high, seed=0, path="w")
    return sampling.sample(torch.ones(COUNT))[0]


@pytest.mark.parametrize("correlation", [0.5, 0.95, 0.9995])
@pytest.mark.parametrize("bounds", [(0.0, 1e9), (0.5, 2.0)], ids=["free", "default bounds"])
@pytest.mark.parametrize("nu", [0.05, 0.16, 0.5])
def test_temporal_diversity_neither_dies_nor_grows(
    nu: float, bounds: tuple[float, float], correlation: float
) -> None:
    low, high = bounds
    factors = temporal(nu, low, high)
    a, b = (low - 1) / nu, (high - 1) / nu
    below, above = special.ndtr(a), special.ndtr(b)
    density_a, density_b = (math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (a, b))
    # the variance of a normal variable truncated to [a, b]
    tilt, shift = (a * density_a - b * density_b) / (above - below), (density_a - density_b) / (above - below)
    std = nu * math.sqrt(1 + tilt - shift**2)
    for update in range(150):
        evolve(
            factors,
            correlation=correlation,
            nu=nu,
            low=low,
            high=high,
            generator=generator_for(0, "w", update, purpose="evolve"),
        )
        if update % 50 == 49:
            assert factors.std().item() == pytest.approx(std, rel=0.02)
            truncated = (special.ndtr((factors.numpy() - 1) / nu) - below) / (above - below)
            assert stats.kstest(truncated, stats.uniform.cdf).pvalue > 0.001
    assert factors.min() >= low
    assert factors.max() <= high


@pytest.mark.parametrize("correlation", [0.3, 0.9])
def test_temporal_factors_remember_as_much_as_asked(correlation: float) -> None:
    factors = temporal(0.1, 0.0, 1e9)
    before = factors.clone()
    generator = generator_for(0, "w", purpose="evolve")
    evolve(factors, correlation=correlation, nu=0.1, low=0.0, high=1e9, generator=generator)
    innovation = (factors - 1) - correlation * (before - 1)
    found = torch.corrcoef(torch.stack([before, factors]))[0, 1].item()
    assert found == pytest.approx(correlation, abs=4 / math.sqrt(COUNT))
    expected = stats.norm(0, 0.1 * math.sqrt(1 - correlation**2))
    assert stats.kstest(innovation.numpy(), expected.cdf).pvalue > 0.001


def test_a_perfect_memory_changes_nothing() -> None:
    factors = temporal(0.1, 0.5, 2.0)
    before = factors.clone()
    evolve(factors, correlation=1.0, nu=0.1, low=0.5, high=2.0, generator=generator_for(0, "w"))
    assert torch.equal(factors, before)


def test_temporal_factors_change_every_so_many_steps() -> None:
    config = biofx.BioConfig(
        fuzzy_lr_distribution=Distribution.TEMPORAL, fuzzy_lr_dynamic=True, fuzzy_lr_update_freq=3
    )
    bio = biofx.BioConverter(config)(nn.Sequential(nn.Linear(4, 4)))
    changed = []
    for _ in range(9):
        before = factors_of(bio, "0").clone()
        bio.update_fuzzy_learning_rates()
        changed.append(not torch.equal(before, factors_of(bio, "0")))
    assert changed == [False, False, True] * 3


def test_static_draw_of_a_dynamic_distribution_stays_where_it_is() -> None:
    bio = biofx.BioConverter(fuzzy_lr_distribution=Distribution.TEMPORAL)(nn.Sequential(nn.Linear(4, 4)))
    assert bio.update_fuzzy_learning_rates() == {
        "0.weight": "its factors do not change (fuzzy_lr_dynamic=False, or a static distribution)"
    }


@pytest.mark.parametrize("dynamic", [False, True])
def test_weight_adaptive_factors_follow_the_weights_where_dynamic(dynamic: bool) -> None:
    config = biofx.BioConfig(
        fuzzy_lr_distribution=Distribution.WEIGHT_ADAPTIVE,
        fuzzy_lr_dynamic=dynamic,
        fuzzy_learning_rate_factor_nu=0.2,
    )
    bio = biofx.BioConverter(config)(nn.Sequential(nn.Linear(300, 300)))
    state, weight = bio.get_submodule("0").bio_mod, bio.get_parameter("0.weight")
    noise = state.noise.clone()

    def by_definition() -> Tensor:
        magnitude = weight.detach().abs()
        factors: Tensor = 1 + 0.2 * (2 - magnitude / magnitude.mean()).clamp(0.5, 1.5) * noise
        return factors

    start = by_definition()
    assert stats.kstest(noise.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.001
    torch.testing.assert_close(factors_of(bio, "0"), start)
    with torch.no_grad():
        weight.copy_(torch.randn(300, 300, generator=torch.Generator().manual_seed(1)))
    bio.update_fuzzy_learning_rates()
    torch.testing.assert_close(factors_of(bio, "0"), by_definition() if dynamic else start)
    assert not torch.allclose(by_definition(), start)
    assert torch.equal(state.noise, noise)


class Units(nn.Module):
    """A layer whose units' mean activity is known and differs widely."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 64)
        self.fc2 = nn.Linear(64, 2)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(2)
            self.fc1.weight.copy_(torch.randn(64, 8, generator=generator) * 0.3)
            self.fc1.bias.copy_(torch.linspace(-1, 2, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("front_door", ["converter", "transform"])
def test_activity_is_that_of_the_units_and_rests_in_eval(front_door: str) -> None:
    config = biofx.BioConfig(fuzzy_lr_distribution=Distribution.ACTIVITY, fuzzy_lr_dynamic=True)
    model = Units()
    bio = (
        biofx.BioConverter(config)(model) if front_door == "converter" else biofx.transform(model, config)[0]
    )
    state = bio.fc1.bio_mod
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        bio(torch.randn(16, 8, generator=generator))
    truth = torch.relu(model.fc1(torch.randn(100_000, 8, generator=generator))).mean(0).detach()
    assert torch.corrcoef(torch.stack([state.activity, truth]))[0, 1] > 0.95
    seen = state.activity.clone()
    bio.eval()
    bio(torch.full((4, 8), 100.0))
    assert torch.equal(state.activity, seen)
    bio.train()
    assert state.update_fuzzy_learning_rates() == 64 * 8
    reach = 0.16 * (2 - seen / seen.mean()).clamp(0.5, 1.5)
    torch.testing.assert_close(state.fuzzy_learning_rate_parameters, 1 + reach[:, None] * state.noise)
    # busy units become stable, and quiet ones vary more
    spread = (state.fuzzy_learning_rate_parameters - 1).abs().mean(1)
    assert spread[truth > truth.median()].mean() < spread[truth < truth.median()].mean()


def test_activity_of_a_layer_that_was_never_observed_counts_as_even() -> None:
    config = biofx.BioConfig(fuzzy_lr_distribution=Distribution.ACTIVITY, fuzzy_lr_dynamic=True)
    bio = biofx.BioConverter(config)(Units())
    before = factors_of(bio, "fc1").clone()
    bio.update_fuzzy_learning_rates()
    assert torch.equal(factors_of(bio, "fc1"), before)


@pytest.mark.parametrize("granularity", ["element", "neuron", "layer"])
@pytest.mark.parametrize("distribution", list(Distribution))
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(6, 4), (4, 1)),
        (nn.Conv2d(6, 4, 3, groups=2), (4, 1, 1, 1)),
        (nn.ConvTranspose1d(6, 4, 3), (1, 4, 1)),
        (nn.ConvTranspose1d(6, 4, 3, groups=2), (1, 2, 1)),
    ],
    ids=["linear", "grouped", "transposed", "grouped transposed"],
)
def test_granularity_says_what_shares_a_factor(
    layer: nn.Module, size: tuple[int, ...], distribution: Distribution, granularity: str
) -> None:
    config = biofx.BioConfig(
        fuzzy_lr_distribution=distribution, fuzzy_lr_dynamic=True, fuzzy_lr_update_freq=1
    ).replace(fuzzy_lr_granularity=granularity)
    bio = biofx.BioConverter(config)(nn.Sequential(layer))
    weight = bio.get_parameter("0.weight")
    shape = {"element": tuple(weight.shape), "neuron": size, "layer": (1,) * weight.dim()}[granularity]
    assert factors_of(bio, "0").shape == shape
    x = torch.ones(2, 6) if isinstance(layer, nn.Linear) else torch.ones(2, 6, *(5,) * (weight.dim() - 2))
    bio(x).sum().backward()
    bio.update_fuzzy_learning_rates()
    assert factors_of(bio, "0").shape == shape
    assert weight.grad is not None
    plain = weight.grad.clone()
    bio.fuzzy_learning_rates()
    torch.testing.assert_close(weight.grad, plain * factors_of(bio, "0"))


def test_coarse_weight_adaptive_factors_follow_the_mean_magnitude() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    assert pooled_magnitude(weight, "neuron", 0).tolist() == [[2.0], [0.5]]
    assert pooled_magnitude(weight, "neuron", 1).tolist() == [[0.75, 1.75]]
    assert pooled_magnitude(weight, "layer", 0).tolist() == [[1.25]]
    assert torch.equal(pooled_magnitude(weight, "element", 0), weight.abs())


def test_smallness_is_bounded_and_even_where_all_is_zero() -> None:
    assert relative_smallness(torch.tensor([0.0, 1.0, 2.0, 5.0])).tolist() == [1.5, 1.5, 1.0, 0.5]
    assert relative_smallness(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_following_factors_redraw_their_random_part_where_it_leaves_the_bounds() -> None:
    noise = torch.linspace(-1, 1, COUNT)
    inside = (0.5 * noise >= -0.2) & (0.5 * noise <= 0.3)
    kept = noise.clone()
    factors = following_factors(noise, 1.0, nu=0.5, low=0.8, high=1.3, generator=generator_for(0, "w"))
    assert torch.equal(noise[inside], kept[inside])
    torch.testing.assert_close(factors, 1 + 0.5 * noise)
    # rounding of 1 + x may step on a bound, and not past it
    assert factors.min() >= 0.8
    assert factors.max() <= 1.3
    redrawn = factors[~inside].double().numpy()
    assert stats.kstest(redrawn, stats.uniform(0.8, 0.5).cdf).pvalue > 0.001


def test_bounds_without_room_for_following_factors_are_refused() -> None:
    with pytest.raises(OptionError, match=r"leave room for factors that vary by up to 0\.5"):
        following_factors(torch.ones(100), 1.0, nu=0.5, low=1.0, high=1.0, generator=generator_for(0, "w"))


@pytest.mark.parametrize("front_door", ["converter", "transform"])
def test_layer_adaptive_spread_falls_to_a_half_from_the_first_layer_to_the_last(front_door: str) -> None:
    config = biofx.BioConfig(fuzzy_lr_distribution=Distribution.LAYER_ADAPTIVE)
    sizes = (500, 500, 500, 500)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    bio = (
        biofx.BioConverter(config)(model) if front_door == "converter" else biofx.transform(model, config)[0]
    )
    first, middle, last = (factors_of(bio, name).std().item() for name in "012")
    assert last / first == pytest.approx(0.50, abs=0.01)
    assert middle / first == pytest.approx(0.75, abs=0.01)


class Backwards(nn.Module):
    """Layers that run in another order than they are listed in."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(300, 300)
        self.first = nn.Linear(300, 300)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def test_depth_is_the_order_of_execution() -> None:
    bio = biofx.BioConverter(fuzzy_lr_distribution=Distribution.LAYER_ADAPTIVE)(Backwards())
    ratio = factors_of(bio, "last").std() / factors_of(bio, "first").std()
    assert ratio.item() == pytest.approx(0.50, abs=0.01)


def test_converter_and_transform_draw_the_same_factors() -> None:
    model = Units()
    for distribution in Distribution:
        if distribution is Distribution.BASELINE:
            continue
        config = biofx.BioConfig(fuzzy_lr_distribution=distribution, seed=4)
        converted, transformed = biofx.BioConverter(config)(model), biofx.transform(model, config)[0]
        for layer in ("fc1", "fc2"):
            assert torch.equal(factors_of(converted, layer), factors_of(transformed, layer)), distribution


@pytest.mark.parametrize("distribution", [Distribution.TEMPORAL, Distribution.WEIGHT_ADAPTIVE])
@pytest.mark.parametrize("granularity", ["element", "neuron"])
def test_what_crystallization_dampened_stays_dampened_while_factors_change(
    distribution: Distribution, granularity: str
) -> None:
    config = biofx.BioConfig(
        fuzzy_lr_distribution=distribution,
        fuzzy_lr_dynamic=True,
        fuzzy_lr_update_freq=1,
        fuzzy_lr_granularity=granularity,
        crystal_thresh=10.0,
    )
    free, bio = (biofx.BioConverter(config)(nn.Sequential(nn.Linear(10, 10, bias=False))) for _ in range(2))
    with torch.no_grad():
        bio.get_parameter("0.weight").copy_(free.get_parameter("0.weight"))
    weight = bio.get_parameter("0.weight")
    weight.grad = torch.zeros_like(weight)
    weight.grad[:5] = 1e-6
    for _ in range(3):
        assert bio.crystallize() == {"0.weight": 50}
    for _ in range(20):
        for model in (free, bio):
            model.update_fuzzy_learning_rates()
    expected = factors_of(free, "0").expand(10, 10) * torch.where(weight.grad > 0, 0.6**3, 1.0)
    torch.testing.assert_close(factors_of(bio, "0"), expected)
    for _ in range(30):
        bio.crystallize()
        bio.update_fuzzy_learning_rates()
        assert factors_of(bio, "0")[:5].min() >= 0.01
    bio.crystallize()
    assert (factors_of(bio, "0")[:5] == 0.01).all()


@pytest.mark.parametrize("cut", [0, 1, 7, BLOCK, BLOCK + 3])
def test_parts_evolve_as_the_whole_does(cut: int) -> None:
    before = torch.randn(BLOCK + 10).mul(0.1).add(1)
    options: dict[str, Any] = {"correlation": 0.5, "nu": 0.1, "low": 0.8, "high": 1.2}
    whole = before.clone()
    evolve(whole, generator=generator_for(0, "w", purpose="evolve"), **options)
    places = (slice(0, cut), slice(cut, len(before)))
    parts = [before[place].clone() for place in places]
    for part, place in zip(parts, places, strict=True):
        generator = generator_for(0, "w", purpose="evolve")
        evolve(part, generator=generator, place=place, total=len(before), **options)
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, before)
