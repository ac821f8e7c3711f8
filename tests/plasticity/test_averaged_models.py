"""Averages of models, by the position of their tensors or by name, keep signs and counts right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import biofx
from biofx import BioConfig

RULES = ["rejuvenate_weights", "crystallize", "synaptic_scaling"]
CONFIGS = {
    "signs": BioConfig(apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0),
    "rates": BioConfig(apply_dales_principle=True),
    "shared rates": BioConfig(apply_dales_principle=True, fuzzy_lr_granularity="neuron"),
    "changing rates": BioConfig(
        apply_dales_principle=True,
        fuzzy_lr_distribution="temporal",  # type: ignore[arg-type]
        fuzzy_lr_dynamic=True,
        fuzzy_lr_update_freq=1,
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def fresh(config: BioConfig) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
        *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
    )
    return biofx.transform(net, config).graph_module


def trained(config: BioConfig, steps: int, then: Callable[[Any], object] = lambda bio: None) -> Any:
    bio = fresh(config)
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.01)
    attachment = biofx.attach(bio, optimizer, RULES)
    for _ in range(steps):
        optimizer.zero_grad()
        bio(torch.linspace(-1, 1, 64).reshape(16, 4)).square().mean().backward()
        optimizer.step()
        then(bio)
    attachment.detach()
    return bio


def signs_of(model: nn.Module) -> dict[str, list[float]]:
    found = {key: value.tolist() for key, value in model.state_dict().items() if key.endswith(".sign")}
    assert list(found) == ["0.bio_mod.sign", "2.bio_mod.sign", "4.bio_mod.sign"]
    assert set(found["0.bio_mod.sign"]) == {-1, 1}
    return found


def events_of(model: Any) -> int:
    return int(model.get_submodule("2.bio_mod").events)


AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean with buffers": {"use_buffers": True},
    "foreach mean with buffers": {"use_buffers": True, "multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.999)},
    "ema with buffers": {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.999)},
    "own function": {"use_buffers": True, "avg_fn": lambda mean, new, count: 0.9 * mean + 0.1 * new},
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
@every_config
def test_averages_by_position_that_were_made_before_the_first_rule(
    config: BioConfig, options: dict[str, Any]
) -> None:
    means: list[AveragedModel] = []

    def average(bio: Any) -> None:
        means.append(AveragedModel(fresh(config), **options)) if not means else None
        means[0].update_parameters(bio)

    bio = trained(config, 4, average)
    assert signs_of(means[0].module) == signs_of(bio) == signs_of(fresh(config))
    assert biofx.check(means[0].module).ok
    fresh(config).load_state_dict(means[0].module.state_dict())


@every_config
def test_averages_in_place_by_position_and_by_name(config: BioConfig) -> None:
    mean, named = fresh(config), dict(fresh(config).state_dict())

    @torch.no_grad()
    def average(bio: Any) -> None:
        for own, new in zip(mean.parameters(), bio.parameters(), strict=True):
            own.lerp_(new, 0.1)
        for own, new in zip(mean.buffers(), bio.buffers(), strict=True):
            own.mul_(0.9).add_(new, alpha=0.1)
        for key, value in bio.state_dict().items():
            named[key].mul_(0.999).add_(value, alpha=0.001)

    bio = trained(config, 4, average)
    by_name = fresh(config)
    by_name.load_state_dict(named)
    for model in (mean, by_name):
        assert biofx.check(model).ok
        for key, signs in signs_of(bio).items():
            torch.testing.assert_close(model.state_dict()[key], torch.tensor(signs))
    assert signs_of(by_name) == signs_of(bio)


@every_config
def test_averages_of_state_dicts(config: BioConfig) -> None:
    models = [fresh(config), trained(config, 3), trained(config, 5)]
    states = [model.state_dict() for model in models]
    weights = (0.1, 0.2, 0.7)
    averages = [
        {key: (states[1][key] + states[2][key]) / 2 for key in states[0]},
        {key: torch.stack([state[key].float() for state in states]).mean(0) for key in states[0]},
        {key: sum(w * state[key] for w, state in zip(weights, states, strict=True)) for key in states[0]},
    ]
    for average in averages:
        for model, events in ((fresh(config), 0), (copy.deepcopy(models[1]), events_of(models[1]))):
            model.load_state_dict(average)
            assert signs_of(model) == signs_of(models[1])
            assert events_of(model) == events  # its own count, and no average
            assert torch.equal(model.get_parameter("2.weight"), average["2.weight"])


def test_the_average_of_models_with_other_signs_is_refused() -> None:
    config = CONFIGS["signs"]
    one, other = fresh(config), fresh(config.replace(seed=3))
    assert signs_of(one) != signs_of(other)
    one.load_state_dict(other.state_dict())
    assert signs_of(one) == signs_of(other)
    states = fresh(config).state_dict(), other.state_dict()
    with pytest.raises(RuntimeError, match=r"sign: expected -1, 0 or 1 for each unit, found \d of 8"):
        one.load_state_dict({key: (states[0][key] + states[1][key]) / 2 for key in states[0]})


@every_config
def test_the_state_dict_is_the_same_before_and_after_any_rule(config: BioConfig) -> None:
    def shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
        return [(key, value.shape) for key, value in model.state_dict().items()]

    def order(model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_buffers()]

    bio = trained(config, 3)
    assert shapes(bio) == shapes(fresh(config))
    assert order(bio) == order(fresh(config))
    assert all(isinstance(value, Tensor) for value in bio.state_dict().values())
    again = fresh(config)
    again.load_state_dict(bio.state_dict())
    assert events_of(again) == events_of(bio) >= 3
    bio.load_state_dict(fresh(config).state_dict())
    assert events_of(bio) == 0


def test_nothing_appears_where_every_mechanism_is_off() -> None:
    torch.manual_seed(0)
    bio, _ = biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), passes="fold-splits")
    keys = list(bio.state_dict())
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer, RULES)
    bio(torch.ones(3, 4)).square().mean().backward()
    optimizer.step()
    assert list(bio.state_dict()) == keys == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not list(bio.buffers())


@pytest.mark.parametrize("name", [name for name in AVERAGES if name != "foreach mean with buffers"])
def test_what_factors_are_drawn_from_stays_what_it_is(name: str) -> None:
    config = BioConfig(fuzzy_lr_dtype="seed")
    bio = fresh(config)
    factors = bio.get_submodule("2.bio_mod").fuzzy_learning_rate_parameters.clone()
    mean: Any = AveragedModel(bio, **AVERAGES[name])
    for _ in range(3):
        mean.update_parameters(bio)
    assert torch.equal(mean.module.get_submodule("2.bio_mod").fuzzy_learning_rate_parameters, factors)
    other = fresh(config)
    other.load_state_dict(mean.module.state_dict())
    assert torch.equal(other.get_submodule("2.bio_mod").fuzzy_learning_rate_parameters, factors)
    by_name = copy.deepcopy(bio)
    with torch.no_grad():
        for key, value in by_name.state_dict().items():
            value.copy_(0.999 * value + 0.001 * bio.state_dict()[key])
    assert torch.equal(by_name.get_submodule("2.bio_mod").fuzzy_learning_rate_parameters, factors)
