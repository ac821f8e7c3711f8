"""Rules that hold weights back, against their definitions written out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.operators.sampling import for_each_block, generator_for, normal_quantiles, sampled_from
from biofx.plasticity.consolidation import follow_utility
from tests.consolidation_models import (
    DAMPING,
    DECAY,
    OPTIMIZERS,
    RULE_OF,
    STRENGTH,
    batch,
    close,
    loss_of,
    made,
    net,
    parameters,
    slopes_of,
    state_of,
    train,
)

# by hand: the penalty is in the loss, and importance follows from the papers' formulas


class ByHand:
    """A plain network that is trained with the penalty in its loss."""

    def __init__(self, optimizer: str, method: str) -> None:
        self.model, self.method = net(), method
        self.weights = dict(self.model.named_parameters())
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.importance = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        self.path = copy.deepcopy(self.importance)
        self.anchor = {name: p.detach().clone() for name, p in self.weights.items()}
        self.steps = 0

    def penalty(self) -> Tensor:
        factor = {
            "synaptic-intelligence": STRENGTH,
            "elastic": STRENGTH / 2 * DECAY,
            "memory-aware": STRENGTH,
        }
        squares = [
            (self.importance[name] * (p - self.anchor[name]) ** 2).sum() for name, p in self.weights.items()
        ]
        return factor[self.method] * torch.stack(squares).sum()

    def step(self, *batches: int) -> None:
        loss = torch.stack([loss_of(self.model, number) for number in batches]).sum()
        slopes = slopes_of(loss, self.weights)
        before = {name: p.detach().clone() for name, p in self.weights.items()}
        self.optimizer.zero_grad()
        (loss + self.penalty()).backward()
        self.optimizer.step()
        self.steps += 1
        for (name, p), slope in zip(self.weights.items(), slopes.values(), strict=True):
            if self.method == "synaptic-intelligence":
                self.path[name] += -slope * (p.detach() - before[name])
            else:
                self.path[name] += slope**2

    def end(self, found: dict[str, Tensor] | None = None) -> None:
        for name, p in self.weights.items():
            moved = p.detach() - self.anchor[name]
            if self.method == "synaptic-intelligence":
                added = self.importance[name] + self.path[name] / (moved**2 + DAMPING)
                self.importance[name] = added.clamp(min=0)
            elif self.method == "elastic":
                seen = self.path[name] / self.steps if found is None else found[name]
                self.importance[name] = DECAY * self.importance[name] + seen
            elif found is not None:
                self.importance[name] = self.importance[name] + found[name]
            self.anchor[name] = p.detach().clone()
            self.path[name] = torch.zeros_like(p)
        self.steps = 0


@pytest.mark.parametrize("method", ["synaptic-intelligence", "elastic"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_tasks_as_with_the_penalty_in_the_loss(optimizer: str, method: str) -> None:
    """Biases and gains too; each step accumulates two batches."""
    bio, hand = made(method=method), ByHand(optimizer, method)
    stepping = OPTIMIZERS[optimizer](bio.parameters())
    plasticity = biofx.attach(bio, stepping, [RULE_OF[method]])
    number = 0
    for task in range(3):
        plasticity.begin_task()
        if task:
            hand.end()
        for _ in range(4):
            stepping.zero_grad()
            for part in (number, number + 1):
                loss_of(bio, part).backward()
            stepping.step()
            hand.step(number, number + 1)
            number += 2
        close(bio, hand.weights)
        for name, importance in hand.importance.items():
            found = state_of(bio, name).importance
            torch.testing.assert_close(found, importance, rtol=0, atol=1e-12)
            assert task == 0 or float(found.max()) > 0
    plain = net()
    train(plain, OPTIMIZERS[optimizer](plain.parameters()), range(12))
    assert (plain.get_parameter("0.weight") - bio.get_parameter("0.weight")).abs().max() > 1e-3


@pytest.mark.parametrize("rule", [*RULE_OF.values(), "l2_to_initial"])
def test_a_gradient_scaler_changes_nothing(rule: str) -> None:
    """Its scale is a power of 2, so results are equal to the bit; a step that it skips counts for nothing."""
    method = {name: method for method, name in RULE_OF.items()}.get(rule, "off")
    runs = []
    for scale in (1.0, 2.0**12):
        bio = made(method=method, l2_to_initial_strength=0.5).float()
        stepping = OPTIMIZERS["momentum"](bio.parameters())
        plasticity = biofx.attach(bio, stepping, [rule])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for task in range(2):
            if method not in ("upgd", "off"):
                plasticity.begin_task([batch(9)[0].float()] if rule == "memory_aware" else None)
            for step in range(3):
                stepping.zero_grad()
                inputs, target = batch(3 * task + step)
                scaler.scale(F.cross_entropy(bio(inputs.float()), target)).backward()
                if step == 1 and scale > 1:  # an overflow, after which the batch is taken again
                    bio.get_parameter("0.weight").grad[0, 0] = torch.inf
                    scaler.step(stepping)
                    scaler.update(scale)
                    stepping.zero_grad()
                    scaler.scale(F.cross_entropy(bio(inputs.float()), target)).backward()
                scaler.step(stepping)
                scaler.update()
        assert plasticity.steps == 6
        runs.append(bio.state_dict())
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def per_sample(model: nn.Module, steps: range, value: Any) -> dict[str, list[Tensor]]:
    weights = parameters(model)
    found: dict[str, list[Tensor]] = {name: [] for name in weights}
    for step in steps:
        inputs, target = batch(step)
        for number in range(len(inputs)):
            scalar = value(model(inputs[number : number + 1]), target[number])
            for name, slope in slopes_of(scalar, weights).items():
                found[name].append(slope)
    return found


def test_the_fisher_information_of_given_labels() -> None:
    bio, hand = made(method="elastic"), ByHand("SGD", "elastic")
    stepping = OPTIMIZERS["SGD"](bio.parameters())
    plasticity = biofx.attach(bio, stepping, ["elastic_consolidation"])
    plasticity.begin_task()
    for task in range(2):
        for step in range(3):
            hand.step(3 * task + step)
        train(bio, stepping, range(3 * task, 3 * task + 3))
        seen = per_sample(hand.model, range(2), lambda output, label: -output.log_softmax(1)[0, label])
        hand.end({name: torch.stack(slopes).square().mean(0) for name, slopes in seen.items()})
        plasticity.begin_task([batch(0), batch(1)], F.cross_entropy)
    for name, importance in hand.importance.items():
        torch.testing.assert_close(state_of(bio, name).importance, importance, rtol=0, atol=1e-12)
    close(bio, hand.weights)


def test_labels_are_drawn_from_the_model() -> None:
    """Their expectation over many draws is the Fisher information itself."""
    bio = made(method="elastic", consolidation_decay=1.0)
    plasticity = biofx.attach(bio, OPTIMIZERS["SGD"](bio.parameters()), ["elastic_consolidation"])
    inputs = batch(0)[0][:3]
    exact = {name: torch.zeros_like(p) for name, p in parameters(bio).items()}
    for one in inputs:
        logs = bio(one[None]).log_softmax(1)[0]
        for label in range(3):
            for name, slope in slopes_of(logs[label], parameters(bio)).items():
                exact[name] += logs[label].exp().detach() * slope**2 / 3
    plasticity.begin_task([inputs.repeat(700, 1)])
    for name, expected in exact.items():
        found = state_of(bio, name).importance
        assert (found - expected).abs().max() < 0.06 * expected.max()
        assert (found - expected).abs().max() > 0


def test_memory_aware_by_hand() -> None:
    bio, hand = made(method="memory-aware"), ByHand("Adam", "memory-aware")
    stepping = OPTIMIZERS["Adam"](bio.parameters())
    plasticity = biofx.attach(bio, stepping, ["memory_aware"])
    plasticity.begin_task()
    for task in range(3):
        for step in range(3):
            hand.step(3 * task + step)
        train(bio, stepping, range(3 * task, 3 * task + 3))
        close(bio, hand.weights)
        seen = per_sample(hand.model, range(task, task + 2), lambda output, _: (output**2).sum())
        hand.end({name: torch.stack(slopes).abs().mean(0) for name, slopes in seen.items()})
        plasticity.begin_task(batch(step)[0] for step in range(task, task + 2))
        for name, importance in hand.importance.items():
            torch.testing.assert_close(state_of(bio, name).importance, importance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_pull_to_the_initial_weight_by_hand(optimizer: str) -> None:
    bio = made(method="off", l2_to_initial_strength=0.3)
    stepping = OPTIMIZERS[optimizer](bio.parameters())
    biofx.attach(bio, stepping, ["l2_to_initial"])
    plain = net()
    start = [p.detach().clone() for p in plain.parameters()]
    other = OPTIMIZERS[optimizer](plain.parameters())
    for step in range(6):
        other.zero_grad()
        apart = [((p - p0) ** 2).sum() for p, p0 in zip(plain.parameters(), start, strict=True)]
        (loss_of(plain, step) + 0.3 * torch.stack(apart).sum()).backward()
        other.step()
    train(bio, stepping, range(6))
    close(bio, dict(plain.named_parameters()))


@pytest.mark.parametrize("scaling", ["network", "layer"])
def test_upgd_by_hand(scaling: str) -> None:
    sigma, beta, rate = 0.05, 0.9, 0.1
    options: dict[str, Any] = {"upgd_noise": sigma, "upgd_utility_decay": beta, "upgd_scaling": scaling}
    bio = made(method="upgd", **options)
    stepping = torch.optim.SGD(bio.parameters(), lr=rate)
    biofx.attach(bio, stepping, ["upgd"])
    plain = net()
    weights: dict[str, Any] = dict(plain.named_parameters())
    utility = {name: torch.zeros_like(p) for name, p in weights.items()}
    for step in range(5):
        slopes = slopes_of(loss_of(plain, step), weights)
        corrected = {}
        for name, p in weights.items():
            utility[name] = beta * utility[name] - (1 - beta) * slopes[name] * p.detach()
            corrected[name] = utility[name] / (1 - beta ** (step + 1))
        largest = max(float(values.max()) for values in corrected.values())
        with torch.no_grad():
            for name, p in weights.items():
                top = largest if scaling == "network" else float(corrected[name].max())
                gate = 1 - torch.sigmoid(corrected[name] / top if top else torch.zeros_like(p))
                p -= rate * (slopes[name] + noise(p.shape, name, step, sigma)) * gate
        train(bio, stepping, range(step, step + 1))
        close(bio, weights)


def noise(shape: torch.Size, path: str, event: int, sigma: float) -> Tensor:
    """N(0, σ²), as the definition of the rule's random numbers has it."""
    flat = torch.empty(shape.numel(), dtype=torch.float64)

    def draw(block: slice, own: torch.Generator) -> None:
        flat[block] = sampled_from(normal_quantiles() * sigma, block.stop - block.start, own).double()

    for_each_block(len(flat), draw, generator_for(0, path, event, purpose="upgd"))
    return flat.reshape(shape)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_importance_may_lower_rates(optimizer: str) -> None:
    bio = made(method="synaptic-intelligence", consolidation_effect="rates")
    stepping = OPTIMIZERS[optimizer](bio.parameters())
    plasticity = biofx.attach(bio, stepping, ["synaptic_intelligence"])
    plasticity.begin_task()
    train(bio, stepping, range(4))
    plasticity.begin_task()
    before = {name: p.detach().clone() for name, p in parameters(bio).items()}
    free = copy.deepcopy((bio, stepping, plasticity))
    free[2].detach()
    train(*free[:2], range(4, 5))
    train(bio, stepping, range(4, 5))
    for name, p in parameters(bio).items():
        importance = state_of(bio, name).importance
        rate = 1 / (1 + STRENGTH * importance / importance.mean())
        moved = parameters(free[0])[name].detach() - before[name]
        torch.testing.assert_close(p.detach() - before[name], rate * moved, rtol=0, atol=1e-12)
        assert float(rate.max() / rate.min()) > 1.2


