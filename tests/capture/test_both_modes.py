"""Forwards that do one thing in training and another in evaluation: one graph, with a branch for either."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.nn import functional as F

import biofx
from biofx.capture.capture import capture
from biofx.errors import CaptureError, PassError
from biofx.graph.branches import begin_branch, has_branches, take_branches
from biofx.layers.constant_part import ConstantPart
from biofx.model.copies import copy_graph
from biofx.model.graph_module import BioGraphModule
from biofx.operators.rate_sampling import Distribution
from biofx.passes import ScaleGradients


class Body(nn.Module):
    """Features of shape ``(batch, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.first(x)))


class HasAnAuxiliaryHead(Body):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        if self.training:
            aux = self.aux(h)
        y = self.last(h)
        return (y, aux) if self.training else y.softmax(-1)


class Outputs(NamedTuple):
    logits: Tensor
    early: Tensor
    late: Tensor


class HasTwoHeads(Body):
    """What one branch computes goes into the next."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        early = self.early(h) if self.training else None
        y = self.last(h)
        late = self.late(y) if self.training else None
        if self.training and early is not None and late is not None:
            return Outputs(y, early, late)
        return y


class CallsWithOtherArguments(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        y = torch.clamp(y, 0.1) if self.training else torch.clamp(y, 0.1, 2.0)
        return self.last(F.softmax(y, dim=-1) if self.training else F.softmax(y, -1))


class AddsNoise(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        if self.training:
            y = y + 0.1 * torch.randn_like(y)
        return self.last(y)


class ReturnsEarly(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        if not self.training:
            return {"probabilities": self.last(y).softmax(-1)}
        return {"logits": self.last(y), "features": y}


class CallsALayerTwice(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.last(self.features(x))
        return (y, self.last(self.features(x + 1))) if self.training else y


class ChangesInPlace(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.training:
            y += torch.ones_like(y)
            y.mul_(2)
        return self.last(y)


class ChoosesConstantsToo(Body):
    def forward(self, x: Tensor) -> Any:
        y = F.leaky_relu(self.first(x), 0.2 if self.training else 0.1)
        z = y.sin() if self.training else y.cos()
        return self.last(F.dropout(z, 0.5, self.training))


class DoesNothingInEvaluation(Body):
    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x)) if self.training else x


class Nests(nn.Module):
    """Parts that decide for themselves, in a model that does too."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(AddsNoise(), ChoosesConstantsToo(), ChangesInPlace())
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.last(self.parts(x))
        return y if self.training else y.argmax(-1)


MODELS = (
    HasAnAuxiliaryHead,
    HasTwoHeads,
    CallsWithOtherArguments,
    AddsNoise,
    ReturnsEarly,
    CallsALayerTwice,
    ChangesInPlace,
    ChoosesConstantsToo,
    DoesNothingInEvaluation,
    Nests,
)


@pytest.fixture(params=(False, True), ids=("traced", "recorded"))
def captured_from(request: pytest.FixtureRequest) -> Callable[[nn.Module], BioGraphModule]:
    """Both ways to capture a model."""

    def captured(model: nn.Module) -> BioGraphModule:
        return capture(model, example_inputs=((inputs(),), {}) if request.param else None)

    return captured


def inputs(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch))


def run(model: nn.Module, x: Tensor) -> Any:
    """Return output, gradients and buffers of one call."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(x.clone())
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if leaf.requires_grad]
    if leaves:
        torch.stack([leaf.sin().sum() for leaf in leaves]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output, gradients, dict(model.named_buffers())


def modes_of(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Yield every way to switch the modules that decide by themselves."""
    deciding = [path for path, module in model.named_modules() if isinstance(module, (Body, Nests))]
    for flags in itertools.product((True, False), repeat=len(deciding)):
        yield dict(zip(deciding, flags, strict=True))


def switch(model: nn.Module, modes: dict[str, bool]) -> None:
    for path, flag in modes.items():
        model.get_submodule(path).train(flag)


