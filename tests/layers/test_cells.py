"""Cells of recurrent layers, which a loop calls: one sign a unit at every step and at every reader."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import InputError, OptionError
from biofx.operators.compound_ops import recurrent_step

CELLS: dict[str, Callable[[], Any]] = {
    "tanh": lambda: nn.RNNCell(4, 6),
    "relu": lambda: nn.RNNCell(4, 6, nonlinearity="relu"),
    "no bias": lambda: nn.RNNCell(4, 6, bias=False),
    "gru": lambda: nn.GRUCell(4, 6),
    "lstm": lambda: nn.LSTMCell(4, 6),
}
RATES = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3)
SIGNS = RATES.replace(apply_dales_principle=True)


class Unrolled(nn.Module):
    """Three steps, a layer that reads the state, and a readout."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell, self.out, self.last = cell, nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        state: Any = None
        for step in range(3):
            state = self.cell(x[step], state)
        hidden = state[0] if isinstance(self.cell, nn.LSTMCell) else state
        return self.last(torch.relu(self.out(hidden)))


class Looped(Unrolled):
    """The same as long as the input, so that Python goes on calling the cell."""

    def forward(self, x: Tensor) -> Any:
        state: Any = None
        for part in x:
            state = self.cell(part, state)
        hidden = state[0] if isinstance(self.cell, nn.LSTMCell) else state
        return self.last(torch.relu(self.out(hidden)))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["traced", "recorded"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"example_inputs": ((torch.randn(3, 2, 4),), {})} if request.param == "recorded" else {}


@pytest.mark.parametrize("around", [Unrolled, Looped])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 4)])
def test_outputs_are_equal_and_gradients_scaled_to_the_bit(
    name: str, around: type[Unrolled], shape: tuple[int, ...]
) -> None:
    model, x = around(CELLS[name]()), torch.randn(shape)
    bio_model, report = biofx.transform(model, RATES)
    assert torch.equal(bio_model(x), model(x))
    plain, scaled = gradients(model, x), gradients(bio_model, x)
    for weight in ("weight_ih", "weight_hh"):
        rates: Any = bio_model.get_buffer(f"cell.bio_mod.{weight}.fuzzy_learning_rate_parameters")
        assert rates.std() > 0
        torch.testing.assert_close(scaled[f"cell.{weight}"], plain[f"cell.{weight}"] * rates)
    assert report.coverage is not None
    assert {left.path.rpartition(".")[2][:4] for left in report.coverage.left} <= {"bias"}


@pytest.mark.parametrize("around", [Unrolled, Looped])
@pytest.mark.parametrize("name", CELLS)
def test_a_unit_has_one_sign_at_every_step_and_every_reader(
    name: str, around: type[Unrolled], options: dict[str, Any]
) -> None:
    bio_model, _ = biofx.transform(around(CELLS[name]()), SIGNS, **options)
    optimizer = torch.optim.AdamW(bio_model.parameters(), lr=0.01)
    biofx.attach(bio_model, optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        (bio_model(torch.randn(3, 2, 4)) - 1).square().mean().backward()
        optimizer.step()
    assert biofx.check(bio_model).ok
    signs: Any = bio_model.get_buffer("cell.bio_mod.weight_hh.sign")
    assert sorted(signs.tolist()) == [-1, -1, -1, 1, 1, 1]
    deployed = biofx.deploy(bio_model)
    cell: Any = deployed.get_submodule("cell")
    assert type(cell) is type(CELLS[name]())
    assert bool((cell.weight_hh * signs >= 0).all())  # columns, for all gates
    assert bool((deployed.get_parameter("out.weight") * signs >= 0).all())
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(deployed(x), bio_model.eval()(x))
    for again in (copy.deepcopy(bio_model), pickle.loads(pickle.dumps(bio_model))):
        assert torch.equal(again(x), bio_model(x))


def test_signs_that_are_given_are_used_and_what_is_negative_is_said(options: dict[str, Any]) -> None:
    given = (1, 1, 1, 1, 1, -1)
    config = SIGNS.override("cell", dales_signs=given)
    bio_model, report = biofx.transform(Unrolled(nn.RNNCell(4, 6)), config, **options)
    used: Any = bio_model.get_submodule("out").bio_mod
    assert used.presynaptic_signs().tolist() == list(given)
    told = [remark.message for remark in report.passes[0].remarks if remark.kind == "applied"]
    assert told
    assert all("the activity that it reads may be negative" in message for message in told[:3])
    with pytest.raises(OptionError, match="expected one for each of the 6 outputs"):
        biofx.transform(Unrolled(nn.RNNCell(4, 6)), SIGNS.override("cell", dales_signs=(1, -1)), **options)


def test_a_state_that_a_layer_makes_is_that_of_the_units() -> None:
    class Started(Unrolled):
        def __init__(self, cell: Any) -> None:
            super().__init__(cell)
            self.start = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Any:
            state = torch.relu(self.start(x[0]))
            for step in range(3):
                state = self.cell(x[step], state)
            return self.last(torch.relu(self.out(state)))

    groups = biofx.unit_groups(biofx.capture(Started(nn.GRUCell(4, 6))))
    (own,) = (group for group in groups if "cell.weight_hh" in group.producers)
    assert own.producers == ("start.weight", "cell.weight_hh")
    assert own.readers == ("cell.weight_hh", "out.weight")


def test_it_is_not_split_and_says_why() -> None:
    _, report = biofx.transform(Unrolled(nn.GRUCell(4, 6)), {"weight_splitting_Gamma": 5})
    told = {r.message for r in report.passes[0].remarks if r.layer == "cell" and r.kind == "missed"}
    why = "its output is its own state a step later, which sums over neighbours would change"
    why = f"{why}; only those of a Linear or a convolution are split"
    assert told == {f"weight_ih: {why}", f"weight_hh: {why}"}


def test_a_wrong_shape_is_refused() -> None:
    weights = [torch.ones(3, 4), torch.ones(3, 3)]
    with pytest.raises(InputError, match="the last one of 4 features"):
        recurrent_step(torch.ones(2, 5), None, weights, mode="RNN_TANH")
    with pytest.raises(InputError, match="the last one of 3 units, found shape"):
        recurrent_step(torch.ones(2, 4), torch.ones(2, 4), weights, mode="RNN_TANH")
