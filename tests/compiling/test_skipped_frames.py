"""What dynamo leaves to Python is said, and recurrent layers that it takes are rewritten."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import BiofxWarning, InputError
from tests.compiling.compiled_models import RATES, SIGNS, assert_learns_as, assert_same_state, transformed


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class Recurrent(nn.Module):
    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.inner = Inner()
        self.rnn: Any = getattr(nn, kind)(4, 6, batch_first=True, **options)
        self.readout = nn.Linear(options.get("proj_size", 6) * (1 + options.get("bidirectional", False)), 2)

    def forward(self, x: Tensor) -> Any:
        output, _ = self.rnn(self.inner(x))
        return self.readout(output[:, -1])


class InFile(nn.Module):
    """A block that dynamo cannot enter, after a layer that it compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), Inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.first(x))
        with open(__file__):
            x = self.inner(x)
        return self.last(x)


class InPython(nn.Module):
    """Only the modules of its own that it calls have layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: Tensor) -> Any:
        for inner in self.inner:
            with open(__file__):
                x = inner(x)
        return x


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend=biofx.backend(RATES, then="eager"), **options)


@contextmanager
def _biofx_says_nothing() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says to itself
        warnings.simplefilter("error", BiofxWarning)
        yield


def rates_of(model: nn.Module) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiofxWarning)
        held = biofx.companion(model).named_buffers()
    return {name.partition(".bio_mod")[0] for name, _ in held if name.endswith("rate_parameters")}


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_recurrent_layer_that_dynamo_leaves_to_python_is_named_once(kind: str) -> None:
    found, x = compiled(Recurrent(kind)), torch.randn(2, 3, 5, 4)
    with pytest.warns(BiofxWarning) as said:
        list(map(found, x))  # at the first call, or at the second where dynamo compiles the rest
    assert "'rnn.weight_ih_l0', 'rnn.weight_hh_l0'" in str(said[0].message)
    with _biofx_says_nothing():
        found(x[0])
        biofx.companion(found)
    assert {"inner.layer"} <= rates_of(found) <= {"inner.layer", "readout"}


def test_layers_behind_a_break_that_no_graph_reads_are_named_at_the_second_call() -> None:
    class Disabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hidden, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.in_python(self.first(x)))

        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def in_python(self, x: Tensor) -> Any:
            return self.hidden(x)

    found = compiled(Disabled())
    with _biofx_says_nothing():
        found(torch.randn(3, 4))
    with pytest.warns(BiofxWarning, match="no graph that was compiled reads 'hidden.weight': Python"):
        found(torch.randn(3, 4))
    assert rates_of(found) == {"first", "last"}


def test_layers_after_what_dynamo_cannot_enter_are_named_and_no_others() -> None:
    found = compiled(InFile())
    with pytest.warns(
        BiofxWarning, match=r"InFile.*_skipped_frames.py:\d+\) in Python: .*itself \('last.weight'\)"
    ):
        found(torch.randn(3, 4))
    assert rates_of(found) == {"first", "inner.layer"}


def test_nothing_is_said_where_all_weights_are_in_graphs() -> None:
    with _biofx_says_nothing():
        found = compiled(InPython())
        found(torch.randn(3, 4))
        compiled(Inner())(torch.randn(3, 4))
        torch.compile(Recurrent(), backend="eager")(torch.randn(3, 5, 4))
    assert rates_of(found) == {"inner.0.layer", "inner.1.layer"}


def test_where_warnings_are_errors_it_is_printed_and_dynamo_goes_on() -> None:
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("ignore")  # what torch says to itself
            warnings.simplefilter("error", BiofxWarning)
            compiled(InFile())(torch.randn(3, 4))
        assert "in Python" in str(said[-1].message)
        torch._dynamo.reset()  # which refuses where a compilation seems to be going on


def test_a_function_that_dynamo_does_not_compile_is_named_with_the_layers_of_a_model_that_it_calls() -> None:
    def step(x: Tensor, model: nn.Module) -> Any:
        with open(__file__):
            return model(x).sum()

    found: Any = compiled(step)  # type: ignore[arg-type]
    with pytest.warns(BiofxWarning, match=r"step_at_\d+ \(test_skipped_frames.py.*'0.weight', '1.weight'"):
        found(torch.randn(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))


def test_a_model_of_which_nothing_was_compiled_has_no_companion() -> None:
    model = nn.LSTM(4, 6)
    found = compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiofxWarning)
        found(torch.randn(3, 5, 4))
    with pytest.raises(InputError, match="fullgraph=True"):
        biofx.companion(found)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"proj_size": 3, "num_layers": 2}),
        ("GRU", {"bidirectional": True}),
        ("RNN", {"nonlinearity": "relu", "bias": False}),
        ("RNN", {"num_layers": 2, "dropout": 0.3}),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("config", [RATES, SIGNS], ids=["rates", "signs"])
def test_recurrent_layers_in_the_graph_learn_as_transformed(
    kind: str, options: dict[str, Any], config: biofx.BioConfig
) -> None:
    model = Recurrent(kind, **options)
    expected = transformed(copy.deepcopy(model), config)
    backend = biofx.backend(config, then="eager", initialise=True)
    found = torch.compile(model, backend=backend)
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_learns_as(found, model, expected, torch.randn(3, 5, 4))
    assert_same_state(biofx.companion(found), expected)
    assert any("rnn.weight_hh_l0" in str(remark) or remark.layer == "rnn" for remark in _applied(backend))


def _applied(backend: Any) -> list[Any]:
    return [
        remark for entry in backend.reports[0].passes for remark in entry.remarks if remark.kind == "applied"
    ]
