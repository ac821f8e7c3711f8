from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import biofx
from biofx import BioConfig, passes
from biofx.errors import InputError, PassError

EVERYTHING = BioConfig(
    weight_splitting_Gamma=2,
    apply_dales_principle=True,
    dales_constrain_inputs=True,
    dales_constrain_readout=True,
    fuzzy_lr_distribution=biofx.Distribution.ACTIVITY,
    fuzzy_lr_dynamic=True,
)


class Net(nn.Module):
    """Convolutions of all sorts, batch normalisation, dropout of both kinds, shared and tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 8, 4, stride=2, padding=1, groups=2)
        self.down = nn.Conv1d(8, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.2)
        self.twice = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.twice.weight
        self.raw = nn.Parameter(torch.randn(6, 16))
        self.out = nn.Linear(6, 2)
        self.register_buffer("scale", torch.full((4, 1), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(torch.relu(self.stem(x))))
        y = self.drop(torch.relu(self.norm(self.down(y)))) * self.scale
        y = nn.functional.dropout(y.flatten(1), 0.3, self.training)
        y = torch.relu(self.tied(torch.relu(self.twice(torch.relu(self.twice(y))))))
        return self.out(torch.relu(nn.functional.linear(y, self.raw)))  # type: ignore[no-any-return]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1))


def trained(config: Any = EVERYTHING, **options: Any) -> Any:
    """A transformed model some steps on, so that weights, signs and running means are not the first ones."""
    bio_model, _ = biofx.transform(Net(), config, **options)
    optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        bio_model(torch.randn(8, 2, 4)).square().mean().backward()
        optimizer.step()
    return bio_model


def names_of_biofx(model: nn.Module) -> list[str]:
    """Whatever in a model is biofx's."""
    things: list[Any] = [*map(type, model.modules())]
    if isinstance(model, GraphModule):
        things += [node.target for node in model.graph.nodes]
    values = [value for module in model.modules() for value in vars(module).values()]
    things += map(type, values)
    found = [str(thing) for thing in things if str(getattr(thing, "__module__", "")).startswith("biofx")]
    return found + [key for key in model.state_dict() if "bio_mod" in key]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"config": EVERYTHING.replace(dales_method="abs", weight_splitting_Gamma=4)},
        {"config": EVERYTHING.replace(dales_axis="postsynaptic")},
        {"config": EVERYTHING.replace(weight_splitting_activation_function=nn.LeakyReLU(0.1))},
        {"config": {}, "passes": "split-weights{activation=torch.tanh}"},
        {"config": {"fuzzy_lr_distribution": "baseline"}},
        {"passes": passes.ConstrainSigns(only="twice#1", constrain_inputs=True)},
        {"passes": passes.SplitWeights(only=["up", "twice#0"])},
        {"opaque": ["norm"]},
    ],
)
def test_a_deployed_model_computes_the_same_and_holds_nothing_of_biofx(
    options: dict[str, Any], x: Tensor
) -> None:
    bio_model = trained(**options)
    bio_model.train()
    before = copy.deepcopy(bio_model.state_dict())
    deployed = biofx.deploy(bio_model)
    assert bio_model.training
    for key, value in bio_model.state_dict().items():
        assert torch.equal(value, before[key])
    assert type(deployed).__mro__[1] is GraphModule
    assert names_of_biofx(deployed) == []
    assert not deployed.training
    expected = bio_model.eval()(x)
    torch.testing.assert_close(deployed(x), expected)
    shared = {p.untyped_storage().data_ptr() for p in bio_model.state_dict().values()}
    assert not shared & {p.untyped_storage().data_ptr() for p in deployed.state_dict().values()}
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.zero_()
    assert torch.equal(bio_model(x), expected)


