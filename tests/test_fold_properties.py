"""Folded equals unfolded: outputs, every gradient and every buffer, over generated models.

A few hundred models by default; ``BIOFX_FOLD_CASES=5000 pytest tests/test_fold_properties.py`` for more.
"""

from __future__ import annotations

import contextlib
import operator
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx

CASES = int(os.environ.get("BIOFX_FOLD_CASES", "300"))
CHUNK = 25
WIDTHS = (4, 6, 8, 12)
Step = tuple[Any, tuple[int, ...]]


class Program(nn.Module):
    """Runs steps on a list of values; each is a function or a module's name, and which values it takes."""

    def __init__(self, modules: dict[str, nn.Module], steps: list[Step], results: list[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.steps = steps
        self.results = results

    def forward(self, x: Tensor) -> Any:
        values: list[Any] = [x]
        for what, sources in self.steps:
            taken = [values[source] for source in sources]
            values.append(self.parts[what](*taken) if isinstance(what, str) else what(*taken))
        return [values[number] for number in self.results]


@dataclass
class Builder:
    """Grows a program value by value, keeping the shape of each."""

    dice: random.Random
    x: Tensor

    def __post_init__(self) -> None:
        self.parts: dict[str, nn.Module] = {}
        self.steps: list[Step] = []
        self.values = [self.x]
        self.overwritten: set[int] = set()

    def add(self, what: Any, *sources: int) -> None:
        if isinstance(what, nn.Module):
            name = f"m{len(self.parts)}"
            self.parts[name] = what.double()
            what = name
        taken = [self.values[source].clone() for source in sources]
        with torch.no_grad():
            made = (self.parts[what].train() if isinstance(what, str) else what)(*taken)
        self.steps.append((what, sources))
        self.values.append(made)
        layer = isinstance(what, str) and any(True for _ in self.parts[what].parameters())
        if layer and self.dice.random() < 0.3:
            self.overwritten.add(len(self.values) - 1)
            self.add(lambda t: F.relu(t, inplace=True), len(self.values) - 1)

    def pick(self) -> int:
        """Return one of the later values."""
        return self.dice.choice([n for n in range(len(self.values)) if n not in self.overwritten][-3:])

    def alike(self, source: int, *, but_channels: bool = False) -> int:
        """Return a value of the same shape, possibly the same."""
        shape = list(self.values[source].shape)
        fitting = []
        for number, value in enumerate(self.values):
            other = list(value.shape)
            if but_channels and len(other) == len(shape) > 1:
                other[1] = shape[1]
            if other == shape and number not in self.overwritten:
                fitting.append(number)
        return self.dice.choice(fitting)

    def step(self) -> None:
        source = self.pick()
        value = self.values[source]
        spatial = value.dim() - 2
        kinds = ["layer"] * 4 + ["pointwise"] * 3 + ["norm", "join", "join", "odd", "again"]
        kinds += ["space"] * 2 if spatial > 0 else []
        with contextlib.suppress(
            RuntimeError, ValueError, IndexError, UserWarning
        ):  # does not fit this shape
            getattr(self, f"_{self.dice.choice(kinds)}")(source, value, spatial)

    def _layer(self, source: int, value: Tensor, spatial: int) -> None:
        dice, width = self.dice, self.dice.choice(WIDTHS)
        bias = dice.random() < 0.7
        if spatial <= 0 or dice.random() < 0.1:
            self.add(nn.Linear(value.shape[-1], width, bias=bias), source)
            return
        channels = value.shape[1]
        depthwise = dice.random() < 0.2
        out = channels if depthwise else width
        groups = (
            channels if depthwise else dice.choice([g for g in (1, 1, 2, 3) if channels % g == out % g == 0])
        )
        options: dict[str, Any] = {"groups": groups, "bias": bias, "padding": 1}
        size = 3 if value.shape[-1] > 1 else 1
        options["padding"] = size // 2
        if dice.random() < 0.25:
            kinds: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d)
        else:
            kinds = (nn.Conv1d, nn.Conv2d)
            if dice.random() < 0.2 and size == 3:
                options["padding_mode"] = "circular"
        self.add(kinds[spatial - 1](channels, out, size, **options), source)

    def _pointwise(self, source: int, value: Tensor, spatial: int) -> None:
        choices: list[Any] = [
            *(nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Identity(), nn.LeakyReLU(0.1), torch.sigmoid, F.silu),
            *(lambda t: t * 2 - 0.5, lambda t: 1 - t, lambda t: t.clamp(-1, 1), lambda t: t.relu()),
            *(lambda t: torch.relu_(t * 1), lambda t: (t * 3).add_(1), lambda t: t.clone().relu_()),
            *(nn.PReLU(), nn.Dropout(0.3), nn.Dropout(0.0), lambda t: t.contiguous()),
        ]
        if value.dim() > 1:
            choices.append(nn.PReLU(value.shape[1]))
        self.add(self.dice.choice(choices), source)

    def _norm(self, source: int, value: Tensor, spatial: int) -> None:
        if value.dim() < 2:
            return
        channels = value.shape[1]
        choices: list[nn.Module] = [
            nn.LayerNorm(value.shape[-1]),
            nn.LayerNorm(tuple(value.shape[1:])),
            nn.LayerNorm(tuple(value.shape[1:]), elementwise_affine=False),
            nn.GroupNorm(self.dice.choice([g for g in (1, 2, 3) if channels % g == 0]), channels),
            nn.GroupNorm(1, channels, affine=False),
        ]
        affine, tracks = self.dice.random() < 0.7, self.dice.random() < 0.7
        batch: Any = nn.BatchNorm2d if spatial == 2 else nn.BatchNorm1d
        choices += [batch(channels, affine=affine, track_running_stats=tracks, momentum=0.3)] * 3
        if spatial > 0 and value.shape[-1] > 1:
            choices.append((nn.InstanceNorm1d, nn.InstanceNorm2d)[spatial - 1](channels))
        made = self.dice.choice(choices)
        for parameter in made.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        for name, buffer in made.named_buffers():
            if "running" in name:
                nn.init.uniform_(buffer, 0.5, 1.5)
        self.add(made, source)

    def _join(self, source: int, value: Tensor, spatial: int) -> None:
        if self.dice.random() < 0.5:
            other = self.alike(source)
            joins: list[Callable[..., Any]] = [
                *(operator.add, torch.mul, torch.maximum, lambda a, b: (a * 1).add_(b)),
            ]
            self.add(self.dice.choice(joins), source, other)
        else:
            other = self.alike(source, but_channels=True)
            axis = self.dice.choice([1, 1, 1 - value.dim()]) if value.dim() > 1 else 0
            self.add(lambda a, b: torch.cat([a, b], axis), source, other)

    def _space(self, source: int, value: Tensor, spatial: int) -> None:
        last = value.shape[-1]
        choices: list[Any] = [
            *(nn.Flatten(), lambda t: t.flatten(1), lambda t: t.view(t.size(0), -1)),
            *(lambda t: t.reshape(t.shape[0], -1), lambda t: t.mean(-1), lambda t: t.flatten(0, 1)),
            *(
                lambda t: t.sum(2, keepdim=True),
                lambda t: F.pad(t, (1, 0)),
                lambda t: t.amax(1, keepdim=True),
            ),
            *(
                lambda t: F.interpolate(t, scale_factor=2),
                lambda t: t.mean((-1, 1)),
                lambda t: t.transpose(1, -1),
            ),
            lambda t: t * t.mean(tuple(range(2, value.dim())), keepdim=True),
        ]
        if last > 2:
            choices += [(nn.MaxPool1d(2), nn.MaxPool2d(2))[spatial - 1]] * 2
            choices += [(nn.AvgPool1d(2), nn.AvgPool2d(2))[spatial - 1]] * 2
            pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)[spatial - 1]
            choices += [(nn.AdaptiveMaxPool1d(1), nn.AdaptiveMaxPool2d(1))[spatial - 1], lambda t: pool(t, 2)]
        self.add(self.dice.choice(choices), source)

    def _odd(self, source: int, value: Tensor, spatial: int) -> None:
        """Add something no rule knows."""
        axis = 1 if value.dim() > 1 else 0
        choices: list[Callable[..., Any]] = [
            *(lambda t: t.flip(axis), lambda t: t.roll(1, -1), lambda t: t[:, :2]),
            *(lambda t: t.softmax(-1), lambda t: t.cumsum(axis), lambda t: t * t.shape[-1]),
            *(lambda t: t - t.mean(), lambda t: t + torch.ones_like(t)),
        ]
        self.add(self.dice.choice(choices), source)

    def _again(self, source: int, value: Tensor, spatial: int) -> None:
        """Call a module that is there already once more, where it fits."""
        for what in self.dice.sample(sorted(self.parts), len(self.parts)):
            with contextlib.suppress(RuntimeError, ValueError, IndexError, UserWarning):
                return self.add(what, source)
        return None


