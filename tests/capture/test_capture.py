from __future__ import annotations

import copy
import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

import biofx
from biofx import CaptureError, capture
from biofx.errors import InputError


def run(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """Two calls with the same seed, and what they leave: outputs, gradients of input and model, buffers."""
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    outputs, gradients = [], []
    for _ in range(2):
        given = x.clone().requires_grad_()
        output = model(given)
        outputs.append(output)
        total = sum((leaf * leaf).sum() for leaf in leaves(output) if leaf.requires_grad)
        if isinstance(total, Tensor):
            total.backward()
        gradients.append(given.grad)
    own = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return outputs, gradients, own, buffers, torch.randn(1)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for entry in value for leaf in leaves(entry)] if isinstance(value, (list, tuple)) else []


def assert_same(model: nn.Module, captured: nn.Module, x: Tensor) -> None:
    """Equal to the bit in both modes, at two batch sizes, call after call."""
    reference = copy.deepcopy(model)
    for training in (True, False):
        for batch in (x, x[:2]):
            reference.train(training).zero_grad()
            captured.train(training).zero_grad()
            torch.testing.assert_close(run(captured, batch), run(reference, batch), rtol=0, atol=0)


class Body(nn.Module):
    """What the models below have in common: a layer, and features of shape ``(batch, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


class PassesTheFlagOn(Body):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.fc(x), 0.5, self.training)


class BranchesOnTheFlag(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) if self.training else x


class MixesTheFlagIn(Body):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.fc(x), 0.5 * self.training)


class FunctionalBatchNorm(Body):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        bn = self.bn
        return F.batch_norm(self.fc(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)


class AddsNoise(Body):
    def forward(self, x: Tensor) -> Any:
        noise = torch.randn(4) + torch.rand((x.shape[0], 1)) + torch.randn_like(x)
        return self.fc(x) + noise + torch.zeros(4).bernoulli_(0.5)


class MakesTensors(Body):
    def forward(self, x: Tensor) -> Any:
        total = torch.zeros(4)
        total += self.fc(x).sum(0)
        steps = torch.arange(4, dtype=x.dtype, device=x.device)
        return total + steps * torch.tensor([1.0, 2.0, 3.0, x.shape[0]]) + x.new_ones(4)


class StochasticDepth(Body):
    def forward(self, x: Tensor) -> Any:
        keep = torch.empty((x.shape[0], 1)).bernoulli_(0.5)
        return x + self.fc(x) * torch.where(torch.as_tensor(self.training), keep / 0.5, torch.ones(1))


class CountsInPlace(Body):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        return self.fc(x) * self.calls


class CountsByAssignment(CountsInPlace):
    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        calls = self.calls
        calls *= 1.5
        return self.fc(x) * self.calls


class WritesIntoABuffer(Body):
    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Any:
        before = self.memory.clone()
        self.memory[1] = x.detach().mean(0)
        self.memory[2, :2] += 1
        return self.fc(x) + before.sum(0)


class WritesIntoAView(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.fc(x) * 1
        left = y[:, :2]
        left += 1
        y[:, 3] = x[:, 0]
        same = y
        same *= 2
        return y


class UsesAttributesOfTensors(Body):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(4.0)
        self.all = [self.fc.weight, self.fc.bias]

    def forward(self, x: Tensor) -> Any:
        scale = self.table.clone()
        scale += x.detach().mean(0)
        penalty = self.all[0].norm() + sum((p * p).sum() for p in self.parameters())
        return self.fc(x) * scale + penalty * self.table[1] + self.all[0].T[0]


class ChangesAPlainTensor(Body):
    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.zeros(1)

    def forward(self, x: Tensor) -> Any:
        self.steps.add_(1)
        return self.fc(x) * self.steps


class ChangesItsInput(Body):
    def forward(self, x: Tensor) -> Any:
        y = x * 1
        z = y
        z += 1
        return self.fc(y) + z


class AsksForTheType(Body):
    def forward(self, x: Any) -> Any:
        parts = [x] if isinstance(x, Tensor) else x
        hidden: Any = self.fc(torch.cat(parts, 1))
        kinds: Any = (list, dict)
        return hidden.relu() if torch.is_tensor(hidden) and not isinstance(hidden, kinds) else None


class ReturnsADict(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"features": y, "rest": [y.relu(), (y.sum(), None, 3)]}


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class ReturnsANamedTuple(Body):
    def forward(self, x: Tensor) -> Any:
        return Pair(self.fc(x), x.max(1).values)


class TakesOptions(Body):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, flip: bool = False, how: str = "sum", scale: float = 2.0
    ) -> Any:
        if mask is not None:
            x = x * mask
        if flip:
            x = x.flip(1)
        y = self.fc(x) * scale
        return y.sum(1) if how == "sum" else y


class TakesAnything(Body):
    def forward(self, x: Tensor, *more: Tensor, factor: float = 3.0, **options: Any) -> Any:
        y = self.fc(x) * factor
        return y if options.get("raw") is None else y * 2


class CallsWithKeywords(Body):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TakesOptions()

    def forward(self, x: Tensor) -> Any:
        return self.inner(mask=torch.ones(4), x=self.fc(input=x), flip=True, how="none")


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2)])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = x + block(x)
        return {name: head(x) for name, head in self.heads.items()}


class Concatenates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 3), nn.Linear(4, 5, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        joined = torch.cat([self.left(x), self.right(x)], dim=-1)
        return self.out(joined), joined.flatten(1)[:, :2]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(1, 4, 3, stride=2, output_padding=1)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2, padding="same", padding_mode="circular")
        self.bn = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.grouped(self.up(x[:, None])))
        return self.drop(y).mean((1, 2)).sigmoid()


class SharesALayer(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(self.fc(x).relu()) + x


class UsesALambda(Body):
    def __init__(self) -> None:
        super().__init__()
        slope = 0.1
        self.activation: Any = lambda x: F.leaky_relu(x, slope)

    def forward(self, x: Tensor) -> Any:
        def twice(y: Tensor) -> Any:
            return self.activation(y) * 2

        return twice(self.fc(x))


class AsksAboutTheEnvironment(Body):
    def forward(self, x: Tensor) -> Any:
        jit: Any = torch.jit
        if jit.is_scripting() or jit.is_tracing() or torch.compiler.is_compiling():
            return x
        return self.fc(x)


class AttributesOfValues(Body):
    def forward(self, x: Tensor) -> Any:
        batch, width = x.shape
        y = self.fc(x).view(batch, 2, -1).to(x.dtype)
        half = getattr(y, "shape")[-1] // 2  # noqa: B009
        width += 1
        return y[..., :half].reshape(x.size(0), -1) * width * y.ndim


class LeavesAFrozenPart(Body):
    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.fixed(self.fc(x)).detach() + self.fc(x)


class WorksWithoutGradient(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            scale = x.mean()
        return self.fc(x) * scale


class SwitchesGradientByTheFlag(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.training):
            return self.fc(x)


class EnablesGradient(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            return self.fc(x)


class WorksUnderAutocast(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc(x)


class WorksWithoutAutocast(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.fc(x)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class ReversesGradients(Body):
    def forward(self, x: Tensor) -> Any:
        return Reverse.apply(self.fc(x))  # type: ignore[no-untyped-call]


CAPTURED: list[type[nn.Module]] = [
    ReversesGradients,
    WorksWithoutGradient,
    SwitchesGradientByTheFlag,
    EnablesGradient,
    WorksUnderAutocast,
    WorksWithoutAutocast,
    PassesTheFlagOn,
    MixesTheFlagIn,
    FunctionalBatchNorm,
    AddsNoise,
    MakesTensors,
    StochasticDepth,
    CountsInPlace,
    CountsByAssignment,
    WritesIntoABuffer,
    WritesIntoAView,
    UsesAttributesOfTensors,
    ChangesAPlainTensor,
    ChangesItsInput,
    AsksForTheType,
    ReturnsADict,
    ReturnsANamedTuple,
    TakesOptions,
    TakesAnything,
    CallsWithKeywords,
    Nested,
    Concatenates,
    Convolutions,
    SharesALayer,
    UsesALambda,
    AsksAboutTheEnvironment,
    AttributesOfValues,
    LeavesAFrozenPart,
    BranchesOnTheFlag,
]


@pytest.mark.parametrize("model_class", CAPTURED)
def test_a_captured_model_does_what_the_model_does(
    model_class: type[nn.Module], vectors: Tensor, unchanged: Callable[[nn.Module], Any]
) -> None:
    model = model_class()
    with unchanged(model):
        captured = capture(model)
    assert_same(model, captured, vectors)


class SwallowsTheRefusal(Body):
    def forward(self, x: Tensor) -> Any:
        try:
            big = bool(x.sum() > 0)
        except Exception:
            big = False
        return self.fc(x) if big else x


class BranchesOnAValue(Body):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            return x
        return self.fc(x)


class BranchesOnAShape(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) if x.shape[0] > 3 else x


class BranchesOnAParameter(Body):
    def forward(self, x: Tensor) -> Any:
        weight = next(iter(self.parameters()))
        return self.fc(x) if weight.sum() > 0 else x


class BranchesOnAnAttribute(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x.tensors) if hasattr(x, "tensors") else self.fc(x)


class HasADefaultAttribute(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * getattr(x, "weighting", 1)


class AsksForTheTypeOfASize(Body):
    def forward(self, x: Tensor) -> Any:
        size = x.shape[0]
        return self.fc(x) * 2 if isinstance(size, int) else x


class LooksAValueUp(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * {5: 1.0}.get(x.shape[0], 2.0)


class Iterates(Body):
    def forward(self, x: Tensor) -> Any:
        return torch.stack([self.fc(row) for row in x])


class AsksForTheLength(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * x.__len__()


class Contains(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) if 1.0 in x else x


class SetsAnAttributeOfAValue(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        y.requires_grad = True
        return y


class WorksInInferenceMode(Body):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


class Seeds(Body):
    def forward(self, x: Tensor) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return self.fc(x) + torch.rand(4)


class Checkpoints(Body):
    def forward(self, x: Tensor) -> Any:
        return checkpoint.checkpoint(self.fc, x, use_reentrant=False)


class CountsInPython(Body):
    steps = 0

    def forward(self, x: Tensor) -> Any:
        self.steps += 1
        return self.fc(x) * self.steps


class Caches(Body):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Any] = {"x": {"last": None}}

    def forward(self, x: Tensor) -> Any:
        self.cache["x"]["last"] = x
        return self.fc(x)


class Collects(Body):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        self.seen.append(x)
        return self.fc(x)


class Forgets(Body):
    def __init__(self) -> None:
        super().__init__()
        self.first = True

    def forward(self, x: Tensor) -> Any:
        if hasattr(self, "first"):
            del self.first
            return x
        return self.fc(x)


class BuildsLazily(Body):
    def forward(self, x: Tensor) -> Any:
        if not hasattr(self, "late"):
            self.late = nn.Linear(4, 4)
        return self.late(self.fc(x))


class RebindsABuffer(CountsInPlace):
    def forward(self, x: Tensor) -> Any:
        self.calls = self.calls * 0.9 + x.detach().mean()
        return self.fc(x) * self.calls


class ReplacesData(Body):
    def forward(self, x: Tensor) -> Any:
        self.fc.weight.data = self.fc.weight.data.clamp(-1, 1)
        return self.fc(x)


class ChangesATensorInAList(Body):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [torch.zeros(1)]

    def forward(self, x: Tensor) -> Any:
        self.steps[0].add_(1)
        return self.fc(x) * self.steps[0]


class UsesPythonsRandom(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * random.random()


class UsesNumpysRandom(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) + torch.from_numpy(numpy.random.rand(4)).float()


class ListsLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.ReLU()]

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class ListsParameters(Body):
    def __init__(self) -> None:
        super().__init__()
        self.gains = [nn.Parameter(torch.ones(4))]

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * self.gains[0]


class ReturnsAnOrderedDict(Body):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(out=self.fc(x))


class SwitchesAPart(Body):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        self.bn.eval()
        return self.bn(self.fc(x))


class KeepsAPartFrozen(Body):
    def train(self, mode: bool = True) -> KeepsAPartFrozen:
        super().train(mode)
        self.fc.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


class RefersToItself(Body):
    def __init__(self) -> None:
        super().__init__()
        self.drop: Any = lambda x: F.dropout(x, 0.5, self.training)

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.fc(x))


class HasExtraState(Body):
    extra = torch.zeros(1)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None: ...

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


class CopiesIntoNumpy(Body):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * float(x.detach().sum())


REFUSED: list[tuple[type[nn.Module], str]] = [
    (SwallowsTheRefusal, r"decides by a value"),
    (BranchesOnAValue, r"decides by a value"),
    (BranchesOnAShape, r"decides by a value"),
    (BranchesOnAParameter, r"decides by a value"),
    (BranchesOnAnAttribute, r"has an attribute 'tensors'"),
    (HasADefaultAttribute, r"has an attribute 'weighting'"),
    (AsksForTheTypeOfASize, r"the type of a value"),
    (LooksAValueUp, r"a value as a key"),
    (Iterates, r"iterates over a value"),
    (AsksForTheLength, r"length of a value"),
    (Contains, r"looks for something in a value"),
    (SetsAnAttributeOfAValue, r"sets the attribute 'requires_grad'"),
    (WorksInInferenceMode, r"inference_mode"),
    (Seeds, r"a seed"),
    (Checkpoints, r"checkpoint"),
    (CountsInPython, r"'steps'"),
    (Caches, r"'cache'"),
    (Collects, r"'seen'"),
    (Forgets, r"'first'"),
    (BuildsLazily, r"makes a parameter"),
    (RebindsABuffer, r"attribute 'calls'"),
    (ReplacesData, r"sets the attribute 'data'"),
    (ChangesATensorInAList, r"in place \(add_\)"),
    (UsesPythonsRandom, r"random numbers of Python"),
    (UsesNumpysRandom, r"random numbers of NumPy"),
    (ListsLayers, r"Linear that is not a submodule.*nn.ModuleList"),
    (ListsParameters, r"parameter that no module holds.*nn.ParameterList"),
    (ReturnsAnOrderedDict, r"OrderedDict"),
    (SwitchesAPart, r"switches module 'bn'"),
    (RefersToItself, r"refers to modules of the model"),
    (CopiesIntoNumpy, r"float\(\) argument"),
]


def test_a_train_of_its_own_stays(vectors: Tensor) -> None:
    original = KeepsAPartFrozen()
    captured = capture(original)
    assert not captured.graph_breaks
    for model in (captured, copy.deepcopy(captured)):
        model.train()
        assert model.training
        assert not model.fc.training
    inside = capture(nn.Sequential(KeepsAPartFrozen(), nn.Dropout())).train()
    assert not inside.get_submodule("0.fc").training
    assert inside.get_submodule("1").training
    assert_same(original, captured, vectors)


def test_extra_state_of_its_own_stays() -> None:
    class Counts(HasExtraState):
        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    captured = capture(Counts())
    assert not captured.graph_breaks
    state = captured.state_dict()
    assert torch.equal(state["_extra_state"], torch.zeros(1))
    captured.load_state_dict({**state, "_extra_state": torch.ones(1)})
    assert torch.equal(captured.get_extra_state(), torch.ones(1))


WORK_AT_THE_END_ONLY = (
    SetsAnAttributeOfAValue,
    WorksInInferenceMode,
    ReturnsAnOrderedDict,
)


@pytest.mark.parametrize("model_class", [model_class for model_class, _ in REFUSED])
def test_what_is_refused_keeps_its_own_forward_where_regions_may_be(
    model_class: type[nn.Module], vectors: Tensor, unchanged: Callable[[nn.Module], Any]
) -> None:
    model = model_class()
    inside = nn.Sequential(nn.Linear(4, 4), model_class(), nn.Linear(4, 3))
    if model_class is RefersToItself:
        for either in (model, inside):
            with pytest.raises(CaptureError, match="would go on using the original's"):
                capture(either)
        return
    with unchanged(model):
        captured = capture(model)
    assert isinstance(captured, model_class)
    assert list(captured.graph_breaks) == [""]
    if model_class not in (SetsAnAttributeOfAValue, WorksInInferenceMode):  # fail as they are, in training
        assert_same(model, captured, vectors)
    if model_class not in WORK_AT_THE_END_ONLY:
        captured = capture(inside)
        assert isinstance(captured, nn.Sequential)
        assert isinstance(captured[1], model_class)
        assert_same(inside, captured, vectors)


def numpy_state() -> bytes:
    state: Any = numpy.random.get_state()
    return bytes(state[1].tobytes())


@pytest.mark.parametrize(("model_class", "message"), REFUSED)
def test_what_a_graph_would_lose_is_refused_and_nothing_is_changed(
    model_class: type[nn.Module], message: str, unchanged: Callable[[nn.Module], Any]
) -> None:
    model = model_class()
    state = numpy_state(), random.getstate()
    with unchanged(model), pytest.raises(CaptureError, match=message):
        capture(model, regions=False)
    assert torch.is_grad_enabled()
    assert numpy_state() == state[0]
    assert random.getstate() == state[1]


def test_a_refusal_names_the_module_the_line_and_the_way_out() -> None:
    class Inner(Body):
        def forward(self, x: Tensor) -> Any:
            return self.fc(x) if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), Inner())
    with pytest.raises(CaptureError) as caught:
        capture(model, regions=False)
    message = str(caught.value)
    assert "module '1' (Inner)" in message
    assert "test_capture.py:" in message
    assert "(return self.fc(x) if x.sum() > 0 else x)" in message
    assert "opaque=['1']" in message


def test_an_opaque_module_keeps_what_a_graph_would_lose(vectors: Tensor) -> None:
    for model_class, _ in REFUSED[:2]:
        model = nn.Sequential(model_class(), nn.Linear(4, 3))
        captured = capture(model, opaque=["0"])
        assert [node.target for node in captured.graph.find_nodes(op="call_module")] == ["0", "1"]
        assert_same(model, captured, vectors)


def test_an_opaque_module_keeps_its_hooks_and_the_layers_inside_are_reported(vectors: Tensor) -> None:
    model = nn.Sequential(PassesTheFlagOn(), nn.Linear(4, 3))
    model[0].register_forward_hook(double)
    _, report = biofx.transform(model, opaque=["0"])
    remark = next(remark for remark in report.remarks if remark.layer == "0.fc")
    assert "inside '0' (PassesTheFlagOn), which the graph calls as a whole" in remark.message
    assert_same(model, capture(model, opaque=["0"]), vectors)


@pytest.mark.parametrize("opaque", [["2"], "0", ["0.weight"]])
def test_a_path_that_the_model_does_not_have_cannot_be_opaque(mlp: nn.Module, opaque: Any) -> None:
    with pytest.raises(InputError, match="opaque"):
        capture(nn.Sequential(mlp), opaque=opaque)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def triple(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return (inputs[0] * 3,)


def test_hooks_of_the_model_itself_go_on_running(vectors: Tensor) -> None:
    model = SharesALayer()
    model.register_forward_hook(double)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_full_backward_hook(triple)
    assert_same(model, capture(model), vectors)


def test_hooks_of_a_layer_go_on_running(vectors: Tensor) -> None:
    model = SharesALayer()
    model.fc.register_forward_hook(double)
    assert_same(model, capture(model), vectors)


def test_hooks_of_a_container_are_refused(vectors: Tensor, mlp: nn.Module) -> None:
    model = nn.Sequential(mlp)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with pytest.raises(CaptureError, match=r"module '0' \(Sequential\) has forward pre hooks.*opaque="):
        capture(model, regions=False)


def test_a_forward_replaced_on_the_instance_is_refused(mlp: nn.Module) -> None:
    before = mlp.forward
    vars(mlp)["forward"] = lambda x: before(x) * 2
    with pytest.raises(CaptureError, match="forward replaced on the instance"):
        capture(mlp)


def test_a_value_taken_for_a_tensor_is_checked_at_every_call(vectors: Tensor) -> None:
    captured = capture(AsksForTheType())
    with pytest.raises(InputError, match=r"expected a tensor.*found list.*AsksForTheType.*isinstance"):
        captured([vectors])


@pytest.mark.parametrize("given", [{"mask": torch.ones(4)}, {"flip": True}, {"how": "none"}])
def test_an_optional_argument_that_steers_has_its_default_or_is_an_error(
    vectors: Tensor, given: dict[str, Any]
) -> None:
    model = TakesOptions()
    captured = capture(model)
    (name,) = given
    with pytest.raises(InputError, match=f"argument '{name}'"):
        captured(vectors, **given)
    expected = model(vectors, None, False, "sum", 5.0)
    assert torch.equal(captured(vectors, mask=None, flip=False, how="sum", scale=5.0), expected)
    assert torch.equal(captured(vectors, None, scale=torch.tensor(5.0)), expected)


def test_options_gathered_by_the_forward_count_as_not_given(vectors: Tensor) -> None:
    captured = capture(TakesAnything())
    with pytest.raises(TypeError, match="raw"):
        captured(vectors, raw=True)


def test_a_function_of_the_model_is_captured_with_its_own_tensors(vectors: Tensor) -> None:
    model = ChangesAPlainTensor()
    captured = capture(model)
    captured(vectors)
    assert model.steps.item() == 0
    assert captured.steps.item() == 1


def test_random_numbers_differ_from_call_to_call(vectors: Tensor) -> None:
    captured = capture(AddsNoise())
    assert not torch.equal(captured(vectors), captured(vectors))


def test_reading_a_weight_while_capturing_is_no_step_of_spectral_norm(vectors: Tensor) -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.ReLU())
    captured = capture(model)
    for (name, found), expected in zip(captured.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert_same(model, captured, vectors)


def test_a_graph_module_keeps_its_graph(mlp: nn.Module, vectors: Tensor) -> None:
    traced = torch.fx.symbolic_trace(mlp)
    captured = capture(traced)
    assert biofx.format_graph(captured) == biofx.format_graph(traced)
    assert captured.get_parameter("0.weight") is not mlp.get_parameter("0.weight")
    stacks = [node.meta.get("nn_module_stack") for node in captured.graph.find_nodes(op="call_module")]
    assert [list(stack) for stack in stacks if stack] == [["0"], ["1"], ["2"], ["3"], ["4"]]


def test_a_captured_graph_can_be_traced_again(vectors: Tensor) -> None:
    for model_class in (TakesOptions, AsksForTheType):
        captured = capture(model_class())
        again = torch.fx.symbolic_trace(captured)
        torch.manual_seed(0)
        expected = copy.deepcopy(captured)(vectors)
        torch.manual_seed(0)
        assert torch.equal(again(vectors), expected)


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


class DistributedDataParallel(Wrapped):
    """Goes by the name of torch's own, which would need a process group."""


