"""Passes on graphs of dynamo, with the state of each model in its companion."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from biofx.compiling.companions import (
    Companion,
    extended,
    parameters_read,
    take_initial_values,
    write_values,
)
from biofx.compiling.dynamo_frames import Compilation
from biofx.compiling.named_graphs import NamedGraph, named_graph
from biofx.compiling.parts import ends_of, refuse_crossing
from biofx.config import BioConfig
from biofx.errors import BiofxWarning, InputError, PassError
from biofx.foreign_errors import foreign_errors_wrapped
from biofx.layers.weight_site import Sites
from biofx.model.graph_module import BioGraphModule
from biofx.plasticity.model_states import unwrapped
from biofx.plasticity.unattached import watch_first_step
from biofx.random_state import preserved_random_state
from biofx.rewriting.compile_config import configure_layers
from biofx.rewriting.held_parameters import hold_parameters
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.record import COMPILED, add_step, matches_of
from biofx.rewriting.report import Report
from biofx.rewriting.signed_weights import warn_of_training


@dataclass(eq=False)
class Rewriter:
    """Rewrites the graphs of models that are compiled, and keeps their state."""

    pipeline: Pipeline
    config: BioConfig | None
    initialise: bool
    reports: list[Report] = field(default_factory=list)
    _companions: Any = field(default_factory=WeakIdKeyDictionary)
    _told: Any = field(default_factory=WeakIdKeyDictionary)

    def rewritten(
        self,
        source: GraphModule,
        values: Mapping[str, Any],
        paths: Mapping[int, str],
        compilation: Compilation,
    ) -> tuple[NamedGraph, Companion]:
        """Return a graph with the passes done, and the companion that has its state.

        Args:
            source: as dynamo hands it to a backend; not changed.
            values: of its inputs, by their names.
            paths: of the modules of the model that was traced, by their ids.
            compilation: what the graph is of.

        Raises:
            BiofxError: as for :func:`biofx.transform`; the graph is a part of the model, and a pass must see
                the whole; a pass gives parameters other values, or other shapes. Nothing has been changed.
        """
        model = compilation.model
        kind = type(model).__name__
        companion: Companion | None = self._companions.get(model)
        with preserved_random_state(), foreign_errors_wrapped(PassError, f"the rewriting of {kind}"):
            named = named_graph(source, model, values, paths)
            made = named.module
            ends = ends_of(made, compilation)
            matches = matches_of(self.pipeline, made)

            def configured(sites: Sites) -> None:
                if self.config is not None:
                    configure_layers(made, self.config, sites)
                    hold_parameters(made, self.config)

            result = self.pipeline.on_own(made, configured)
            refuse_crossing(self.pipeline, result.report, ends, compilation)
            known = companion.parameters if companion is not None else set()
            initial = take_initial_values(made, model, known, initialise=self.initialise)
            if companion is None:
                companion = Companion(made, parameters=parameters_read(made))
                add_step(
                    made, COMPILED, self.pipeline, self.config, matches=matches, unmet=result.report.unmet
                )
                self._companions[model] = companion
                watch_first_step(made)
            else:
                extended(companion, named)
            write_values(model, initial)
        if initial:
            warn_of_training(result.report, stacklevel=2)
        self.reports.append(result.report)
        return named, companion

    def left_to_python(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
        """Return the names of weights that no graph reads, and of which nobody was told before."""
        read = {id(entry.find(path)) for entry in self._companions.values() for path in entry.parameters}
        found = []
        for name, parameter in named:
            is_weight = parameter.dim() > 1 and parameter.requires_grad
            if is_weight and id(parameter) not in read and parameter not in self._told:
                self._told[parameter] = True
                found.append(name)
        return found

    def companion_of(self, model: nn.Module) -> Companion | None:
        """Return the companion of a model, compiled or not, None if none of its graphs was rewritten."""
        found: Companion | None = self._companions.get(unwrapped(model))
        return found


def elsewhere(compilation: Compilation, model: nn.Module) -> Compilation:
    """Return the same part of another model of the same class."""
    return replace(compilation, model=model)


REWRITERS: weakref.WeakSet[Rewriter] = weakref.WeakSet()
"""Those of all backends there are."""


def companion(compiled: Callable[..., Any]) -> BioGraphModule:
    """Return the module that holds the state of a compiled model.

    It holds the model's own parameters, and beside them rates, signs, masks and everything else that
    :func:`biofx.attach`, :func:`biofx.save`, :func:`biofx.load` and :func:`biofx.check` ask of a transformed
    model; give it to them. Do not train it: the compiled model is what runs.

    Args:
        compiled: what ``torch.compile(model, backend=biofx.backend(config))`` returned, or the model itself.
            It must have been called, since compiling begins with the first call.

    Raises:
        InputError: it was not compiled with a backend of biofx, was not called yet, or was compiled with
            several.
    """
    return companion_among(list(REWRITERS), compiled)


def companion_among(rewriters: Iterable[Rewriter], compiled: Callable[..., Any]) -> BioGraphModule:
    """Return the companion of a model that one of some rewriters has.

    Raises:
        InputError: none of them has, or several have one.
    """
    if not isinstance(compiled, nn.Module):
        raise InputError(f"expected a compiled model, found {type(compiled).__name__}")
    rewriters = list(rewriters)
    found = [entry for rewriter in rewriters if (entry := rewriter.companion_of(compiled)) is not None]
    kind = type(unwrapped(compiled)).__name__
    if not found:
        raise InputError(
            f"expected a model that was compiled with biofx.backend and called since, found a {kind} that "
            "was not, or of which dynamo compiled nothing; call the compiled model once, which compiles it. "
            "torch.compile(…, fullgraph=True) names the line that keeps dynamo from it"
        )
    if len(found) > 1:
        raise InputError(
            f"expected a model that was compiled with one backend of biofx, found a {kind} that was compiled "
            f"with {len(found)}, each with a state of its own; ask the one that is meant: "
            "backend.companion(model)"
        )
    found[0].was_given_out = True
    rewriter = next(entry for entry in rewriters if entry.companion_of(compiled) is found[0])
    warn_of_python(rewriter, unwrapped(compiled), stacklevel=4)
    return found[0].module


def warn_of_python(rewriter: Rewriter, model: nn.Module, *, stacklevel: int) -> None:
    """Warn of weights that no compiled graph reads, on which nothing acts."""
    left = rewriter.left_to_python(model.named_parameters())
    if left:
        warnings.warn(
            f"no graph that was compiled reads {', '.join(map(repr, left[:3]))}{', …' * (len(left) > 3)}: "
            "Python uses them, if anything does, without rates and signs. torch.compile(…, fullgraph=True) "
            "names the line that keeps them out; what one mode alone uses joins when it is called in it",
            BiofxWarning,
            stacklevel=stacklevel,
        )
