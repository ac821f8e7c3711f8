"""Sums of sub-weights whose memory is used again, and gradients that are multiplied by one number."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.operators import gradient_memory
from biofx.operators.split_ops import level_gradient, sum_sub_weights

LARGE = 512  # squared, the size from which on memory is used again


def weights(count: int = 2, size: int = LARGE) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(count)
    return [nn.Parameter(torch.randn(size, size, generator=generator)) for _ in range(count)]


def inputs(seed: int) -> Tensor:
    return torch.randn(3, LARGE, generator=torch.Generator().manual_seed(seed))


def gradients_of(parts: list[nn.Parameter]) -> list[Tensor]:
    return [torch.as_tensor(part.grad) for part in parts]


def by_definition(parts: list[nn.Parameter], x: Tensor) -> Tensor:
    total = torch.stack([part.detach() for part in parts]).sum(0).requires_grad_()
    (gradient,) = torch.autograd.grad(F.linear(x, total).square().sum(), total)
    return gradient


@pytest.mark.parametrize("count", [2, 3, 4])
def test_steps_are_those_of_a_sum_written_out(count: int) -> None:
    parts = weights(count)
    optimizer = torch.optim.SGD(parts, lr=1e-6)
    for number in range(4):
        optimizer.zero_grad()
        wanted = by_definition(parts, inputs(number))
        F.linear(inputs(number), sum_sub_weights(*parts)).square().sum().backward()
        for gradient in gradients_of(parts):
            torch.testing.assert_close(gradient, wanted)
        pointers = {gradient.data_ptr() for gradient in gradients_of(parts)}
        assert len(pointers) == count
        optimizer.step()


def test_memory_is_used_again_from_step_to_step() -> None:
    parts = weights()
    found = set()
    for number in range(3):
        for part in parts:
            part.grad = None
        total = sum_sub_weights(*parts)
        found.add(total.data_ptr())
        loss = F.linear(inputs(number), total).square().sum()
        del total
        loss.backward()
        found.add(gradients_of(parts)[1].data_ptr())
    assert len(found) == 1


def keep_gradients(parts: list[nn.Parameter]) -> object:
    return [part.grad for part in parts]


def keep_an_array(parts: list[nn.Parameter]) -> object:
    return gradients_of(parts)[1].numpy()


def keep_a_view(parts: list[nn.Parameter]) -> object:
    return gradients_of(parts)[1][3:5].t()


@pytest.mark.parametrize("keep", [keep_gradients, keep_an_array, keep_a_view])
def test_memory_that_somebody_holds_is_left_alone(keep: Callable[[list[nn.Parameter]], object]) -> None:
    parts = weights()
    F.linear(inputs(0), sum_sub_weights(*parts)).square().sum().backward()
    kept = keep(parts)
    wanted = by_definition(parts, inputs(0))
    for part in parts:
        part.grad = None
    total = sum_sub_weights(*parts)
    F.linear(inputs(1), total).square().sum().backward()
    torch.testing.assert_close(total.detach(), parts[0].detach() + parts[1].detach())
    second = kept[1] if isinstance(kept, list) else kept
    if keep is keep_a_view:
        wanted = wanted[3:5].t()
    torch.testing.assert_close(torch.as_tensor(second), wanted)


def test_gradients_add_up_over_several_backwards() -> None:
    parts = weights()
    for number in range(3):
        F.linear(inputs(number), sum_sub_weights(*parts)).square().sum().backward()
    wanted = sum(by_definition(parts, inputs(number)) for number in range(3))
    for gradient in gradients_of(parts):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("saved", [True, False])
def test_a_graph_may_be_gone_through_twice(saved: bool) -> None:
    parts = weights()
    total = sum_sub_weights(*parts)
    values = total.detach().clone()
    loss = F.linear(inputs(0), total).square().sum() if saved else total.sum()
    loss.backward(retain_graph=True)
    first = [gradient.clone() for gradient in gradients_of(parts)]
    loss.backward()
    for gradient, once in zip(gradients_of(parts), first, strict=True):
        torch.testing.assert_close(gradient, 2 * once)
    assert torch.equal(total.detach(), values)


def test_a_sum_that_is_held_keeps_its_values() -> None:
    parts = weights()
    total = sum_sub_weights(*parts)
    values = total.detach().clone()
    view = total.detach()[:2]
    F.linear(inputs(0), total).square().sum().backward()
    del total
    assert torch.equal(view, values[:2])


def test_second_derivatives() -> None:
    parts = weights()
    x = inputs(0)[:, :4]
    total = sum_sub_weights(*parts)[:4, :4]
    slopes = torch.autograd.grad(F.linear(x, total).pow(3).sum(), parts, create_graph=True)
    (slopes[0][:4, :4].square().sum()).backward()
    one = torch.stack([part.detach() for part in parts]).sum(0).requires_grad_()
    (slope,) = torch.autograd.grad(F.linear(x, one[:4, :4]).pow(3).sum(), one, create_graph=True)
    (wanted,) = torch.autograd.grad(slope[:4, :4].square().sum(), one)
    for gradient in gradients_of(parts):
        torch.testing.assert_close(gradient, wanted)


def test_memory_goes_with_the_weight() -> None:
    parts = weights()
    F.linear(inputs(0), sum_sub_weights(*parts)).square().sum().backward()
    second = weakref.ref(parts[1])
    assert len(gradient_memory._SPACES) >= 1
    before = len(gradient_memory._SPACES)
    del parts
    gc.collect()
    assert second() is None
    assert len(gradient_memory._SPACES) == before - 1


# torch imports decompositions that torch scripts itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_large_sum_in_forward_mode() -> None:
    parts = weights()
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(part, torch.ones_like(part)) for part in parts]
        tangent = torch.autograd.forward_ad.unpack_dual(sum_sub_weights(*duals)).tangent
    torch.testing.assert_close(tangent, torch.full((LARGE, LARGE), 2.0))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("size", [4, LARGE])
def test_directional_derivatives_and_batches_of_weights(size: int) -> None:
    parts = weights(3, size)
    tangents = tuple(torch.full_like(part, number) for number, part in enumerate(parts))
    found: Tensor = torch.func.jvp(sum_sub_weights, tuple(part.detach() for part in parts), tangents)[1]
    torch.testing.assert_close(found, torch.full((size, size), 3.0))
    found = torch.func.jvp(lambda w: level_gradient(w, rate=0.25), (parts[2].detach(),), tangents[2:])[1]
    torch.testing.assert_close(found, torch.full((size, size), 0.5))
    batches = [torch.stack([part.detach(), -part.detach()]) for part in parts]
    torch.testing.assert_close(torch.vmap(sum_sub_weights)(*batches), sum(batches))


@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_a_level_multiplies_the_gradient_and_nothing_else(rate: float) -> None:
    (weight,) = weights(1, 4)
    found = level_gradient(weight, rate=rate)
    assert torch.equal(found, weight)
    held = torch.randn(4, 4)
    found.backward(held)
    torch.testing.assert_close(weight.grad, held * rate)
    assert not torch.equal(held, torch.as_tensor(weight.grad))  # the caller's own gradient is not changed


def test_a_compiled_level_and_sum() -> None:
    parts = weights(2, 4)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return level_gradient(sum_sub_weights(first, second), rate=0.5).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*parts), parts)
    wanted = torch.autograd.grad(loss(*parts), parts)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
