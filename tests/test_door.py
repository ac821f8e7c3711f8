"""What ``import biofx`` gives, what it costs, and where everything else is."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import matplotlib.figure
import pytest
import rich.console
import typing_extensions

import biofx

PACKAGES = (
    *("analysis", "checkpoints", "compiling", "diagnostics", "errors", "graph"),
    *("passes", "plasticity", "rewriting", "select"),
)
PLACES = [biofx, *(getattr(biofx, name) for name in PACKAGES)]
OTHERS = {
    "Figure": matplotlib.figure.Figure,
    "Console": rich.console.Console,
    "ConsoleOptions": rich.console.ConsoleOptions,
    "RenderResult": rich.console.RenderResult,
    "Self": typing_extensions.Self,
}
"""Types of libraries that are imported on first use."""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_door_is_small_and_dir_shows_what_there_is() -> None:
    assert len(biofx.__all__) == len(set(biofx.__all__)) <= 39
    assert set(dir(biofx)) == {*biofx.__all__, *PACKAGES, "__version__"}
    assert [name for place in PLACES for name in place.__all__ if not hasattr(place, name)] == []


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("save_sharded", "biofx.checkpoints.save_sharded"),
        ("Checkpoint", "biofx.checkpoints.Checkpoint"),
        ("SelectorError", "biofx.errors.SelectorError"),
        ("StepRecord", "biofx.diagnostics.StepRecord"),
        ("UnitGroup", "biofx.analysis.UnitGroup"),
        ("compile_config", "biofx.rewriting.compile_config"),
        ("diff_graphs", "biofx.graph.diff_graphs"),
        ("Culprit", "biofx.diagnostics.BisectResult"),
    ],
)
def test_a_name_that_moved_is_found_with_a_warning_that_says_where(name: str, place: str) -> None:
    _, package, now = place.split(".")
    with pytest.warns(DeprecationWarning, match=f"^biofx.{name} moved to {place}$"):
        found = getattr(biofx, name)
    assert found is getattr(getattr(biofx, package), now)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trasform'; did you mean 'transform'"):
        getattr(biofx, "trasform")  # noqa: B009


def test_importing_biofx_imports_nothing_but_itself_and_the_standard_library() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import biofx\n"
        "print(*sorted({name for name in sys.modules if name not in before}))"
    )
    added = run(code).split()
    assert len(added) > 100
    own = {name for name in added if name.partition(".")[0] == "biofx"}
    foreign = {name for name in set(added) - own if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("_sysconfigdata")} == set()
    assert own & {"biofx.cli", "biofx.demo", "biofx.diagnostics.explain"} == set()


def test_functions_are_not_hidden_by_the_modules_of_their_name() -> None:
    code = (
        "import importlib, pkgutil, biofx\n"
        "for module in pkgutil.walk_packages(biofx.__path__, 'biofx.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*(type(getattr(biofx, name)).__name__ for name in biofx.__all__))"
    )
    kinds = run(code).split()
    assert [name for name, kind in zip(biofx.__all__, kinds, strict=True) if kind == "module"] == ["passes"]


def public() -> dict[str, Any]:
    """Return all public objects by the name under which they are documented."""
    return {f"{place.__name__}.{name}": getattr(place, name) for place in PLACES for name in place.__all__}


def signatures(thing: Any) -> Iterator[Any]:
    """Yield what of an object, or of a class's public attributes, has annotations."""
    if inspect.isfunction(thing):
        yield thing
    elif inspect.isclass(thing):
        yield thing
        if thing.__name__ in FOR_PASSES:
            return
        for name, member in vars(thing).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            own_init = name == "__init__" and not dataclasses.is_dataclass(thing)
            if f"{thing.__name__}.{name}" in INTERNAL:
                continue
            if inspect.isfunction(function) and (own_init or not name.startswith("_")):
                yield function


FOR_PASSES = {*biofx.passes.__all__, "UnitGroups"}
"""Classes whose methods passes alone call; users see their fields."""
INTERNAL = {
    *("Attachment.__init__", "Pass.run", "Pipeline.run", "Scope.__init__"),
    *("UnitCall.__init__", "UnitCall.sites"),
}
"""What the library alone calls."""


def types_in(annotation: Any) -> Iterator[type]:
    """Yield the classes that an annotation mentions."""
    if inspect.isclass(annotation) and typing.get_origin(annotation) is None:
        yield annotation
    for inner in typing.get_args(annotation):
        yield from types_in(inner)
    if typing.get_origin(annotation) not in (None, typing.Literal):
        yield from types_in(typing.get_origin(annotation))


@pytest.mark.parametrize("name", sorted(public()))
def test_the_types_that_a_public_signature_mentions_are_public(name: str) -> None:
    known = {id(value) for value in public().values()}
    hidden = set()
    for signature in signatures(public()[name]):
        hints = typing.get_type_hints(signature, localns=OTHERS)
        for annotation in (hint for argument, hint in hints.items() if not argument.startswith("_")):
            hidden |= {
                f"{signature.__qualname__}: {found.__module__}.{found.__qualname__}"
                for found in types_in(annotation)
                if found.__module__.partition(".")[0] == "biofx" and id(found) not in known
            }
    assert hidden == set()
