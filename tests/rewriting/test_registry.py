"""Which passes there are, and what may register as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
from torch import nn

import biofx
from biofx import BioConfig, BioGraphModule, Pass, Pipeline, Remark, Scope, passes
from biofx.errors import PipelineError
from biofx.rewriting.registry import GROUP, available_passes, find_pass


@dataclass(frozen=True, kw_only=True)
class ShuffleChannels(Pass):
    """A pass of another package."""

    name: ClassVar[str] = "shuffle-channels"
    after: ClassVar[tuple[str, ...]] = ("constrain-signs",)

    groups: int = 2
    """How many, a count."""

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        return iter(())


class Nameless(Pass):
    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        return iter(())


class Impostor(ShuffleChannels):
    name: ClassVar[str] = "split-weights"


def a_function() -> None: ...


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Let entry points look as if a package had brought them."""

    def installed(*found: Any) -> None:
        entries = [
            EntryPoint(name=f"entry-{number}", value=f"{__name__}:{thing.__name__}", group=GROUP)
            for number, thing in enumerate(found)
        ]
        by_value = {entry.value: thing for entry, thing in zip(entries, found, strict=True)}
        monkeypatch.setattr(EntryPoint, "load", lambda entry: by_value[entry.value])
        monkeypatch.setattr(
            "biofx.rewriting.registry.entry_points", lambda *, group: entries if group == GROUP else []
        )

    return installed


def test_the_built_in_passes_are_there_in_the_order_of_the_package() -> None:
    assert list(available_passes().items())[:5] == [
        ("split-weights", passes.SplitWeights),
        ("expand-units", passes.ExpandUnits),
        ("mask-weights", passes.MaskWeights),
        ("constrain-signs", passes.ConstrainSigns),
        ("scale-gradients", passes.ScaleGradients),
    ]


def test_a_pass_of_another_package_is_known_by_its_own_name(install: Install) -> None:
    install(ShuffleChannels)
    assert list(available_passes())[-1] == "shuffle-channels"
    pipeline = Pipeline.parse("shuffle-channels{groups=4},constrain-signs")
    assert pipeline == Pipeline((passes.ConstrainSigns(), ShuffleChannels(groups=4)))
    assert str(pipeline) == "constrain-signs,shuffle-channels{groups=4}"


def test_a_pass_of_another_package_takes_no_options_from_a_config(install: Install, mlp: nn.Module) -> None:
    install(ShuffleChannels)
    config = BioConfig(fuzzy_learning_rate_factor_nu=0.3)
    report = biofx.transform(mlp, config, passes="shuffle-channels, scale-gradients").report
    assert [entry.text for entry in report.passes] == ["shuffle-channels", "scale-gradients{nu=0.3}"]


def test_a_pass_registered_twice_is_one_pass(install: Install) -> None:
    install(ShuffleChannels, ShuffleChannels)
    assert list(available_passes()).count("shuffle-channels") == 1


@pytest.mark.parametrize("thing", [a_function, nn.ReLU, Nameless, Impostor, Pass])
def test_an_entry_point_that_is_no_pass_with_a_free_name_is_refused(install: Install, thing: Any) -> None:
    install(thing)
    with pytest.raises(PipelineError) as caught:
        available_passes()
    assert str(caught.value) == (
        f"the entry point 'entry-0' = '{__name__}:{thing.__name__}' must name a biofx.Pass whose name is free"
    )


def test_an_entry_point_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint(name="gone", value="not_a_package_at_all:Pass", group=GROUP)
    monkeypatch.setattr("biofx.rewriting.registry.entry_points", lambda *, group: [broken])
    with pytest.raises(
        PipelineError, match="'gone' = 'not_a_package_at_all:Pass' cannot be loaded: No module"
    ):
        available_passes()


def test_a_pass_is_found_by_name() -> None:
    assert find_pass("split-weights") is passes.SplitWeights


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("split-weigths", "; did you mean 'split-weights'"),
        ("SplitWeights", "; did you mean 'split-weights'"),
        ("zzz", "; there are split-weights, expand-units, mask-weights, constrain-signs, scale"),
        ("pipeline", "; there are split-weights, expand-units, mask-weights, constrain-signs, scale"),
    ],
)
def test_an_unknown_pass_names_the_nearest_or_all(name: str, hint: str) -> None:
    with pytest.raises(PipelineError) as caught:
        find_pass(name)
    assert str(caught.value).startswith(f"unknown pass {name!r}{hint}")
