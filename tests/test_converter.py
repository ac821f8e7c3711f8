from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioConverter, BioGraphModule, BioModule, Distribution, OptionError
from biofx.errors import InputError, PlasticityError
from biofx.operators.rate_ops import scale_gradient
from biofx.operators.split_ops import pool_synapses
from biofx.plasticity.model_states import bio_modules


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def state_of(model: nn.Module, layer: str = "0") -> Any:
    state = model.get_submodule(layer).bio_mod
    assert isinstance(state, BioModule)
    return state


def gradient_of(model: nn.Module, name: str) -> Tensor:
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient


def backward(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    model(torch.linspace(-1, 1, 12).view(3, 4) if x is None else x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# the converter itself


def test_options_come_from_a_config_a_dict_or_fields() -> None:
    config = BioConfig(dampening_factor=0.7, seed=3)
    assert BioConverter().get_config() == BioConfig()
    assert BioConverter(config).get_config() is not None
    assert BioConverter(config).get_config() == config
    assert BioConverter({"dampening_factor": 0.7, "seed": 3}).get_config() == config
    assert BioConverter(dampening_factor=0.7, seed=3).get_config() == config
    assert BioConverter(config, seed=4).get_config() == config.replace(seed=4)
    assert BioConverter.from_dict(config.to_dict()).get_config() == config


@pytest.mark.parametrize("make", [BioConverter, BioConverter.from_dict, lambda o: BioConverter(**o)])
def test_unknown_and_bad_options_are_refused(make: Callable[[dict[str, Any]], BioConverter]) -> None:
    with pytest.raises(OptionError, match="unknown field 'dampening'; did you mean 'dampening_factor'"):
        make({"dampening": 0.5})
    with pytest.raises(OptionError, match="dampening_factor"):
        make({"dampening_factor": 1.5})


def test_update_holds_for_later_conversions_alone() -> None:
    converter = BioConverter(crystal_thresh=1e-9)
    first = converter(mlp())
    converter.update_config(
        crystal_thresh=1e9, dampening_factor=0.5, weight_splitting_Gamma=2, weight_splitting_fold=False
    )
    second = converter(mlp())
    for model in (first, second):
        backward(model)
    # the second catches all that carries gradient
    alive = [int((second.get_parameter(f"{layer}.weight").grad != 0).sum()) for layer in (0, 2)]
    assert second.crystallize() == {"0.weight": alive[0], "2.weight": alive[1]}
    assert sum(first.crystallize().values()) < sum(alive)
    assert state_of(first).config.dampening_factor == BioConfig().dampening_factor
    assert not first.graph.find_nodes(op="call_function", target=pool_synapses)
    assert second.graph.find_nodes(op="call_function", target=pool_synapses)
    with pytest.raises(OptionError):
        converter.update_config(crystal_thresh=1.0, dampening_factor=2.0)
    assert converter.get_config().crystal_thresh == 1e9


def test_conversion_leaves_model_and_global_state_alone(unchanged: Callable[[nn.Module], Any]) -> None:
    model = mlp()
    with unchanged(model):
        bio = BioConverter(weight_splitting_Gamma=2, apply_dales_principle=True)(model)
        backward(bio)
        bio.rejuvenate_weights()
    assert isinstance(bio, BioGraphModule)
    assert all(p.grad is None for p in model.parameters())


def test_convert_is_call() -> None:
    assert torch.equal(
        BioConverter().convert(mlp())(torch.ones(1, 4)), BioConverter()(mlp())(torch.ones(1, 4))
    )


@pytest.mark.parametrize(("given", "found"), [(3, "int"), (int, "class int"), (None, "NoneType")])
def test_what_is_no_model_is_refused(given: Any, found: str) -> None:
    with pytest.raises(InputError, match=found):
        BioConverter()(given)


def test_same_passes_as_transform_but_for_the_scaling() -> None:
    config = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)
    converted = BioConverter(config)(mlp())
    pipeline = biofx.rewriting.compile_config(config)
    without = biofx.Pipeline(tuple(p for p in pipeline.passes if p.name != "scale-gradients"))
    expected, _ = biofx.transform(mlp(), passes=without)
    assert biofx.format_graph(converted) == biofx.format_graph(expected)
    assert not converted.graph.find_nodes(op="call_function", target=scale_gradient)
    x = torch.linspace(-1, 1, 12).view(3, 4)
    assert torch.equal(converted(x), expected(x))


def test_overrides_hold_for_their_layers() -> None:
    config = BioConfig(base_lr=0.1, lr_variability=0.0).override(
        "2", base_lr=0.7, fuzzy_lr_distribution="baseline"
    )
    bio = BioConverter(config)(mlp())
    assert state_of(bio, "0").config.base_lr == 0.1
    assert state_of(bio, "2").config.base_lr == 0.7
    assert (state_of(bio, "2").fuzzy_learning_rate_parameters == 1).all()
    assert (state_of(bio, "0").fuzzy_learning_rate_parameters != 1).any()


# classes


class Net(nn.Module):
    """A net whose size is an argument."""

    def __init__(self, hidden: int, *, outputs: int = 2) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


def test_instances_of_a_converted_class_come_out_converted() -> None:
    converted: Any = BioConverter(weight_splitting_Gamma=2, weight_splitting_fold=False)(Net)
    bio = converted(8, outputs=3)
    assert isinstance(bio, BioGraphModule)
    assert bio(torch.ones(5, 4)).shape == (5, 3)
    backward(bio)
    assert bio.fuzzy_learning_rates() == {"fc1.weight": 32, "fc2.weight": 24}
    assert bio.graph.find_nodes(op="call_function", target=pool_synapses)
    assert (converted.__name__, converted.__doc__, converted.__module__) == ("Net", Net.__doc__, __name__)
    assert issubclass(converted, Net)


def test_nothing_is_patched_process_wide() -> None:
    before = {cls: dict(vars(cls)) for cls in (Net, nn.Module, nn.Linear, BioModule, BioGraphModule)}
    converted: Any = BioConverter()(Net)
    converted(4)
    for cls, attributes in before.items():
        assert dict(vars(cls)) == attributes, cls
    assert type(Net(4)) is Net
    assert not hasattr(Net(4).fc1, "bio_mod")


def test_subclass_of_a_converted_class_keeps_its_own_constructor() -> None:
    converted: Any = BioConverter()(Net)

    class Wider(converted):  # type: ignore[misc]
        def __init__(self, note: str) -> None:
            super().__init__(12)
            self.note = note
            self.extra = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(super().forward(x))  # type: ignore[no-any-return]

    bio: Any = Wider("mine")
    assert isinstance(bio, BioGraphModule)
    assert bio.note == "mine"
    assert bio(torch.ones(5, 4)).shape == (5, 1)
    backward(bio)
    assert bio.fuzzy_learning_rates() == {"fc1.weight": 48, "fc2.weight": 24, "extra.weight": 2}


def test_converted_class_keeps_the_options_of_its_conversion() -> None:
    converter = BioConverter(base_lr=0.3)
    converted: Any = converter(Net)
    converter.update_config(base_lr=0.9)
    assert state_of(converted(4), "fc1").config.base_lr == 0.3


def test_instances_of_a_converted_class_can_be_copied() -> None:
    bio: Any = BioConverter()(Net)(4)
    for twin in (copy.deepcopy(bio), pickle.loads(pickle.dumps(bio))):
        assert state_of(twin, "fc1").get_parent() is twin.fc1
        assert torch.equal(twin(torch.ones(1, 4)), bio(torch.ones(1, 4)))


# the explicit methods


def test_gradient_is_multiplied_by_the_factors_at_each_call() -> None:
    bio = BioConverter(fuzzy_learning_rate_factor_nu=0.5)(mlp())
    plain = backward(bio)
    assert bio.fuzzy_learning_rates() == {"0.weight": 24, "2.weight": 12}
    for name, parameter in bio.named_parameters():
        layer = name.rpartition(".")[0]
        factors = state_of(bio, layer).fuzzy_learning_rate_parameters if name.endswith("weight") else 1.0
        assert torch.equal(parameter.grad, plain[name] * factors), name


def test_one_layer_alone() -> None:
    bio = BioConverter()(mlp())
    plain = backward(bio)
    assert state_of(bio, "0").fuzzy_learning_rates() == 24
    assert torch.equal(bio.get_parameter("2.weight").grad, plain["2.weight"])
    assert not torch.equal(bio.get_parameter("0.weight").grad, plain["0.weight"])
    before = bio.get_parameter("2.weight").detach().clone()
    state_of(bio, "0").rejuvenate_weights()
    assert torch.equal(bio.get_parameter("2.weight"), before)


@pytest.mark.parametrize("method", ["project", "abs"])
def test_signs_are_written_into_the_weights(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    config = BioConfig(
        apply_dales_principle=True,
        dales_method=method,
        dales_initialisation="keep",
        dales_excitatory_fraction=0.5,
    )
    bio = BioConverter(config)(model)
    weight, sign = bio.get_parameter("2.weight"), state_of(bio, "2").presynaptic_signs()
    x = torch.linspace(-1, 1, 12).view(3, 4)
    expected_output = bio(x)
    before = weight.detach().clone()
    wrong = before * sign < 0
    assert wrong.any()
    result = bio.enforce_dales_principle()
    assert result["2.weight"] == wrong.sum()
    assert result["0.weight"] == "its presynaptic units have no signs"
    assert torch.equal(weight.detach(), torch.where(wrong, 0.0 if method == "project" else -before, before))
    torch.testing.assert_close(bio(x), expected_output)
    assert bio.enforce_dales_principle()["2.weight"] == 0


def test_scaling_in_the_graph_and_by_a_call_is_refused() -> None:
    bio, _ = biofx.transform(mlp())
    scaled = backward(bio)
    with pytest.raises(PlasticityError, match="the graph scales the gradients already, during backward"):
        bio.fuzzy_learning_rates()
    with pytest.raises(PlasticityError, match="its gradient is scaled in the graph already"):
        state_of(bio).fuzzy_learning_rates()
    for name, gradient in scaled.items():
        assert torch.equal(gradient_of(bio, name), gradient)


class Tied(nn.Module):
    """Two layers share a weight; a third layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.relu(self.twice(self.second(torch.relu(self.first(x))))))  # type: ignore[no-any-return]


def test_weight_used_twice_is_acted_on_once() -> None:
    bio = BioConverter()(Tied())
    assert state_of(bio, "first") is state_of(bio, "second")
    plain = backward(bio)
    assert bio.fuzzy_learning_rates() == {"first.weight": 16, "twice.weight": 16}
    for layer in ("first", "twice"):
        factors = state_of(bio, layer).fuzzy_learning_rate_parameters
        assert torch.equal(bio.get_parameter(f"{layer}.weight").grad, plain[f"{layer}.weight"] * factors)
    twin = copy.deepcopy(bio)
    assert state_of(twin, "first") is state_of(twin, "second")
    assert state_of(twin, "first").get_parent() is twin.first
    fresh = BioConverter(seed=9)(Tied())
    fresh.load_state_dict(bio.state_dict())
    assert torch.equal(
        state_of(fresh, "second").fuzzy_learning_rate_parameters,
        state_of(bio, "first").fuzzy_learning_rate_parameters,
    )


class Unusual(nn.Module):
    """Layers that rules cannot act on, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.computed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.computed(self.frozen(self.used(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", ["fuzzy_learning_rates", "volume_dependent_lr", "crystallize"])
def test_layers_that_cannot_take_part_are_skipped_whole_and_named(rule: str) -> None:
    bio = BioConverter(crystal_thresh=1e6)(Unusual())
    backward(bio)
    before = copy.deepcopy(bio.state_dict())
    result = getattr(bio, rule)()
    assert result == {
        "used.weight": 16,
        "frozen.weight": "its weight is frozen",
        "unused.weight": "its weight has no gradient",
        "computed.weight": "its weight is computed by a parametrization, not a parameter",
    }
    for key, value in bio.state_dict().items():
        if not key.startswith("used.bio_mod"):
            assert torch.equal(value, before[key]), key


def test_reading_the_weights_takes_no_step_of_spectral_norm() -> None:
    bio = BioConverter()(Unusual())
    before = copy.deepcopy(bio.state_dict())
    with pytest.raises(PlasticityError, match="has nothing to act on"):
        bio.crystallize()
    for key, value in bio.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_without_any_gradient_it_is_one_clear_error() -> None:
    bio = BioConverter()(mlp())
    for rule in ("fuzzy_learning_rates", "volume_dependent_lr", "crystallize"):
        with pytest.raises(
            PlasticityError, match=rf"{rule} has nothing to act on \(0\.weight: .* no gradient; 2"
        ):
            getattr(bio, rule)()


# extension


def test_own_state_class_and_choice_of_layers() -> None:
    class Shrinking(BioModule):
        exposed_functions = (*BioModule.exposed_functions, "shrink")

        def shrink(self, by: float) -> float:
            self.get_parent().weight.data.mul_(by)
            return by

    class Own(BioConverter):
        def _bio_modulize(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear) and module.in_features == 6:
                module.add_module("bio_mod", Shrinking(lambda: module, config=self.config))

    model = mlp()
    bio = Own(crystal_thresh=1e6)(model)
    assert not isinstance(getattr(bio.get_submodule("0"), "bio_mod", None), Shrinking)
    assert bio.shrink(0.5) == {"2.weight": 0.5}
    assert torch.equal(bio.get_parameter("2.weight"), model.get_parameter("2.weight") * 0.5)
    assert torch.equal(bio.get_parameter("0.weight"), model.get_parameter("0.weight"))
    with pytest.raises(AttributeError, match="shrink"):
        _ = BioConverter()(mlp()).shrink
    again = Own()(bio)  # what has its state keeps it
    assert again.shrink(2.0) == {"2.weight": 2.0}


def test_marked_layers_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    assert BioConverter.set_last_module_token_for_module(model[2]) is model[2]
    bio = BioConverter(weight_splitting_Gamma=2, weight_splitting_fold=False)(model)
    pools = bio.graph.find_nodes(op="call_function", target=pool_synapses)
    assert [pool.args[0].target for pool in pools] == ["0"]


# copies and checkpoints


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies_are_independent_and_linked_to_their_own_layers(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    bio = BioConverter(crystal_thresh=1e6, apply_dales_principle=True, weight_splitting_Gamma=2)(mlp())
    backward(bio)
    bio.crystallize()
    bio.rejuvenate_weights()
    twin: Any = duplicate(bio)
    kept = copy.deepcopy(bio.state_dict())
    for name in ("0", "2"):
        assert state_of(twin, name) is not state_of(bio, name)
        assert state_of(twin, name).get_parent() is twin.get_submodule(name)
        assert state_of(bio, name).get_parent() is bio.get_submodule(name)
    backward(twin)
    twin.crystallize()
    twin.rejuvenate_weights()
    for key, value in bio.state_dict().items():
        assert torch.equal(value, kept[key]), key
    backward(bio)
    bio.crystallize()
    bio.rejuvenate_weights()  # the same events, the same numbers
    for key, value in bio.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


def test_checkpoints_go_both_ways() -> None:
    config = BioConfig(
        fuzzy_lr_distribution=Distribution.TEMPORAL, fuzzy_lr_dynamic=True, fuzzy_lr_update_freq=1
    )
    model = mlp()
    bio = BioConverter(config)(model)
    backward(bio)
    bio.update_fuzzy_learning_rates()
    bio.crystallize()
    bio.volume_dependent_lr()
    bio.synaptic_scaling()
    bio.rejuvenate_weights()
    state = bio.state_dict()
    remembered = state_of(bio)
    assert (remembered.steps, remembered.events) == (1, 3)
    assert remembered.target_strength is not None
    assert remembered.target_strength.shape == (6,)
    # into the plain model: its own keys, under their own names
    incompatible = model.load_state_dict(state, strict=False)
    assert not incompatible.missing_keys
    assert all(".bio_mod." in key for key in incompatible.unexpected_keys)
    assert torch.equal(model.get_parameter("0.weight"), bio.get_parameter("0.weight"))
    # into another converted model, strictly; and on from there with the same numbers
    other = BioConverter(config.replace(fuzzy_learning_rate_factor_nu=0.01))(mlp())
    state_of(other).config = state_of(bio).config
    state_of(other, "2").config = state_of(bio, "2").config
    other.load_state_dict(state)
    for m in (bio, other):
        m.update_fuzzy_learning_rates()
        m.rejuvenate_weights()
    for key, value in bio.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    # a plain checkpoint leaves the state of plasticity as it is
    before = copy.deepcopy(bio.state_dict())
    plain = {key: value + 1 for key, value in mlp().state_dict().items()}
    bio.load_state_dict(plain)
    for key, value in bio.state_dict().items():
        assert torch.equal(value, before[key] if ".bio_mod." in key else plain[key]), key


def test_same_seed_same_model_and_another_seed_another() -> None:
    same = [BioConverter(seed=5)(mlp()).state_dict() for _ in range(2)]
    other = BioConverter(seed=6)(mlp()).state_dict()
    key = "0.bio_mod.fuzzy_learning_rate_parameters"
    assert torch.equal(same[0][key], same[1][key])
    assert not torch.equal(same[0][key], other[key])


def test_factors_of_layers_that_are_never_called_are_their_own() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    bio = BioConverter()(Idle())
    a, b = (state_of(bio, name).fuzzy_learning_rate_parameters for name in "ab")
    assert a is not None
    assert b is not None
    assert not torch.equal(a, b)


def test_every_weight_of_a_recurrent_layer_has_factors() -> None:
    bio = BioConverter(fuzzy_learning_rate_factor_nu=0.3)(nn.Sequential(nn.GRU(4, 3)))
    bio(torch.randn(5, 2, 4))[0].square().sum().backward()
    before = {path: parameter.grad.clone() for path, parameter in bio.named_parameters()}
    assert bio.fuzzy_learning_rates() == {"0.weight_ih_l0": 36, "0.weight_hh_l0": 27}
    for path in ("weight_ih_l0", "weight_hh_l0"):
        factors = bio.get_buffer(f"0.bio_mod.{path}.fuzzy_learning_rate_parameters")
        assert factors.std() > 0.05
        torch.testing.assert_close(bio.get_parameter(f"0.{path}").grad, before[f"0.{path}"] * factors)


def test_factors_are_those_of_the_weights_that_expansion_makes() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    bio = BioConverter(apply_dales_principle=True, dales_method="expand")(net())
    assert bio.get_parameter("0.weight").shape == (12, 4)
    for path, state in bio_modules(bio).items():
        factors = state.fuzzy_learning_rate_parameters
        assert factors is not None
        assert factors.shape == bio.get_parameter(path).shape
    again, report = biofx.transform(BioConverter()(net()), passes=biofx.passes.ExpandUnits())
    assert again.get_parameter("0.weight").shape == (6, 4)
    assert "learning rates" in str(report)
