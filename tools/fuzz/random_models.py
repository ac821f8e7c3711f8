"""A random nest of blocks, whoever draws the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Choose = Callable[[Sequence[Any]], Any]
"""Returns one of what it is given."""

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NAMES = ("stem", "größe", "it's", "a b", "[bold]red[/]", "x" * 60, "/etc/passwd", "{0}", "%s", "$HOME")


class Residual(nn.Module):
    """Adds its input to what its block makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, units, *)``."""
        return x + self.inner(x)


class Concatenate(nn.Module):
    """Puts the outputs of its blocks side by side."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, units of all parts, *)``."""
        return torch.cat([part(x) for part in self.parts], 1)


class Shared(nn.Module):
    """Calls one layer twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, units, *)``."""
        return self.layer(torch.relu(self.layer(x)))


class Weights(nn.Module):
    """Weights without a layer, dropout without a module, a buffer that is not saved."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(width, width))
        self.register_buffer("scale", torch.rand(()), persistent=False)

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, units, *)``."""
        mixed = nn.functional.linear(x.movedim(1, -1), self.raw).movedim(-1, 1)
        return nn.functional.dropout(mixed, 0.2, self.training) * self.scale


class Computed(nn.Linear):
    """A linear layer whose forward computes its weight: masked, never negative, or with signs built in."""

    mask: Tensor
    signs: Tensor

    def __init__(self, into: int, out: int, form: str, *, bias: bool) -> None:
        super().__init__(into, out, bias=bias)
        self.form = form
        self.register_buffer("mask", (torch.rand(out, into) < 0.7).float())
        self.register_buffer("signs", torch.where(torch.rand(into) < 0.5, 1.0, -1.0))

    def forward(self, x: Tensor) -> Any:
        """Return ``(*, out)``."""
        if self.form == "masked":
            weight = self.weight * self.mask
        elif self.form == "absolute":
            weight = self.mask * self.weight.abs()
        elif self.form == "soft":
            weight = F.softplus(self.weight)
        else:
            weight = torch.relu(self.weight) * self.signs
        return F.linear(x, weight, self.bias)


class AlongTime(nn.Module):
    """A recurrent layer, or attention, along the last axis; of units alone, over sequences of one."""

    def __init__(self, inner: nn.Module, *, alone: bool) -> None:
        super().__init__()
        self.inner = inner
        self.alone = alone

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, units, *)``."""
        steps = x.unsqueeze(1) if self.alone else x.transpose(1, 2)
        attends = isinstance(self.inner, nn.MultiheadAttention)
        y = self.inner(steps, steps, steps)[0] if attends else self.inner(steps)[0]
        return y.squeeze(1) if self.alone else y.transpose(1, 2)


def normalisations(axes: int, width: int) -> dict[str, Callable[[], nn.Module]]:
    """Those for units of a shape, by name."""
    instance: Any = (None, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes]
    made: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: NORMS[axes](width),
        "layer": lambda: nn.LayerNorm([width, *[3] * axes]),
        "rms": lambda: nn.RMSNorm([width, *[3] * axes]),
        "group": lambda: nn.GroupNorm(width, width) if axes else nn.Identity(),
    }
    return {**made, "instance": lambda: instance(width, affine=True)} if axes else made


def random_model(choose: Choose) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A nest of blocks over units of shape ``(batch, units, *)``, and the shape of one input."""
    axes = choose(range(4))
    width = first = choose(range(1, 8))
    torch.manual_seed(choose(range(2**16)))

    def layer(into: int, out: int) -> nn.Module:
        bias = choose([False, True])
        if axes == 0:
            form = choose(["plain", "masked", "absolute", "soft", "signed"])
            return (
                nn.Linear(into, out, bias=bias) if form == "plain" else Computed(into, out, form, bias=bias)
            )
        groups = choose([g for g in (1, 2, 3) if into % g == 0 and out % g == 0])
        kind: Any = choose(CONVOLUTIONS[axes])
        made: nn.Module = kind(into, out, 3, padding=1, groups=groups, bias=bias)
        return made

    def block(width: int, depth: int) -> tuple[nn.Module, int]:
        kinds = ["layer", "shared", "weights", "relu", "norm", "dropout", "gelu"]
        kinds += ["recurrent", "attention"] * (axes < 2)
        kind = choose(kinds + ["residual", "concatenate", "nested"] * (depth < 2))
        out, norms = choose(range(1, 8)), normalisations(axes, width)
        if kind == "layer":
            return layer(width, out), out
        if kind == "shared":
            return Shared(layer(width, width)), width
        if kind == "residual":
            inner, inside = block(width, depth + 1)
            return Residual(nn.Sequential(inner, nn.ReLU(), layer(inside, width))), width
        if kind == "concatenate":
            left, right = block(width, depth + 1), block(width, depth + 1)
            return Concatenate(left[0], right[0]), left[1] + right[1]
        if kind == "nested":
            blocks, width = chain(width, depth + 1)
            return blocks, width
        if kind == "recurrent":
            cell: Any = choose([nn.GRU, nn.LSTM, nn.RNN])
            both = choose([False, True])
            inside = cell(width, out, batch_first=True, bidirectional=both)
            return AlongTime(inside, alone=axes == 0), out * (1 + both)
        simple: dict[str, Callable[[], nn.Module]] = {
            "weights": lambda: Weights(width),
            "relu": nn.ReLU,
            "norm": lambda: norms[choose(sorted(norms))](),
            "attention": lambda: AlongTime(
                nn.MultiheadAttention(width, 1, batch_first=True), alone=axes == 0
            ),
            "dropout": lambda: nn.Dropout(0.3),
            "gelu": nn.GELU,
        }
        return simple[kind](), width

    def chain(width: int, depth: int) -> tuple[nn.Sequential, int]:
        blocks = nn.Sequential()
        for number in range(choose(range(1, 5))):
            made, width = block(width, depth)
            blocks.add_module(f"{choose(NAMES)}{number}", made)
        return blocks, width

    model, width = chain(first, 0)
    model.add_module("readout", layer(width, choose(range(1, 5))))
    return model, (first, *[3] * axes)
