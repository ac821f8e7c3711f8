"""The memory of a weight's last gradient is used again, and only where nothing else holds it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.operators.gradient_memory import last_memory, remember_memory
from biofx.operators.sign_ops import constrain_sign
from biofx.operators.split_ops import fold_weight

LARGE = 512  # squared, the size from which on memory is used again


def weight_of() -> nn.Parameter:
    return nn.Parameter(torch.randn(LARGE, LARGE, generator=torch.Generator().manual_seed(0)))


def inputs(seed: int, columns: int = LARGE) -> Tensor:
    return torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))


SIGNS = torch.where(torch.arange(LARGE) % 3 == 0, -1.0, 1.0)


def folded(weight: Tensor) -> Tensor:
    return fold_weight(weight, rows=2, columns=2)


def folded_by_definition(weight: Tensor) -> Tensor:
    half = LARGE // 2
    return weight.reshape(half, 2, half, 2).sum((1, 3))


def signed(weight: Tensor) -> Tensor:
    return constrain_sign(weight, SIGNS)


def signed_by_definition(weight: Tensor) -> Tensor:
    held = weight.detach()
    return held.masked_fill(held * SIGNS < 0, 0) + (weight - held)


def project(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.masked_fill((weight * SIGNS <= 0) & (gradient * SIGNS > 0), 0)


def loss_of(weight: Tensor, seed: int) -> Tensor:
    return F.linear(inputs(seed, weight.shape[1]), weight).square().sum()


def gradient_of(weight: Tensor) -> Tensor:
    return torch.as_tensor(weight.grad)


def wanted_gradient(function: Callable[[Tensor], Tensor], weight: Tensor, seed: int) -> Tensor:
    own = weight.detach().clone().requires_grad_()
    definition = folded_by_definition if function is folded else signed_by_definition
    (gradient,) = torch.autograd.grad(loss_of(definition(own), seed), own)
    return gradient if function is folded else project(gradient, own.detach())


@pytest.mark.parametrize("function", [folded, signed])
def test_steps_are_those_of_the_definition(function: Callable[[Tensor], Tensor]) -> None:
    weight = weight_of()
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    for seed in range(4):
        optimizer.zero_grad()
        wanted = wanted_gradient(function, weight, seed)
        loss_of(function(weight), seed).backward()
        torch.testing.assert_close(gradient_of(weight), wanted, rtol=1e-4, atol=1e-2)
        assert gradient_of(weight).is_contiguous()
        optimizer.step()


def test_every_synapse_gets_its_connections_gradient_to_the_bit() -> None:
    weight = weight_of()
    for seed in range(3):
        weight.grad = None
        summed = folded(weight)
        summed.retain_grad()
        loss_of(summed, seed).backward()
        spread = gradient_of(summed).repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(gradient_of(weight), spread)


def test_a_fold_writes_its_gradient_where_the_last_one_was() -> None:
    weight, found = weight_of(), set()
    for seed in range(3):
        weight.grad = None
        loss_of(folded(weight), seed).backward()
        found.add(gradient_of(weight).data_ptr())
    assert len(found) == 1


def test_signs_write_the_weight_where_its_last_gradient_was() -> None:
    weight = weight_of()
    loss_of(signed(weight), 0).backward()
    place = gradient_of(weight).data_ptr()
    weight.grad = None
    projected = signed(weight)
    assert projected.data_ptr() == place
    assert torch.equal(projected, weight.masked_fill(weight * SIGNS < 0, 0))


def keep_gradient(weight: Tensor) -> Tensor:
    return gradient_of(weight)


def keep_an_array(weight: Tensor) -> Any:
    return gradient_of(weight).numpy()


def keep_a_view(weight: Tensor) -> Tensor:
    return gradient_of(weight)[3:5].t()


@pytest.mark.parametrize("keep", [keep_gradient, keep_an_array, keep_a_view])
@pytest.mark.parametrize("function", [folded, signed])
def test_gradients_that_somebody_holds_keep_their_values(
    function: Callable[[Tensor], Tensor], keep: Callable[[Tensor], Any]
) -> None:
    weight = weight_of()
    loss_of(function(weight), 0).backward()
    kept = keep(weight)
    values = torch.as_tensor(kept).clone()
    weight.grad = None
    loss_of(function(weight), 1).backward()
    assert torch.equal(torch.as_tensor(kept), values)
    assert not torch.equal(torch.as_tensor(keep(weight)), values)


@pytest.mark.parametrize("function", [folded, signed])
def test_gradients_that_a_hook_or_a_caller_holds_keep_their_values(
    function: Callable[[Tensor], Tensor],
) -> None:
    weight, seen = weight_of(), list[Tensor]()
    weight.register_hook(lambda gradient: seen.append(gradient))
    (first,) = torch.autograd.grad(loss_of(function(weight), 0), weight)
    copies = [first.clone(), seen[0].clone()]
    loss_of(function(weight), 1).backward()
    assert torch.equal(first, copies[0])
    assert torch.equal(seen[0], copies[1])


@pytest.mark.parametrize("function", [folded, signed])
def test_gradients_add_up_over_several_backwards(function: Callable[[Tensor], Tensor]) -> None:
    weight = weight_of()
    for seed in range(3):
        loss_of(function(weight), seed).backward()
    wanted = torch.stack([wanted_gradient(function, weight, seed) for seed in range(3)]).sum(0)
    torch.testing.assert_close(gradient_of(weight), wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("function", [folded, signed])
def test_a_weight_used_twice_in_one_graph(function: Callable[[Tensor], Tensor]) -> None:
    weight = weight_of()
    wanted = torch.stack([wanted_gradient(function, weight, seed) for seed in range(2)]).sum(0)
    for _ in range(3):
        weight.grad = None
        (loss_of(function(weight), 0) + loss_of(function(weight), 1)).backward()
        torch.testing.assert_close(gradient_of(weight), wanted, rtol=1e-4, atol=1e-2)


def test_second_derivatives_of_a_fold() -> None:
    weight = weight_of()
    loss_of(folded(weight), 0).backward()
    weight.grad = None
    x = inputs(0, 4)
    (slope,) = torch.autograd.grad(
        F.linear(x, folded(weight)[:4, :4]).pow(3).sum(), weight, create_graph=True
    )
    (found,) = torch.autograd.grad(slope[:4, :4].square().sum(), weight)
    own = weight.detach().clone().requires_grad_()
    cubes = F.linear(x, folded_by_definition(own)[:4, :4]).pow(3).sum()
    (slope,) = torch.autograd.grad(cubes, own, create_graph=True)
    (wanted,) = torch.autograd.grad(slope[:4, :4].square().sum(), own)
    torch.testing.assert_close(found, wanted)


def test_memory_is_taken_once_and_only_where_it_fits() -> None:
    weight = weight_of()
    remember_memory(weight, torch.empty(LARGE, LARGE).untyped_storage())
    taken = last_memory(weight)
    assert taken is not None
    assert (taken.shape, taken.dtype) == (weight.shape, weight.dtype)
    assert last_memory(weight) is None
    remember_memory(weight, torch.empty(LARGE).untyped_storage())
    assert last_memory(weight) is None


def test_memory_that_processes_share_is_left_alone() -> None:
    weight = weight_of()
    remember_memory(weight, torch.empty(LARGE, LARGE).share_memory_().untyped_storage())
    assert last_memory(weight) is None


@pytest.mark.parametrize("function", [folded, signed])
def test_a_forward_without_gradients_gives_the_memory_back(function: Callable[[Tensor], Tensor]) -> None:
    weight = weight_of()
    loss_of(function(weight), 0).backward()
    weight.grad = None
    with torch.no_grad():
        function(weight)
    gc.collect()
    assert last_memory(weight) is None
