"""Which weights a turnover replaces, against the definition written out with sorted lists."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.operators.sampling import generator_for
from biofx.plasticity.connections import ConnectionLayout
from biofx.plasticity.initial_weights import InitialWeights
from biofx.plasticity.rejuvenation import rejuvenate
from biofx.plasticity.selection import BelowMean, LowestShare, Utility
from biofx.plasticity.turnover import turn_over

INITIAL = InitialWeights(is_normal=False, std=0.1)
PROPORTION = {"rejuvenation_selection": "proportion", "rejuvenation_turnover": 0.1}
THRESHOLD = {"rejuvenation_selection": "threshold", "rejuvenation_threshold": 0.2}
SELECTIONS: dict[str, dict[str, Any]] = {
    "probability": {"rejuvenation_turnover": 0.5},
    "proportion": {"rejuvenation_selection": "proportion", "rejuvenation_turnover": 0.5},
    "threshold": {"rejuvenation_selection": "threshold", "rejuvenation_threshold": 1.0},
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def positions(values: Tensor) -> list[int]:
    """The positions of all, the lowest first."""
    flat = values.abs().flatten().tolist()
    return sorted(range(len(flat)), key=lambda place: flat[place])


def due(start: float = 0.0) -> Tensor:
    return torch.tensor(start, dtype=torch.float64)


@pytest.mark.parametrize("by_utility", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_exactly_the_lowest_share_goes(by_utility: bool, held: bool) -> None:
    weight, values = made(30, 20), made(30, 20, seed=1).abs()
    stays = torch.rand(30, 20, generator=seeded(2)) < 0.4 if held else None
    before, known = weight.clone(), values.clone()
    replaced = rejuvenate(
        weight,
        protection=8.0,
        generator=generator_for(0, "w"),
        initial=INITIAL,
        utility=Utility(values) if by_utility else None,
        stays=stays,
        selection=LowestShare(0.11, due()),
    )
    order = positions(known if by_utility else before)
    able = [place for place in order if stays is None or not stays.flatten()[place]]
    gone = sorted(able[: int(0.11 * len(able))])
    assert replaced.tolist() == gone
    assert (weight != before).flatten().nonzero().flatten().tolist() == gone
    assert weight.flatten()[gone].abs().max() <= 0.1 * 3**0.5
    if by_utility:
        kept = [place for place in range(600) if place not in gone]
        mean = sum(known.flatten()[kept].tolist()) / len(kept)
        assert values.flatten()[kept].tolist() == known.flatten()[kept].tolist()
        assert values.flatten()[gone].tolist() == pytest.approx([mean] * len(gone), abs=1e-12)
    else:
        assert torch.equal(values, known)


@pytest.mark.parametrize("by_utility", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
def test_all_at_most_a_fraction_of_the_mean_go(by_utility: bool, fraction: float) -> None:
    weight, values = made(30, 20), made(30, 20, seed=1).abs()
    weight.flatten()[:7], values.flatten()[3:9] = 0, 0
    stays = torch.rand(30, 20, generator=seeded(2)) < 0.4
    compared = (values if by_utility else weight).abs().flatten().tolist()
    able = [place for place in range(600) if not stays.flatten()[place]]
    mean = sum(compared[place] for place in able) / len(able)
    gone = [place for place in able if compared[place] <= fraction * mean]
    assert gone
    replaced = rejuvenate(
        weight,
        protection=8.0,
        generator=generator_for(0, "w"),
        utility=Utility(values) if by_utility else None,
        stays=stays,
        selection=BelowMean(fraction),
    )
    assert replaced.tolist() == gone


def test_nothing_goes_where_nothing_tells_weights_apart_or_all_stay() -> None:
    generator = generator_for(0, "w")
    assert BelowMean(1.0).choose(torch.zeros(9), generator).tolist() == []
    still = torch.full((9,), torch.inf)
    assert BelowMean(1.0).choose(still, generator).tolist() == []
    assert LowestShare(1.0, due()).choose(still, generator).tolist() == []
    assert LowestShare(1.0, due()).choose(torch.ones(9), generator).tolist() == list(range(9))


def test_among_equal_ones_chance_decides() -> None:
    values = torch.tensor([3.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
    counts = torch.zeros(10)
    for seed in range(400):
        chosen = LowestShare(0.3, due()).choose(values, seeded(seed))
        assert len(chosen) == 3
        assert torch.equal(chosen, LowestShare(0.3, due()).choose(values, seeded(seed)))
        counts[chosen] += 1
    assert counts[[0, 3, 9]].sum() == 0
    expected = 400 * 3 / 7
    assert (counts[values == 0] - expected).abs().max() < 4 * (expected * 4 / 7) ** 0.5


def test_a_fraction_of_a_weight_is_carried_over() -> None:
    weight, carried = made(10, 5), due()
    counts = []
    for _ in range(16):
        counts.append(
            len(
                rejuvenate(
                    weight,
                    protection=8.0,
                    generator=generator_for(0, "w"),
                    selection=LowestShare(1 / 128, carried),
                )
            )
        )
    assert counts == [0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1]  # floors of 50/128 a run
    assert float(carried) == 16 * 50 / 128 - 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    weight = made(20, 30).to(dtype)
    before = weight.clone()
    replaced = rejuvenate(
        weight,
        protection=8.0,
        generator=generator_for(0, "w"),
        initial=INITIAL,
        selection=LowestShare(0.1, due()),
    )
    assert len(replaced) == 60
    edge = before.abs().flatten().sort().values[59]
    assert (before.flatten()[replaced].abs() <= edge).all()


@pytest.mark.parametrize("kind", ["proportion", "threshold"])
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_connections_move_by_the_root_mean_square_of_their_gates(kind: str, growth: str) -> None:
    selection = LowestShare(0.25, due()) if kind == "proportion" else BelowMean(0.4)
    gates, units, inputs = 3, 8, 10
    weight = made(gates * units, inputs)
    mask = (torch.rand(units, inputs, generator=seeded(1)) < 0.5).float().repeat(gates, 1)
    exists = mask[:units] == 1
    stays = torch.zeros(gates * units, inputs, dtype=torch.bool)
    stays[units : units + 3] = True  # one gate of each connection of three units
    still = torch.zeros_like(exists)
    still[:3] = True
    before = weight.clone()
    strength = before.reshape(gates, units, inputs).square().mean(0).sqrt()
    able = [place for place in positions(strength) if exists.flatten()[place] and not still.flatten()[place]]
    if kind == "proportion":
        gone = able[: len(able) // 4]
    else:
        mean = sum(strength.flatten()[place].item() for place in able) / len(able)
        gone = [place for place in able if strength.flatten()[place] <= 0.4 * mean]
    assert gone
    moved = turn_over(
        weight,
        mask,
        ConnectionLayout(gates=gates),
        protection=8.0,
        generator=generator_for(0, "w"),
        gradient=made(gates * units, inputs, seed=5) if growth == "gradient" else None,
        initial=INITIAL,
        stays=stays,
        selection=selection,
    )
    now = mask[:units] == 1
    assert moved.pruned == gates * len(gone)
    assert now.sum() == exists.sum()
    stayed = exists.flatten().clone()
    stayed[gone] = False
    assert now.flatten()[stayed].all()
    assert torch.equal(now[:3], exists[:3])  # neither pruned nor grown
    unchanged = stayed.reshape(units, inputs).repeat(gates, 1)
    assert torch.equal(weight[unchanged], before[unchanged])


# on models


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))


def batch(step: int) -> Tensor:
    return torch.randn(16, 8, generator=seeded(step))


def train(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def run(rules: Any, **options: Any) -> Any:
    options = {"fuzzy_lr_min": 0.0, **options}
    if "weight_density" not in options and options.get("rejuvenation_redraw") is None:
        options["rejuvenation_redraw"] = "initial"
    bio = biofx.transform(net(), biofx.BioConfig(**options))[0]
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.05, momentum=0.9)
    return bio, optimizer, biofx.attach(bio, optimizer, rules)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("utility", ["magnitude", "gradient"])
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("redraw", ["survivors", "initial"])
def test_synapses_with_a_factor_of_0_stay_to_the_bit(
    selection: str, utility: str, density: float, redraw: str
) -> None:
    options = {"rejuvenation_utility": utility, "rejuvenation_redraw": redraw, "weight_density": density}
    bio, optimizer, _ = run(["rejuvenate_weights"], **SELECTIONS[selection], **options)
    state = bio.get_submodule("2").bio_mod
    still = torch.rand(40, 40, generator=seeded(3)) < 0.3
    state.fuzzy_learning_rate_parameters.masked_fill_(still, 0)
    before, mask = state.masked_weight.clone(), state.connection_mask
    mask = None if mask is None else mask.clone()
    train(bio, optimizer, range(3))
    assert torch.equal(state.masked_weight[still], before[still])
    assert (state.masked_weight[~still] != before[~still]).double().mean() > 0.3
    if mask is not None:
        assert torch.equal(state.connection_mask[still], mask[still])
        assert (state.connection_mask != mask).any()
    assert state.weight.isfinite().all()


@pytest.mark.parametrize("stored", ["float32", "seed"])
def test_shrinking_leaves_synapses_with_a_factor_of_0(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bio, *_ = run([], fuzzy_lr_dtype=stored)
    state = bio.get_submodule("2").bio_mod
    still = torch.rand(40, 40, generator=seeded(3)) < 0.3
    if stored == "float32":
        state.fuzzy_learning_rate_parameters.masked_fill_(still, 0)
    else:  # what is sampled is next to never exactly 0
        factors = state.fuzzy_learning_rate_parameters.clone().masked_fill(still, 0)
        monkeypatch.setattr(type(state.rate_sampling), "factors", lambda *_: factors)
    before = state.weight.detach().clone()
    assert state.shrink_and_perturb() == int((~still).sum())
    assert torch.equal(state.weight[still], before[still])
    assert (state.weight[~still] != before[~still]).all()


@pytest.mark.parametrize("options", [PROPORTION, THRESHOLD])
@pytest.mark.parametrize("utility", ["magnitude", "gradient"])
def test_a_model_replaces_what_the_definition_says(options: Any, utility: str) -> None:
    """From a step of 0, so that the utility is that of the model's own gradient at the weights seen."""
    bio, optimizer, _ = run(
        [biofx.Rule("rejuvenate_weights", every=3)],
        rejuvenation_utility=utility,
        rejuvenation_utility_decay=0.0,
        fuzzy_lr_distribution="baseline",
        **options,
    )
    optimizer.param_groups[0]["lr"] = 0.0
    plain: Any = net()
    plain(batch(0)).square().mean().backward()
    weight, gradient = plain[2].weight.detach(), plain[2].weight.grad
    compared = weight.abs() if utility == "magnitude" else (weight * gradient).abs()
    train(bio, optimizer, range(1))
    changed = bio.get_parameter("2.weight") != weight
    if options is PROPORTION:
        lowest = compared.flatten().sort().values[159]
        assert changed.sum() == 160
        assert (compared[changed] <= lowest).all()
    else:
        torch.testing.assert_close(changed, compared <= 0.2 * compared.double().mean())