def wrapped_models() -> list[tuple[Any, str]]:
    layer = nn.Linear(2, 2)
    return [
        (nn.Linear, "the class Linear; create an instance"),
        (torch.relu, "a builtin_function_or_method"),
        ("resnet18", "a str"),
        (None, "a NoneType"),
        (DistributedDataParallel(layer), r"DistributedDataParallel\(bio_model\)"),
        (nn.Sequential(DistributedDataParallel(layer)), r"module '0' is a DistributedDataParallel"),
        (nn.DataParallel(layer), r"DataParallel\(bio_model\)"),
        (torch.compile(layer, backend="eager"), r"torch.compile\(bio_model\)"),
        (torch.optim.swa_utils.AveragedModel(layer), "transform model.module"),
        (nn.LazyLinear(3), "'weight' still lazy; run the model once"),
    ]


@pytest.mark.parametrize(("model", "message"), wrapped_models())
def test_what_is_no_plain_module_is_refused(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        biofx.transform(model)


def test_a_scripted_model_is_refused_and_a_scripted_part_is_one_call(vectors: Tensor) -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        part = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(InputError, match="before it is scripted"):
        capture(part)
    model = nn.Sequential(part, nn.ReLU())
    assert torch.equal(capture(model)(vectors), model(vectors))


def test_a_model_that_cannot_be_copied_is_refused(mlp: nn.Module) -> None:
    vars(mlp)["lock"] = threading.Lock()
    with pytest.raises(InputError, match=r"copy\.deepcopy"):
        capture(mlp)


class Registered(nn.Module):
    """Neurons that a class-wide reset finds, as in snntorch."""

    everyone: ClassVar[list[Registered]] = []
    potential: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("potential", torch.zeros(1), persistent=False)
        self.everyone.append(self)

    def forward(self, x: Tensor) -> Any:
        for neuron in self.everyone:
            neuron.potential = torch.zeros_like(x)
        self.potential = self.potential * 0.5 + self.fc(x)
        return self.potential


@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
def test_a_forward_that_finds_the_model_itself_is_refused_and_the_model_put_back(
    vectors: Tensor, recorded: bool
) -> None:
    Registered.everyone.clear()
    model = Registered()
    before = model.potential
    options: Any = {"example_inputs": ((vectors,), {})} if recorded else {}
    with pytest.raises(CaptureError, match=r"changes Registered\.potential of the model itself"):
        capture(model, **options)
    assert model.potential is before


def test_an_annotation_that_is_a_text_does_not_stay_in_the_graph(mlp: nn.Module) -> None:
    # this file has them: with them, torch.jit.script looks for a type of that name and fails
    class Annotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x)  # type: ignore[no-any-return]

    assert [node.type for node in capture(Annotated()).graph.nodes if isinstance(node.type, str)] == []


@pytest.mark.parametrize("recorded", [False, True])
def test_weights_that_hooks_compute_at_every_call_do_not_stand_in_the_way(
    recorded: bool, vectors: Tensor
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    torch.nn.utils.spectral_norm(model[0])
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model[2])
    model(vectors)  # leaves computed weights behind
    captured = capture(model, example_inputs=((vectors,), {}) if recorded else None)
    again = biofx.passes.ScaleGradients()(captured).graph_module
    for training in (True, False):
        expected = model.train(training)(vectors)
        for made in (captured, again):
            torch.testing.assert_close(made.train(training)(vectors), expected)


def test_a_refusal_finds_the_line_whatever_self_is_called() -> None:
    class Unusual(nn.Module):
        def forward(this, x: Tensor) -> Any:  # noqa: N805
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ \(return x if"):
        capture(Unusual(), regions=False)
