"""Memory that is lent for one step of an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import biofx
from biofx.plasticity.lent_memory import LentMemory


def test_the_same_memory_comes_back_unless_somebody_holds_it() -> None:
    memory, first, second = LentMemory(), torch.randn(3, 4), torch.randn(3, 4)
    copied: Any = memory.copy_of("a", first)
    assert torch.equal(copied, first)
    place = copied.data_ptr()
    assert place != first.data_ptr()
    copied = None
    memory.settle()
    assert memory.copy_of("a", second).data_ptr() == place
    kept = memory.copy_of("b", first)
    part = memory.copy_of("c", first)[0]
    memory.settle()
    for key, held in (("b", kept), ("c", part)):
        assert memory.copy_of(key, second).untyped_storage().data_ptr() != held.untyped_storage().data_ptr()
    assert torch.equal(kept, first)
    assert torch.equal(part, first[0])


def test_other_tensors_get_other_memory_in_their_own_layout() -> None:
    memory = LentMemory()
    for tensor in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 4).double(), torch.randn(2)):
        copied = memory.copy_of("a", tensor)
        memory.settle()
        assert torch.equal(copied, tensor)
        assert (copied.stride(), copied.dtype) == (tensor.stride(), tensor.dtype)
    twice = [memory.copy_of("b", torch.full((2,), value)) for value in (1.0, 2.0)]
    assert [float(entry[0]) for entry in twice] == [1.0, 2.0]


class Hoarding(torch.optim.SGD):
    """Steps, and keeps the gradients that it was given without a copy."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("seen", []).append(parameter.grad)
        return super().step(closure)


def test_gradients_that_an_optimizer_keeps_stay_as_they_were() -> None:
    bio: Any = biofx.transform(nn.Linear(3, 2), {"l2_to_initial_strength": 0.1})[0]
    optimizer = Hoarding(bio.parameters(), lr=0.1)
    plasticity = biofx.attach(bio, optimizer, ["l2_to_initial"])
    expected: list[Tensor] = []
    for step in range(4):
        optimizer.zero_grad()
        bio(torch.full((5, 3), float(step + 1))).square().mean().backward()
        optimizer.step()
        expected.append(optimizer.state[bio.weight]["seen"][-1].clone())
    assert plasticity.steps == 4
    seen = optimizer.state[bio.weight]["seen"]
    assert len({entry.data_ptr() for entry in seen}) == 4
    for found, value in zip(seen, expected, strict=True):
        assert torch.equal(found, value)


def test_memory_that_is_not_filled_is_that_of_copies() -> None:
    memory, tensor = LentMemory(), torch.randn(3, 2).t()
    address = memory.copy_of("a", tensor).data_ptr()
    memory.settle()
    made = memory.like("a", tensor)
    assert (made.data_ptr(), made.stride()) == (address, tensor.stride())
