"""Which parameters that no layer holds are weights between units, and are scaled for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.plasticity.model_states import bio_modules

CONFIG = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3)


class Liquid(nn.Module):
    """Synapses of a liquid time-constant network, one step of it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.sigma = nn.Parameter(torch.rand(4, 3)), nn.Parameter(3 + torch.rand(4, 3))
        self.mu, self.erev = nn.Parameter(torch.rand(4, 3)), nn.Parameter(torch.randn(4, 3))
        self.positive, self.leak = nn.Softplus(), nn.Parameter(torch.rand(3))
        self.register_buffer("mask", (torch.rand(4, 3) < 0.7).float())

    def forward(self, v: Tensor) -> Any:
        gate = torch.sigmoid(self.sigma * (torch.unsqueeze(v, -1) - self.mu))
        activation = self.positive(self.w) * gate * self.mask
        return torch.sum(activation * self.erev, dim=1) / (self.leak + torch.sum(activation, dim=1))


class Centres(nn.Module):
    """Radial basis functions: squared distances to centres, by a loop-free sum."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.readout = nn.Parameter(torch.randn(3, 4)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.readout(torch.exp(-((x[:, None, :] - self.centres) ** 2).sum(-1)))


class TwoWeights(nn.Module):
    """A kernel in time and one in space, multiplied to the weight of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.space = nn.Conv2d(1, 5, (3, 1)), nn.Conv2d(5, 6, (1, 4), bias=False)

    def forward(self, x: Tensor) -> Any:
        weight = (self.time.weight * self.space.weight.permute(1, 0, 2, 3)).sum(0).unsqueeze(1)
        return F.conv2d(x[:, None], weight)


def scaled(model: nn.Module) -> dict[str, Tensor]:
    states: dict[str, Any] = bio_modules(model)
    return {path: s.fuzzy_learning_rate_parameters for path, s in states.items() if s.has_factors}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).abs().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("make", "x", "names"),
    [
        (Liquid, torch.randn(2, 4), {"w", "sigma", "mu", "erev"}),
        (Centres, torch.randn(2, 4), {"centres", "readout.weight"}),
        (TwoWeights, torch.randn(2, 7, 4), {"time.weight", "space.weight"}),
    ],
)
def test_synapses_element_by_element_are_scaled_to_the_bit(
    make: Callable[[], nn.Module], x: Tensor, names: set[str], recorded: bool
) -> None:
    torch.manual_seed(0)
    model = make()
    bio_model, _ = biofx.transform(model, CONFIG, example_inputs=((x,), {}) if recorded else None)
    factors = scaled(bio_model)
    assert set(factors) == names
    assert torch.equal(bio_model(x), model(x))
    plain, found = gradients(model, x), gradients(bio_model, x)
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient * factors[name] if name in names else gradient), name


class Read(nn.Module):
    """Reads one parameter in a way that a test gives."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.dense, self._read = nn.Parameter(torch.randn(shape)), nn.Linear(4, 4), read
        self.register_buffer("mask", torch.eye(4))

    def forward(self, x: Tensor) -> Any:
        return self._read(self.dense(x), self.p)


@pytest.mark.parametrize(
    ("shape", "read", "is_synaptic"),
    [
        ((4, 4), lambda x, p: (x * p).sum(-1), True),
        ((4, 4), lambda x, p: (p * x).sum(dim=1), True),
        ((4, 4), lambda x, p: (F.relu(p) * x).tanh().sum(1), True),
        ((4, 4), lambda x, p: x @ (p * torch.eye(4)).abs().t(), True),
        ((4, 4), lambda x, p: (x.unsqueeze(2) - p).abs().sum(1), True),
        ((4, 4), lambda x, p: torch.where(x[0] > 0, p, 0.0).sum(0), True),
        ((4, 4), lambda x, p: (x + p).sum(1), False),  # positions
        ((4, 4), lambda x, p: (x + p).relu().mean(1), False),
        ((4, 4), lambda x, p: (x + p) @ torch.eye(4), False),
        ((4, 4), lambda x, p: x * p, False),  # a gain for each place
        ((4, 4), lambda x, p: (x * p).sum(), False),  # not over an axis
        ((1, 4), lambda x, p: (x * p).sum(1), False),  # a gain for each unit
        ((4, 4), lambda x, p: x + p.exp().sum(1), False),  # a sum of parameters
    ],
)
def test_what_counts_as_a_weight_between_units(
    shape: tuple[int, ...], read: Callable[[Tensor, Tensor], Tensor], is_synaptic: bool
) -> None:
    bio_model, _ = biofx.transform(Read(shape, read), CONFIG)
    assert set(scaled(bio_model)) == ({"dense.weight", "p"} if is_synaptic else {"dense.weight"})


def test_complex_weights_are_scaled_by_real_factors() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, 2, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Any:
            modes = torch.fft.rfft(x)[..., :2]
            return torch.fft.irfft(torch.einsum("bim,iom->bom", modes, self.w), n=x.shape[-1])

    torch.manual_seed(0)
    model, x = Spectral(), torch.randn(2, 3, 8)
    bio_model, _ = biofx.transform(model, CONFIG.replace(apply_dales_principle=True))
    factors = scaled(bio_model)["w"]
    assert factors.dtype == torch.float32
    assert torch.equal(gradients(bio_model, x)["w"], gradients(model, x)["w"] * factors)
