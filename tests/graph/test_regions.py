from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioGraphModule, format_graph
from biofx.graph.joined_graph import whole_graph
from biofx.graph.regions import region_paths
from biofx.layers.sites import find_sites
from biofx.model.copies import pack
from biofx.model.region_parts import joined
from biofx.operators.rate_ops import scale_gradient
from biofx.operators.sign_ops import constrain_sign
from biofx.operators.split_ops import pool_synapses

EVERYTHING = BioConfig(
    fuzzy_learning_rate_factor_nu=0.2,
    apply_dales_principle=True,
    dales_constrain_inputs=True,
    dales_constrain_readout=True,
)


class Gate(nn.Module):
    """Decides by a value, for ``(batch, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.open = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.norm = nn.LayerNorm(4)
        self.closed = Block()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if x.sum() > 0:
            return self.norm(self.open(x)) * scale  # type: ignore[no-any-return]
        return self.closed(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Can be captured as it is, and takes one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


class Model(nn.Module):
    """A part in the middle that decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.gate = Gate()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.gate(self.stem(x))))  # type: ignore[no-any-return]

    def describe(self) -> int:
        return len(self.gate.open)


def outcome(model: nn.Module, x: Tensor) -> Any:
    model.zero_grad()
    y = model(x)
    y.pow(2).sum().backward()
    return y, {name: p.grad for name, p in model.named_parameters()}


def both_ways(x: Tensor) -> list[Tensor]:
    """Inputs that open the gate and that close it."""
    return [x, -x, x + 3, x - 3]


def test_what_python_calls_is_captured_below_it(vectors: Tensor) -> None:
    model = Model()
    captured = biofx.capture(model)
    assert region_paths(captured) == ("gate.open.0", "gate.open.2", "gate.norm", "gate.closed")
    assert list(captured.graph_breaks) == ["gate"]
    assert "test_regions.py" in captured.graph_breaks["gate"]
    assert "(if x.sum() > 0:)" in captured.graph_breaks["gate"]
    for x in both_ways(vectors):
        torch.testing.assert_close(outcome(captured, x), outcome(model, x), rtol=0, atol=0)


def test_one_graph_shows_all_regions(golden: Callable[[str, str], None]) -> None:
    bio_model, report = biofx.transform(Model(), EVERYTHING)
    text = f"{format_graph(bio_model)}\n\n{report}".replace(__file__, "FILE")
    golden("regions", re.sub(r"FILE:\d+", "FILE:LINE", text))


def test_the_result_is_still_the_model(vectors: Tensor) -> None:
    model = Model()
    bio_model, _ = biofx.transform(model, EVERYTHING)
    assert isinstance(bio_model, Model)
    assert isinstance(bio_model, torch.fx.GraphModule)
    assert isinstance(bio_model.gate, Gate)
    assert isinstance(bio_model.gate.closed, Block)
    assert isinstance(bio_model.gate.open[0], nn.Linear)
    assert bio_model.describe() == 3
    assert len(bio_model.gate.open) == 3
    assert [name for name, _ in bio_model.named_parameters()] == [n for n, _ in model.named_parameters()]
    own = [name for name in bio_model.state_dict() if "bio_mod" not in name]
    assert own == list(model.state_dict())


def test_every_weight_is_rewritten_in_the_region_that_uses_it(vectors: Tensor) -> None:
    bio_model, _ = biofx.transform(Model(), EVERYTHING)
    sites = find_sites(bio_model).found
    assert [site.parameter_path for site in sites] == [
        *("stem.weight", "gate.open.0.weight", "gate.open.2.weight", "gate.closed.first.weight"),
        *("gate.closed.second.weight", "head.weight"),
    ]
    assert all(site.has(scale_gradient) and site.has(constrain_sign) for site in sites)
    for x in both_ways(vectors):
        plain = biofx.transform(Model(), EVERYTHING.replace(fuzzy_learning_rate_factor_nu=0.0)).graph_module
        missing, _ = plain.load_state_dict(bio_model.state_dict(), strict=False)
        assert not missing
        (_, scaled), (_, expected) = outcome(bio_model, x), outcome(plain, x)
        for site in sites:
            gradient = expected[site.parameter_path]
            if gradient is None:
                assert scaled[site.parameter_path] is None
                continue
            layer: Any = bio_model.get_submodule(site.layer)
            factors = layer.bio_mod.fuzzy_learning_rate_parameters
            torch.testing.assert_close(scaled[site.parameter_path], gradient * factors)


