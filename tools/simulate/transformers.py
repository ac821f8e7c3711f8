"""The models that are simulated: the parameters of transformers, and a small one that really runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Parameter:
    """One kind of parameter of a model."""

    shape: tuple[int, ...]
    count: int = 1
    """How many there are of it."""
    split: int | None = None
    """The axis along which tensor parallel splits it; None where every rank has all of it."""
    has_rates: bool = False
    """Whether it is a weight of a layer, with a state of its own."""
    is_lookup: bool = False
    """Whether rows are looked up, so that no entry is a connection that could be missing."""

    @property
    def entries(self) -> int:
        """Entries of all of its kind, a count."""
        return self.count * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Transformer:
    """A decoder: attention and a network of two layers in each block, no biases but those of layer norms."""

    blocks: int
    width: int
    hidden: int
    heads: int
    words: int
    """Size of the vocabulary; the embedding and the readout are two parameters."""

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters."""
        n, d, h = self.blocks, self.width, self.hidden
        yield Parameter((self.words, d), has_rates=True, is_lookup=True)
        yield Parameter((d, d), 3 * n, split=0, has_rates=True)  # queries, keys, values
        yield Parameter((d, d), n, split=1, has_rates=True)  # what comes out of attention
        yield Parameter((h, d), n, split=0, has_rates=True)
        yield Parameter((d, h), n, split=1, has_rates=True)
        yield Parameter((d,), 2 * (2 * n + 1))
        yield Parameter((self.words, d), has_rates=True)

    @property
    def entries(self) -> int:
        """Parameters, a count."""
        return sum(parameter.entries for parameter in self.parameters())

    def make(self) -> nn.Module:
        """Make it, to run."""
        return Decoder(self)


class Block(nn.Module):
    """Attention over earlier words, then two layers."""

    def __init__(self, size: Transformer) -> None:
        super().__init__()
        d, h = size.width, size.hidden
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False)
        self.of_a_head = d // size.heads

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, words, width)``, as it takes it."""
        seen = self.first(x)
        query, key, value = (
            part.unflatten(-1, (-1, self.of_a_head)).transpose(1, 2)
            for part in (self.query(seen), self.key(seen), self.value(seen))
        )
        read: Tensor = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        moved: Tensor = x + self.down(F.relu(self.up(self.second(x))))
        return moved


class Decoder(nn.Module):
    """A transformer of a given size."""

    def __init__(self, size: Transformer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.words, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(size.width)
        self.readout = nn.Linear(size.width, size.words, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits ``(batch, words, vocabulary)`` of words ``(batch, words)``."""
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.readout(self.norm(x))
        return found


SIZES = {
    "7 B": Transformer(blocks=32, width=4096, hidden=16384, heads=32, words=32000),
    "70 B": Transformer(blocks=80, width=8192, hidden=32768, heads=64, words=128256),
}
"""Those of the tables."""
