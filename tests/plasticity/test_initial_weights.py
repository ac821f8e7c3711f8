"""What weights are drawn from at their start, and the rules that draw from it again."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import biofx
from biofx.errors import PlasticityError
from biofx.operators.sampling import for_each_block, generator_for
from biofx.plasticity.initial_weights import InitialWeights, initial_weights, shrink_and_perturb
from biofx.plasticity.rejuvenation import choose_weak

FACTOR, PERTURBATION = 0.9, 0.25


def noise(shape: torch.Size, path: str, event: int, bound: float, seed: int = 0) -> Tensor:
    """U(-bound, bound), as the definition of the rule's random numbers has it."""
    flat = torch.empty(shape.numel(), dtype=torch.float64)

    def draw(block: slice, own: torch.Generator) -> None:
        flat[block].uniform_(-bound, bound, generator=own)

    for_each_block(len(flat), draw, generator_for(seed, path, event, purpose="shrink-and-perturb"))
    return flat.reshape(shape)


def made(model: nn.Module, **options: Any) -> Any:
    given = {"shrink_factor": FACTOR, "shrink_perturbation": PERTURBATION, "weight_splitting_fold": False}
    return biofx.transform(model, biofx.BioConfig(**{**given, **options}))[0]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))


LAYERS: dict[str, Any] = {
    "weight of Linear": lambda: nn.Linear(300, 400),
    "weight of Conv2d": lambda: nn.Conv2d(32, 64, 3, groups=2),
    "weight of ConvTranspose1d": lambda: nn.ConvTranspose1d(64, 32, 5),
    "weight_hh_l0 of LSTM": lambda: nn.LSTM(20, 100),
    "weight_ih of GRUCell": lambda: nn.GRUCell(90, 80),
    "in_proj_weight of MultiheadAttention": lambda: nn.MultiheadAttention(128, 4),
    "k_proj_weight of MultiheadAttention": lambda: nn.MultiheadAttention(128, 4, kdim=96, vdim=64),
}


@pytest.mark.parametrize("name", LAYERS)
def test_torch_initialises_as_is_said(name: str) -> None:
    """Against the values that torch's own constructors draw."""
    torch.manual_seed(1)
    layer = LAYERS[name]()
    state = biofx.BioModule(layer)
    state.path = name.partition(" ")[0]
    found = initial_weights(state)
    assert isinstance(found, InitialWeights)
    bound = found.std * math.sqrt(3)
    values = state.weight.detach().double().flatten()
    assert values.abs().max() <= bound * (1 + 1e-6)
    assert stats.kstest(values.numpy(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.001


@pytest.mark.parametrize(("distribution", "law"), [("normal", stats.norm), ("uniform", stats.uniform)])
@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(30, 7), 30),
        (nn.Conv2d(6, 9, 3, groups=3), 18),
        (nn.ConvTranspose2d(6, 9, 3, groups=3), 18),
    ],
)
def test_other_distributions_have_a_gain_over_inputs(
    distribution: str, law: Any, layer: nn.Module, inputs: int
) -> None:
    state = biofx.BioModule(layer)
    state.config = biofx.BioConfig(initial_distribution=distribution, initial_gain=1.5)
    found = initial_weights(state)
    assert isinstance(found, InitialWeights)
    assert found.std == pytest.approx(1.5 / math.sqrt(inputs))
    drawn = found.sample(100_000, generator_for(0, "w")).numpy()
    bound = found.std * math.sqrt(3)
    fitted = law(0, found.std) if distribution == "normal" else law(-bound, 2 * bound)
    assert stats.kstest(drawn, fitted.cdf).pvalue > 0.001


class Doubled(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 2.0)
        nn.init.zeros_(self.bias)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def said_by(bio: Any) -> str:
    try:
        return "; ".join(map(str, bio.shrink_and_perturb().values()))
    except PlasticityError as error:
        return str(error)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Doubled(8, 5), {}, "how a Doubled is initialised is not known"),
        (Product(), {}, "is initialised is not known; say it by initial_distribution='normal'"),
        (net(), {"weight_splitting_Gamma": 2, "weight_splitting_mode": "sub-weights"}, "one of the sub-weig"),
        (net(), {"apply_dales_principle": True, "dales_method": "expand"}, "pairs, and .*; 120"),
        (nn.Embedding(5, 8), {}, r"shrink_and_perturb has nothing to act on \(weight: "),
        (nn.Linear(8, 5, dtype=torch.complex64), {}, "no initial distribution that is known"),
    ],
    ids=["other initialisation", "no layer", "sub-weights", "pairs", "no synapses", "complex"],
)
def test_what_is_not_known_is_left_alone_and_says_why(model: Any, options: Any, reason: str) -> None:
    bio = made(model, **options)
    before = copy.deepcopy(bio.state_dict())
    assert re.search(reason, said_by(bio))
    if "pairs" not in reason:  # where the readout alone reads none
        for name, value in bio.state_dict().items():
            assert torch.equal(value, before[name])


