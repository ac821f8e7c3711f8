from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioGraphModule, Pass, Pipeline, Remark, Scope
from biofx.cli import main
from biofx.errors import BisectError
from biofx.passes import ConstrainSigns, ScaleGradients, SplitWeights


class Chain(nn.Module):
    """Ten layers that keep what goes through them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@dataclass(frozen=True, kw_only=True)
class Alter(Pass):
    """Turn each relu that is selected into another function."""

    name: ClassVar[str] = "alter"

    function: str = "sigmoid"
    only_when: str = ""
    fails_at: str = ""

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.relu):
            options = scope.options(self, node, "")
            if isinstance(options, str):
                yield biofx.missed(node, "", options)
                continue
            if node.name == self.fails_at:
                raise ZeroDivisionError(f"at {node.name}")
            node.target = getattr(torch, options.function)
            yield biofx.applied(node, "", f"now {options.function}")


def targets(bio_model: nn.Module) -> list[str]:
    graph: Any = bio_model.graph
    return [node.target.__name__ for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("guilty", [0, 4, 9])
def test_each_node_of_each_pass_can_be_found(guilty: int) -> None:
    def predicate(bio_model: BioGraphModule) -> bool:
        relus = [name for name in targets(bio_model) if name in ("relu", "tanh")]
        return relus[guilty] == "tanh"

    passes = [SplitWeights(), ScaleGradients(), Alter(function="tanh"), ConstrainSigns()]
    found = biofx.bisect(Chain(), predicate=predicate, passes=passes)
    name = "relu" if guilty == 0 else f"relu_{guilty}"
    assert (found.stage, found.node, found.alone) == (Alter(function="tanh"), name, True)
    assert found.passes == (Pipeline((Alter(function="tanh"),), only=name),)
    assert found.tries <= 20


def test_the_answer_is_the_first_pass_and_needs_no_order_of_halves(mlp: nn.Module) -> None:
    asked: list[bool] = []

    def predicate(bio_model: BioGraphModule) -> bool:
        asked.append("constrain_sign" in biofx.format_graph(bio_model))
        return asked[-1]

    found = biofx.bisect(mlp, BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True), predicate)
    assert (found.stage.name, found.node) == ("constrain-signs", "_2")
    assert str(found) == (
        "constrain-signs is the first pass after which the predicate is true, and _2 the first node\n"
        f"  {next(r for r in found.report.remarks if r.node == '_2') if found.report else ''}\n"
        "  created  _2_weight = self.2.weight  # (4, 6)\n"
        "  created  _0_sign = self.0.bio_mod.sign  # (6,)\n"
        "  created  _2_signed = constrain_sign(_2_weight, _0_sign, method='project')\n"
        "  replaced _2 = linear(_1, _2_signed)\n"
        "the rewrite of that node alone is enough\n"
        "to see it: (constrain-signs){only=_2}\n"
        f"found in {len(asked)} tries"
    )
    assert Pipeline.parse("(constrain-signs){only=_2}").passes == found.passes
    assert found.tries == len(asked)


def test_nodes_that_only_together_do_harm_are_named_together() -> None:
    found = biofx.bisect(
        Chain(),
        predicate=lambda bio_model: targets(bio_model).count("tanh") >= 4,
        passes=Alter(function="tanh"),
    )
    assert (found.node, found.alone) == ("relu_3", False)
    assert found.passes == (Pipeline((Alter(function="tanh"),), only=("relu", "relu_1", "relu_2", "relu_3")),)
    assert "that takes the rewrites of the nodes before it, too" in str(found)


def test_earlier_passes_stay_where_they_are_needed() -> None:
    def predicate(bio_model: BioGraphModule) -> bool:
        return {"tanh", "sigmoid"} <= set(targets(bio_model))

    first, second = (
        Alter(function="tanh", only="relu_2"),
        Alter(function="sigmoid", only=["relu_5", "relu_6"]),
    )
    found = biofx.bisect(Chain(), predicate=predicate, passes=[ScaleGradients(), first, second])
    assert (found.stage, found.node) == (second, "relu_5")
    assert found.passes == (first, Pipeline((second,), only="relu_5"))


def test_an_exception_of_a_pass_is_found_with_the_node_and_leaves_no_reproducers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIOFX_REPRODUCER", str(tmp_path / "stray"))
    broken = Alter(fails_at="relu_6")
    found = biofx.bisect(Chain(), passes=[ScaleGradients(), broken, Alter(function="tanh")])
    assert (found.stage, found.node, found.report) == (broken, "relu_6", None)
    assert found.symptom == "ZeroDivisionError is raised (at relu_6)"
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True, kw_only=True)
class NeverRuns(Pass):
    """Fail before looking at a node."""

    name: ClassVar[str] = "never-runs"

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        raise ZeroDivisionError


def test_a_pass_that_fails_whatever_it_may_touch_has_no_node() -> None:
    found = biofx.bisect(Chain(), passes=[Alter(), NeverRuns(), ScaleGradients()])
    assert (found.stage, found.node, found.passes) == (NeverRuns(), None, (NeverRuns(),))
    assert "whatever node it may touch" in str(found)


def test_an_exception_of_the_predicate_counts_and_another_one_comes_through() -> None:
    def predicate(bio_model: BioGraphModule) -> bool:
        count = targets(bio_model).count("tanh")
        if count >= 3:
            raise FloatingPointError("nan")
        return False

    found = biofx.bisect(Chain(), predicate=predicate, passes=Alter(function="tanh"))
    assert (found.node, found.alone) == ("relu_2", False)
    assert "FloatingPointError is raised (nan)" in str(found)

    def confused(bio_model: BioGraphModule) -> bool:
        count = targets(bio_model).count("tanh")
        if 0 < count < 10:
            raise KeyError("other")
        return count == 10

    with pytest.raises(KeyError, match="other"):
        biofx.bisect(Chain(), predicate=confused, passes=Alter(function="tanh"))


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        (lambda bio_model: True, "true of the model as it is, before any pass"),
        (lambda bio_model: False, "not true after all 1 passes, alter: there is nothing to find"),
        (lambda bio_model: 1 / 0, "raises ZeroDivisionError for the model as it is"),
    ],
)
def test_without_anything_to_find_it_says_so(predicate: Any, message: str) -> None:
    with pytest.raises(BisectError, match=message):
        biofx.bisect(Chain(), predicate=predicate, passes=Alter())


def test_answers_that_contradict_each_other_are_an_error() -> None:
    seen: set[str] = set()

    def predicate(bio_model: BioGraphModule) -> bool:
        text = biofx.format_graph(bio_model)
        is_new = text not in seen
        seen.add(text)
        return is_new and "tanh" in text

    with pytest.raises(BisectError, match="different answers for the same model"):
        biofx.bisect(Chain(), predicate=predicate, passes=Alter(function="tanh"))


def test_the_model_and_the_random_state_stay_as_they_are(mlp: nn.Module, unchanged: Any) -> None:
    with unchanged(mlp):
        biofx.bisect(mlp, predicate=lambda bio_model: "scale_gradient" in biofx.format_graph(bio_model))


SCRIPT = """
import biofx, torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
    def forward(self, x):
        return torch.relu(self.fc2(torch.relu(self.fc1(x))))

