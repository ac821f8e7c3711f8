"""What a recorded graph does after the model is converted or moved: it asks tensors for type and device."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx import capture, transform
from biofx.capture.symbolic_scalars import symbolic
from biofx.errors import InputError
from biofx.graph.graph_functions import limit_of
from biofx.graph.regions import region_paths


class Norm(nn.Module):
    """Computes in single precision, whatever comes in, as the norms of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Any:
        came_as = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(came_as)


class Block(nn.Module):
    """Attention with a mask, a rotation of positions and a gate, for ``(batch, length, 8)``."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = Norm(), Norm()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("steps", 1 / 100 ** (torch.arange(4.0) / 4))

    def angles(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(length).to(x).float()
        with torch.autocast("cpu", enabled=False):
            angles = places[:, None] * self.steps.float()
            both = torch.cat([angles, angles], -1)
        return both.cos().to(dtype=x.dtype), both.sin().to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        length = x.shape[1]
        least = torch.finfo(x.dtype).min
        causal = torch.full((length, length), least, dtype=x.dtype).to(x).triu(1)
        causal = causal + (1.0 - mask[:, None, :].to(x.dtype)) * least / 2
        h = self.norm(x)
        cos, sin = self.angles(h, length)
        query, key = (self.turned(layer(h), cos, sin) for layer in (self.query, self.key))
        scores = query @ key.transpose(1, 2) / 8**0.5 + causal
        weights = F.dropout(F.softmax(scores, -1, dtype=torch.float32), 0.2, self.training).to(query.dtype)
        x = x + self.out(weights @ self.value(h).to(weights.dtype))
        h = self.after(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def block_input(batch: int = 2, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -1] = 0
    return torch.randn(batch, length, 8, generator=generator), mask


def run(model: nn.Module, args: tuple[Tensor, ...]) -> Any:
    torch.manual_seed(3)
    model.zero_grad()
    found = model(*args)
    found.float().pow(2).mean().backward()
    return found, {name: p.grad for name, p in model.named_parameters()}


def assert_same_as(model: nn.Module, captured: nn.Module, args: Any, dtype: torch.dtype) -> None:
    args = [arg.to(dtype) if arg.is_floating_point() else arg for arg in args]
    for training in (True, False):
        pair = [copy.deepcopy(each).to(dtype).train(training) for each in (captured, model)]
        found, expected = (run(each, args) for each in pair)
        assert found[0].dtype == dtype or torch.is_autocast_enabled("cpu")
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_is_converted_after_it_is_captured(recorded: bool, dtype: torch.dtype) -> None:
    model = Block()
    captured = capture(model, example_inputs=(block_input(), {}) if recorded else None)
    assert not captured.graph_breaks
    assert_same_as(model, captured, block_input(3, 4), dtype)
    assert_same_as(model, pickle.loads(pickle.dumps(captured)), block_input(3, 4), dtype)


def test_a_recorded_model_is_converted_from_half_precision_and_from_double() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = Block().to(dtype)
        x, mask = block_input()
        captured = capture(model, example_inputs=((x.to(dtype), mask), {}))
        assert_same_as(model, captured, block_input(3, 4), torch.float32)


def test_a_recorded_model_runs_under_autocast() -> None:
    model = Block()
    captured = capture(model, example_inputs=(block_input(), {}))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_as(model, captured, block_input(3, 4), torch.float32)


def test_a_rewritten_model_is_converted() -> None:
    bio_model, _ = transform(
        Block(), {"fuzzy_learning_rate_factor_nu": 0.2}, example_inputs=(block_input(), {})
    )
    x, mask = block_input()
    assert bio_model.bfloat16()(x.bfloat16(), mask).dtype == torch.bfloat16


class Asks(nn.Module):
    """Holds a layer, so that there is something to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


class OnDeviceOfAWeight(Asks):
    def forward(self, x: Tensor) -> Any:
        device = next(self.parameters()).device
        ones = torch.ones(8, device=device, dtype=self.layer.weight.dtype)
        return self.layer(x) * torch.arange(8).to(device) + ones, device