def test_a_distribution_that_is_said_helps() -> None:
    bio = made(Doubled(8, 5), initial_distribution="normal")
    assert bio.shrink_and_perturb() == {"weight": 40}


def test_the_definition_by_hand() -> None:
    bio = made(net().double(), seed=5, fuzzy_lr_distribution="baseline")
    expected = {name: p.detach().clone() for name, p in bio.named_parameters()}
    for event in range(3):
        counts = bio.shrink_and_perturb()
        assert counts == {"0.weight": 320, "2.weight": 1600, "4.weight": 120}
        for path, inputs in (("0.weight", 8), ("2.weight", 40), ("4.weight", 40)):
            drawn = noise(expected[path].shape, path, event, 1 / math.sqrt(inputs), seed=5)
            expected[path] = FACTOR * expected[path] + PERTURBATION * drawn
    for name, parameter in bio.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-12)


def test_without_a_perturbation_weights_shrink() -> None:
    bio = made(net(), shrink_perturbation=0.0)
    before = bio.get_parameter("2.weight").detach().clone()
    bio.shrink_and_perturb()
    torch.testing.assert_close(bio.get_parameter("2.weight").detach(), before * FACTOR)


def test_seeds_and_the_global_generator() -> None:
    results = []
    for seed in (0, 0, 1):
        bio = made(net(), seed=seed)
        before = torch.get_rng_state()
        bio.shrink_and_perturb()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(bio.get_parameter("2.weight").detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(700, 800), (16, 8, 3, 3)])
