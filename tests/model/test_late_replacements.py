"""Modules replaced, wrapped or changed after the transform: they act, or it is an error that says so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import biofx

CONFIGS: dict[str, dict[str, Any]] = {
    "scaled": {},
    "signed": {"apply_dales_principle": True},
    "split": {"weight_splitting_Gamma": 2, "weight_splitting_fold": False},
    "folded": {"weight_splitting_Gamma": 2},
}
INPUT = torch.linspace(-1, 1, 4 * 3 * 12).reshape(4, 3, 12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.extra: nn.Module | None = None

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.norm(self.first(x)))
        if self.extra is not None:
            hidden = self.extra(hidden)
        return x + self.second(hidden)


class OtherBlock(Block):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.wide = nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular")
        self.block = Block()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.sequence = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm(self.conv(x)))
        x = self.block(self.wide(x).transpose(1, 2))
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.sequence(x).mean(1))


class Doubling(nn.Module):
    """Stands for adapters: it calls the layer that it was put around."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Any:
        return 2 * self.base(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make()


def replace(path: str, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(model: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner)._modules[name] = seeded(make)

    return change


def assign(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


class AddingLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "stride": (assign("conv", "stride", (2,)), r"'conv'.*its stride is \(2,\), and was \(1,\)"),
    "padding mode": (assign("wide", "padding_mode", "zeros"), "'wide'.*its padding_mode is 'zeros'"),
    "dilation": (assign("conv", "dilation", (2,)), "'conv'.*its dilation"),
    "same class": (replace("head", lambda: nn.Linear(6, 4)), "'head' was replaced"),
    "subclass": (replace("head", lambda: AddingLinear(6, 4)), "'head'.*AddingLinear.*was a .*Linear"),
    "identity": (replace("head", nn.Identity), "'head'.*it is a .*Identity now"),
    "deleted": (lambda model: model.__delattr__("head"), "'head' is no longer there"),
    "none": (assign("", "head", None), "'head' is no longer there"),
    "other block": (replace("block", OtherBlock), "'block'.*OtherBlock"),
    "wrapped block": (lambda model: setattr(model, "block", Doubling(model.block)), "'block'.*Doubling"),
    "once none": (assign("block", "extra", nn.Tanh()), "'block'.*its extra was None"),
    "appended": (lambda model: model.layers.append(nn.Linear(6, 6)), r"'layers'.*\[0, 1, 2\].*held \[0, 1\]"),
    "taken out": (lambda model: model.layers.__delitem__(1), "'layers'"),
    "longer sequence": (lambda model: model.sequence.append(nn.Tanh()), r"'sequence'.*\[0, 1, 2\]"),
    "forward": (assign("block", "forward", lambda x: x), "'block'.*its forward was replaced on the instance"),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("change", REFUSED)
def test_what_a_graph_would_not_follow_is_an_error_that_names_it(change: str, config: str) -> None:
    edit, message = REFUSED[change]
    if config == "folded" and change in ("same class", "subclass", "identity"):
        return  # a head without synapses of its own is called as it is
    config_of = CONFIGS[config] | {"fuzzy_learning_rate_factor_nu": 0.1}
    bio_model, _ = biofx.transform(net(), config_of)
    for model in (copy.deepcopy(bio_model), bio_model):
        model(INPUT)
        edit(model)
        with pytest.raises(biofx.CaptureError, match=message):
            model(INPUT)
        with pytest.raises(biofx.CaptureError, match=message):
            copy.deepcopy(model)(INPUT)


def test_another_layer_does_not_get_the_factors_that_the_graph_draws_for_the_one_before() -> None:
    bio_model, _ = biofx.transform(net(), {"fuzzy_lr_dtype": "seed"})
    bio_model(INPUT)
    bio_model.head = nn.Linear(6, 4)
    with pytest.raises(biofx.CaptureError, match="'head' was replaced"):
        bio_model(INPUT)


def test_a_layer_that_is_called_again_is_looked_at_too() -> None:
    bio_model, _ = biofx.transform(net(), {"fuzzy_lr_parameters": "all"})
    bio_model(INPUT)
    prune.l1_unstructured(bio_model.head, "weight", 0.5)
    bio_model(INPUT)
    bio_model.head.bias = None
    with pytest.raises(biofx.CaptureError, match="'bias' is a NoneType now"):
        bio_model(INPUT)


def test_a_forward_that_somebody_holds_follows_what_changes_later() -> None:
    plain = net()
    models: list[Any] = [plain, biofx.transform(plain).graph_module]
    for model in models:
        held = model.forward
        vars(model)["forward"] = lambda x, held=held: 2 * held(x)
        model.head = Doubling(model.head)
    for _ in range(2):
        torch.testing.assert_close(models[1](INPUT), models[0](INPUT))


ACTING: dict[str, Callable[[Any], object]] = {
    "head": lambda model: setattr(model, "head", Doubling(model.head)),
    "convolution": lambda model: setattr(model, "conv", Doubling(model.conv)),
    "convolution with a padding mode": lambda model: setattr(model, "wide", Doubling(model.wide)),
    "inside a block": lambda model: setattr(model.block, "first", Doubling(model.block.first)),
    "in a list": lambda model: model.layers.__setitem__(1, Doubling(model.layers[1])),
    "called norm": lambda model: setattr(model, "norm", Doubling(model.norm)),
    "activation": lambda model: model.sequence.__setitem__(1, nn.Tanh()),
    "weight": lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(4, 6))),
    "no bias": lambda model: setattr(model.head, "bias", None),
    "own forward": lambda model: setattr(model.head, "forward", lambda x: x[:, :4] * 3),
    "spectral norm": lambda model: seeded(lambda: parametrizations.spectral_norm(model.head)),
    "weight norm": lambda model: parametrizations.weight_norm(model.layers[0]),
    "pruned": lambda model: prune.l1_unstructured(model.head, "weight", 0.5),
    "pruned convolution": lambda model: prune.ln_structured(model.conv, "weight", 0.5, n=2, dim=0),
    "epsilon": assign("norm", "eps", 1.0),
    "epsilon of a layer norm": assign("block.norm", "eps", 1.0),
}


@pytest.mark.parametrize("change", ACTING)
@pytest.mark.parametrize("training", [False, True])
def test_what_acts_in_the_model_acts_in_the_result(change: str, training: bool) -> None:
    plain = net()
    bio_model, _ = biofx.transform(plain)
    for model in (plain, bio_model):
        model.train(training)
        ACTING[change](model)
    expected, found = plain(INPUT), bio_model(INPUT)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(copy.deepcopy(bio_model)(INPUT), plain(INPUT))
    for gradient, parameter in zip(gradients(plain), gradients(bio_model), strict=True):
        assert (gradient is None) is (parameter is None)


@pytest.mark.parametrize("layer", ["head", "conv", "wide", "layers.1"])
@pytest.mark.parametrize("config", ["scaled", "signed", "split"])
def test_a_forward_around_the_one_that_a_layer_had_computes_on_what_the_graph_makes_of_its_weights(
    layer: str, config: str
) -> None:
    bio_model, _ = biofx.transform(net(), CONFIGS[config] | {"fuzzy_learning_rate_factor_nu": 0.4})
    around = copy.deepcopy(bio_model)
    parent, _, name = layer.rpartition(".")
    setattr(around.get_submodule(parent), name, Doubling(around.get_submodule(layer)))
    expected = around.train(False)(INPUT)
    inner: Any = bio_model.get_submodule(layer)
    old = inner.forward
    inner.forward = lambda x: 2 * old(x)
    torch.testing.assert_close(bio_model.train(False)(INPUT), expected)
    for one, another in zip(gradients(bio_model), gradients(around), strict=True):
        torch.testing.assert_close(one, another)
    assert set(vars(inner)) & {"weight", "bias"} == set()


def gradients(model: nn.Module) -> list[Tensor | None]:
    model.zero_grad()
    model(INPUT).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("config", ["scaled", "signed", "split"])
def test_a_layer_that_is_called_again_keeps_its_mechanisms(config: str) -> None:
    bio_model = biofx.transform(net(), CONFIGS[config]).graph_module.eval()
    reference = copy.deepcopy(bio_model)
    with torch.no_grad():  # against the signs, which the graph then holds at zero
        for model in (bio_model, reference):
            model.head.weight.sub_(0.05)
    bio_model.head = Doubling(bio_model.head)
    torch.testing.assert_close(bio_model(INPUT), 2 * reference(INPUT))
    found = gradients_by_name(bio_model)
    expected = gradients_by_name(reference)
    torch.testing.assert_close(found["head.base.weight"], 2 * expected["head.weight"])
    for again in (copy.deepcopy(bio_model), pickle.loads(pickle.dumps(bio_model)), biofx.deploy(bio_model)):
        torch.testing.assert_close(again(INPUT), bio_model(INPUT))
    bio_model.head = bio_model.head.base
    torch.testing.assert_close(bio_model(INPUT), reference(INPUT))


def gradients_by_name(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(INPUT).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_sign_is_found_where_the_layer_that_keeps_it_is_now() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    bio_model, _ = biofx.transform(model, {"apply_dales_principle": True})
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    reference = copy.deepcopy(bio_model)
    for path in ("0", "2", "4"):
        bio_model._modules[path] = Doubling(bio_model.get_submodule(path))
    first = 2 * biofx.deploy(reference).get_submodule("0")(x)
    second = 2 * biofx.deploy(reference).get_submodule("2")(torch.relu(first))
    third = 2 * biofx.deploy(reference).get_submodule("4")(torch.relu(second))
    torch.testing.assert_close(bio_model(x), third)
    torch.testing.assert_close(biofx.deploy(bio_model)(x), third)


def test_a_folded_layer_with_an_adapter_is_refused_by_name() -> None:
    bio_model, _ = biofx.transform(net(), CONFIGS["folded"])
    bio_model.conv = Doubling(bio_model.conv)
    with pytest.raises(biofx.CaptureError, match=r"'conv'.*Doubling.*before biofx\.transform.*deploy"):
        bio_model(INPUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model[2], "p", 0.9), r"'2'.*its p is 0.9, and was 0.0"),
        (lambda model: model.__setitem__(1, nn.Softmax(-1)), r"'1'.*Softmax now.*Splits are folded"),
    ],
)
def test_what_is_called_once_for_a_connection_stays_what_it_is(change: Any, message: str) -> None:
    layers = nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    bio_model, _ = biofx.transform(nn.Sequential(*layers), CONFIGS["folded"])
    change(bio_model)
    with pytest.raises(biofx.CaptureError, match=message):
        bio_model(torch.ones(2, 4))


