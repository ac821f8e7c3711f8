"""Tasks that begin, what is kept of them, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx.errors import NonFiniteWeightError, OptionError, PlasticityError
from tests.consolidation_models import (
    DECAY,
    OPTIMIZERS,
    RULE_OF,
    STRENGTH,
    attached,
    batch,
    close,
    loss_of,
    made,
    net,
    parameters,
    state_of,
    train,
)


@pytest.mark.parametrize("front_door", ["transform", "convert"])
def test_the_initial_weight_is_that_after_all_passes(front_door: str) -> None:
    config = biofx.BioConfig(apply_dales_principle=True, weight_density=0.5, l2_to_initial_strength=0.1)
    bio: Any = (
        biofx.transform(net(), config)[0] if front_door == "transform" else biofx.BioConverter(config)(net())
    )
    for name, parameter in parameters(bio).items():
        assert torch.equal(state_of(bio, name).initial_weight, parameter), name
    assert (bio.get_parameter("3.weight") != net().get_parameter("3.weight")).any()


@pytest.mark.parametrize("front_door", ["transform", "convert"])
@pytest.mark.parametrize("rule", [*RULE_OF.values(), "l2_to_initial"])
def test_a_run_that_is_resumed_within_a_task_goes_on_to_the_bit(
    front_door: str, rule: str, tmp_path: Any
) -> None:
    method = {name: method for method, name in RULE_OF.items()}.get(rule, "off")
    config = biofx.BioConfig(consolidation=method, l2_to_initial_strength=0.1)
    needs_data = rule == "memory_aware"

    def start() -> Any:
        bio: Any = (
            biofx.transform(net(), config)[0]
            if front_door == "transform"
            else biofx.BioConverter(config)(net())
        )
        optimizer = OPTIMIZERS["AdamW"](bio.parameters())
        return bio, optimizer, biofx.attach(bio, optimizer, [rule])

    def begin(plasticity: Any) -> None:
        if method not in ("upgd", "off"):
            plasticity.begin_task([batch(9)[0]] if needs_data else None)

    bio, optimizer, plasticity = start()
    begin(plasticity)
    train(bio, optimizer, range(3))
    begin(plasticity)
    train(bio, optimizer, range(3, 5))
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity)
    copied = copy.deepcopy((bio, optimizer, plasticity))
    resumed, other, attachment = start()
    begin(attachment)
    train(resumed, other, range(1))
    biofx.load(tmp_path / "run.pt", resumed, optimizer=other, plasticity=attachment)
    for run in ((bio, optimizer, plasticity), (resumed, other, attachment), copied):
        train(*run[:2], range(5, 7))
        begin(run[2])
        train(*run[:2], range(7, 9))
    new: Any = biofx.load(tmp_path / "run.pt", net())
    for name, value in bio.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert torch.equal(value, copied[0].state_dict()[name]), name
        assert new.state_dict()[name].shape == value.shape, name
    assert set(new.state_dict()) == set(bio.state_dict())


def test_the_state_dict_depends_on_the_config_alone() -> None:
    bio = made()
    before = {name: value.shape for name, value in bio.state_dict().items()}
    assert before["0.bio_mod.importance"] == (9, 6)
    assert before["1.bio_mod.bias.anchor_weight"] == (9,)
    stepping = OPTIMIZERS["SGD"](bio.parameters())
    biofx.attach(bio, stepping, ["synaptic_intelligence"]).begin_task()
    train(bio, stepping, range(2))
    assert {name: value.shape for name, value in bio.state_dict().items()} == before
    weights = made(consolidation_parameters="weights").state_dict()
    assert not any("bias." in name or name.startswith("1.bio_mod") for name in weights)
    assert not any(
        name.endswith(("importance", "weight_", "counts")) for name in made(method="off").state_dict()
    )
    missing = bio.load_state_dict(net().state_dict(), strict=False).missing_keys
    assert not any("importance" in name for name in missing)


def test_options_may_differ_between_layers() -> None:
    config = biofx.BioConfig(consolidation="synaptic-intelligence").override("1", consolidation="off")
    bio: Any = biofx.transform(net(), config.override("0", consolidation_parameters="weights"))[0]
    kept = {name for name in bio.state_dict() if name.endswith(".importance")}
    assert kept == {"0.bio_mod.importance", "3.bio_mod.importance", "3.bio_mod.bias.importance"}


def test_parameters_that_are_no_weights_are_left_alone_by_other_rules() -> None:
    bio = made(rejuvenation_utility="gradient", rejuvenation_turnover=0.5)
    other = ["crystallize", "volume_dependent_lr", "rejuvenate_weights", "synaptic_scaling"]
    stepping = torch.optim.SGD(bio.parameters(), lr=0.1)
    plasticity = biofx.attach(bio, stepping, ["synaptic_intelligence", *other])
    plasticity.begin_task()
    plain = net()
    loss_of(plain, 0).backward()
    train(bio, stepping, range(1))
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        old = plain.get_parameter(name)
        expected = old - 0.1 * old.grad if old.grad is not None else old
        torch.testing.assert_close(bio.get_parameter(name), expected, rtol=0, atol=1e-12)
        assert state_of(bio, name).utility is None
        assert state_of(bio, name).memory.dampening is None


# by hand, without an attachment


@pytest.mark.parametrize("rule", ["synaptic_intelligence", "elastic_consolidation", "memory_aware"])
def test_pulls_by_hand(rule: str) -> None:
    method = {name: method for method, name in RULE_OF.items()}[rule]
    bio = made(method=method)
    with torch.no_grad():
        for name, p in parameters(bio).items():
            state_of(bio, name).importance.copy_(torch.rand(p.shape))
            p.add_(0.1)
    loss_of(bio, 0).backward()
    before = {name: p.grad.clone() for name, p in parameters(bio).items() if p.grad is not None}
    counts = getattr(bio, rule)()
    factor = {
        "synaptic-intelligence": 2 * STRENGTH,
        "elastic": STRENGTH * DECAY,
        "memory-aware": 2 * STRENGTH,
    }
    for name, p in parameters(bio).items():
        expected = before[name] + factor[method] * state_of(bio, name).importance * 0.1
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-12)
        assert counts[name] == p.numel()


def test_upgd_by_hand_needs_utilities_of_a_layer() -> None:
    bio = made(method="upgd")
    loss_of(bio, 0).backward()
    with pytest.raises(PlasticityError, match="relative to the largest of the network; attach"):
        bio.upgd()
    bio, other = (made(method="upgd", upgd_scaling="layer") for _ in range(2))
    stepping = torch.optim.SGD(other.parameters(), lr=0.1)
    biofx.attach(other, stepping, ["upgd"])
    train(other, stepping, range(1))
    by_hand = torch.optim.SGD(bio.parameters(), lr=0.1)
    loss_of(bio, 0).backward()
    bio.upgd()
    by_hand.step()
    close(bio, parameters(other))


# what is refused


def test_a_rule_needs_what_the_config_keeps() -> None:
    with pytest.raises(PlasticityError, match=r"consolidation='elastic', where the rule needs 'synaptic-"):
        attached("synaptic_intelligence", "elastic")
    with pytest.raises(PlasticityError, match=r"initial weight is not kept \(l2_to_initial_strength=0\)"):
        attached("l2_to_initial", "off")
    with pytest.raises(
        OptionError, match=r"memory_aware acts at every step: expected every=1, found every=2"
    ):
        attached(biofx.Rule("memory_aware", every=2), "memory-aware")
    with pytest.raises(OptionError, match=r"upgd_utility_decay: expected a number in \[0, 1\), found 1"):
        biofx.BioConfig(upgd_utility_decay=1.0)
    complex_net = nn.Linear(3, 2, dtype=torch.complex64)
    bio = made(complex_net)
    stepping = torch.optim.SGD(bio.parameters(), lr=0.1)
    with pytest.raises(PlasticityError, match="it is complex"):
        biofx.attach(bio, stepping, ["synaptic_intelligence"])


@pytest.mark.parametrize("rule", ["synaptic_intelligence", "elastic_consolidation", "memory_aware"])
def test_no_step_without_a_task(rule: str) -> None:
    bio, stepping, plasticity = attached(rule, {name: kind for kind, name in RULE_OF.items()}[rule])
    before = copy.deepcopy(bio.state_dict())
    with pytest.raises(PlasticityError, match=r"expected plasticity\.begin_task\(\) before the first step"):
        train(bio, stepping, range(1))
    for name, value in bio.state_dict().items():
        assert torch.equal(value, before[name])
    plasticity.begin_task()
    train(bio, stepping, range(1))
    assert plasticity.steps == 1


@pytest.mark.parametrize(
    ("rule", "arguments", "reason"),
    [
        ("synaptic_intelligence", {"batches": [batch(0)]}, "synaptic_intelligence needs no data"),
        ("memory_aware", {}, "expected batches of the task that ends"),
        ("memory_aware", {"batches": [batch(0)], "loss": F.cross_entropy}, "leave the loss out"),
        ("memory_aware", {"batches": []}, "expected batches with samples, found none"),
        ("memory_aware", {"batches": batch(0)[0]}, r"found one batch; put it into a list, \[batch\]"),
        ("memory_aware", {"batches": (batch(0)[0], batch(1)[0])}, "found one batch"),
        ("elastic_consolidation", {"batches": batch(0), "loss": F.cross_entropy}, "found one batch"),
        ("memory_aware", {"batches": [{"x": 1}]}, "expected batches that are tensors, or pairs .* a dict"),
        ("elastic_consolidation", {"loss": F.cross_entropy}, "expected batches with the loss"),
        ("elastic_consolidation", {"batches": [batch(0)[0]], "loss": F.cross_entropy}, "pairs of inputs and"),
        ("elastic_consolidation", {"batches": [(batch(0)[0], batch(0)[1][:2])]}, "a target for each of 12"),
        (
            "elastic_consolidation",
            {"batches": [batch(0)], "loss": lambda output, _: output},
            "expected a loss that is one number",
        ),
    ],
)
def test_what_begin_task_refuses_changes_nothing(rule: str, arguments: Any, reason: str) -> None:
    bio, stepping, plasticity = attached(rule, {name: kind for kind, name in RULE_OF.items()}[rule])
    plasticity.begin_task()
    train(bio, stepping, range(2))
    before = copy.deepcopy(bio.state_dict())
    with pytest.raises(PlasticityError, match=reason):
        plasticity.begin_task(**arguments)
    for name, value in bio.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("rule", ["memory_aware", "elastic_consolidation"])
def test_data_show_nothing_where_no_gradients_are_taken(rule: str) -> None:
    bio, stepping, plasticity = attached(rule, {name: kind for kind, name in RULE_OF.items()}[rule])
    plasticity.begin_task()
    train(bio, stepping, range(2))
    before = copy.deepcopy(bio.state_dict())
    with torch.inference_mode(), pytest.raises(PlasticityError, match="call it outside of that"):
        plasticity.begin_task([batch(0)[0]])
    for name, value in bio.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        plasticity.begin_task([batch(0)[0]])
    assert state_of(bio, "3.weight").importance.any()


def test_begin_task_needs_a_rule_and_outputs_of_its_kind() -> None:
    with pytest.raises(PlasticityError, match=r"expected a scheduled rule that consolidates .* found none"):
        attached("upgd", "upgd")[2].begin_task()
    bio = made(nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(4, 1)).double(), "elastic")
    plasticity = biofx.attach(bio, OPTIMIZERS["SGD"](bio.parameters()), ["elastic_consolidation"])
    with pytest.raises(PlasticityError, match=r"\(1, classes\), the logits, found \(1, 1\)"):
        plasticity.begin_task([batch(0)[0]])


def test_importance_that_is_not_finite_is_refused() -> None:
    bio, stepping, plasticity = attached("synaptic_intelligence", "synaptic-intelligence")
    plasticity.begin_task()
    train(bio, stepping, range(1))
    state_of(bio, "3.weight").task_importance[0, 0] = torch.nan
    before = copy.deepcopy(bio.state_dict())
    with pytest.raises(NonFiniteWeightError, match=re.escape("3.weight: expected a finite importance")):
        plasticity.begin_task()
    for name, value in bio.state_dict().items():
        assert torch.equal(value.nan_to_num(9.0), before[name].nan_to_num(9.0)), name


def test_begin_task_leaves_gradients_random_states_and_modes() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3)).double()
    bio = made(model, "elastic")
    stepping = OPTIMIZERS["SGD"](bio.parameters())
    plasticity = biofx.attach(bio, stepping, ["elastic_consolidation"])
    plasticity.begin_task()
    train(bio, stepping, range(2))
    bio.get_submodule("1").eval()
    loss_of(bio, 3).backward()
    gradients = {name: p.grad for name, p in bio.named_parameters()}
    values = {name: value.clone() for name, value in gradients.items() if value is not None}
    modes = [module.training for module in bio.modules()]
    running = bio.get_buffer("1.running_mean").clone()
    before = torch.get_rng_state()
    with torch.no_grad():
        plasticity.begin_task([batch(0), batch(1)], F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in bio.modules()] == modes
    assert torch.equal(bio.get_buffer("1.running_mean"), running)
    assert all(p.grad is gradients[name] for name, p in bio.named_parameters())
    for name, value in values.items():
        assert torch.equal(bio.get_parameter(name).grad, value)
    assert float(state_of(bio, "0.weight").importance.max()) > 0


def test_gradients_stay_as_the_backward_left_them() -> None:
    bio = made(l2_to_initial_strength=0.4)
    stepping = OPTIMIZERS["momentum"](bio.parameters())
    plasticity = biofx.attach(bio, stepping, ["synaptic_intelligence", "l2_to_initial"])
    plasticity.begin_task()
    train(bio, stepping, range(2))
    plasticity.begin_task()
    loss_of(bio, 2).backward()
    before = {name: p.grad.clone() for name, p in parameters(bio).items() if p.grad is not None}
    stepping.step()
    for name, value in before.items():
        assert torch.equal(bio.get_parameter(name).grad, value)


@pytest.mark.parametrize("option", [{"consolidation": "elastic"}, {"l2_to_initial_strength": 0.1}])
def test_loaded_weights_are_those_of_layers_to_all_rules(option: Any, tmp_path: Any) -> None:
    """Where nothing in the graph acts on weights, no pass has made the states of the loaded ones."""
    bio = made(net(), fuzzy_lr_distribution="baseline", **{"consolidation": "off", **option})
    biofx.save(bio, tmp_path / "model.pt")
    loaded = biofx.load(tmp_path / "model.pt", net())
    kinds = {name: state_of(bio, name).only_held for name in parameters(bio)}
    assert kinds == {name: state_of(loaded, name).only_held for name in parameters(loaded)}
    assert not kinds["3.weight"]
    assert kinds["3.bias"]
    assert loaded.shrink_and_perturb()["3.weight"] == bio.get_parameter("3.weight").numel()


def test_a_model_without_gradients_in_evaluation_shows_nothing() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(self.training):
                return self.layer(x)  # type: ignore[no-any-return]

    bio = made(Guarded(), "memory-aware")
    plasticity = biofx.attach(bio, OPTIMIZERS["SGD"](bio.parameters()), ["memory_aware"])
    plasticity.begin_task()
    with pytest.raises(PlasticityError, match=r"gradient in evaluation too, found none"):
        plasticity.begin_task([batch(0)[0]])


def test_importance_that_takes_the_place_of_another_is_summed_anew() -> None:
    """Tensors are often made where one of the same size has just been let go."""
    bio = made(net(), "memory-aware", consolidation_effect="rates")
    state = state_of(bio, "3.weight")
    for _ in range(20):
        for value in (1.0, 0.0):
            state.importance = None
            state.importance = torch.full_like(state.weight, value)
            assert (state.consolidated_rates() is None) == (value == 0)
    assert state_of(copy.deepcopy(bio), "3.weight").consolidated_rates() is None


def test_pickles() -> None:
    run = attached("synaptic_intelligence", "synaptic-intelligence")
    run[2].begin_task()
    train(run[0], run[1], range(2))
    other = pickle.loads(pickle.dumps(run))
    for bio, stepping, plasticity in (run, other):
        plasticity.begin_task()
        train(bio, stepping, range(2, 4))
    for name, value in run[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[name]), name


def test_reborn_units_are_of_no_importance() -> None:
    options: dict[str, Any] = {
        "unit_turnover": "continual-backprop",
        "unit_turnover_rate": 0.3,
        "unit_turnover_maturity": 1,
    }
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)).double()
    bio = made(model, **options)
    stepping = OPTIMIZERS["SGD"](bio.parameters())
    rules: list[Any] = ["synaptic_intelligence", biofx.Rule("rejuvenate_units", after=4)]
    plasticity = biofx.attach(bio, stepping, rules)
    plasticity.begin_task()
    train(bio, stepping, range(3))
    plasticity.begin_task()
    train(bio, stepping, range(3, 4))
    paths = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    before = {path: state_of(bio, path).importance.clone() for path in paths}
    bias, anchor = bio.get_parameter("3.bias").detach().clone(), state_of(bio, "3.bias").anchor_weight.clone()
    assert all((before[path] > 0).any() for path in paths if path != "0.bias")  # which the mean takes away
    train(bio, stepping, range(4, 6))
    reborn = state_of(bio, "0.weight").unit_age == 0
    assert 0 < int(reborn.sum()) < 9
    for path in paths[:4]:
        state = state_of(bio, path)
        assert (state.importance[reborn] == 0).all()
        assert (state.task_importance[reborn] == 0).all()
        assert torch.equal(state.anchor_weight[reborn], state.weight[reborn])
        assert torch.equal(state.importance[~reborn], before[path][~reborn])
    reader = state_of(bio, "3.weight")
    assert (reader.importance[:, reborn] == 0).all()
    assert (reader.anchor_weight[:, reborn] == 0).all()
    state = state_of(bio, "3.bias")
    assert torch.equal(state.importance, before["3.bias"])
    assert ((state.anchor_weight - anchor).abs() > 1e-6).any()
    assert ((state.weight - bias).abs() > 1e-6).any()
