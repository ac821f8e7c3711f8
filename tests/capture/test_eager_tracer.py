from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx import capture
from biofx.capture.eager_tracer import EagerTracer
from biofx.errors import InputError
from biofx.graph.regions import region_paths
from biofx.plasticity.model_states import bio_modules


def run(model: nn.Module, args: Any, kwargs: Any) -> Any:
    torch.manual_seed(7)
    model.zero_grad()
    outputs = [model(*args, **kwargs) for _ in range(2)]
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    sum((leaf * leaf).sum() for leaf in leaves if leaf.requires_grad).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {type(outputs[0]).__name__: leaves}, gradients, dict(model.named_buffers())


def assert_same(model: nn.Module, captured: nn.Module, *given: Any) -> None:
    """Equal to the bit in both modes, for each ``(args, kwargs)`` given."""
    for training in (True, False):
        for args, kwargs in given:
            reference, other = copy.deepcopy(model).train(training), copy.deepcopy(captured).train(training)
            torch.testing.assert_close(run(other, args, kwargs), run(reference, args, kwargs), rtol=0, atol=0)


@dataclasses.dataclass
class Output(OrderedDict[str, Any]):
    """As transformers have them: a dataclass that is a dict too."""

    last: Tensor
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


torch.utils._pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(**dict(zip(keys, values, strict=True))),
)


class Attention(nn.Module):
    """Everything that symbolic tracing stumbles over, for ``(batch, length, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, position: Any = (), **options: Any) -> Tensor:
        batch, length, width = x.shape
        if width != 8:
            raise ValueError("expected a width of 8")
        assert len(position) == 2
        shape = (*x.shape[:-1], -1, 4)
        query, key, value = (
            layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        cos, sin = position
        query = query * cos[: x.size(1)] + query.flip(-1) * sin[:length]
        rate = 0.0 if not self.training else 0.25
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        mixed = mixed.transpose(1, 2).reshape(batch, length, length * 8 // length)
        return self.out(mixed)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Attention() for _ in range(2)])
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)

    def forward(
        self,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        all_hidden: bool = False,
        **options: Any,
    ) -> Output:
        if ids is None:
            raise ValueError("expected ids")
        x = self.embed(ids)
        steps = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.angles
        position = (steps.cos(), steps.sin())
        if mask is not None:
            mask = mask[:, None, None, :] > 0
        for layer in self.layers:
            x = x + self.drop(layer(x, mask=mask, position=position, **options))
        return Output(self.head(x), hidden=x if all_hidden else None)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def test_a_transformer_is_one_graph_and_works_at_other_sizes() -> None:
    model = Transformer()
    captured = capture(model, example_inputs=((), {"ids": ids(2, 5)}))
    assert region_paths(captured) == ()
    assert captured.graph_breaks == {}
    assert isinstance(captured, Transformer)
    assert_same(model, captured, *[((), {"ids": ids(*size)}) for size in ((2, 5), (3, 5), (1, 9), (4, 1))])
    assert_same(model, captured, ((ids(3, 4),), {}))
    with pytest.raises(InputError, match="argument 'mask'"):
        captured(ids(2, 5), torch.ones(2, 5))


def test_arguments_that_were_given_are_inputs_and_the_others_stay_at_their_defaults() -> None:
    model = Transformer()
    example = (ids(2, 5),), {"mask": torch.ones(2, 5), "all_hidden": True}
    captured = capture(model, example_inputs=example)
    mask = torch.ones(3, 4)
    mask[1, 2:] = 0
    assert_same(model, captured, ((ids(3, 4), mask), {"all_hidden": True}))
    with pytest.raises(InputError, match="argument 'all_hidden'"):
        captured(ids(2, 5), torch.ones(2, 5))
    with pytest.raises(InputError, match="expected a tensor"):
        captured(ids(2, 5), all_hidden=True)


def test_a_transformer_is_rewritten_with_signs_that_follow_the_graph() -> None:
    config = biofx.BioConfig(apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.2)
    example = (), {"ids": ids(2, 5)}
    bio_model, report = biofx.transform(Transformer(), config, example_inputs=example)
    assert not any("not known" in remark.message for remark in report.remarks)
    done = {remark.layer for remark in report.remarks if remark.kind == "applied"}
    assert {"layers.0.query", "layers.1.out", "head"} <= done
    assert bio_model(ids=ids(3, 7)).last.shape == (3, 7, 3)


class Routes(nn.Module):
    """A mixture of experts: the values decide who is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            where = (chosen == number).nonzero().flatten()
            if where.numel() == 0:
                continue
            y[where] = expert(x[where])
        return y


