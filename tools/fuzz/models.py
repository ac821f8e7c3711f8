"""Small models of the kinds that people write, with what changes in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Convolutions with normalisations, a residual sum, functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.rate = 0.3
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)``."""
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv(x)))
        x = F.dropout(x.mean((2, 3)), self.rate, self.training)
        return self.fc(x)


class Scaled(nn.Module):
    """Numbers, flags and a text, read by the forward from the module and from its class."""

    offset = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.gain, self.temperature = 2.0, 1.0
        self.doubled, self.steps = False, 2
        self.kind = "relu"
        self.scales = [1.0, 0.5]
        self.options = {"bias": 0.5}

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)``."""
        x = self.fc(x) * self.gain + self.offset
        for _ in range(self.steps):
            x = torch.tanh(x) / self.temperature
        x = torch.relu(x) if self.kind == "relu" else F.gelu(x)
        if self.doubled:
            x = x * 2
        return self.out(x) * self.scales[0] + self.options["bias"]


class Merges(nn.Module):
    """A low-rank update that ``eval()`` merges into the weight, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.merged, self.scaling = nn.Linear(4, 4), False, 0.5
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and merge or take apart."""
        super().train(mode)
        delta = self.up.weight.data @ self.down.weight.data * self.scaling
        if mode and self.merged:
            self.fc.weight.data -= delta
            self.merged = False
        elif not mode and not self.merged:
            self.fc.weight.data += delta
            self.merged = True
        return self

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 4)``."""
        return self.fc(x) if self.merged else self.fc(x) + self.up(self.down(x)) * self.scaling


class Noisy(nn.Module):
    """Noise that the mode switches by more than the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.noise = nn.Linear(4, 4), 0.5

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and the noise."""
        self.noise = 0.5 if mode else 0.0
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 4)``."""
        return self.fc(x) + self.noise


class FrozenNorm(nn.Module):
    """A backbone whose normalisation stays in evaluation whatever ``train()`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def train(self, mode: bool = True) -> Any:
        """Set the mode of everything else."""
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)``."""
        return self.out(torch.relu(self.norm(self.fc(x))))


class Reparametrised(nn.Module):
    """Two branches that become one layer once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: Any = nn.Conv1d(2, 2, 3, padding=1)
        self.narrow: Any = nn.Conv1d(2, 2, 1)
        self.one: nn.Module | None = None
        self.out = nn.Linear(2, 2)

    def switch(self) -> None:
        """Become one layer."""
        made: Any = nn.Conv1d(2, 2, 3, padding=1)
        made.weight.data = self.wide.weight.data + F.pad(self.narrow.weight.data, (1, 1))
        made.bias.data = self.wide.bias.data + self.narrow.bias.data
        self.one = made

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)``."""
        x = self.wide(x) + self.narrow(x) if self.one is None else self.one(x)
        return self.out(torch.relu(x).mean(2))


class Tied(nn.Module):
    """An encoder and a decoder of one weight, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 7)``."""
        return self.head(self.norm(torch.relu(self.mix(self.embed(x).mean(1)))))


class Attends(nn.Module):
    """Attention with a mask that is a buffer, behind a normalisation."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.register_buffer("mask", torch.triu(torch.ones(3, 3, dtype=torch.bool), 1), persistent=False)
        self.drop = nn.Dropout(0.2)
        self.feed = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.1), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 3, 4)``."""
        y = self.norm(x)
        x = x + self.drop(self.attention(y, y, y, attn_mask=self.mask, need_weights=False)[0])
        return x + self.feed(x)


class Loop(nn.Module):
    """A recurrent step in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_rec, self.w_out, self.alpha = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 2), 0.2

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)`` for ``(batch, time, 2)``."""
        state = x.new_zeros(x.shape[0], 5)
        for moment in range(x.shape[1]):
            state = (1 - self.alpha) * state + self.alpha * (
                self.w_rec(torch.relu(state)) + self.w_in(x[:, moment])
            )
        return self.w_out(torch.relu(state))


class MaskedLoop(Loop):
    """The same with a recurrent weight that is masked in Python, and noise."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", 1 - torch.eye(5))

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)`` for ``(batch, time, 2)``."""
        rate = torch.zeros(x.shape[0], 5)
        for moment in x.unbind(1):
            drive = F.linear(rate, self.w_rec.weight * self.mask, self.w_rec.bias) + self.w_in(moment)
            noise = 0.1 * torch.randn_like(rate) if self.training else 0.0
            rate = (1 - self.alpha) * rate + self.alpha * torch.relu(drive + noise)
        return self.w_out(rate)


class Counts(nn.Module):
    """A buffer that each training step moves, and a centre that it keeps."""

    centre: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)``."""
        h = self.fc(x)
        if self.training:
            with torch.no_grad():
                self.centre.mul_(0.9).add_(h.mean(0), alpha=0.1)
                self.calls += 1
        return self.out(torch.relu(h - self.centre))


class Deep(nn.Module):
    """Layers in lists and dictionaries, one of them chosen by name, dropped at a rate."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
        self.active = "a"
        self.survival = 0.5

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)``."""
        for layer in self.layers:
            x = x + torch.relu(layer(x)) * (1.0 if self.training else self.survival)
        return self.heads[self.active](x)


class Low(nn.Module):
    """A wrapper around a layer that adds a low-rank update, and can be switched off."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.scaling, self.disabled = base, 0.5, False
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Any:
        """Return what the layer returns, and the update."""
        if self.disabled:
            return self.base(x)
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * self.scaling


class Adapted(nn.Module):
    """A frozen base with low-rank wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.body: Any = nn.Sequential(Low(nn.Linear(4, 6)), nn.ReLU(), Low(nn.Linear(6, 4)), nn.ReLU())
        self.out = nn.Linear(4, 2)
        for part in (self.body[0], self.body[2]):
            part.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)``."""
        return self.out(self.body(x))


class Branches(nn.Module):
    """One way through in training and another in evaluation, and an auxiliary output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux, self.out = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.weight_of_aux = 0.4

    def forward(self, x: Tensor) -> Any:
        """Return ``(batch, 2)``."""
        h = torch.relu(self.fc(x))
        if self.training:
            return self.out(h) + self.weight_of_aux * self.aux(h)
        return self.out(h)
