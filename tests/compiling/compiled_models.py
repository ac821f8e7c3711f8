"""Models that are compiled in tests, and comparisons with what ``biofx.transform`` makes of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import biofx


class Block(nn.Module):
    """A layer with a normalisation, called twice with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.fc(x)))


class Net(nn.Module):
    """Layers in containers, dropout, a parameter that the forward reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)) * self.scale
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.drop(x))
        return logits


class Broken(nn.Module):
    """Two layers, a graph break, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        torch._dynamo.graph_break()
        found: Tensor = self.d(torch.relu(self.c(x)))
        return found


class Nest(nn.Module):
    """Two modules of one class, whose forwards have graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.second = nn.Linear(4, 4), Broken(), Broken()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(self.before(x)))
        return found


class Convolutional(nn.Module):
    """Convolutions of all kinds, several normalisations, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c2, self.up = nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.gn, self.ln, self.fc = nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.embed = nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b1(self.c1(x)))
        x = self.gn(self.up(torch.nn.functional.gelu(self.c2(x)).relu())).flatten(2).mean(2)
        found: Tensor = self.fc(self.ln(x) + self.embed(torch.arange(x.shape[0])))
        return found


class InContexts(nn.Module):
    """Uses a weight with and without gradients, and another under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        with torch.no_grad():
            z = self.b(x)
        found: Tensor = self.b(y.float()) + z
        return found


RATES = biofx.BioConfig(seed=3, fuzzy_learning_rate_factor_nu=0.3)
SIGNS = biofx.BioConfig(seed=3, apply_dales_principle=True, dales_initialisation="keep")
ALL = biofx.BioConfig(seed=3, apply_dales_principle=True, weight_splitting_Gamma=2)


def transformed(model: nn.Module, config: biofx.BioConfig) -> nn.Module:
    made: nn.Module = biofx.transform(copy.deepcopy(model), config).graph_module
    return made


def learn(call: Any, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return the output and all gradients."""
    model.zero_grad()
    torch.manual_seed(5)
    output = call(x)
    output.square().sum().backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_learns_as(compiled: Any, model: nn.Module, expected: nn.Module, x: Tensor, **near: Any) -> None:
    """Compare outputs and gradients; to the bit unless tolerances are given."""
    near = near or {"rtol": 0, "atol": 0}
    found, gradients = learn(compiled, model, x)
    output, wanted = learn(expected, expected, x)
    torch.testing.assert_close(found, output, **near)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name, **near)


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    """Compare everything that two models save, to the bit."""
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