class Halts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        while x.norm().item() > 1:
            x = 0.5 * torch.tanh(self.step(x))
        return x


class Wraps(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), inner, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.relu(self.inner(self.first(x))))


def vectors(batch: int) -> Any:
    return (torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch)),), {}


def test_a_value_that_decides_leaves_the_module_in_python_and_no_more() -> None:
    model = Wraps(Halts())
    captured = capture(model, example_inputs=vectors(4))
    assert list(captured.graph_breaks) == ["inner"]
    assert "x.norm().item() > 1" in captured.graph_breaks["inner"]
    assert region_paths(captured) == ("inner.step",)
    assert [node.target for node in captured.graph.find_nodes(op="call_module")] == ["first", "inner", "last"]
    assert_same(model, captured, *(vectors(batch) for batch in (4, 1, 9)))


def test_a_value_that_decides_is_refused_where_regions_may_not_be() -> None:
    with pytest.raises(biofx.CaptureError, match=r"module 'inner' \(Halts\).*item\(\) > 1"):
        capture(Wraps(Halts()), example_inputs=vectors(4), regions=False)


def test_a_mixture_of_experts_is_right_on_other_inputs() -> None:
    for model in (Routes(), Wraps(Routes())):
        captured = capture(model, example_inputs=vectors(6))
        assert_same(model, captured, *(vectors(batch) for batch in (6, 1, 2, 17)))


class RoutesTokens(nn.Module):
    """Mixtures of experts one after the other, with what a cache keeps beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.mixtures = nn.ModuleList(Routes() for _ in range(2))

    def forward(self, x: Tensor, cache: Any = None) -> Any:
        cache = Cache() if cache is None else cache
        x = self.stem(x)
        for mixture in self.mixtures:
            cache.seen.append(x)
            x = x + mixture(x)
        if x.sum() > 1e9:
            raise ValueError("expected something smaller")
        return self.head(x), cache


class Cache:
    """What torch knows nothing of."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


@pytest.mark.parametrize("recorded", [False, True])
def test_nearly_all_of_a_mixture_of_experts_is_visible_and_rewritten(recorded: bool) -> None:
    model = RoutesTokens()
    config = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3)
    example = vectors(6) if recorded else None
    bio_model, report = biofx.transform(model, config, example_inputs=example)
    assert "" in bio_model.graph_breaks
    assert report.coverage is not None
    assert report.coverage.visible >= 0.9 * report.coverage.total
    done = {remark.layer for remark in report.remarks if remark.kind == "applied"}
    assert done == {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for batch in (6, 17):
        (x,), _ = vectors(batch)
        outputs = []
        for each in (model, bio_model):
            each.zero_grad()
            output, cache = each(x)
            assert isinstance(cache, Cache)
            output.pow(2).sum().backward()
            outputs.append((output, cache.seen))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
        for path in done:
            layer: Any = bio_model.get_submodule(path)
            gradient = model.get_parameter(f"{path}.weight").grad
            if gradient is not None:
                gradient = gradient * layer.bio_mod.fuzzy_learning_rate_parameters
            torch.testing.assert_close(layer.weight.grad, gradient)


class DecidesByItsBatch(Wraps):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.last(y if x.shape[0] > 5 else y * 2)


class CountsItsBatch(Wraps):
    def forward(self, x: Tensor) -> Any:
        return self.last(torch.stack([self.first(x[row]) for row in range(x.shape[0])]))


class NormalisesByItsBatch(Wraps):
    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x) / int(x.shape[0]))


class BranchesOnTheMode(Wraps):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return (y, self.last(y)) if self.training else self.last(y)


