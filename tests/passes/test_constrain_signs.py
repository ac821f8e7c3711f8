from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import biofx
from biofx.operators.sign_ops import constrain_sign
from biofx.passes import ConstrainSigns, ScaleGradients

EVERYWHERE = {"constrain_inputs": True, "constrain_readout": True}


def constrain(model: nn.Module, **options: Any) -> biofx.PassResult:
    return biofx.transform(model, passes=ConstrainSigns(**options))


def effective_weights(bio: biofx.BioGraphModule, x: Tensor) -> dict[str, Tensor]:
    """The weight that each constrained layer computes with, read off the running graph."""
    found = [value for value in constrained(bio, x) if value.dim() > 1]
    return {str(number): value for number, value in enumerate(found)}


def effective_gains(bio: biofx.BioGraphModule, x: Tensor) -> list[Tensor]:
    """The gains that constrained normalisations compute with."""
    return [value for value in constrained(bio, x) if value.dim() == 1]


def constrained(bio: biofx.BioGraphModule, x: Tensor) -> list[Tensor]:
    """All that ``constrain_sign`` returns, in execution order."""
    seen: list[Tensor] = []

    class Reader(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            result = super().call_function(target, args, kwargs)
            if target is constrain_sign:
                seen.append(result.detach())
            return result

    Reader(bio).run(x)
    return seen


def presynaptic_signs(bio: biofx.BioGraphModule, layer: str) -> Tensor:
    """The sign of each unit that a layer reads, one per input channel."""
    state: Any = bio.get_submodule(layer).bio_mod
    signs: Tensor = state.presynaptic_signs()
    return signs


def reasons(report: biofx.Report) -> dict[str, str]:
    return {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}


def is_single_signed(columns: Tensor) -> bool:
    """Whether each row of a ``(units, weights)`` matrix has weights of one sign only."""
    return bool(((columns >= 0).all(1) | (columns <= 0).all(1)).all())


def test_graph_and_report(residual_net: nn.Module, golden: Callable[[str, str], None]) -> None:
    bio, report = constrain(residual_net)
    golden("constrain_signs", f"{biofx.format_graph(bio)}\n\n{report}")


def test_project_keeps_weights_of_the_right_sign_and_zeroes_the_others(
    mlp: nn.Sequential, vectors: Tensor
) -> None:
    bio, _ = constrain(mlp, initialisation="keep")
    weight, sign = mlp.get_parameter("2.weight").detach(), bio.get_buffer("0.bio_mod.sign")
    (found,) = effective_weights(bio, vectors).values()
    for row in range(4):
        for column in range(6):
            right = weight[row, column] * sign[column] > 0
            assert found[row, column] == (weight[row, column] if right else 0)


def test_abs_mirrors_weights_of_the_wrong_sign(mlp: nn.Sequential, vectors: Tensor) -> None:
    bio, _ = constrain(mlp, method="abs", initialisation="keep")
    (found,) = effective_weights(bio, vectors).values()
    assert torch.equal(found, mlp.get_parameter("2.weight").detach().abs() * bio.get_buffer("0.bio_mod.sign"))


@pytest.mark.parametrize("method", ["project", "abs"])
@pytest.mark.parametrize(
    ("layer", "units_first"),
    [
        (nn.Linear(4, 6), lambda w: w.T),
        (nn.Conv1d(4, 6, 3), lambda w: w.transpose(0, 1).flatten(1)),
        (nn.Conv2d(4, 6, 3), lambda w: w.transpose(0, 1).flatten(1)),
        (nn.Conv3d(4, 6, 2), lambda w: w.transpose(0, 1).flatten(1)),
        (nn.Conv2d(4, 6, 3, groups=2), lambda w: w.reshape(2, 3, 2, 9).transpose(1, 2).reshape(4, 27)),
        (nn.Conv2d(4, 8, 3, groups=4), lambda w: w.reshape(4, 2 * 9)),
        (nn.ConvTranspose2d(4, 6, 3), lambda w: w.flatten(1)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), lambda w: w.flatten(1)),
    ],
)
def test_sign_belongs_to_the_presynaptic_unit(
    layer: Any, units_first: Callable[[Tensor], Tensor], method: str
) -> None:
    # every unit starts with synapses of both signs, so that none ends up with none at all
    both_signs = (torch.arange(layer.weight.numel()) % 3 - 0.5).sign().view_as(layer.weight)
    layer.weight.data.copy_(both_signs * (0.1 + torch.rand(layer.weight.shape)))
    options = {"method": method, "excitatory_fraction": 0.75, "initialisation": "keep", **EVERYWHERE}
    bio, report = constrain(nn.Sequential(layer), **options)
    x = torch.randn(2, 4, *(6,) * (layer.weight.dim() - 2))
    (found,) = effective_weights(bio, x).values()
    columns, sign = units_first(found), bio.get_buffer("0.bio_mod.local_sign")
    assert torch.equal(presynaptic_signs(bio, "0"), sign)
    assert sign.tolist().count(1) == 3
    assert is_single_signed(columns)
    assert (columns.sum(1).sign() == sign).all()
    assert not is_single_signed(units_first(layer.weight.detach()))
    assert report.remarks[0].details["wrong"] == int((units_first(layer.weight) * sign[:, None] < 0).sum())


