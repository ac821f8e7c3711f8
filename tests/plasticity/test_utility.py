"""Turnover of weights by the running mean of |weight · gradient|."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import PlasticityError
from biofx.operators.sampling import generator_for
from biofx.plasticity.rejuvenation import rejuvenate
from biofx.plasticity.selection import Utility

UTILITY = {"rejuvenation_utility": "gradient", "rejuvenation_utility_decay": 0.75}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))


def made(model: nn.Module | None = None, front_door: str = "transform", **options: Any) -> Any:
    config = biofx.BioConfig(**{**UTILITY, **options})
    model = net() if model is None else model
    return (
        biofx.transform(model, config)[0] if front_door == "transform" else biofx.BioConverter(config)(model)
    )


def batch(step: int) -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))


def train(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step).to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("decay", [0.75, 0.0])
@pytest.mark.parametrize("front_door", ["transform", "convert"])
@pytest.mark.parametrize("splitting", [{}, {"weight_splitting_Gamma": 2, "weight_splitting_rates": "mean"}])
def test_the_mean_by_hand(front_door: str, decay: float, splitting: Any) -> None:
    """Gradients of the model's own function, without the factors that act on them."""
    bio = made(net().double(), front_door, rejuvenation_utility_decay=decay, **splitting)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.05)
    biofx.attach(bio, optimizer)
    expected: Tensor | None = None
    level = bio.get_submodule("2").bio_mod.gradient_level
    assert (level == 1) == (not splitting)
    for step in range(4):
        bare = copy.deepcopy(bio)
        for state in (module.bio_mod for module in bare.modules() if hasattr(module, "bio_mod")):
            state.fuzzy_learning_rate_parameters.fill_(1.0)
        bare.zero_grad()
        bare(batch(step).double()).square().mean().backward()
        weight = bare.get_parameter("2.weight")
        product = (weight * weight.grad).abs().detach() / level
        expected = product if expected is None else decay * expected + (1 - decay) * product
        train(bio, optimizer, range(step, step + 1))
        torch.testing.assert_close(bio.get_submodule("2").bio_mod.utility, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", [{}, {"turnover": 0.2}, {"turnover": 0.9}])
@pytest.mark.parametrize("power", [1, 4])
def test_each_utility_has_its_own_chance(given: Any, power: int) -> None:
    weight = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    values = torch.rand(400, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** power
    utility = values * 1e-9
    kept = utility.clone()
    places = rejuvenate(
        weight, protection=3.0, generator=generator_for(0, "w"), utility=Utility(utility, **given)
    )
    replaced = torch.zeros(weight.numel(), dtype=torch.bool)
    replaced[places] = True
    if given:
        assert replaced.double().mean().item() == pytest.approx(given["turnover"], abs=0.01)
        low, high = 1e-6, 1e6
        for _ in range(200):
            scale = math.sqrt(low * high)
            low, high = (scale, high) if (-values / scale).exp().mean() < given["turnover"] else (low, scale)
    else:
        scale = values.square().mean().sqrt().item() / 3
    flat = values.flatten()
    for start in range(8):
        inside = (flat >= start / 8) & (flat < (start + 1) / 8)
        chance = (-flat[inside] / scale).exp()
        deviation = (chance * (1 - chance)).sum().sqrt()
        assert abs(replaced[inside].sum() - chance.sum()) < 4 * deviation + 0.01 * chance.sum() + 1
    assert torch.equal(utility.flatten()[~replaced], kept.flatten()[~replaced])
    torch.testing.assert_close(
        utility.flatten()[replaced], kept.flatten()[~replaced].mean().expand(len(places)), rtol=1e-9, atol=0
    )


def test_weights_of_dead_units_go_where_magnitudes_would_protect_them() -> None:
    model: Any = net()
    with torch.no_grad():
        model[0].bias[:10] = -1e3  # never active
        model[0].weight[:10] *= 50
    lost = {}
    for kind in ("gradient", "magnitude"):
        bio = made(model, rejuvenation_utility=kind, rejuvenation_redraw="initial")
        optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
        biofx.attach(bio, optimizer, [biofx.Rule("rejuvenate_weights", every=100, after=2)])
        before = bio.get_parameter("0.weight").detach().clone()
        train(bio, optimizer, range(3))
        lost[kind] = (bio.get_parameter("0.weight")[:10] != before[:10]).double().mean().item()
    assert lost["gradient"] == 1
    assert lost["magnitude"] < 0.5


def test_a_factor_of_0_and_frozen_weights_stay_to_the_bit() -> None:
    bio = made(fuzzy_lr_min=0.0, rejuvenation_turnover=0.9)
    bio.get_submodule("0").bio_mod.fuzzy_learning_rate_parameters[:10] = 0
    bio.get_parameter("2.weight").requires_grad_(False)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer, ["rejuvenate_weights"])
    before = {name: p.detach().clone() for name, p in bio.named_parameters()}
    train(bio, optimizer, range(3))
    assert torch.equal(bio.get_parameter("0.weight")[:10], before["0.weight"][:10])
    assert torch.equal(bio.get_parameter("2.weight"), before["2.weight"])
    assert (bio.get_parameter("0.weight")[10:] != before["0.weight"][10:]).double().mean() > 0.9


def test_without_a_gradient_there_is_nothing_to_judge_by() -> None:
    bio = made(front_door="convert")
    with pytest.raises(PlasticityError, match="and no gradient has been seen"):
        bio.rejuvenate_weights()
    bio(batch(0)).square().mean().backward()
    for layer in ("0", "2", "4"):
        bio.get_submodule(layer).bio_mod.observe_utility()
    assert min(bio.rejuvenate_weights().values()) > 0


def test_connections_of_little_use_move() -> None:
    bio = made(weight_density=0.25, rejuvenation_turnover=0.3, rejuvenation_redraw="initial")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer, [biofx.Rule("rejuvenate_weights", every=100, after=2)])
    state = bio.get_submodule("2").bio_mod
    old = state.connection_mask == 1
    train(bio, optimizer, range(2))
    before, weight = state.utility.clone(), state.masked_weight.clone()
    train(bio, optimizer, range(2, 3))
    new = state.connection_mask == 1
    assert new.sum() == old.sum()
    gone, stayed = old & ~new, old & new & (state.weight == weight)
    assert 0.15 < gone.sum() / old.sum() < 0.45
    assert before[gone].mean() < before[stayed].mean() / 2
    grown = new & ~old
    torch.testing.assert_close(
        state.utility[grown], state.utility[stayed].mean().expand(int(grown.sum())), rtol=1e-4, atol=0
    )
    assert (state.masked_weight[~new] == 0).all()
    assert biofx.check(bio).ok


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("front_door", ["transform", "convert"])
def test_a_resumed_run_goes_on_to_the_bit(front_door: str, density: float, tmp_path: Any) -> None:
    rule = biofx.Rule("rejuvenate_weights", every=2)

    def start() -> Any:
        bio = made(net(), front_door, weight_density=density, apply_dales_principle=True)
        optimizer = torch.optim.AdamW(bio.parameters(), lr=1e-2)
        return bio, optimizer, biofx.attach(bio, optimizer, [rule])

    bio, optimizer, plasticity = start()
    train(bio, optimizer, range(3))
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity)
    train(bio, optimizer, range(3, 8))
    resumed, other, attachment = start()
    train(resumed, other, range(1))
    biofx.load(tmp_path / "run.pt", resumed, optimizer=other, plasticity=attachment)
    train(resumed, other, range(3, 8))
    plain: Any = biofx.load(tmp_path / "run.pt", net())
    assert plain.get_submodule("2").bio_mod.utility is not None
    for name, value in bio.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_state_dict_depends_on_the_config_alone() -> None:
    bio = made()
    before = {name: value.shape for name, value in bio.state_dict().items()}
    assert before["2.bio_mod.utility"] == (40, 40)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer, ["rejuvenate_weights"])
    train(bio, optimizer, range(2))
    assert {name: value.shape for name, value in bio.state_dict().items()} == before
    plain = made(rejuvenation_utility="magnitude").state_dict()
    assert not any(name.endswith("utility") for name in plain)
    assert set(before) - set(plain) == {f"{layer}.bio_mod.utility" for layer in (0, 2, 4)}
    missing = bio.load_state_dict(net().state_dict(), strict=False).missing_keys  # the original's
    assert not any("utility" in name for name in missing)


