"""What is called, and how: layers of several inputs by a forward that stays in Python, functions by alias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from idioms.body import Body


class Spike(torch.autograd.Function):
    """A step with the gradient of another function, as spiking neurons have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] / (1 + x.square())


spike = Spike.apply


class FunctionByAlias(Body):
    """An autograd function under a name given to its ``apply`` beforehand."""

    def forward(self, x: Tensor) -> Any:
        return self.out(spike(self.fc(x)))  # type: ignore[no-untyped-call]


class FunctionInAnAttribute(Body):
    """One that a module was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.activation: Any = Spike.apply

    def forward(self, x: Tensor) -> Any:
        return self.out(self.activation(self.fc(x)))


class ComparesWithNone(Body):
    """``x != None`` instead of ``x is not None``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        if x != None:  # noqa: E711
            x = x * 2
        return self.out(self.fc(x))


class AsksTheTypeAsAScriptWould(Body):
    """``torch.jit.isinstance``, for the sake of ``torch.jit.script``."""

    def forward(self, x: Tensor) -> Any:
        if torch.jit.isinstance(x, Tensor):
            x = x * 2
        return self.out(self.fc(x))


class LayersOfSeveralInputs(nn.Module):
    """Recurrent layers, cells and attention, called with states and flags where data decide."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 6, 2, batch_first=True, dropout=0.3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.cell = nn.LSTMCell(6, 6)
        self.pairs = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Any:
        if x.abs().mean() > 100:
            x = x / 100
        forth_and_back, (hidden, _) = self.lstm(x)
        steps, _ = self.gru(forth_and_back, torch.zeros(2, len(x), 6))
        attended, weights = self.attention(steps, steps, steps)
        masked, _ = self.attention(steps, steps, steps, need_weights=False, key_padding_mask=x[..., 0] > 9)
        state = self.cell(attended[:, 0])
        state = self.cell(masked[:, 1], state)
        return self.pairs(*state), weights, hidden


class ReadsAWeightOfALayer(nn.Module):
    """A recurrent layer whose weight Python reads besides."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        if x.abs().mean() > 100:
            x = x / 100
        weight: Tensor = self.lstm.weight_hh_l0  # type: ignore[assignment]
        return self.lstm(x)[0], weight.square().sum()


class Experts(nn.Module):
    """Stacked matrices, of which Python takes those that values ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 4, 4) / 2)
        self.bias = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor, choice: Tensor) -> Any:
        found = torch.zeros_like(x)
        for expert in choice.unique().tolist():
            rows = choice == expert
            found[rows] = x[rows] @ self.matrices[expert] + self.bias[expert]
        return found


class MixesExperts(Body):
    """A mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Any:
        weights, choice = self.router(x).softmax(-1).max(-1)
        return self.out(self.fc(x + weights[:, None] * self.experts(x, choice)))


class ReadsExperts(MixesExperts):
    """One that reads the matrices of its experts besides, in Python."""

    def forward(self, x: Tensor) -> Any:
        if x.abs().mean() > 100:
            x = x / 100
        return super().forward(x), self.experts.matrices.square().mean()


IDIOMS = (
    AsksTheTypeAsAScriptWould,
    MixesExperts,
    ReadsExperts,
    FunctionByAlias,
    FunctionInAnAttribute,
    ComparesWithNone,
    LayersOfSeveralInputs,
    ReadsAWeightOfALayer,
)
