from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioConverter, BioGraphModule, OptionError, Pass, Pipeline, Remark, Scope
from biofx.errors import PassError, SelectorError
from biofx.passes import ScaleGradients, SplitWeights
from biofx.rewriting import reproducer as module
from biofx.rewriting.reproducer import PLACE, write_reproducer


class Inner(nn.Module):
    """A class that only this file knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) * self.mask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Stumble(Pass):
    """Fail at a node, after having changed the graph."""

    name: ClassVar[str] = "stumble"

    at: str = "inner_fc"
    error: type[Exception] = ZeroDivisionError

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        for node in list(graph_module.graph.nodes):
            options = scope.options(self, node, "")
            if node.name == self.at and not isinstance(options, str):
                graph_module.graph.erase_node(list(graph_module.graph.nodes)[-1])
                raise self.error("here")
        yield from ()


def ran_elsewhere(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script where none of this file's names can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def noted(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


needs_notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before 3.11")


@needs_notes
def test_an_exception_inside_a_pass_leaves_a_reproducer_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "here"))
    pipeline = Pipeline((SplitWeights(), Stumble(), ScaleGradients()))
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError, match="here") as caught:
        biofx.transform(model, passes=pipeline)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    script = tmp_path / "here" / "reproduce.py"
    assert noted(caught.value).count(str(script)) == 1
    text = script.read_text(encoding="utf-8")
    assert "# stumble\n# raises ZeroDivisionError: here" in text
    assert f"torch {torch.__version__}" in text
    graph = biofx.format_graph(Pipeline((SplitWeights(),))(biofx.capture(model)).graph_module)
    assert "".join(f"#   {line}\n" for line in graph.splitlines()) in text
    again = ran_elsewhere(script, tmp_path)
    assert again.returncode == 1
    assert "ZeroDivisionError: here" in again.stderr


@needs_notes
def test_the_converter_leaves_one_too_and_a_pass_that_is_called_alone_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "here"))
    with pytest.raises(ZeroDivisionError) as alone:
        Stumble()(biofx.capture(Net()))
    assert "reproduce" not in noted(alone.value)
    monkeypatch.setattr(SplitWeights, "rewrite_node", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        BioConverter(weight_splitting_Gamma=2)(Net())
    script = tmp_path / "here" / "reproduce.py"
    assert noted(caught.value).count(str(script)) == 1
    assert "# raises ZeroDivisionError: division by zero" in script.read_text(encoding="utf-8")


@needs_notes
def test_by_default_it_goes_to_a_new_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PLACE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError) as caught:
        biofx.transform(Net(), passes=Stumble())
    (script,) = tmp_path.glob("biofx-*/reproducer/reproduce.py")
    assert str(script) in noted(caught.value)
    assert (script.parent.parent.stat().st_mode & 0o077) == 0


def test_off_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, "off")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError) as caught:
        biofx.transform(Net(), passes=Stumble())
    assert not list(tmp_path.iterdir())
    assert "reproduce" not in noted(caught.value)


def test_what_biofx_raises_on_purpose_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "here"))
    with pytest.raises(SelectorError):
        biofx.transform(Net(), only="nothing")
    with pytest.raises(PassError, match="refused"):
        biofx.transform(Net(), passes=Refuses())
    assert not list(tmp_path.iterdir())
    with pytest.raises(PassError, match="broke its contract"):
        biofx.transform(Net(), passes=SaysNothing())
    assert (tmp_path / "here" / "reproduce.py").exists()


@dataclass(frozen=True, kw_only=True)
class Refuses(Pass):
    """Refuse every graph."""

    name: ClassVar[str] = "refuses"

    def requires(self, graph_module: Any) -> None:
        raise PassError("refused")

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        yield from ()


@dataclass(frozen=True, kw_only=True)
class SaysNothing(Pass):
    """Change a graph without a word."""

    name: ClassVar[str] = "says-nothing"

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.relu):
            node.target = torch.tanh
        yield from ()


@needs_notes
def test_whatever_goes_wrong_while_writing_the_exception_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(PLACE, str(tmp_path / "file" / "below"))
    with pytest.raises(ZeroDivisionError) as caught:
        biofx.transform(Net(), passes=Stumble())
    assert "no reproducer was written: OptionError: cannot write" in noted(caught.value)
    assert caught.value.__cause__ is None

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("in the writer")

    monkeypatch.setattr(module, "write_reproducer", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        biofx.transform(Net(), passes=Stumble())
    assert "no reproducer was written: RuntimeError: in the writer" in noted(caught.value)


@needs_notes
def test_a_pass_that_fails_only_once_is_reproduced_with_all_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "here"))
    with pytest.raises(ZeroDivisionError):
        biofx.transform(Net(), passes=[SplitWeights(), FailsOnce(), ScaleGradients()])
    text = (tmp_path / "here" / "reproduce.py").read_text(encoding="utf-8")
    assert "# split-weights,fails-once,scale-gradients\n# raises ZeroDivisionError" in text


failures: list[int] = []


@dataclass(frozen=True, kw_only=True)
class FailsOnce(Pass):
    """Fail the first time."""

    name: ClassVar[str] = "fails-once"

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        failures.append(1)
        if len(failures) == 1:
            raise ZeroDivisionError
        yield from ()


OFFSET = torch.tensor(0.25)


def first_output(bio_model: nn.Module) -> str:
    """Say what the model computes; refers to a value and to a class of this file."""
    return f"{type(bio_model).__name__} {helper(bio_model):.6f}"


def helper(bio_model: nn.Module) -> float:
    return float(bio_model(torch.full((1, 4), 0.5) + OFFSET).sum().item())


def test_the_script_runs_alone_with_predicate_config_and_passes(tmp_path: Path) -> None:
    model = Net()
    config = BioConfig(fuzzy_learning_rate_factor_nu=0.1)
    passes = (
        SplitWeights(activation=squared, only="inner"),
        Pipeline((ScaleGradients(),), exclude=["head"]),
    )
    script = write_reproducer(
        tmp_path / "out", biofx.capture(model), passes, "a\nstory", config=config, predicate=first_output
    )
    done = ran_elsewhere(script, tmp_path)
    assert done.returncode == 0, done.stderr
    rewritten = biofx.transform(model, config, passes=Pipeline(passes)).graph_module
    assert f"before the passes: {first_output(biofx.capture(model))}\n" in done.stdout
    assert f"after the passes:  {first_output(rewritten)}\n" in done.stdout
    assert "applied inner.fc: 2 groups of 2 of its 4 output channels summed" in done.stdout


def test_a_folder_that_holds_one_already_is_left_alone(tmp_path: Path) -> None:
    scripts = [write_reproducer(tmp_path / "out", biofx.capture(Net()), [], "story") for _ in range(3)]
    assert [script.parent.name for script in scripts] == ["out", "out-2", "out-3"]


def test_large_weights_stay_behind_and_are_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 10)
    model = nn.Sequential(nn.Linear(400, 400), nn.BatchNorm1d(400))
    script = write_reproducer(tmp_path / "out", biofx.capture(model), [ScaleGradients()], "story")
    assert (script.parent / "model.pt").stat().st_size < 50_000
    runpy.run_path(str(script))
    assert "160000 factors" in capsys.readouterr().out


def squared(x: Tensor) -> Tensor:
    return x * x


def test_a_story_cannot_run(tmp_path: Path) -> None:
    story = 'first\n"""\nraise SystemExit(9)\rraise SystemExit(8)\x0craise SystemExit(7)'
    script = write_reproducer(tmp_path / "out", biofx.capture(Net()), [], story)
    first = ast.parse(script.read_text(encoding="utf-8")).body[0]
    assert isinstance(first, ast.ImportFrom)
    assert first.module == "pathlib"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot write a reproducer"):
        write_reproducer(tmp_path / "file" / "below", biofx.capture(Net()), [], "story")