@pytest.mark.parametrize("front_door", ["transform", "convert"])
@pytest.mark.parametrize("splitting", [{}, {"weight_splitting_Gamma": 3, "weight_splitting_rates": "mean"}])
def test_factors_act_on_pulls_as_on_gradients(front_door: str, splitting: Any) -> None:
    """And importance follows from gradients without them."""
    config = biofx.BioConfig(
        **{"consolidation": "synaptic-intelligence", "consolidation_damping": DAMPING, **splitting},
        fuzzy_learning_rate_factor_nu=0.4,
        consolidation_strength=STRENGTH,
        consolidation_parameters="weights",
    )
    bio: Any = (
        biofx.transform(net(), config)[0] if front_door == "transform" else biofx.BioConverter(config)(net())
    )
    rate = 0.05
    expected: dict[str, Any] = {}
    stepping = torch.optim.SGD(bio.parameters(), lr=rate)
    plasticity = biofx.attach(bio, stepping, ["synaptic_intelligence"])
    plasticity.begin_task()
    for task in range(2):
        path: dict[str, Any] = {}
        start: dict[str, Tensor] = {}
        for step in range(3):
            bare = copy.deepcopy(bio)
            levels = {}
            for name in ("0.weight", "3.weight"):
                levels[name] = state_of(bare, name).gradient_level
                state_of(bare, name).fuzzy_learning_rate_parameters.fill_(1.0)
            bare.zero_grad()
            loss_of(bare, 3 * task + step).backward()
            old = {name: bare.get_parameter(name).detach() for name in levels}
            train(bio, stepping, range(3 * task + step, 3 * task + step + 1))
            for name, level in levels.items():
                slope, state = bare.get_parameter(name).grad / level, state_of(bio, name)
                factor, moved = (
                    state.fuzzy_learning_rate_parameters.double(),
                    state.weight.detach() - old[name],
                )
                start.setdefault(name, old[name])
                pull = 2 * STRENGTH * expected[name] * (old[name] - start[name]) if task else 0
                torch.testing.assert_close(moved, -rate * level * factor * (slope + pull), rtol=0, atol=1e-12)
                path[name] = path.get(name, 0) - slope * moved
        plasticity.begin_task()
        for name, total in path.items():
            state = state_of(bio, name)
            distance = state.weight.detach() - start[name]
            added = expected.get(name, 0) + total / (distance**2 + DAMPING)
            expected[name] = added.clamp(min=0)
            torch.testing.assert_close(state.importance, expected[name], rtol=0, atol=1e-12)
    assert (levels["0.weight"] == 1) == (not splitting)


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
@pytest.mark.parametrize("rule", [*RULE_OF.values(), "l2_to_initial"])
def test_a_factor_of_0_and_frozen_weights_stay_to_the_bit(rule: str, optimizer: str) -> None:
    method = {name: method for method, name in RULE_OF.items()}.get(rule, "off")
    options: dict[str, Any] = {
        "fuzzy_lr_distribution": "uniform",
        "fuzzy_lr_min": 0.0,
        "l2_to_initial_strength": 0.5,
    }
    bio = made(method=method, **options)
    state_of(bio, "0.weight").fuzzy_learning_rate_parameters[:4] = 0
    bio.get_parameter("3.weight").requires_grad_(False)
    stepping = OPTIMIZERS[optimizer](bio.parameters())
    plasticity = biofx.attach(bio, stepping, [rule])
    before = {name: p.detach().clone() for name, p in parameters(bio).items()}
    for task in range(2):
        if method not in ("upgd", "off"):
            plasticity.begin_task([batch(9)[0]] if rule == "memory_aware" else None)
        train(bio, stepping, range(3 * task, 3 * task + 3))
    assert torch.equal(bio.get_parameter("0.weight")[:4], before["0.weight"][:4])
    assert torch.equal(bio.get_parameter("3.weight"), before["3.weight"])
    assert (bio.get_parameter("0.weight")[4:] != before["0.weight"][4:]).all()


