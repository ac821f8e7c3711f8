from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.operators.sign_ops import constrain_sign
from biofx.passes import ConstrainSigns, ExpandUnits
from biofx.plasticity import BioModule
from tests.analysis.nets import Net

RELATIVE = 1e-5
"""What outputs may differ by, relative to the largest."""


def _mlp(m: Any, x: Tensor) -> Tensor:
    return m.c(m.drop(F.relu(m.norm(m.b(F.relu(m.a(x)))))))  # type: ignore[no-any-return]


def _residual(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n0(m.stem(x)))
    x = F.relu(x + m.n1(m.conv(x)))
    return m.fc(m.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


def _dense(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    x = torch.cat([x, m.drop(F.relu(m.n(m.grow(x))))], 1)
    x = torch.cat([x, F.relu(m.more(x))], 1)
    return m.fc(torch.flatten(F.max_pool2d(x, 2), 1))  # type: ignore[no-any-return]


def _unet(m: Any, x: Tensor) -> Tensor:
    first = F.relu(m.a(x))
    low = F.relu(m.b(F.avg_pool2d(first, 2)))
    return m.c(torch.cat([F.relu(m.up(low)), first], 1))  # type: ignore[no-any-return]


def _grouped(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.pool(F.relu(m.norm(m.b(F.relu(m.a(x)))))).flatten(1))  # type: ignore[no-any-return]


def _gate(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    x = x * torch.sigmoid(m.g(x.mean((2, 3), keepdim=True)))
    return m.fc(m.drop(x.flatten(1)))  # type: ignore[no-any-return]


def _conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    images, vectors = torch.randn(4, 1, 6, 6), torch.randn(6, 5)
    return {
        "mlp": (
            Net(
                _mlp,
                a=nn.Linear(5, 8),
                b=nn.Linear(8, 7),
                norm=nn.BatchNorm1d(7),
                drop=nn.Dropout(0.4),
                c=nn.Linear(7, 3),
            ),
            vectors,
        ),
        "layer norm": (
            Net(
                _mlp,
                a=nn.Linear(5, 8),
                b=nn.Linear(8, 7),
                norm=nn.LayerNorm(7),
                drop=nn.Dropout(),
                c=nn.Linear(7, 3),
            ),
            vectors,
        ),
        "residual": (
            Net(
                _residual,
                stem=_conv(1, 6),
                n0=nn.BatchNorm2d(6),
                conv=_conv(6, 6, bias=False),
                n1=nn.BatchNorm2d(6),
                drop=nn.Dropout(0.3),
                fc=nn.Linear(6, 4),
            ),
            images,
        ),
        "dense": (
            Net(
                _dense,
                stem=_conv(1, 4),
                grow=_conv(4, 3),
                n=nn.BatchNorm2d(3),
                drop=nn.Dropout2d(0.4),
                more=_conv(7, 2),
                fc=nn.Linear(81, 4),
            ),
            images,
        ),
        "transposed": (
            Net(_unet, a=_conv(1, 4), b=_conv(4, 5), up=nn.ConvTranspose2d(5, 3, 2, stride=2), c=_conv(7, 2)),
            images,
        ),
        "grouped": (
            Net(
                _grouped,
                a=_conv(1, 4),
                b=_conv(4, 8, groups=2),
                norm=nn.BatchNorm2d(8),
                pool=nn.AdaptiveAvgPool2d(2),
                fc=nn.Linear(32, 3),
            ),
            images,
        ),
        "depthwise": (
            Net(
                _grouped,
                a=_conv(1, 4),
                b=_conv(4, 4, groups=4),
                norm=nn.GroupNorm(2, 4),
                pool=nn.MaxPool2d(3),
                fc=nn.Linear(16, 3),
            ),
            images,
        ),
        "gate": (
            Net(_gate, a=_conv(1, 4), g=nn.Conv2d(4, 4, 1), drop=nn.Dropout(0.3), fc=nn.Linear(144, 3)),
            images,
        ),
    }


def expanded(model: nn.Module, **options: Any) -> biofx.PassResult:
    return biofx.transform(model, passes=ExpandUnits(constrain_readout=True, **options))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return model(x)  # type: ignore[no-any-return]


def difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def shaken(model: nn.Module) -> nn.Module:
    """Give normalisations gains of both signs and moments of their own, as training does."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("is_training", [False, True])
def test_function_stays(name: str, is_training: bool, unchanged: Callable[[nn.Module], Any]) -> None:
    model, x = models()[name]
    shaken(model).train(is_training)
    with unchanged(model):
        bio, report = expanded(model)
    doubled = {remark.layer for remark in report.remarks if remark.kind == "applied"}
    assert doubled == {
        path
        for path, module in model.named_modules()
        if hasattr(module, "weight") and module.weight.dim() > 1
    }
    assert difference(outputs(bio, x), outputs(model, x)) < RELATIVE
    model.eval()
    bio.eval()
    assert difference(outputs(bio, x), outputs(model, x)) < RELATIVE
    for path, buffer in model.named_buffers():
        # moments that training left behind are those of the units, once for each copy
        found = bio.get_buffer(path)
        if found.dim():
            for copy_number in range(2):
                torch.testing.assert_close(found[copy_number::2].abs(), buffer.abs())


def test_both_copies_have_the_synapses_onto_the_unit_and_share_those_from_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    bio, _ = expanded(model)
    onto, from_it = bio.get_parameter("0.weight"), bio.get_parameter("2.weight")
    for unit in range(4):
        for copy_number in range(2):
            assert torch.equal(onto[2 * unit + copy_number], model.get_parameter("0.weight")[unit])
        assert torch.equal(from_it[:, 2 * unit], model.get_parameter("2.weight")[:, unit].clamp(min=0))
        assert torch.equal(from_it[:, 2 * unit + 1], model.get_parameter("2.weight")[:, unit].clamp(max=0))
    assert bio.get_buffer("0.bio_mod.sign").tolist() == [1, -1] * 4


def trained(bio: nn.Module, x: Tensor, steps: int = 5) -> nn.Module:
    bio.train()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs(bio, x).square().mean().backward()
        optimizer.step()
    return bio


@pytest.mark.parametrize("name", models())
def test_copies_learn_apart_and_keep_their_signs(name: str) -> None:
    model, x = models()[name]
    bio, _ = biofx.transform(
        model,
        passes=[ExpandUnits(constrain_readout=True), ConstrainSigns(method="expand", constrain_readout=True)],
    )
    assert difference(outputs(bio, x), outputs(model, x)) < RELATIVE
    before = {path: parameter.detach().clone() for path, parameter in bio.named_parameters()}
    trained(bio, x)
    signed = [state for _, state in bio.named_modules() if getattr(state, "is_constrained", False)]
    assert signed
    for path, parameter in bio.named_parameters():
        if parameter.dim() > 1:  # of a bias before a normalisation, the gradient is 0
            assert not torch.equal(parameter, before[path]), path
    apart = 0
    for state in bio.modules():
        if isinstance(state, BioModule) and state.sign is not None:
            weight = state.weight.detach()
            rows = weight.transpose(0, 1) if "up" in state.path else weight
            apart += int((rows[0::2] != rows[1::2]).flatten(1).any(1).sum())
    assert apart > 0
    seen = effective_signs(bio, x)
    assert len(seen) == len(signed)
    for weight, signs in seen:
        assert not bool((weight * signs < 0).any())


def effective_signs(bio: biofx.BioGraphModule, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The weight that each constrained layer computes with, and the signs laid out over it."""
    weights: dict[str, Tensor] = {}

    class Reader(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is constrain_sign:
                path = next(a for a in n.all_input_nodes if a.op == "get_attr").target
                weights[str(path)] = result.detach()
            return result

    Reader(bio).run(x)
    states = {
        state.path: state for state in bio.modules() if isinstance(state, BioModule) and state.is_constrained
    }
    return [(weight, states[path].signs()) for path, weight in weights.items() if path in states]


def _named_view(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)).view(-1, 144))  # type: ignore[no-any-return]


def _output_too(m: Any, x: Tensor) -> Any:
    hidden = F.relu(m.a(x))
    return m.b(hidden), hidden


def _parameter_added(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x) + m.shift))  # type: ignore[no-any-return]