def random_program(seed: int) -> tuple[Program, Tensor]:
    """Return a model in float64, and an input with a batch of 3."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    shape = dice.choice([(3, 4), (3, 4, 6), (3, 4, 6, 6), (3, 4, 6, 6)])
    builder = Builder(dice, torch.randn(shape, dtype=torch.float64))
    builder.step()
    while len(builder.steps) < dice.randrange(4, 14):
        builder.step()
        if builder.values[-1].numel() > 20000 or builder.values[-1].dim() > 4:
            builder.values.pop(), builder.steps.pop()
    results = sorted({len(builder.values) - 1, builder.pick()})
    heads = []
    for number in results[-1:]:
        last = builder.values[number].shape[-1]
        builder.add(nn.Linear(last, 2), number)
        heads.append(len(builder.values) - 1)
    return Program(builder.parts, builder.steps, [*heads, *results[:-1]]), builder.x


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, gradients and buffers of a call with a seed of its own."""
    model.zero_grad()
    torch.manual_seed(11)
    x = x.clone().requires_grad_()
    outputs = model(x)
    torch.cat([(output * output.detach().cos()).reshape(-1) for output in outputs]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert x.grad is not None
    return [*outputs, x.grad, *gradients, *(buffer.double() for buffer in model.buffers())]


def passes_for(seed: int) -> tuple[str, str]:
    gamma = (2, 2, 3, 4)[seed % 4]
    others = ("", ",constrain-signs{constrain_inputs=true},scale-gradients", ",observe-activity")[seed % 3]
    activation = ',activation="torch.tanh"' if seed % 7 == 0 else ""
    split = f"split-weights{{gamma={gamma}{activation}}}{others}"
    return split, f"{split},fold-splits"


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_folded_equals_unfolded(first: int) -> None:
    folds = 0
    for seed in range(first, first + CHUNK):
        model, x = random_program(seed)
        plain, folding = passes_for(seed)
        try:
            split = biofx.transform(model, passes=plain).graph_module
        except biofx.OptionError:
            continue
        folded, report = biofx.transform(model, passes=folding)
        folds += any(remark.kind == "applied" for remark in report.passes[-1].remarks)
        for training in (True, False):
            found, expected = run(folded.train(training), x), run(split.train(training), x)
            scale: Any = [max(1.0, tensor.abs().max().item()) for tensor in expected]
            assert len(found) == len(expected)
            for one, other, size in zip(found, expected, scale, strict=True):
                torch.testing.assert_close(one / size, other / size, rtol=1e-12, atol=1e-12, msg=f"{seed=}")
    assert folds >= CHUNK // 5
