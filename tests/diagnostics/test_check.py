"""The audit: every invariant broken on purpose, found with the right count, and sound models left alone."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx import BioConfig, BioConverter, BioGraphModule, Distribution
from biofx.diagnostics import Audit
from biofx.diagnostics.check import INVARIANTS
from biofx.errors import InputError, InvariantError
from biofx.operators.rate_ops import scale_gradient
from biofx.operators.sign_ops import constrain_sign
from biofx.operators.split_ops import pool_synapses
from biofx.plasticity.model_states import bio_module_at

EVERYTHING = BioConfig(
    weight_splitting_Gamma=2,
    apply_dales_principle=True,
    dales_constrain_inputs=True,
    dales_constrain_readout=True,
    fuzzy_lr_distribution=Distribution.ACTIVITY,
    fuzzy_lr_dynamic=True,
)
DALE = EVERYTHING.replace(weight_splitting_Gamma=0, fuzzy_lr_distribution=Distribution.UNIFORM)


def state_of(model: nn.Module, layer: str) -> Any:
    return model.get_submodule(layer).bio_mod


def faults(model: nn.Module) -> list[tuple[str, str, int, int]]:
    """Return layer, invariant, violated and checked of each fault."""
    return [(f.layer, f.invariant, f.violated, f.checked) for f in biofx.check(model).faults]


def rewired(bio: BioGraphModule) -> BioGraphModule:
    bio.graph.lint()
    bio.recompile()
    return bio


def nodes(bio: BioGraphModule, target: Any) -> list[torch.fx.Node]:
    return list(bio.graph.find_nodes(op="call_function", target=target))


class Convolutions(nn.Module):
    """Grouped, depthwise, transposed and tied convolutions, for ``(batch, 4, 6, 6)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.tied = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.tied.weight = self.grouped.weight
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.grouped, self.depthwise, self.up, self.tied):
            x = torch.relu(layer(x))
        return self.last(x)  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer that is called inside the net and as its readout, for ``(batch, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent layer of two levels and its readout, for ``(batch, steps, 4)``."""

    def __init__(self, kind: type[nn.Module] = nn.GRU) -> None:
        super().__init__()
        self.rnn, self.fc = kind(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


class Attending(nn.Module):
    """A Transformer encoder layer between two linear ones, for ``(batch, steps, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(torch.relu(self.first(x))))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """Concatenation, and normalisation with negative gains, for ``(batch, 3, 6, 6)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(12, 3)
        self.norm.weight.data[:2] = -1

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.cat([x, torch.relu(self.a(x))], 1)
        return self.fc(torch.cat([y, torch.relu(self.b(y))], 1).mean((2, 3)))  # type: ignore[no-any-return]


class Unusual(nn.Module):
    """A computed weight, a frozen one, one that is never used and one that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.projection = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.frozen(torch.relu(self.computed(x))))
        return F.linear(x, self.projection)


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


# sound models


@pytest.mark.parametrize("config", [BioConfig(), DALE, EVERYTHING, DALE.replace(dales_method="abs")])
@pytest.mark.parametrize("build", [Convolutions, Twice, Unusual, Recurrent, Attending, Dense])
def test_what_biofx_makes_is_sound(build: Callable[[], nn.Module], config: BioConfig) -> None:
    # a spectral norm has no weight that could have signs, and a GRU no channels to split, though asked to
    computed = [("computed", "asked", 1, 1)] if build is Unusual and config != BioConfig() else []
    unsplit = [("", "asked", 2, 2)] if build is Recurrent and config is EVERYTHING else []
    for bio in (biofx.transform(build(), config).graph_module, BioConverter(config)(build())):
        assert faults(bio) == computed + unsplit


