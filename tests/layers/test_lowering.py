from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from biofx import capture
from biofx.errors import PassError
from biofx.layers.lowering import Lowering
from biofx.layers.sites import find_sites
from biofx.operators.rate_ops import scale_gradient
from tests.layers.lowered import lowered

SEQUENCE, IMAGE, VOLUME = (2, 4, 7), (2, 4, 7, 6), (2, 4, 5, 6, 5)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "linear without bias": (nn.Linear(4, 3, bias=False), (5, 4)),
    "linear, more axes": (nn.Linear(4, 3), (2, 3, 4)),
    "linear, one vector": (nn.Linear(4, 3), (4,)),
    "conv1d": (nn.Conv1d(4, 6, 3), SEQUENCE),
    "conv1d, strided and dilated": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), SEQUENCE),
    "conv1d, same": (nn.Conv1d(4, 6, 3, padding="same", dilation=2), SEQUENCE),
    "conv1d, valid": (nn.Conv1d(4, 6, 3, padding="valid"), SEQUENCE),
    "conv1d, circular": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), SEQUENCE),
    "conv1d, unbatched": (nn.Conv1d(4, 6, 3), SEQUENCE[1:]),
    "conv2d": (nn.Conv2d(4, 6, 3), IMAGE),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGE),
    "conv2d, uneven": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), IMAGE),
    "conv2d, reflect and same": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), IMAGE),
    "conv2d, replicate": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="replicate", groups=2), IMAGE),
    "conv2d, unbatched": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGE[1:]),
    "conv3d": (nn.Conv3d(4, 6, 3, stride=2, padding=1), VOLUME),
    "conv3d, grouped": (nn.Conv3d(4, 6, 2, groups=2, bias=False), VOLUME),
    "transposed conv1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), SEQUENCE),
    "transposed conv1d, unbatched": (nn.ConvTranspose1d(4, 6, 3), SEQUENCE[1:]),
    "transposed conv2d": (nn.ConvTranspose2d(4, 6, 3, dilation=2, groups=2), IMAGE),
    "transposed conv2d without bias": (nn.ConvTranspose2d(4, 6, (2, 3), stride=2, bias=False), IMAGE),
    "transposed conv3d": (nn.ConvTranspose3d(4, 6, 2, stride=2, output_padding=(1, 0, 1)), VOLUME),
}