def test_what_is_carried_over_is_saved_and_resumed_to_the_bit(tmp_path: Any) -> None:
    options: dict[str, Any] = {**PROPORTION, "rejuvenation_turnover": 0.0004}  # of 1600: 0.64 a run
    bio, optimizer, plasticity = run(["rejuvenate_weights"], **options)
    assert bio.state_dict()["2.bio_mod.weights_due"].shape == ()
    train(bio, optimizer, range(2))
    due_then = bio.get_submodule("2").bio_mod.weights_due.clone()
    assert float(due_then) == pytest.approx(0.28, abs=1e-12)
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity)
    train(bio, optimizer, range(2, 6))
    resumed, other, attachment = run(["rejuvenate_weights"], **options)
    biofx.load(tmp_path / "run.pt", resumed, optimizer=other, plasticity=attachment)
    assert torch.equal(resumed.get_submodule("2").bio_mod.weights_due, due_then)
    train(resumed, other, range(2, 6))
    for name, value in bio.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    halves = copy.deepcopy(bio).half().get_submodule("2").bio_mod
    assert halves.weights_due.dtype is torch.float32
    plain = run([], rejuvenation_turnover=0.1)[0].state_dict()
    assert not any(name.endswith("weights_due") for name in plain)


@pytest.mark.parametrize("kind", ["continual-backprop", "redo"])
def test_units_born_again_are_as_useful_as_the_average(kind: str) -> None:
    chosen: dict[str, Any] = {
        "unit_turnover": kind,
        "unit_turnover_rate": 0.1,
        "unit_turnover_maturity": 0,
        "unit_turnover_dormancy": 0.5,
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    options: dict[str, Any] = {"rejuvenation_utility": "gradient", "fuzzy_lr_distribution": "baseline"}
    bio: Any = biofx.transform(model, biofx.BioConfig(**options, **chosen))[0]
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.05)
    biofx.attach(bio, optimizer, [biofx.Rule("rejuvenate_units", after=3)])
    train(bio, optimizer, range(3))
    made_by, read_by = (bio.get_submodule(name).bio_mod for name in ("0", "2"))
    weight = made_by.weight.detach().clone()
    other = copy.deepcopy(bio)
    other(batch(3)).square().mean().backward()
    for name, state in (("0", made_by), ("2", read_by)):  # as without turnover
        held = other.get_submodule(name).bio_mod
        held.utility.copy_(0.99 * state.utility + 0.01 * (held.weight * held.weight.grad).detach().abs())
    train(bio, optimizer, range(3, 4))
    reborn = ((made_by.weight != weight) & (made_by.weight.abs() <= 8**-0.5)).all(1)
    reborn &= (read_by.weight == 0).all(0)
    assert 0 < reborn.sum() < 40
    for name, state, entries in (
        ("0", made_by, reborn[:, None].expand(40, 8)),
        ("2", read_by, reborn[None, :].expand(3, 40)),
    ):
        expected = other.get_submodule(name).bio_mod.utility
        torch.testing.assert_close(
            state.utility[entries], expected[~entries].mean().expand(int(entries.sum())), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(state.utility[~entries], expected[~entries], rtol=1e-4, atol=1e-12)
