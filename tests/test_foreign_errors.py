from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import nn

import biofx
from biofx.analysis import units
from biofx.foreign_errors import foreign_errors_wrapped


def fails_as_ours(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, file: Any) -> None:
    """Let a function of ours fail as if its own source did."""
    source = "def failing(*args, **kwargs):\n    return [][1]\n"
    found: dict[str, Any] = {}
    exec(compile(source, file.__file__, "exec"), found)
    monkeypatch.setattr(owner, name, found["failing"])


def test_an_exception_of_our_own_code_is_an_error_of_ours_with_the_line() -> None:
    found: dict[str, Any] = {}
    exec(compile("\n\ndef failing(): return [][1]", units.__file__, "exec"), found)
    with (
        pytest.raises(
            biofx.errors.PassError, match=r"it failed with IndexError: .* \(units\.py:3\)"
        ) as caught,
        foreign_errors_wrapped(biofx.errors.PassError, "it"),
    ):
        found["failing"]()
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize("error", [KeyError("mine"), biofx.errors.InputError("ours"), MemoryError()])
def test_an_exception_of_the_users_and_an_error_of_ours_are_left_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, foreign_errors_wrapped(biofx.errors.PassError, "it"):
        raise error
    assert caught.value is error


def test_a_fault_in_a_pass_of_ours_names_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import biofx.passes.scale_gradients as file

    monkeypatch.setenv("BIOFX_REPRODUCER", "off")
    fails_as_ours(monkeypatch, file.ScaleGradients, "_sampled_from", file)
    with pytest.raises(
        biofx.errors.PassError, match=r"scale-gradients broke its contract: it failed with IndexErr"
    ):
        biofx.transform(nn.Sequential(nn.Linear(4, 4)), {"fuzzy_learning_rate_factor_nu": 0.2})


def test_a_fault_in_the_capture_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    file = sys.modules["biofx.capture.capture"]
    fails_as_ours(monkeypatch, file, "trace", file)
    with pytest.raises(biofx.CaptureError, match=r"the capture of Sequential failed with IndexError"):
        biofx.capture(nn.Sequential(nn.Linear(4, 4)), regions=False)


def test_what_a_selector_of_the_users_raises_keeps_its_type() -> None:
    def selects(*given: Any) -> bool:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        biofx.transform(nn.Sequential(nn.Linear(4, 4)), only=selects)