class DropsPaths(Wraps):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.training:
            keep = torch.empty(x.shape[0], 1).bernoulli_(0.5)
            y = y / 0.5 * keep
        return self.last(x + y)


class WithoutGradient(Wraps):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self.first(x)
        return self.last(y)


class UnderAutocast(Wraps):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
        return self.last(y.float())


class Counts(Wraps):
    calls: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        return self.last(self.first(x) * self.calls.clone())


class Rebinds(Counts):
    def forward(self, x: Tensor) -> Any:
        self.calls = self.calls * 0.9 + x.detach().mean()
        return self.last(self.first(x) * self.calls)


class Remembers(Wraps):
    def forward(self, x: Tensor) -> Any:
        self.seen = self.first(x)
        return self.last(self.seen)


class UsesPythonsRandom(Wraps):
    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x)) * (1 if random.random() < 2 else 0)


class SharesLayers(Wraps):
    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(self.first(x)) + self.inner(x) + self.inner(self.first(x)))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class ReversesGradients(Wraps):
    def forward(self, x: Tensor) -> Any:
        return self.last(Reverse.apply(self.first(x)))  # type: ignore[no-untyped-call]


class Checkpoints(Wraps):
    def forward(self, x: Tensor) -> Any:
        return self.last(torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False))


class ChangesInPlace(Wraps):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        y += 1
        y[:, 0] = 2
        z = y.clone()
        z.mul_(2)
        return self.last(F.relu(z, inplace=True)), y


class TakesTheSameTwice(Wraps):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.mix = nn.Bilinear(8, 8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.inner(self.mix(x, x)))


IDIOMS: list[tuple[type[Wraps], list[str]]] = [
    (Wraps, []),
    (DecidesByItsBatch, [""]),
    (CountsItsBatch, [""]),
    (NormalisesByItsBatch, [""]),
    (BranchesOnTheMode, []),
    (DropsPaths, []),
    (WithoutGradient, []),
    (UnderAutocast, []),
    (Counts, []),
    (Rebinds, []),
    (Remembers, [""]),
    (UsesPythonsRandom, [""]),
    (SharesLayers, []),
    (ReversesGradients, []),
    (Checkpoints, []),
    (ChangesInPlace, []),
    (TakesTheSameTwice, []),
]


@pytest.mark.parametrize(("model_class", "kept"), IDIOMS)
def test_a_recorded_model_does_what_the_model_does(
    model_class: type[Wraps], kept: list[str], unchanged: Callable[[nn.Module], Any]
) -> None:
    model = model_class(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)))
    with unchanged(model):
        captured = capture(model, example_inputs=vectors(4))
    assert list(captured.graph_breaks) == kept
    assert_same(model, captured, *(vectors(batch) for batch in (4, 2, 7)))


def test_hooks_run_around_what_is_recorded() -> None:
    model = Wraps(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    model.register_forward_hook(lambda module, args, output: output * 2)
    model.inner.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    captured = capture(model, example_inputs=vectors(4))
    assert "has forward pre hooks" in captured.graph_breaks["inner"]
    assert_same(model, captured, vectors(4), vectors(3))


def test_two_arguments_that_were_one_tensor_may_differ_later() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.fc(x) - y

    model, x, y = Pairs(), torch.randn(3, 8), torch.randn(3, 8)
    captured = capture(model, example_inputs=((x, x), {}))
    torch.testing.assert_close(captured(x, y), model(x, y), rtol=0, atol=0)


def test_a_part_switched_to_evaluation_is_followed() -> None:
    model = Wraps(DropsByTheFlag())
    captured = capture(model, example_inputs=vectors(4))
    assert captured.graph_breaks == {}
    for each in (model, captured):
        each.train()
        each.inner.eval()
    args, kwargs = vectors(4)
    assert torch.equal(captured(*args, **kwargs), model(*args, **kwargs))


class DropsByTheFlag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5 if self.training else 0.0, training=self.training)


