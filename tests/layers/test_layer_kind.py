from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Graph
from torch.fx.node import Argument
from torch.nn import functional as F

from biofx.layers import COMPOUND_KINDS, dense_kind_of, kind_of, kind_of_call
from biofx.layers.attention import ATTENTION
from biofx.layers.layer_kind import ONE_WEIGHT, WeightSlot
from biofx.operators.compound_ops import attend, recurrent


@pytest.mark.parametrize("by_name", [False, True])
def test_a_weight_is_read_and_written_in_its_place_alone(by_name: bool) -> None:
    graph = Graph()
    x, first, second, other = (graph.placeholder(name) for name in ("x", "first", "second", "other"))
    slot = WeightSlot(argument=(2, "weights"), index=1)
    node = (
        graph.call_function(recurrent, (x,), {"state": None, "weights": [first, second], "mode": "GRU"})
        if by_name
        else graph.call_function(recurrent, (x, None, [first, second], True), {"mode": "GRU"})
    )
    assert slot.read(node) is second
    slot.write(node, other)
    assert slot.read(node) is other
    assert WeightSlot(argument=(2, "weights"), index=0).read(node) is first
    assert set(node.all_input_nodes) == {x, first, other}


def test_one_weight_is_written_where_the_input_is_the_same_node() -> None:
    graph = Graph()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    node = graph.call_function(F.linear, (x, x))
    ONE_WEIGHT.write(node, other)
    assert node.args == (x, other)


@pytest.mark.parametrize(
    "module",
    [
        nn.RNN(2, 2, 3),
        nn.GRU(2, 2, 2, bias=False, bidirectional=True),
        nn.LSTM(2, 3, 2, proj_size=2),
        nn.LSTM(2, 3, proj_size=2, bias=False, bidirectional=True),
    ],
)
def test_slots_name_the_matrices_among_the_weights_that_torch_lists(module: nn.RNNBase) -> None:
    kind = kind_of(module)
    assert kind is not None
    slots = kind.slots_of_module(module)
    for slot in slots:
        assert slot.index is not None
        assert module._flat_weights_names[slot.index] == slot.name
        assert module.get_parameter(slot.name).shape[0] % slot.blocks == 0
    matrices = {name for name, parameter in module.named_parameters() if parameter.dim() == 2}
    assert {slot.name for slot in slots} == matrices


def test_a_call_has_the_slots_of_the_module_it_stands_for() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    module = nn.LSTM(2, 3, 2, proj_size=2, bidirectional=True)
    options: dict[str, Argument] = {"mode": "LSTM", "num_layers": 2, "bidirectional": True}
    call = graph.call_function(recurrent, (x, None, [x] * len(module._flat_weights_names), True), options)
    kind = kind_of_call(call)
    assert kind is kind_of(module)
    assert kind is not None
    assert kind.slots_of_call(call) == kind.slots_of_module(module)
    attention = graph.call_function(attend, (x, x, x, [x, x], True), {"num_heads": 1})
    assert kind_of_call(attention) is ATTENTION
    assert ATTENTION.slots_of_call(attention) == ATTENTION.slots_of_module(nn.MultiheadAttention(2, 1))


def test_kinds_with_one_weight_and_with_several_are_told_apart() -> None:
    assert all(kind.is_compound for kind in COMPOUND_KINDS)
    for module in (nn.RNN(2, 2), nn.GRU(2, 2), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1)):
        found = kind_of(module)
        assert found is not None
        assert found.name == type(module).__name__
        assert dense_kind_of(module) is None
    assert kind_of(nn.Linear(2, 2)) not in COMPOUND_KINDS
    assert kind_of_call(Graph().call_function(torch.relu)) is None