def test_output_moves_with_the_sign_of_the_unit_at_every_consumer() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    bio, _ = constrain(model, initialisation="keep")
    sign = bio.get_buffer("0.bio_mod.sign")
    hidden = torch.rand(8, generator=generator)
    effective = effective_weights(bio, torch.randn(1, 4, generator=generator))["0"]
    jacobian = torch.autograd.functional.jacobian(lambda h: effective @ h, hidden)
    assert ((jacobian * sign) >= 0).all()
    kept = (model.get_parameter("2.weight") * sign > 0).any(dim=0)
    assert kept.sum() > 4
    assert torch.equal(((jacobian * sign) > 0).any(dim=0), kept)


def test_constraint_holds_whatever_is_written_into_the_parameter(mlp: nn.Sequential, vectors: Tensor) -> None:
    for method in ("project", "abs"):
        bio, _ = constrain(mlp, method=method)
        with torch.no_grad():
            bio.get_parameter("2.weight").copy_(torch.randn(4, 6))
        assert is_single_signed(effective_weights(bio, vectors)["0"].T)
        bio.load_state_dict(mlp.state_dict())
        assert is_single_signed(effective_weights(bio, vectors)["0"].T)


@pytest.mark.parametrize("method", ["project", "abs"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_violation_during_training(
    optimizer: Any, method: str, residual_net: nn.Module, images: Tensor
) -> None:
    bio, _ = constrain(residual_net, method=method, **EVERYWHERE)
    training = optimizer(bio.parameters(), lr=0.05)
    for _ in range(30):
        training.zero_grad()
        bio(images).square().sum().backward()
        training.step()
        for weight in effective_weights(bio, images).values():
            assert is_single_signed(weight.transpose(0, 1).flatten(1))
        (gain,) = effective_gains(bio, images)
        assert (gain >= 0).all()


def test_projected_gradient_lets_a_weight_return_but_not_leave() -> None:
    weight = torch.tensor([[2.0, -1.0, -1.0, 0.0, 0.0]], requires_grad=True)
    sign = torch.ones(5, dtype=torch.int8)
    output_gradient = torch.tensor([[3.0, 3.0, -3.0, 3.0, -3.0]])
    effective = constrain_sign(weight, sign)
    assert effective.tolist() == [[2, 0, 0, 0, 0]]
    effective.backward(output_gradient)
    assert weight.grad is not None
    assert weight.grad.tolist() == [[3, 0, -3, 0, -3]]


def test_a_silent_synapse_comes_back_when_it_is_needed() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(-0.5)
    bio, _ = constrain(nn.Sequential(layer), excitatory_fraction=1.0, initialisation="keep", **EVERYWHERE)
    training = torch.optim.SGD(bio.parameters(), lr=0.1)
    x = torch.ones(1, 1)
    assert bio(x).item() == 0
    for _ in range(60):
        training.zero_grad()
        (bio(x) - 1).square().sum().backward()
        training.step()
    assert bio(x).item() == pytest.approx(1, abs=1e-4)


def test_abs_gradient_has_the_slope_of_the_mirror_and_leaves_zero() -> None:
    weight = torch.tensor([[2.0, -1.0, 0.0]], requires_grad=True)
    sign = torch.tensor([1, -1, -1], dtype=torch.int8)
    effective = constrain_sign(weight, sign, method="abs")
    assert effective.tolist() == [[2, -1, 0]]
    effective.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1, -1]]


