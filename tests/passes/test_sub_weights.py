"""Weight splitting with ``mode="sub-weights"``: what it computes, trains, saves and leaves alone."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.checkpoints import plain_state
from biofx.layers.weight_site import whole_weight
from biofx.passes import ConstrainSigns, ScaleGradients, SplitWeights
from biofx.plasticity.model_states import bio_modules
from biofx.plasticity.sub_weights import shared_out

SUB: dict[str, Any] = {"weight_splitting_Gamma": 2, "weight_splitting_mode": "sub-weights"}
BARE: dict[str, Any] = {**SUB, "fuzzy_lr_distribution": "baseline"}


def split(model: nn.Module, **options: object) -> biofx.PassResult:
    return biofx.transform(model, passes=SplitWeights(mode="sub-weights", **options))  # type: ignore[arg-type]


def parts_of(model: nn.Module, path: str) -> list[nn.Parameter]:
    """The sub-weights of a weight, the first of them at its own path."""
    return [p for name, p in model.named_parameters() if whole_weight(name) == path]


def reasons(report: biofx.Report) -> dict[str, str]:
    return {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}


# what it is


def test_graph_and_report(residual_net: nn.Module, golden: Callable[[str, str], None]) -> None:
    pipeline = biofx.Pipeline(
        (
            SplitWeights(gamma=3, mode="sub-weights", rates="mean", exclude="fc"),
            ConstrainSigns(),
            ScaleGradients(),
        )
    )
    bio, report = biofx.transform(residual_net, passes=pipeline)
    golden("sub_weights", f"{biofx.format_graph(bio)}\n\n{report}")


def test_graph_and_report_with_an_activation(
    residual_net: nn.Module, golden: Callable[[str, str], None]
) -> None:
    bio, report = split(residual_net, gamma=2, activation=torch.tanh)
    golden("sub_weights_activation", f"{biofx.format_graph(bio)}\n\n{report}")


@pytest.mark.parametrize("gamma", [2, 3, 7])
def test_weights_of_any_number_add_up_to_the_layers_weight(
    gamma: int, mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = split(mlp, gamma=gamma)
    for name, weight in mlp.named_parameters():
        parts = parts_of(bio, name)
        assert len(parts) == (gamma if name.endswith("weight") else 1)
        torch.testing.assert_close(torch.stack(list(parts)).sum(0), weight)
    torch.testing.assert_close(bio(vectors), mlp(vectors))


def test_shares_are_uniform_over_those_that_add_up_to_one() -> None:
    for gamma in (2, 3, 5):
        shares = torch.stack(shared_out(torch.ones(200, 200), gamma, 0, "w"))
        assert shares.min() >= 0
        torch.testing.assert_close(shares.sum(0), torch.ones(200, 200))
        # a flat Dirichlet distribution: each share is Beta(1, gamma - 1)
        spread = math.sqrt((gamma - 1) / (gamma + 1)) / gamma
        torch.testing.assert_close(shares.mean((1, 2)), torch.full((gamma,), 1 / gamma), atol=0.005, rtol=0)
        torch.testing.assert_close(shares.std((1, 2)), torch.full((gamma,), spread), atol=0.005, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shares_of_any_type_add_up_and_have_the_weights_sign(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 50).to(dtype)
    weight[3] = 0
    parts = shared_out(weight, 4, 1, "w")
    total = parts[0] + parts[1] + parts[2] + parts[3]
    assert all(part.dtype == dtype and bool((part * weight >= 0).all()) for part in parts)
    torch.testing.assert_close(total, weight, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_shares_follow_from_seed_and_path_alone(mlp: nn.Module) -> None:
    state = torch.get_rng_state()
    one, other, third = (split(mlp, seed=seed).graph_module for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name))
    assert not torch.equal(one.get_parameter("0.weight"), third.get_parameter("0.weight"))
    first, second = shared_out(torch.ones(8), 2, 0, "a")[0], shared_out(torch.ones(8), 2, 0, "b")[0]
    assert not torch.equal(first, second)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **options: object) -> None:
        super().__init__()
        self.rnn, self.fc = kind(4, 6, 2, batch_first=True, **options), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])  # type: ignore[no-any-return]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x)[0])  # type: ignore[no-any-return]


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((4, 5), (5, 2), (2,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, torch.relu(x[:, 0] @ self.w), self.v)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(7, 6, 2), nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.c = nn.Conv1d(4, 4, 1, groups=4, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm, both ways": lambda: Recurrent(nn.LSTM, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attending,
    "products": Products,
    "tied": Tied,
    "convolutions": Convolutions,
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
}
SEQUENCES = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(3))


def made(kind: str) -> nn.Module:
    model = KINDS[kind]()
    model(SEQUENCES)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_with_units_keeps_its_function(kind: str, unchanged: Any) -> None:
    model = made(kind)
    with unchanged(model):
        bio, report = split(model, gamma=3)
    assert not reasons(report)
    torch.testing.assert_close(bio(SEQUENCES), model(SEQUENCES))
    bio(SEQUENCES).square().sum().backward()
    model(SEQUENCES).square().sum().backward()
    for name, parameter in model.named_parameters():
        for part in parts_of(bio, name):
            torch.testing.assert_close(part.grad, parameter.grad)
    assert biofx.check(bio).ok


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_comes_out_plain(kind: str) -> None:
    model = made(kind).eval()
    deployed = biofx.deploy(split(model, gamma=3).graph_module)
    torch.testing.assert_close(deployed(SEQUENCES), model(SEQUENCES))
    assert not [name for name, _ in deployed.named_modules() if "bio_mod" in name]
    if kind not in ("products", "attention"):
        assert {p.numel() for p in deployed.parameters()} == {p.numel() for p in model.parameters()}


# an activation


@pytest.mark.parametrize("activation", [torch.tanh, F.silu, nn.PReLU(), nn.Softplus()])
def test_an_activation_acts_on_each_sub_synapse_and_the_bias_is_added_once(
    activation: Callable[[Tensor], Tensor], vectors: Tensor
) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    bio, report = split(model, gamma=3, activation=activation)
    parts = parts_of(bio, "0.weight")
    outputs = [activation(F.linear(vectors, part)) for part in parts]
    hidden = outputs[0] + outputs[1] + outputs[2] + model[0].bias
    torch.testing.assert_close(bio(vectors), model[2](torch.relu(hidden)))
    assert reasons(report) == {"2": "it is an output layer, whose outputs an activation would change"}
    bio.eval()
    torch.testing.assert_close(biofx.deploy(bio)(vectors), bio(vectors))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 6, 3, stride=2), (2, 9, 8)),
        (nn.ConvTranspose1d(2, 6, 3), (2, 9)),
        (nn.Conv1d(2, 6, 3, bias=False), (2, 9)),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_an_activation_in_convolutions(layer: Any, shape: tuple[int, ...], batched: bool) -> None:
    last = nn.Conv2d(6, 1, 1) if len(shape) == 3 else nn.Conv1d(6, 1, 1)
    bio, _ = split(nn.Sequential(layer, last), gamma=2, activation=torch.tanh, only="0")
    x = torch.randn((4, *shape) if batched else shape)
    total = torch.zeros(())
    for part in parts_of(bio, "0.weight"):
        plain = copy.deepcopy(layer)
        plain.weight.data, plain.bias = part.data, None
        total = total + torch.tanh(plain(x))
    if layer.bias is not None:
        total = total + layer.bias.reshape(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(bio(x), last(total))


def test_a_layer_called_twice_with_an_activation(vectors: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(torch.relu(self.fc(x))))  # type: ignore[no-any-return]

    model = Twice()
    bio, _ = split(model, gamma=2, activation=torch.tanh)
    first, second = parts_of(bio, "fc.weight")

    def layer(x: Tensor) -> Tensor:
        return torch.tanh(x @ first.T) + torch.tanh(x @ second.T) + model.fc.bias

    torch.testing.assert_close(bio(vectors), model.head(layer(torch.relu(layer(vectors)))))


@pytest.mark.parametrize("signed", [False, True])
def test_sub_synapses_of_a_weight_without_a_layer_are_deployed(signed: bool, vectors: Tensor) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.w, self.head = nn.Linear(4, 5), nn.Parameter(torch.randn(6, 5)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(F.linear(torch.relu(self.first(x)), self.w)))  # type: ignore[no-any-return]

    config = {**BARE, "weight_splitting_activation_function": torch.tanh, "apply_dales_principle": signed}
    bio, _ = biofx.transform(Functional(), config)
    deployed = biofx.deploy(bio)
    torch.testing.assert_close(deployed(vectors), bio.eval()(vectors))
    assert not [name for name, _ in deployed.named_parameters() if "bio_mod" in name]


# rates, signs and rules


def test_each_sub_weight_has_rates_of_its_own(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, {**SUB, "fuzzy_learning_rate_factor_nu": 0.4})
    bio(vectors).square().sum().backward()
    mlp(vectors).square().sum().backward()
    states: dict[str, Any] = dict(bio_modules(bio))
    for name, weight in mlp.named_parameters():
        if not name.endswith("weight"):
            continue
        factors = [
            states[path].fuzzy_learning_rate_parameters for path in states if whole_weight(path) == name
        ]
        parts = parts_of(bio, name)
        assert len(factors) == len(parts) == 2
        assert not torch.equal(factors[0], factors[1])
        for part, factor in zip(parts, factors, strict=True):
            torch.testing.assert_close(part.grad, weight.grad * factor)


def test_sub_weights_of_a_layer_are_in_one_place_of_the_order(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, {**SUB, "fuzzy_lr_distribution": "layer_adaptive"})
    depths = {path: state.depth for path, state in bio_modules(bio).items()}
    assert {whole_weight(path): depth for path, depth in depths.items()} == {
        "0.weight": 0,
        "2.weight": 0.5,
        "4.weight": 1,
    }
    assert len(depths) == 6


@pytest.mark.parametrize("method", ["project", "abs"])
def test_signs_hold_for_each_sub_weight_and_so_for_the_sum(method: str, mlp: Any, vectors: Tensor) -> None:
    config = {**SUB, "apply_dales_principle": True, "dales_method": method, "dales_constrain_readout": True}
    bio, _ = biofx.transform(mlp, config)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        (bio(vectors) - 1).square().mean().backward()
        optimizer.step()
    signs = bio.get_buffer("0.bio_mod.sign")
    effective = biofx.deploy(bio).get_parameter("2.weight")
    assert effective.abs().sum() > 0
    assert bool((effective * signs >= 0).all())
    audit = biofx.check(bio)
    assert audit.ok
    assert audit.to_dict()["layers"]["2"]["signs"]["checked"] == 2 * mlp[2].weight.numel()


def test_signs_that_are_those_of_the_weight_already_change_nothing(vectors: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    keep = {"apply_dales_principle": True, "dales_initialisation": "keep"}
    signed, _ = biofx.transform(model, {**keep, "fuzzy_lr_distribution": "baseline"})
    model.load_state_dict(biofx.deploy(signed).state_dict())
    bio, _ = biofx.transform(model, {**BARE, **keep})
    torch.testing.assert_close(bio(vectors), model(vectors))


def test_the_sum_of_balanced_sub_weights_varies_as_much_as_a_balanced_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2))
    config = {"apply_dales_principle": True, "fuzzy_lr_distribution": "baseline"}
    plain = biofx.deploy(biofx.transform(model, config).graph_module).get_parameter("2.weight")
    bio, _ = biofx.transform(model, {**config, **SUB, "weight_splitting_Gamma": 4})
    found = biofx.deploy(bio).get_parameter("2.weight")
    assert found.std().item() == pytest.approx(plain.std().item(), rel=0.05)
    assert torch.equal(found == 0, plain == 0)


def test_rules_act_on_each_sub_weight_by_itself(mlp: Any, vectors: Tensor) -> None:
    bio = biofx.BioConverter(**BARE, rejuvenation_parameter_dre=0.5)(mlp)
    bio(vectors).square().sum().backward()
    done = bio.rejuvenate_weights()
    assert set(done) == {name for name, _ in bio.named_parameters() if name.endswith("weight")}
    assert done["2.weight"] != done["2.bio_mod.sub_weight_2.weight"]
    volume = bio.volume_dependent_lr()
    assert volume["2.bio_mod.sub_weight_2.weight"] == mlp[2].weight.numel()


def test_a_converter_gives_each_sub_weight_rates(mlp: nn.Module, vectors: Tensor) -> None:
    bio: Any = biofx.BioConverter(**SUB)(mlp)
    bio(vectors).square().sum().backward()
    part = bio.get_parameter("2.bio_mod.sub_weight_2.weight")
    before = torch.as_tensor(part.grad).clone()
    bio.fuzzy_learning_rates()
    states: dict[str, Any] = dict(bio_modules(bio))
    factors = states["2.bio_mod.sub_weight_2.weight"].fuzzy_learning_rate_parameters
    torch.testing.assert_close(part.grad, before * factors)
    assert not torch.equal(factors, states["2.weight"].fuzzy_learning_rate_parameters)


def test_rates_that_follow_activity_follow_that_of_the_layers_units(mlp: nn.Module, vectors: Tensor) -> None:
    config = {**SUB, "fuzzy_lr_distribution": "activity", "fuzzy_lr_dynamic": True}
    bio, _ = biofx.transform(mlp, config)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    state: Any = bio_modules(bio)["2.bio_mod.sub_weight_2.weight"]
    before = state.fuzzy_learning_rate_parameters.clone()
    bio(vectors).square().mean().backward()
    optimizer.step()
    assert state.activity is None
    assert state.observed_activity is bio_modules(bio)["2.weight"].activity
    assert not torch.equal(state.fuzzy_learning_rate_parameters, before)


# the step


Kind = Callable[..., torch.optim.Optimizer]


def stepped(model: nn.Module, x: Tensor, kind: Kind, *, attached: bool) -> None:
    optimizer = kind(model.parameters(), lr=0.01)
    if attached:
        biofx.attach(model, optimizer)
    model(x).square().sum().backward()
    optimizer.step()


def ratios(model: nn.Module, x: Tensor, config: dict[str, Any], kind: Kind) -> dict[str, float]:
    """How far a step of the model moves what is deployed, over how far one of that itself does."""
    bio, _ = biofx.transform(model, {**config, "fuzzy_lr_distribution": "baseline"})
    before = biofx.deploy(bio)
    plain = copy.deepcopy(before)
    stepped(bio, x, kind, attached=kind is not torch.optim.SGD)
    stepped(plain, x, kind, attached=False)
    after = biofx.deploy(bio)
    with torch.no_grad():
        moved = {name: after.get_parameter(name) - old for name, old in before.named_parameters()}
        wanted = {name: plain.get_parameter(name) - old for name, old in before.named_parameters()}
    found = {}
    for name in moved:
        found[name] = float((moved[name] * wanted[name]).sum() / wanted[name].square().sum())
        torch.testing.assert_close(moved[name], found[name] * wanted[name], rtol=1e-3, atol=1e-6)
    return found


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize(("rates", "times"), [("sum", 3), ("mean", 1)])
def test_the_step_of_the_sum_of_sub_weights(
    rates: str, times: int, kind: Kind, mlp: nn.Module, vectors: Tensor
) -> None:
    config = {**SUB, "weight_splitting_Gamma": 3, "weight_splitting_rates": rates}
    for name, ratio in ratios(mlp, vectors, config, kind).items():
        assert ratio == pytest.approx(times if name.endswith("weight") else 1, rel=1e-3)


@pytest.mark.parametrize(("rates", "hidden", "ends"), [("sum", 4, 2), ("mean", 1, 1)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_step_of_the_deployed_model_of_neighbours(
    rates: str,
    hidden: int,
    ends: int,
    kind: Kind,
    mlp: nn.Module,
    vectors: Tensor,
) -> None:
    config = {"weight_splitting_Gamma": 2, "weight_splitting_rates": rates}
    found = ratios(mlp, vectors, config, kind)
    weights = [found[f"{place}.weight"] for place in (0, 2, 4)]
    assert weights == pytest.approx([ends, hidden, ends], rel=1e-3)
    # optimizers that are indifferent to a gradient's scale step biases alike, which nothing rescales
    split_bias = 2 if kind is torch.optim.Adam else ends
    assert [found["0.bias"], found["4.bias"]] == pytest.approx([split_bias, 1], rel=1e-3)


def test_one_step_of_plain_descent_with_the_mean_is_that_of_the_plain_model(
    mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = biofx.transform(mlp, {**BARE, "weight_splitting_rates": "mean"})
    for _ in range(3):
        for model in (bio, mlp):
            for parameter in model.parameters():
                parameter.grad = None
            model(vectors).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.05 * torch.as_tensor(parameter.grad))
    for name, parameter in mlp.named_parameters():
        torch.testing.assert_close(torch.stack(list(parts_of(bio, name))).sum(0), parameter)


@pytest.mark.parametrize("norm", [False, True])
def test_the_step_of_neighbours_in_convolutions(norm: bool, images: Tensor) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU()]
    layers += [nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)]
    model = nn.Sequential(*layers).eval()
    config = {"weight_splitting_Gamma": 2, "weight_splitting_rates": "mean"}
    for name, ratio in ratios(model, images, config, torch.optim.SGD).items():
        assert ratio == pytest.approx(1, rel=1e-3), name


def test_layers_choose_their_steps(mlp: nn.Module) -> None:
    config = biofx.BioConfig(weight_splitting_Gamma=2, weight_splitting_fold=False)
    bio, report = biofx.transform(mlp, config.override("2", weight_splitting_rates="mean"))
    lines = biofx.format_graph(bio).splitlines()
    levelled = [line.partition(" = ")[2] for line in lines if "level_gradient" in line]
    assert levelled == ["level_gradient(_2_weight, rate=0.5)", "level_gradient(_4_weight, rate=0.5)"]
    message = "gradients divided by 2: sums over 2 outputs take the step of one weight"
    assert message in [remark.message for remark in report.remarks if remark.layer == "2"]


# what is left alone


def test_layers_choose_their_mode(mlp: Any, vectors: Tensor) -> None:
    config = biofx.BioConfig(weight_splitting_Gamma=2, fuzzy_learning_rate_factor_nu=0, seed=5)
    config = config.override("0", weight_splitting_mode="sub-weights", weight_splitting_Gamma=5)
    bio, report = biofx.transform(mlp, config)
    assert len(parts_of(bio, "0.weight")) == 5
    assert len(parts_of(bio, "2.weight")) == 1
    assert report.passes[0].text == 'split-weights{seed=5,@"0"{gamma=5,mode=sub-weights}}'
    sums = mlp[2](torch.relu(mlp[0](vectors))).reshape(5, 2, 2).sum(2)
    torch.testing.assert_close(bio(vectors), mlp[4](torch.relu(sums.repeat_interleave(2, 1))))
    other = split(mlp, gamma=5, seed=0).graph_module
    assert not torch.equal(bio.get_parameter("0.weight"), other.get_parameter("0.weight"))


def test_the_text_of_a_pass_of_neighbours_has_no_seed(mlp: nn.Module) -> None:
    config = biofx.BioConfig(weight_splitting_Gamma=2, seed=5, fuzzy_learning_rate_factor_nu=0)
    assert biofx.transform(mlp, config).report.passes[0].text == "split-weights"
    text = "split-weights{gamma=3,mode=sub-weights,rates=mean,seed=5}"
    assert str(biofx.Pipeline.parse(text)) == text
    _, report = biofx.transform(mlp, config.replace(weight_splitting_mode="sub-weights"))
    assert [entry.text for entry in report.passes] == ["split-weights{mode=sub-weights,seed=5}"]


class Holding(nn.Module):
    """A model whose first layer is as a test wants it."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.head = first, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))  # type: ignore[no-any-return]


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