def test_layers_are_ordinary_modules_under_their_names_again() -> None:
    deployed = biofx.deploy(trained(EVERYTHING.replace(weight_splitting_Gamma=0)))
    found = {node.target: type(deployed.get_submodule(str(node.target))).__name__ for node in calls(deployed)}
    assert found == {
        "stem": "Conv1d",
        "up": "ConvTranspose1d",
        "down": "Conv1d",
        "norm": "BatchNorm1d",
        "drop": "Dropout",
        "twice": "Linear",
        "tied": "Linear",
        "out": "Linear",
    }
    assert set(deployed.state_dict()) <= set(Net().state_dict()) | {"raw_1"}
    assert deployed.get_submodule("tied").weight is deployed.get_submodule("twice").weight


def calls(model: Any) -> list[Any]:
    return [node for node in model.graph.nodes if node.op == "call_module"]


def test_a_layer_whose_calls_see_different_weights_becomes_two(x: Tensor) -> None:
    rule = passes.ConstrainSigns(only="twice#1", constrain_inputs=True, excitatory_fraction=1.0)
    bio_model = trained(None, passes=rule)
    deployed = biofx.deploy(bio_model)
    paths = [node.target for node in calls(deployed) if str(node.target).startswith("twice")]
    assert paths == ["twice", "twice_1"]
    first, second = (deployed.get_parameter(f"{path}.weight") for path in paths)
    assert torch.equal(first, bio_model.get_parameter("twice.weight"))
    assert torch.equal(second, first.clamp(min=0))
    assert (first < 0).any()


def test_converted_models_deploy_too(x: Tensor) -> None:
    converted = biofx.BioConverter(EVERYTHING)(Net()).eval()
    deployed = biofx.deploy(converted)
    torch.testing.assert_close(deployed(x), converted(x))
    assert names_of_biofx(deployed) == []


LOADED = """
import sys
sys.modules["biofx"] = None  # an import of it fails
import torch
model = torch.load(sys.argv[1], weights_only=False)
scripted = torch.jit.load(sys.argv[2])
x, expected = torch.load(sys.argv[3])
torch.testing.assert_close(model(x), expected)
torch.testing.assert_close(scripted(x), expected)
assert not [name for name in sys.modules if name.startswith("biofx.")]
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
def test_a_process_without_biofx_loads_and_runs_it(x: Tensor, tmp_path: Path) -> None:
    bio_model = trained()
    deployed = biofx.deploy(bio_model)
    files = [str(tmp_path / name) for name in ("model.pt", "scripted.pt", "expected.pt")]
    torch.save(deployed, files[0])
    torch.jit.script(deployed).save(files[1])
    torch.save((x, bio_model.eval()(x).detach()), files[2])
    command = [sys.executable, "-W", "ignore", "-c", LOADED, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_it_exports(x: Tensor) -> None:
    bio_model = trained()
    deployed = biofx.deploy(bio_model)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(deployed, (x,), dynamic_shapes=({0: batch},))
    assert "biofx" not in str(program)
    more = torch.randn(9, 2, 4)
    torch.testing.assert_close(program.module()(more), bio_model.eval()(more))


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs biofx[onnx]")
@pytest.mark.filterwarnings("ignore")
def test_it_runs_in_onnxruntime(x: Tensor, tmp_path: Path) -> None:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    bio_model = trained()
    torch.onnx.export(biofx.deploy(bio_model), (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), bio_model.eval()(x))


class Rude(nn.Module):
    """Draws a number, or counts its calls, in every forward."""

    count: Tensor

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.counts = counts

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.count += 1
            return self.layer(x) * self.count  # type: ignore[no-any-return]
        return self.layer(x) + torch.rand(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("counts", "match"), [(True, "writes to a tensor"), (False, "draws random numbers")])
def test_what_saving_would_freeze_is_refused(counts: bool, match: str) -> None:
    bio_model, _ = biofx.transform(Rude(counts), passes="scale-gradients")
    with pytest.raises(PassError, match=match):
        biofx.deploy(bio_model)


def test_what_has_no_plain_form_is_refused() -> None:
    bio_model, _ = biofx.transform(Net(), passes="scale-gradients")
    bio_model.add_module("stranger", biofx.BioModule(nn.Linear(2, 2)))
    with bio_model.graph.inserting_after(next(iter(bio_model.graph.nodes))):
        node = bio_model.graph.call_module("stranger", (next(iter(bio_model.graph.nodes)),))
    output = bio_model.graph.output_node()
    output.args = ((output.args[0], node),)
    with pytest.raises(PassError, match="'stranger' belongs to biofx and has no plain form"):
        biofx.deploy(bio_model)
    with pytest.raises(InputError, match=r"found a Net; use biofx\.transform"):
        biofx.deploy(Net())


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layer(x) if mask is None else self.layer(x) * mask  # type: ignore[no-any-return]


class Middle(Masked):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return super().forward(x, mask) * scale


def test_an_argument_that_was_left_out_cannot_be_given() -> None:
    bio_model, _ = biofx.transform(Masked(), passes="scale-gradients")
    deployed = biofx.deploy(bio_model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(deployed(x), bio_model(x))
    with pytest.raises(TypeError):
        deployed(x, torch.ones(4))
    bio_model, _ = biofx.transform(Middle(), passes="scale-gradients")
    with pytest.raises(PassError, match="argument 'mask' must have its default"):
        biofx.deploy(bio_model)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("path", ["", "norm"])
def test_hooks_of_the_model_and_of_its_layers_stay(path: str, x: Tensor) -> None:
    model = Net()
    model.get_submodule(path).register_forward_hook(double)
    bio_model = biofx.transform(model, EVERYTHING).graph_module.eval()
    torch.testing.assert_close(biofx.deploy(bio_model)(x), bio_model(x))


def doubled_gradient(module: nn.Module, given: Any, found: Any) -> Any:
    return (given[0] * 2,)


class Steps(nn.Module):
    """A loop that stays in Python, so that its layer is a region of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        for _ in range(1 + int(x.shape[0] > 2)):
            x = self.layer(x)
        return x


