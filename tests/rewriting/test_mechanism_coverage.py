from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.rewriting.model_coverage import MechanismCoverage

QUERIES = "its outputs are queries or keys, which are compared and not passed on"
INPUTS = (
    "its presynaptic units are the model's inputs, which have no sign"
    " (constrain_inputs=False, in a config dales_constrain_inputs)"
)
READOUT = (
    "it is a readout: no weights between it and the model's output"
    " (constrain_readout=False, in a config dales_constrain_readout)"
)
CONFIG = biofx.BioConfig(
    weight_splitting_Gamma=2, apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.2
)


class Attends(nn.Module):
    """A layer of each fate, with sizes of their own, so that counts tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 10)
        self.first = nn.Linear(10, 8)
        self.joint = nn.Linear(8, 12)  # queries, keys and values of 4
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 6)
        self.odd = nn.Linear(6, 5)
        self.readout = nn.Linear(5, 2)
        self.never = nn.Linear(3, 3)
        self.direct = nn.Parameter(torch.randn(4, 4))

    def forward(self, ids: Tensor) -> Any:
        query, key, value = self.joint(F.relu(self.first(self.table(ids)))).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden = self.norm((mixed.unsqueeze(-1) * self.direct).sum(-2))
        return self.readout(F.relu(self.odd(F.relu(self.out(hidden)))))


def reach(model: nn.Module, config: Any = CONFIG, **options: Any) -> dict[str, MechanismCoverage]:
    coverage = biofx.transform(model, config, **options).report.coverage
    assert coverage is not None
    return {entry.mechanism: entry for entry in coverage.mechanisms}


def test_signed_of_what_is_made_inside_with_the_rest_by_reason() -> None:
    signed = reach(Attends())["signed"]
    first, joint, out, odd, readout = 80, 96, 24, 30, 10
    assert (signed.weights, signed.all_weights) == (4, 5)  # all but the one that is used directly
    assert signed.elements == first + joint // 3 + out + odd
    assert signed.all_elements == signed.elements + 16
    assert signed.reasons == {"it is used directly, and not as the weight of a layer with units": 16}
    assert signed.exempt == {QUERIES: joint - joint // 3, READOUT: readout}
    assert signed.fraction == 4 / 5
    assert str(signed) == (
        "signed: 4 of 5 weights, 166 of 182 elements (91.2%); "
        "16: it is used directly, and not as the weight of a layer with units"
    )


def test_inputs_and_readouts_count_where_they_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    left = reach(model, passes="constrain-signs", config=None)["signed"]
    assert (left.weights, left.all_weights, left.elements, left.all_elements) == (1, 1, 16, 16)
    assert left.exempt == {INPUTS: 12, READOUT: 8}
    asked = "constrain-signs{constrain_inputs=true,constrain_readout=true}"
    whole = reach(model, passes=asked, config=None)["signed"]
    assert (whole.weights, whole.all_weights, whole.elements, whole.all_elements) == (3, 3, 36, 36)
    assert not whole.exempt


def test_scaled_of_synapses_leaves_out_tables_gains_and_what_is_never_called() -> None:
    scaled = reach(Attends())["scaled"]
    assert (scaled.weights, scaled.all_weights) == (6, 6)
    assert scaled.elements == scaled.all_elements == 80 + 96 + 24 + 30 + 10 + 16
    assert not scaled.reasons
    assert not scaled.exempt


def test_split_with_the_reasons_for_the_rest() -> None:
    split = reach(Attends())["split"]
    assert split.elements == 80 + 96 + 24
    assert split.reasons == {
        "Γ does not divide its 5 output channels (gamma=2, in a config weight_splitting_Gamma)": 30,
        "it is used directly, and not as the weight of a layer with units": 16,
    }
    assert split.exempt == {"it is an output layer: no weights between it and the model's output": 10}


def test_what_is_not_selected_counts_as_not_reached() -> None:
    signed = reach(Attends(), exclude=["out", "odd"])["signed"]
    assert signed.reasons["excluded by '…'"] == 24 + 30
    assert (signed.weights, signed.all_weights) == (2, 5)


def test_a_layer_with_several_weights_counts_each() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.attend, self.b = nn.Linear(4, 6), nn.MultiheadAttention(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            hidden = self.a(x)
            return self.b(self.attend(hidden, hidden, hidden, need_weights=False)[0])

    signed = reach(Around(), biofx.BioConfig(apply_dales_principle=True))["signed"]
    assert (signed.weights, signed.all_weights) == (2, 2)
    assert signed.elements == 36 + 36  # of the joint weight the values alone, and the output projection
    assert signed.exempt == {QUERIES: 72, INPUTS: 24, READOUT: 12}


def test_a_second_transform_counts_what_is_in_force() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    once = biofx.transform(model, passes="constrain-signs").graph_module
    again = biofx.transform(once, passes="constrain-signs").report.coverage
    assert again is not None
    (signed,) = again.mechanisms
    assert (signed.weights, signed.all_weights) == (1, 1)


def test_a_layer_that_no_pass_can_reach_counts_as_left_alone() -> None:
    class Holds(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Holds(4, 4), nn.ReLU(), nn.Linear(4, 2))
    scaled = reach(model, passes="scale-gradients", config=None, opaque=["2"])["scaled"]
    assert scaled.all_elements == 12 + 16 + 8
    assert scaled.elements == 12 + 8
    assert sum(scaled.reasons.values()) == 16


def test_sub_weights_count_as_the_weight_that_they_add_up_to() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    found = reach(model, dataclasses.replace(CONFIG, weight_splitting_mode="sub-weights"))
    assert {name: (entry.weights, entry.elements) for name, entry in found.items()} == {
        "signed": (1, 16),
        "scaled": (3, 36),
        "split": (3, 36),
    }
    assert all(not entry.reasons for entry in found.values())


def test_only_mechanisms_whose_passes_ran_are_shown() -> None:
    assert list(reach(Attends(), passes="scale-gradients", config=None)) == ["scaled"]
    assert reach(Attends(), {"fuzzy_lr_distribution": "baseline"}) == {}


@pytest.mark.parametrize("form", ["terminal", "html", "json"])
def test_every_form_of_the_report_shows_them(form: str) -> None:
    report = biofx.transform(Attends(), CONFIG).report
    assert report.coverage is not None
    for entry in report.coverage.mechanisms:
        if form == "json":
            found = json.loads(report.to_json())["coverage"]["mechanisms"]
            assert entry.to_dict() in found
        elif form == "html":
            assert json.dumps(str(entry))[1:-1] in report.to_html()
        else:
            console = Console(width=200, record=True, file=io.StringIO())
            console.print(report)
            assert str(entry)[:60] in console.export_text()
