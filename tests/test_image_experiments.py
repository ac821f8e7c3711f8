"""Experiments on images: what their arms are, what they measure, and that they run from start to end."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

import biofx
from reproduce import command
from reproduce.arms import build
from reproduce.data import Data, digits
from reproduce.experiments import dale_perceptrons, label_noise, synaptic_diversity
from reproduce.networks import dense
from reproduce.training import accuracy, each_epoch, learn

SHAPE = (1, 8, 8)


def few(images: int = 60) -> Data:
    return digits(0).limited(images)


# training


def test_what_is_limited_has_the_first_images() -> None:
    whole, limited = digits(0), digits(0).limited(60, 20)
    parts = ((limited.train, whole.train, 60), (limited.validation, whole.validation, 20))
    for own, other, count in (*parts, (limited.test, whole.test, 20)):
        assert torch.equal(own[0], other[0][:count])
        assert torch.equal(own[1], other[1][:count])
    assert len(few().test[1]) == 500


def test_learning_is_descent_on_batches_in_an_order_of_the_seeds_own() -> None:
    data = few()
    torch.manual_seed(0)
    model, by_hand = dense(SHAPE, 12), dense(SHAPE, 12)
    by_hand.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation, test = learn(model, data, optimizer, epochs=2, batch=25, seed=7)
    order, found = Generator().manual_seed(7), []
    for _ in range(2):
        places = torch.randperm(60, generator=order)
        for batch in (places[:25], places[25:50], places[50:]):
            loss = F.cross_entropy(by_hand(data.train[0][batch]), data.train[1][batch])
            for parameter, slope in zip(
                by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters())), strict=True
            ):
                parameter.data -= 0.1 * slope
        found.append(100 * float((by_hand(data.test[0]).argmax(1) == data.test[1]).float().mean()))
    assert test == pytest.approx(found)
    assert validation[-1] == accuracy(model, data.validation)
    for own, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_rules_between_epochs_run_before_all_but_the_first() -> None:
    rule = each_epoch("rejuvenate_weights", few(), 25)
    assert [step for step in range(12) if rule.is_due(step)] == [3, 6, 9]  # of 4 epochs of 3 batches
    rule = each_epoch("rejuvenate_weights", few(), 25, epochs=2)
    assert [step for step in range(12) if rule.is_due(step)] == [6]


def test_accuracies_stay_once_weights_are_not_finite() -> None:
    data = few()
    model, _ = biofx.transform(dense(SHAPE, 12), {"fuzzy_lr_distribution": "baseline"})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    rules = [each_epoch("rejuvenate_weights", data, 25)]
    validation, test = learn(model, data, optimizer, epochs=4, batch=25, seed=0, rules=rules)
    assert (len(validation), len(test)) == (4, 4)
    assert test[1] == test[2] == test[3]


def test_networks_have_the_layers_that_are_asked_for() -> None:
    layers = [type(layer).__name__ for layer in dense(SHAPE, 5, 6, activation=nn.Sigmoid).children()]
    assert layers == ["Flatten", "Linear", "Sigmoid", "Linear", "Sigmoid", "Linear"]
    sizes = [tuple(weight.shape) for weight in dense(SHAPE, 5, 6).parameters() if weight.dim() == 2]
    assert sizes == [(5, 64), (6, 5), (10, 6)]


# synaptic diversity


def test_every_combination_of_mechanisms_is_an_arm() -> None:
    arms = synaptic_diversity.ARMS
    found = set()
    for name, arm in arms.items():
        config = arm.config or biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)
        rates = config.fuzzy_lr_distribution is not biofx.Distribution.BASELINE
        splits = config.weight_splitting_Gamma, config.weight_splitting_rates
        found.add((splits, rates, bool(arm.rules)))
        assert ("rates" in name, "turnover" in name) == (rates, bool(arm.rules))
        if rates:
            assert config.fuzzy_learning_rate_factor_nu == 0.09
        if arm.rules:
            assert config.rejuvenation_parameter_dre == 14
    levels = [(0, "sum"), (2, "sum"), (2, "mean")]
    assert found == set(itertools.product(levels, (False, True), (False, True)))


def test_what_is_matched_deploys_with_the_plain_width_and_takes_its_step() -> None:
    images, labels = digits(0).test[0][:40], digits(0).test[1][:40]
    deployed = {}
    for name, width in (("split", 128), ("split matched", 256)):
        split, _ = build(synaptic_diversity.ARMS[name], partial(dense, SHAPE, width), 0)
        merged: Any = biofx.deploy(split)
        deployed[name] = [tuple(weight.shape) for weight in merged.parameters() if weight.dim() == 2]
        plain = dense(SHAPE, width // 2)
        plain.load_state_dict(dict(zip(plain.state_dict(), merged.state_dict().values(), strict=True)))
        torch.testing.assert_close(plain(images), split(images))
        for model in (split, plain):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        moved = dict(zip(plain.state_dict(), biofx.deploy(split).state_dict().values(), strict=True))
        before = dict(zip(plain.state_dict(), merged.state_dict().values(), strict=True))
        steps = plain.state_dict()["1.weight"] - before["1.weight"]
        times = 1.0 if "matched" in name else 2.0
        torch.testing.assert_close(
            moved["1.weight"] - before["1.weight"], times * steps, rtol=1e-3, atol=1e-7
        )
    assert deployed == {"split": [(64, 64), (10, 64)], "split matched": [(128, 64), (10, 128)]}


# label noise


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_the_share_of_wrong_labels_is_exact(share: float) -> None:
    data = few(101)
    changed, (images, labels) = label_noise.noisy(data, share, seed=3)
    for own, other in ((changed.train, data.train), (changed.validation, data.validation)):
        differ = own[1] != other[1]
        assert int(differ.sum()) == round(share * len(other[1]))
        assert torch.equal(own[0], other[0])
        assert set(own[1].tolist()) <= set(range(10))
    assert torch.equal(changed.test[1], data.test[1])
    wrong = (changed.train[1] != data.train[1]).nonzero().flatten()
    known = {tuple(image.flatten().tolist()) for image in data.train[0][wrong]}
    assert {tuple(image.flatten().tolist()) for image in images} == known
    assert len(labels) == len(wrong)
    again, _ = label_noise.noisy(data, share, seed=3)
    assert torch.equal(again.train[1], changed.train[1])


def test_wrong_labels_are_any_other_class_equally() -> None:
    part = torch.zeros(9000, 1, 1, 1), torch.full((9000,), 4)
    (_, labels), wrong = label_noise.with_wrong_labels(part, 1.0, Generator().manual_seed(0))
    assert len(wrong.unique()) == 9000
    counts = torch.bincount(labels, minlength=10)
    assert counts[4] == 0
    others = counts[torch.arange(10) != 4]
    assert float(((others - 1000) ** 2 / 1000).sum()) < 26.1  # chi-squared, 8 degrees of freedom, 0.1 %


# Dale's principle


def test_arms_with_signs_begin_as_they_are_said_to() -> None:
    def made(name: str) -> nn.Module:
        return build(dale_perceptrons.ARMS[name], lambda: dense(SHAPE, 20, 20, 20), 5)[0].eval()

    images = digits(0).test[0][:40]
    plain, project, free, expand = (made(name) for name in ("plain", "project", "sign-free", "expand"))
    torch.testing.assert_close(expand(images), plain(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(free(images), project(images), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(project(images), plain(images), atol=1e-3)


# from start to end


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "synaptic-diversity",
            "--arms|split matched, rates, turnover|--rates|0.001|0.1|--short|epochs=2|images=200",
        ),
        ("dale-perceptrons", "--arms|project|--rates|0.1|--short|epochs=1|images=200"),
        (
            "label-noise",
            "--arms|weights by utility 0.4|units 0.4|shrink and perturb 0.4|--rates|0.05"
            "|--cases|40 % wrong|--short|epochs=3|stage=1|images=200",
        ),
        (
            "gradient-inversion",
            "--arms|all, informed|split, blind|--cases|perceptron: read off|perceptron: distance"
            "|convolutional: direction|--short|images=1|lbfgs=1|adam=3|starts=1",
        ),
    ],
)
def test_an_experiment_runs_from_start_to_end(name: str, arguments: str, tmp_path: Path) -> None:
    assert command.main([name, "--out", str(tmp_path), "--seeds", "0", "1", *arguments.split("|")]) == 0
    folder = tmp_path / name
    summary = json.loads((folder / "results.json").read_text())
    table = (folder / "table.md").read_text()
    assert "| published | figure |" in table
    assert all(f"| {row['case']} | {row['arm']} |" in table for row in summary["rows"])
    assert {row["arm"] for row in summary["rows"]} > {"plain"}
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