def test_unit_without_a_sign_is_free() -> None:
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    sign = torch.tensor([0, 1], dtype=torch.int8)
    assert constrain_sign(weight, sign).tolist() == [[1, 0], [-1, 1]]


def test_inputs_and_readout_are_free_unless_asked_for(mlp: nn.Module) -> None:
    _, report = constrain(mlp)
    assert reasons(report).keys() == {"0", "4"}
    _, with_inputs = constrain(mlp, constrain_inputs=True)
    assert reasons(with_inputs).keys() == {"4"}
    _, everywhere = constrain(mlp, **EVERYWHERE)
    assert not reasons(everywhere)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.25, 1), (0.5, 3), (0.8, 5), (1.0, 6)])
def test_fraction_of_excitatory_units(fraction: float, count: int, mlp: nn.Module) -> None:
    bio, report = constrain(mlp, excitatory_fraction=fraction, only="2")
    sign = bio.get_buffer("0.bio_mod.sign")
    assert sign.dtype == torch.float32
    assert torch.equal(presynaptic_signs(bio, "2"), sign)
    assert (sign == 1).sum() == round(6 * fraction)
    assert count == pytest.approx(round(6 * fraction), abs=1)
    assert report.remarks[1].details["excitatory"] == round(6 * fraction)


def test_postsynaptic_axis_signs_rows_and_kernels(residual_net: nn.Module, images: Tensor) -> None:
    bio, _ = constrain(residual_net, axis="postsynaptic", **EVERYWHERE)
    stem, conv, fc = effective_weights(bio, images).values()
    assert is_single_signed(fc)
    assert is_single_signed(conv.flatten(0, 1).flatten(1))
    assert is_single_signed(stem.flatten(0, 1).flatten(1))
    assert bio.get_buffer("conv.bio_mod.local_sign").shape == (4, 4, 1, 1)


def test_signs_depend_on_seed_and_path_alone(mlp: nn.Module) -> None:
    key = "0.bio_mod.sign"
    first, again = constrain(mlp)[0].get_buffer(key), constrain(mlp, **EVERYWHERE)[0].get_buffer(key)
    others = [constrain(mlp, seed=seed)[0].get_buffer(key) for seed in range(1, 8)]
    assert torch.equal(first, again)
    assert any(not torch.equal(first, other) for other in others)


def test_weight_used_twice_is_constrained_once(vectors: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fc(torch.relu(self.fc(self.first(x)))))  # type: ignore[no-any-return]

    bio, report = constrain(Twice())
    assert len(effective_weights(bio, vectors)) == 1
    assert [remark.node for remark in report.remarks if remark.kind == "applied"] == ["fc", "fc_1"]