def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

inputs = torch.ones(2, 4)

def predicate(bio_model):
    return not bio_model(inputs).isfinite().all()

passes = "scale-gradients,constrain-signs,split-weights{activation=torch.log}"
"""
REGIONS = (
    SCRIPT.replace(
        "        return torch.relu(self.fc2(torch.relu(self.fc1(x))))",
        """        return x if x.abs().sum() > 1e9 else self.part(x)""",
    )
    .replace(
        "        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)",
        "        self.part = Part()",
    )
    .replace(
        "class Block(nn.Module):",
        """class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
    def forward(self, x):
        y = torch.relu(self.fc1(x))
        return self.fc2(y + 0.1 if self.training else y)

class Block(nn.Module):""",
    )
)
"""The same, but Python runs the block around the layers, and they do something in training only."""


@pytest.mark.parametrize(("source", "node"), [(SCRIPT, "_0_fc1"), (REGIONS, "_0_part_fc1")])
def test_the_command_finds_it_and_writes_a_script_that_shows_it(
    source: str,
    node: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "diverges", raising=False)
    Path("diverges.py").write_text(source, encoding="utf-8")
    assert main(["bisect", "diverges.py"]) == 0
    printed = capsys.readouterr().out
    assert (
        "split-weights{activation=torch.log} is the first pass after which the predicate is true" in printed
    )
    assert f"{node} the first node" in printed
    assert "reproducer: python biofx-reproducer" in printed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if source is REGIONS:  # what Python runs is of the user's class
        environment["PYTHONPATH"] = os.getcwd()
    else:
        Path("diverges.py").unlink()
    sys.modules.pop("diverges", None)
    script = tmp_path / "work" / "biofx-reproducer" / "reproduce.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "before the passes: False\nafter the passes:  True\n" in done.stdout


def test_a_predicate_that_cannot_come_along_is_said_to_be_missing(tmp_path: Path) -> None:
    held = Chain()

    def predicate(bio_model: BioGraphModule) -> bool:
        return "tanh" in targets(bio_model) and held is not None

    found = biofx.bisect(
        Chain(), predicate=predicate, passes=Alter(function="tanh"), reproducer=tmp_path / "out"
    )
    assert found.reproducer == tmp_path / "out" / "reproduce.py"
    assert "the predicate is not in the reproducer: " in str(found)
    assert "holds a Chain" in str(found)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", "'s.py' has no 'model'"),
        (
            "from torch import nn\nmodel = nn.Linear(2, 2)\npredicate = 3",
            "expected a function called predicate",
        ),
        ("from torch import nn\nmodel = nn.Linear(2, 2)", "there is nothing to find"),
    ],
)
def test_a_script_that_does_not_say_what_to_look_for_is_refused(
    script: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("s.py").write_text(script, encoding="utf-8")
    assert main(["bisect", "s.py"]) == 1
    assert message in capsys.readouterr().err
    sys.modules.pop("s", None)