class ReadBeside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc.weight.sum()  # type: ignore[no-any-return]


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.abs())


class AddedMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.sign


@pytest.mark.parametrize(
    ("first", "layer", "message", "options"),
    [
        (nn.Linear(4, 4), "first", "it is off (gamma=1, in a config weight_splitting_Gamma)", {"gamma": 1}),
        (
            frozen(nn.Linear(4, 4)),
            "first",
            "its weight is frozen (requires_grad is False), and sub-weights would never differ from it",
            {},
        ),
        (ReadBeside(), "first.fc", "its weight is also read by 'sum_1', which would not follow", {}),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "first",
            "its weight is computed by a parametrization, not a parameter",
            {},
        ),
        (nn.Linear(4, 4, device="meta"), "first", "its weight is on the meta device and has no values", {}),
        (
            Computed(),
            "first",
            "the forward computes its weight (abs_1), and a parameter has sub-weights",
            {},
        ),
        (Taken(), "first", "plasticity states use its name, 'first.sign', for something else", {}),
        (
            AddedMatrix(),
            "first",
            "matmul does not show what each sub-weight transmits, for an activation to act on",
            {"activation": torch.tanh},
        ),
        (
            nn.Linear(4, 4),
            "head",
            "it is an output layer, whose outputs an activation would change",
            {"activation": torch.tanh},
        ),
        (nn.Linear(4, 4), "first", "not selected by only=['head']", {"only": "head"}),
    ],
)
def test_what_is_left_alone_says_why(
    first: nn.Module, layer: str, message: str, options: dict[str, Any]
) -> None:
    _, report = split(Holding(first), **options)
    assert reasons(report)[layer] == message


