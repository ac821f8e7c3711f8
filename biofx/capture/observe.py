"""The runs of a model that are observed, so that it is known who feeds whom where Python decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import Graph

from biofx.capture.example_inputs import Call, ExampleInputs, as_call
from biofx.capture.example_sizes import axes_of
from biofx.capture.run_observer import observe_run
from biofx.capture.trace_module import trace
from biofx.capture.trials import cloned
from biofx.errors import CaptureError
from biofx.graph.guards import require_tensor
from biofx.model.copies import deep_copy
from biofx.model.modes import switch_mode, switches_of
from biofx.model.observed_runs import ObservedRuns

_LENGTHS = (3, 5)
"""How often loops run in the two traces of a model without an example, counts."""


def observe_without_example(model: nn.Module, opaque: frozenset[str]) -> ObservedRuns:
    """Return traces of a model in which loops over its inputs run a few times, if no value decides more.

    Args:
        model: the model; copies of it are traced.
        opaque: paths of modules that are one call each.
    """
    graphs = []
    for length in _LENGTHS:
        copied = deep_copy(model)
        try:
            traced = trace(copied, opaque, mode_switches=switches_of(copied), assumed_length=length)
        except CaptureError:
            return ObservedRuns(())
        if any(check.args[0].op == "call_module" for check in _type_checks(traced.graph)):
            return ObservedRuns(())  # by what a layer returns, which was guessed
        graphs.append(traced.graph)
    return ObservedRuns(tuple(graphs), is_traced=True)


def _type_checks(graph: Graph) -> list[Any]:
    return list(graph.find_nodes(op="call_function", target=require_tensor))


def observe(model: nn.Module, example_inputs: ExampleInputs, opaque: frozenset[str]) -> ObservedRuns:
    """Return the observed runs of a model: of the example in training, and at other sizes in evaluation.

    Args:
        model: the model; copies of it run.
        example_inputs: inputs of one call.
        opaque: paths of modules that are one call each.
    """
    given = as_call(model, example_inputs)
    graphs: list[Graph] = []
    reason = ""
    for calls, training in ((iter([given]), True), (_at_other_sizes(given), False)):
        for call in calls:
            try:
                graphs.append(_observed(model, call, opaque, training))
                break
            except Exception as error:
                reason = reason or f"{type(error).__name__}: {error}"
    return ObservedRuns(tuple(graphs), reason if len(graphs) < 2 else "")


def _observed(model: nn.Module, call: Call, opaque: frozenset[str], training: bool) -> Graph:
    args, kwargs = cloned(call)
    return observe_run(switch_mode(deep_copy(model), training), args, kwargs, opaque)


def _at_other_sizes(given: Call) -> Iterator[Any]:
    """Yield the example with another batch and another length, with one of the two, and as it is."""
    axes = axes_of(given)[:2]
    for chosen in (axes, axes[:1], axes[1:], ()):
        call = given
        for axis in chosen:
            call = axis.resized(call, axis.size // 2 if axis.size > 3 else axis.size + 1)
        if chosen == axes or len(chosen) < len(axes):
            yield call
