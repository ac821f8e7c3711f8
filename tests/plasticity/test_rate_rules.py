from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import biofx
from biofx.errors import PlasticityError
from biofx.operators.sampling import generator_for
from biofx.plasticity.rate_rules import crystallize, volume_factors

OPTIONS = {"threshold": 0.1, "dampening": 0.5, "floor": 0.01}


def caught_by_definition(weight: Tensor, gradient: Tensor, threshold: float) -> list[bool]:
    """The criteria, synapse by synapse."""
    weights, gradients = weight.flatten().tolist(), gradient.flatten().tolist()
    mean = sum(abs(w) for w in weights) / len(weights)
    return [
        abs(g) > 0 and ((w != 0 and abs(g) / abs(w) < threshold) or abs(g) > mean)
        for w, g in zip(weights, gradients, strict=True)
    ]


def test_criteria_case_by_case() -> None:
    weight = torch.tensor([4.0, -4.0, 4.0, -1.0, 1.0, 2.0, 0.0, 0.0])  # mean |w| is 2
    gradient = torch.tensor([0.39, 0.41, 0.0, 2.1, -1.9, -2.5, 0.0, 1e-3])
    factors = torch.ones(8)
    assert crystallize(weight, gradient, factors, **OPTIONS) == 3
    # settled; just not settled; dead; shaken; just not shaken; shaken; dead and zero; zero but alive
    assert factors.tolist() == [0.5, 1.0, 1.0, 0.5, 1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_criteria_against_the_definition(seed: int, memory: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 6, 5, 5, generator=generator).to(memory_format=memory)
    gradient = torch.randn(8, 6, 5, 5, generator=generator) * weight.abs().mean() * 0.5
    gradient[torch.rand(8, 6, 5, 5, generator=generator) < 0.2] = 0
    before = torch.rand(8, 6, 5, 5, generator=generator) + 0.5
    factors = before.clone(memory_format=memory)
    caught = torch.tensor(caught_by_definition(weight, gradient, 0.1)).view_as(weight)
    assert 0 < caught.sum() < caught.numel()
    pointer = factors.data_ptr()
    kept = weight.clone(), gradient.clone()
    assert crystallize(weight, gradient, factors, **OPTIONS) == caught.sum()
    assert torch.equal(factors, torch.where(caught, before * 0.5, before))
    assert factors.data_ptr() == pointer
    assert torch.equal(weight, kept[0])
    assert torch.equal(gradient, kept[1])


def test_criteria_hold_across_a_large_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 700, 800, generator=generator)
    factors = torch.ones(700, 800)
    magnitude, strength = weight.abs().double(), gradient.abs().double()
    caught = (strength / magnitude < 0.1) | (strength > magnitude.mean())
    assert abs(crystallize(weight, gradient, factors, **OPTIONS) - int(caught.sum())) <= 1
    assert ((factors == 0.5) != caught).sum() <= 1  # one gradient may round onto the mean


def test_floor_is_held_after_ten_thousand_calls() -> None:
    weight, gradient = torch.full((4, 4), 2.0), torch.full((4, 4), 1e-3)
    gradient[0] = 0
    factors = torch.full((4, 4), 1.3)
    for _ in range(10_000):
        assert crystallize(weight, gradient, factors, threshold=0.1, dampening=0.6, floor=0.01) == 12
    assert (factors[0] == 1.3).all()
    assert (factors[1:] == torch.tensor(0.01)).all()


def test_factors_that_start_below_the_floor_are_not_raised() -> None:
    factors = torch.tensor([0.001, 0.0])
    crystallize(torch.ones(2), torch.full((2,), 1e-3), factors, **OPTIONS)
    assert factors.tolist() == [pytest.approx(0.001), 0.0]


class HalfDead(nn.Module):
    """Units 4 to 7 never fire, so no gradient ever reaches their synapses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.fc1.bias[4:] = -100

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


def test_dead_units_are_never_caught() -> None:
    bio = biofx.BioConverter(crystal_thresh=1e6, fuzzy_learning_rate_factor_nu=0.0)(HalfDead())
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        optimizer.zero_grad()
        bio(torch.randn(16, 4, generator=generator)).square().mean().backward()
        bio.crystallize()
        bio.fuzzy_learning_rates()
        optimizer.step()
    factors = bio.fc1.bio_mod.fuzzy_learning_rate_parameters
    assert (factors[4:] == 1).all()
    assert (factors[:4] < 1).all()
    assert (bio.fc2.bio_mod.fuzzy_learning_rate_parameters[:, 4:] == 1).all()


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 3))


def test_model_with_scaling_in_its_graph_is_judged_by_its_unscaled_gradient() -> None:
    """With factors that spread this widely, the scaled gradient would catch others."""
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    config = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.9, fuzzy_lr_min=0.1, crystal_thresh=0.02)
    plain = mlp()
    plain(x).square().mean().backward()
    bio, _ = biofx.transform(plain, config)
    bio(x).square().mean().backward()
    for path in ("0", "2"):
        weight = plain.get_parameter(f"{path}.weight")
        scaled = bio.get_parameter(f"{path}.weight").grad
        assert weight.grad is not None
        assert scaled is not None
        state = bio.get_submodule(path).bio_mod
        assert isinstance(state, biofx.BioModule)
        before = state.fuzzy_learning_rate_parameters
        assert before is not None
        before, kept = before.clone(), scaled.clone()
        caught = torch.tensor(caught_by_definition(weight, weight.grad, 0.02)).view_as(weight)
        misled = torch.tensor(caught_by_definition(weight, scaled, 0.02)).view_as(weight)
        assert state.crystallize() == caught.sum()
        assert state.fuzzy_learning_rate_parameters is not None
        torch.testing.assert_close(
            state.fuzzy_learning_rate_parameters, torch.where(caught, before * 0.6, before)
        )
        assert torch.equal(scaled, kept)
        assert not torch.equal(caught, misled)


def test_shared_factors_are_dampened_for_each_synapse_and_stay_shared() -> None:
    bio = biofx.BioConverter(fuzzy_lr_granularity="neuron", crystal_thresh=0.1)(mlp())
    weight = bio.get_parameter("0.weight")
    state = bio.get_submodule("0").bio_mod
    shared = state.fuzzy_learning_rate_parameters.clone()
    weight.grad = torch.zeros_like(weight)
    weight.grad[2, 3] = weight[2, 3].detach() * 0.01
    assert bio.get_submodule("0").bio_mod.crystallize() == 1
    expected = shared.expand(30, 6).clone()
    expected[2, 3] *= 0.6
    torch.testing.assert_close(state.acting_factors, expected)
    assert torch.equal(state.fuzzy_learning_rate_parameters, shared)


def test_needs_a_gradient_and_factors() -> None:
    bio = biofx.BioConverter()(mlp())
    with pytest.raises(PlasticityError, match=r"0\.weight: its weight has no gradient"):
        bio.crystallize()
    with pytest.raises(PlasticityError, match=r"cannot act on '0\.weight': its weight has no gradient"):
        bio.get_submodule("0").bio_mod.crystallize()
    plain, _ = biofx.transform(mlp(), biofx.BioConfig(fuzzy_lr_distribution="baseline"))  # type: ignore[arg-type]
    plain(torch.ones(1, 6)).sum().backward()
    with pytest.raises(PlasticityError, match="it has no learning-rate factors"):
        plain.crystallize()


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
    options: dict[str, Any] = {"base": 0.1, "stability": 2.0, "variability": 0.2}
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
