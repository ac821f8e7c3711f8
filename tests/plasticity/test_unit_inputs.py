from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.plasticity.unit_inputs import (
    DENSITY,
    FEWEST,
    balanced,
    input_strength,
    rows_of_units,
    synaptic_scaling,
    weight_of_rows,
)


def drawn(rows: int = 40, synapses: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, synapses, generator=generator, dtype=torch.float64)
    signs = torch.where(torch.rand(synapses, generator=generator) < 0.7, 1.0, -1.0).double()
    return weight, signs.expand(rows, synapses)


def test_each_row_is_in_balance_sparse_and_of_the_given_signs() -> None:
    weight, signs = drawn()
    made = balanced(weight, signs, torch.Generator().manual_seed(1))
    assert (made * signs >= 0).all()
    torch.testing.assert_close(made.sum(1), torch.zeros(40, dtype=torch.float64))
    density = (made != 0).double().mean().item()
    assert density == pytest.approx(DENSITY, abs=4 * math.sqrt(DENSITY * (1 - DENSITY) / made.numel()))
    torch.testing.assert_close(
        made.square().sum(1), weight.square().sum(1) / (1 - 1 / math.pi), rtol=1e-6, atol=1e-6
    )
    same = made.abs() / weight.abs()
    for row, sign in zip(same, signs, strict=True):
        for kind in (1, -1):
            kept = row[(row > 0) & (sign == kind)]
            torch.testing.assert_close(kept, kept[:1].expand_as(kept))


def test_without_rectification_the_spread_stays() -> None:
    weight, signs = drawn()
    made = balanced(weight, signs, torch.Generator().manual_seed(1), rectified=False)
    torch.testing.assert_close(made.square().sum(1), weight.square().sum(1))


def test_free_synapses_stay_and_rows_of_one_sign_keep_their_strength() -> None:
    weight, _ = drawn(3, 8)
    signs = torch.tensor([[1.0] * 8, [0.0] * 8, [1, -1, 0, 1, -1, 0, 1, -1]], dtype=torch.float64)
    made = balanced(weight, signs, torch.Generator().manual_seed(1))
    assert torch.equal(made[0], weight[0].abs())
    assert torch.equal(made[1], weight[1])
    assert torch.equal(made[2, [2, 5]], weight[2, [2, 5]])
    assert made[2, [0, 1, 3, 4, 6, 7]].sum().item() == pytest.approx(0, abs=1e-12)


def test_small_layers_are_not_thinned_out() -> None:
    weight, signs = drawn(10, FEWEST)
    assert (balanced(weight, signs, torch.Generator().manual_seed(1)) != 0).all()


@pytest.mark.parametrize(
    ("shape", "transposed", "groups"),
    [((6, 4), False, 1), ((6, 2, 3, 3), False, 2), ((4, 6, 3), True, 1), ((4, 3, 2, 2), True, 2)],
)
def test_rows_are_those_of_the_postsynaptic_units(
    shape: tuple[int, ...], transposed: bool, groups: int
) -> None:
    weight = torch.randn(shape)
    rows = rows_of_units(weight, output_axis=int(transposed), groups=groups)
    assert torch.equal(weight_of_rows(rows, weight, output_axis=int(transposed), groups=groups), weight)
    if not transposed:
        assert torch.equal(rows, weight.flatten(1))
        return
    per_group = shape[0] // groups
    for unit in range(shape[1] * groups):
        group, column = divmod(unit, shape[1])
        mine = weight[group * per_group : (group + 1) * per_group, column]
        assert torch.equal(rows[unit], mine.flatten())


def activity_of_layer_ten(model: nn.Module, x: Tensor) -> Tensor:
    """What the tenth activation gives out, ``(batch, 512)``."""
    kept: list[Tensor] = []
    hook = model.get_submodule("19").register_forward_hook(lambda *call: kept.append(call[2].detach()))
    model(x)
    hook.remove()
    return kept[0]