@pytest.mark.parametrize("rule", [*RULE_OF.values(), "l2_to_initial"])
def test_signs_and_masks_hold(rule: str) -> None:
    method = {name: method for method, name in RULE_OF.items()}.get(rule, "off")
    options: dict[str, Any] = {
        "apply_dales_principle": True,
        "dales_constrain_readout": True,
        "weight_density": 0.5,
    }
    bio = made(net(signed=True), method, l2_to_initial_strength=0.5, **options)
    stepping = OPTIMIZERS["SGD"](bio.parameters())
    plasticity = biofx.attach(bio, stepping, [rule])
    for task in range(2):
        if method not in ("upgd", "off"):
            plasticity.begin_task([batch(9)[0]] if rule == "memory_aware" else None)
        train(bio, stepping, range(3 * task, 3 * task + 3))
    state = state_of(bio, "3.weight")
    assert (state.weight * state.presynaptic_signs() >= 0).all()
    assert (state.masked_weight[state.connection_mask != 1] == 0).all()
    assert biofx.check(bio).ok


def test_new_synapses_are_of_no_importance() -> None:
    bio = made(rejuvenation_turnover=0.5, rejuvenation_redraw="initial")
    stepping = OPTIMIZERS["SGD"](bio.parameters())
    rules: list[Any] = ["synaptic_intelligence", biofx.Rule("rejuvenate_weights", every=100, after=5)]
    plasticity = biofx.attach(bio, stepping, rules)
    plasticity.begin_task()
    train(bio, stepping, range(4))
    plasticity.begin_task()
    train(bio, stepping, range(4, 5))
    state = state_of(bio, "0.weight")
    importance, anchor, weight = state.importance.clone(), state.anchor_weight.clone(), state.weight.clone()
    train(bio, stepping, range(5, 6))
    new = state.importance != importance
    assert 10 < int(new.sum()) < 50
    assert (state.importance[new] == 0).all()
    assert (state.task_importance[new] == 0).all()
    assert torch.equal(state.anchor_weight[new], state.weight[new])
    assert torch.equal(state.anchor_weight[~new], anchor[~new])
    assert ((state.weight - weight).abs()[new] > 1e-3).double().mean() > 0.9


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_utility_of_upgd_as_it_was(wrong: float) -> None:
    weight, utility = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4)
    gradient = torch.full((3, 4), 2.0)
    gradient[1, 2] = wrong
    expected = 0.9 * utility - 0.1 * gradient * weight
    expected[1, 2] = 1.0
    follow_utility(utility, gradient, weight, 0.9)
    torch.testing.assert_close(utility, expected)


def test_utility_of_upgd_is_finite_again_with_the_gradient() -> None:
    bio = made(method="upgd", upgd_noise=0.0)
    stepping = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, stepping, ["upgd"])
    loss_of(bio, 0).backward()
    for parameter in bio.parameters():
        assert parameter.grad is not None
        parameter.grad[0] = float("nan")
    before = copy.deepcopy(parameters(bio))
    stepping.step()
    for path, parameter in parameters(bio).items():
        importance = state_of(bio, path).importance
        assert importance is not None
        assert bool(importance.isfinite().all())
        assert not bool(importance[0].any())  # 0 at the start
        assert not torch.equal(parameter[-1], before[path][-1])