def test_the_factors_are_those_that_the_layer_has_in_one_graph(mlp: nn.Module) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Any:
            return self.mlp(x) if x.sum() > 0 else self.mlp(-x)

    class Calls(Asks):
        def forward(self, x: Tensor) -> Any:
            return self.mlp(x)

    config = EVERYTHING.replace(apply_dales_principle=False)
    in_regions, in_one = (biofx.transform(model(), config).graph_module for model in (Asks, Calls))
    assert len(region_paths(in_regions)) == 3
    assert not region_paths(in_one)
    torch.testing.assert_close(in_regions.state_dict(), in_one.state_dict(), rtol=0, atol=0)


def test_selectors_reach_into_regions() -> None:
    bio_model, _ = biofx.transform(Model(), EVERYTHING, only="gate.closed", passes="scale-gradients")
    scaled = {site.layer for site in find_sites(bio_model).found if site.has(scale_gradient)}
    assert scaled == {"gate.closed.first", "gate.closed.second"}
    with pytest.raises(biofx.errors.SelectorError, match=r"did you mean 'gate\.closed'"):
        biofx.transform(Model(), EVERYTHING, only="gate.close")


def test_an_override_reaches_into_regions() -> None:
    config = EVERYTHING.override("gate.open.0", fuzzy_learning_rate_factor_nu=0.0)
    bio_model, _ = biofx.transform(Model(), config)
    assert bio_model.gate.open[0].bio_mod.config.fuzzy_learning_rate_factor_nu == 0.0
    assert bio_model.gate.open[2].bio_mod.config.fuzzy_learning_rate_factor_nu == 0.2
    scaled = {site.layer for site in find_sites(bio_model).found if site.has(scale_gradient)}
    assert "gate.open.0" not in scaled
    assert "gate.open.2" in scaled


