"""Attacks find what gradients say; mechanisms hide it from those alone who do not know of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import biofx
from reproduce import inversion
from reproduce.arms import build
from reproduce.data import digits
from reproduce.experiment import Job
from reproduce.experiments.gradient_inversion import (
    ARMS,
    NETWORKS,
    attack,
    perceptron,
    run,
    taken_for,
    without_factors,
)
from reproduce.inversion import Gradients, Matching

SHAPE = (1, 8, 8)
IMAGES, LABELS = digits(0).test


def victim_of(arm: str, network: str = "perceptron", seed: int = 0) -> nn.Module:
    return build(ARMS[arm], lambda: NETWORKS[network](SHAPE), seed)[0]


def job_of(arm: str, case: str, **lengths: int) -> Job:
    full = {"images": 1, "lbfgs": 20, "adam": 150, "starts": 2} | lengths
    return Job(
        experiment="gradient-inversion",
        dataset="digits",
        case=case,
        arm=arm,
        rate=1.0,
        seed=0,
        lengths=tuple(full.items()),
    )


# the label


def test_the_readouts_gradient_is_negative_in_the_labels_row_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)).double()
    image = IMAGES[0].double()
    hidden = model[:3](image[None])[0].detach()
    probabilities = model(image[None]).softmax(1)[0].detach()
    for label in range(10):
        readout = inversion.gradients(model, image, label)[-2]
        by_hand = torch.outer(probabilities - torch.eye(10).double()[label], hidden)
        torch.testing.assert_close(readout, by_hand, rtol=0, atol=1e-12)
        assert (by_hand.sum(1) < 0).nonzero().flatten().tolist() == [label]
        assert inversion.recover_label(readout) == label


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("arm", [name for name in ARMS if not name.endswith("blind")])
def test_no_mechanism_hides_the_label(arm: str, network: str) -> None:
    victim = victim_of(arm, network)
    recovered = [
        inversion.recover_label(inversion.gradients(victim, IMAGES[number], number)[-2])
        for number in range(10)
    ]
    assert recovered == list(range(10))


# reading the image off the first layer


def test_a_layers_input_is_read_off_its_gradients() -> None:
    model, image = perceptron(SHAPE).double(), IMAGES[1].double()
    weight, bias = inversion.gradients(model, image, 3)[:2]
    torch.testing.assert_close(weight[5] / bias[5], image.flatten(), rtol=0, atol=1e-12)
    torch.testing.assert_close(inversion.read_input(weight, bias), image.flatten(), rtol=0, atol=1e-12)


def test_factors_that_scatter_average_out_over_the_units() -> None:
    victim = victim_of("rates 0.5, blind").double()
    factors: Any = victim.get_submodule("1.bio_mod").fuzzy_learning_rate_parameters
    weight, bias = inversion.gradients(victim, IMAGES[1].double(), 3)[:2]
    one = weight[5] / bias[5]
    torch.testing.assert_close(one, factors[5].double() * IMAGES[1].double().flatten(), rtol=0, atol=1e-12)
    read = inversion.read_input(weight, bias)
    by_hand = [float((bias * weight[:, pixel]).sum() / (bias * bias).sum()) for pixel in range(64)]
    torch.testing.assert_close(read, torch.tensor(by_hand).double(), rtol=0, atol=1e-6)
    errors = [float((found - IMAGES[1].flatten()).square().mean()) for found in (one, read)]
    assert errors[0] > 10 * errors[1]


@pytest.mark.parametrize("mechanism", ["rates 0.5", "all"])
def test_who_knows_the_factors_has_the_gradients_without(mechanism: str) -> None:
    victim = victim_of(f"{mechanism}, informed").double()
    image = IMAGES[2].double()
    shared = inversion.gradients(victim, image, 7)
    divided = without_factors(victim, shared)
    for name, buffer in victim.named_buffers():
        if name.endswith("fuzzy_learning_rate_parameters"):
            buffer.fill_(1)
    for own, other in zip(divided, inversion.gradients(victim, image, 7), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    assert not torch.equal(shared[0], divided[0])


# matching gradients


@pytest.mark.parametrize("mechanism", ["rates 0.5", "split", "signs", "all"])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_differentiated_by_the_image_through_every_mechanism(
    mechanism: str, network: str
) -> None:
    victim = victim_of(f"{mechanism}, informed", network).double()
    generator = Generator().manual_seed(0)
    image = torch.rand(SHAPE, generator=generator).double().requires_grad_()
    direction = torch.randn(SHAPE, generator=generator).double()
    weights = [
        torch.randn(gradient.shape, generator=generator).double()
        for gradient in inversion.gradients(victim, image, 4)
    ]

    def weighted(at: Tensor) -> Tensor:
        pairs = zip(weights, inversion.gradients(victim, at, 4, differentiable=True), strict=True)
        return torch.stack([(weight * gradient).sum() for weight, gradient in pairs]).sum()

    (slope,) = torch.autograd.grad(weighted(image), image)
    step = 1e-6
    ahead, behind = (float(weighted(image.detach() + side * step * direction).detach()) for side in (1, -1))
    assert float((slope * direction).sum()) == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_a_plain_networks_image_is_reconstructed() -> None:
    victim, image = victim_of("plain"), IMAGES[3]
    seen = inversion.gradients(victim, image, 2)

    def simulate(guess: Tensor) -> Gradients:
        return inversion.gradients(victim, guess, 2, differentiable=True)

    errors = {}
    for objective, steps in (("distance", 20), ("direction", 150)):
        matching = Matching(objective, steps)
        found = inversion.reconstruct(simulate, seen, SHAPE, matching, Generator().manual_seed(0))
        errors[objective] = inversion.error(found, image)
    assert errors["distance"] < 1e-6
    assert errors["direction"] < 1e-2


@pytest.mark.parametrize("mechanism", ["rates 0.5", "split", "all"])
def test_the_informed_see_what_the_blind_do_not(mechanism: str) -> None:
    errors = {}
    for attacker in ("blind", "informed"):
        job = job_of(f"{mechanism}, {attacker}", "perceptron: distance")
        found, label_is_right = attack(job, IMAGES[4], int(LABELS[4]), 0)
        assert label_is_right
        errors[attacker] = inversion.error(found, IMAGES[4])
    assert errors["informed"] < 1e-5
    assert errors["blind"] > 1e-2


def test_a_search_starts_again_and_keeps_the_best_match() -> None:
    victim, image = victim_of("plain"), IMAGES[5]
    seen = inversion.gradients(victim, image, 6)
    starts: list[Tensor] = []

    def simulate(guess: Tensor) -> Gradients:
        if len(starts) < 3 and not any(guess is start for start in starts):
            starts.append(guess)
        return inversion.gradients(victim, guess, 6, differentiable=True)

    def distance(found: Tensor) -> float:
        own = inversion.gradients(victim, found, 6)
        size = sum(float(other.square().sum()) for other in seen)
        return sum(float((a - b).square().sum()) for a, b in zip(own, seen, strict=True)) / size

    matching = Matching("direction", 3, starts=3)
    inversion.reconstruct(simulate, seen, SHAPE, matching, Generator().manual_seed(1))
    assert len(starts) == 3
    starts.clear()
    found = inversion.reconstruct(
        simulate, seen, SHAPE, Matching("distance", 20, starts=3), Generator().manual_seed(1)
    )
    assert len(starts) == 1  # an exact match ends the search
    assert distance(found) < 1e-8


def test_the_blind_have_the_weights_and_no_mechanism() -> None:
    victim = victim_of("all, blind")
    model = taken_for(victim, perceptron(SHAPE))
    names = {name for name, _ in victim.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names
    assert all(torch.equal(value, victim.get_parameter(name)) for name, value in model.named_parameters())
    assert not torch.allclose(model(IMAGES[:3]), victim(IMAGES[:3]))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_narrow_network_is_as_wide_as_what_split_layers_deploy(network: str) -> None:
    deployed: Any = biofx.deploy(victim_of("split, informed", network))
    narrow = NETWORKS[network](SHAPE, 1)
    assert [value.shape for value in narrow.parameters()] == [value.shape for value in deployed.parameters()]


# what is reported


def test_errors_are_those_of_their_definitions() -> None:
    generator = Generator().manual_seed(0)
    true, found = torch.rand(2, 1, 9, 10, generator=generator, dtype=torch.float64)
    squares = [(a - b) ** 2 for a, b in zip(found.flatten().tolist(), true.flatten().tolist(), strict=True)]
    error = sum(squares) / 90
    assert inversion.error(found, true) == pytest.approx(error, rel=1e-12)
    assert inversion.peak_ratio(found, true) == pytest.approx(10 * math.log10(1 / error), rel=1e-12)
    assert inversion.peak_ratio(true, true) == 100
    assert inversion.similarity(true, true) == pytest.approx(1, rel=1e-12)
    windows = []
    for row in range(3):
        for column in range(4):
            x = found[0, row : row + 7, column : column + 7].flatten()
            y = true[0, row : row + 7, column : column + 7].flatten()
            (var_x, cov), (_, var_y) = torch.cov(torch.stack([x, y])).tolist()
            mean_x, mean_y = float(x.mean()), float(y.mean())
            windows.append(
                (2 * mean_x * mean_y + 1e-4)
                * (2 * cov + 9e-4)
                / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
            )
    assert inversion.similarity(found, true) == pytest.approx(sum(windows) / 12, rel=1e-10)


def test_total_variation_is_the_mean_step_down_and_across() -> None:
    image = torch.tensor([[[0.0, 1.0, 1.0], [0.5, 0.0, 0.0]]])
    assert float(inversion.total_variation(image)) == pytest.approx((0.5 + 1 + 1) / 3 + (1 + 0 + 0.5 + 0) / 4)


def test_a_run_attacks_images_of_its_seed_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    found = run(job_of("plain", "perceptron: read off", images=3), digits).figures
    assert torch.equal(torch.get_rng_state(), state)
    assert found["error"] < 1e-9
    assert found["label"] == 100
    assert found["similarity"] == pytest.approx(1, abs=1e-4)
    scattered = run(job_of("rates 0.5, blind", "perceptron: read off", images=3), digits).figures
    assert 1e-6 < scattered["error"] < 1e-2
