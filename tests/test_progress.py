from __future__ import annotations

import io

import pytest
from rich.console import Console
from torch import nn

import biofx
from biofx.progress import advance, listening, shown


def test_capture_and_passes_say_how_far_they_are(mlp: nn.Module) -> None:
    heard: list[tuple[str, int | None]] = []
    with listening(lambda stage, total: heard.append((stage, total))):
        biofx.transform(mlp, biofx.BioConfig(weight_splitting_Gamma=2))
    assert heard[:5] == [("capture", 6)] * 5  # the model has five layers, and is a module itself
    assert heard.count(("split-weights", None)) == heard.count(("scale-gradients", None)) == 3
    assert heard.count(("fold-splits", None)) == 5  # it speaks of its two pools, too
    advance("nobody listens any more")
    assert len(heard) == 16


def test_a_listener_that_is_interrupted_is_gone() -> None:
    heard: list[str] = []
    with pytest.raises(KeyboardInterrupt), listening(lambda stage, total: heard.append(stage)):
        raise KeyboardInterrupt
    advance("later")
    assert heard == []


def test_bars_are_shown_on_a_terminal_and_gone_afterwards() -> None:
    file = io.StringIO()
    with shown(Console(file=file, force_terminal=True, width=80, color_system=None)):
        for _ in range(3):
            advance("[odd] name", 3)
    assert "[odd] name" in file.getvalue()
    assert "3/3" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")


def test_nothing_is_shown_in_a_pipe() -> None:
    file = io.StringIO()
    with shown(Console(file=file)):
        advance("capture", 1)
    assert file.getvalue() == ""
