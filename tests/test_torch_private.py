"""Private names of torch are reached through one file, and what it lists is there."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn
from torch.fx import Graph, GraphModule, Proxy, Tracer
from torch.fx.graph import CodeGen

import check
import versions
from biofx import torch_private
from biofx.errors import BiofxError, TorchVersionError

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for path in sorted([*ROOT.glob("biofx/**/*.py"), *ROOT.glob("passes/*.py")])
    if path.name != "torch_private.py" and "biofx/passes" not in str(path.relative_to(ROOT))
]


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name != "_"


def objects_of_torch() -> list[Any]:
    graph = Graph()
    node = graph.placeholder("x")
    weight = nn.Parameter(torch.zeros(1, 1))
    layers = (
        nn.Linear(1, 1),
        nn.Conv1d(1, 1, 1),
        nn.ConvTranspose1d(1, 1, 1),
        nn.LSTM(1, 1),
        nn.LSTMCell(1, 1),
    )
    others = (
        nn.MultiheadAttention(1, 1),
        nn.InstanceNorm1d(1),
        nn.BatchNorm1d(1),
        nn.TransformerEncoderLayer(2, 1),
    )
    graph.output(node)
    made = GraphModule(nn.Module(), graph)
    return [
        *(*layers, *others, made, graph, node, CodeGen(), Tracer(), Proxy(node)),
        *(weight, weight.untyped_storage(), torch.optim.Adam([weight]), torch.autocast("cpu")),
        *(
            torch.ops.aten.add,
            torch.ops.aten.add.Tensor,
            torch.Generator(),
            torch.compile(nn.Linear(1, 1), backend="eager"),
        ),
        *(torch.nn.functional, torch.nn.modules.transformer, torch.nn.utils.parametrize, torch.amp),
        *(torch.autograd.Function, torch, torch._C, torch.autograd.Variable, torch.utils, torch.distributed),
    ]


@functools.cache
def private_names() -> frozenset[str]:
    """Return the names with an underscore that an object, class or module of torch has."""
    found = frozenset(name for thing in objects_of_torch() for name in dir(thing) if is_private(name))
    assert len(found) > 400
    return found


def defined_in(tree: ast.AST) -> set[str]:
    """Return the names with an underscore that a file itself defines, or assigns on ``self``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def aliases_of_torch(tree: ast.AST) -> dict[str, str]:
    """Return the names under which a file has things of torch, with their full names."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torch":
                    found[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "torch":
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def reached(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of whatever private of torch's a file imports, reaches or names as a text."""
    tree = ast.parse(source)
    aliases, own = aliases_of_torch(tree), defined_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in (start + alias.name for alias in node.names):
                if name.partition(".")[0] == "torch" and any(map(is_private, name.split("."))):
                    yield node.lineno, name
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            written = ast.unparse(node.value)
            of_torch = written.partition(".")[0] in aliases  # whether this torch has it or not
            if of_torch or (node.attr in private_names() and node.attr not in own):
                yield node.lineno, f"{written}.{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_attribute = node.value in private_names() and node.value not in own
            if is_attribute or re.match(r"torch\.(\w+\.)*_[a-z]", node.value):
                yield node.lineno, node.value


def test_no_other_file_imports_or_reaches_a_private_name_of_torch() -> None:
    assert len(FILES) > 200
    listed = {name for names in torch_private.ATTRIBUTES.values() for name in names}
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in FILES
        for line, name in reached(path.read_text(encoding="utf-8"))
        if name.rpartition(".")[2] not in listed
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "from torch._ops import OpOverload",
        "from torch.utils import _pytree as pytree",
        "import torch._dynamo",
        "from torch import fx\nfx._anything",
        "import torch\nif torch._C._is_there(): pass",
        "node._rename('x')",
        "getattr(graph, '_codegen')",
        "class Own(CodeGen):\n    def f(self): return self._pytree_info or self._func_name",
        "kinds = 'torch._inductor.codecache'",
    ],
)
def test_the_search_finds_each_way_to_reach_one(line: str) -> None:
    assert list(reached(line)) != []


def test_the_search_leaves_public_names_and_those_of_the_library_alone() -> None:
    source = (
        "import sys, torch\nfrom torch.fx import Graph\n"
        "class Own:\n    def __init__(self): self._graph, self._name = Graph(), torch.__version__\n"
        "    def _rename(self): return sys._getframe(), self._graph, self.x.__dict__\n"
        "    def other(self): return self._rename()\n"
    )
    assert list(reached(source)) == []


