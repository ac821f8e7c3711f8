from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biofx import capture
from biofx.analysis.readouts import input_facing_nodes, readout_nodes
from biofx.analysis.synapses import split_nodes, synaptic_nodes
from biofx.layers.lowering import Lowering
from biofx.layers.norms import find_norms, lower_norm
from biofx.layers.sites import find_sites
from biofx.operators.split_ops import pool_synapses


class Layers(nn.Module):
    """Four layers of four units, wired by the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.LayerNorm((2, 4))
        self.gain = nn.Parameter(torch.eye(4))


class Chain(Layers):
    def forward(self, x: Tensor) -> Any:
        return torch.softmax(self.c(torch.relu(self.b(self.a(x)))), -1)


class Residual(Layers):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return y + self.b(torch.relu(y))


class Concatenation(Layers):
    def forward(self, x: Tensor) -> Any:
        joined = torch.cat([self.a(x), self.b(self.c(x))], -1)
        return joined[..., :4].mean(-1)


class TwoOutputs(Layers):
    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return {"first": y, "second": [self.d(self.c(y))]}


class Attention(Layers):
    def forward(self, x: Tensor) -> Any:
        scores = torch.softmax(self.a(x) @ self.b(x).transpose(-2, -1), -1)
        return self.d(scores @ self.c(x))


class Gated(Layers):
    def forward(self, x: Tensor) -> Any:
        return self.b(x * torch.sigmoid(self.a(x)))


class WritesIntoTheOutput(Layers):
    def forward(self, x: Tensor) -> Any:
        out = torch.zeros(8)
        out[:4] = self.b(self.a(x)).sum(0)
        out[4:].add_(self.c(x).sum(0))
        return out


class WritesIntoTheInput(Layers):
    def forward(self, x: Tensor) -> Any:
        hidden = torch.zeros(4)
        hidden += self.a(x).sum(0)
        return self.b(hidden)


class ProductWithAParameter(Layers):
    def forward(self, x: Tensor) -> Any:
        return self.a(x) @ self.gain.t()


class Normalised(Layers):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.b(self.a(x)).view(-1, 2, 4))


class Unused(Layers):
    def forward(self, x: Tensor) -> Any:
        self.a(x)
        return self.b(x)


WIRINGS: list[tuple[type[Layers], set[str], set[str]]] = [
    (Chain, {"a"}, {"c"}),
    (Residual, {"a"}, {"a", "b"}),
    (Concatenation, {"a", "c"}, {"a", "b"}),
    (TwoOutputs, {"a"}, {"b", "d"}),
    (Attention, {"a", "b", "c"}, {"d"}),
    (Gated, {"a"}, {"b"}),
    (WritesIntoTheOutput, {"a", "c"}, {"b", "c"}),
    (WritesIntoTheInput, {"a"}, {"b"}),
    (ProductWithAParameter, {"a"}, {"matmul"}),
    (Normalised, {"a"}, {"b"}),
    (Unused, {"a", "b"}, {"b"}),
]


@pytest.mark.parametrize(("model_class", "inputs", "readout"), WIRINGS)
def test_the_two_ends_of_a_model(model_class: type[Layers], inputs: set[str], readout: set[str]) -> None:
    captured = capture(model_class())
    assert {node.name for node in input_facing_nodes(captured)} == inputs
    assert {node.name for node in readout_nodes(captured)} == readout


def test_an_opaque_module_with_weights_counts_as_layers_and_one_without_does_not() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Sequential(nn.Tanh())
    )
    captured = capture(model, opaque=["1", "2"])
    synaptic = synaptic_nodes(captured)
    assert {node.target for node in synaptic} == {"0", "1"}
    assert {node.target for node in readout_nodes(captured)} == {"1"}


def test_recurrent_layers_and_attention_carry_weights_lowered_or_not() -> None:
    class Recurs(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.attention = nn.GRU(4, 4), nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.cell(x)[0].unflatten(1, (-1, 2))).flatten(1, 2)
            return torch.relu(self.attention(y, y, y)[0])

    captured = capture(Recurs())
    for _ in range(2):
        synaptic = synaptic_nodes(captured)
        assert {node.name for node in synaptic} == {"cell", "attention"}
        assert {node.name for node in input_facing_nodes(captured)} == {"cell"}
        assert {node.name for node in readout_nodes(captured)} == {"attention"}
        lowering = Lowering(captured)
        for site in find_sites(captured).found:
            lowering.lower(site)
        for norm in find_norms(captured):
            lower_norm(lowering, norm)
    assert not captured.graph.find_nodes(op="call_module")


def test_a_pool_marks_the_layers_that_run_into_it() -> None:
    class Pooled(Layers):
        def forward(self, x: Tensor) -> Any:
            return self.c(pool_synapses(torch.relu(self.b(self.a(x))), gamma=2, channel_axis=-1))

    captured = capture(Pooled())
    assert {node.name for node in split_nodes(captured)} == {"b"}
