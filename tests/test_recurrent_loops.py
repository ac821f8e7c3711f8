"""Recurrent networks whose forward is a loop over time: one sign a unit, everywhere it is read."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.errors import OptionError

UNITS = 12
GIVEN = [1] * 9 + [-1] * 3
CONFIG = biofx.BioConfig(apply_dales_principle=True, dales_constrain_readout=True)


class Rates(nn.Module):
    """``h`` leaks towards what it is driven to; what is read is its rate."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_rec, self.w_out = nn.Linear(3, UNITS), nn.Linear(UNITS, UNITS), nn.Linear(UNITS, 2)
        self.register_buffer("mask", 1 - torch.eye(UNITS))
        self.alpha = 0.2

    def recurrent(self, rate: Tensor) -> Any:
        return self.w_rec(rate)

    def forward(self, x: Tensor) -> Tensor:
        state, out = torch.zeros(x.shape[1], UNITS), []
        for step in range(x.shape[0]):
            drive = self.recurrent(torch.relu(state)) + self.w_in(x[step])
            state = (1 - self.alpha) * state + self.alpha * drive
            out.append(self.w_out(torch.relu(state)))
        return torch.stack(out)


class Masked(Rates):
    def forward(self, x: Tensor) -> Tensor:
        state, out = x.new_zeros(x.shape[1], UNITS), []
        for step in range(len(x)):
            weight = self.w_rec.weight * self.mask
            drive = F.linear(torch.relu(state), weight, self.w_rec.bias) + self.w_in(x[step])
            state = (1 - self.alpha) * state + self.alpha * drive
            out.append(self.w_out(torch.relu(state)))
        return torch.stack(out)


class Filled(Rates):
    """Writes its states into a tensor that it has made."""

    def forward(self, x: Tensor) -> Tensor:
        rates, rate = torch.zeros(x.shape[0], x.shape[1], UNITS), torch.zeros(x.shape[1], UNITS)
        for step in range(x.shape[0]):
            rate = torch.relu(self.w_in(x[step]) + self.w_rec(rate))
            rates[step] = rate
        readout: Tensor = self.w_out(rates)
        return readout


class Adapting(Rates):
    """A unit's rate falls as it goes on: what it loses is its own."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[1], UNITS)
        tired, out = torch.zeros_like(state), []
        for step in range(x.shape[0]):
            rate = torch.relu(state - 0.1 * tired)
            tired = tired + 0.1 * (rate - tired)
            state = state + 0.2 * (-state + self.w_rec(rate) + self.w_in(x[step]))
            out.append(self.w_out(rate))
        return torch.stack(out)


class Noisy(Rates):
    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for given in x:
            drive = self.w_in(given) + self.w_rec(rate) + 0.05 * torch.randn_like(rate)
            rate = rate * (1 - self.alpha) + self.alpha * torch.relu(drive)
            out.append(rate)
        readout: Tensor = self.w_out(torch.stack(out))
        return readout


class While(Rates):
    """How often it runs is decided by a value."""

    def forward(self, x: Tensor) -> Tensor:
        rate, step = torch.zeros(x.shape[1], UNITS), 0
        while step < x.shape[0]:
            rate = torch.relu(self.w_in(x[step]) + self.w_rec(rate))
            step += 1
        readout: Tensor = self.w_out(rate)
        return readout


class Keeping(Rates):
    """Keeps its state in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.rate = torch.zeros(x.shape[1], UNITS)
        for step in range(x.shape[0]):
            self.rate = torch.relu(self.w_in(x[step]) + self.w_rec(self.rate))
        readout: Tensor = self.w_out(self.rate)
        return readout


TRACEABLE = [Rates, Masked, Filled, Adapting, Noisy]
OTHERS = [While, Keeping]


def sequence(length: int = 6) -> Tensor:
    return torch.randn(length, 4, 3, generator=torch.Generator().manual_seed(length))


