from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.errors import InputError
from biofx.operators.norm_ops import affine_synapses, batch_norm_synapses


def test_each_member_has_a_scale_and_a_shift_of_its_own() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    options: dict[str, Any] = {"gamma": 2, "channel_axis": -2, "groups": 2}
    found = affine_synapses(x, weight, bias, **options)
    expected = x.repeat_interleave(2, 1) * weight[:, None] + bias[:, None]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        affine_synapses(x, None, bias, **options),
        expected - (weight - 1)[:, None] * x.repeat_interleave(2, 1),
    )
    leaves = (x, weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda *given: affine_synapses(*given, **options), leaves)
    assert torch.autograd.gradgradcheck(lambda *given: affine_synapses(*given, **options), leaves)


def test_no_samples_have_no_gradients() -> None:
    x = torch.empty(0, 2, 5, requires_grad=True)
    weight, bias = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    found = affine_synapses(x, weight, bias, gamma=2, channel_axis=-2, groups=2)
    assert found.shape == (0, 4, 5)
    gradients = torch.autograd.grad(found.sum(), (x, weight, bias))
    for gradient, shape in zip(gradients, ((0, 2, 5), (4,), (4,)), strict=True):
        assert torch.equal(gradient, torch.zeros(shape))


def test_result_may_be_changed_in_place() -> None:
    x = torch.randn(3, 2, 5, requires_grad=True)
    found = affine_synapses(x, torch.ones(4), torch.ones(4), gamma=2, channel_axis=-2, groups=2)
    torch.relu_(found).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_that_of_the_full_tensor(training: bool) -> None:
    norm = nn.BatchNorm1d(4, momentum=0.3).double().train(training)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    names = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
    state = [getattr(norm, name).detach().clone() for name in names]
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    options: dict[str, Any] = {"gamma": 2, "momentum": 0.3, "eps": norm.eps, "ranks": (2, 3)}
    mean, variance, count, weight, bias = state
    found = batch_norm_synapses(x, mean, variance, count, weight, bias, training, channel_axis=-2, **options)
    torch.testing.assert_close(found, norm(x.repeat_interleave(2, 1)))
    torch.testing.assert_close(state, [getattr(norm, name).detach() for name in names])


def test_batch_norm_refuses_what_the_layer_refuses() -> None:
    with pytest.raises(InputError, match=r"\(4,\) axes to normalise, found shape \(2, 3\)"):
        batch_norm_synapses(
            torch.ones(2, 3), None, None, None, None, None, True,
            gamma=2, channel_axis=-3, momentum=0.1, eps=1e-5, ranks=(4,),
        )  # fmt: skip


def test_layer_that_is_called_beside_its_folded_call_can_be_trained() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.fc(x)))
            result: torch.Tensor = self.out(x + torch.relu(self.norm(self.fc(x))))
            return result

    model = Twice()
    config: dict[str, Any] = {"weight_splitting_Gamma": 2, "apply_dales_principle": True}
    whole, _ = biofx.transform(model, {**config, "weight_splitting_fold": False}, only="fc#1")
    folded, _ = biofx.transform(model, config, only="fc#1")
    assert any(node.target is batch_norm_synapses for node in folded.graph.nodes)
    assert any(node.op == "call_module" and node.target == "norm" for node in folded.graph.nodes)
    x = torch.randn(5, 4)
    results = []
    for made in (whole, folded):
        made(x).square().sum().backward()
        results.append(([p.grad for p in made.parameters()], list(made.buffers())))
    torch.testing.assert_close(results[0], results[1])