def test_questions_across_regions_are_answered_unknown() -> None:
    config = BioConfig(
        apply_dales_principle=True,
        weight_splitting_Gamma=2,
        fuzzy_lr_distribution=biofx.Distribution.LAYER_ADAPTIVE,
    )
    _, report = biofx.transform(Model(), config)
    said = {(remark.layer, remark.message) for remark in report.remarks if remark.kind == "missed"}
    assert (
        "gate.open.0",
        "what feeds it is not known: Python calls 'gate.open.0'"
        " (constrain_inputs=False, in a config dales_constrain_inputs); give "
        "example_inputs to have signs here",
    ) in said
    assert (
        "gate.closed.second",
        "what follows it is not known: Python calls 'gate.closed'"
        " (constrain_readout=False, in a config dales_constrain_readout); give "
        "example_inputs to have signs here",
    ) in said
    unknown = "whether it is an output layer is not known: Python calls 'gate.closed' and what follows it"
    assert any(layer == "gate.closed.second" and text.startswith(unknown) for layer, text in said)
    assert (
        "gate.closed.first",
        "its place in the order of execution is not known: Python calls 'gate.closed'",
    ) in said


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("model_class", [Model, Gate])
def test_copies_with_regions_are_independent_and_the_same(
    copied: Callable[[Any], Any], model_class: type[nn.Module], vectors: Tensor
) -> None:
    bio_model = biofx.transform(model_class(), EVERYTHING).graph_module
    other = copied(bio_model)
    assert isinstance(other, model_class)
    assert isinstance(other, BioGraphModule)
    assert format_graph(other) == format_graph(bio_model)
    for x in both_ways(vectors):
        torch.testing.assert_close(outcome(other, x), outcome(bio_model, x), rtol=0, atol=0)
    before = {name: value.clone() for name, value in bio_model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    for name, value in bio_model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_joining_and_dividing_changes_nothing(vectors: Tensor) -> None:
    bio_model = biofx.transform(Model(), EVERYTHING).graph_module
    before = format_graph(bio_model)
    expected = bio_model(vectors)
    modules: dict[str, Any] = {path: bio_model.get_submodule(path) for path in region_paths(bio_model)}
    regions = {path: module for path, module in modules.items() if isinstance(module, torch.fx.GraphModule)}
    assert [path for path in modules if path not in regions] == ["gate.norm"]  # nothing was done with it
    parts = {path: pack(region.graph)[0] for path, region in regions.items()}
    with joined(bio_model), joined(bio_model):
        assert format_graph(bio_model.graph) == before
    assert format_graph(bio_model) == before
    assert torch.equal(bio_model(vectors), expected)
    for path, records in parts.items():
        found = pack(regions[path].graph)[0]
        assert [record[:2] for record in found] == [record[:2] for record in records]


def test_a_pass_can_follow_on_a_model_with_regions(vectors: Tensor) -> None:
    bio_model = biofx.transform(Model(), EVERYTHING.replace(fuzzy_learning_rate_factor_nu=0.0)).graph_module
    before = bio_model(vectors)
    scaled, report = biofx.passes.ScaleGradients()(bio_model)
    assert [entry.applied for entry in report.passes] == [6]
    assert torch.equal(scaled(vectors), before)
    again, second = biofx.passes.ScaleGradients()(scaled)
    assert not second.modified
    assert format_graph(again) == format_graph(scaled)


def test_a_layer_can_be_split_where_it_is_a_region_by_itself(vectors: Tensor) -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x) if x.sum() > 0 else self.fc(x) * 2

    class Pool(biofx.Pass):
        name = "pool"

        def rewrite(self, graph_module: Any, scope: Any) -> Any:
            for site in find_sites(graph_module).found:
                with site.node.graph.inserting_after(site.node):
                    pooled = site.node.graph.call_function(
                        pool_synapses, (site.node,), {"gamma": 2, "channel_axis": -1}
                    )
                for user in [user for user in site.node.users if user is not pooled]:
                    user.replace_input_with(site.node, pooled)
                yield biofx.applied(site.node, site.layer, "pooled")

    model = Doubles()
    pooled, _ = Pool()(biofx.capture(model))
    y = model.fc(vectors)
    expected = pool_synapses(y, gamma=2, channel_axis=-1) * (1 if vectors.sum() > 0 else 2)
    torch.testing.assert_close(pooled(vectors), expected)
    (site,) = find_sites(pooled).found
    assert site.node.op == "call_module"
    twice, _ = Pool()(copy.deepcopy(pooled))
    torch.testing.assert_close(twice(vectors), pool_synapses(expected, gamma=2, channel_axis=-1))


def test_a_converter_reaches_regions(vectors: Tensor) -> None:
    bio_model = biofx.BioConverter(fuzzy_learning_rate_factor_nu=0.2)(Model())
    bio_model(vectors.abs() + 3).sum().backward()
    assert {"stem.weight", "head.weight"} <= set(bio_model.fuzzy_learning_rates())


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_shared_with_a_graph_has_one_state(first: bool, vectors: Tensor) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            gate = Gate()
            if first:
                self.fc = gate.open[2]
            self.gate = gate
            self.fc = gate.open[2]

        def forward(self, x: Tensor) -> Any:
            return self.fc(torch.cat([self.gate(x), x[:, :2]], 1)) + 1

    model, name = Shares(), "fc" if first else "gate.open.2"
    captured = biofx.capture(model)
    assert [node.target for node in captured.graph.find_nodes(op="call_module")] == ["gate", name]
    bio_model, _ = biofx.transform(model, EVERYTHING.replace(apply_dales_principle=False))
    (site,) = (site for site in find_sites(bio_model).found if site.layer == name)
    assert site.has(scale_gradient)
    for x in both_ways(vectors):
        _, expected = outcome(model, x)
        _, found = outcome(bio_model, x)
        factors = bio_model.fc.bio_mod.fuzzy_learning_rate_parameters
        torch.testing.assert_close(found[f"{name}.weight"], expected[f"{name}.weight"] * factors)