@pytest.mark.parametrize(
    ("model", "path", "config"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "0", {"fuzzy_lr_distribution": "baseline"}),
        (Steps(), "layer", {"fuzzy_lr_distribution": "baseline"}),
        (Steps(), "layer", {}),
        (Steps(), "layer", {"weight_splitting_Gamma": 2}),
    ],
)
def test_a_hook_that_a_layer_was_given_after_the_transform_acts_in_what_is_deployed(
    model: nn.Module, path: str, config: dict[str, Any]
) -> None:
    bio_model = biofx.transform(model, config).graph_module
    x = torch.randn(2, 4)
    calls: list[nn.Module] = []
    deployed_before = biofx.deploy(bio_model)
    bio_model.get_submodule(path).register_forward_hook(lambda module, given, found: calls.append(module))
    bio_model.get_submodule(path).register_full_backward_hook(doubled_gradient)
    deployed = biofx.deploy(bio_model)
    gradients = []
    for each in (deployed_before, deployed):
        given = x.clone().requires_grad_()
        each(given).sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert calls == [deployed.get_submodule(path)]
    assert torch.equal(gradients[1], gradients[0] * 2)


@pytest.mark.parametrize("config", [{}, {"weight_splitting_Gamma": 2}])
def test_a_hook_that_no_call_would_run_is_not_deployed(config: dict[str, Any]) -> None:
    bio_model = biofx.transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), config).graph_module
    bio_model.get_submodule("0").register_full_backward_hook(doubled_gradient)
    with pytest.raises(biofx.errors.InputError, match=r"'0'.*has backward hooks, which would never run"):
        biofx.deploy(bio_model)