def test_a_method_of_a_class_that_is_replaced_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bio_model, _ = biofx.transform(net())
    monkeypatch.setattr(Block, "forward", lambda self, x: x)
    with pytest.raises(biofx.CaptureError, match=r"'block'.*the forward of its class was replaced"):
        bio_model(INPUT)


def test_a_change_before_the_first_call_is_seen_in_what_was_pickled() -> None:
    bio_model, _ = biofx.transform(net())
    bio_model.conv.stride = (2,)
    with pytest.raises(biofx.CaptureError, match="its stride"):
        pickle.loads(pickle.dumps(bio_model))(INPUT)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.relu(self.first(x)))


class Deciding(nn.Module):
    """Decides by a value, so that its parts are graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.pair = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), Pair()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.pair(self.part(x))) if float(x.sum()) < 1e9 else x


def test_in_a_region_adapters_act_and_replacements_are_errors() -> None:
    torch.manual_seed(0)
    model = Deciding()
    x = torch.ones(2, 4)
    for path in ("part.0", "head", "pair.first", "pair"):
        bio_model, _ = biofx.transform(model)
        plain = copy.deepcopy(model)
        for changed in (bio_model, plain):
            owner, _, name = path.rpartition(".")
            holder = changed.get_submodule(owner)
            holder._modules[name] = Doubling(holder.get_submodule(name))
        torch.testing.assert_close(bio_model(x), plain(x))
        torch.testing.assert_close(biofx.deploy(bio_model)(x), plain(x))
    bio_model, _ = biofx.transform(model)
    bio_model.pair.first = nn.Linear(4, 6)
    with pytest.raises(biofx.CaptureError, match="'first' was replaced"):
        bio_model(x)


def test_ordinary_changes_are_none() -> None:
    plain = net()
    bio_model, _ = biofx.transform(plain)
    expected = bio_model(INPUT)
    state = {name: value.clone() for name, value in bio_model.state_dict().items()}
    bio_model.load_state_dict(state, assign=True)
    vars(bio_model)["note"] = vars(bio_model.get_submodule("block"))["note"] = "kept"
    bio_model.eval().train().requires_grad_(False).double().float()
    parameters: dict[str, Tensor] = dict(bio_model.named_parameters())
    found = torch.func.functional_call(bio_model, parameters, (INPUT,))
    torch.testing.assert_close(found, expected)
    averaged = torch.optim.swa_utils.AveragedModel(bio_model)
    averaged.update_parameters(bio_model)
    torch.testing.assert_close(averaged(INPUT), expected)


def test_a_layer_alone_is_told_of_its_own_settings() -> None:
    bio_model, _ = biofx.transform(nn.Conv1d(3, 4, 3))
    bio_model(INPUT)
    vars(bio_model)["stride"] = (2,)
    with pytest.raises(biofx.CaptureError, match=r"the model.*its stride is \(2,\)"):
        bio_model(INPUT)


def test_forward_is_looked_at_where_it_is_called_directly() -> None:
    bio_model, _ = biofx.transform(net())
    bio_model.head = nn.Identity()
    with pytest.raises(biofx.CaptureError, match="'head'"):
        bio_model.forward(INPUT)


class Twice(nn.Module):
    """Calls one layer by two names, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.third, self.fourth = (nn.Linear(4, 4) for _ in range(3))
        self.second = self.first
        self.fourth.weight = self.third.weight

    def forward(self, x: Tensor) -> Any:
        x = self.second(torch.relu(self.first(x)))
        return self.fourth(torch.relu(self.third(torch.relu(x))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("second", lambda: nn.Linear(4, 4)), "'second' was the same as 'first'"),
        (replace("first", lambda: nn.Linear(4, 4)), "'first' was replaced|'second' was the same as 'first'"),
        (
            assign("fourth", "weight", nn.Parameter(torch.ones(4, 4))),
            "'fourth.weight' was the same as 'third",
        ),
        (lambda model: parametrizations.spectral_norm(model.first), "'first' has a parametrization now"),
    ],
)
def test_what_was_one_and_is_two_is_an_error(change: Any, message: str) -> None:
    bio_model, _ = biofx.transform(Twice())
    x = torch.ones(2, 4)
    bio_model(x)
    change(bio_model)
    with pytest.raises(biofx.CaptureError, match=message):
        bio_model(x)