class OnDeviceByNumber(Asks):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x), x.get_device()


@pytest.mark.parametrize("model_class", [OnDeviceOfAWeight, OnDeviceByNumber])
def test_devices_are_asked_for_anew(model_class: type[Asks]) -> None:
    model = model_class()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x,), {}))
    assert not captured.graph_breaks
    for device in ("cpu", "meta"):
        (found, place), (expected, expected_place) = (
            each.to(device)(x.to(device)) for each in (captured, model)
        )
        assert found.device == expected.device
        assert place == expected_place


class IsSpecialInHalf(Asks):
    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        if h.dtype == torch.float16:
            h = h.clamp(-1, 1)
        return h * 2


class LooksTheTypeUp(Asks):
    def forward(self, x: Tensor) -> Any:
        scale = {torch.float16: 2.0, torch.bfloat16: 3.0}.get(x.dtype, 1.0)
        return self.layer(x) * scale


class ReadsTheName(Asks):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * (2 if str(x.dtype) == "torch.float16" else 1)


class ReadsTheOldName(Asks):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x).type(x.type())


class AsksForWholeNumbers(Asks):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x if x.is_floating_point() else x.to(self.layer.weight.dtype))


@pytest.mark.parametrize("model_class", [IsSpecialInHalf, LooksTheTypeUp, ReadsTheName, ReadsTheOldName])
def test_another_type_that_would_go_another_way_is_an_error(model_class: type[Asks]) -> None:
    model = model_class()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x,), {}))
    assert not captured.graph_breaks
    torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0)
    with pytest.raises(InputError, match="recorded with"):
        captured.half()(x.half())


def test_a_question_with_the_same_answer_is_no_error() -> None:
    model = IsSpecialInHalf()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x,), {}))
    assert_same_as(model, captured, (x,), torch.bfloat16)


def test_an_input_of_another_kind_is_an_error() -> None:
    model = AsksForWholeNumbers()
    captured = capture(model, example_inputs=((torch.randn(2, 8),), {}))
    with pytest.raises(InputError, match=r"is_floating_point.*recorded with True, found False"):
        captured(torch.ones(2, 8, dtype=torch.long))


class CastsBackForHalf(nn.Module):
    """A small module that does one thing in half precision and under autocast, and another otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Any:
        x = x.to(torch.float32)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        h = self.up(x * self.weight)
        if h.dtype != self.down.weight.dtype:
            h = h.to(self.down.weight.dtype)
        return self.down(h)


class HoldsSmallOnes(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList(CastsBackForHalf() for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        for small in self.small:
            x = x + small(x)
        return x


def test_small_modules_that_decide_by_type_stay_in_python_for_half_precision() -> None:
    model = HoldsSmallOnes()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x,), {}))
    assert sorted(captured.graph_breaks) == ["small.0", "small.1", "small.2"]
    assert "small.0.up" in region_paths(captured)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert_same_as(model, captured, (x,), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_as(model, captured, (x,), torch.float32)


class CombinesTypes(Asks):
    def forward(self, x: Tensor) -> Any:
        wide = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(x.dtype).eps * 2 + torch.finfo(x.dtype).tiny
        bits = 8 * x.element_size() + 8 * x.itemsize
        turned = self.layer(x).to(wide.to_complex()) * 1j
        return (turned.imag + eps).type(x.dtype) * bits


def test_what_is_computed_from_types_follows_them() -> None:
    model = CombinesTypes()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x,), {}))
    assert not captured.graph_breaks
    assert_same_as(model, captured, (x,), torch.float64)
    assert_same_as(model, captured, (x,), torch.float16)


class CastsToItsInput(Asks):
    def forward(self, x: Tensor, like: Tensor) -> Any:
        with torch.autocast("cpu", like.dtype):
            return self.layer(x)


def test_autocast_to_the_type_of_a_tensor() -> None:
    model = CastsToItsInput()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x, torch.ones(1).bfloat16()), {}))
    assert not captured.graph_breaks
    for dtype in (torch.bfloat16, torch.float16):
        like = torch.ones(1, dtype=dtype)
        assert captured(x, like).dtype == dtype
        torch.testing.assert_close(captured(x, like), model(x, like), rtol=0, atol=0)


class AsksForAutocast(Asks):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x).float() if torch.is_autocast_enabled("cpu") else self.layer(x)


@pytest.mark.parametrize("recorded", [True, False])
def test_whether_autocast_is_on_stays_a_question(recorded: bool) -> None:
    model = AsksForAutocast()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x,), {}) if recorded else None)
    assert "autocast" in captured.graph_breaks[""]
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0)


class HandsItsTypeOn(Asks):
    """The inner module decides by a value, and so what it calls has a graph that is handed a type."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DecidesByValue()

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.layer(x.to(torch.float32).to(x.dtype)), x.dtype, x.device)


class DecidesByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.casts = Casts()

    def forward(self, x: Tensor, dtype: torch.dtype, device: torch.device) -> Any:
        y = self.casts(x, dtype, device) if x.sum() < 1e9 else x
        return y * 2 if dtype is torch.float64 else y


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor, dtype: torch.dtype, device: torch.device) -> Any:
        return (x.float() * 2).to(dtype) * self.scale + torch.ones(8, dtype=dtype, device=device)


def test_types_and_devices_go_through_modules_in_python() -> None:
    model = HandsItsTypeOn()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x,), {}))
    assert list(captured.graph_breaks) == ["inner"]
    assert region_paths(captured) == ("inner.casts",)
    assert_same_as(model, captured, (x,), torch.float64)
    region = captured.get_submodule("inner.casts").to("meta")
    assert region(x.to("meta"), torch.float64, torch.device("meta")).is_meta


class ChecksTheClass(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Checks()

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.layer(x))


class Checks(nn.Module):
    def forward(self, x: Tensor) -> Any:
        if type(x.dtype) is not torch.dtype:
            raise TypeError("expected a type")
        return x * 2


def test_a_module_that_cannot_live_with_stand_ins_stays_in_python() -> None:
    model = ChecksTheClass()
    x = torch.randn(2, 8)
    captured = capture(model, example_inputs=((x,), {}))
    assert list(captured.graph_breaks) == ["inner"]
    assert "expected a type" in captured.graph_breaks["inner"]
    assert_same_as(model, captured, (x,), torch.float64)


class Frame:
    is_current = False


def test_a_type_that_is_no_longer_recorded_works_as_its_type() -> None:
    kind: Any = symbolic(torch.float64, Frame(), lambda: "n")  # type: ignore[arg-type, return-value]
    assert isinstance(kind, torch.dtype)
    assert kind == torch.float64
    assert kind != torch.float32
    assert {torch.float64: 1}[kind] == 1
    assert f"{kind}" == str(kind) == repr(kind) == "torch.float64"
    assert kind.is_floating_point
    assert kind.itemsize == 8
    assert kind.to_complex() is torch.complex128
    assert copy.copy(kind) is copy.deepcopy([kind])[0] is torch.float64
    assert kind.__reduce__() == (getattr, (torch, "float64"))
    assert torch.ones(2).to(kind).dtype is torch.float64
    assert torch.zeros(2, dtype=kind).dtype is torch.float64
    assert F.softmax(torch.ones(2), 0, dtype=kind).dtype is torch.float64
    assert vars(type(kind))["limit"](kind, "max") == torch.finfo(torch.float64).max


def test_what_reads_no_stand_in_refuses_it() -> None:
    kind: Any = symbolic(torch.float64, Frame(), lambda: "n")  # type: ignore[arg-type, return-value]
    for function in (torch.finfo, torch.iinfo):
        with pytest.raises(TypeError, match="input type"):
            function(kind)


def test_limits_of_types() -> None:
    assert limit_of(torch.bfloat16, "min") == torch.finfo(torch.bfloat16).min
    assert limit_of(torch.int16, "max") == 32767