def test_a_backward_hook_of_the_model_acts_in_what_is_deployed() -> None:
    bio_model = biofx.transform(nn.Sequential(nn.Linear(4, 2))).graph_module
    bio_model.register_full_backward_hook(doubled_gradient)
    x = torch.ones(1, 4, requires_grad=True)
    deployed = biofx.deploy(bio_model)
    deployed(x).sum().backward()
    assert x.grad is not None
    weight = deployed.get_parameter("0.weight").detach()
    torch.testing.assert_close(x.grad, 2 * weight.sum(0, keepdim=True))


def test_a_function_that_cannot_be_traced_is_called_as_it_is(x: Tensor) -> None:
    def branching(y: Tensor) -> Tensor:
        return y.tanh() if float(y.detach().sum()) > -1e9 else y

    config = EVERYTHING.replace(weight_splitting_activation_function=branching)
    bio_model = trained(config).eval()
    deployed = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(x), bio_model(x))
    assert names_of_biofx(deployed) == []


def test_what_was_wrapped_is_unwrapped(x: Tensor) -> None:
    bio_model = trained().eval()
    wrap: Callable[..., nn.Module] = nn.DataParallel
    torch.testing.assert_close(biofx.deploy(wrap(bio_model))(x), bio_model(x))


class Sequences(nn.Module):
    """A recurrent layer, attention, and a normalisation over features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.gru = nn.GRU(6, 3, 2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.gru(torch.relu(self.embed(x)))[0])
        z = self.attention(y, y, y, need_weights=False)[0]
        y = self.drop(torch.relu(self.hidden(self.norm(y + torch.relu(z)))))
        return self.out(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["project", "expand"])
def test_recurrent_layers_attention_and_norms_are_modules_with_evaluated_weights(method: str) -> None:
    config = {"apply_dales_principle": True, "dales_method": method, "dales_constrain_readout": True}
    model = Sequences()
    with torch.no_grad():
        model.norm.weight[2] = -1.0
    bio_model = biofx.transform(model, config).graph_module.double()
    with torch.no_grad():
        for parameter in bio_model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    deployed: Any = biofx.deploy(bio_model)
    sequences = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(deployed(sequences), bio_model.eval()(sequences))
    assert names_of_biofx(deployed) == []
    found = {str(node.target): type(deployed.get_submodule(str(node.target))) for node in calls(deployed)}
    expected = {name: type(module) for name, module in Sequences().named_children() if name != "drop"}
    assert found.items() >= expected.items()
    assert not list(deployed.graph.find_nodes(op="get_attr"))
    if method == "project":
        raw = bio_model.get_parameter("gru.weight_hh_l0")
        assert not torch.equal(deployed.get_parameter("gru.weight_hh_l0"), raw)
        assert bool((deployed.get_parameter("norm.weight") >= 0).all())


class Pictures(nn.Module):
    """Convolutions with a normalisation between, whose sums of synapses are folded."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = norm
        self.second = nn.Conv2d(4, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        y = nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.out(torch.relu(self.hidden(y)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 6, 6]),
    ],
)
def test_folded_layers_become_small_ones(norm: nn.Module, fold: bool) -> None:
    config = EVERYTHING.replace(weight_splitting_fold=fold, fuzzy_lr_distribution="uniform")
    bio_model = biofx.transform(Pictures(norm), config).graph_module.double()
    pictures = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    for _ in range(2):
        bio_model(torch.randn(3, 2, 6, 6, dtype=torch.float64))
    deployed = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(pictures), bio_model.eval()(pictures))
    assert names_of_biofx(deployed) == []
    if fold:
        with pytest.raises((AssertionError, ValueError), match=r"4 axes|4D input"):
            deployed(pictures[0])
        assert deployed.get_parameter("hidden.weight").shape == (3, 4)
        assert deployed.get_parameter("second.weight").shape[0] == 4