def test_look_ups_are_left_alone_and_so_is_what_shares_their_weight() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))  # type: ignore[no-any-return]

    _, report = split(Words())
    assert not report.modified
    assert [(remark.node, remark.message) for remark in report.remarks] == [
        ("embed", "its rows are looked up, and no unit is presynaptic to them"),
        (
            "head",
            "its weight is read by 'embed' too: its rows are looked up, and no unit is presynaptic to them",
        ),
    ]


def test_a_weight_is_shared_out_for_all_its_uses_or_for_none(vectors: Tensor) -> None:
    model = Tied()
    _, report = split(model, only="second")
    message = "its use at 'first' is not to have sub-weights, and would read one of them alone"
    assert [remark.message for remark in report.remarks] == [
        "not selected by only=['second']",
        f"its weight is read by 'first' too: {message}",
    ]
    both = (biofx.select.Override("second", (("gamma", 3),)),)
    with pytest.raises(biofx.OptionError, match=r"'first\.weight': its uses are given different options"):
        split(model, overrides=both)


def test_what_is_scaled_already_is_left_alone(mlp: nn.Module) -> None:
    scaled, _ = biofx.transform(mlp)
    _, report = split(scaled)
    assert (
        reasons(report)["2"]
        == "its weight is constrained or scaled already, and sub-weights come before that"
    )