def _recurrent(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)[0])  # type: ignore[no-any-return]


def _opaque(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.cumsum(F.relu(m.a(x)), 1))  # type: ignore[no-any-return]


def _chunked(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, -1)
    return m.b(left * torch.sigmoid(right))  # type: ignore[no-any-return]


def _into_the_unknown(m: Any, x: Tensor) -> Tensor:
    hidden = F.relu(m.a(x))
    return m.b(hidden) + torch.cumsum(hidden, 1).sum()  # type: ignore[no-any-return]


def _functional_dropout(m: Any, x: Tensor) -> Tensor:
    return m.b(F.dropout(F.relu(m.a(x)), 0.5, m.training))  # type: ignore[no-any-return]


def _tied() -> nn.Module:
    model: Any = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)
    )
    model.b.weight = model.a.weight
    return model  # type: ignore[no-any-return]


def _shifted() -> nn.Module:
    model = Net(_parameter_added, a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    model.shift = nn.Parameter(torch.randn(4))
    return model


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def _tied_biases() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    return model


def _bare() -> nn.Module:
    model = Net(lambda m, x: F.linear(F.relu(F.linear(x, m.w, m.shift)), m.v))
    for name, shape in {"w": (4, 5), "shift": (4,), "v": (3, 4)}.items():
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    return model


def _between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Net(lambda m, x: m.b(function(F.relu(m.a(x)))), a=_conv(1, 4), b=_conv(4, 2))


def refused() -> dict[str, tuple[nn.Module, Tensor, str]]:
    vectors = torch.randn(3, 5)
    images = torch.randn(2, 1, 6, 6)
    two: dict[str, nn.Module] = {"a": nn.Linear(5, 4), "b": nn.Linear(4, 2)}
    return {
        "view": (
            Net(_named_view, a=_conv(1, 4), b=nn.Linear(144, 2)),
            images,
            "names a number of channels; write -1",
        ),
        "output": (Net(_output_too, **two), vectors, "an output of the model"),
        "parameter": (_shifted(), vectors, "together with 'shift'"),
        "recurrent": (Net(_recurrent, a=nn.GRU(5, 4), b=nn.Linear(4, 2)), vectors, "GRU has several weights"),
        "opaque": (Net(_opaque, **two), vectors, "no layer makes its units"),
        "chunk": (Net(_chunked, a=nn.Linear(5, 8), b=nn.Linear(4, 2)), vectors, "made for a certain number"),
        "unknown": (Net(_into_the_unknown, **two), vectors, "behind which they are not known"),
        "dropout": (Net(_functional_dropout, **two), vectors, "use nn.Dropout"),
        "tied": (_tied(), torch.randn(3, 4), "no layer makes its units"),
        "tied biases": (_tied_biases(), vectors, "its bias is not the layer's alone"),
        "bias of another name": (_bare(), vectors, "its bias is not the layer's alone"),
        "size": (_between(lambda x: x / x.shape[1]), images, "together with"),
        "gain by size": (_between(lambda x: x * x.size(1)), images, "together with"),
        "layer norm called": (
            Net(lambda m, x: m.b(F.layer_norm(m.a(x), (4,))), **two),
            vectors,
            "not one of torch's modules",
        ),
        "root mean square": (
            nn.Sequential(nn.Linear(5, 4), nn.RMSNorm(4, elementwise_affine=False), nn.Linear(4, 2)),
            vectors,
            "not one of torch's modules",
        ),
        "neighbours": (_between(lambda x: F.local_response_norm(x, 3)), images, "not one of torch's modules"),
        "unit length": (_between(lambda x: F.normalize(x, dim=1)), images, "made for a certain number"),
        "moments of instances": (
            nn.Sequential(_conv(1, 4), nn.InstanceNorm2d(4, track_running_stats=True), _conv(4, 2)),
            images,
            "not one of torch's modules",
        ),
        "norm of a flattened map": (
            nn.Sequential(_conv(1, 4), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 2)),
            images,
            "normalises the entries of a flattened map",
        ),
        "norm called twice": (
            Net(
                lambda m, x: m.b(F.relu(m.n(m.c(F.relu(m.n(m.a(x))))))),
                a=_conv(1, 4),
                b=_conv(4, 2),
                c=_conv(4, 4),
                n=nn.BatchNorm2d(4),
            ),
            images,
            "called more than once",
        ),
        "random slopes": (nn.Sequential(_conv(1, 4), nn.RReLU(), _conv(4, 2)), images, "use nn.Dropout"),
        "parametrised": (_hooked(), vectors, "parametriz"),
        "prelu": (nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 2)), vectors, "a slope for each"),
    }