def test_an_argument_by_keyword_alone_may_follow_optional_ones() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Any = None, *, y: Tensor, scale: float = 2.0) -> Any:
            return self.fc(y) * scale

    model = Keywords()
    (x,), _ = vectors(3)
    captured = capture(model, example_inputs=((), {"y": x}))
    assert captured.graph_breaks == {}
    assert_same(model, captured, ((), {"y": x}))
    with pytest.raises(InputError, match="expected a tensor"):
        captured()


def test_a_model_that_fails_on_its_example_is_told_so(mlp: nn.Module) -> None:
    with pytest.raises(InputError, match=r"the model fails on them: RuntimeError: .*mat1 and mat2"):
        capture(mlp, example_inputs=((torch.ones(2, 3),), {}))


def test_a_model_on_the_meta_device_is_recorded_without_values() -> None:
    with torch.device("meta"):
        model = Transformer()
    bio_model, report = biofx.transform(
        model, {"apply_dales_principle": False}, example_inputs=((), {"ids": ids(2, 5).to("meta")})
    )
    assert all(parameter.is_meta for parameter in bio_model.parameters())
    assert report.coverage is not None
    assert report.coverage.visible == report.coverage.total


def test_what_the_example_does_not_lead_to_is_captured_all_the_same() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rarely = nn.Linear(8, 8), Wraps(nn.Identity())

        def forward(self, x: Tensor) -> Any:
            return self.often(x) if x.sum() < 1e6 else self.rarely(x)

    model = Asks()
    captured = capture(model, example_inputs=vectors(3))
    assert region_paths(captured) == ("often", "rarely")
    assert_same(model, captured, vectors(3), ((torch.full((3, 8), 1e6),), {}))


class ClampsItsWeight(Wraps):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.first.weight.clamp_(-0.01, 0.01)
        self.last.weight.data.mul_(0.5)
        return self.last(self.first(x))


@pytest.mark.parametrize("share", [False, True])
def test_a_forward_that_writes_into_its_parameters_does_so_in_use_alone(
    share: bool, unchanged: Callable[[nn.Module], Any]
) -> None:
    model = ClampsItsWeight(nn.Identity())
    with unchanged(model):
        captured = capture(model, example_inputs=vectors(4), share_parameters=share)
    assert_same(model, captured, vectors(4))


class Step(nn.Module):
    """One of many; only some of them ask for a value, after they have done something."""

    calls: Tensor

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        x = x.clone()
        x *= self.weight
        self.calls += 1
        with torch.no_grad():
            noise = self.before(x) + torch.rand(x.shape)
            if self.asks and noise.sum() > 1e9:
                noise = noise * 0
        return self.after(torch.tanh(x + noise)) / self.calls.clone()