@pytest.mark.parametrize("mode", ["sub-weights", "neighbours"])
def test_a_second_split_changes_nothing(mode: str, mlp: nn.Module, vectors: Tensor) -> None:
    once, _ = split(mlp)
    twice, report = biofx.transform(once, passes=SplitWeights(mode=mode))
    if mode == "sub-weights":
        assert not report.modified
        assert set(reasons(report).values()) == {"its weight is the sum of sub-weights already"}
    else:  # another split, of outputs, which folds the sums
        folded = biofx.transform(twice, passes="fold-splits").graph_module
        torch.testing.assert_close(folded(vectors), twice(vectors))
        assert any("fold_weight(_2_summed" in line for line in biofx.format_graph(folded).splitlines())


def test_units_of_sub_weights_are_not_expanded(mlp: nn.Module, vectors: Tensor) -> None:
    bio, report = biofx.transform(mlp, {**BARE, "apply_dales_principle": True, "dales_method": "expand"})
    torch.testing.assert_close(bio(vectors), mlp(vectors))
    messages = [
        remark.message for entry in report.passes if entry.name == "expand-units" for remark in entry.remarks
    ]
    assert any("its weight is the sum of sub-weights" in message for message in messages)


def test_negative_gains_are_held_at_zero_behind_sub_weights(residual_net: nn.Module) -> None:
    residual_net.bn.weight.data[1] = -1.0  # type: ignore[union-attr, operator]
    _, report = biofx.transform(residual_net, {**BARE, "apply_dales_principle": True})
    (remark,) = [remark for remark in report.remarks if remark.layer == "bn"]
    assert (
        remark.message
        == "gains kept from below 0; 0 negative ones were folded into the layer before, 1 are held at 0"
    )


