from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

import biofx
from biofx.operators.sampling import generator_for
from biofx.plasticity.rate_rules import volume_factors

WEIGHT = torch.tensor([[0.0, -1.0, 2.0], [5.0, 0.5, -3.5]])  # the mean of |w| is 2


def test_formula_by_hand() -> None:
    factors = volume_factors(
        WEIGHT, base=0.1, stability=3.0, variability=0.0, generator=generator_for(0, "w")
    )
    by_hand = [
        [0.1 * math.exp(-3 * 0 / 2), 0.1 * math.exp(-3 * 1 / 3), 0.1 * math.exp(-3 * 2 / 4)],
        [0.1 * math.exp(-3 * 5 / 7), 0.1 * math.exp(-3 * 0.5 / 2.5), 0.1 * math.exp(-3 * 3.5 / 5.5)],
    ]
    torch.testing.assert_close(factors, torch.tensor(by_hand))


def test_noise_is_the_magnitude_of_a_normal_variable_around_one() -> None:
    weight = torch.randn(1000, 500, generator=torch.Generator().manual_seed(0))
    smooth, rough = (
        volume_factors(weight, base=1.0, stability=2.0, variability=v, generator=generator_for(0, "w"))
        for v in (0.0, 0.4)
    )
    noise = (rough / smooth).flatten().double().numpy()
    assert stats.kstest(noise, stats.foldnorm(1 / 0.4, scale=0.4).cdf).pvalue > 0.001


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_rule_means_the_same_at_any_scale_of_the_weights(scale: float) -> None:
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    same = [
        volume_factors(w, base=0.1, stability=2.0, variability=0.2, generator=generator_for(0, "w"))
        for w in (weight, weight * scale)
    ]
    torch.testing.assert_close(same[0], same[1])
    assert torch.corrcoef(torch.stack([weight.abs().flatten(), same[0].flatten()]))[0, 1] < -0.5


@pytest.mark.parametrize("variability", [0.0, 0.2])
def test_without_a_base_the_mean_is_one_and_the_shape_the_same(variability: float) -> None:
    factors = [
        volume_factors(
            WEIGHT, base=base, stability=2.0, variability=variability, generator=generator_for(0, "w")
        )
        for base in (None, 0.1)
    ]
    assert factors[0].mean().item() == pytest.approx(1)
    torch.testing.assert_close(factors[0], factors[1] / factors[1].mean())


def test_weights_of_zero_all_get_the_base() -> None:
    factors = volume_factors(
        torch.zeros(3, 3), base=0.1, stability=2.0, variability=0.0, generator=generator_for(0, "w")
    )
    torch.testing.assert_close(factors, torch.full((3, 3), 0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_are_of_the_weights_kind_and_any_memory_format(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"base": 0.1, "stability": 2.0, "variability": 0.2}
    plain = volume_factors(weight, generator=generator_for(0, "w"), **options)
    strided = volume_factors(
        weight.to(memory_format=torch.channels_last), generator=generator_for(0, "w"), **options
    )
    assert plain.dtype == dtype
    assert plain.shape == weight.shape
    assert torch.equal(plain, strided)


def test_method_multiplies_the_gradient_anew_at_every_call() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    config = biofx.BioConfig(base_lr=0.3, stability_factor=1.5, lr_variability=0.1, seed=7)
    bio = biofx.BioConverter(config)(model)
    drawn = []
    for event in range(2):
        bio.zero_grad()
        bio(torch.ones(3, 20)).square().sum().backward()
        gradient = bio.get_parameter("0.weight").grad
        assert gradient is not None
        plain = gradient.clone()
        assert bio.volume_dependent_lr() == {"0.weight": 400, "2.weight": 100}
        expected = volume_factors(
            model.get_parameter("0.weight").detach(),
            base=0.3,
            stability=1.5,
            variability=0.1,
            generator=generator_for(7, "0.weight", event, purpose="volume"),
        )
        assert torch.equal(gradient, plain * expected)
        drawn.append(expected)
    assert not torch.equal(drawn[0], drawn[1])