class CalledTwice(nn.Module):
    """A layer that reads the same units twice, rectified and not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        both = self.fc(torch.relu(hidden)) + self.fc(torch.tanh(hidden))
        return self.last(torch.relu(both))  # type: ignore[no-any-return]


def test_each_use_tells_whether_what_it_reads_may_be_negative() -> None:
    _, report = constrain(CalledTwice())
    told = {remark.node: "may be negative" in remark.message for remark in report.remarks}
    assert told == {"first": False, "fc": False, "fc_1": True, "last": False}


def test_weight_with_a_use_that_is_left_alone_keeps_its_values(vectors: Tensor) -> None:
    model = CalledTwice()
    bio, report = constrain(model, only="fc_1")
    assert torch.equal(bio.get_parameter("fc.weight"), model.fc.weight)
    assert reasons(report)["fc"] == "not selected by only=['fc_1']"
    (found,) = effective_weights(bio, vectors).values()
    sign = presynaptic_signs(bio, "fc")
    assert torch.equal(found, torch.where(model.fc.weight * sign > 0, model.fc.weight, 0))


def test_negative_gains_of_a_norm_that_is_not_selected_stay_as_they_are(residual_net: nn.Module) -> None:
    residual_net.get_parameter("bn.weight").data[:2] = -1
    bio, report = constrain(residual_net, only="conv", initialisation="keep")
    assert reasons(report)["bn"] == "not selected by only=['conv']"
    for name, parameter in residual_net.named_parameters():
        assert torch.equal(parameter, bio.get_parameter(name)), name


def test_given_signs_are_kept_and_others_are_refused_later(mlp: nn.Module) -> None:
    config = biofx.BioConfig(apply_dales_principle=True)
    signs = (1, 1, -1, 1, -1, -1)
    only_fc = biofx.transform(mlp, config.override("0", dales_signs=signs), only="2")[0]
    assert presynaptic_signs(only_fc, "2").tolist() == list(signs)
    wide = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    expanded = config.replace(dales_method="expand", dales_constrain_readout=True)
    with pytest.raises(
        biofx.OptionError, match=r"given for '0\.weight' are not the ones that its 12 units have"
    ):
        biofx.transform(wide, expanded.override("0", dales_signs=signs))


def test_second_application_and_late_application_change_nothing(mlp: nn.Module) -> None:
    once, _ = constrain(mlp)
    _, report = constrain(once, seed=5)
    assert not report.modified
    assert reasons(report)["2"] == "its signs are constrained already"
    scaled, _ = biofx.transform(mlp, passes=ScaleGradients())
    _, late = constrain(scaled)
    assert reasons(late)["2"] == "its gradient is scaled already, and signs must be constrained before that"


@pytest.mark.parametrize("method", ["project", "abs"])
def test_weights_begin_with_the_right_sign_and_balanced(
    method: str, mlp: nn.Module, unchanged: Callable[[nn.Module], Any]
) -> None:
    with unchanged(mlp):
        bio, report = constrain(mlp, method=method)
    raw, sign = bio.get_parameter("2.weight").detach(), presynaptic_signs(bio, "2")
    assert (raw * sign >= 0).all()
    torch.testing.assert_close(raw.sum(1), torch.zeros(4))
    assert torch.equal(effective_weights(bio, torch.randn(1, 4))["0"], raw)
    wrong = int((mlp.get_parameter("2.weight").detach() * sign < 0).sum())
    assert report.remarks[1].details["wrong"] == wrong > 0
    for name, parameter in mlp.named_parameters():
        assert torch.equal(parameter, bio.get_parameter(name)) is (name != "2.weight")


def test_parameters_are_left_as_they_are_and_keys_appear_under_bio_mod(mlp: nn.Module) -> None:
    bio, _ = constrain(mlp, initialisation="keep")
    for name, parameter in mlp.named_parameters():
        assert torch.equal(parameter, bio.get_parameter(name))
    names = {f"{layer}.bio_mod.{name}" for layer in "02" for name in ("sign", "_extra_state")}
    assert set(bio.state_dict()) - set(mlp.state_dict()) == names
    assert not bio.get_buffer("2.bio_mod.sign").any()  # nothing but the readout reads these units


# torch.compile instantiates autograd functions itself, and warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", ["project", "abs"])
@pytest.mark.parametrize(
    "survive",
    [
        copy.deepcopy,
        lambda bio: pickle.loads(pickle.dumps(bio)),
        torch.fx.symbolic_trace,
        lambda bio: torch.compile(bio, backend="aot_eager", fullgraph=True),
        lambda bio: torch.export.export(bio, (torch.randn(5, 4),)).module(),
        lambda bio: torch.export.export(bio, (torch.randn(5, 4),), strict=True).module(),
    ],
    ids=["deepcopy", "pickle", "tracing again", "compile", "export", "strict export"],
)
def test_outputs_and_gradients_survive(
    survive: Callable[[Any], nn.Module], method: str, mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = constrain(mlp, method=method)
    bio(vectors).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in bio.named_parameters()}
    survivor = survive(constrain(mlp, method=method)[0])
    survivor(vectors).square().sum().backward()
    torch.testing.assert_close(survivor(vectors), bio(vectors))
    for name, parameter in survivor.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize("method", ["project", "abs"])
def test_gradients_survive_vmap(method: str, mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = constrain(mlp, method=method)
    parameters: dict[str, Tensor] = dict(bio.named_parameters())
    buffers = dict(bio.named_buffers())

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(bio, (given, buffers), (x,))
        return output.square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, vectors)
    for number, x in enumerate(vectors):
        bio.zero_grad()
        bio(x).square().sum().backward()
        torch.testing.assert_close(per_sample["2.weight"][number], bio.get_parameter("2.weight").grad)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "clip"},
        {"axis": 1},
        {"initialisation": "zeros"},
        {"signs": (1, 0)},
        {"excitatory_fraction": 1.2},
        {"constrain_inputs": 1},
        {"constrain_readout": None},
        {"seed": "0"},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(biofx.OptionError, match=f"constrain-signs: {name}: expected .* found"):
        ConstrainSigns(**options)