# loops over time


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.fc = nn.RNNCell(4, 6, nonlinearity="relu"), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.fc(h)  # type: ignore[no-any-return]


class Rates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_rec, self.w_out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            h = 0.8 * h + 0.2 * torch.relu(self.w_in(x[:, t]) + self.w_rec(h))
        return self.w_out(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("make", [Cells, Rates])
def test_sub_weights_in_a_loop_over_time_are_signed_alike(
    make: Callable[[], nn.Module], example: bool
) -> None:
    model = make()
    examples: Any = ((SEQUENCES,), {}) if example else None
    bio, report = biofx.transform(model, BARE, example_inputs=examples)
    assert not reasons(report)
    torch.testing.assert_close(bio(SEQUENCES), model(SEQUENCES))
    config = {**BARE, "apply_dales_principle": True, "dales_constrain_readout": True}
    bio, _ = biofx.transform(model, config, example_inputs=examples)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (bio(SEQUENCES) - 1).square().mean().backward()
        optimizer.step()
    path, out = ("cell.weight_hh", "fc.weight") if make is Cells else ("w_rec.weight", "w_out.weight")
    states = bio_modules(bio)
    signs = states[path].presynaptic_signs()
    for place in (path, out):
        own = [name for name in states if whole_weight(name) == place]
        assert len(own) == 2
        assert all(torch.equal(states[name].presynaptic_signs(), signs) for name in own)
    assert biofx.check(bio).ok
    effective = biofx.deploy(bio).get_parameter(out)
    assert bool((effective * signs >= 0).all())


# state


def test_keys_and_order_of_the_plain_model_stay(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, SUB)
    own = list(mlp.state_dict())
    assert [key for key in bio.state_dict() if key in own] == own
    assert all(".bio_mod." in key for key in bio.state_dict() if key not in own)
    names = [name for name, _ in mlp.named_parameters()]
    assert [name for name, _ in bio.named_parameters() if name in names] == names


def test_a_plain_checkpoint_is_shared_out_as_a_transform_would(mlp: nn.Module, vectors: Tensor) -> None:
    trained = copy.deepcopy(mlp)
    for parameter in trained.parameters():
        parameter.data += torch.randn(parameter.shape)
    bio, expected = (biofx.transform(model, SUB).graph_module for model in (mlp, trained))
    given = trained.state_dict()
    before = copy.deepcopy(given)
    bio.load_state_dict(given)
    assert all(torch.equal(given[key], before[key]) for key in before)
    assert len(given) == len(before)
    for name, parameter in expected.named_parameters():
        assert torch.equal(bio.get_parameter(name), parameter), name
    torch.testing.assert_close(bio(vectors), trained(vectors))
    other = biofx.transform(mlp, SUB).graph_module
    other.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(other(vectors), trained(vectors))


def test_a_plain_checkpoint_loads_through_a_wrapper_and_where_weights_are_tied() -> None:
    model, trained = Tied(), Tied()
    bio, _ = biofx.transform(model, SUB)
    whole = nn.ModuleDict({"net": bio})
    whole.load_state_dict({f"net.{key}": value for key, value in trained.state_dict().items()})
    torch.testing.assert_close(bio(SEQUENCES), trained(SEQUENCES))
    assert bio.second.weight is bio.first.weight


def test_the_plain_state_has_the_sums(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, {**SUB, "weight_splitting_Gamma": 3})
    plain = copy.deepcopy(mlp)
    for parameter in plain.parameters():
        parameter.data.zero_()
    state = plain_state(bio)
    assert list(state) == list(mlp.state_dict())
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(vectors), bio(vectors))


