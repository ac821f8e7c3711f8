"""Ways to give example inputs, and the calls that are meant."""

from __future__ import annotations

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
    ],
)
def test_what_is_plainly_meant_is_called(
    kind: type[nn.Module], given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    found = as_call(kind(), given)
    torch.testing.assert_close(found, (args, kwargs), rtol=0, atol=0)


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
