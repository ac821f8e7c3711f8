"""A compiled model computes and learns as a transformed one."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import BiofxError, CaptureError, InputError, OptionError
from tests.compiling.compiled_models import (
    ALL,
    RATES,
    SIGNS,
    Convolutional,
    InContexts,
    Net,
    assert_learns_as,
    assert_same_state,
    learn,
    transformed,
)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


def compiled(model: nn.Module, config: Any, *, then: Any = "eager", **options: Any) -> Any:
    return torch.compile(model, backend=biofx.backend(config, then=then, **options))


@pytest.mark.parametrize(("make", "then"), [(Net, "eager"), (perceptron, "aot_eager")])
def test_all_mechanisms_compute_and_learn_as_transformed(make: Callable[[], nn.Module], then: str) -> None:
    model = make()
    expected = transformed(model, ALL)
    found = compiled(model, ALL, then=then, initialise=True)
    rounding = {"rtol": 1e-5, "atol": 1e-6} if then != "eager" else {}  # of operators that it decomposes
    assert_learns_as(found, model, expected, torch.randn(5, 4), **rounding)
    assert_same_state(biofx.companion(found), expected)


@pytest.mark.parametrize(
    "config",
    [
        RATES,
        SIGNS,
        RATES.replace(fuzzy_lr_parameters="all"),
        RATES.replace(fuzzy_lr_dtype="seed"),
        RATES.replace(fuzzy_lr_distribution="layer_adaptive"),
        biofx.BioConfig(weight_splitting_Gamma=2, weight_splitting_rates="mean"),
    ],
    ids=["rates", "signs", "all parameters", "from seed", "by depth", "split"],
)
def test_layers_of_all_kinds(config: biofx.BioConfig) -> None:
    model = Convolutional()
    expected = transformed(model, config)
    found = compiled(model, config)
    assert_learns_as(found, model, expected, torch.randn(2, 3, 8, 8))
    assert_same_state(biofx.companion(found), expected)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (InContexts, (3, 4)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), (2, 5, 8)),
    ],
    ids=["contexts", "attention"],
)
def test_contexts_and_attention(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = make()
    expected = transformed(model, RATES)
    found = compiled(model, RATES)
    assert_learns_as(found, model, expected, torch.randn(shape))
    assert_same_state(biofx.companion(found), expected)


@pytest.mark.filterwarnings("ignore")  # of inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor() -> None:
    model = perceptron()
    expected = transformed(model, SIGNS)
    found = compiled(model, SIGNS, then="inductor")
    assert_learns_as(found, model, expected, torch.randn(5, 4), rtol=1e-5, atol=1e-6)


def test_rates_are_what_gradients_are_multiplied_by_and_signs_those_of_the_jacobian() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    plain, x = copy.deepcopy(model), torch.randn(7, 4)
    found = compiled(model, RATES)
    output, gradients = learn(found, model, x)
    _, without = learn(plain, plain, x)
    assert torch.equal(output, plain(x))
    for place in ("0", "2", "4"):
        rates = biofx.companion(found).get_buffer(f"{place}.bio_mod.fuzzy_learning_rate_parameters")
        assert rates.std() > 0.1
        assert torch.equal(gradients[f"{place}.weight"], without[f"{place}.weight"] * rates)

    torch._dynamo.reset()
    backend = biofx.backend(SIGNS.replace(fuzzy_learning_rate_factor_nu=0.0), then="eager")
    signed: Any = torch.compile(model, backend=backend)
    hidden = torch.relu(model[0](x))
    signed(x)
    with pytest.raises(InputError, match="compiled with 2, each with a state of its own"):
        biofx.companion(signed)
    signs = backend.companion(signed).get_buffer("0.bio_mod.sign")
    assert set(signs.tolist()) == {-1.0, 1.0}
    # of the second layer's sum with respect to each unit that it reads
    weight = torch.where(model[2].weight * signs > 0, model[2].weight, 0.0)
    by_hand = model[4](torch.relu(nn.functional.linear(hidden, weight, model[2].bias)))
    torch.testing.assert_close(signed(x), by_hand)


def test_recompilation_keeps_the_state() -> None:
    model = Net()
    backend = biofx.backend(ALL, then="eager", initialise=True)
    expected = transformed(model, ALL)
    found = torch.compile(model, backend=backend)
    assert_learns_as(found, model, expected, torch.randn(5, 4))
    companion = biofx.companion(found)
    with torch.no_grad():
        for either in (companion, expected):  # as a rule would
            either.get_buffer("stem.bio_mod.fuzzy_learning_rate_parameters").mul_(0.5)
    for batch in (7, 9):
        assert_learns_as(found, model, expected, torch.randn(batch, 4))
    model.eval()
    expected.eval()
    assert_learns_as(found, model, expected, torch.randn(3, 4))
    assert len(backend.reports) > 2
    assert biofx.companion(found) is companion
    assert_same_state(companion, expected)


def test_a_rule_that_replaces_a_state_or_gives_it_another_form_is_followed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    found, x = compiled(model, RATES, then="aot_eager"), torch.randn(3, 4)
    _, before = learn(found, model, x)
    state: Any = biofx.companion(found).get_submodule("0.bio_mod")
    for replaced in (torch.full((6, 4), 2.0), torch.full((6, 4), 2.0, dtype=torch.bfloat16)):
        rates = state.fuzzy_learning_rate_parameters
        state.fuzzy_learning_rate_parameters = replaced
        _, after = learn(found, model, x)
        torch.testing.assert_close(after["0.weight"], before["0.weight"] / rates * 2)
        state.fuzzy_learning_rate_parameters = rates


def test_selectors_and_overrides_are_those_of_the_model() -> None:
    model = Net()
    config = RATES.override("blocks.1", fuzzy_learning_rate_factor_nu=0.0).override(
        "type:Linear", fuzzy_lr_distribution="normal"
    )
    expected = biofx.transform(copy.deepcopy(model), config, exclude="head").graph_module
    found = compiled(model, config, exclude="head")
    assert_learns_as(found, model, expected, torch.randn(5, 4))
    assert_same_state(biofx.companion(found), expected)
    with pytest.raises(biofx.errors.SelectorError, match="matches nothing; did you mean 'stem'"):
        compiled(Net(), RATES, only="stme")(torch.randn(5, 4))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron()

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class Special(Part):
    """A part that is selected by its class."""


@pytest.mark.parametrize("selector", ["type:Special", Special])
def test_modules_are_selected_by_their_class_though_a_graph_does_not_hold_them(selector: Any) -> None:
    model = nn.ModuleDict({"plain": Part(), "special": Special()})
    wired = nn.Sequential(nn.Linear(4, 4), model["plain"], nn.Linear(2, 4), model["special"])
    expected = biofx.transform(copy.deepcopy(wired), RATES, only=selector).graph_module
    found = compiled(wired, RATES, only=selector)
    assert_learns_as(found, wired, expected, torch.randn(5, 4))
    assert_same_state(biofx.companion(found), expected)
    rates = [name for name, _ in biofx.companion(found).named_buffers() if name.endswith("parameters")]
    assert [name.rpartition(".bio_mod")[0] for name in rates] == [f"3.layers.{place}" for place in (0, 2, 4)]


def test_functions_modules_compiled_in_place_and_several_models() -> None:
    model, x = Net().eval(), torch.randn(5, 4)
    expected = transformed(model, RATES)
    backend = biofx.backend(RATES, then="eager")
    step = torch.compile(lambda x: model(x) * 1.0, backend=backend)
    assert_learns_as(step, model, expected, x)
    assert_same_state(biofx.companion(model), expected)
    torch._dynamo.reset()
    other = copy.deepcopy(model)
    other.compile(backend=backend)
    assert_learns_as(other, other, expected, x)
    with torch.no_grad():
        model.stem.weight.zero_()
    assert_learns_as(other, other, expected, x)
    assert biofx.companion(other) is not biofx.companion(model)
    both = torch.compile(lambda x: model(x) + other(x), backend=backend)
    with pytest.raises(
        CaptureError, match="expected a compiled function that calls one model, found Net, Net"
    ):
        both(x)


def test_code_that_dynamo_runs_for_another_model_or_other_parameters() -> None:
    model: Any = perceptron()
    other, x = copy.deepcopy(model), torch.randn(5, 4)
    backend = biofx.backend(RATES, then="aot_eager")
    first, second = torch.compile(model, backend=backend), torch.compile(other, backend=backend)
    expected = transformed(model, RATES)
    assert_learns_as(first, model, expected, x)
    assert_learns_as(second, other, expected, x)
    held = biofx.companion(second).get_parameter
    assert held("0.weight") is other[0].weight
    model[0].weight = nn.Parameter(torch.randn(6, 4))
    assert_learns_as(first, model, transformed(model, RATES), x)
    assert biofx.companion(first).get_parameter("0.weight") is model[0].weight


def test_options_go_to_the_backend_behind() -> None:
    seen: list[Any] = []

    def behind(graph_module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        seen.append((graph_module, [tuple(value.shape) for value in inputs], options))
        return graph_module.forward

    model = nn.Linear(4, 2)
    found = torch.compile(model, backend=biofx.backend(RATES, then=behind), options={"a": 1})
    found(torch.randn(3, 4))
    ((graph_module, shapes, options),) = seen
    assert options == {"options": {"a": 1}}
    assert shapes == [(2, 4), (2,), (3, 4), (2, 4)]  # weight, bias, input, rates
    assert [node.op for node in graph_module.graph.nodes][:4] == ["placeholder"] * 4


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"then": "nix"}, OptionError, "expected a backend of torch .*found 'nix'"),
        ({"then": 3}, OptionError, "expected the name of a backend or a function, found 3"),
        ({"initialise": 1}, OptionError, "initialise: expected True or False"),
        (
            {"config": {"weight_splitting_Gamma": 2, "weight_splitting_mode": "sub-weights"}},
            OptionError,
            "puts several parameters in the place of one",
        ),
        (
            {"config": {"apply_dales_principle": True, "dales_method": "expand"}},
            OptionError,
            "makes layers wider",
        ),
        ({"passes": "nix"}, BiofxError, "nix"),
    ],
)
def test_what_cannot_live_in_a_graph_is_refused_at_once(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        biofx.backend(options.pop("config", None), **options)


def test_values_to_start_from_are_refused_and_the_model_is_as_it_was() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    found = compiled(model, ALL)
    for _ in range(2):  # and every time
        with pytest.raises(OptionError, match=r"give 2 parameters .* other values .*initialise=True"):
            found(torch.randn(5, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="found a Net that was not"):
        biofx.companion(found)


def test_masks_without_rescaling_change_no_parameter() -> None:
    config = biofx.BioConfig(weight_density=0.5, weight_mask_initialisation="keep", seed=2)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    before, expected = copy.deepcopy(model.state_dict()), transformed(model, config)
    found = compiled(model, config)
    assert_learns_as(found, model, expected, torch.randn(3, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_backend_alone_and_graphs_that_it_cannot_name() -> None:
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(CaptureError, match=r"expected a call by torch.compile, found none"):
        biofx.backend(then="eager")(graph, [])()
    stray = nn.Parameter(torch.ones(4))

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.fc(x) * stray
            return found

    with pytest.raises(CaptureError, match=r"expected parameters of Reads, .* found another"):
        compiled(Reads(), RATES)(torch.randn(2, 4))

    class Checkpointed(Reads):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)
            return found

    with pytest.raises(
        CaptureError, match=r"found 'fc.weight' in a part that tag_activation_checkpoint runs"
    ):
        compiled(Checkpointed(), RATES)(torch.randn(2, 4))
    double = torch.compile(lambda x: x * 2, backend=biofx.backend(then="eager"))
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