def test_an_own_state_is_loaded_to_the_bit(mlp: nn.Module, vectors: Tensor) -> None:
    bio, other = (biofx.transform(mlp, {**SUB, "seed": seed}).graph_module for seed in (0, 1))
    bio.get_parameter("2.bio_mod.sub_weight_2.weight").data += 1
    other.load_state_dict(bio.state_dict())
    assert torch.equal(other(vectors), bio(vectors))


def test_half_a_state_is_refused(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, {**SUB, "weight_splitting_Gamma": 3})
    state = bio.state_dict()
    del state["2.bio_mod.sub_weight_3.weight"]
    before = copy.deepcopy(bio.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*2.bio_mod.sub_weight_3.weight"):
        bio.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*bio_mod.sub_weight_2.weight"):
        bio.get_submodule("2").load_state_dict(mlp[2].state_dict())  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        bio.load_state_dict(
            nn.Sequential(
                nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)
            ).state_dict()
        )
    for key in ("0.weight", "4.weight"):
        assert torch.equal(bio.state_dict()[key], before[key])


def test_copies_pickles_and_files_are_independent(mlp: nn.Module, vectors: Tensor, tmp_path: Any) -> None:
    bio, _ = biofx.transform(mlp, {**SUB, "apply_dales_principle": True})
    buffer = io.BytesIO()
    torch.save(bio, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(bio), pickle.loads(pickle.dumps(bio)), torch.load(buffer, weights_only=False)]
    biofx.save(bio, tmp_path / "run.pt")
    copies.append(biofx.load(tmp_path / "run.pt", mlp))
    expected = bio(vectors)
    bio.get_parameter("2.bio_mod.sub_weight_2.weight").data.zero_()
    for other in copies:
        assert torch.equal(other(vectors), expected)
        assert biofx.check(other).ok
        other(vectors).sum().backward()
        assert all(parameter.grad is not None for parameter in other.parameters())
        states = bio_modules(other)
        assert states["2.bio_mod.sub_weight_2.weight"].get_parent() is other.get_submodule(
            "2.bio_mod.sub_weight_2"
        )
    loaded = copies[-1]
    loaded.load_state_dict(mlp.state_dict())
    assert loaded(vectors).isfinite().all()


