from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import biofx
from biofx import BioConfig, CaptureError, capture
from biofx.errors import InputError
from biofx.graph.graph_functions import call_checkpointed
from biofx.graph.regions import region_paths


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return x + self.down(self.drop(torch.relu(self.up(x)))) * scale


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))


class Checkpoints(Body):
    reentrant = False

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class CheckpointsReentrantly(Checkpoints):
    reentrant = True


class CallsByMethod(Body):
    """As transformers does."""

    def forward(self, x: Tensor) -> Any:
        function = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
        return self.head(function(self.blocks[1].__call__, self.stem(x), scale=0.5))


class CheckpointsALayer(Body):
    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(checkpoint(self.stem, x, use_reentrant=False)))


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))


class CountsProducts(TorchDispatchMode):
    """How many linear layers are run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


def outcome(model: nn.Module, x: Tensor) -> Any:
    """Output, gradients, and how many linear layers were run forwards, and in all."""
    model.zero_grad()
    torch.manual_seed(3)
    with CountsProducts() as products:
        output = model(x.clone().requires_grad_())
        forwards = products.found
        output.pow(2).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return output, gradients, (forwards, products.found)


def recorded_of(model: nn.Module, **options: Any) -> Any:
    return capture(model, example_inputs=((inputs(),), {}), **options)


MODELS: list[type[nn.Module]] = [Checkpoints, CheckpointsReentrantly, CallsByMethod, CheckpointsALayer]


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_checkpointed_module_is_a_region_that_is_computed_again(
    model_class: type[nn.Module], unchanged: Callable[[nn.Module], Any]
) -> None:
    model = model_class()
    with unchanged(model):
        captured = recorded_of(model)
    assert not captured.graph_breaks
    calls = captured.graph.find_nodes(op="call_function", target=call_checkpointed)
    assert {call.args[0].target for call in calls} == set(region_paths(captured))
    for training in (True, False):
        for batch in (4, 3):
            expected = outcome(model.train(training), inputs(batch))
            forwards, total = expected[2]
            # of a layer alone nothing has to be computed again: its input is there
            assert total == forwards if model_class is CheckpointsALayer else total > forwards
            for other in (captured, copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
                found = outcome(other.train(training), inputs(batch))
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_class", MODELS)
def test_its_weights_are_rewritten(model_class: type[nn.Module]) -> None:
    model = model_class()
    bio_model, report = biofx.transform(
        model, BioConfig(fuzzy_learning_rate_factor_nu=0.3), example_inputs=((inputs(),), {})
    )
    called = {"stem", "head"}
    for path in region_paths(bio_model):
        called |= {path} if path == "stem" else {f"{path}.up", f"{path}.down"}
    assert {remark.layer for remark in report.remarks if remark.kind == "applied"} == called
    expected = outcome(model, inputs(3))
    for other in (bio_model, copy.deepcopy(bio_model), through_torch(bio_model)):
        found = outcome(other, inputs(3))
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        assert found[2] == expected[2]
        for path in called:
            factors = bio_model.get_submodule(path).bio_mod.fuzzy_learning_rate_parameters  # type: ignore[union-attr]
            name = f"{path}.weight"
            torch.testing.assert_close(found[1][name], expected[1][name] * factors)


def test_a_layer_before_a_checkpointed_module_is_no_readout() -> None:
    class EndsInABlock(Body):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.blocks[0], torch.relu(self.stem(x)), use_reentrant=False)

    config = BioConfig(weight_splitting_Gamma=2)
    _, report = biofx.transform(EndsInABlock(), config, example_inputs=((inputs(),), {}))
    applied = {remark.layer for remark in report.remarks if remark.kind == "applied"}
    assert "stem" in applied
    told = [remark.message for remark in report.remarks if remark.layer == "blocks.0.down"]
    assert any("whether it is an output layer is not known" in message for message in told)


class ChecksAFunction(Body):
    def forward(self, x: Tensor) -> Any:
        return self.head(checkpoint(lambda y: self.blocks[0](y) * 2, self.stem(x), use_reentrant=False))


class ChecksASequence(Body):
    def forward(self, x: Tensor) -> Any:
        return self.head(checkpoint_sequential(list(self.blocks), 2, self.stem(x), use_reentrant=False))


class ChecksInTraining(Body):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = checkpoint(self.blocks[0], x, use_reentrant=False) if self.training else self.blocks[0](x)
        return self.head(x)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("model_class", [ChecksAFunction, ChecksASequence, ChecksInTraining, Checkpoints])
def test_what_else_is_checkpointed_stays_in_python_and_its_layers_are_rewritten(
    model_class: type[nn.Module], recorded: bool
) -> None:
    if recorded and model_class is Checkpoints:
        return
    model = model_class()
    captured = recorded_of(model) if recorded else capture(model)
    in_a_branch = recorded and model_class is ChecksInTraining
    assert next(iter(captured.graph_breaks)) == ("blocks.0" if in_a_branch else "")
    layers = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    bio_model, report = biofx.transform(captured, BioConfig(fuzzy_learning_rate_factor_nu=0.3))
    called = {layer for layer in layers if not (in_a_branch and layer.startswith("blocks.1."))}
    assert {remark.layer for remark in report.remarks if remark.kind == "applied"} == called
    for training in (True, False):
        expected = outcome(model.train(training), inputs(3))
        torch.testing.assert_close(outcome(captured.train(training), inputs(3)), expected, rtol=0, atol=0)
        assert outcome(bio_model.train(training), inputs(3))[2] == expected[2]


def test_where_one_graph_is_asked_for_checkpointing_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"'blocks\.0' is called under torch\.utils\.checkpoint"):
        recorded_of(Checkpoints(), regions=False)
    captured = recorded_of(Checkpoints())
    with pytest.raises(InputError, match=r"calls modules under torch\.utils\.checkpoint"):
        biofx.deploy(captured)
    with pytest.raises(CaptureError, match="cannot be traced again"):
        torch.fx.symbolic_trace(captured)