def transformed(make: type[Rates], *, recorded: bool, config: biofx.BioConfig = CONFIG) -> Any:
    torch.manual_seed(0)
    examples = (sequence(),) if recorded else None
    return biofx.transform(make(), config.override("w_rec", dales_signs=GIVEN), example_inputs=examples)[0]


def against_signs(bio_model: nn.Module) -> int:
    """Count the effective weights of ``w_rec`` and ``w_out`` with the other sign than their unit."""
    deployed: Any = biofx.deploy(bio_model)
    weights = (deployed.w_rec.weight, deployed.w_out.weight)
    return sum(int((weight * torch.tensor(GIVEN) < 0).sum()) for weight in weights)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("make", TRACEABLE)
def test_given_signs_hold_wherever_a_unit_is_read(make: type[Rates], recorded: bool) -> None:
    bio_model = transformed(make, recorded=recorded)
    with torch.no_grad():  # whatever the weights are
        for layer in (bio_model.w_rec, bio_model.w_out):
            layer.weight.copy_(torch.randn(layer.weight.shape))
    assert against_signs(bio_model) == 0
    assert biofx.check(bio_model).ok


@pytest.mark.parametrize("make", OTHERS)
def test_loops_that_values_decide_need_an_example(make: type[Rates]) -> None:
    assert against_signs(transformed(make, recorded=True)) == 0
    with pytest.raises(OptionError, match="give example_inputs to have signs here"):
        transformed(make, recorded=False)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("make", TRACEABLE)
def test_drawn_signs_are_one_for_each_unit(make: type[Rates], recorded: bool) -> None:
    torch.manual_seed(0)
    examples = (sequence(),) if recorded else None
    bio_model, _ = biofx.transform(make(), CONFIG, example_inputs=examples)
    deployed: Any = biofx.deploy(bio_model)
    for unit in range(UNITS):
        read = torch.cat([deployed.w_rec.weight[:, unit], deployed.w_out.weight[:, unit]])
        assert bool((read >= 0).all()) or bool((read <= 0).all())
        assert bool(read.any())


