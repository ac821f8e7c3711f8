from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from biofx import BioGraphModule, capture
from biofx.errors import InputError, PassError
from biofx.layers.lowering import Lowering
from biofx.layers.norms import find_norms, lower_norm
from biofx.layers.sites import find_sites
from biofx.operators.norm_ops import batch_norm
from biofx.operators.sign_ops import constrain_sign

VECTORS, SEQUENCE, IMAGE, VOLUME = (5, 4), (5, 4, 3), (5, 4, 3, 2), (5, 4, 3, 2, 2)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch": (lambda: nn.BatchNorm1d(4), VECTORS),
    "batch, of sequences": (lambda: nn.BatchNorm1d(4, momentum=0.3, eps=1e-3), SEQUENCE),
    "batch, of images": (lambda: nn.BatchNorm2d(4), IMAGE),
    "batch, of volumes": (lambda: nn.BatchNorm3d(4), VOLUME),
    "batch, cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), IMAGE),
    "batch, untracked": (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    "layer": (lambda: nn.LayerNorm(4, eps=1e-3), VECTORS),
    "layer, two axes, no bias": (lambda: nn.LayerNorm((3, 2), bias=False), IMAGE),
    "root mean square": (lambda: nn.RMSNorm(4), VECTORS),
    "root mean square, eps": (lambda: nn.RMSNorm((3, 2), eps=1e-3), IMAGE),
    "group": (lambda: nn.GroupNorm(2, 4, eps=1e-3), IMAGE),
    "instance": (lambda: nn.InstanceNorm1d(4, affine=True), SEQUENCE),
    "instance, alone": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE[1:]),
    "instance, tracked": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    "instance, of volumes": (lambda: nn.InstanceNorm3d(4, affine=True, eps=1e-3), VOLUME),
}


def lowered(model: nn.Module) -> BioGraphModule:
    captured = capture(model)
    lowering = Lowering(captured)
    for site in find_norms(captured):
        lower_norm(lowering, site)
    captured.graph.lint()
    captured.recompile()
    return captured


def results(model: nn.Module, x: Tensor) -> list[Any]:
    given = x.clone().requires_grad_()
    model.zero_grad()
    output = model(given)
    (output * output * torch.arange(output.numel()).reshape(output.shape)).sum().backward()
    return [output, given.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("name", LAYERS)
def test_a_lowered_norm_equals_the_norm_to_the_bit_and_so_do_its_statistics(name: str) -> None:
    make, shape = LAYERS[name]
    model = nn.Sequential(make())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    found = lowered(model)
    assert not found.graph.find_nodes(op="call_module")
    assert list(found.state_dict()) == list(model.state_dict())
    for training in (True, True, False, True, False):
        model.train(training)
        found.train(training)
        x = torch.randn(shape)
        torch.testing.assert_close(results(found, x), results(model, x), rtol=0, atol=0)
        torch.testing.assert_close(dict(found.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_statistics_that_are_switched_off_later_are_used_and_no_longer_follow() -> None:
    layer = nn.BatchNorm1d(4)
    layer(torch.randn(VECTORS))
    layer.track_running_stats = False
    model = nn.Sequential(layer)
    found = lowered(model)
    for training in (True, False):
        x = torch.randn(VECTORS)
        assert torch.equal(found.train(training)(x), model.train(training)(x))
    torch.testing.assert_close(dict(found.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["batch, of images", "instance, of volumes"])
def test_an_input_that_the_norm_refuses_is_refused(name: str) -> None:
    model = nn.Sequential(LAYERS[name][0]())
    with pytest.raises(ValueError, match="expected"):
        model(torch.zeros(VECTORS))
    with pytest.raises(InputError, match="_norm: expected an input of"):
        lowered(model)(torch.zeros(VECTORS))


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        capture,
        lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    ],
    ids=["deepcopy", "pickle", "capture", "compile"],
)
def test_a_lowered_norm_survives(again: Callable[[Any], Any]) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4))
    found = again(lowered(model))
    if hasattr(found, "graph"):
        assert len(found.graph.find_nodes(op="call_function", target=batch_norm)) == 1
    for training in (True, False):
        x = torch.randn(VECTORS)
        torch.testing.assert_close(results(found.train(training), x), results(model.train(training), x))
    (count,) = (value for name, value in found.state_dict().items() if name.endswith("num_batches_tracked"))
    assert count == 1


