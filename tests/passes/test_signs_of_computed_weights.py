"""Signs and rates of weights that the forward computes from a parameter: masked, rectified, transposed."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.errors import OptionError
from biofx.layers.constant_part import ConstantPart
from biofx.layers.sites import find_sites
from biofx.operators.sign_ops import constrain_sign
from biofx.passes import ConstrainSigns, ScaleGradients
from biofx.plasticity.model_states import apply_rule

SIGNS = biofx.BioConfig(apply_dales_principle=True, dales_constrain_readout=True)
EVERYTHING = SIGNS.replace(fuzzy_learning_rate_factor_nu=0.3)
UNITS = 6


class Rates(nn.Module):
    """Two steps of a network of rates; a subclass says what becomes of its recurrent weight."""

    mask: Tensor
    eye: Tensor
    signed: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)

        def made(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(sizes, generator=generator) / 2)

        self.w_in, self.w_rec, self.w_out = made(UNITS, 4), made(UNITS, UNITS), made(2, UNITS)
        self.bias, self.gain = made(UNITS), nn.Parameter(torch.ones(UNITS))
        self.register_buffer("mask", (torch.rand(UNITS, UNITS, generator=generator) < 0.6).float())
        self.register_buffer("eye", torch.eye(UNITS))
        self.register_buffer("signed", torch.tensor([1.0, 1, 1, 1, -1, -1]))

    def recurrent(self, weight: Tensor) -> Tensor:
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.w_rec, self.w_out)

    def run(self, x: Tensor, w_rec: Tensor, w_out: Tensor) -> Tensor:
        h = torch.relu(F.linear(x, self.w_in, self.bias))
        for _ in range(2):
            h = torch.relu(F.linear(h, self.recurrent(w_rec), self.bias))
        return F.linear(h, w_out)


class Masked(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class MaskFirst(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return (self.mask > 0).to(weight.dtype) * weight * 0.5


class Turned(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight.T * self.mask


class Filled(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(self.mask == 0, 0.0).tanh()


class Chosen(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask > 0, weight, 0.0)


class Diagonal(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight @ self.eye


class Gated(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight * torch.sigmoid(self.gain)


class Absolute(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return torch.abs(weight)


class MaskedAbsolute(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return (weight.abs() * self.mask).t()


class Rectified(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return torch.relu(weight)


class Soft(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return F.softplus(weight) + 0.1


class Exponential(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight.exp() / 4


class Squared(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight**2


class Song(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return torch.relu(weight) @ torch.diag(self.signed)


class SignedMask(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight.abs() * (self.signed * self.mask)


KEPT: tuple[type[Rates], ...] = (Masked, MaskFirst, Turned, Filled, Chosen, Diagonal, Gated)
LOST: tuple[type[Rates], ...] = (Absolute, MaskedAbsolute, Rectified, Soft, Exponential, Squared)
BUILT_IN: tuple[type[Rates], ...] = (Song, SignedMask)


@pytest.fixture(params=["traced", "recorded"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"example_inputs": ((torch.randn(3, 4),), {})} if request.param == "recorded" else {}


def signs_of_units(bio_model: nn.Module) -> Tensor:
    return bio_model.get_buffer("bio_mod.w_in.sign")


def used_weights(bio_model: Any) -> dict[str, Tensor]:
    """The weight that each layer computes with, by the name of its node."""
    constants = ConstantPart(bio_model)
    sites = find_sites(bio_model).found
    return {site.node.name: constants.value(site.weight_node) for site in sites if site.weight_node}


def reasons(report: biofx.Report) -> dict[str | None, str]:
    return {remark.node: remark.message for remark in report.remarks if remark.kind == "missed"}


@pytest.mark.parametrize("method", ["project", "abs"])
@pytest.mark.parametrize("made", [*KEPT, *LOST])
def test_the_function_is_the_definition(made: type[Rates], method: str, options: dict[str, Any]) -> None:
    model, x = made(), torch.randn(5, 4)
    config = SIGNS.replace(dales_method=method, dales_initialisation="keep")
    bio_model, report = biofx.transform(model, config, **options)
    assert [remark.kind for remark in report.passes[0].remarks] == ["missed", *["applied"] * 3]
    signs = signs_of_units(bio_model)
    assert set(signs.tolist()) == {-1, 1}

    def constrained(weight: Tensor, along: Tensor) -> Tensor:
        return weight.abs() * along if method == "abs" else torch.where(weight * along < 0, 0, weight)

    if made in KEPT:
        along = signs[:, None] if made is Turned else signs
        w_rec = constrained(model.w_rec, along)
        expected = model.run(x, w_rec, constrained(model.w_out, signs))
    else:
        h = torch.relu(F.linear(x, model.w_in, model.bias))
        for _ in range(2):
            h = torch.relu(F.linear(h, model.recurrent(model.w_rec) * signs, model.bias))
        expected = F.linear(h, constrained(model.w_out, signs))
    torch.testing.assert_close(bio_model(x), expected)
    for name, weight in used_weights(bio_model).items():
        if name != "linear":  # which reads the inputs
            assert bool((weight * signs >= 0).all()), name
            assert bool((weight != 0).any())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("made", [*KEPT, *LOST, *BUILT_IN])
def test_no_sign_is_wrong_after_200_steps(made: type[Rates], optimizer: Any) -> None:
    bio_model, _ = biofx.transform(made(), EVERYTHING)
    steps = optimizer(bio_model.parameters(), lr=0.01)
    rules = [biofx.Rule("crystallize", every=10), biofx.Rule("rejuvenate_weights", every=50)]
    biofx.attach(bio_model, steps, rules)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        steps.zero_grad()
        (bio_model(torch.randn(8, 4, generator=generator)) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(bio_model.parameters(), 1.0)
        steps.step()
    signs = signs_of_units(bio_model)
    for name, weight in used_weights(bio_model).items():
        if name != "linear":
            assert bool((weight * signs >= 0).all()), name
    assert biofx.check(bio_model).ok
    x = torch.randn(5, 4)
    deployed = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(x), bio_model.eval()(x))


def test_every_drive_moves_with_the_sign_of_the_unit() -> None:
    """The Jacobian of what a unit is given, by the activity of the units before it."""
    drives: list[Any] = []

    class Reader(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is F.linear and args[0].shape[-1] == UNITS:
                drive = functools.partial(F.linear, weight=args[1])
                drives.append(torch.autograd.functional.jacobian(drive, args[0][0]))
            return super().call_function(target, args, kwargs)

    for made in (Masked, Absolute):
        bio_model, _ = biofx.transform(made(), EVERYTHING)
        drives.clear()
        Reader(bio_model).run(torch.randn(1, 4))
        assert len(drives) == 3
        for jacobian in drives:
            assert bool((jacobian * signs_of_units(bio_model) >= 0).all())
            assert bool((jacobian != 0).any())


@pytest.mark.parametrize("made", [*KEPT, *LOST, *BUILT_IN])
def test_rates_act_on_the_parameter_once(made: type[Rates], options: dict[str, Any]) -> None:
    model, x = made(), torch.randn(5, 4)
    bio_model, report = biofx.transform(model, biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3), **options)
    assert report.passes[0].remarks[1].message.endswith("one set for 2 uses of the weight")
    for each in (model, bio_model):
        each(x).square().sum().backward()
    rates = bio_model.get_buffer("bio_mod.w_rec.fuzzy_learning_rate_parameters")
    assert rates.std() > 0
    assert torch.equal(bio_model(x), model(x))
    assert model.w_rec.grad is not None
    found: Any = bio_model.get_parameter("w_rec").grad
    torch.testing.assert_close(found, model.w_rec.grad * rates)
    again = biofx.transform(bio_model, passes=ScaleGradients())[1]
    assert not again.passes[0].applied


def test_a_masked_weight_starts_balanced_as_far_as_it_is_read() -> None:
    torch.manual_seed(0)

    class Wide(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first, self.w = nn.Linear(4, 60), nn.Parameter(torch.randn(40, 60))
            self.register_buffer("mask", 2 * (torch.rand(40, 60) < 0.5).float())
            self.last = nn.Linear(40, 2)

        def forward(self, x: Tensor) -> Any:
            return self.last(torch.relu(F.linear(torch.relu(self.first(x)), self.w * self.mask)))

    model = Wide()
    bio_model, _ = biofx.transform(model, biofx.BioConfig(apply_dales_principle=True))
    signs = bio_model.get_buffer("first.bio_mod.sign")
    used = bio_model.get_parameter("w") * model.mask
    torch.testing.assert_close(used.sum(1), torch.zeros(40), atol=1e-4, rtol=0)
    assert bool((used * signs >= 0).all())
    assert bool((bio_model.get_parameter("w") * signs >= 0).all())  # also where the mask is 0 by now
    before = (model.w * model.mask).square().sum(1) / (1 - 1 / torch.pi)
    torch.testing.assert_close(used.square().sum(1), before)
    assert (
        8 < float((used != 0).sum(1).float().mean()) < 16 < float(model.mask.count_nonzero(1).float().mean())
    )


@pytest.mark.parametrize("made", BUILT_IN)
def test_signs_that_the_model_has_built_in_hold_for_all_readers(
    made: type[Rates], options: dict[str, Any]
) -> None:
    bio_model, report = biofx.transform(made(), SIGNS, **options)
    told = reasons(report)
    assert "its signs are built in: the forward computes its weight by" in told["linear_1"]
    assert signs_of_units(bio_model).tolist() == [1, 1, 1, 1, -1, -1]
    assert bool((used_weights(bio_model)["linear_3"] * bio_model.get_buffer("signed") >= 0).all())
    with pytest.raises(OptionError, match="contradict the ones that the forward builds into 'w_rec'"):
        biofx.transform(made(), SIGNS.override("linear", dales_signs=(-1, 1, 1, 1, 1, 1)))


def test_signs_that_are_given_are_used_or_refused() -> None:
    given = (1, -1, 1, -1, 1, 1)
    for made in (Masked, Absolute, Turned):
        bio_model, _ = biofx.transform(made(), SIGNS.override("linear", dales_signs=given))
        assert signs_of_units(bio_model).tolist() == list(given)
        used = used_weights(bio_model)["linear_1"]
        assert bool((used * torch.tensor(given) >= 0).all())

    class Unknown(Rates):
        def recurrent(self, weight: Tensor) -> Tensor:
            return weight * self.gain

        def run(self, x: Tensor, w_rec: Tensor, w_out: Tensor) -> Tensor:
            h = torch.relu(F.linear(x, self.w_in))
            return F.linear(torch.relu(F.linear(h, self.recurrent(w_rec))), w_out)

    with pytest.raises(OptionError, match="something whose sign is not known"):
        biofx.transform(Unknown(), SIGNS.override("linear", dales_signs=given))


class Sum(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight + self.w_out.T @ self.w_out


class TwoSigns(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight.abs() * (self.eye - 0.5)


class Negated(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return -weight


class TimesSigned(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight * self.signed


class TimesGain(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight * self.gain


class Shifted(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight - 0.1


class Normalised(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        lengths: Tensor = weight.norm(dim=1, keepdim=True)
        return weight / lengths


class Mixed(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight @ self.mask


class Summed(Rates):
    def recurrent(self, weight: Tensor) -> Tensor:
        return weight.cumsum(1)


class BothWays(Rates):
    def run(self, x: Tensor, w_rec: Tensor, w_out: Tensor) -> Tensor:
        h = torch.relu(F.linear(x, self.w_in, self.bias))
        h = torch.relu(F.linear(h, w_rec)) + torch.relu(F.linear(h, w_rec.abs()))
        return F.linear(h, w_out)


class Tied(Rates):
    def run(self, x: Tensor, w_rec: Tensor, w_out: Tensor) -> Tensor:
        h = torch.relu(F.linear(x, self.w_in, self.bias))
        return F.linear(torch.relu(F.linear(h, w_out)), w_out.t())


WHY: dict[type[Rates], str] = {
    Sum: "its weight is add, computed in the graph, not a parameter: matmul joins it with itself transposed",
    TwoSigns: "it has fixed signs, and not one for each presynaptic unit",
    Negated: "its weight is computed from w_rec, and neg turns its sign over",
    TimesSigned: "mul multiplies it by constants, some of which are negative",
    TimesGain: "mul multiplies it by something whose sign is not known",
    Shifted: "sub adds something to it",
    Normalised: "divides it by what is 0 where signs leave nothing",
    Mixed: "matmul is a product with a matrix that is not known to be diagonal",
    Summed: "cumsum is more than a sign for each entry",
    BothWays: "the forward reads its weight in several ways",
    Tied: "the forward reads its weight in several ways",
}


@pytest.mark.parametrize("made", WHY)
def test_what_cannot_be_proven_is_left_alone_with_the_reason(made: type[Rates]) -> None:
    bio_model, report = biofx.transform(made(), passes=ConstrainSigns(constrain_readout=True))
    assert WHY[made] in reasons(report)["linear_1"]
    constraints = bio_model.graph.find_nodes(op="call_function", target=constrain_sign)
    assert not {str(node.args[0]) for node in constraints} & {"w_rec", "abs_1"}
    assert {fault.invariant for fault in biofx.check(bio_model).faults} <= {"asked"}


def test_what_else_reads_a_weight_without_signs_keeps_it_free() -> None:
    class Penalised(Absolute):
        def run(self, x: Tensor, w_rec: Tensor, w_out: Tensor) -> Tensor:
            made = w_rec.abs()
            h = torch.relu(F.linear(torch.relu(F.linear(x, self.w_in)), made))
            return F.linear(h, w_out) + made.sum()

    _, report = biofx.transform(Penalised(), SIGNS)
    assert reasons(report)["linear_1"] == "its weight is also read by 'sum_1', which would not follow"


def test_a_mask_that_turns_negative_later_is_found() -> None:
    bio_model, _ = biofx.transform(Masked(), SIGNS)
    assert biofx.check(bio_model).ok
    bio_model.get_buffer("mask").fill_(-1)
    (fault,) = biofx.check(bio_model).faults
    assert (fault.invariant, fault.subject) == ("signs", "w_rec")
    assert fault.violated > 0


@pytest.mark.parametrize("made", [Masked, Absolute, Turned])
def test_copied_pickled_loaded_and_transformed_again(made: type[Rates], tmp_path: Any) -> None:
    model, x = made(), torch.randn(5, 4)
    bio_model, _ = biofx.transform(model, EVERYTHING)
    expected = bio_model(x)
    biofx.save(bio_model, tmp_path / "model.pt")
    for again in (
        copy.deepcopy(bio_model),
        pickle.loads(pickle.dumps(bio_model)),
        biofx.load(tmp_path / "model.pt", made()),
    ):
        assert torch.equal(again(x), expected)
        assert biofx.check(again).ok
    own = {name for name in bio_model.state_dict() if "bio_mod" not in name}
    assert own == set(model.state_dict())
    bio_model.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(bio_model.get_parameter("w_rec"), model.w_rec)
    _, report = biofx.transform(bio_model, passes=ConstrainSigns(constrain_readout=True))
    assert not report.passes[0].applied


class MaskedLinear(nn.Linear):
    """A layer of a package for sparse networks."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.rand(outputs, inputs) < 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