@pytest.mark.parametrize("model_class", MODELS)
def test_it_is_one_graph_and_does_what_the_model_does_whichever_part_is_in_which_mode(
    model_class: type[nn.Module], captured_from: Callable[[nn.Module], BioGraphModule]
) -> None:
    model = model_class()
    captured = captured_from(model)
    assert captured.graph_breaks == {}
    assert has_branches(captured.graph)
    reference = copy.deepcopy(model)
    for modes in modes_of(model):
        for batch in (3, 5):
            switch(reference, modes)
            switch(captured, modes)
            expected, found = (run(each, inputs(batch)) for each in (reference, captured))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_a_mode_taken_out_of_it_is_what_a_stock_trace_finds_in_that_mode(
    model_class: type[nn.Module], training: bool
) -> None:
    model = model_class().train(training)
    captured = capture(model)
    graph = copy_graph(captured.graph)
    take_branches(graph, training=training)
    stock = torch.fx.symbolic_trace(copy.deepcopy(model))
    flags = [node for node in graph.nodes if str(node.target).endswith("training") and node.op == "get_attr"]
    taken = [(node.op, node.target) for node in graph.nodes if node not in flags]
    assert [op for op, _ in taken] == [node.op for node in stock.graph.nodes]
    assert [t for op, t in taken if op == "call_module"] == [
        node.target for node in stock.graph.find_nodes(op="call_module", sort=True)
    ]


def test_the_code_shows_the_branches() -> None:
    code = capture(AddsNoise()).code
    assert "if training:" in code
    assert "begin_branch" not in code
    assert "if not training:" in capture(ReturnsEarly()).code


@pytest.mark.parametrize("model_class", MODELS)
def test_what_is_behind_a_branch_is_rewritten_like_everything_else(
    model_class: type[nn.Module], captured_from: Callable[[nn.Module], BioGraphModule]
) -> None:
    """Rates: each gradient is the plain one times its factor, in whatever mode."""
    model = model_class()
    rewritten = ScaleGradients(distribution=Distribution.LOGNORMAL)(captured_from(model))
    reference = copy.deepcopy(model)
    for training in (True, False):
        _, plain, _ = run(reference.train(training), inputs())
        _, found, _ = run(rewritten.graph_module.train(training), inputs())
        for path, gradient in plain.items():
            layer: Any = rewritten.graph_module.get_submodule(path.rpartition(".")[0])
            is_scaled = path.endswith("weight") and not isinstance(layer, nn.BatchNorm1d)
            factors = layer.bio_mod.fuzzy_learning_rate_parameters if is_scaled else torch.ones(())
            torch.testing.assert_close(found[path], gradient * factors)
            assert not is_scaled or factors.std() > 0


def test_signs_reach_into_a_branch() -> None:
    """What an auxiliary head reads in training has the signs of the units that feed it."""
    model = HasAnAuxiliaryHead()
    model.aux = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    bio_model, _ = biofx.transform(model, {"apply_dales_principle": True})
    node = next(node for node in bio_model.graph.nodes if node.name == "aux_0")
    signs = bio_model.get_buffer("first.bio_mod.sign")
    assert set(signs.tolist()) == {-1, 1}
    weight: Any = node.args[1]
    assert (ConstantPart(bio_model).value(weight) * signs >= 0).all()
    assert (model.aux.get_parameter("0.weight") * signs < 0).any()


def test_a_weight_that_a_branch_and_the_rest_share_is_there_in_both_modes() -> None:
    model = CallsALayerTwice()
    bio_model, _ = biofx.transform(model, {"fuzzy_lr_distribution": "uniform", "apply_dales_principle": True})
    begin = next(iter(bio_model.graph.find_nodes(op="call_function", target=begin_branch)))
    assert begin.args[1] is True
    for training in (True, False):
        bio_model.train(training)(inputs())

    class ReadsItsWeightFirstInTraining(Body):
        def forward(self, x: Tensor) -> Any:
            if self.training:
                x = x + F.linear(F.linear(x, self.first.weight), self.last.weight)
            return self.last(torch.relu(self.first(x)))

    shared = ReadsItsWeightFirstInTraining()
    bio_model, _ = biofx.transform(shared, {"fuzzy_lr_distribution": "uniform"})
    for training in (True, False):
        found, expected = (each.train(training)(inputs()) for each in (bio_model, shared))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_class", MODELS)