@pytest.mark.parametrize(
    "passes",
    [
        *("split-weights", "constrain-signs", "scale-gradients", "observe-activity"),
        "constrain-signs{axis=postsynaptic,constrain_inputs=true,constrain_readout=true},scale-gradients",
    ],
)
def test_any_subset_of_passes_leaves_a_sound_model(residual_net: nn.Module, passes: str) -> None:
    audit = biofx.check(biofx.transform(residual_net, passes=passes).graph_module)
    assert audit.ok
    assert "conv" in audit.layers


@pytest.mark.parametrize("shared", ["element", "neuron", "layer"])
@pytest.mark.parametrize("distribution", list(Distribution))
def test_drawn_factors_are_within_bounds(distribution: Distribution, shared: str) -> None:
    config = BioConfig(
        fuzzy_lr_distribution=distribution,
        fuzzy_learning_rate_factor_nu=0.9,
        fuzzy_lr_min=0.7,
        fuzzy_lr_max=1.1,
        fuzzy_lr_granularity=shared,
    )
    bio, _ = biofx.transform(Convolutions(), config)
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        biofx.check(bio.to(kind)).raise_if_broken()


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    return nn.DataParallel(wrapped)


@pytest.mark.parametrize("around", [copy.deepcopy, reloaded, nn.DataParallel, compiled])
def test_copies_and_wrappers_are_sound_and_seen_through(
    around: Callable[[nn.Module], nn.Module], residual_net: nn.Module
) -> None:
    bio, _ = biofx.transform(residual_net, DALE)
    assert faults(around(bio)) == []
    bio.get_parameter("fc.weight").data[0, 0] = math.inf
    assert [fault[:3] for fault in faults(around(bio))] == [("fc", "finite", 1)]


