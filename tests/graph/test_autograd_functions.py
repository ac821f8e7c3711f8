from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx import BioConfig, capture
from biofx.graph.graph_functions import AppliedFunction
from biofx.torch_private import APPLY_IS_BUILTIN


class Reverse(torch.autograd.Function):
    """Its forward has no operation at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.strength * gradient, None


class Both(torch.autograd.Function):
    """Two results, and gradients that are not those of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def backward(ctx: Any, of_product: Tensor, of_sum: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return 3 * of_product * y + of_sum, of_product * x - of_sum


class Doubles(torch.autograd.Function):
    """Changes its argument in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.5 * gradient


class Binary(torch.autograd.Function):
    """A sign with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class HalvesFirst(Binary):
    """Has an ``apply`` of its own."""

    @classmethod
    def apply(cls, x: Tensor) -> Any:
        return super().apply(x - 0.5)  # type: ignore[no-untyped-call]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)


class Reverses(Body):
    def forward(self, x: Tensor) -> Any:
        return self.last(Reverse.apply(self.first(x), 0.5))  # type: ignore[no-untyped-call]


class UsesBoth(Body):
    def forward(self, x: Tensor) -> Any:
        found = Both.apply(self.first(x), x)  # type: ignore[no-untyped-call]
        return self.last(found[0]) + self.last(found[1])


class ChangesInPlace(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        Doubles.apply(y)  # type: ignore[no-untyped-call]
        return self.last(y)


class HasBinaryWeights(Body):
    def forward(self, x: Tensor) -> Any:
        return self.last(F.linear(x, Binary.apply(self.first.weight)))  # type: ignore[no-untyped-call]


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))


def outcome(model: nn.Module, x: Tensor) -> Any:
    model.zero_grad()
    output = model(x)
    output.pow(2).sum().backward()
    return output, {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}


def captured_of(model: nn.Module, *, recorded: bool, **options: Any) -> Any:
    return capture(model, example_inputs=((inputs(),), {}) if recorded else None, **options)


MODELS: list[type[nn.Module]] = [Reverses, UsesBoth, ChangesInPlace, HasBinaryWeights]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # which torch.compile does by itself
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("model_class", MODELS)
def test_a_function_is_one_node_with_its_own_backward(
    model_class: type[nn.Module], recorded: bool, unchanged: Callable[[nn.Module], Any]
) -> None:
    model = model_class()
    with unchanged(model):
        captured = captured_of(model, recorded=recorded, regions=False)
    calls = [node for node in captured.graph.nodes if isinstance(node.target, AppliedFunction)]
    assert len(calls) == 1
    variants = [captured, copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))]
    variants += [
        torch.fx.symbolic_trace(captured),
        biofx.transform(model, {"fuzzy_learning_rate_factor_nu": 0.0})[0],
    ]
    if model_class is not ChangesInPlace:  # compilers do not take it, as it is
        variants.append(torch.compile(copy.deepcopy(captured), backend="aot_eager", fullgraph=True))
    for training in (True, False):
        for batch in (4, 3):
            expected = outcome(model.train(training), inputs(batch))
            for other in variants:
                found = outcome(other.train(training), inputs(batch))
                torch.testing.assert_close(found[0], expected[0])
                for name, gradient in found[1].items():
                    torch.testing.assert_close(gradient, expected[1][name], msg=name)
    torch._dynamo.reset()


def test_gradients_on_both_sides_of_a_function_are_scaled() -> None:
    model = Reverses()
    bio_model, _ = biofx.transform(model, BioConfig(fuzzy_learning_rate_factor_nu=0.3))
    expected, found = outcome(model, inputs())[1], outcome(bio_model, inputs())[1]
    for name in ("first", "last"):
        layer: Any = bio_model.get_submodule(name)
        factors = layer.bio_mod.fuzzy_learning_rate_parameters
        assert factors.std() > 0.1
        torch.testing.assert_close(found[f"{name}.weight"], expected[f"{name}.weight"] * factors)


def test_a_weight_that_goes_through_a_function_is_reported() -> None:
    _, report = biofx.transform(HasBinaryWeights(), BioConfig(fuzzy_learning_rate_factor_nu=0.3))
    told = {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}
    assert "computed in the graph, not a parameter" in told[""]


@pytest.mark.parametrize("recorded", [False, True])
def test_a_function_with_an_apply_of_its_own_stays_in_python(recorded: bool) -> None:
    class HasAnApply(Body):
        def forward(self, x: Tensor) -> Any:
            return self.last(HalvesFirst.apply(self.first(x)))

    model = HasAnApply()
    captured = captured_of(model, recorded=recorded)
    assert "an apply() of its own" in captured.graph_breaks[""]
    torch.testing.assert_close(outcome(captured, inputs()), outcome(model, inputs()), rtol=0, atol=0)


def test_a_function_given_what_no_graph_can_hold_stays_in_python() -> None:
    class HandsOver(Body):
        def forward(self, x: Tensor) -> Any:
            return self.last(Reverse.apply(self.first(x), Strength(2.0)))  # type: ignore[no-untyped-call]

    model = HandsOver()
    for recorded in (False, True):
        captured = captured_of(model, recorded=recorded)
        assert list(captured.graph_breaks) == [""]
        torch.testing.assert_close(outcome(captured, inputs()), outcome(model, inputs()), rtol=0, atol=0)


class Strength:
    """A number in a class of its own."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __neg__(self) -> Any:
        return -self.value


keeps: Any = Reverse.apply
held: dict[str, Any] = {"reverse": Reverse.apply}


class KeepsAsGlobal(Body):
    def forward(self, x: Tensor) -> Any:
        return self.last(keeps(self.first(x), 0.5))


class KeepsInClass(Body):
    reverse: Any = Reverse.apply

    def forward(self, x: Tensor) -> Any:
        return self.last(self.reverse(self.first(x), 0.5))


class KeepsInModule(Body):
    def __init__(self) -> None:
        super().__init__()
        self.reverse: Any = Reverse.apply

    def forward(self, x: Tensor) -> Any:
        return self.last(self.reverse(self.first(x), 0.5))


class KeepsInDict(Body):
    def forward(self, x: Tensor) -> Any:
        return self.last(held["reverse"](self.first(x), 0.5))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("model_class", [KeepsAsGlobal, KeepsInClass, KeepsInModule])
def test_an_apply_that_was_kept_is_one_node(model_class: type[nn.Module], recorded: bool) -> None:
    model = model_class()
    captured = captured_of(model, recorded=recorded, regions=False)
    assert AppliedFunction(Reverse) in [node.target for node in captured.graph.nodes]
    torch.testing.assert_close(outcome(captured, inputs(3)), outcome(model, inputs(3)), rtol=0, atol=0)
    assert type(keeps) is type(Reverse.apply)


@pytest.mark.parametrize("recorded", [False, True])
def test_an_apply_kept_where_none_looks_is_a_node_or_stays_in_python(recorded: bool) -> None:
    """The model computes the same either way, gradients too."""
    model = KeepsInDict()
    captured = captured_of(model, recorded=recorded)
    found = AppliedFunction(Reverse) in [node.target for node in captured.graph.nodes]
    assert found is not APPLY_IS_BUILTIN
    if APPLY_IS_BUILTIN:
        assert (
            "applies Reverse, an autograd function, by an apply() that it has kept"
            in captured.graph_breaks[""]
        )
    torch.testing.assert_close(outcome(captured, inputs(3)), outcome(model, inputs(3)), rtol=0, atol=0)