def test_a_transformer_deploys_as_ordinary_layers() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(4, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.leave = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.leave(self.encoder(self.enter(x)).mean(1))
            return logits

    bio_model = biofx.transform(Encoder(), {"apply_dales_principle": True}).graph_module.eval()
    deployed = biofx.deploy(bio_model)
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(deployed(x), bio_model(x))
    assert names_of_biofx(deployed) == []
    assert isinstance(deployed.get_submodule("encoder.layers.0.self_attn"), nn.MultiheadAttention)


def test_contexts_of_gradients_are_left_out_and_autocast_is_refused() -> None:
    class Teaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                y = self.first(x)
            return self.last(y * self.first(x))

    class Casts(Teaches):
        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return self.last(self.first(x))

    bio_model, _ = biofx.transform(Teaches(), {"fuzzy_learning_rate_factor_nu": 0.2})
    deployed: Any = biofx.deploy(bio_model)
    x = torch.randn(3, 4)
    assert not any("grad_mode" in node.name for node in deployed.graph.nodes)
    torch.testing.assert_close(deployed(x), bio_model.eval()(x))
    with pytest.raises(biofx.errors.PassError, match=r"opens torch\.autocast in the forward"):
        biofx.deploy(biofx.transform(Casts(), {}).graph_module)


def test_what_a_recorded_model_decided_by_sizes_is_checked_by_the_deployed_one() -> None:
    class BySize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            x = torch.relu(self.fc(x))
            return x[:, :1000] if x.shape[1] > 1000 else x

    bio_model, _ = biofx.transform(BySize(), biofx.BioConfig(), example_inputs=(torch.randn(3, 5, 4),))
    assert not bio_model.graph_breaks
    deployed = biofx.deploy(bio_model)
    for shape in ((3, 5, 4), (2, 5, 4), (2, 7, 4)):
        x = torch.randn(shape)
        assert torch.equal(deployed(x), bio_model.eval()(x))
    with pytest.raises(biofx.BiofxError, match="recorded with False, found True"):
        bio_model(torch.randn(3, 1001, 4))
    with pytest.raises(AssertionError, match="expected False, with which the graph was recorded"):
        deployed(torch.randn(3, 1001, 4))


class _Scales(nn.Module):
    """Has a method that a forward around it calls, besides the module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return torch.relu(self.fc(x)) * scale

    def doubled(self, x: Tensor) -> Any:
        return 2 * x


class _CallsMethods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Scales()

    def forward(self, x: Tensor) -> Any:
        for _ in range(int(x.shape[0])):
            x = self.inner.doubled(self.inner(x, 0.5))
        return x


def test_a_region_whose_methods_python_calls_is_refused_or_stays_opaque() -> None:
    x, config = torch.randn(3, 4), BioConfig(fuzzy_learning_rate_factor_nu=0.2)
    bio_model, _ = biofx.transform(_CallsMethods(), config, example_inputs=(x,))
    assert torch.equal(bio_model(x), bio_model(x))
    with pytest.raises(PassError, match="may call 'doubled' of a _Scales, a method that a plain"):
        biofx.deploy(bio_model)
    whole, _ = biofx.transform(_CallsMethods(), config, example_inputs=(x,), opaque=["inner"])
    assert torch.equal(biofx.deploy(whole)(x), whole.eval()(x))


class _AsksForAType(nn.Module):
    """Its forward stays in Python, and reads the type of a gain that the graph of a region reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if y.sum() > 1e9:
            y = -y
        y = torch.relu(self.norm(y.to(self.norm.weight.dtype)))
        return self.out(torch.relu(self.last(y)))


def test_a_parameter_that_an_eager_forward_asks_for_keeps_its_name() -> None:
    model, x = _AsksForAType(), torch.randn(3, 4)
    with torch.no_grad():
        model.norm.weight[:3] = -1.0  # which the constraint of gains changes
    bio_model, _ = biofx.transform(model, {"apply_dales_principle": True}, example_inputs=(x,))
    deployed: Any = biofx.deploy(bio_model)
    assert {name for name, _ in deployed.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert torch.equal(deployed(x), bio_model.eval()(x))
    assert bool((deployed.norm.weight >= 0).all())
