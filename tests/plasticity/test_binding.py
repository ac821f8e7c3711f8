from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.errors import PlasticityError
from biofx.plasticity.binding import find_way
from tests.plasticity.runs import assert_scaled, factors_of, fresh, train


def test_group_that_is_added_is_scaled() -> None:
    bio = fresh()
    optimizer = torch.optim.Adam(bio.get_submodule("2").parameters())
    plasticity = biofx.attach(bio, optimizer)
    assert plasticity.left_alone == {"0.weight": "the optimizer does not hold it"}
    optimizer.add_param_group({"params": list(bio.get_submodule("0").parameters())})
    assert_scaled(bio, optimizer)
    assert not plasticity.left_alone
    assert plasticity.modes == {"0.weight": "update", "2.weight": "update"}


def test_layers_are_thawed_one_after_another() -> None:
    bio = fresh()
    bio.requires_grad_(False)
    optimizer = torch.optim.Adam(bio.parameters())
    plasticity = biofx.attach(bio, optimizer, ["crystallize"])
    assert plasticity.left_alone == {"0.weight": "it is frozen", "2.weight": "it is frozen"}
    for layer in ("2", "0"):
        bio.get_submodule(layer).requires_grad_(True)
        before = factors_of(bio, layer).clone()
        train(bio, optimizer)
        assert not torch.equal(factors_of(bio, layer), before)  # crystallized
        assert f"{layer}.weight" in plasticity.modes
    assert not plasticity.left_alone


def test_groups_that_are_replaced_are_found() -> None:
    bio = fresh()
    optimizer = torch.optim.Adam(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups = [{**group} for group in optimizer.param_groups]
    assert_scaled(bio, optimizer)


@pytest.mark.parametrize("name", ["weight_decay", "momentum"])
def test_options_that_matter_are_tried_anew_and_learning_rates_are_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        tried.append(args)
        return find_way(*args, **options)

    monkeypatch.setattr("biofx.plasticity.binding.find_way", counted)
    bio = fresh()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    plasticity = biofx.attach(bio, optimizer)
    for rate in (0.3, 1e-5, 0.0, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        train(bio, optimizer)
    assert len(tried) == 1
    optimizer.param_groups[0][name] = 0.1
    train(bio, optimizer)
    assert len(tried) == 2
    assert plasticity.modes["0.weight"] == ("update" if name == "weight_decay" else "gradient")


def test_counters_of_an_optimizer_are_no_options() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["seen"] = group.get("seen", 0) + 1
            return super().step(closure)

    bio = fresh()
    optimizer = Counting(bio.parameters(), lr=0.1)
    plasticity = biofx.attach(bio, optimizer)
    train(bio, optimizer, 100)
    assert plasticity.steps == 100
    assert len(plasticity._binding._ways) == 1


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        *((cls, "weight_decay") for cls in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop)),
        (torch.optim.ASGD, "lambd"),
    ],
)
def test_decay_that_is_set_later_moves_nothing_that_a_factor_of_zero_freezes(cls: Any, option: str) -> None:
    bio = fresh(fuzzy_lr_min=0.0)
    factors_of(bio).zero_()
    optimizer = cls(bio.parameters(), lr=0.1, **{option: 0.0})
    biofx.attach(bio, optimizer)
    optimizer.param_groups[0][option] = 0.1
    weight = bio.get_parameter("0.weight")
    before, other = weight.detach().clone(), bio.get_parameter("2.weight").detach().clone()
    train(bio, optimizer, 3)
    assert torch.equal(weight, before)
    assert not torch.equal(bio.get_parameter("2.weight"), other)


def test_free_decay_follows_the_learning_rate_that_is() -> None:
    bio = fresh(fuzzy_lr_min=0.0)
    factors_of(bio).zero_()
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.1, weight_decay=0.5)
    biofx.attach(bio, optimizer, decay="free")
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.001
    before = bio.get_parameter("0.weight").detach().clone()
    train(bio, optimizer)
    torch.testing.assert_close(bio.get_parameter("0.weight").detach(), before * (1 - 0.001 * 0.5))


def test_options_that_make_factors_impossible_stop_the_step_before_anything_changes() -> None:
    bio = fresh()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer, decay="free")
    optimizer.param_groups[0]["weight_decay"] = 0.1
    before = {name: tensor.clone() for name, tensor in bio.state_dict().items()}
    with pytest.raises(PlasticityError, match="mixes weight decay into the gradient"):
        train(bio, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in bio.state_dict().items())


def test_weight_that_reaches_a_second_attached_optimizer_is_refused_then() -> None:
    bio = fresh()
    first = torch.optim.Adam(bio.get_submodule("0").parameters())
    second = torch.optim.Adam(bio.get_submodule("2").parameters())
    biofx.attach(bio, first)
    biofx.attach(bio, second)
    first.add_param_group({"params": list(bio.get_submodule("2").parameters())})
    with pytest.raises(PlasticityError, match=r"'2.weight' is attached to an optimizer already"):
        train(bio, first)


def test_weight_that_was_replaced_is_refused() -> None:
    bio = fresh()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    bio.get_submodule("0").weight = nn.Parameter(torch.ones(8, 6))
    with pytest.raises(PlasticityError, match=r"'0.weight' is another parameter"):
        train(bio, optimizer)


def test_optimizer_is_only_tried_where_there_is_something_to_multiply() -> None:
    class Unscalable(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure) if self.param_groups[0]["params"][0].shape == (8, 6) else None

    plain = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE, rejuvenation_turnover=0.5)
    bio, _ = biofx.transform(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), plain)
    optimizer = Unscalable(bio.parameters(), lr=0.1)
    plasticity = biofx.attach(bio, optimizer, ["rejuvenate_weights"])
    train(bio, optimizer, 2)
    assert plasticity.steps == 2
    plasticity.detach()
    for rule in ("crystallize", "volume_dependent_lr"):
        with pytest.raises(PlasticityError, match="Unscalable moved small weights"):
            biofx.attach(bio, optimizer, [rule])
