from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from biofx.operators.exclusive import _free_signatures, is_exclusive
from biofx.operators.rate_ops import scale_gradient
from biofx.operators.sign_ops import constrain_sign

FACTOR = 0.5


@pytest.fixture(autouse=True)
def looked_at_again() -> Iterator[None]:
    # after a compilation that failed in this process frames hold more, and nothing counts as free
    _free_signatures.cache_clear()
    yield
    _free_signatures.cache_clear()


class Ask(torch.autograd.Function):
    """Notes whether the gradient that passes is exclusive."""

    answers: list[bool]

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Ask.answers.append(is_exclusive(gradient))
        return gradient


def asked(use: Callable[[Tensor], object]) -> list[bool]:
    Ask.answers = []
    weight = torch.ones(4, 4, requires_grad=True)
    use(Ask.apply(weight))  # type: ignore[no-untyped-call]
    return Ask.answers


def test_a_gradient_that_a_layer_has_just_made_is_exclusive() -> None:
    # without this, gradients would be multiplied out of place, at the price of fresh memory at every step
    assert asked(lambda weight: F.linear(torch.ones(3, 4), weight).sum().backward()) == [True]
    assert asked(lambda weight: F.linear(torch.ones(3, 4), weight, torch.ones(4)).sum().backward()) == [True]


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight.backward(torch.ones(4, 4)),
        lambda weight: (weight + torch.ones(4, 4, requires_grad=True)).backward(torch.ones(4, 4)),
        lambda weight: (weight.view(16) + torch.ones(16, requires_grad=True)).backward(torch.ones(16)),
        lambda weight: F.linear(torch.ones(3, 4), weight).sum().backward(create_graph=True),
        lambda weight: weight.sum().backward(),
    ],
    ids=["given", "shared by a sum", "view of what was given", "with a graph of its own", "expanded"],
)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_that_others_may_hold_is_not(use: Callable[[Tensor], object]) -> None:
    assert asked(use) == [False]


@pytest.mark.parametrize("operator", ["scale", "project"])
def test_what_a_hook_keeps_is_not_changed_behind_its_back(operator: str) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    kept: list[Tensor] = []
    weight = torch.ones(4, 4, requires_grad=True)
    if operator == "scale":
        effective = scale_gradient(weight, torch.full((4, 4), FACTOR))
    else:
        effective = constrain_sign(weight, torch.tensor([1, -1, 1, -1]))
    effective.register_hook(lambda gradient: kept.append(gradient))
    F.linear(x, effective).sum().backward()
    torch.testing.assert_close(kept[0], x.sum(0).expand(4, 4))


def test_a_gradient_that_is_handed_in_stays_as_it_was() -> None:
    gradient = torch.ones(4, 4)
    weight = torch.ones(4, 4, requires_grad=True)
    scale_gradient(weight, torch.full((4, 4), FACTOR)).backward(gradient)
    assert torch.equal(gradient, torch.ones(4, 4))
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient * FACTOR)


def test_gradients_that_are_asked_for_on_the_way_stay_as_they_were() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    effective = scale_gradient(weight, torch.full((4, 4), FACTOR))
    output = F.linear(torch.ones(3, 4), effective).sum()
    on_the_way, at_the_end = torch.autograd.grad(output, [effective, weight])
    assert torch.equal(on_the_way, torch.full((4, 4), 3.0))
    assert torch.equal(at_the_end, torch.full((4, 4), 1.5))
    effective = scale_gradient(weight, torch.full((4, 4), FACTOR))
    effective.retain_grad()
    F.linear(torch.ones(3, 4), effective).sum().backward()
    assert effective.grad is not None
    assert torch.equal(effective.grad, torch.full((4, 4), 3.0))


@pytest.mark.parametrize("sign", [True, False])
def test_operators_work_in_the_memory_of_an_exclusive_gradient(sign: bool) -> None:
    places: list[int] = []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            places.append(gradient.data_ptr())
            return gradient

    weight = torch.ones(4, 4, requires_grad=True)
    signed = constrain_sign(weight, torch.tensor([1, -1, 1, -1])) if sign else weight
    scaled: Tensor = Note.apply(scale_gradient(signed, torch.ones(4, 4)))  # type: ignore[no-untyped-call]
    F.linear(torch.ones(3, 4), scaled).sum().backward()
    assert weight.grad is not None
    assert places == [weight.grad.data_ptr()]