def participation_ratio(activity: Tensor) -> float:
    """How many dimensions are in use: (sum of eigenvalues)² over the sum of their squares."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(activity.T.double()))
    return float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())


@pytest.fixture(scope="module")
def deep_net() -> nn.Module:
    torch.manual_seed(0)
    hidden = [layer for _ in range(10) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(512, 10))


@pytest.mark.parametrize(
    "fields",
    [{}, {"dales_method": "abs"}, {"dales_excitatory_fraction": 0.8}, {"dales_method": "expand"}],
    ids=["project", "abs", "80 % excitatory", "expand"],
)
def test_a_deep_net_stays_alive(fields: dict[str, Any], deep_net: nn.Module) -> None:
    config = biofx.BioConfig(apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0, **fields)
    bio, _ = biofx.transform(deep_net, config)
    x = torch.randn(600, 512)
    plain, found = (participation_ratio(activity_of_layer_ten(model, x)) for model in (deep_net, bio))
    assert found >= plain / 4


def test_weights_that_are_kept_would_not(deep_net: nn.Module) -> None:
    """What the initialisation is for: signs alone leave one dimension or two."""
    config = biofx.BioConfig(
        apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0, dales_initialisation="keep"
    )
    bio, _ = biofx.transform(deep_net, config)
    assert participation_ratio(activity_of_layer_ten(bio, torch.randn(600, 512))) < 4


def test_formula_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, 0.0], [0.5, 0.5]])
    multiplier = synaptic_scaling(weight, torch.tensor([2.0, 1.0, 2.0]), rate=0.5)
    torch.testing.assert_close(multiplier, torch.tensor([0.75, 1.0, 1.5]))
    torch.testing.assert_close(weight, torch.tensor([[0.75, -2.25], [0.0, 0.0], [0.75, 0.75]]))


def strengths_by_hand(layer: nn.Module, weight: Tensor) -> Tensor:
    """What reaches the middle of each output channel when all inputs are 1 and no weight is negative."""
    twin: Any = copy.deepcopy(layer)
    twin.weight.data = weight.detach().abs()
    twin.bias.data.zero_()
    kernel = (9,) * (weight.dim() - 2)
    out: Tensor = twin(torch.ones((1, 6, *kernel)))
    return out[0].flatten(1)[:, out[0, 0].numel() // 2].detach() if kernel else out[0].detach()


LAYERS = {
    "linear": nn.Linear(6, 4),
    "conv": nn.Conv1d(6, 4, 3),
    "grouped": nn.Conv2d(6, 4, 3, groups=2),
    "transposed": nn.ConvTranspose1d(6, 4, 3),
    "grouped transposed": nn.ConvTranspose2d(6, 4, 3, groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_totals_come_back_to_the_target_and_ratios_stay(name: str) -> None:
    bio = biofx.BioConverter(synaptic_scaling_rate=0.2)(nn.Sequential(LAYERS[name]))
    layer = bio.get_submodule("0")
    state, weight = layer.bio_mod, bio.get_parameter("0.weight")
    assert isinstance(state, biofx.BioModule)
    assert bio.synaptic_scaling() == {"0.weight": weight.numel()}
    target = strengths_by_hand(layer, weight)
    torch.testing.assert_close(state.target_strength, target)
    with torch.no_grad():
        weight.mul_(3)
        weight.view(-1)[0] *= 2  # one unit more than the others
    shaken = weight.detach().clone()
    distances = []
    for _ in range(40):
        distances.append((strengths_by_hand(layer, weight) / target - 1).abs().max().item())
        bio.synaptic_scaling()
    assert distances[0] > 1.9
    # the distance of each total to its target shrinks by the rate, no more and no less
    for before, after in itertools.pairwise(distances[:11]):
        assert after == pytest.approx(0.8 * before, rel=1e-3)
    torch.testing.assert_close(strengths_by_hand(layer, weight), target, rtol=1e-3, atol=0)
    # one multiplier for all synapses of a unit: as many different ones as units, at most
    multipliers = (weight.detach() / shaken).flatten()
    assert len(torch.unique((multipliers * 1e5).round())) <= 4
    assert (multipliers > 0).all()


def test_strength_of_the_postsynaptic_units() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
    assert input_strength(weight).tolist() == [6.0, 15.0]
    assert input_strength(weight, output_axis=1).tolist() == [5.0, 7.0, 9.0]
    assert input_strength(weight, output_axis=1, groups=2).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_source_is_named() -> None:
    from biofx.plasticity import unit_inputs

    assert "Turrigiano" in str(unit_inputs.__doc__)
