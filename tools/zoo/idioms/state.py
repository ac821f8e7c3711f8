"""What modules hold and leave behind: buffers, shared layers, hooks, parametrizations, caches."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from idioms.body import Body


class BufferInPlace(Body):
    """A buffer that every call adds to."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return self.out(hidden - self.mean)


class BufferRebound(Body):
    """A buffer that every call puts another in the place of."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(6))

    def forward(self, x: Tensor) -> Any:
        self.state = 0.5 * self.state + self.fc(x).detach().mean(0)
        return self.out(self.fc(x) + self.state)


class BufferByItem(Body):
    """A buffer that is written into at a place."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2, 6))

    def forward(self, x: Tensor) -> Any:
        self.table[1] = x.detach().mean()
        self.table[0, 2:] += 1
        return self.out(self.fc(x) + self.table.sum(0))


class BufferThatIsNotSaved(Body):
    """A table that is left out of the state dict."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x) * self.scale)


class BufferOfNothing(Body):
    """A buffer and a bias that are None."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)
        self.out = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        return self.out(hidden if self.mask is None else hidden * self.mask)


class SharedLayer(Body):
    """A layer that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        for _ in range(3):
            hidden = self.again(hidden).tanh()
        return self.out(hidden)


class AliasedLayer(Body):
    """A layer with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Any:
        return self.out(self.second(self.first(self.fc(x)).relu()))


class TiedWeights(Body):
    """Two layers with one weight, as an embedding and its readout."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6, bias=False)
        self.up.weight = self.fc.weight

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x).relu() + self.up(x)) @ torch.ones(3, 2)


class TransposedTie(nn.Module):
    """An autoencoder whose decoder is the encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 6)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        return nn.functional.linear(self.encoder(x).relu(), self.encoder.weight.t(), self.bias)


class ParametersInLists(nn.Module):
    """Parameters in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.gains = nn.ParameterDict({"a": nn.Parameter(torch.ones(4)), "b": nn.Parameter(torch.ones(4))})

    def forward(self, x: Tensor) -> Any:
        for weight, gain in zip(self.weights, self.gains.values(), strict=True):
            x = (x @ weight).relu() * gain
        return x


class WeightNorm(Body):
    """A direction and a length for a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = parametrizations.weight_norm(self.fc)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x).relu())


class SpectralNorm(Body):
    """A weight with a step of power iteration at every call in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = parametrizations.spectral_norm(self.fc)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x).relu())


class Orthogonal(Body):
    """A weight on the Stiefel manifold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = parametrizations.orthogonal(self.fc)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x).relu())


class FrozenPart(Body):
    """Layers that do not learn, and a path that gradients do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        return self.out(hidden.detach() + hidden.sigmoid())


class CacheMadeOnFirstCall(Body):
    """A table that the first call makes and that is kept."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.table is None or self.table.shape[0] < x.shape[1]:
            self.table = torch.arange(6.0)
        return self.out(self.fc(x) + self.table)


class CacheBySize(Body):
    """A dict of masks, one for each size met."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        size = x.shape[0]
        if size not in self.masks:
            self.masks[size] = torch.linspace(0, 1, size)[:, None]
        return self.out(self.fc(x) * self.masks[size])


class KeepsActivations(Body):
    """Activations that are left in an attribute, for whoever looks."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        self.last = hidden.detach()
        return self.out(hidden)


class Queue(Body):
    """The last inputs, remembered in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.recent: deque[float] = deque(maxlen=2)

    def forward(self, x: Tensor) -> Any:
        self.recent.append(float(len(self.recent)))
        return self.out(self.fc(x)) + sum(self.recent)


class PlainTensor(Body):
    """A tensor that is no buffer, changed by every call."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(1)

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        return self.out(self.fc(x) * self.count)


class ListOfLayers(nn.Module):
    """A layer in a list of Python's, which the model does not know of, and one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.known = nn.Linear(4, 4)
        self.hidden = [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Any:
        return self.known(x) + self.hidden[0](x)


class UnusedParts(Body):
    """A layer, a parameter and a buffer that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.extra = nn.Parameter(torch.ones(3))
        self.register_buffer("version", torch.tensor(3))

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x))


IDIOMS = (
    *(BufferInPlace, BufferRebound, BufferByItem, BufferThatIsNotSaved, BufferOfNothing, SharedLayer),
    *(AliasedLayer, TiedWeights, TransposedTie, ParametersInLists, WeightNorm, SpectralNorm, Orthogonal),
    *(FrozenPart, CacheMadeOnFirstCall, CacheBySize, KeepsActivations, Queue, PlainTensor, ListOfLayers),
    UnusedParts,
)