def test_gradients_that_are_not_finite_are_left_out() -> None:
    bio = made()
    state = bio.get_submodule("2").bio_mod
    state.weight.grad = torch.ones(40, 40)
    state.observe_utility()
    before = state.utility.clone()
    state.weight.grad = torch.full((40, 40), math.nan)
    state.observe_utility()
    assert torch.equal(state.utility, before)


def test_each_few_steps_or_only_when_it_matters() -> None:
    """Every third gradient is seen; with a decay of 0, that of the step at which weights are replaced."""
    rule = biofx.Rule("rejuvenate_weights", every=4, after=2)
    for options, rules, seen in (
        ({"rejuvenation_utility_every": 3}, [], [0, 3, 6]),
        ({"rejuvenation_utility_every": 3}, [biofx.Rule("rejuvenate_weights", after=100)], [0, 3, 6]),
        ({"rejuvenation_utility_decay": 0.0}, [rule], [2, 6]),
        ({"rejuvenation_utility_decay": 0.0}, [], list(range(7))),
    ):
        bio = made(rejuvenation_turnover=1e-3, **options)
        optimizer = torch.optim.SGD(bio.parameters(), lr=0.05)
        biofx.attach(bio, optimizer, rules)
        utility, changed = bio.get_submodule("2").bio_mod.utility, []
        for step in range(7):
            before = utility.clone()
            train(bio, optimizer, range(step, step + 1))
            if (utility != before).double().mean() > 0.1:
                changed.append(step)
        assert changed == seen, options


def test_the_mean_follows_weights_in_any_layout() -> None:
    """Utilities go into channels_last with their weights, and are no view of one row then."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Flatten()).double()
    bios = [made(conv, fuzzy_lr_distribution="baseline") for _ in range(2)]
    bios[1].to(memory_format=torch.channels_last)
    x = torch.randn(4, 2, 3, 6, 6, dtype=torch.float64)
    for bio in bios:
        optimizer = torch.optim.SGD(bio.parameters(), lr=0.05)
        biofx.attach(bio, optimizer)
        for each in x:
            optimizer.zero_grad()
            bio(each).square().mean().backward()
            optimizer.step()
    plain, other = (bio.get_submodule("2").bio_mod.utility for bio in bios)
    assert not other.is_contiguous()
    assert (plain > 0).all()
    torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-15)


def test_seeds() -> None:
    weights = []
    for seed in (0, 0, 1):
        bio = made(seed=seed, fuzzy_lr_distribution="baseline")
        optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
        biofx.attach(bio, optimizer, ["rejuvenate_weights"])
        train(bio, optimizer, range(2))
        weights.append(bio.get_parameter("2.weight").detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
