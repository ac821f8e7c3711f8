from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.layers.lowering import Lowering
from biofx.layers.sites import find_sites
from biofx.operators.sign_ops import constrain_sign
from biofx.passes import ConstrainSigns
from biofx.plasticity import BioModule
from biofx.rewriting.gains import fold_negative_gains, shared_parameters


def shaken(norm: Any) -> Any:
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if norm.running_mean is not None:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.no_grad():
        norm.weight[0] = -norm.weight[0].abs()
        norm.weight[1] = norm.weight[1].abs()
    return norm


def folded(model: nn.Module) -> tuple[biofx.BioGraphModule, dict[str, int]]:
    bio = biofx.capture(model)
    layers = {site.node: site for site in find_sites(bio).found}
    return bio, fold_negative_gains(Lowering(bio), set(bio.graph.nodes), layers)


LAYERS: dict[str, tuple[nn.Module, Any, Tensor]] = {
    "linear": (nn.Linear(3, 4), nn.BatchNorm1d(4), torch.randn(6, 3)),
    "no bias": (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), torch.randn(6, 3)),
    "conv1d": (nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), torch.randn(3, 3, 5)),
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), torch.randn(3, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), torch.randn(3, 4, 3, 3)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), torch.randn(2, 2, 3, 3, 3)),
    "no moments": (nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), torch.randn(6, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_folding_leaves_outputs_and_moments_as_they_are(name: str) -> None:
    layer, norm, x = LAYERS[name]
    model = nn.Sequential(layer, shaken(norm), nn.ReLU())
    negative = int((norm.weight < 0).sum())
    kept = {path: value.clone() for path, value in model.state_dict().items()}
    bio, counts = folded(model)
    assert counts == {"1.weight": negative}
    assert negative > 0
    assert bool((bio.get_parameter("1.weight") > 0).all())
    model.eval()
    bio.eval()
    torch.testing.assert_close(bio(x), model(x))
    assert all(torch.equal(value, kept[path]) for path, value in model.state_dict().items())
    model.train()
    bio.train()
    torch.testing.assert_close(bio(x), model(x))
    turn = torch.where(kept["1.weight"] < 0, -1.0, 1.0)
    if norm.running_mean is not None:
        torch.testing.assert_close(bio.get_buffer("1.running_mean"), norm.running_mean * turn)
        torch.testing.assert_close(bio.get_buffer("1.running_var"), norm.running_var)


class _Branching(nn.Module):
    """A layer whose output goes into a normalisation and around it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Linear(3, 4), shaken(nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.n(y) + y  # type: ignore[no-any-return]


class _BiasElsewhere(nn.Module):
    """A bias that something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Linear(3, 4), shaken(nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x)) + self.a.bias  # type: ignore[no-any-return]


class _Twice(nn.Module):
    """A normalisation that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Linear(4, 4), shaken(nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(F.relu(self.n(x))))  # type: ignore[no-any-return]


def _shared_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), shaken(nn.BatchNorm1d(4)), nn.ReLU(), nn.Linear(4, 4))
    model[3].bias = model[0].bias
    return model


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (_Branching(), torch.randn(5, 3)),
        (_BiasElsewhere(), torch.randn(5, 3)),
        (_Twice(), torch.randn(5, 4)),
        (_shared_bias(), torch.randn(5, 4)),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), shaken(nn.BatchNorm1d(4))), torch.randn(5, 3)),
    ],
    ids=["branch", "bias read elsewhere", "norm called twice", "bias of two layers", "nonlinearity between"],
)
def test_what_cannot_be_folded_is_left_alone(model: nn.Module, x: Tensor) -> None:
    bio, counts = folded(model)
    assert not any(counts.values())
    for path, value in model.state_dict().items():
        assert torch.equal(bio.state_dict()[path], value)
    torch.testing.assert_close(bio.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_shared_parameters_are_those_with_two_readers() -> None:
    bio = biofx.capture(_shared_bias())
    assert shared_parameters(bio) == {id(bio.get_parameter("0.bias"))}
    bio = biofx.capture(_BiasElsewhere())
    assert shared_parameters(bio) == {id(bio.get_parameter("a.bias"))}
    assert shared_parameters(biofx.capture(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))) == set()


def right_signed(bio: biofx.BioGraphModule, model: nn.Module) -> None:
    """Give the weights of a model the signs that its transformed copy has."""
    for state in bio.modules():
        if isinstance(state, BioModule) and state.is_constrained:
            with torch.no_grad():
                weight = model.get_parameter(state.path)
                weight.copy_(weight.abs() * state.signs())


def test_a_model_with_the_right_signs_keeps_its_function() -> None:
    norm = shaken(nn.BatchNorm2d(4))
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    )
    x = torch.randn(4, 1, 5, 5)
    options: dict[str, Any] = {"initialisation": "keep", "constrain_readout": True}
    right_signed(biofx.transform(model, passes=ConstrainSigns(**options))[0], model)
    bio, report = biofx.transform(model, passes=ConstrainSigns(**options))
    for is_training in (False, True, False):
        torch.testing.assert_close(bio.train(is_training)(x), model.train(is_training)(x))
    (told,) = [remark for remark in report.remarks if remark.layer == "1"]
    assert told.kind == "applied"
    assert told.details["folded"] == int((norm.weight < 0).sum())
    assert told.details["wrong"] == 0


def effective_gains(bio: biofx.BioGraphModule, x: Tensor) -> list[Tensor]:
    """The gains that normalisations compute with, read while the graph runs."""
    found = []

    class Reader(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is constrain_sign and result.dim() == 1:
                found.append(result.detach())
            return result

    Reader(bio).run(x)
    return found


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(2, channels)])
def test_gains_stay_at_or_above_zero_in_training(kind: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 4, 3), kind(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.1, -0.1, 0.2, -0.2]))
    bio, _ = biofx.transform(model, passes=ConstrainSigns(constrain_readout=True))
    x = torch.randn(6, 1, 5, 5)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.5)
    below = 0
    for _ in range(10):
        optimizer.zero_grad()
        bio(x).sum().backward()
        optimizer.step()
        below += int((bio.get_parameter("1.weight") < 0).sum())
        (gains,) = effective_gains(bio, x)
        assert bool((gains >= 0).all())
    assert below > 0  # training would have pushed them there


def test_gains_that_cannot_be_folded_are_said() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight[:2] = -1
    _, report = biofx.transform(model, passes=ConstrainSigns(constrain_readout=True))
    (told,) = [remark for remark in report.remarks if remark.layer == "1"]
    assert told.details == {"folded": 0, "wrong": 2}
    assert "2 are held at 0" in told.message