@pytest.mark.parametrize("name", refused())
def test_what_cannot_be_expanded_is_left_as_it_is_and_said(name: str) -> None:
    model, x, words = refused()[name]
    bio, report = expanded(model)
    torch.testing.assert_close(outputs(bio, x), outputs(model, x), rtol=0, atol=0)
    for path, buffer in bio.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(path), rtol=0, atol=0)
    assert biofx.format_graph(bio) == biofx.format_graph(biofx.capture(model))
    assert not report.modified
    assert any(words in remark.message for remark in report.remarks), [r.message for r in report.remarks]
    assert {path: p.shape for path, p in bio.named_parameters()} == {
        path: p.shape for path, p in model.named_parameters()
    }


def test_units_that_only_a_readout_reads_are_left_alone_unless_asked_for() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    bio, report = biofx.transform(model, passes=ExpandUnits())
    assert bio.get_parameter("0.weight").shape == (8, 3)
    assert bio.get_parameter("2.weight").shape == (5, 8)
    assert bio.get_parameter("4.weight").shape == (2, 5)
    (told,) = [remark for remark in report.remarks if remark.layer == "4"]
    assert told.kind == "missed"
    assert "constrain_readout=False" in told.message


# torch.compile instantiates autograd functions itself, and warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "survive",
    [
        copy.deepcopy,
        lambda bio: pickle.loads(pickle.dumps(bio)),
        torch.fx.symbolic_trace,
        lambda bio: torch.compile(bio, backend="aot_eager", fullgraph=True),
        lambda bio: torch.export.export(bio.eval(), (torch.randn(6, 5),)).module(),
    ],
    ids=["deepcopy", "pickle", "tracing again", "compile", "export"],
)
def test_it_survives(survive: Callable[[Any], Any]) -> None:
    model, x = models()["mlp"]
    shaken(model)
    bio, _ = expanded(model)
    bio.eval()
    survivor = survive(copy.deepcopy(bio))
    assert difference(outputs(survivor, x), outputs(model.eval(), x)) < RELATIVE
    outputs(survivor, x).square().sum().backward()
    outputs(bio, x).square().sum().backward()
    for path, parameter in survivor.named_parameters():
        torch.testing.assert_close(parameter.grad, bio.get_parameter(path.removeprefix("_orig_mod.")).grad)


