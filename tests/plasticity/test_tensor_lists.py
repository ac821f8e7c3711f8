"""Operations on lists of tensors, against the operation on each."""

from __future__ import annotations

import torch

from biofx.plasticity.tensor_lists import at_least, divided, lerp_, multiplied, zero_


def test_each_tensor_is_treated_as_by_itself() -> None:
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([[2.0], [5.0]], dtype=torch.float64)
    other, wide = torch.tensor([4.0, 7.0]), torch.tensor([[3.0], [9.0]], dtype=torch.float64)
    for found, operation in ((divided, torch.div), (multiplied, torch.mul)):
        results = found([first, second], [other, wide])
        assert torch.equal(results[0], operation(first, other))
        assert torch.equal(results[1], operation(second, wide))
    assert [each.tolist() for each in at_least([first, second], 2.5)] == [[2.5, 3.0], [[2.5], [5.0]]]


def test_tensors_are_changed_in_place() -> None:
    tensors = [torch.ones(2), torch.ones(3, dtype=torch.float64)]
    expected = [tensor.lerp(2 * tensor, 0.25) for tensor in tensors]
    lerp_(tensors, [2 * tensor for tensor in tensors], 0.25)
    assert all(map(torch.equal, tensors, expected))
    zero_(tensors)
    assert [tensor.tolist() for tensor in tensors] == [[0.0] * 2, [0.0] * 3]
    zero_([])
