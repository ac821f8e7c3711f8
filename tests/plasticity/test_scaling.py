from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.plasticity.unit_inputs import input_strength, synaptic_scaling


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
