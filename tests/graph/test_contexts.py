from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, capture
from biofx.graph.contexts import (
    autocast_nesting,
    begin_autocast,
    begin_grad_mode,
    end_autocast,
    end_grad_mode,
)
from biofx.operators.rate_ops import scale_gradient
from biofx.plasticity.bio_module import BioModule


class Body(nn.Module):
    """Three layers, for ``(batch, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)


class Teaches(Body):
    """One branch without gradients, one with, through one layer."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            target = torch.tanh(self.first(x))
        return self.last(self.second(self.first(x)) * target), target


class TeachesLater(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.second(self.first(x))
        with torch.no_grad():
            target = torch.tanh(self.first(x))
        return self.last(y * target), target


class Decorated(Body):
    @torch.no_grad()
    def targets(self, x: Tensor) -> Any:
        return self.first(x)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.second(x) + self.targets(x))


class Follows(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.training):
            y = self.first(x)
        return self.last(self.second(x) * y), y


class Insists(Body):
    """Gradients inside, whatever the caller says."""

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            y = self.first(x)
            with torch.no_grad():
                y = y + self.second(y)
            y = self.second(y)
        return self.last(y), y


class Casts(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
            with torch.autocast("cpu", enabled=False):
                z = self.second(y.float())
        return self.last(z + y), y, z


class CastsTwice(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
            y = self.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = self.second(self.first(y))
        return self.last(z.float()), y


class Deep(nn.Module):
    """A part in which it happens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part, self.head = nn.Linear(8, 8), Teaches(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        y, target = self.part(torch.relu(self.stem(x)))
        return self.head(y), target


MODELS: list[type[nn.Module]] = [Teaches, TeachesLater, Decorated, Follows, Insists, Casts, CastsTwice, Deep]
SURROUNDINGS: list[Callable[[], AbstractContextManager[Any]]] = [
    nullcontext,
    torch.no_grad,
    lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: torch.autocast("cpu", torch.float16, enabled=False),
]


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))


def captured_of(model: nn.Module, *, recorded: bool, **options: Any) -> Any:
    if recorded:
        options["example_inputs"] = ((inputs(),), {})
    return capture(model, **options)


def outcome(model: nn.Module, x: Tensor, surroundings: Callable[[], AbstractContextManager[Any]]) -> Any:
    """Outputs, which of them have gradients, and the gradients."""
    model.zero_grad()
    with surroundings():
        output = model(x)
    leaves = list(output) if isinstance(output, tuple) else [output]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    if trained:
        sum(leaf.float().pow(2).sum() for leaf in trained).backward()
    assert torch.is_grad_enabled()
    assert autocast_nesting() == 0
    requires = [leaf.requires_grad for leaf in leaves]
    return leaves, requires, {name: p.grad for name, p in model.named_parameters()}


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


BEGIN_AND_END = (begin_grad_mode, end_grad_mode, begin_autocast, end_autocast)


def contexts_of(model: Any) -> list[Any]:
    return [node.target for node in model.graph.nodes if node.target in BEGIN_AND_END]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("model_class", MODELS)
def test_contexts_are_nodes_and_do_what_they_did(
    model_class: type[nn.Module], recorded: bool, unchanged: Callable[[nn.Module], Any]
) -> None:
    model = model_class()
    with unchanged(model):
        captured = captured_of(model, recorded=recorded, regions=False)
    assert not captured.graph_breaks
    begun = contexts_of(captured)
    assert len(begun) in (2, 4, 6)
    variants: list[nn.Module] = [captured, copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))]
    variants += [through_torch(captured)]
    if model_class is not Follows:  # whose training flag torch.fx would settle
        variants.append(torch.fx.symbolic_trace(captured))
    for training in (True, False):
        for surroundings in SURROUNDINGS:
            for other in variants if surroundings is nullcontext else variants[:1]:
                assert contexts_of(other) == begun
                for batch in (4, 3):
                    x = inputs(batch)
                    expected = outcome(model.train(training), x, surroundings)
                    found = outcome(other.train(training), x, surroundings)
                    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_modes_are_restored_when_the_graph_fails_inside(
    recorded: bool, surroundings: Callable[[], AbstractContextManager[Any]]
) -> None:
    class Fails(Body):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return self.last(self.first(x))

    captured = captured_of(Fails(), recorded=recorded, regions=False)
    for model in (captured, copy.deepcopy(captured)):
        with surroundings():
            before = modes_in_force()
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                model(torch.randn(4, 3))
            modes = modes_in_force()
        assert modes == before


def modes_in_force() -> Any:
    cast = (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )
    return torch.is_grad_enabled(), autocast_nesting(), cast


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("model_class", MODELS)
def test_a_weight_inside_and_outside_of_a_context_is_scaled_where_it_has_a_gradient(
    model_class: type[nn.Module], recorded: bool
) -> None:
    model = model_class()
    example: Any = ((inputs(),), {}) if recorded else None
    config = BioConfig(fuzzy_learning_rate_factor_nu=0.3)
    bio_model, report = biofx.transform(model, config, example_inputs=example)
    assert not bio_model.graph_breaks
    assert {remark.layer for remark in report.remarks if remark.kind == "applied"} == {
        path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    for training in (True, False):
        for surroundings in SURROUNDINGS[:3]:
            expected = outcome(model.train(training), inputs(3), surroundings)
            found = outcome(bio_model.train(training), inputs(3), surroundings)
            torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)
            for path, state in bio_model.named_modules():
                if isinstance(state, BioModule):
                    name = f"{path.removesuffix('.bio_mod')}.weight"
                    gradient = expected[2][name]
                    if gradient is not None:
                        gradient = gradient * state.fuzzy_learning_rate_parameters
                    torch.testing.assert_close(found[2][name], gradient, msg=f"{name} in {surroundings}")


def test_each_context_has_its_own_scaling_of_a_weight() -> None:
    bio_model, _ = biofx.transform(Teaches(), BioConfig(fuzzy_learning_rate_factor_nu=0.3))
    names = [node.name for node in bio_model.graph.nodes if node.op == "call_function"]
    scaled = [node.name for node in bio_model.graph.find_nodes(op="call_function", target=scale_gradient)]
    assert len([name for name in scaled if name.startswith("first")]) == 2
    inside = names[names.index("begin_grad_mode") : names.index("end_grad_mode")]
    assert "first_scaled" in inside
    assert "first_scaled_1" not in inside


@pytest.mark.parametrize("model_class", [Teaches, TeachesLater, Casts, Follows, Insists])
def test_every_mechanism_at_once_trains_in_and_out_of_contexts(model_class: type[nn.Module]) -> None:
    config = BioConfig(
        fuzzy_learning_rate_factor_nu=0.2,
        apply_dales_principle=True,
        weight_splitting_Gamma=2,
        dales_constrain_inputs=True,
        dales_constrain_readout=True,
    )
    torch.manual_seed(0)
    model = model_class()
    bio_model, _ = biofx.transform(model, config)
    unfolded, _ = biofx.transform(model, config.replace(weight_splitting_fold=False))
    unfolded.load_state_dict(bio_model.state_dict())
    expected, found = (outcome(each, inputs(), nullcontext) for each in (unfolded, bio_model))
    tolerance = 0.03 if model_class is Casts else None  # sums in another order, of numbers of 8 bits
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    asked = {"splits"} if model_class is Casts else set()  # its layers are all read by the output
    assert {fault.subject for fault in biofx.check(bio_model).faults} == asked


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("model_class", [Teaches, Follows, Casts])
def test_contexts_compile_into_one_graph_and_export(model_class: type[nn.Module], recorded: bool) -> None:
    model = model_class()
    captured = captured_of(model, recorded=recorded, regions=False)
    compiled: Any = torch.compile(captured, fullgraph=True, backend="aot_eager")
    x = inputs()
    expected = outcome(model, x, nullcontext)
    model_output = compiled(x)
    for found, wanted, requires in zip(model_output, expected[0], expected[1], strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.requires_grad == requires
    captured.zero_grad()
    sum(leaf.float().pow(2).sum() for leaf in model_output if leaf.requires_grad).backward()
    torch.testing.assert_close({n: p.grad for n, p in captured.named_parameters()}, expected[2])
    exported = torch.export.export(captured.eval(), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), model.eval()(x))
    torch._dynamo.reset()


class CastsOnItsDevice(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = self.first(x)
        return self.last(y.float())


class AsksForTheMode(Body):
    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x)) if torch.is_grad_enabled() else self.last(self.second(x))


class StaysWithinBounds(Body):
    """Which a weight between two uses of it would notice."""

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        with torch.no_grad():
            self.first.weight.clamp_(-10, 10)
        return self.last(self.first(y))


class Recovers(Body):
    def forward(self, x: Tensor) -> Any:
        try:
            with torch.no_grad():
                self.first(x)
                raise KeyError
        except KeyError:
            return self.last(self.first(x))


class AsksForAGradient(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.last(y * 2 if y.requires_grad else y)


class SwitchesForGood(Body):
    def forward(self, x: Tensor) -> Any:
        torch.set_grad_enabled(False)
        y = self.first(x)
        torch.set_grad_enabled(True)
        return self.last(y)


class SwitchesOnForGood(Body):
    def forward(self, x: Tensor) -> Any:
        torch.set_grad_enabled(True)
        return self.last(self.first(x))


class Infers(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.inference_mode():
            y = self.first(x)
        return self.last(y.clone())


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (AsksForTheMode, "whether gradients are on"),
        (StaysWithinBounds, "writes into a parameter"),
        (Recovers, "context"),
        (AsksForAGradient, "grad"),
        (CastsOnItsDevice, "device"),
        (SwitchesForGood, "gradients"),
        (SwitchesOnForGood, "gradients"),
        (Infers, "inference_mode"),
    ],
)
def test_what_is_no_context_of_the_graph_stays_in_python(
    model_class: type[nn.Module], reason: str, recorded: bool
) -> None:
    model = model_class()
    captured = captured_of(model, recorded=recorded)
    assert list(captured.graph_breaks) == [""]
    assert reason in captured.graph_breaks[""]
    assert torch.is_grad_enabled()
    for surroundings in (nullcontext, torch.no_grad):
        with surroundings():
            expected = model(inputs())
        with surroundings():
            found = captured(inputs())
        torch.set_grad_enabled(True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert found.requires_grad == expected.requires_grad


def test_contexts_of_a_part_that_cannot_be_captured_are_taken_back() -> None:
    class Part(Body):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                y = self.first(x)
                if y.sum() > 0:
                    return self.second(y)
            return y

    class Whole(Body):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                y = self.part(self.first(x))
            return self.last(y)

    model = Whole()
    for recorded in (False, True):
        captured = captured_of(model, recorded=recorded)
        assert list(captured.graph_breaks) == ["part"]
        assert contexts_of(captured) == [begin_grad_mode, end_grad_mode]
        expected, found = (outcome(each, inputs(), nullcontext) for each in (model, captured))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