def test_copies_pickles_and_compiled_ones_keep_both_modes(model_class: type[nn.Module]) -> None:
    torch.compiler.reset()
    captured = capture(model_class())
    remade = GraphModule(copy.deepcopy(captured), copy_graph(captured.graph))
    compiled: Any = torch.compile(copy.deepcopy(captured), backend="eager", fullgraph=True)
    for made in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured)), remade, compiled):
        reference = copy.deepcopy(captured)
        for training in (True, False):
            found, expected = (run(each.train(training), inputs())[0] for each in (made, reference))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_deployed_model_does_what_evaluation_does(model_class: type[nn.Module]) -> None:
    bio_model, _ = biofx.transform(model_class(), {"fuzzy_lr_distribution": "uniform"})
    deployed = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(inputs()), bio_model.eval()(inputs()), rtol=0, atol=0)
    assert "branch" not in str(getattr(deployed, "graph", ""))


def test_running_node_by_node_is_refused() -> None:
    with pytest.raises(PassError, match="runs as code, not node by node"):
        Interpreter(capture(AddsNoise())).run(inputs())


class AsksForAnothersMode(Body):
    """Whoever switches ``norm`` alone decides here."""

    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        return self.last(y + 1 if self.norm.training else y)


class HoldsOneThatAsksInABranch(Body):
    """``part`` is called in training only, and may be in evaluation itself then."""

    def __init__(self) -> None:
        super().__init__()
        self.part = DoesNothingInEvaluation()

    def forward(self, x: Tensor) -> Any:
        y = self.last(self.features(x))
        return self.part(y) if self.training else y


@pytest.mark.parametrize("model_class", [AsksForAnothersMode, HoldsOneThatAsksInABranch])
def test_where_it_does_not_show_who_decides_python_stays_in_charge(
    model_class: type[Body], captured_from: Callable[[nn.Module], BioGraphModule]
) -> None:
    model = model_class()
    captured = captured_from(model)
    assert captured.graph_breaks
    inner = "norm" if model_class is AsksForAnothersMode else "part"
    for outer, switched in itertools.product((True, False), repeat=2):
        for each in (model, captured):
            each.train(outer).get_submodule(inner).train(switched)
        expected, found = (run(each, inputs()) for each in (copy.deepcopy(model), copy.deepcopy(captured)))
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


class DropsPaths(nn.Module):
    """Without parameters: better one call than a branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[0], 1).round() if self.training else x


def test_a_module_without_parameters_that_decides_is_one_call(
    captured_from: Callable[[nn.Module], BioGraphModule],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), DropsPaths(), nn.Linear(4, 2))
    captured = captured_from(model)
    assert [node.target for node in captured.graph.find_nodes(op="call_module", sort=True)] == ["0", "1", "2"]
    assert not has_branches(captured.graph)
    with pytest.raises(CaptureError, match=r"one thing in training .*opaque=\['1'\]"):
        capture(model, regions=False)


class AsksAPartOfIt(nn.Module):
    """Reads the flag of a normalisation, and hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        norm = self.norm
        mean, variance = norm.running_mean, norm.running_var
        return nn.functional.batch_norm(self.fc(x), mean, variance, norm.weight, norm.bias, norm.training)


def test_the_flag_of_a_part_is_followed_where_it_alone_is_read() -> None:
    model = AsksAPartOfIt()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    captured = biofx.capture(model, example_inputs=x)
    assert captured.graph_breaks == {}
    for whole, part in ((True, True), (False, False), (True, False), (False, True)):
        for either in (model, captured):
            either.train(whole).get_submodule("norm").train(part)
        torch.testing.assert_close(captured(x), model(x))
        torch.testing.assert_close(captured.state_dict(), model.state_dict())