@pytest.mark.parametrize("make", [Rates, Masked])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_signs_hold_after_500_steps_of_any_length_with_all_rules(
    make: type[Rates], optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    bio_model = transformed(make, recorded=True)
    trained = optimizer(bio_model.parameters(), lr=0.01)
    names = ("crystallize", "rejuvenate_weights", "volume_dependent_lr", "synaptic_scaling")
    biofx.attach(bio_model, trained, [biofx.Rule(name, every=20) for name in names])
    before = bio_model.w_rec.weight.detach().clone()
    for step in range(500):
        trained.zero_grad()
        bio_model(sequence(2 + step % 7)).square().mean().backward()
        trained.step()
    assert against_signs(bio_model) == 0
    assert not torch.equal(before, bio_model.w_rec.weight)


@pytest.mark.parametrize("make", [Rates, Masked])
def test_the_effect_of_a_unit_on_each_reader_has_its_sign(make: type[Rates]) -> None:
    """The Jacobian of what reads a unit's rate, with regard to that rate."""
    deployed: Any = biofx.deploy(transformed(make, recorded=True))
    rate = torch.rand(UNITS)
    for reader in (deployed.w_rec, deployed.w_out):
        jacobian = torch.autograd.functional.jacobian(reader, rate)
        assert bool((jacobian * torch.tensor(GIVEN) >= 0).all())
        assert bool((jacobian * torch.tensor(GIVEN) > 0).any(0).all())


@pytest.mark.parametrize("make", [Rates, Masked])
def test_rates_scale_the_gradient_of_the_whole_loop(make: type[Rates]) -> None:
    torch.manual_seed(0)
    plain = make()
    bio_model, _ = biofx.transform(plain, example_inputs=(sequence(),))
    for length in (6, 9):
        for model in (plain, bio_model):
            model.zero_grad()
            model(sequence(length)).square().mean().backward()
        for name in ("w_in", "w_rec", "w_out"):
            layer: Any = bio_model.get_submodule(name)
            expected = plain.get_submodule(name).weight.grad * layer.bio_mod.fuzzy_learning_rate_parameters
            torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("make", [Rates, Masked])
def test_with_everything_off_a_loop_is_the_same_to_the_bit(make: type[Rates]) -> None:
    torch.manual_seed(0)
    plain = make()
    off = {"fuzzy_lr_distribution": "baseline"}
    bio_model, _ = biofx.transform(plain, off, example_inputs=(sequence(),))
    for length in (1, 6, 9):
        assert torch.equal(bio_model(sequence(length)), plain(sequence(length)))


@pytest.mark.parametrize("make", [Rates, Masked])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_signs_of_their_own(make: type[Rates], copied: Callable[[Any], Any]) -> None:
    bio_model = transformed(make, recorded=True)
    other = copied(bio_model)
    assert torch.equal(other(sequence()), bio_model(sequence()))
    with torch.no_grad():
        for layer in (other.w_in, other.w_rec, other.w_out):
            layer.weight.neg_()
            if layer.bio_mod.sign is not None:
                layer.bio_mod.sign.neg_()
    assert against_signs(bio_model) == 0
    assert against_signs(other) > 0


@pytest.mark.parametrize("make", [Rates, Masked])
def test_a_checkpoint_of_a_loop_loads_into_a_plain_model(make: type[Rates], tmp_path: Any) -> None:
    config = CONFIG.override("w_rec", dales_signs=GIVEN)
    torch.manual_seed(0)
    bio_model, _ = biofx.transform(make(), config)
    with torch.no_grad():
        dict(bio_model.named_parameters())["w_out.weight"].mul_(2)
    biofx.save(bio_model, tmp_path / "run.pt")
    loaded: Any = biofx.load(tmp_path / "run.pt", make())
    assert torch.equal(loaded(sequence()), bio_model(sequence()))


def test_graph_and_report_of_a_masked_loop(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    config = CONFIG.override("w_rec", dales_signs=GIVEN)
    bio_model, report = biofx.transform(Masked(), config, example_inputs=(sequence(),))
    golden("recurrent_loop", f"{biofx.format_graph(bio_model)}\n\n{report}")


@pytest.mark.parametrize("make", [Rates, Masked])
def test_a_loop_keeps_the_signature_that_trainers_ask_for(make: type[Rates]) -> None:
    bio_model = transformed(make, recorded=True)
    for model in (bio_model, copy.deepcopy(bio_model), pickle.loads(pickle.dumps(bio_model))):
        assert inspect.signature(model.forward) == inspect.signature(make().forward)


def test_signs_for_units_that_nothing_reads_are_refused() -> None:
    with pytest.raises(OptionError, match="not used"):
        biofx.transform(Rates(), CONFIG.override("w_out", dales_signs=[1, -1]), example_inputs=(sequence(),))


class Positive(Rates):
    """Takes the absolute value of its weight, in Python."""

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for step in range(x.shape[0]):
            rate = torch.relu(F.linear(rate, self.w_rec.weight.abs()) + self.w_in(x[step]))
            out.append(self.w_out(rate))
        return torch.stack(out)


@pytest.mark.parametrize("recorded", [False, True])
def test_units_that_python_makes_excitatory_are_so_at_every_reader(recorded: bool) -> None:
    examples = (sequence(),) if recorded else None
    bio_model, report = biofx.transform(Positive(), CONFIG, example_inputs=examples)
    said = {remark.layer: remark for remark in report.passes[0].remarks}
    assert said["w_rec"].kind == "missed"
    assert "Python computes its weight by abs" in said["w_rec"].message
    assert "excitatory" in said["w_rec"].message
    deployed: Any = biofx.deploy(bio_model)
    assert bool((deployed.w_out.weight >= 0).all())
    assert bool(deployed.w_out.weight.any())
    with pytest.raises(OptionError, match="contradict the ones that the forward builds into"):
        transformed(Positive, recorded=recorded)


class Growing(Rates):
    """Above eight steps its units change places."""

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for step in range(x.shape[0]):
            rate = torch.relu(self.w_in(x[step]) + self.w_rec(rate))
            out.append(self.w_out(rate if x.shape[0] < 8 else rate.roll(1, -1)))
        return torch.stack(out)


def test_what_two_runs_do_not_agree_on_is_not_known() -> None:
    examples = (torch.randn(4, 4, 3),)
    _, report = biofx.transform(Growing(), CONFIG, example_inputs=examples)
    assert not [r for r in report.remarks if r.layer == "w_out" and "not known" in r.message]
    examples = (torch.randn(14, 4, 3),)
    _, report = biofx.transform(Growing(), CONFIG, example_inputs=examples)
    (remark,) = (r for r in report.passes[0].remarks if r.layer == "w_out")
    assert remark.kind == "missed"
    assert "differs between the example inputs and a run of other sizes" in remark.message
    kept = {r.layer: r.kind for r in report.passes[0].remarks}
    assert kept["w_rec"] == "applied"


def _through_state_dict(model: Any) -> Any:
    torch.manual_seed(1)
    examples = (sequence(),)
    other = biofx.transform(MAKERS[type(model).__name__](), CONFIG.replace(seed=5), example_inputs=examples)
    other[0].load_state_dict(model.state_dict())
    return other[0]


def _averaged(model: Any) -> Any:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return averaged.module


def _functional(model: Any) -> Any:
    state = {
        name: value.detach().clone() for name, value in model.state_dict().items() if "_extra" not in name
    }

    def called(x: Tensor) -> Any:
        return torch.func.functional_call(model, state, (x,))

    return called


JOURNEYS: dict[str, Callable[[Any], Any]] = {
    "state dict": _through_state_dict,
    "average": _averaged,
    "functional_call": _functional,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "there and back": lambda model: model.double().float(),
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}
MAKERS = {"Rates": Rates, "Masked": Masked}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # which torch.compile does
@pytest.mark.parametrize("journey", JOURNEYS)
@pytest.mark.parametrize("make", [Rates, Masked])
def test_a_loop_computes_what_it_did_after(make: type[Rates], journey: str) -> None:
    bio_model = transformed(make, recorded=True)
    with torch.no_grad():  # signs have something to do
        for layer in (bio_model.w_rec, bio_model.w_out):
            layer.weight.copy_(torch.randn(layer.weight.shape))
    plain = make()
    plain.load_state_dict({n: v for n, v in bio_model.state_dict().items() if "bio_mod" not in n})
    before = bio_model(sequence())
    assert not torch.allclose(plain(sequence()), before)
    arrived = JOURNEYS[journey](bio_model)
    torch.testing.assert_close(arrived(sequence()), before)
    torch.testing.assert_close(arrived(sequence(3)), bio_model(sequence(3)))


class Populations(nn.Module):
    """Excitation and inhibition as modellers write them: weights that are never negative, and a minus."""

    w_ee: Tensor
    w_ei: Tensor
    w_ie: Tensor
    w_ii: Tensor

    def __init__(self) -> None:
        super().__init__()
        sizes = {"ee": (7, 7), "ei": (7, 3), "ie": (3, 7), "ii": (3, 3)}
        for name, size in sizes.items():
            self.register_parameter(f"w_{name}", nn.Parameter(torch.rand(size) * 0.3))
        self.in_e, self.in_i, self.w_out = nn.Linear(3, 7), nn.Linear(3, 3), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        e, i, out = torch.zeros(x.shape[1], 7), torch.zeros(x.shape[1], 3), []
        ee, ei, ie, ii = (w.abs() for w in (self.w_ee, self.w_ei, self.w_ie, self.w_ii))
        for step in x:
            drive_e = F.linear(e, ee) - F.linear(i, ei) + self.in_e(step)
            drive_i = self.in_i(step) + F.linear(e, ie) + (-0.5) * F.linear(i, ii)
            e, i = 0.8 * e + 0.2 * torch.relu(drive_e), 0.8 * i + 0.2 * torch.relu(drive_i)
            out.append(self.w_out(torch.cat([e, i], -1)))
        return torch.stack(out)


@pytest.mark.parametrize("recorded", [False, True])
def test_units_whose_drive_is_subtracted_are_inhibitory_at_every_reader(recorded: bool) -> None:
    torch.manual_seed(0)
    bio_model, _ = biofx.transform(Populations(), CONFIG, example_inputs=(sequence(),) if recorded else None)
    readout = biofx.deploy(bio_model).get_parameter("w_out.weight")
    assert bool((readout[:, :7] >= 0).all())
    assert bool((readout[:, 7:] <= 0).all())
    assert bool(readout.any(0).all())


class Subtracting(Rates):
    """The weights of ``w_del`` are no strengths of excitation: what they drive is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.w_del = nn.Linear(UNITS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for step in x:
            rate = torch.relu(self.w_rec(rate) - 2 * self.w_del(rate) + self.w_in(step))
            out.append(self.w_out(rate))
        return torch.stack(out)


class SubtractingLast(Subtracting):
    """Nothing is added behind the subtraction."""

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for step in x:
            rate = torch.relu(self.w_in(step) + self.w_rec(rate) - 2 * self.w_del(rate))
            out.append(self.w_out(rate))
        return torch.stack(out)


@pytest.mark.parametrize("recorded", [False, True])
def test_given_signs_hold_where_a_drive_is_subtracted(recorded: bool) -> None:
    bio_model = transformed(SubtractingLast, recorded=recorded)
    assert against_signs(bio_model) == 0
    deployed: Any = biofx.deploy(bio_model)
    assert bool((deployed.w_del.weight * torch.tensor(GIVEN) >= 0).all())


class SubtractingRates(Subtracting):
    """What is subtracted are rates of units, which other weights read."""

    def forward(self, x: Tensor) -> Tensor:
        rate, other, out = torch.zeros(x.shape[1], UNITS), torch.zeros(x.shape[1], UNITS), []
        for step in x:
            other = torch.relu(self.w_del(rate))
            rate = torch.relu(self.w_in(step) + self.w_rec(rate - other))
            out.append(self.w_out(rate) + self.w_out(other))
        return torch.stack(out)


def test_rates_that_are_subtracted_are_other_units() -> None:
    _, report = biofx.transform(SubtractingRates(), CONFIG, example_inputs=(sequence(),))
    said = {remark.layer: remark.message for remark in report.passes[0].remarks}
    assert "its units begin at 'sub', because it subtracts activity" in said["w_rec"]


class Predicting(Subtracting):
    """Two populations take the difference, one with each sign."""

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for step in x:
            predicted, given = self.w_del(rate), self.w_in(step)
            error = torch.relu(given - predicted) + torch.relu(predicted - given)
            rate = torch.relu(self.w_rec(error) + error)
            out.append(self.w_out(rate))
        return torch.stack(out)


class Leaking(Rates):
    """Its leak is no subtraction of what it is driven to."""

    def forward(self, x: Tensor) -> Tensor:
        state, out = torch.zeros(x.shape[1], UNITS), []
        for step in x:
            rate = torch.relu(state)
            change = (-state + self.w_rec(rate) + self.w_in(step)) / 5
            state = state + change
            out.append(self.w_out(rate))
        return torch.stack(out)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("make", "layer", "words"),
    [
        (Subtracting, "w_del", "; the forward subtracts what it drives, so its effect is the opposite"),
        (Predicting, "w_del", "; the forward adds what it drives in one place and subtracts it in another"),
        (SubtractingLast, "w_del", "; the forward subtracts what it drives, so its effect is the opposite"),
        (Subtracting, "w_rec", None),
        (Leaking, "w_rec", None),
        (Leaking, "w_out", None),
        (Noisy, "w_rec", None),
    ],
)
def test_the_report_says_where_what_a_weight_drives_is_subtracted(
    make: type[Rates], layer: str, words: str | None, recorded: bool
) -> None:
    _, report = biofx.transform(make(), CONFIG, example_inputs=(sequence(),) if recorded else None)
    (said,) = [remark for remark in report.passes[0].remarks if remark.layer == layer]
    assert said.kind == "applied"
    assert words in said.message if words else "what it drives" not in said.message


class Contradicting(Subtracting):
    """Builds excitation and inhibition of one unit into two weights."""

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for step in x:
            drive = F.linear(rate, self.w_rec.weight.abs()) + F.linear(rate, -self.w_del.weight.abs())
            rate = torch.relu(drive + self.w_in(step))
            out.append(self.w_out(rate))
        return torch.stack(out)


def test_a_model_that_builds_both_signs_into_a_unit_is_told_so() -> None:
    _, report = biofx.transform(Contradicting(), CONFIG, example_inputs=(sequence(),))
    remarks = {remark.layer: remark for remark in report.passes[0].remarks}
    for layer in ("w_rec", "w_del", "w_out"):
        assert remarks[layer].message.endswith(
            "; the forward builds excitation and inhibition into weights that read the same unit"
        )
    assert [remarks[layer].kind for layer in ("w_rec", "w_del", "w_out")] == ["missed", "missed", "applied"]


class Alternating(Subtracting):
    """``w_del`` reads the units in another order at every other step; which one the trace cannot tell."""

    def order(self, rate: Tensor) -> Tensor:
        return torch.cat([rate[:, 6:], rate[:, :6]], 1)

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for step in range(len(x)):
            read = self.order(rate) if step % 2 else rate
            rate = torch.relu(self.w_in(x[step]) + self.w_rec(rate) + self.w_del(read))
            out.append(self.w_out(rate))
        return torch.stack(out)


class Unknown(Alternating):
    def order(self, rate: Tensor) -> Tensor:
        places = torch.arange(UNITS).flip(0)
        return torch.zeros_like(rate).index_copy(1, places, rate)


def test_what_a_weight_reads_at_one_step_says_nothing_of_another() -> None:
    def said_of(make: type[Rates], *, recorded: bool) -> Any:
        _, report = biofx.transform(make(), CONFIG, example_inputs=(sequence(),) if recorded else None)
        return next(remark for remark in report.passes[0].remarks if remark.layer == "w_del")

    for make in (Alternating, Unknown):
        traced = said_of(make, recorded=False)
        assert traced.kind == "missed"
        assert "what feeds it is not known" in traced.message
    followed, ended = said_of(Alternating, recorded=True), said_of(Unknown, recorded=True)
    assert "its units begin" not in followed.message
    assert ended.message.count("its units begin at") == 1
    assert "because no rule says what index_copy does with units" in ended.message


class AtTheRoot(Rates):
    """Holds its recurrent weight itself, and Python runs the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(UNITS, UNITS) * 0.3)

    def recurrent(self, rate: Tensor) -> Any:
        return rate @ self.w


@pytest.mark.parametrize("recorded", [False, True])
def test_a_weight_of_the_model_itself_passes_the_audit(recorded: bool) -> None:
    bio_model, _ = biofx.transform(AtTheRoot(), CONFIG, example_inputs=(sequence(),) if recorded else None)
    for found in (bio_model, copy.deepcopy(bio_model), pickle.loads(pickle.dumps(bio_model))):
        assert biofx.check(found).ok
    state: Any = bio_model.get_submodule("bio_mod.w")
    state.link(copy.deepcopy(bio_model))
    assert "links" in {fault.invariant for fault in biofx.check(bio_model).faults}


class Shuffled(Subtracting):
    """Reads its units in an order that a buffer holds."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.randperm(UNITS))

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        for step in x:
            rate = torch.relu(self.w_rec(rate) + self.w_del(rate[:, self.places]) + self.w_in(step))
            out.append(self.w_out(rate))
        return torch.stack(out)


def test_a_state_with_another_order_of_units_is_found() -> None:
    def shuffled(seed: int) -> Any:
        torch.manual_seed(seed)
        return biofx.transform(Shuffled(), CONFIG, example_inputs=(sequence(),))[0]

    bio_model, other = shuffled(0), shuffled(1)
    deployed: Any = biofx.deploy(bio_model)
    signs = bio_model.w_rec.bio_mod.sign
    assert bool((deployed.w_del.weight * signs[bio_model.places] >= 0).all())
    assert biofx.check(bio_model).ok
    assert biofx.check(pickle.loads(pickle.dumps(bio_model))).ok
    other.load_state_dict(bio_model.state_dict())
    (fault,) = biofx.check(other).faults
    assert (fault.invariant, fault.subject, fault.checked) == ("unit order", "places", UNITS)


class Allocating(Subtracting):
    """Writes its rates into memory that was not filled before."""

    def forward(self, x: Tensor) -> Tensor:
        rates, rate = torch.empty(len(x), x.shape[1], UNITS), torch.zeros(x.shape[1], UNITS)
        for step in range(len(x)):
            rate = torch.relu(self.w_rec(rate) + self.w_in(x[step]))
            rates[step] = rate
        readout: Tensor = self.w_out(rates)
        return readout


def test_what_memory_held_before_says_nothing() -> None:
    for filled in (torch.zeros, torch.rand):
        memory = [filled(6, 4, UNITS) for _ in range(8)]
        del memory  # which the next tensors of that size are given
        _, report = biofx.transform(Allocating(), CONFIG, example_inputs=(sequence(),))
        said = {remark.layer: remark.message for remark in report.passes[0].remarks}
        assert "may be negative" in said["w_out"]
        assert "may be negative" not in said["w_rec"]


class Listing(Subtracting):
    """Fills a list of given length."""

    def forward(self, x: Tensor) -> Tensor:
        rates: list[Any] = [None] * len(x)
        rate = torch.zeros(x.shape[1], UNITS)
        for step in range(len(x)):
            rate = rates[step] = torch.relu(self.w_rec(rate) + self.w_in(x[step]))
        readout: Tensor = self.w_out(torch.stack(rates))
        return readout


def test_what_fills_a_list_is_no_input() -> None:
    _, traced = biofx.transform(Listing(), CONFIG)
    said = {remark.layer: remark for remark in traced.passes[0].remarks}
    assert said["w_out"].kind == "missed"
    assert (
        "it joins what is in a list that was filled one by one; give example_inputs" in said["w_out"].message
    )
    assert against_signs(transformed(Listing, recorded=True)) == 0


class Gated(Subtracting):
    """Silences some units, the same ones at all steps."""

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        active = (torch.rand(x.shape[1], UNITS) > 0.2).float() / 0.8
        for step in x:
            rate = active * torch.relu(self.w_rec(rate) + self.w_in(step))
            out.append(self.w_out(rate))
        return torch.stack(out)


@pytest.mark.parametrize("recorded", [False, True])
def test_units_that_are_silenced_are_the_same_units(recorded: bool) -> None:
    assert against_signs(transformed(Gated, recorded=recorded)) == 0


class Assembled(Rates):
    """Puts its recurrent weight together from two parameters, which no sign can be given through."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.i = nn.Parameter(torch.rand(UNITS, 9)), nn.Parameter(torch.rand(UNITS, 3))

    def forward(self, x: Tensor) -> Tensor:
        rate, out = torch.zeros(x.shape[1], UNITS), []
        weight = torch.cat([self.e.abs(), -self.i.abs()], 1)
        for step in x:
            rate = torch.relu(F.linear(rate, weight) + self.w_in(step))
            out.append(self.w_out(rate))
        return torch.stack(out)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_reader_without_signs_of_the_same_units_is_told(recorded: bool) -> None:
    def said_of(make: type[Rates]) -> Any:
        _, report = biofx.transform(make(), CONFIG, example_inputs=(sequence(),) if recorded else None)
        return next(remark.message for remark in report.passes[0].remarks if remark.layer == "w_out")

    words = "reads some of these units, too, with a weight that has no signs"
    assert words in said_of(Assembled)
    assert words not in said_of(Rates)