def test_dropout_follows_the_mode_after_a_deepcopy() -> None:
    model, x = models()["mlp"]
    bio, _ = expanded(model)
    other = copy.deepcopy(bio)
    assert difference(outputs(other, x), outputs(model, x)) < RELATIVE
    assert difference(outputs(other.eval(), x), outputs(model.eval(), x)) < RELATIVE
    assert difference(outputs(bio, x), outputs(other, x)) > 0.01


def test_state_goes_into_a_second_expanded_copy() -> None:
    model, x = models()["residual"]
    bio, _ = expanded(model)
    trained(bio, x)
    other, _ = expanded(models()["residual"][0])
    other.load_state_dict(bio.state_dict())
    torch.testing.assert_close(outputs(other.eval(), x), outputs(bio.eval(), x), rtol=0, atol=0)
    assert torch.equal(other.get_buffer("stem.bio_mod.sign"), bio.get_buffer("stem.bio_mod.sign"))


def test_constrained_copy_takes_no_second_expansion() -> None:
    model, x = models()["dense"]
    passes = [ExpandUnits(constrain_readout=True), ConstrainSigns(method="expand", constrain_readout=True)]
    bio, _ = biofx.transform(model, passes=passes)
    again, report = biofx.transform(bio, passes=ExpandUnits(constrain_readout=True))
    assert not report.modified
    assert difference(outputs(again, x), outputs(bio, x)) == 0


def test_second_expansion_keeps_the_function_or_does_nothing() -> None:
    model, x = models()["residual"]
    bio, _ = expanded(model)
    again, _ = expanded(bio)
    assert difference(outputs(again.eval(), x), outputs(model.eval(), x)) < RELATIVE


