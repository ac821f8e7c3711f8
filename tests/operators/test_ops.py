from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from biofx import OptionError
from biofx.operators.rate_ops import scale_gradient
from biofx.operators.sign_ops import constrain_sign, signs_like
from biofx.operators.split_ops import level_gradient, pool_synapses


def test_scale_gradient_returns_its_input_to_the_bit() -> None:
    weight = torch.tensor([0.0, -0.0, 1e-45, -1e38, torch.inf, torch.nan])
    scaled = scale_gradient(weight, torch.full((6,), 0.3))
    assert torch.equal(scaled.view(torch.int32), weight.view(torch.int32))


def test_factor_of_zero_stops_the_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    (scale_gradient(weight, torch.tensor([0.0, 2.0])) * 5).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 10]


def test_factor_broadcasts() -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    scale_gradient(weight, torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1], [2, 2], [3, 3]]


# torch.func.jvp imports decompositions that torch scripts itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_forward_mode_tangent_is_scaled() -> None:
    factor = torch.tensor([0.5, 2.0])
    ones = torch.ones(2)
    tangent = torch.func.jvp(lambda w: scale_gradient(w, factor), (ones,), (ones,))[1]
    assert torch.equal(tangent, factor)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, s: scale_gradient(w, s.abs() * 0.5),
        lambda w, s: scale_gradient(w.bfloat16(), s.abs() * 0.5).float(),
        lambda w, s: scale_gradient(torch.complex(w, w.neg()), s.abs() * 0.5).abs(),
        lambda w, s: level_gradient(w, rate=0.25),
        lambda w, s: constrain_sign(w, s, method="project"),
        lambda w, s: constrain_sign(w, s, method="abs"),
    ],
    ids=["scale", "scale bfloat16", "scale complex", "level", "project", "abs"],
)
def test_a_graph_recorded_below_autograd_keeps_the_gradient(function: object) -> None:
    weight, sign = torch.randn(3, 4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    recorded = make_fx(function)(weight, sign)  # type: ignore[arg-type]
    gradients = []
    for compute in (function, recorded):
        leaf = weight.clone().requires_grad_()
        output: Tensor = compute(leaf, sign)  # type: ignore[operator]
        output.backward(torch.arange(12.0).reshape(3, 4) - 5)
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_keep_the_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4, dtype=dtype)
    sign = torch.tensor([1, -1, 1, -1], dtype=torch.int8)
    assert scale_gradient(weight, torch.ones(3, 4)).dtype == dtype
    assert constrain_sign(weight, sign).dtype == dtype
    assert constrain_sign(weight, sign, method="abs").dtype == dtype


def test_projection_passes_gradcheck_where_it_is_smooth() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]], dtype=torch.float64, requires_grad=True)
    sign = torch.tensor([1, -1], dtype=torch.int8)
    assert torch.autograd.gradcheck(lambda w: constrain_sign(w, sign), (weight,))
    assert torch.autograd.gradgradcheck(lambda w: constrain_sign(w, sign).pow(3), (weight,))


def test_signs_of_a_grouped_convolution_go_to_the_columns_of_their_group() -> None:
    sign = torch.tensor([1, -1, 1, 1, -1, -1])  # units 0-2 feed rows 0-1, units 3-5 feed rows 2-3
    laid_out = signs_like(torch.zeros(4, 3, 5), sign, groups=2)
    assert laid_out.squeeze(-1).tolist() == [[1, -1, 1], [1, -1, 1], [1, -1, -1], [1, -1, -1]]


def test_unknown_method_is_refused() -> None:
    with pytest.raises(OptionError, match="method must be one of"):
        constrain_sign(torch.ones(2, 2), torch.ones(2), method="clip")


@pytest.mark.parametrize("axis", [-1, -2, 0, 2])
def test_pool_synapses_sums_along_any_axis(axis: int) -> None:
    x = torch.randn(4, 6, 8)
    pooled = pool_synapses(x, gamma=2, channel_axis=axis)
    moved = x.movedim(axis, 0)
    expected = torch.stack([moved[2 * (c // 2)] + moved[2 * (c // 2) + 1] for c in range(len(moved))])
    torch.testing.assert_close(pooled, expected.movedim(0, axis))