def test_memory_stays_whatever_its_layout(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    weight = weight.t() if len(shape) == 2 else weight.to(memory_format=torch.channels_last)
    other, pointer = weight.clone(memory_format=torch.contiguous_format), weight.data_ptr()
    for changed in (weight, other):
        count = shrink_and_perturb(
            changed,
            InitialWeights(is_normal=True, std=0.1),
            factor=0.5,
            perturbation=1.0,
            generator=generator_for(0, "w"),
        )
        assert count == weight.numel()
    assert weight.data_ptr() == pointer
    assert torch.equal(weight, other)


def test_a_factor_of_0_and_frozen_weights_stay_to_the_bit() -> None:
    bio = made(net(), fuzzy_lr_min=0.0)
    bio.get_submodule("0").bio_mod.fuzzy_learning_rate_parameters[:10] = 0
    bio.get_parameter("4.weight").requires_grad_(False)
    before = {name: p.detach().clone() for name, p in bio.named_parameters()}
    counts = bio.shrink_and_perturb()
    assert counts["0.weight"] == 30 * 8
    assert counts["4.weight"] == "its weight is frozen"
    after = dict(bio.named_parameters())
    assert torch.equal(after["0.weight"][:10], before["0.weight"][:10])
    assert (after["0.weight"][10:] != before["0.weight"][10:]).all()
    assert torch.equal(after["4.weight"], before["4.weight"])
    assert torch.equal(after["0.bias"], before["0.bias"])


@pytest.mark.parametrize("method", ["project", "abs"])
def test_signs_hold(method: str) -> None:
    bio = made(net(), apply_dales_principle=True, dales_method=method, shrink_perturbation=1.0)
    bio.enforce_dales_principle()
    sign = bio.get_submodule("2").bio_mod.presynaptic_signs()
    for _ in range(3):
        bio.shrink_and_perturb()
        weight = bio.get_parameter("2.weight")
        assert (weight * sign >= 0).all()
        assert (weight * sign > 0).float().mean() > (0.4 if method == "project" else 0.99)
    assert biofx.check(bio).ok


def test_missing_connections_stay_0_and_draws_are_as_wide_as_at_the_start() -> None:
    bio = made(net().double(), weight_density=0.25, fuzzy_lr_distribution="baseline", shrink_factor=1.0)
    state = bio.get_submodule("2").bio_mod
    exists, before = state.connection_mask == 1, state.masked_weight.clone()
    bio.shrink_and_perturb()
    after = state.masked_weight
    assert (after[~exists] == 0).all()
    drawn = noise(before.shape, "2.weight", 0, 2 / math.sqrt(40))  # 1 / √(fraction) times as wide
    expected = torch.where(exists, before + PERTURBATION * drawn, 0)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("distribution", ["uniform", "temporal"])
def test_a_resumed_run_goes_on_to_the_bit(distribution: str, tmp_path: Any) -> None:
    rule = biofx.Rule("shrink_and_perturb", every=2)

    def start() -> Any:
        bio = made(net(), fuzzy_lr_distribution=distribution, apply_dales_principle=True)
        optimizer = torch.optim.SGD(bio.parameters(), lr=0.1, momentum=0.9)
        return bio, optimizer, biofx.attach(bio, optimizer, [rule])

    def train(bio: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            bio(inputs).square().mean().backward()
            optimizer.step()

    bio, optimizer, plasticity = start()
    train(bio, optimizer, range(3))
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity)
    train(bio, optimizer, range(3, 7))
    resumed, other, attachment = start()
    train(resumed, other, range(1))
    biofx.load(tmp_path / "run.pt", resumed, optimizer=other, plasticity=attachment)
    train(resumed, other, range(3, 7))
    for name, value in bio.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert bio.get_submodule("2").bio_mod.events >= 3


def test_the_state_dict_has_nothing_new() -> None:
    bio = made(net())
    before = {name: value.shape for name, value in bio.state_dict().items()}
    bio.shrink_and_perturb()
    assert {name: value.shape for name, value in bio.state_dict().items()} == before


# turnover of weights that draws from it


def replaced_by_hand(weight: Tensor, path: str, bound: float, sign: Tensor | None = None) -> Tensor:
    """What rejuvenation leaves: the definition, with the choice of places taken from the rule's own."""
    generator = generator_for(0, path, 0, purpose="rejuvenate")
    spread = weight.float().std(correction=0).item()
    places, _ = choose_weak(weight.reshape(-1), spread / 2.0, generator)
    drawn = torch.empty(len(places), dtype=torch.float64).uniform_(-bound, bound, generator=generator)
    if sign is not None:
        fixed = sign.expand(weight.shape).reshape(-1)[places].double()
        drawn = torch.where(fixed == 0, drawn, drawn.abs() * fixed)
    expected = weight.clone().reshape(-1)
    expected[places] = drawn
    return expected.reshape(weight.shape)


@pytest.mark.parametrize("redraw", ["initial", "zero"])
@pytest.mark.parametrize("signed", [False, True])
def test_new_synapses_are_drawn_as_at_the_start(redraw: str, signed: bool) -> None:
    options = {"rejuvenation_redraw": redraw, "rejuvenation_parameter_dre": 2.0}
    bio = made(net().double(), apply_dales_principle=signed, **options)
    if signed:
        bio.enforce_dales_principle()
    state = bio.get_submodule("2").bio_mod
    before = state.weight.detach().clone()
    count = bio.rejuvenate_weights()["2.weight"]
    bound = 1 / math.sqrt(40) if redraw == "initial" else 0.0
    expected = replaced_by_hand(before, "2.weight", bound, state.signs())
    torch.testing.assert_close(state.weight.detach(), expected, rtol=0, atol=1e-12)
    assert 400 < count < 1600
    assert (state.weight != before).sum() > 100
    if redraw == "zero":
        assert (state.weight == 0).sum() >= count


@pytest.mark.parametrize("redraw", ["initial", "zero"])
def test_connections_that_grow_are_drawn_as_at_the_start(redraw: str) -> None:
    bio = made(
        net(),
        weight_density=0.25,
        weight_mask_initialisation="rescale",
        rejuvenation_redraw=redraw,
        rejuvenation_parameter_dre=2.0,
    )
    state = bio.get_submodule("2").bio_mod
    old, before = state.connection_mask == 1, state.masked_weight.clone()
    bio.rejuvenate_weights()
    new = state.connection_mask == 1
    assert new.sum() == old.sum()
    grown = state.weight.detach()[new & ~old]
    assert len(grown) > 50
    if redraw == "zero":
        assert (grown == 0).all()
    else:
        bound = 2 / math.sqrt(40)
        assert grown.abs().max() <= bound
        assert stats.kstest(grown.double().numpy(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.001
    stayed = new & old & (state.weight.detach() == before)
    assert stayed.sum() > 50
    assert (state.masked_weight[~new] == 0).all()


def test_rejuvenation_needs_an_initial_distribution_that_is_known() -> None:
    with pytest.raises(PlasticityError, match="how a Doubled is initialised is not known"):
        made(Doubled(8, 5), rejuvenation_redraw="initial").rejuvenate_weights()