def test_a_lowered_norm_can_be_exported() -> None:
    found = lowered(nn.Sequential(nn.BatchNorm1d(4), nn.GroupNorm(2, 4))).eval()
    x = torch.randn(VECTORS)
    torch.testing.assert_close(torch.export.export(found, (x,)).module()(x), found(x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_can_be_wrapped(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    found = lowered(nn.Sequential(layer))
    (site,) = find_norms(found)
    found.register_buffer("signs", torch.ones(site.parameter.shape))
    Lowering(found).wrap_weight([site], constrain_sign, ("signs", "sign"), "signed")
    found.recompile()
    (wrapper,) = found.graph.find_nodes(op="call_function", target=constrain_sign)
    assert wrapper.name == "_0_signed"
    (site,) = find_norms(found)
    assert (site.weight_node, site.lowering_blocker, site.layer) == (wrapper, None, "0")
    x = torch.randn(shape)
    with torch.no_grad():
        layer.weight.clamp_(min=0)  # type: ignore[operator]
    assert torch.equal(found(x), layer(x))


def test_a_norm_called_twice_is_wrapped_once() -> None:
    layer = nn.BatchNorm1d(4)
    found = lowered(nn.Sequential(layer, nn.ReLU(), layer))
    found.register_buffer("signs", torch.ones(4))
    Lowering(found).wrap_weight(find_norms(found), constrain_sign, ("signs", "sign"), "signed")
    (wrapper,) = found.graph.find_nodes(op="call_function", target=constrain_sign)
    assert [user.target for user in wrapper.users] == [batch_norm] * 2


def test_functions_called_with_a_parameter_are_found() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Any:
            x = F.layer_norm(x, (4,), self.gain)
            x = F.batch_norm(x, self.mean, self.var, weight=self.gain)  # type: ignore[arg-type]
            return F.group_norm(x, 2)

    found = find_norms(capture(Functional()))
    assert [(site.node.name, site.parameter_path, site.lowering_blocker) for site in found] == [
        ("layer_norm", "gain", None),
        ("batch_norm", "gain", None),
    ]


def test_norms_are_no_weight_sites() -> None:
    captured = lowered(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)))
    assert [site.layer for site in find_sites(captured).found] == ["0"]
    assert [site.layer for site in find_norms(captured)] == ["1", "2"]


def test_norms_without_a_weight_are_not_found() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.InstanceNorm1d(4), nn.Linear(4, 4))
    assert find_norms(capture(model)) == []


class OwnForward(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def with_hook() -> nn.Module:
    layer = nn.LayerNorm(4)
    layer.register_forward_hook(lambda *given: None)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_hook, "it has forward hooks"),
        (lambda: OwnForward(4), "OwnForward has a forward of its own, not LayerNorm's"),
        (lambda: parametrizations.weight_norm(nn.LayerNorm((4, 4))), None),
        (lambda: nn.SyncBatchNorm(4), "SyncBatchNorm takes its moments over all processes"),
    ],
)
def test_what_cannot_be_lowered_is_left_alone_with_the_reason(
    make: Callable[[], nn.Module], reason: str | None
) -> None:
    captured = capture(nn.Sequential(make()), opaque=["0"])
    found = find_norms(captured)
    if reason is None:  # it has no weight to show
        assert found == []
        return
    assert reason in str(found[0].lowering_blocker)
    with pytest.raises(PassError, match="cannot be lowered"):
        lower_norm(Lowering(captured), found[0])


def test_a_weight_that_something_else_reads_is_an_obstacle() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Any:
            return self.norm(x), self.norm.weight.norm()

    (site,) = find_norms(capture(Penalised()))
    assert site.lowering_blocker == "its weight is also read by 'norm_1', which would not follow"
