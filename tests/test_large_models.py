"""Models too large to be here: seven billion parameters on the meta device, thousands of nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx

WIDTH, HIDDEN, HEADS, LAYERS, WORDS = 4096, 11008, 32, 32, 32000


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(q * turn, k * turn, v, is_causal=True)
        return self.o(found.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attention(self.before(x), turn)
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        turn = torch.cos(torch.arange(words.shape[1], device=x.device))[:, None].to(x.dtype)
        for block in self.blocks:
            x = block(x, turn)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("recorded", [False, True])
def test_seven_billion_parameters_on_the_meta_device_stay_there(recorded: bool) -> None:
    with torch.device("meta"):
        model = LanguageModel()
        words = torch.zeros(1, 8, dtype=torch.long)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 6.7e9 < total < 6.8e9
    bio_model, report = biofx.transform(
        model,
        {"weight_splitting_Gamma": 2, "apply_dales_principle": True},
        example_inputs=((words,), {}) if recorded else None,
    )
    assert all(tensor.is_meta for tensor in (*bio_model.parameters(), *bio_model.buffers()))
    assert (bio_model.graph_breaks, bio_model.region_paths) == ({}, ())
    coverage = report.coverage
    assert coverage is not None
    assert coverage.total == coverage.visible == total
    assert coverage.rewritten > 0.5 * total  # split; signs and rates need values, and say so
    said = {remark.message for entry in report.passes for remark in entry.remarks}
    assert "its weight is on the meta device and has no values" in said
    found: Any = bio_model(torch.zeros(2, 5, dtype=torch.long, device="meta"))
    assert found.is_meta
    assert found.shape == (2, 5, WORDS)