def results(model: nn.Module, x: Tensor) -> Iterator[Any]:
    given = x.clone().requires_grad_()
    output = model(given)
    (output * output).sum().backward()
    yield output
    yield given.grad
    yield {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", LAYERS)
def test_a_lowered_layer_equals_the_layer_to_the_bit(name: str) -> None:
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer)
    found = lowered(model)
    assert not list(found.graph.find_nodes(op="call_module"))
    assert list(found.state_dict()) == list(model.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model)
    reference.zero_grad()
    torch.testing.assert_close(list(results(found, x)), list(results(reference, x)), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_channels_and_presynaptic_units_are_counted(name: str) -> None:
    layer: Any = LAYERS[name][0]
    for captured in (capture(nn.Sequential(layer)), lowered(nn.Sequential(layer))):
        (site,) = find_sites(captured).found
        linear = isinstance(layer, nn.Linear)
        assert site.output_channels == (layer.out_features if linear else layer.out_channels)
        assert site.input_channels == (layer.in_features if linear else layer.in_channels)
        assert site.groups == getattr(layer, "groups", 1)
        assert site.kind.module_type is type(layer)


def test_a_lowered_node_keeps_its_name_its_users_and_its_module(mlp: nn.Module) -> None:
    captured = capture(mlp)
    before = [(node.name, [user.name for user in node.users]) for node in captured.graph.nodes]
    found = lowered(mlp)
    after = [
        (node.name, [user.name for user in node.users]) for node in found.graph.nodes if node.op != "get_attr"
    ]
    assert after == before
    assert all(node.meta["nn_module_stack"] for node in found.graph.nodes if node.op.startswith("call"))


def test_lowering_twice_is_lowering_once(mlp: nn.Module) -> None:
    found = lowered(mlp)
    before = str(found.graph)
    for site in find_sites(found).found:
        Lowering(found).lower(site)
    assert str(found.graph) == before


def test_a_layer_called_twice_reads_its_weight_once(vectors: Tensor) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    found = lowered(model)
    assert len(list(found.graph.find_nodes(op="get_attr", target="0.weight"))) == 1
    assert torch.equal(found(vectors), model(vectors))


def test_a_layer_with_an_obstacle_is_not_lowered(mlp: nn.Module) -> None:
    mlp[0].register_forward_hook(lambda module, args, output: None)  # type: ignore[index]
    captured = capture(mlp)
    with pytest.raises(PassError, match="cannot be lowered: it has forward hooks"):
        Lowering(captured).lower(find_sites(captured).found[0])


def test_a_weight_is_wrapped_once_for_all_its_uses(vectors: Tensor) -> None:
    layer = nn.Linear(4, 4)
    captured = lowered(nn.Sequential(layer, layer))
    captured.register_buffer("rates", torch.full((4, 4), 3.0))
    Lowering(captured).wrap_weight(find_sites(captured).found, scale_gradient, ("rates", "rates"), "scaled")
    captured.recompile()
    (wrapper,) = captured.graph.find_nodes(op="call_function", target=scale_gradient)
    assert wrapper.name == "_0_scaled"
    assert [user.target for user in wrapper.users] == [nn.functional.linear] * 2
    layer(layer(vectors)).sum().backward()
    captured(vectors).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(captured.get_parameter("0.weight").grad, layer.weight.grad * 3)


def test_a_weight_in_two_places_of_one_call_is_wrapped_once() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, vdim=3)
            self.attention.q_proj_weight = self.attention.k_proj_weight

        def forward(self, x: Tensor, value: Tensor) -> Any:
            return self.attention(x, x, value)[0]

    model = Attends()
    captured = lowered(model)
    sites = [site for site in find_sites(captured).found if site.role in ("query", "key")]
    assert {site.parameter_path for site in sites} == {"attention.q_proj_weight"}
    captured.register_buffer("rates", torch.full((4, 4), 3.0))
    Lowering(captured).wrap_weight(sites, scale_gradient, ("rates", "rates"), "scaled")
    captured.recompile()
    (wrapper,) = captured.graph.find_nodes(op="call_function", target=scale_gradient)
    assert wrapper.name == "attention_q_proj_weight_scaled"
    assert [site.weight_node for site in find_sites(captured).found[:2]] == [wrapper, wrapper]
    x, value = torch.randn(5, 2, 4), torch.randn(5, 2, 3)
    for each in (model, captured):
        each(x, value).square().sum().backward()
    gradient = captured.get_parameter("attention.q_proj_weight").grad
    assert model.attention.q_proj_weight.grad is not None
    torch.testing.assert_close(gradient, model.attention.q_proj_weight.grad * 3)


def test_one_weight_of_several_is_wrapped_by_itself() -> None:
    captured = lowered(nn.Sequential(nn.GRU(4, 3, 2)))
    captured.register_buffer("rates", torch.ones(9, 3))
    hidden = [site for site in find_sites(captured).found if site.parameter_path == "0.weight_hh_l1"]
    Lowering(captured).wrap_weight(hidden, scale_gradient, ("rates", "rates"), "scaled")
    found = {site.parameter_path: site.has(scale_gradient) for site in find_sites(captured).found}
    assert found == {
        "0.weight_ih_l0": False,
        "0.weight_hh_l0": False,
        "0.weight_ih_l1": False,
        "0.weight_hh_l1": True,
    }
    captured.graph.lint()


def test_a_hidden_weight_cannot_be_wrapped(mlp: nn.Module) -> None:
    captured = capture(mlp)
    with pytest.raises(PassError, match="must be lowered"):
        Lowering(captured).wrap_weight(
            find_sites(captured).found[:1], scale_gradient, ("rates", "rates"), "scaled"
        )


def test_nodes_of_a_wrapped_weight_stand_in_order(mlp: nn.Module) -> None:
    captured = lowered(mlp)
    captured.register_buffer("rates", torch.ones(6, 4))
    Lowering(captured).wrap_weight(
        find_sites(captured).found[:1], scale_gradient, ("rates", "rates"), "scaled"
    )
    nodes: list[Node] = list(captured.graph.nodes)
    for node in nodes:
        assert all(nodes.index(source) < nodes.index(node) for source in node.all_input_nodes)
