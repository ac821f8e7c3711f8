"""State that one module keeps and another touches: spiking neurons that are reset, factors that are set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from idioms.body import Body


class Leaky(nn.Module):
    """Keeps a potential from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.current = nn.Linear(4, 4)
        self.potential: Any = 0.0
        self.states: dict[str, Any] = {"trace": 0.0}
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.potential = self.potential * 0.5 + self.current(x)
        return torch.tanh(self.potential)

    def reset(self) -> None:
        """Forget."""
        self.potential = 0.0
        self.states["trace"] = 0.0
        self.seen.clear()


class Tracing(Leaky):
    """Keeps it in a dict of its own."""

    def forward(self, x: Tensor) -> Any:
        self.states["trace"] = self.states["trace"] * 0.5 + self.current(x)
        return torch.tanh(self.states["trace"])


class Collecting(Leaky):
    """Keeps all that came in a list."""

    def forward(self, x: Tensor) -> Any:
        self.seen.append(self.current(x))
        return torch.tanh(sum(self.seen))  # type: ignore[arg-type]


class Factor(nn.Module):
    """A layer whose gain is a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.gain


class ResetsAChild(Body):
    """A state that is put back, to what it is at capture anyhow."""

    def __init__(self) -> None:
        super().__init__()
        self.cell: Any = Leaky()

    def forward(self, x: Tensor) -> Any:
        self.cell.reset()
        return self.out(self.fc(self.cell(x) + self.cell(2 * x)))


class ResetsATrace(ResetsAChild):
    """A state in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Tracing()


class ResetsAList(ResetsAChild):
    """A state in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Collecting()


class Pulse(nn.Module):
    """Resets its own child at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Leaky()

    def forward(self, x: Tensor) -> Any:
        self.cell.potential = 0.0
        return self.cell(x) + self.cell(2 * x)


class ResetsInABlock(Body):
    """A state that a module in between puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.pulse = Pulse()

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(self.pulse(x)))


class ResetsWhereNeeded(Body):
    """A state that is made when there is none of this size."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Leaky()
        self.cell.potential = None

    def forward(self, x: Tensor) -> Any:
        if self.cell.potential is None or self.cell.potential.shape != x.shape:
            self.cell.potential = torch.zeros_like(x)
        return self.out(self.fc(self.cell(x) + self.cell(2 * x)))


class ReturnsAStateOfAChild(Body):
    """An output that a child remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Leaky()

    def forward(self, x: Tensor) -> Any:
        self.cell.potential = 0.0
        found = self.cell(x)
        return self.out(self.fc(found)), self.cell.potential


class SetsAGain(Body):
    """A number of a child's that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Factor()

    def forward(self, x: Tensor) -> Any:
        self.scale.gain = float(len(x))
        return self.out(self.fc(self.scale(x)))


class CountsInAChild(Body):
    """A number of a child's that every call raises."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Factor()

    def forward(self, x: Tensor) -> Any:
        self.scale.gain += 1.0
        return self.out(self.fc(self.scale(x)))


class SetsAllGains(Body):
    """Numbers of modules that have no name in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(Factor(), nn.ReLU(), Factor())

    def forward(self, x: Tensor) -> Any:
        for module in self.stack:
            module.gain = float(len(x))  # type: ignore[assignment]
        return self.out(self.fc(self.stack(x)))


class Frozen(dict[str, int]):
    """Settings that do not let themselves be changed."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("these settings are frozen")


class HoldsFrozenSettings(Body):
    """A dict of its own that cannot be put back, and need not be."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Frozen({"times": 2})

    def forward(self, x: Tensor) -> Any:
        if x.abs().mean() > 100:
            x = x / 100
        return self.out(self.fc(x)) * self.settings["times"]


IDIOMS = (
    HoldsFrozenSettings,
    ResetsAChild,
    ResetsATrace,
    ResetsAList,
    ResetsInABlock,
    ResetsWhereNeeded,
    ReturnsAStateOfAChild,
    SetsAGain,
    CountsInAChild,
    SetsAllGains,
)
