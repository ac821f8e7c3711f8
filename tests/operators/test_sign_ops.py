from __future__ import annotations

import pytest
import torch
from torch import Tensor

from biofx.operators import sign_ops
from biofx.operators.sign_ops import by_rows, clamp_gradient, clamp_to_signs, constrain_sign, write_signs

SHAPES = {
    "columns": ((6, 5), (1, 5)),
    "rows": ((6, 5), (6, 1)),
    "kernels": ((6, 5, 3), (1, 5, 1)),
    "groups": ((6, 5, 2, 2), (6, 5, 1, 1)),
    "transposed": ((6, 5, 2, 2), (6, 1, 1, 1)),
}


def drawn(shape: tuple[int, ...]) -> Tensor:
    """Values of both signs, and zeros among them."""
    return torch.randint(-2, 3, shape).float() * torch.rand(shape)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("block", [1 << 17, 7])
@pytest.mark.parametrize("in_place", [True, False])
def test_projection_and_its_gradient_are_those_of_the_definition(
    case: str, block: int, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sign_ops, "BLOCK", block)
    shape, layout = SHAPES[case]
    weight, gradient, signs = drawn(shape), drawn(shape), torch.randint(-1, 2, layout).float()
    laid_out = by_rows(signs, weight)
    projected = clamp_to_signs(weight.flatten(1), laid_out).view(shape)
    assert torch.equal(projected, torch.where(weight * signs < 0, 0.0, weight))
    outward = (weight * signs <= 0) & (gradient * signs > 0)
    expected = torch.where(outward, 0.0, gradient)
    given = gradient.clone()
    found = clamp_gradient(given.flatten(1), weight.flatten(1), laid_out, in_place=in_place)
    assert torch.equal(found.view(shape), expected)
    assert in_place == (found.data_ptr() == given.data_ptr())
    assert in_place or torch.equal(given, gradient)


def test_kernels_and_masks_agree_through_the_operator() -> None:
    weight, sign = drawn((6, 4)), torch.tensor([1, -1, 0, 1], dtype=torch.int8)
    gradients = []
    for made in (weight.clone(), weight.t().contiguous().t()):  # the second is not contiguous: masks
        leaf = made.requires_grad_()
        effective = constrain_sign(leaf, sign)
        effective.backward(torch.arange(24.0).reshape(6, 4) - 12)
        gradients.append((effective.detach(), leaf.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("block", [1 << 17, 7])
def test_signs_are_written_into_a_weight_as_the_definition_says(
    case: str, block: int, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sign_ops, "BLOCK", block)
    shape, layout = SHAPES[case]
    weight, signs = drawn(shape), torch.randint(-1, 2, layout).float()
    weight.view(-1)[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    if weight.dim() == 4:
        weight = weight.to(memory_format=torch.channels_last)
    wrong = weight * signs < 0
    expected = torch.where(wrong, -weight if flip else torch.zeros_like(weight), weight)
    pointer = weight.data_ptr()
    assert int(write_signs(weight, signs, flip=flip)) == int(wrong.sum())
    assert weight.data_ptr() == pointer
    assert torch.equal(weight.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_free_outputs_of_a_transposed_weight_are_its_columns() -> None:
    weight = torch.tensor([[1.0, -1.0, 2.0], [-3.0, 4.0, -5.0]])  # (in, out)
    free_last = constrain_sign(weight, torch.tensor([1.0, -1.0]), axis=0, rows=torch.tensor([1, 1, 0]))
    assert free_last.tolist() == [[1.0, 0.0, 2.0], [-3.0, 0.0, -5.0]]