def test_a_deployed_layer_has_the_effective_weight() -> None:
    model = nn.Sequential(MaskedLinear(4, 8), nn.ReLU(), MaskedLinear(8, 6), nn.ReLU(), MaskedLinear(6, 2))
    config = EVERYTHING.replace(dales_constrain_inputs=False, weight_splitting_Gamma=2)
    bio_model, report = biofx.transform(model, config)
    assert [entry.applied for entry in report.passes][:3] == [2, 2, 3]
    x = torch.randn(7, 4)
    deployed = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(x), bio_model.eval()(x))
    unfolded, _ = biofx.transform(model, config.replace(weight_splitting_Gamma=0))
    deployed = biofx.deploy(unfolded)
    signs = unfolded.get_buffer("0.bio_mod.sign")
    layer: Any = deployed.get_submodule("2")
    assert type(layer) is nn.Linear
    assert bool((layer.weight * signs >= 0).all())
    assert bool((layer.weight[model[2].mask == 0] == 0).all())


def test_other_mechanisms_know_of_the_computation() -> None:
    told: dict[str, str] = {}
    for made, config in (
        (Masked, {"weight_splitting_Gamma": 3, "weight_splitting_mode": "sub-weights"}),
        (Exponential, {"weight_density": 0.5}),
    ):
        _, report = biofx.transform(made(), biofx.BioConfig(**config))
        first = biofx.Report("", report.passes[:1], ())
        told[report.passes[0].name] = reasons(first)["linear_1"]
    assert told["split-weights"] == "the forward computes its weight (mul), and a parameter has sub-weights"
    assert told["mask-weights"].endswith("which is not 0 where the parameter is")
    layers = nn.Sequential(MaskedLinear(4, 8), nn.ReLU(), MaskedLinear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    _, report = biofx.transform(layers, SIGNS.replace(dales_method="expand"))
    told = {remark.layer: remark.message for remark in report.passes[0].remarks}
    assert told["2"].endswith("the forward computes its weight (mul), whose shape would change")
    bio_model, _ = biofx.transform(Masked(), SIGNS.replace(weight_density=0.5))
    used = used_weights(bio_model)["linear_1"]
    assert bool((used[bio_model.get_buffer("bio_mod.w_rec.connection_mask") < 1] == 0).all())
    assert bool((used * signs_of_units(bio_model) >= 0).all())


def test_rules_leave_parameters_alone_that_are_no_strengths() -> None:
    bio_model, _ = biofx.transform(Exponential(), EVERYTHING)
    found = apply_rule(bio_model, "rejuvenate_weights")
    assert "so a small entry need not be a weak synapse" in found["w_rec"]
    assert isinstance(found["w_in"], int)


def test_signs_of_outputs_lie_along_the_other_axis() -> None:
    for made, shape in ((Masked, (UNITS, 1)), (Turned, (1, UNITS)), (MaskedAbsolute, (UNITS, 1))):
        bio_model, _ = biofx.transform(
            made(), SIGNS.replace(dales_axis="postsynaptic", dales_initialisation="keep")
        )
        assert bio_model.get_buffer("bio_mod.w_rec.local_sign").shape == shape
        used = used_weights(bio_model)["linear_1"]
        assert bool(((used >= 0).all(1) | (used <= 0).all(1)).all())


@pytest.mark.parametrize("made", [Masked, Absolute])
def test_graph_and_report(made: type[Rates], golden: Callable[[str, str], None]) -> None:
    bio_model, report = biofx.transform(made(), EVERYTHING)
    golden(f"computed_{made.__name__.lower()}", f"{biofx.format_graph(bio_model)}\n\n{report}")
