from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import biofx
from biofx.capture.run_observer import observe_run
from biofx.graph.observed_functions import SHAPE, made_elsewhere
from biofx.model.observed_runs import observed_runs_of


class Runs(nn.Module):
    """Two layers, and what a function does between them."""

    def __init__(self, between: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.full((6,), 2.0))
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self, self.first(x)))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * gradients[0]


@dataclass
class Held:
    state: Tensor
    steps: int


def in_a_dataclass(model: Any, h: Tensor) -> Tensor:
    return Held(h.relu(), 1).state


def in_an_attribute(model: Any, h: Tensor) -> Tensor:
    model.kept = h.relu()
    return model.kept  # type: ignore[no-any-return]


def filled(model: Any, h: Tensor) -> Tensor:
    made = torch.zeros(len(h), 6)
    made[:, :] = h
    return made


def checkpointed(model: Any, h: Tensor) -> Any:
    return checkpoint(torch.relu, h, use_reentrant=False)


FOLLOWED: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing": lambda model, h: h,
    "an operator": lambda model, h: h * model.scale,
    "a reflected operator": lambda model, h: 0.5 * h,
    "an attribute": lambda model, h: h.T.T,
    "in place": lambda model, h: h.clone().relu_(),
    "a value that decides": lambda model, h: h.relu() if h.sum() > -1e9 else h,
    "a loop": lambda model, h: sum((h[place] for place in range(len(h))), torch.zeros(6))[None],
    "a list": lambda model, h: torch.stack([row.relu() for row in h]),
    "a dictionary": lambda model, h: {"h": h}["h"],
    "a dataclass": in_a_dataclass,
    "an attribute of the module": in_an_attribute,
    "written into zeros": filled,
    "checkpointed": checkpointed,
    "parts of a chunk": lambda model, h: torch.cat(h.chunk(2, -1), -1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_units_are_followed_through(name: str) -> None:
    graph = observe_run(Runs(FOLLOWED[name]), (torch.randn(3, 4),), {})
    assert not graph.find_nodes(op="call_function", target=made_elsewhere)
    calls = [str(node.target) for node in graph.find_nodes(op="call_module")]
    assert calls == ["first", "last"]
    (last,) = (node for node in graph.find_nodes(op="call_module") if node.target == "last")
    pending, seen = [last], set()
    while pending:
        node = pending.pop()
        seen.add(str(node.target))
        pending += node.all_input_nodes
    assert "first" in seen
    assert last.meta[SHAPE][-1] == 2


def test_an_autograd_function_is_one_node() -> None:
    function: Any = Doubled
    graph = observe_run(Runs(lambda model, h: function.apply(h)), (torch.randn(3, 4),), {})
    (applied,) = (node for node in graph.nodes if getattr(node.target, "__name__", "") == "Doubled")
    assert [str(source.target) for source in applied.all_input_nodes] == ["first"]


def test_what_no_function_was_seen_to_make_is_said_so() -> None:
    def through_numpy(model: Any, h: Tensor) -> Tensor:
        return torch.from_numpy(h.detach().numpy().copy())

    graph = observe_run(Runs(through_numpy), (torch.randn(3, 4),), {})
    (last,) = (node for node in graph.find_nodes(op="call_module") if node.target == "last")
    sources = {source.target for source in last.all_input_nodes}
    assert sources <= {made_elsewhere, torch.from_numpy}


def test_operators_are_those_of_python() -> None:
    graph = observe_run(Runs(lambda model, h: 1 - (2.0**h) / 3 @ torch.eye(6)), (torch.randn(3, 4),), {})
    targets = {getattr(node.target, "__name__", "") for node in graph.nodes if node.op == "call_function"}
    assert {"sub", "pow"} <= targets
    (less,) = graph.find_nodes(op="call_function", target=operator.sub)
    assert less.args[0] == 1


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_rec = nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[1], 5)
        for step in range(x.shape[0]):
            h = torch.relu(self.w_in(x[step]) + self.w_rec(h))
        return h


def test_runs_are_kept_with_copies_and_pickles_and_the_model_is_left_alone() -> None:
    model = Loop()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    captured = biofx.capture(model, example_inputs=(torch.randn(4, 2, 3, generator=torch.Generator()),))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    runs = observed_runs_of(captured)
    assert [len(graph.find_nodes(op="call_module", target="w_rec")) for graph in runs.graphs] == [4, 2]
    assert observed_runs_of(copy.deepcopy(captured)) is runs
    again = observed_runs_of(pickle.loads(pickle.dumps(captured)))
    assert [str(graph) for graph in again.graphs] == [str(graph) for graph in runs.graphs]
    assert [node.meta.get(SHAPE) for node in again.graphs[0].nodes] == [
        node.meta.get(SHAPE) for node in runs.graphs[0].nodes
    ]
    groups = [str(biofx.unit_groups(entry)) for entry in (captured, pickle.loads(pickle.dumps(captured)))]
    assert groups[0] == groups[1]


def test_a_model_that_is_one_graph_is_not_observed() -> None:
    captured = biofx.capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), example_inputs=(torch.randn(2, 3),))
    assert observed_runs_of(captured).graphs == ()


class Refuses(Loop):
    """Takes no other number of steps than four, and no other batch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:2] != (4, 2):
            raise ValueError("four steps of two")
        return super().forward(x)


def test_a_model_that_takes_no_other_sizes_is_observed_twice_as_it_is() -> None:
    runs = observed_runs_of(biofx.capture(Refuses(), example_inputs=(torch.randn(4, 2, 3),)))
    assert not runs.graphs or len(runs.graphs) == 2
