"""The models that are timed, each at any width, and a step of their training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx

WIDTHS = (64, 128, 128, 256, 256)


def convolutions(share: int = 1, *, norm: bool = False) -> nn.Module:
    """Return five convolutions for 32 x 32 images, every other one with stride 2; widths over ``share``."""
    layers: list[nn.Module] = []
    channels = 3
    for place, width in enumerate(WIDTHS):
        layers.append(nn.Conv2d(channels, width // share, 3, padding=1, stride=1 + place % 2))
        channels = width // share
        layers += [nn.BatchNorm2d(channels)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def fully_connected(share: int = 1, *, width: int = 3000) -> nn.Module:
    """Return 3072-3000-3000-100: 18.5 million weights."""
    hidden = width // share
    return nn.Sequential(
        *(nn.Linear(3072, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 100))
    )


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers between these widths, with ReLU between them."""
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class RateNetwork(nn.Module):
    """A recurrent network of 256 units with leak and noise; its forward loops over time."""

    def __init__(self, units: int = 256) -> None:
        super().__init__()
        self.w_in, self.w_rec, self.w_out = (
            nn.Linear(32, units),
            nn.Linear(units, units),
            nn.Linear(units, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean readout, ``(batch, 10)``; ``x`` is ``(steps, batch, 32)``."""
        state, out = x.new_zeros(x.shape[1], self.w_rec.in_features), []
        for step in range(x.shape[0]):
            rate = torch.relu(state)
            drive = self.w_rec(rate) + self.w_in(x[step]) + 0.1 * torch.randn_like(state)
            state = 0.8 * state + 0.2 * drive
            out.append(self.w_out(rate))
        return torch.stack(out).mean(0)


class _Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.around: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.around = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.around(x)
        return self.relu(y)


class _BlockOfSettings(_Block):
    """A block whose forward reads a flag, a text and a number."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels, width, stride)
        self.goes_around, self.activation, self.gain = True, "relu", 1.0

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) * self.gain
        if self.goes_around:
            y += self.around(x)
        return self.relu(y) if self.activation == "relu" else F.silu(y)


def resnet18(share: int = 1, *, block: type[_Block] = _Block) -> nn.Module:
    """Return a residual network of 18 layers, as He et al. (2016) have it, for ten classes."""
    channels = 64 // share
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels)]
    layers += [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    for place, width in enumerate((64, 128, 256, 512)):
        layers.append(block(channels, width // share, 1 + (place > 0)))
        channels = width // share
        layers.append(block(channels, channels, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet18_of_settings() -> nn.Module:
    """Return a residual network whose 8 blocks read settings in their forwards."""
    return resnet18(block=_BlockOfSettings)


class _Attention(nn.Module):
    """A block of a transformer, for ``(batch, sequence, 128)``."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Any:
        query, key, value = (
            part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer() -> nn.Module:
    """Return two blocks between linear layers, for ``(batch, 32, 32)``."""
    return nn.Sequential(
        nn.Linear(32, 128), _Attention(), _Attention(), nn.Flatten(), nn.Linear(128 * 32, 10)
    )


def training_step(
    model: nn.Module,
    x: Tensor,
    *,
    rules: tuple[str, ...] = (),
    attached: tuple[biofx.Rule, ...] | None = None,
    compiled: bool = False,
    tasks: int = 0,
) -> Callable[[], None]:
    """Return a step of plain gradient descent; ``rules`` are methods called between backward and step.

    With a schedule in ``attached``, ``biofx.attach`` runs its rules; ``tasks`` are begun, with a step each.
    """
    model = model.to(x.device).train()
    call: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
    with torch.no_grad():
        _, classes, *places = model(x[:2]).shape
    own = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (len(x), *places), generator=own).to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plasticity = None if attached is None else biofx.attach(model, optimizer, attached)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(call(x), labels).backward()
        for rule in rules:
            getattr(model, rule)()
        optimizer.step()

    on_data = any(rule.name == "memory_aware" for rule in attached or ())
    for number in range(tasks):
        if plasticity is not None:
            plasticity.begin_task([x[:2]] if number and on_data else None)
        step()
    return step


def inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a forward in evaluation mode."""
    return functools.partial(torch.no_grad()(model.to(x.device).eval()), x)
