"""Results of analyses are kept while nothing changes, and dropped on every kind of change."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import biofx
from biofx.graph import analysis_cache
from biofx.graph.analysis_cache import analyses_kept, cached_on_graph, unchanged
from biofx.graph.regions import region_paths
from biofx.layers import sites
from biofx.layers.sites import find_sites


class Counted:
    """An analysis that says how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

        @cached_on_graph
        def count(graph_module: GraphModule) -> list[str]:
            self.runs += 1
            return [node.name for node in graph_module.graph.nodes]

        self.query = count


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.act = nn.ReLU()
        self.register_buffer("shift", torch.zeros(3))
        self.sizes = [1, 2]
        self.others = SimpleNamespace(a=1)

    def forward(self, x: Tensor) -> Any:
        return self.act(self.b(self.a(x)) + self.shift) * 2.0


class LoopsOnValues(nn.Module):
    """Python decides, so the layer inside is a region with a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> Any:
        while x.sum() > 100:
            x = self.inner(x)
        return x


def node(model: GraphModule, name: str) -> Any:
    return next(entry for entry in model.graph.nodes if entry.name == name)


def swap_operands(model: Any) -> None:
    node(model, "add").args = node(model, "add").args[::-1]


def insert(model: Any) -> None:
    with model.graph.inserting_after(node(model, "a")):
        model.graph.call_function(torch.relu, (node(model, "a"),))


def erase(model: Any) -> None:
    node(model, "mul").replace_all_uses_with(node(model, "act"))
    model.graph.erase_node(node(model, "mul"))


def replace_by_one_like_it(model: Any) -> None:
    old = node(model, "act")
    with model.graph.inserting_after(old):
        new = model.graph.call_module("act", old.args)
    old.replace_all_uses_with(new)
    model.graph.erase_node(old)


def twice_another_weight(model: Any) -> None:
    model.a.weight = nn.Parameter(torch.zeros(3, 3))
    gc.collect()
    model.a.weight = nn.Parameter(torch.zeros(3, 3))


CHANGES: dict[str, Callable[[Any], object]] = {
    "arguments assigned": swap_operands,
    "a keyword": lambda m: setattr(node(m, "mul"), "kwargs", {"alpha": 1}),
    "one argument": lambda m: node(m, "mul").update_arg(1, 3.0),
    "an input": lambda m: node(m, "b").replace_input_with(node(m, "a"), node(m, "x")),
    "a target": lambda m: setattr(node(m, "a"), "target", "b"),
    "a name": lambda m: node(m, "a")._rename("other"),
    "a node": insert,
    "a node less": erase,
    "a node replaced by its like": replace_by_one_like_it,
    "an order": lambda m: node(m, "x").append(node(m, "shift")),
    "the module that a node came from": lambda m: node(m, "a").meta.update(nn_module_stack={}),
    "a parameter": lambda m: setattr(m.a, "weight", nn.Parameter(torch.zeros(3, 3))),
    "a parameter, twice": twice_another_weight,
    "a parameter of another shape": lambda m: setattr(m.a.weight, "data", torch.zeros(2, 3)),
    "a parameter of another type": lambda m: m.double(),
    "a frozen parameter": lambda m: m.a.weight.requires_grad_(False),
    "a tied parameter": lambda m: setattr(m.b, "weight", m.a.weight),
    "a buffer": lambda m: setattr(m, "shift", torch.ones(3)),
    "a module": lambda m: setattr(m, "act", nn.Tanh()),
    "a module, another class": lambda m: setattr(m.act, "__class__", nn.Tanh),
    "an option of a module": lambda m: setattr(m.act, "inplace", True),
    "a list of a module": lambda m: m.sizes.append(3),
    "a namespace of a module": lambda m: setattr(m.others, "a", 2),
    "a hook": lambda m: m.a.register_forward_hook(lambda *_: None),
    "a module more": lambda m: m.add_module("more", nn.Identity()),
    "the graph": lambda m: setattr(m, "graph", copy.deepcopy(m.graph)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_drops_what_was_found(change: str) -> None:
    model, counted = biofx.capture(Net()), Counted()
    with analyses_kept():
        first = counted.query(model)
        assert counted.query(model) is first
        CHANGES[change](model)
        counted.query(model)
        assert counted.runs == 2
        assert counted.query(model) == [node.name for node in model.graph.nodes]
        assert counted.runs == 2


def test_what_is_no_change_keeps_what_was_found() -> None:
    model, counted = biofx.capture(Net()), Counted()
    with analyses_kept():
        first = counted.query(model)
        model.recompile()
        model.graph.lint()
        model(torch.ones(1, 3)).sum().backward()
        with torch.no_grad():
            model.a.weight.mul_(2)
        with analyses_kept():
            assert counted.query(model) is first
        assert counted.query(model) is first


def test_a_change_in_a_region_drops_what_was_found() -> None:
    model, counted = biofx.capture(LoopsOnValues()), Counted()
    assert region_paths(model) == ("inner",)
    region: Any = model.get_submodule("inner")
    with analyses_kept():
        counted.query(model)
        region.graph.call_function(torch.relu, (next(iter(region.graph.nodes)),))
        counted.query(model)
    assert counted.runs == 2


def test_two_models_with_one_graph_have_results_of_their_own() -> None:
    model, counted = biofx.capture(Net()), Counted()
    twin: Any = object.__new__(type(model))
    vars(twin).update(vars(model))
    with analyses_kept():
        counted.query(model)
        counted.query(twin)
    assert counted.runs == 2


def test_where_nothing_changes_each_model_is_compared_once() -> None:
    model, counted = biofx.capture(Net()), Counted()
    twin: Any = object.__new__(type(model))
    vars(twin).update(vars(model))
    with analyses_kept():
        counted.query(model)
        insert(model)
        with unchanged():
            assert counted.query(model) == [node.name for node in model.graph.nodes]  # compared
            assert counted.runs == 2
            insert(model)  # which breaks the promise, and shows that nobody looks
            counted.query(model)
            assert counted.runs == 2
            counted.query(twin)
            assert counted.runs == 3
            counted.query(model)
            assert counted.runs == 4
        counted.query(model)
        assert counted.runs == 4
        insert(model)
        assert counted.query(model) == [node.name for node in model.graph.nodes]
        assert counted.runs == 5


def test_copies_and_pickles_begin_with_nothing() -> None:
    model, counted = biofx.capture(Net()), Counted()
    with analyses_kept():
        first = counted.query(model)
        for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
            assert counted.query(other) == first
            assert counted.query(other) is not first
        assert counted.runs == 4
        assert (
            vars(copy.deepcopy(model.graph))
            .keys()
            .isdisjoint(vars(model.graph).keys() - vars(other.graph).keys())
        )


def test_nothing_is_kept_afterwards_and_no_model_is_held() -> None:
    model, counted = biofx.capture(Net()), Counted()
    counted.query(model)
    counted.query(model)
    assert counted.runs == 2
    found = find_sites(model)
    weight = weakref.ref(model.a.weight)
    del found
    model.a.weight = nn.Parameter(torch.zeros(3, 3))
    gc.collect()
    assert weight() is None
    with analyses_kept():
        find_sites(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None


def test_an_analysis_that_fails_keeps_nothing() -> None:
    model, runs = biofx.capture(Net()), []

    @cached_on_graph
    def fails(graph_module: GraphModule) -> None:
        runs.append(graph_module)
        raise ValueError("no")

    with analyses_kept():
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                fails(model)
        insert(model)
        assert len(find_sites(model).found) == 2
    assert len(runs) == 2


def test_a_transform_with_everything_on_finds_the_sites_once_for_each_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Watched(sites._Survey):
        def __init__(self, graph_module: GraphModule) -> None:
            seen.append(biofx.format_graph(graph_module))
            super().__init__(graph_module)

    seen: list[str] = []
    monkeypatch.setattr(sites, "_Survey", Watched)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model.extend([nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)])
    config = biofx.BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)
    biofx.transform(model, config)
    assert len(seen) == len(set(seen))
    assert len(seen) >= 4


def test_how_often_a_model_is_looked_through_does_not_grow_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(analysis_cache._State):
        def follow(self, graph_module: GraphModule) -> bool:
            seen.append(graph_module)
            return super().follow(graph_module)

    seen: list[GraphModule] = []
    monkeypatch.setattr(analysis_cache, "_State", Watched)
    config = biofx.BioConfig(
        weight_splitting_Gamma=2, apply_dales_principle=True, weight_density=0.5, fuzzy_lr_dynamic=True
    )
    counts = []
    for layers in (3, 12):
        layer = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()]
        biofx.transform(nn.Sequential(*(copy.deepcopy(module) for module in layer * layers)), config)
        counts.append(len(seen))
        seen.clear()
    assert counts[0] == counts[1] > 0
