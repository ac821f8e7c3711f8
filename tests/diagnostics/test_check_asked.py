from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioConverter
from biofx.errors import OptionError

OFF = BioConfig(fuzzy_learning_rate_factor_nu=0)
DALE = OFF.replace(apply_dales_principle=True)


class Loop(nn.Module):
    """A recurrent network whose steps a value decides; without an example nothing says who reads whom."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_rec, self.w_out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, step = x.new_zeros(x.shape[1], 8), 0
        while step < x.shape[0]:
            state = torch.relu(self.w_rec(state) + self.w_in(x[step]))
            step += 1
        return self.w_out(state)  # type: ignore[no-any-return]


def mlp(*sizes: int) -> nn.Sequential:
    layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def asked(model: nn.Module) -> list[tuple[str, str, int]]:
    """Return layer, mechanism and number of layers of what was asked for and is not there."""
    faults = biofx.check(model).faults
    return [(fault.layer, fault.subject, fault.violated) for fault in faults if fault.invariant == "asked"]


def test_signs_that_reach_no_layer_are_a_finding_and_counted_in_the_report() -> None:
    bio, report = biofx.transform(Loop(), DALE)
    assert asked(bio) == [("", "signs", 3)]
    (fault,) = biofx.check(bio).faults
    assert "0 of 3 layers (3 times: what feeds it is not known: Python calls" in fault.message
    assert "asked for and not there: 1" in report.summary()
    assert str(report).splitlines()[1].startswith("asked: signs - 0 of 3 layers (3 times: what feeds it")
    assert report.to_dict()["unmet"][0]["considered"] == 3
    with pytest.raises(biofx.errors.InvariantError, match="asked for and not there: signs"):
        biofx.check(bio).raise_if_broken()


@pytest.mark.parametrize(
    ("model", "config", "mechanism"),
    [
        (mlp(4, 2), DALE, "signs"),  # an input and a readout in one
        (mlp(4, 2), OFF.replace(weight_splitting_Gamma=2), "splits"),
        (mlp(4, 6, 2).requires_grad_(False), BioConfig(), "rates"),
        (nn.Sequential(nn.ReLU()), BioConfig(), "rates"),
        (nn.GRU(3, 4), OFF.replace(weight_splitting_Gamma=2), "splits"),
    ],
)
def test_a_mechanism_that_reaches_nothing(model: nn.Module, config: BioConfig, mechanism: str) -> None:
    bio, report = biofx.transform(model, config)
    assert [entry.mechanism for entry in report.unmet] == [mechanism]
    assert [subject for _, subject, _ in asked(bio)] == [mechanism]
    if mechanism != "rates":
        assert [subject for _, subject, _ in asked(BioConverter(config)(model))] == [mechanism]


def test_rates_of_a_converted_model_without_weights() -> None:
    assert asked(BioConverter()(nn.Sequential(nn.ReLU()))) == [("", "rates", 1)]
    assert asked(BioConverter()(mlp(4, 6, 2))) == []


def test_what_is_free_by_default_is_nothing_that_was_asked_for() -> None:
    everything = DALE.replace(weight_splitting_Gamma=2, fuzzy_learning_rate_factor_nu=0.1)
    for config in (DALE, everything, BioConfig(), OFF):
        bio, report = biofx.transform(mlp(4, 6, 6, 2), config)
        assert (report.unmet, asked(bio)) == ((), [])
        again, report = biofx.transform(bio, config)  # which has it all already
        assert (report.unmet, asked(again)) == ((), [])


def test_a_layer_that_an_override_names_and_that_is_left_alone() -> None:
    config = OFF.replace(weight_splitting_Gamma=2).override("4", weight_splitting_Gamma=3)
    bio, report = biofx.transform(mlp(4, 6, 6, 2), config)
    assert asked(bio) == [("4", "splits", 1)]
    assert "0 of 1 layer that '4' names (it is an output layer" in str(report.unmet[0])
    # a glob is met where it reaches one of its layers, and what is switched off is not asked for
    for selector, gamma in (("*", 2), ("4", 0), ("2", 3)):
        config = OFF.replace(weight_splitting_Gamma=2).override(selector, weight_splitting_Gamma=gamma)
        assert asked(biofx.transform(mlp(4, 6, 6, 2), config)[0]) == []


def test_a_free_end_that_was_asked_for_and_is_not_possible() -> None:
    model = mlp(4, 6, 6, 2)
    nn.utils.parametrizations.weight_norm(model[4])
    config = DALE.replace(dales_constrain_readout=True)
    bio, _ = biofx.transform(model, config)
    assert asked(bio) == [("4", "signs", 1)]
    assert asked(biofx.transform(mlp(4, 6, 6, 2), config)[0]) == []


def test_the_finding_goes_with_copies_and_checkpoints(tmp_path: Any) -> None:
    bio, _ = biofx.transform(mlp(4, 2), DALE)
    biofx.save(bio, tmp_path / "model.pt")
    assert asked(biofx.load(tmp_path / "model.pt", mlp(4, 2))) == [("", "signs", 1)]


SIGNS = (1, 1, 1, 1, 1, -1, -1, -1)


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (
            Loop(),
            DALE.override("w_rec", dales_signs=SIGNS),
            r"'w_rec' are not used.*w_rec\.weight: which wei",
        ),
        (mlp(4, 8, 8, 8), DALE.override("4", dales_signs=SIGNS), r"'4' are not used.*4\.weight"),
        (mlp(4, 8, 8, 2), DALE.override("1", dales_signs=SIGNS), r"'1' are not used"),
        (mlp(4, 8, 8, 2), OFF.override("0", dales_signs=SIGNS), "apply_dales_principle is False"),
        (mlp(4, 8, 8, 2), OFF.replace(dales_signs=SIGNS), "apply_dales_principle is False"),
        (
            mlp(4, 8, 8, 2),
            DALE.replace(dales_axis="postsynaptic").override("0", dales_signs=SIGNS),
            "axis='postsynaptic'",
        ),
    ],
)
def test_signs_that_nothing_uses_are_refused(model: nn.Module, config: BioConfig, expected: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for make in (lambda: biofx.transform(model, config), lambda: BioConverter(config)(model)):
        with pytest.raises(OptionError, match=expected):
            make()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_signs_that_are_given_hold_at_a_readout_too() -> None:
    bio, report = biofx.transform(mlp(4, 8, 8, 2), DALE.override("2", dales_signs=SIGNS))
    deployed: Any = biofx.deploy(bio)
    assert bool((deployed.get_submodule("4").weight * torch.tensor(SIGNS) >= 0).all())
    free, _ = biofx.transform(mlp(4, 8, 8, 2), DALE)
    assert free.get_submodule("4").bio_mod.sign is None
    assert (report.unmet, asked(bio)) == ((), [])


def test_signs_that_are_used_are_taken_and_given_again() -> None:
    config = DALE.override("0", dales_signs=SIGNS)
    bio, _ = biofx.transform(mlp(4, 8, 8, 2), config)
    assert bio.get_buffer("0.bio_mod.sign").tolist() == list(SIGNS)
    again, _ = biofx.transform(bio, config)
    assert again.get_buffer("0.bio_mod.sign").tolist() == list(SIGNS)
    readout = DALE.replace(dales_constrain_readout=True).override("2", dales_signs=SIGNS)
    assert biofx.transform(mlp(4, 8, 8, 2), readout)[0].get_buffer("2.bio_mod.sign").tolist() == list(SIGNS)
    with pytest.raises(OptionError, match="expected one for each of the 8 outputs"):
        biofx.transform(mlp(4, 8, 8, 2), DALE.override("0", dales_signs=(1, -1)))