def test_the_check_of_a_model_with_an_adapter_finds_nothing() -> None:
    bio_model, _ = biofx.transform(net(), {"apply_dales_principle": True})
    bio_model.head = Doubling(bio_model.head)
    bio_model.conv = Doubling(bio_model.conv)
    bio_model(INPUT)
    assert biofx.check(bio_model).ok
    bio_model.get_buffer("head.base.bio_mod.fuzzy_learning_rate_parameters").fill_(float("nan"))
    assert not biofx.check(bio_model).ok


def test_what_compiles_a_model_looks_when_it_compiles() -> None:
    plain = net().eval()
    bio_model = biofx.transform(plain).graph_module.eval()
    compiled = torch.compile(bio_model, backend="eager", fullgraph=True)
    for model in (plain, bio_model):
        model.head = Doubling(model.head)
    torch.testing.assert_close(compiled(INPUT), plain(INPUT))
    vars(bio_model.get_submodule("conv"))["stride"] = (2,)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="'conv' was changed since the model was captured: its stride"):
        compiled(INPUT)


def test_deploying_and_transforming_again_look_before_any_call() -> None:
    bio_model = biofx.transform(net()).graph_module.eval()
    changed = copy.deepcopy(bio_model)
    changed.head = Doubling(changed.head)
    torch.testing.assert_close(biofx.deploy(changed)(INPUT), 2 * bio_model(INPUT))
    torch.testing.assert_close(biofx.transform(changed, passes="").graph_module(INPUT), 2 * bio_model(INPUT))
    vars(changed.get_submodule("conv"))["stride"] = (2,)
    for use in (biofx.deploy, biofx.transform):
        with pytest.raises(biofx.CaptureError, match="'conv' was changed"):
            use(changed)
    vars(bio_model.get_submodule("head"))["forward"] = lambda x: x
    with pytest.raises(biofx.errors.InputError, match="'head' with a forward on the instance"):
        biofx.deploy(bio_model)


@pytest.mark.parametrize("change", ["replaced", "forward"])
def test_a_layer_that_is_a_function_at_one_call_and_a_module_at_the_other_is_looked_at(change: str) -> None:
    split = {"weight_splitting_Gamma": 2, "weight_splitting_activation_function": "torch.tanh"}
    bio_model: Any = biofx.transform(Twice(), {**split, "fuzzy_lr_distribution": "baseline"}).graph_module
    calls = {node.name: node.op for node in bio_model.graph.nodes}
    assert (calls["first"], calls["first_1"]) == ("call_module", "call_function")
    x = torch.ones(3, bio_model.first.in_features)
    bio_model(x)
    if change == "replaced":
        bio_model.first = Doubling(bio_model.first)
    else:
        bio_model.first.forward = torch.zeros_like
    with pytest.raises(biofx.CaptureError, match="'first'"):
        bio_model(x)