class Steps(nn.Module):
    def __init__(self, asking: set[int]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step(number in asking) for number in range(6))

    def forward(self, x: Tensor) -> Any:
        for step in self.steps:
            x = x + step(x)
        return x


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Takes down the mode of each run that is recorded."""
    modes: list[bool] = []
    run = EagerTracer.run

    def counted(self: EagerTracer, args: Any, kwargs: Any) -> None:
        modes.append(self._root.training)
        run(self, args, kwargs)

    monkeypatch.setattr(EagerTracer, "run", counted)
    return modes


def test_only_the_modules_that_need_it_stay_in_python_and_one_run_finds_them(runs: list[bool]) -> None:
    model = Steps({1, 4, 5})
    captured = capture(model, example_inputs=vectors(4))
    assert list(captured.graph_breaks) == ["steps.1", "steps.4", "steps.5"]
    in_python = [f"steps.{n}" for n in (1, 4, 5)]  # with a graph around that hands them their parameters
    parts = [f"{path}.{part}" for path in in_python for part in ("before", "after")]
    assert set(region_paths(captured)) == {*in_python, *parts}
    assert runs == [True, True, False]
    assert_same(model, captured, *(vectors(batch) for batch in (4, 1, 9)))


class Peeks(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x * 2 if x.sum() > 1e9 else x * 3


class HasPeeks(Wraps):
    def __init__(self) -> None:
        super().__init__(Peeks())
        self.other = Peeks()

    def forward(self, x: Tensor) -> Any:
        size = x.shape[0]
        y = self.inner(self.first(x.expand(size, 8)))
        return self.last(self.other(y.reshape(size, 8)))


def test_nothing_is_recorded_anew_for_a_module_that_calls_nothing(runs: list[bool]) -> None:
    model = HasPeeks()
    captured = capture(model, example_inputs=vectors(4))
    assert list(captured.graph_breaks) == ["inner", "other"]
    assert runs == [True, False]
    assert_same(model, captured, *(vectors(batch) for batch in (4, 1, 9)))


class PeeksWithinAContext(Wraps):
    """What is asked first inside the inner module, under its contexts, is asked again by the outer one."""

    def __init__(self) -> None:
        super().__init__(AsksAndPeeks())

    def forward(self, x: Tensor) -> Any:
        size = x.shape[0]
        y = self.inner(self.first(x), size)
        if size > 100:
            return y
        return self.last(y[: size // 2]).to(x.dtype)


class AsksAndPeeks(nn.Module):
    def forward(self, x: Tensor, size: int) -> Any:
        if size > 100:
            return x
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = x[: size // 2].to(x.dtype)
            if half.sum() > 1e9:
                return half
        return x * 2


def test_what_was_written_of_a_module_that_is_given_up_is_taken_back_whole() -> None:
    model = PeeksWithinAContext()
    captured = capture(model, example_inputs=vectors(4))
    assert list(captured.graph_breaks) == ["inner"]
    assert_same(model, captured, *(vectors(batch) for batch in (4, 2, 9)))
    with pytest.raises(InputError, match="recorded with False"):
        captured(torch.zeros(101, 8))


class CatchesWhatItsChildRaises(Wraps):
    def __init__(self) -> None:
        super().__init__(PeeksAndRaises())

    def forward(self, x: Tensor) -> Any:
        try:
            x = self.inner(x)
        except ValueError:
            x = self.first(x)
        return self.last(x)


class PeeksAndRaises(nn.Module):
    def forward(self, x: Tensor) -> Any:
        if x.sum() < 1e9:
            raise ValueError("too small")
        return x


def test_an_exception_of_a_module_that_was_given_up_may_not_come_another_time() -> None:
    model = CatchesWhatItsChildRaises()
    captured = capture(model, example_inputs=vectors(4))
    assert "" in captured.graph_breaks
    large = torch.full((2, 8), 1e9)
    torch.testing.assert_close(captured(large), model(large), rtol=0, atol=0)
    assert_same(model, captured, vectors(4), vectors(3))


class DiffersByMode(nn.Module):
    def __init__(self, differs: bool) -> None:
        super().__init__()
        self.differs = differs
        self.layer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        # by the mode of a part: whose it is that decides is not seen
        x = torch.tanh(x) if self.differs and self.layer.training else torch.relu(x)
        return x * self.scale


class Differ(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(DiffersByMode(number == 2) for number in range(5)))

    def forward(self, x: Tensor) -> Any:
        return self.parts(x)


def test_modules_kept_for_the_class_of_another_get_a_second_chance() -> None:
    model = Differ()
    captured = capture(model, example_inputs=vectors(4))
    assert list(captured.graph_breaks) == ["parts.2"]
    assert_same(model, captured, *(vectors(batch) for batch in (4, 1, 9)))


def test_a_model_that_wants_labels_in_training_is_captured_with_inputs_for_evaluation() -> None:
    class Wants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            scores = self.fc(x)
            if self.training:
                if labels is None:
                    raise ValueError("give labels")
                return nn.functional.cross_entropy(scores, labels)
            return scores  # type: ignore[no-any-return]

    model, x, labels = Wants(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    bio_model = biofx.capture(model, example_inputs=((x,), {}))
    assert torch.equal(bio_model.eval()(x), model.eval()(x))
    assert torch.equal(bio_model.train()(x, labels), model.train()(x, labels))
    with pytest.raises(ValueError, match="give labels"):
        bio_model(x)


class _Cell(nn.Module):
    """A step that may be told how much time has passed; it holds its parameters in a dict, too."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self._params = {"w": self.w}

    def forward(self, x: Tensor, state: Tensor, elapsed: float = 1.0) -> Any:
        return torch.tanh(x + state @ self._params["w"] * elapsed)