def test_a_weight_tied_across_regions_is_left_alone_with_the_reason(vectors: Tensor) -> None:
    model = Model()
    model.gate.closed.second.weight = nn.Parameter(torch.randn(4, 6))
    model.gate.open[2].weight = model.gate.closed.second.weight
    bio_model, report = biofx.transform(model, EVERYTHING)
    reasons = {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}
    assert "its weight is also read by 'gate' (Gate)" in reasons["gate.open.2"]
    assert "its weight is also read by 'gate' (Gate)" in reasons["gate.closed.second"]
    _, report = biofx.transform(model.gate, EVERYTHING)
    reasons = {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}
    assert "tied to that of 'closed.second', outside the region of 'open.2'" in reasons["open.2"]
    assert "tied to that of 'open.2', outside the region of 'closed'" in reasons["closed.second"]
    for x in both_ways(vectors):
        assert bio_model(x).shape == model(x).shape


def test_a_region_whose_class_cannot_be_imported_keeps_its_graph(vectors: Tensor) -> None:
    bio_model = biofx.transform(nn.Sequential(Block(), nn.ReLU()), EVERYTHING).graph_module
    data = pickle.dumps(bio_model).replace(b"Sequential", b"Sequentiao")
    other = pickle.loads(data)
    assert not isinstance(other, nn.Sequential)
    assert torch.equal(other(vectors), bio_model(vectors))


def test_a_model_of_one_graph_has_no_regions(mlp: nn.Module) -> None:
    captured = biofx.capture(mlp)
    assert region_paths(captured) == ()
    assert whole_graph(captured) is captured.graph
    assert captured.graph_breaks == {}


class ReadsWeights(nn.Module):
    """Uses one layer's weight without calling the layer, and a part of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.block = nn.Linear(4, 4), nn.Linear(4, 4), Block()

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            x = self.called(x)
        return self.block.second(torch.relu(self.block.first(self._project(x))))

    def _project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.read.weight)


@pytest.mark.parametrize("example", [None, ((torch.ones(2, 4),), {})])
def test_what_python_uses_without_calling_it_is_scaled(example: Any, vectors: Tensor) -> None:
    model = ReadsWeights()
    bio_model, report = biofx.transform(model, passes="scale-gradients", example_inputs=example)
    assert "read" in {remark.layer for remark in report.remarks if remark.kind == "applied"}
    for x in both_ways(vectors):
        (_, found), (_, expected) = outcome(bio_model, x), outcome(model, x)
        for site in find_sites(bio_model).found:
            if site.has(scale_gradient) and expected[site.parameter_path] is not None:
                layer: Any = bio_model.get_submodule(site.layer)
                factors = layer.bio_mod.fuzzy_learning_rate_parameters
                gradient = expected[site.parameter_path] * factors
                torch.testing.assert_close(found[site.parameter_path], gradient)
        read: Any = bio_model.read
        factors = read.bio_mod.fuzzy_learning_rate_parameters
        torch.testing.assert_close(found["read.weight"], expected["read.weight"] * factors)
    scaled = {site.layer for site in find_sites(bio_model).found if site.has(scale_gradient)}
    assert {"block.first", "block.second"} <= scaled