@pytest.mark.parametrize("config", [DALE, EVERYTHING, DALE.replace(crystal_thresh=1e3, crystal_min=0.2)])
def test_training_with_every_rule_leaves_a_sound_model(config: BioConfig, residual_net: nn.Module) -> None:
    bio, _ = biofx.transform(residual_net, config)
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.05)
    biofx.attach(bio, optimizer, ["crystallize", "rejuvenate_weights", "synaptic_scaling"])
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(bio(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        biofx.check(bio).raise_if_broken()
    if config.crystal_thresh > 1:  # crystallized below the bound of a draw
        assert min(float(b.min()) for n, b in bio.named_buffers() if n.endswith("parameters")) < 0.5


def test_checkpoint_of_the_original_leaves_a_sound_model(residual_net: nn.Module) -> None:
    bio, _ = biofx.transform(residual_net, DALE)
    plain = type(residual_net)().state_dict()
    bio.load_state_dict(plain)
    audit = biofx.check(bio).raise_if_broken()
    (signs,) = (f for f in audit.findings if f.subject == "conv.weight" and f.invariant == "signs")
    sign = state_of(bio, "conv").signs()
    wrong = int((plain["conv.weight"] * sign < 0).sum())
    assert (signs.checked, signs.violated) == (144, 0)
    assert signs.details == {"wrong_raw": wrong}
    assert wrong > 0


def test_checking_changes_nothing(residual_net: nn.Module, unchanged: Callable[[nn.Module], Any]) -> None:
    bio, _ = biofx.transform(residual_net, EVERYTHING)
    graph = biofx.format_graph(bio)
    calls: list[Any] = []
    bio.register_forward_hook(lambda *_: calls.append(1))
    bio.get_submodule("bn").register_forward_hook(lambda *_: calls.append(1))
    with unchanged(bio):
        assert str(biofx.check(bio)) == str(biofx.check(bio))
    assert biofx.format_graph(bio) == graph
    assert not calls
    assert all(parameter.grad is None for parameter in bio.parameters())


def test_model_without_values_has_nothing_to_check(residual_net: nn.Module) -> None:
    bio, _ = biofx.transform(residual_net, DALE)
    audit = biofx.check(bio.to("meta"))
    assert audit.ok
    assert sum(f.checked for f in audit.findings if f.invariant in ("signs", "rates", "finite")) == 0


@pytest.mark.parametrize(
    "stranger", [nn.Linear(2, 2), torch.fx.symbolic_trace(nn.Linear(2, 2)), "model", nn.Sequential]
)
def test_model_of_another_make_is_refused(stranger: Any) -> None:
    with pytest.raises(InputError, match=r"expected a model that biofx made, found a .*biofx\.transform"):
        biofx.check(stranger)


# signs


def test_weights_that_change_their_sign_behind_the_constraint(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    node = next(node for node in nodes(bio, constrain_sign) if node.name.startswith("_2"))
    users = list(node.users)
    with bio.graph.inserting_after(node):
        shifted = bio.graph.call_function(torch.sub, (node, 0.3))
    for user in users:
        user.replace_input_with(node, shifted)
    sign, weight = state_of(bio, "2").signs(), bio.get_parameter("2.weight").detach()
    used = torch.where(weight * sign < 0, 0.0, weight) - 0.3
    wrong = int((used * sign < 0).sum())
    assert 0 < wrong < 24
    assert faults(rewired(bio)) == [("2", "signs", wrong, 24)]


def test_constraint_that_another_method_replaces(mlp: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    for parameter in bio.parameters():
        nn.init.normal_(parameter)
    assert faults(bio) == []
    monkeypatch.setattr(
        "biofx.operators.sign_ops._ProjectSign.forward", staticmethod(lambda weight, signs: weight.clone())
    )
    wrong = {
        layer: int((bio.get_parameter(f"{layer}.weight") * state_of(bio, layer).signs() < 0).sum())
        for layer in ("0", "2", "4")
    }
    assert {f[0]: f[2] for f in faults(bio) if f[1] == "signs"} == wrong


def test_number_that_is_no_sign_is_found_in_the_buffer_that_holds_it(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    state_of(bio, "2").sign[1:3] = 3
    assert faults(bio) == [("2", "sign values", 2, 4)]


def test_signs_of_the_wrong_number(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    state_of(bio, "0").sign = torch.ones(5, dtype=torch.int8)
    (fault,) = biofx.check(bio).faults
    assert (fault.layer, fault.invariant) == ("2", "signs")
    assert "expected signs that fit a weight of shape (4, 6), found 5 of shape (5,)" in fault.message


def test_signs_that_rules_and_graph_do_not_share(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    state_of(bio, "2").__dict__["_sign_sources"] = ((state_of(copy.deepcopy(bio), "0"), "sign"),)
    assert faults(bio) == []
    state_of(bio, "0").sign.copy_(torch.tensor([1, -1, 1, -1, 1, -1]))
    state_of(bio, "2")._sign_sources[0][0].sign.copy_(torch.tensor([1, 1, 1, -1, 1, 0]))
    assert faults(bio) == [("2", "rule signs", 8, 24)]


def test_constraint_that_is_cut_out_of_the_graph(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    node = next(node for node in nodes(bio, constrain_sign) if node.name.startswith("_2"))
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    assert faults(rewired(bio)) == [("2", "sign constraints", 1, 1)]
    bio.graph.erase_node(node)
    assert faults(rewired(bio)) == [("2", "sign constraints", 1, 1), ("2", "kept", 1, 1)]
    assert "is gone from the graph" in biofx.check(bio).faults[1].message


def test_use_beside_the_constraint() -> None:
    config = DALE.replace(fuzzy_lr_distribution=Distribution.BASELINE)

    class Thrice(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(super().forward(torch.relu(self.first(x))))  # type: ignore[no-any-return]

    bio, _ = biofx.transform(Thrice(), config)
    (node,) = (node for node in nodes(bio, constrain_sign) if node.name.startswith("twice"))
    first, second = node.users
    first.replace_input_with(node, node.args[0])  # type: ignore[arg-type]
    (fault,) = biofx.check(rewired(bio)).faults
    assert (fault.layer, fault.invariant, fault.violated, fault.checked) == (
        "twice",
        "sign constraints",
        1,
        2,
    )
    assert fault.message.startswith(f"{first.name!r} reads the parameter beside its sign constraint")
    assert second.name not in fault.message


def test_module_that_is_called_beside_the_constraint() -> None:
    bio, _ = biofx.transform(Convolutions(), DALE.replace(dales_constrain_readout=False))
    grouped = next(node for node in bio.graph.nodes if node.name == "grouped")
    with bio.graph.inserting_after(grouped):
        module = bio.graph.call_module("grouped", (grouped.args[0],))
    grouped.replace_all_uses_with(module, lambda user: user is not module)
    assert faults(rewired(bio)) == [("grouped", "sign constraints", 1, 3)]


def test_free_readout_that_shares_its_weight_is_no_fault() -> None:
    bio, _ = biofx.transform(Twice(), BioConfig(apply_dales_principle=True))
    assert len(nodes(bio, constrain_sign)) == 1
    assert faults(bio) == []


def test_constrained_factors_of_normalisation_are_not_negative(residual_net: nn.Module) -> None:
    bio, _ = biofx.transform(residual_net, BioConfig(fuzzy_lr_distribution=Distribution.BASELINE))
    state = bio_module_at(bio, "bn.weight")
    state.sign = torch.ones(4, dtype=torch.int8)
    (call,) = bio.graph.find_nodes(op="call_module", target="bn")
    with bio.graph.inserting_before(call):
        weight, sign, mean, variance = (
            bio.graph.get_attr(f"bn.{name}")
            for name in ("weight", "bio_mod.sign", "running_mean", "running_var")
        )
        gamma = bio.graph.call_function(constrain_sign, (weight, sign))
        norm = bio.graph.call_function(F.batch_norm, (call.args[0], mean, variance, gamma))
    call.replace_all_uses_with(norm)
    bio.graph.erase_node(call)
    bio.get_parameter("bn.weight").data[1] = -1
    assert faults(rewired(bio)) == []
    state.sign[1:3] = -1
    bio.get_parameter("bn.weight").data[2] = 1
    assert faults(bio) == [("bn", "gammas", 1, 4)]


# learning-rate factors


def test_factors_out_of_bounds(mlp: nn.Module) -> None:
    for bio in (biofx.transform(mlp).graph_module, BioConverter()(mlp)):
        rates = state_of(bio, "2").fuzzy_learning_rate_parameters
        rates[0, :4] = torch.tensor([2.1, -0.1, math.nan, math.inf])
        rates[1, :2] = torch.tensor([0.3, 0.01])  # where crystallization may lead
        by_layer = {f[0]: f[2:] for f in faults(bio) if f[1] == "rates"}
        assert by_layer == {"2": (4, 24)}
        assert [f[2] for f in faults(bio) if f[1] == "finite"] == [2]


def test_bounds_are_those_of_the_layer(mlp: nn.Module) -> None:
    config = BioConfig().override("2", fuzzy_lr_max=3.0, crystal_min=0.3)
    bio, _ = biofx.transform(mlp, config)
    for layer in ("0", "2"):
        state_of(bio, layer).fuzzy_learning_rate_parameters[0, :2] = torch.tensor([2.5, 0.2])
    assert faults(bio) == [("0", "rates", 1, 24), ("2", "rates", 1, 24)]
    messages = [fault.message for fault in biofx.check(bio).faults]
    assert "[0.01, 2]" in messages[0]
    assert "[0.3, 3]" in messages[1]


def test_factors_of_another_shape(mlp: nn.Module) -> None:
    bio = BioConverter()(mlp)
    state_of(bio, "2").fuzzy_learning_rate_parameters = torch.ones(6)
    assert faults(bio) == [("2", "rate shapes", 1, 1)]


def test_factors_that_act_twice_not_at_all_or_elsewhere(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp)
    twice = copy.deepcopy(bio)
    node = nodes(twice, scale_gradient)[1]
    with twice.graph.inserting_after(node):
        again = twice.graph.call_function(scale_gradient, (node, node.args[1]))
    node.replace_all_uses_with(again, lambda user: user is not again)
    assert faults(rewired(twice)) == [("2", "scaling", 1, 1)]

    gone = copy.deepcopy(bio)
    node = nodes(gone, scale_gradient)[1]
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    assert faults(rewired(gone)) == [("2", "scaling", 1, 1)]

    claimed = copy.deepcopy(bio)
    state_of(claimed, "2").scaled_in_graph = False
    (fault,) = biofx.check(claimed).faults
    assert (fault.layer, fault.invariant) == ("2", "scaling")
    assert "a call of fuzzy_learning_rates() would scale it again" in fault.message

    foreign = copy.deepcopy(bio)
    first, second, _ = nodes(foreign, scale_gradient)
    second.replace_input_with(second.args[1], first.args[1])  # type: ignore[arg-type]
    assert faults(rewired(foreign)) == [("2", "scaling", 1, 1)]

    converted = BioConverter()(mlp)
    state_of(converted, "2").scaled_in_graph = True
    assert [fault[:3] for fault in faults(converted)] == [("2", "scaling", 1)]


# splits


def test_pool_that_does_not_divide_and_pool_of_a_pool(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, passes="split-weights")
    first, second = nodes(bio, pool_synapses)
    second.kwargs = {**second.kwargs, "gamma": 3}
    assert faults(rewired(bio)) == [("2", "splits", 1, 1)]
    second.kwargs = {**second.kwargs, "gamma": 2}
    with bio.graph.inserting_after(first):
        again = bio.graph.call_function(pool_synapses, (first,), dict(first.kwargs))
    first.replace_all_uses_with(again, lambda user: user is not again)
    (fault,) = biofx.check(rewired(bio)).faults
    assert (fault.layer, fault.invariant, fault.subject) == ("0", "splits", again.name)


def test_splits_are_known_behind_an_activation(mlp: nn.Module) -> None:
    activation = "split-weights{activation=torch.tanh}"
    audit = biofx.check(biofx.transform(mlp, passes=activation).graph_module)
    assert [(f.layer, f.checked) for f in audit.findings if f.invariant == "splits"] == [("0", 1), ("2", 1)]


# numbers, links, devices, graph


def test_numbers_that_are_not_finite(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, EVERYTHING)
    bio.get_parameter("0.weight").data[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    bio.get_parameter("4.bias").data[1] = math.nan
    state_of(bio, "2").activity[2] = math.nan
    assert faults(bio) == [("0", "finite", 3, 24), ("4", "finite", 1, 2), ("2", "finite", 1, 4)]


def test_large_half_precision_weights_are_finite(mlp: nn.Module) -> None:
    bio = biofx.transform(mlp)[0].half()
    bio.get_parameter("0.weight").data.fill_(6e4)  # their sum is infinite
    assert faults(bio) == []


def test_states_that_change_places(mlp: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    bio = BioConverter()(model)
    first, second = bio.get_submodule("0"), bio.get_submodule("2")
    first._modules["bio_mod"], second._modules["bio_mod"] = second.bio_mod, first.bio_mod
    assert faults(bio) == [("0", "links", 1, 1), ("2", "links", 1, 1)]


def test_state_of_another_model_or_of_none(mlp: nn.Module) -> None:
    bio, other = BioConverter()(mlp), BioConverter()(mlp)
    bio.get_submodule("2").bio_mod = state_of(other, "2")
    (fault,) = biofx.check(bio).faults
    assert (fault.layer, fault.invariant) == ("2", "links")
    assert "it is linked to another Linear than the one it sits in" in fault.message
    bio.get_submodule("2").bio_mod = biofx.BioModule()
    (fault,) = biofx.check(bio).faults
    assert "it is linked to no layer" in fault.message
    moved = BioConverter()(mlp)
    state_of(moved, "2").path = "4.weight"
    assert faults(moved) == [("2", "links", 1, 1)]


def test_state_on_another_device_than_its_weight(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    state = state_of(bio, "2")
    state.noise = torch.zeros(4, 6, device="meta")
    assert faults(bio) == [("2", "devices", 1, 3)]


def test_graph_that_does_not_fit_or_is_not_run(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    node = nodes(bio, constrain_sign)[0]
    node.kwargs = {**node.kwargs, "method": "abs"}
    (fault,) = biofx.check(bio).faults
    assert (fault.layer, fault.invariant, fault.violated) == ("", "graph", 1)
    assert "bio_model.recompile()" in fault.message
    assert faults(rewired(bio)) == []
    del bio.get_submodule("2")._parameters["weight"]
    (fault,) = biofx.check(bio).faults
    assert fault.invariant == "graph"
    assert "the graph does not fit the model" in fault.message
    assert "2.weight" in fault.message


# what comes out


def test_audit_is_read_printed_and_raised(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    sound = biofx.check(bio)
    assert isinstance(sound, Audit)
    assert sound.raise_if_broken() is sound
    assert str(sound).splitlines()[0] == "Sequential: every invariant holds"
    assert "  2: signs 24, sign values 4, sign constraints 1, rule signs 24, rates 24" in str(sound)
    state_of(bio, "2").fuzzy_learning_rate_parameters[0, 0] = 9
    bio.get_parameter("4.weight").data[:, 0] = math.nan
    audit = biofx.check(bio)
    assert not audit.ok
    assert [fault.invariant for fault in audit.faults] == ["rates", "finite"]
    with pytest.raises(InvariantError, match=r"2 faults \(rates, finite\)") as raised:
        audit.raise_if_broken()
    assert "2.bio_mod.fuzzy_learning_rate_parameters: rates, 1 of 24" in str(raised.value)
    assert "4.weight: finite, 2 of 8" in str(raised.value)
    console = Console(width=200, file=io.StringIO())
    console.print(audit)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "rates 1 of 24" in printed
    assert "lower the learning rate" in printed


def test_audit_as_plain_values(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, BioConfig(apply_dales_principle=True))
    bio.get_parameter("2.weight").data[0, 0] = math.nan
    found = biofx.check(bio).to_dict()
    assert json.loads(biofx.check(bio).to_json()) == found
    assert found["schema"] == "biofx.audit/1"
    assert found["ok"] is False
    names = [invariant.name for invariant in INVARIANTS]
    assert list(found["invariants"]) == names
    assert all(list(layer) == names for layer in found["layers"].values())
    nothing = {"checked": 0, "violated": 0, "messages": [], "details": {}}
    assert found["layers"]["0"]["signs"] == nothing  # an input layer is free
    entry = found["layers"]["2"]["finite"]
    assert (entry["checked"], entry["violated"], len(entry["messages"])) == (52, 1, 1)
    assert found["layers"]["2"]["signs"]["details"]["wrong_raw"] >= 0


def test_audit_can_be_kept(mlp: nn.Module) -> None:
    audit = biofx.check(biofx.transform(mlp)[0])
    assert pickle.loads(pickle.dumps(audit)) == audit


def test_walks_over_the_graph_are_linear_in_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(depth: int) -> int:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(2, 2), nn.ReLU())]
        bio, _ = biofx.transform(nn.Sequential(*layers), DALE)
        count = 0
        sources = torch.fx.Node.all_input_nodes.fget  # type: ignore[attr-defined]

        def counted(node: torch.fx.Node) -> list[torch.fx.Node]:
            nonlocal count
            count += 1
            found: list[torch.fx.Node] = sources(node)
            return found

        with monkeypatch.context() as patched:
            patched.setattr(torch.fx.Node, "all_input_nodes", property(counted))
            assert biofx.check(bio).ok
        return count

    short, long = work(10), work(40)
    assert 0 < long < 4.2 * short