@st.composite
def nets(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Convolutional nets of blocks drawn at random."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    width = draw(st.sampled_from([2, 4]))
    blocks = draw(
        st.lists(st.sampled_from(["plain", "norm", "residual", "grow", "pool", "drop", "group"]), max_size=5)
    )
    layers: dict[str, nn.Module] = {"stem": _conv(1, width)}
    channels = width
    for number, block in enumerate(blocks):
        name = f"{block}{number}"
        if block in ("plain", "norm", "residual", "group"):
            groups = 2 if block == "group" else 1
            layers[name] = _conv(channels, channels, groups=groups)
            layers[f"{name}_norm"] = nn.BatchNorm2d(channels) if block != "plain" else nn.Identity()
        elif block == "grow":
            layers[name] = _conv(channels, 2)
            channels += 2
        elif block == "drop":
            layers[name] = draw(st.sampled_from([nn.Dropout(0.3), nn.Dropout2d(0.3)]))
    is_flat = draw(st.booleans())
    layers["fc"] = nn.Linear(channels * (16 if is_flat else 1), 3)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        for number, block in enumerate(blocks):
            name = f"{block}{number}"
            if block == "pool":
                x = F.avg_pool2d(x, 3, 1, 1)
            elif block == "drop":
                x = getattr(m, name)(x)
            elif block == "grow":
                x = torch.cat([F.relu(getattr(m, name)(x)), x], 1)
            else:
                y = getattr(m, f"{name}_norm")(getattr(m, name)(x))
                x = F.relu(x + y if block == "residual" else y)
        return m.fc(x.flatten(1) if is_flat else x.mean((2, 3)))  # type: ignore[no-any-return]

    return shaken(Net(forward, **layers)), torch.randn(3, 1, 4, 4)


@settings(max_examples=25, deadline=None)
@given(nets(), st.booleans())
def test_function_of_any_net_stays(net: tuple[nn.Module, Tensor], is_training: bool) -> None:
    model, x = net
    model.train(is_training)
    bio, report = expanded(model)
    assert report.modified
    expected = outputs(model, x)
    assert difference(outputs(bio, x), expected) < 5 * RELATIVE
    assert difference(outputs(bio.eval(), x), outputs(model.eval(), x)) < 5 * RELATIVE


def test_bad_option_is_refused() -> None:
    with pytest.raises(biofx.OptionError, match="expand-units: constrain_readout: expected"):
        ExpandUnits(constrain_readout=1)  # type: ignore[arg-type]


def shared_negative_gain() -> nn.Module:
    """A normalisation whose negative gain cannot be folded: two layers are added up before it."""
    model = Net(
        lambda m, x: m.d(torch.relu(m.c(torch.relu(m.n(m.a(x) + m.b(x)))))),
        a=nn.Conv2d(1, 4, 1),
        b=nn.Conv2d(1, 4, 1),
        n=nn.BatchNorm2d(4),
        c=nn.Conv2d(4, 4, 1),
        d=nn.Conv2d(4, 2, 1),
    )
    with torch.no_grad():
        model.get_parameter("n.weight").copy_(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    return model


def test_expanding_one_layer_alone_leaves_negative_gains_that_cannot_be_folded() -> None:
    model = shared_negative_gain()
    config = biofx.BioConfig(apply_dales_principle=False, fuzzy_learning_rate_factor_nu=0)
    chosen = config.override(
        ["a", "b", "n", "c"], apply_dales_principle=True, dales_method="expand", dales_initialisation="keep"
    )
    bio, report = biofx.transform(model, chosen)
    x = torch.randn(3, 1, 5, 5)
    for training in (True, False):
        torch.testing.assert_close(bio.train(training)(x), model.train(training)(x))
    told = {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}
    assert "4 of its gains are negative" in told["n"]  # two, each in both copies


def test_negative_gains_outside_the_selection_are_not_folded() -> None:
    model = Net(
        lambda m, x: m.d(torch.relu(m.c(torch.relu(m.n(m.a(x)))))),
        a=nn.Conv2d(1, 4, 1),
        n=nn.BatchNorm2d(4),
        c=nn.Conv2d(4, 4, 1),
        d=nn.Conv2d(4, 2, 1),
    )
    with torch.no_grad():
        model.get_parameter("n.weight").copy_(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    bio, _ = biofx.transform(model, passes="expand-units", exclude="n")
    expected = model.get_parameter("n.weight").detach().repeat_interleave(2)
    assert torch.equal(bio.get_parameter("n.weight"), expected)
    x = torch.randn(3, 1, 5, 5)
    torch.testing.assert_close(bio.eval()(x), model.eval()(x))