class _CallsForward(nn.Module):
    """Loops over time, and calls the ``forward`` of its step and not the step."""

    def __init__(self, elapsed: float | None) -> None:
        super().__init__()
        self.cell, self._elapsed = _Cell(), () if elapsed is None else (elapsed,)

    def forward(self, x: Tensor) -> Any:
        state = x.new_zeros(x.shape[1], 4)
        for step in x:
            state = self.cell.forward(step, state, *self._elapsed)
        return state


@pytest.mark.parametrize("elapsed", [None, 0.5])
def test_a_forward_that_python_calls_directly_is_traced_as_a_call(elapsed: float | None) -> None:
    torch.manual_seed(0)
    model, x = _CallsForward(elapsed), torch.randn(5, 2, 4)
    captured = biofx.capture(model, example_inputs=((x,), {}))
    assert list(captured.graph_breaks) == [""]
    assert captured.region_paths == ("cell",)
    for length in (5, 3, 8):
        given = torch.randn(length, 2, 4)
        assert torch.equal(captured(given), model(given))
    assert "forward" not in vars(model.cell)
    bio_model, _ = biofx.transform(
        model, biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3), example_inputs=((x,), {})
    )
    factors: Any = bio_modules(bio_model)["cell.w"].fuzzy_learning_rate_parameters
    gradients = [torch.autograd.grad(m(x).sum(), m.get_parameter("cell.w"))[0] for m in (model, bio_model)]
    torch.testing.assert_close(gradients[1], gradients[0] * factors)


class _Slice(nn.Module):
    """A part of a weight, as a module that lives as long as a call of the forward that makes it."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values, self.order = values, values.dim()

    def forward(self, x: Tensor) -> Any:
        return torch.einsum("bim,iom->bom", x, self.values) if self.order == 3 else x


class _Spectral(nn.Module):
    """A convolution in the frequency domain, as neural operators have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Any:
        modes = torch.fft.rfft(x if x.dtype == torch.float32 else x.float())
        part = _Slice(self.weight[:, :, :3])
        return torch.fft.irfft(part(modes[..., :3]), n=round(x.shape[-1] * 0.5))


def test_a_module_that_a_forward_makes_is_traced_into() -> None:
    torch.manual_seed(0)
    model, x = _Spectral(), torch.randn(2, 3, 8)
    captured = biofx.capture(model, example_inputs=((x,), {}))
    assert not captured.graph_breaks
    assert_same(model, captured, *(((torch.randn(n, 3, length),), {}) for n, length in ((2, 8), (5, 13))))
    _, report = biofx.transform(
        model, biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3), example_inputs=((x,), {})
    )
    assert report.coverage is not None
    assert report.coverage.rewritten == 3 * 4 * 4


@pytest.mark.parametrize("how", [round, math.floor, math.ceil, math.trunc])
def test_sizes_that_are_rounded_are_followed(how: Callable[[float], int]) -> None:
    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x[: how(x.shape[0] * 0.4)]

    captured = biofx.capture(Rounds(), example_inputs=((torch.randn(5, 2),), {}))
    assert not captured.graph_breaks
    for length in (5, 6, 9, 14):
        assert len(captured(torch.randn(length, 2))) == how(length * 0.4)


class _BySizeInWords(nn.Module):
    """Reads a size out of a text, where nothing follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * float(f"{x.shape[0]}")


def test_the_part_that_does_something_else_at_another_size_is_kept_alone() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.odd, self.last = nn.Linear(4, 4), _BySizeInWords(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            for _ in range(int(x.shape[0])):
                x = self.last(self.odd(torch.relu(self.first(x))))
            return x

    model = Loops()
    captured = biofx.capture(model, example_inputs=((torch.randn(3, 4),), {}))
    assert set(captured.graph_breaks) == {"", "odd"}
    assert "does not do what the model does" in captured.graph_breaks["odd"]
    assert set(captured.region_paths) == {"first", "odd.fc", "last"}
    for size in (3, 2, 6):
        given = torch.randn(size, 4)
        assert torch.equal(captured(given), model(given))
