"""What is done to tensors: views, writing in place, sizes, types, contexts, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from idioms.body import Body


class WritesItems(Body):
    """Items that are assigned, by slices, masks and indices."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x) * 1
        hidden[:, 0] = x[:, 0]
        hidden[hidden < -1] = 0
        hidden[torch.arange(2), 1:3] += 1
        return self.out(hidden)


class InPlaceActivations(Body):
    """Functions that write into their input."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        hidden = self.relu(self.fc(x)) * 1
        hidden += 1
        return self.out(nn.functional.dropout(hidden.mul_(2), 0.3, self.training, inplace=True))


class WritesIntoAView(Body):
    """A view that is written into, and seen through another."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x) * 1
        left, right = hidden[:, :3], hidden.view(-1, 6)
        left += 1
        return self.out(right)


class AddsToTheSame(Body):
    """One tensor under two names, one of which is changed."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x) * 1
        same = hidden
        same *= 2
        return self.out(hidden)


class SizesInArithmetic(Body):
    """Sizes that are computed with, split and given to views."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x[:, None].expand(-1, 5, -1))
        batch, length, width = hidden.shape
        hidden = hidden.view(batch * length, 2, width // 2).transpose(0, 1).reshape(batch, -1, width)
        return self.out(hidden[:, : length // 2 + 1]) / (batch * length) ** 0.5


class PositionsByLength(Body):
    """Positions and a causal mask made to measure."""

    def forward(self, x: Tensor) -> Any:
        length = x.shape[1]
        positions = torch.arange(length, device=x.device, dtype=x.dtype) / length
        mask = torch.full((length, length), float("-inf")).triu(1)
        hidden = self.fc(x) + positions[:, None]
        weights = (hidden @ hidden.transpose(-1, -2) + mask).softmax(-1)
        return self.out(weights @ hidden)


class Einsum(Body):
    """Sums by letters, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(2, 6, 6) * 0.3)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.einsum("bi,kij->bkj", self.fc(x), self.core)
        return self.out(hidden.flatten(1)[:, :6])


class Functional(nn.Module):
    """Layers written with functions and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3) * 0.2)
        self.weight = nn.Parameter(torch.randn(3, 6) * 0.2)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        hidden = nn.functional.conv2d(x, self.kernel, padding=1).relu()
        return nn.functional.linear(hidden.mean((2, 3)), self.weight, self.bias)


class NormalisedWeight(Body):
    """A weight that is normalised in the forward."""

    def forward(self, x: Tensor) -> Any:
        weight = nn.functional.normalize(self.fc.weight, dim=1)
        return self.out(nn.functional.linear(nn.functional.normalize(x), weight))


class ComplexParameters(nn.Module):
    """A filter in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out((x.to(torch.complex64) @ self.filter.mT).abs())


class MixedTypes(Body):
    """Layers in two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.double()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.norm(self.fc(x.double()).to(self.out.weight.dtype)))


class SelectsByMask(Body):
    """As many rows as a mask has."""

    def forward(self, x: Tensor) -> Any:
        rows = x[x.sum(-1) > 0]
        return self.out(self.fc(rows)).sum(0), x.shape[0] - rows.shape[0]


class RoutesToExperts(nn.Module):
    """A mixture of experts that loops over who is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        output = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows) > 0:
                output = output.index_add(0, rows, expert(x[rows]) * weights[rows, None])
        return output


class NoGradient(Body):
    """A part under ``torch.no_grad``."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            target = self.fc(x).softmax(-1)
        return self.out(self.fc(x) + target)


class DecoratedNoGradient(Body):
    """A method that is decorated with ``torch.no_grad``."""

    @torch.no_grad()
    def _target(self, x: Tensor) -> Tensor:
        return self.fc(x).sigmoid()  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x) * self._target(x))


class Autocast(Body):
    """A part in half precision."""

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.fc(x)
        return self.out(hidden.float())


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -0.5 * gradients[0]


class GradientReversal(Body):
    """A function whose gradient is its own."""

    def forward(self, x: Tensor) -> Any:
        return self.out(_Reversed.apply(self.fc(x)))  # type: ignore[no-untyped-call]


class StraightThrough(Body):
    """A step in the forward that the backward does not see."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        return self.out(hidden + (hidden.sign() - hidden).detach())


class Checkpointed(Body):
    """A part that is computed twice to save memory."""

    def forward(self, x: Tensor) -> Any:
        hidden = checkpoint.checkpoint(self._part, x, use_reentrant=False)
        return self.out(hidden)

    def _part(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()  # type: ignore[no-any-return]


class GradientInForward(Body):
    """A penalty on a gradient taken in the forward."""

    def forward(self, x: Tensor) -> Any:
        given = x.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.out(self.fc(given).tanh()).sum()
            (slope,) = torch.autograd.grad(energy, given, create_graph=True)
        return self.out(self.fc(x)), slope


class Packed(nn.Module):
    """Sequences of several lengths in one LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        lengths = torch.arange(x.shape[0]) % x.shape[1] + 1
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (state, _) = self.lstm(packed)
        return self.out(state[-1])


class LoopsOverWhatIsFound(Body):
    """As many rounds as a mask has entries."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x) * 1
        total = hidden.sum()
        for row in (x[:, 0] > 0).nonzero():
            total = total + hidden[row].mean() * len(row)
        return self.out(hidden), total


class SlicesByValue(Body):
    """A slice whose end is a tensor, and a branch on its length."""

    def forward(self, x: Tensor) -> Any:
        count = (x[:, 0] > 0).sum()
        first = x[:count]
        return self.out(self.fc(x)) * (2 if first.shape[0] > 1 else 3), torch.ones(4)[: count + 1].shape[0]


IDIOMS = (
    *(LoopsOverWhatIsFound, SlicesByValue),
    *(WritesItems, InPlaceActivations, WritesIntoAView, AddsToTheSame, SizesInArithmetic, Einsum),
    *(NormalisedWeight, ComplexParameters, MixedTypes, SelectsByMask, RoutesToExperts, NoGradient),
    *(DecoratedNoGradient, Autocast, GradientReversal, StraightThrough, Checkpointed, GradientInForward),
)
