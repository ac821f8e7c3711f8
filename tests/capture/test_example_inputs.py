"""Ways to give example inputs, and the calls that are meant."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.capture.example_inputs import as_call

X, Y = torch.ones(3, 4), torch.zeros(3, 4)


class One(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Any = None) -> Any:
        return x


class Two(nn.Module):
    def forward(self, x: Tensor, settings: Any) -> Any:
        return x


class Batch(nn.Module):
    def forward(self, batch: Any) -> Any:
        return batch


class Named(nn.Module):
    def forward(self, **named: Tensor) -> Any:
        return named


@pytest.mark.parametrize(
    ("kind", "given", "args", "kwargs"),
    [
        (One, X, (X,), {}),
        (One, (X,), (X,), {}),
        (One, [X], (X,), {}),
        (One, {"x": X}, (), {"x": X}),
        (One, ((X,), {}), (X,), {}),
        (One, ([X], {}), (X,), {}),
        (One, ((), {"x": X}), (), {"x": X}),
        (One, (X, {}), (X,), {}),
        (Masked, (X, Y), (X, Y), {}),
        (Masked, {"x": X, "mask": Y}, (), {"x": X, "mask": Y}),
        (Masked, ((X,), {"mask": Y}), (X,), {"mask": Y}),
        (Masked, ((X, {"mask": Y}), {}), (X, {"mask": Y}), {}),
        (Two, (X, {"gain": Y}), (X, {"gain": Y}), {}),
        (Batch, {"image": X}, ({"image": X},), {}),
        (Batch, ({"image": X},), ({"image": X},), {}),
        (Batch, ({"image": X}, {}), ({"image": X},), {}),
        (Batch, (X, Y), ((X, Y),), {}),
        (Batch, ((X, Y), {}), ((X, Y),), {}),
        (Named, {"x": X}, (), {"x": X}),
        (One, ((X,), None), (X,), {}),
        (One, ([X], None), (X,), {}),
        (Masked, (((X, Y), None), {}), ((X, Y), None), {}),
        (Masked, (X, None), (X, None), {}),
        (Batch, (({"image": X, "boxes": [X, Y]},), None), ({"image": X, "boxes": [X, Y]},), {}),
    ],
)
def test_what_is_plainly_meant_is_called(
    kind: type[nn.Module], given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    found = as_call(kind(), given)
    torch.testing.assert_close(found, (args, kwargs), rtol=0, atol=0)


class Nested(nn.Module):
    """Takes a tensor, a pair, a mapping and a list of them, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Any, pair: Any, *, named: Any = None, more: Any = ()) -> Any:
        total = x + pair[0] - pair[1]["scale"]
        for each in more:
            total = total + each
        return self.linear(total if named is None else total * named["gain"])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, (Y, {"scale": X})), {}),
        ((), {"x": X, "pair": [Y, {"scale": X}]}),
        ((X, [Y, {"scale": X}]), {"named": {"gain": Y}}),
        ((X,), {"pair": (Y, {"scale": X}), "more": [X, Y]}),
        ((), {"x": X, "pair": (X, OrderedDict(scale=Y)), "named": {"gain": X}, "more": (Y,)}),
    ],
)
def test_what_torch_export_takes_is_taken(args: tuple[Any, ...], kwargs: Any) -> None:
    model = Nested()
    program = torch.export.export(model, args, kwargs)
    expected = model(*args, **(kwargs or {}))
    for given in ((args, kwargs), program.example_inputs):
        bio, _ = biofx.transform(model, {"fuzzy_lr_distribution": "baseline"}, example_inputs=given)
        assert torch.equal(bio(*args, **(kwargs or {})), expected)
        assert not bio.graph_breaks


@pytest.mark.parametrize("given", ["x", 3, True, (), [], {}, nn.Linear(2, 2), Tensor, {"x": X, "y": Y}])
def test_what_is_no_call_is_refused_with_what_to_write(given: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 2)) if not isinstance(given, dict) or not given else Masked()
    with pytest.raises(
        biofx.errors.InputError, match=r"example_inputs: (expected x, \(x, y\)|the model fails)"
    ):
        biofx.capture(model, example_inputs=given)


def test_what_could_be_two_calls_is_refused() -> None:
    with pytest.raises(biofx.errors.InputError, match=r"write \(\(x,\), \{...\}\) for the former"):
        as_call(Masked(), (X, {"mask": Y}))
    for given in ((X,), None), ([X, Y], None):
        with pytest.raises(biofx.errors.InputError, match=r"write \(\(x, y\), \{\}\) for the former"):
            as_call(Masked(), given)


def test_a_bare_tensor_records_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    bio_model, _ = biofx.transform(model, {"fuzzy_lr_distribution": "baseline"}, example_inputs=X)
    assert torch.equal(bio_model(X), model(X))


def test_what_an_example_would_help_against_is_not_said_where_there_is_one() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rare = nn.Linear(3, 3), _Optional()

        def forward(self, x: Tensor) -> Any:
            return self.often(x) if x.sum() > -100 else self.rare(x)

    class _Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sometimes()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    examples: list[Any] = [None, (torch.zeros(2, 3),)]
    told = [biofx.capture(_Root(), example_inputs=given).graph_breaks["inner.rare"] for given in examples]
    start = "module 'inner.rare' (_Optional) takes arguments of which it is not known how Python will call it"
    assert told == [
        f"{start}; give example_inputs",
        f"{start}, and the example inputs lead to no call of it",
    ]


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return x @ self.w * scale
