"""Whether a weight looks trained: never for one that was just drawn, and for one that learned for a while."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.errors import BiofxWarning
from biofx.plasticity.exchangeability import ALIGNED, alignment, looks_trained

SHAPES = ((8, 64), (16, 32), (64, 64), (10, 784), (300, 20), (600, 700), (128, 9))


def _filled(distribution: torch.distributions.Distribution) -> Callable[[Tensor], object]:
    return lambda weight: weight.copy_(distribution.sample(weight.shape))


def _scaled(weight: Tensor) -> None:
    """Gates of different scale, as recurrent layers are sometimes initialised."""
    weight.normal_()
    for number, part in enumerate(weight.chunk(4)):
        part.mul_((1.0, 2.0, 0.5, 1.0)[number])


def _signed(weight: Tensor) -> None:
    """Columns of one sign each, as a user's own initialisation by Dale's principle makes them."""
    weight.normal_().abs_().mul_(torch.randn(weight.shape[1]).sign())


INITIALISATIONS: dict[str, Callable[[Tensor], object]] = {
    "of torch's layers": lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)),
    "He, normal": nn.init.kaiming_normal_,
    "Xavier, uniform": nn.init.xavier_uniform_,
    "Xavier, normal": nn.init.xavier_normal_,
    "of transformers": lambda weight: nn.init.normal_(weight, std=0.02),
    "of timm": lambda weight: nn.init.trunc_normal_(weight, std=0.02),
    "truncated": lambda weight: nn.init.trunc_normal_(weight, std=1.0),
    "orthogonal": nn.init.orthogonal_,
    "sparse": lambda weight: nn.init.sparse_(weight, 0.9),
    "identity": nn.init.eye_,
    "constant": lambda weight: nn.init.constant_(weight, 0.1),
    "zeros": nn.init.zeros_,
    "Gamma": _filled(torch.distributions.Gamma(2.0, 2.0)),
    "log-normal": _filled(torch.distributions.LogNormal(0.0, 1.0)),
    "binary": _filled(torch.distributions.Bernoulli(0.3)),
    "gates of different scale": _scaled,
    "columns of one sign": _signed,
}


@pytest.mark.parametrize("name", INITIALISATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_what_was_just_drawn_does_not_look_trained(name: str, shape: tuple[int, int]) -> None:
    for seed in range(10 if math.prod(shape) < 1e4 else 2):
        torch.manual_seed(seed)
        weight = torch.zeros(shape)
        INITIALISATIONS[name](weight)
        assert alignment(weight) < 1.4 < ALIGNED


def test_too_small_or_broken_weights_do_not_look_trained() -> None:
    trained = torch.outer(torch.randn(40), torch.randn(40))
    assert looks_trained(trained)
    for weight in (trained[:7], trained[:20, :20], trained.fill_(math.nan), torch.zeros(40, 40).to("meta")):
        assert not looks_trained(weight)


def test_the_moment_by_hand() -> None:
    """Of rows and columns that have one size already: the sum of the fourth powers of singular values."""
    signs = torch.tensor([1.0, -1.0]).repeat(16)
    one = torch.outer(signs, signs)  # a single direction: 32 ** 4
    generator, moments = torch.Generator().manual_seed(0), []
    for _ in range(3):
        shuffled = one.flatten()[torch.randperm(1024, generator=generator)].reshape(32, 32).double()
        for _ in range(2):
            shuffled = shuffled / shuffled.square().mean(1, keepdim=True).sqrt()
            shuffled = shuffled / shuffled.square().mean(0, keepdim=True).sqrt()
        moments.append(torch.linalg.svdvals(shuffled).pow(4).sum().item())
    assert alignment(one) == pytest.approx(32**4 / (sum(moments) / 3), rel=1e-5)


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(8, 40, generator=generator)
    labels = torch.randint(8, (1024,), generator=generator)
    return means[labels] + torch.randn(1024, 40, generator=generator), labels


def trained(make: Callable[[nn.Module], torch.optim.Optimizer], epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer, (x, labels) = make(model), problem()
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), labels[part]).backward()
            optimizer.step()
    return model


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam": lambda model: torch.optim.Adam(model.parameters(), 3e-3),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
}


def _convert(model: nn.Module, config: Any) -> nn.Module:
    converted: nn.Module = biofx.BioConverter(config)(model)
    return converted


SIGNS: dict[str, Any] = {"apply_dales_principle": True, "fuzzy_lr_distribution": "baseline"}


@pytest.mark.parametrize("front_door", ["transform", "convert"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_signs_on_a_trained_model_warn_once_and_name_expand(name: str, front_door: str) -> None:
    model = trained(OPTIMIZERS[name], 5 if name == "Adam" else 30)
    door: Any = biofx.transform if front_door == "transform" else _convert
    with pytest.warns(BiofxWarning, match="'2'.*do not look freshly made.*'expand'") as caught:
        made = door(model, SIGNS)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    if front_door == "transform":
        assert "; it looked trained" in str(made.report)


@pytest.mark.parametrize("kept", [{"dales_method": "expand"}, {"dales_initialisation": "keep"}])
def test_what_keeps_trained_weights_does_not_warn(kept: dict[str, str]) -> None:
    _, report = biofx.transform(trained(OPTIMIZERS["Adam"], 5), {**SIGNS, **kept})
    assert report.modified


def test_signs_on_a_fresh_model_do_not_warn() -> None:
    _, report = biofx.transform(trained(OPTIMIZERS["Adam"], 0), SIGNS)
    assert "trained" not in str(report)


def test_loading_over_trained_weights_does_not_warn(tmp_path: Path) -> None:
    made, _ = biofx.transform(trained(OPTIMIZERS["Adam"], 0), SIGNS)
    biofx.save(made, tmp_path / "fresh.pt")
    loaded = biofx.load(tmp_path / "fresh.pt", trained(OPTIMIZERS["Adam"], 5))
    assert torch.equal(loaded.get_parameter("2.weight"), made.get_parameter("2.weight"))