def coded(x: Tensor) -> Tensor:
    # -*- coding: latin-1 -*-
    """Größe. -*- coding: utf-7 -*-"""
    return x + len("größe")


@pytest.mark.parametrize(
    "story",
    [
        "plain",
        "-*- coding: latin-1 -*-",
        "first\nvim: set fileencoding=utf-7 :",
        "größe\nсловарь coding=ascii",
        "bell \x07 null \x00 escape \x1b[31m surrogate \ud800 \u202e reversed",
    ],
)
def test_the_script_is_utf_8_whatever_is_told_in_it(story: str, tmp_path: Path) -> None:
    script = write_reproducer(tmp_path / "out", biofx.capture(Net()), [SplitWeights(activation=coded)], story)
    content = script.read_bytes()
    assert content.startswith(b"# -*- coding: utf-8 -*-\n")
    assert "größe" in content.decode("utf-8")
    done = ran_elsewhere(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "summed after coded" in done.stdout


def test_its_owner_alone_can_read_it_from_the_first_moment_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    opened: list[tuple[str, int, int]] = []

    def watched(path: Any, flags: int, mode: int = 0o777, open_it: Any = os.open) -> int:
        opened.append((Path(path).name, flags & os.O_EXCL, mode))
        return int(open_it(path, flags, mode))

    monkeypatch.setattr(os, "open", watched)
    try:
        script = write_reproducer(tmp_path / "a" / "out", biofx.capture(Net()), [], "story")
    finally:
        os.umask(before)
    assert opened == [("model.pt", os.O_EXCL, 0o600), ("reproduce.py", os.O_EXCL, 0o600)]
    assert {path.name: path.stat().st_mode & 0o777 for path in script.parent.iterdir()} == {
        "model.pt": 0o600,
        "reproduce.py": 0o600,
    }
    assert script.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["reproduce.py", "model.pt"])
def test_what_lies_there_already_is_neither_followed_nor_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    for number, target in enumerate((tmp_path / "victim", tmp_path / "nothing yet")):
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / name).symlink_to(target)
        script = write_reproducer(out, biofx.capture(Net()), [], "story")
        assert script.parent.name == f"out{number}-2"
        assert [path.name for path in out.iterdir()] == [name]
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "nothing yet").exists()


def test_a_reproducer_that_cannot_be_written_whole_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Any, flags: int, mode: int = 0o777, open_it: Any = os.open) -> int:
        if Path(path).name == "reproduce.py":
            raise OSError(28, "No space left on device")
        return int(open_it(path, flags, mode))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OptionError, match="No space left"):
        write_reproducer(tmp_path / "out", biofx.capture(Net()), [], "story")
    assert not list((tmp_path / "out").iterdir())
