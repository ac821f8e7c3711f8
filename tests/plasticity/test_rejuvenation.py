from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

import biofx
from biofx import OptionError
from biofx.errors import NonFiniteWeightError
from biofx.operators.sampling import generator_for
from biofx.plasticity.rejuvenation import check_finite, expected_turnover, protection_for, rejuvenate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def apply(weight: Tensor, protection: float = 8.0, *, seed: int = 0, sign: Tensor | None = None) -> Tensor:
    return rejuvenate(weight, protection=protection, generator=generator_for(seed, "w"), sign=sign)


WEIGHTS = {
    "normal": normal(1000, 1000),
    "uniform": torch.rand(700, 700, generator=torch.Generator().manual_seed(1)) - 0.5,
    "heavy tails": normal(600, 600, seed=2) ** 3,
    "few": normal(7, 5, seed=3),
    "convolution": normal(64, 32, 3, 3, seed=4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("protection", [0.5, 8.0, 40.0])
@pytest.mark.parametrize("name", WEIGHTS)
def test_turnover_is_the_closed_form_summed_over_the_weights(name: str, protection: float) -> None:
    weight = WEIGHTS[name].clone()
    chance = (-protection * weight.double().abs() / weight.double().std(correction=0)).exp()
    expected, deviation = chance.sum().item(), (chance * (1 - chance)).sum().sqrt().item()
    assert abs(len(apply(weight, protection)) - expected) < 4 * deviation


@pytest.mark.parametrize("protection", [1.0, 8.0])
def test_each_size_of_weight_has_its_own_chance(protection: float) -> None:
    """Not only the total: in every class of sizes the turnover is exp(-d |w| / std)."""
    weight = WEIGHTS["normal"].clone()
    relative = weight.double().abs().flatten() / weight.double().std(correction=0)
    replaced = torch.zeros(weight.numel())
    replaced[apply(weight, protection)] = 1
    edges = torch.linspace(0, 4 / protection, 17)
    for low, high in itertools.pairwise(edges):
        inside = (relative >= low) & (relative < high)
        chance = (-protection * relative[inside]).exp()
        deviation = (chance * (1 - chance)).sum().sqrt()
        assert abs(replaced[inside].sum() - chance.sum()) < 4 * deviation


@pytest.mark.parametrize("protection", [0.1, 1.0, 8.0, 30.0])
def test_expected_turnover_of_normal_weights(protection: float) -> None:
    closed = special.erfcx(protection / math.sqrt(2))
    assert expected_turnover(protection) == pytest.approx(closed)
    chance = (-protection * WEIGHTS["normal"].double().abs() / 0.05).exp()
    assert chance.mean().item() == pytest.approx(closed, rel=0.02)
    assert protection_for(expected_turnover(protection)) == pytest.approx(protection)


@pytest.mark.parametrize("turnover", [0.01, 0.1, 0.5])
def test_turnover_may_be_asked_for(turnover: float) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    model.get_parameter("0.weight").data = WEIGHTS["normal"].clone()
    bio = biofx.BioConverter(rejuvenation_turnover=turnover)(model)
    count = bio.rejuvenate_weights()["0.weight"]
    assert count / 1e6 == pytest.approx(turnover, rel=0.02)


def test_turnover_of_one_replaces_everything() -> None:
    bio = biofx.BioConverter(rejuvenation_turnover=1.0)(nn.Sequential(nn.Linear(20, 30)))
    assert bio.rejuvenate_weights() == {"0.weight": 600}


@pytest.mark.parametrize("turnover", [0.0, -0.1, 1.1, math.nan])
def test_impossible_turnover_is_refused(turnover: float) -> None:
    with pytest.raises(OptionError, match=r"expected a fraction in \(0, 1\]"):
        protection_for(turnover)


@pytest.mark.parametrize("name", WEIGHTS)
def test_everything_else_stays_to_the_bit_and_where_it_is(name: str) -> None:
    weight = WEIGHTS[name].clone()
    before, pointer, strides = weight.clone(), weight.data_ptr(), weight.stride()
    replaced = apply(weight, 2.0)
    untouched = torch.ones(weight.numel(), dtype=torch.bool)
    untouched[replaced] = False
    assert torch.equal(weight.flatten()[untouched], before.flatten()[untouched])
    assert (weight.flatten()[replaced] != before.flatten()[replaced]).all()
    assert (weight.data_ptr(), weight.stride()) == (pointer, strides)
    assert len(replaced.unique()) == len(replaced)


def test_large_weights_are_not_clamped() -> None:
    weight = torch.cat([torch.full((10,), 50.0), torch.zeros(1000)])
    apply(weight)
    assert (weight[:10] == 50).all()


def test_new_magnitudes_are_log_normal_like_those_that_stay() -> None:
    weight = WEIGHTS["normal"].clone()
    replaced = apply(weight, 1.0)
    stays = torch.ones(weight.numel(), dtype=torch.bool)
    stays[replaced] = False
    kept = weight.flatten()[stays].double().abs().log()
    new = weight.flatten()[replaced].double().abs().log()
    fitted = stats.norm(kept.mean().item(), kept.std().item())
    assert stats.kstest(new.numpy(), fitted.cdf).pvalue > 0.001
    assert new.mean().item() == pytest.approx(kept.mean().item(), abs=4 * fitted.std() / math.sqrt(len(new)))


def test_signs_of_new_synapses_balance() -> None:
    weight = WEIGHTS["normal"].abs().clone()
    replaced = apply(weight, 1.0)
    negative = int((weight.flatten()[replaced] < 0).sum())
    assert abs(negative - len(replaced) / 2) < 4 * math.sqrt(len(replaced)) / 2
    assert (weight.flatten() < 0).sum() == negative


def test_a_units_sign_is_that_of_its_new_synapses() -> None:
    sign = torch.tensor([1, -1, 0, 1]).repeat(50)
    weight = normal(500, 200)
    before = weight.clone()
    replaced = torch.zeros(weight.numel(), dtype=torch.bool)
    replaced[apply(weight, 1.0, sign=sign.reshape(1, -1))] = True
    replaced = replaced.view_as(weight)
    for unit in (1, -1):
        grown = weight[:, sign == unit][replaced[:, sign == unit]]
        assert (grown * unit > 0).all()
        assert len(grown) > 1000
    free = weight[:, sign == 0][replaced[:, sign == 0]]
    assert abs((free > 0).double().mean() - 0.5) < 2 / math.sqrt(len(free))
    assert torch.equal(weight[~replaced], before[~replaced])


def test_dale_signs_of_a_model_hold() -> None:
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    bio = biofx.BioConverter(apply_dales_principle=True, rejuvenation_parameter_dre=0.5)(model)
    bio.enforce_dales_principle()
    weight, sign = bio.get_parameter("2.weight"), bio.get_submodule("2").bio_mod.presynaptic_signs()
    assert set(sign.tolist()) == {-1, 1}
    assert bio.rejuvenate_weights()["2.weight"] > 500
    assert (weight * sign >= 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_an_error_before_any_layer_is_changed(bad: float) -> None:
    bio = biofx.BioConverter()(nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9)))
    with torch.no_grad():
        bio.get_parameter("2.weight")[1, 2:4] = bad
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    with pytest.raises(NonFiniteWeightError, match=r"2\.weight: expected finite .* found 2 that are NaN"):
        bio.rejuvenate_weights()
    after = bio.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


def test_finite_weights_whose_sum_is_not_are_no_error() -> None:
    weight = torch.full((4,), 3e38)
    check_finite(weight, "w")
    assert weight.sum().isinf()


def test_equal_weights_have_no_spread_to_judge_by() -> None:
    weight = torch.full((5, 5), 0.3)
    assert len(apply(weight)) == 0
    assert (weight == 0.3).all()


def test_same_seed_same_result_and_the_global_state_rests() -> None:
    state = torch.get_rng_state()
    first, second, other = (normal(300, 300) for _ in range(3))
    assert torch.equal(apply(first), apply(second))
    torch.manual_seed(99)
    third = normal(300, 300)
    apply(third)
    torch.set_rng_state(state)
    apply(other, seed=1)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_event_and_every_layer_has_draws_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60))
    model.get_parameter("1.weight").data = model.get_parameter("0.weight").data.clone()
    bio = biofx.BioConverter()(model)
    start = bio.get_parameter("0.weight").detach().clone()
    bio.rejuvenate_weights()
    changed = [bio.get_parameter(f"{layer}.weight") != start for layer in (0, 1)]
    assert not torch.equal(*changed)
    with torch.no_grad():
        bio.get_parameter("0.weight").copy_(start)
    bio.rejuvenate_weights()
    assert not torch.equal(bio.get_parameter("0.weight") != start, changed[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    weight = WEIGHTS["normal"][:500].to(dtype)
    before = weight.clone()
    chance = (-8 * weight.double().abs() / weight.double().std(correction=0)).exp()
    replaced = apply(weight)
    # the spread of a half-precision weight is itself known to half precision only
    allowed = 4 * (chance * (1 - chance)).sum().sqrt() + chance.sum() * torch.finfo(dtype).eps
    assert abs(len(replaced) - chance.sum()) < allowed
    assert weight.isfinite().all()
    assert (weight != before).sum() <= len(replaced)