def test_exported_and_functional_models_compute_the_same(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, {**SUB, "weight_splitting_rates": "mean"})
    exported = torch.export.export(bio, (vectors,)).module()
    torch.testing.assert_close(exported(vectors), bio(vectors))
    exported(vectors).square().sum().backward()
    found = {name: parameter.grad for name, parameter in exported.named_parameters()}
    bio.zero_grad()
    bio(vectors).square().sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, bio.get_parameter(name).grad)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(bio, parameters, (vectors,)).square().sum()
        return result

    for name, gradient in torch.func.grad(loss)(dict(bio.named_parameters())).items():
        torch.testing.assert_close(gradient, bio.get_parameter(name).grad)


def test_a_model_is_moved_with_its_sub_weights(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, SUB)
    bio.to(torch.float64)
    torch.testing.assert_close(bio(vectors.double()), mlp.double()(vectors.double()), rtol=1e-6, atol=1e-7)
    assert biofx.check(bio).ok


def test_an_audit_finds_a_sub_weight_that_is_left_out(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, BARE)
    assert biofx.check(bio).ok
    (added,) = [node for node in bio.graph.nodes if node.name == "_2_summed"]
    added.replace_all_uses_with(added.args[0])
    bio.graph.eliminate_dead_code()
    bio.recompile()
    audit = biofx.check(bio)
    messages = [finding.message for finding in audit.faults]
    assert any(
        "the graph reads it 0 times, and the first sub-weight 1 times" in message for message in messages
    )
    assert any("its sum of sub-weights ('_2_summed') is gone" in message for message in messages)