def test_every_name_that_is_listed_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    listed = [name for names in torch_private.ATTRIBUTES.values() for name in names]
    assert len(listed) == len(set(listed))
    assert [name for name in listed if not re.search(rf"\b{name}\b", text)] == []
    tree = ast.parse(Path(torch_private.__file__).read_text(encoding="utf-8"))
    given = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    given += [ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign)]
    public = [name for name in given if not name.startswith("_") and name not in ("ATTRIBUTES", "refuse")]
    assert len(public) > 45
    assert [name for name in public if not re.search(rf"\b{name}\b", text)] == []


def imported_without(deletion: str) -> str:
    """Return what the import of the library says where torch has lost something."""
    code = (
        f"import torch\nfrom torch import nn\n{deletion}\n"
        "try:\n    import biofx\n"
        "except ImportError as error:\n"
        "    kinds = [kind.__name__ for kind in type(error).__mro__]\n"
        "    print(*kinds, error, sep='\\n')\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_torch_that_lacks_names_is_refused_on_import_with_all_of_them_and_a_way_out() -> None:
    said = imported_without(
        "del torch._C._current_graph_task_id, torch._foreach_lerp_, torch.fx.Node._rename\n"
        "del nn.modules.instancenorm._InstanceNorm._get_no_batch_dim, nn.InstanceNorm1d._get_no_batch_dim"
    )
    assert said.splitlines()[:2] == ["TorchVersionError", "BiofxError"]
    missing = "torch._C._current_graph_task_id, torch._foreach_lerp_, Node._rename, "
    missing += "InstanceNorm1d._get_no_batch_dim"
    assert f"that torch {torch.__version__} does not have: {missing}. It was tried on torch " in said
    assert f"pip install torch=={torch_private.TRIED_ON[-1]}" in said


def test_a_name_that_is_looked_up_late_is_refused_in_the_same_words() -> None:
    with pytest.raises(
        TorchVersionError, match=r"does not have: torch\.utils\._nothing\.Here\. It was tried on"
    ):
        torch_private._required("torch.utils._nothing.Here")
    assert issubclass(TorchVersionError, BiofxError)


def test_the_tested_release_is_among_those_it_was_tried_on() -> None:
    tried = torch_private.TRIED_ON
    assert list(tried) == sorted(tried, key=release)
    constraints = (ROOT / "tools" / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in tried


def test_the_lowest_release_that_is_allowed_is_the_lowest_it_was_tried_on() -> None:
    required = versions.torch_required((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert all(required.specifier.contains(tried) for tried in torch_private.TRIED_ON)
    assert Version(versions.lowest(required)) == Version(torch_private.TRIED_ON[0])


def test_an_environment_gets_the_release_that_is_asked_for_and_all_else_as_pinned() -> None:
    pinned = "# why\nnumpy==2.4.6\nsetuptools==84.2.1\ntorch==2.13.0\ntorchmetrics==1.9.0\n"
    constraints = versions.constraints_for("2.12", pinned)
    assert constraints == "# why\nnumpy==2.4.6\ntorchmetrics==1.9.0\ntorch==2.12\n"


@pytest.mark.parametrize(
    ("required", "bound"), [("torch>=2.12", "2.12"), ("torch>=2.12,<2.15", "2.12"), ("torch~=2.12", "2.12")]
)
def test_the_lowest_release_is_the_lower_bound(required: str, bound: str) -> None:
    found = versions.torch_required(f'dependencies = ["rich>=13.0", "{required}", "networkx"]')
    assert versions.lowest(found) == bound


@pytest.mark.parametrize("required", ["torch", "torch<2.15"])
def test_a_requirement_without_a_lower_bound_is_refused(required: str) -> None:
    with pytest.raises(versions.VersionsError, match=f"expected one lower bound, found {required}"):
        versions.lowest(Requirement(required))


def test_a_step_that_there_is_not_is_refused_and_versions_is_no_step_of_the_whole() -> None:
    with pytest.raises(
        SystemExit, match="no step version; there are format, lint, types, package, tests, versions"
    ):
        check.main(["version"])
    assert "versions" not in check.STEPS


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
