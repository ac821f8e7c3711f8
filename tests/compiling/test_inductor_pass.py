"""Passes in a slot of inductor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import biofx
from biofx.compiling.inductor_pass import _replace
from biofx.errors import OptionError, PassError
from biofx.passes import ScaleGradients
from tests.compiling.compiled_models import assert_learns_as

pytestmark = pytest.mark.filterwarnings("ignore")  # of inductor's own
CONFIG = {"fuzzy_lr_dtype": "seed", "weight_splitting_Gamma": 2, "fuzzy_learning_rate_factor_nu": 0.4}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def test_splits_and_rates_in_the_slot_are_those_of_a_transformed_model() -> None:
    model, x = perceptron(), torch.randn(3, 4)
    expected = biofx.transform(copy.deepcopy(model), CONFIG).graph_module
    assert_learns_as(with_the_pass(biofx.inductor_pass(config=CONFIG), model), model, expected, x)
    torch._dynamo.reset()


def with_the_pass(graph_pass: Any, model: Any) -> Any:
    """Compile a model, and call a pass as inductor does: with the graph that dynamo makes."""

    def behind(graph_module: GraphModule, inputs: list[Tensor]) -> Any:
        graph_pass(graph_module.graph)
        graph_module.recompile()
        return graph_module.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=behind)


def test_what_it_cannot_know_is_refused() -> None:
    x = torch.randn(3, 4)
    operators = make_fx(perceptron())(x).graph
    with pytest.raises(PassError, match=r"found one of operators, .* put the pass into pre_grad_custom_pass"):
        biofx.inductor_pass(config=CONFIG)(operators)
    with pytest.raises(Exception, match=r"PassError: expected passes that keep nothing beside the graph"):
        with_the_pass(biofx.inductor_pass(), perceptron())(x)

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            torch._dynamo.graph_break()
            return x * 2

    with pytest.raises(Exception, match="expected the graph of a whole model, found a part of Broken"):
        with_the_pass(biofx.inductor_pass(config=CONFIG), Broken())(x)
    with pytest.raises(OptionError, match="fuzzy_lr_nu"):
        biofx.inductor_pass(config={"fuzzy_lr_nu": 0.1})


def test_a_graph_without_parameters_is_left_alone() -> None:
    double = with_the_pass(biofx.inductor_pass(config=CONFIG), lambda x: x * 2)
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))


def test_the_id_for_the_cache_is_the_passes_and_none_for_passes_of_others() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(ScaleGradients):
        name: ClassVar[str] = "own"

    one, other = (
        biofx.inductor_pass("scale-gradients{nu=0.1}"),
        biofx.inductor_pass("scale-gradients{nu=0.2}"),
    )
    assert one.uuid() == biofx.inductor_pass(ScaleGradients(nu=0.1)).uuid()
    assert one.uuid() != other.uuid()
    assert biofx.__version__ in str(one.uuid())
    assert biofx.inductor_pass(Own()).uuid() is None
    from torch._inductor.custom_graph_pass import CustomGraphPass

    assert isinstance(one, CustomGraphPass)


def test_a_graph_is_replaced_in_place() -> None:
    one, other = torch.fx.symbolic_trace(lambda x: x + 1), torch.fx.symbolic_trace(lambda x: x * 3)
    _replace(one.graph, other)
    one.recompile()
    assert torch.equal(one(torch.ones(2)), torch.full((2,), 3.0))