def test_a_mask_leaves_out_the_same_connections_of_each_sub_weight(mlp: nn.Module, vectors: Tensor) -> None:
    config = {"fuzzy_lr_distribution": "baseline", "weight_density": 0.5}
    masked, _ = biofx.transform(mlp, config)
    bio, _ = biofx.transform(mlp, {**config, **SUB, "weight_splitting_Gamma": 3})
    for path in ("0", "2", "4"):
        mask = masked.get_buffer(f"{path}.bio_mod.connection_mask")
        states = [state for name, state in bio_modules(bio).items() if whole_weight(name) == f"{path}.weight"]
        assert len(states) == 3
        assert all(torch.equal(torch.as_tensor(state.connection_mask), mask) for state in states)
    torch.testing.assert_close(bio(vectors), masked(vectors))
    assert biofx.check(bio).ok


def test_sub_weights_that_read_neighbours_take_the_step_of_both(mlp: nn.Module, vectors: Tensor) -> None:
    config = biofx.BioConfig(
        weight_splitting_Gamma=2, weight_splitting_rates="mean", fuzzy_learning_rate_factor_nu=0
    )
    bio, report = biofx.transform(mlp, config.override("2", weight_splitting_mode="sub-weights"))
    before = biofx.deploy(bio)
    plain = copy.deepcopy(before)
    stepped(bio, vectors, torch.optim.SGD, attached=False)
    stepped(plain, vectors, torch.optim.SGD, attached=False)
    after = biofx.deploy(bio)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), parameter)
    message = "sub-weight 2: gradients divided by 2: sums over 2 inputs take the step of one weight"
    assert message in [remark.message for remark in report.remarks if remark.layer == "2"]
