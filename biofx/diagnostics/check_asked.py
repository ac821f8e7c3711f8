"""Invariants of what was asked for when a model was made: it reached something then, and is still there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from biofx.diagnostics.check_report import Finding
from biofx.diagnostics.check_subject import Subject, Uses, owner_of
from biofx.graph.joined_graph import whole_graph
from biofx.operators.rate_sampling import Distribution
from biofx.rewriting.record import TransformStep, record_of

_ASKED, _KEPT = "asked", "kept"
_PLACED = {"constrain_sign": "sign constraint", "scale_gradient": "learning rates"} | {
    "scale_gradient_by_seed": "learning rates",
    "observe_activity": "observed activity",
    "pool_synapses": "pool of synapses",
    "fold_weight": "sum over synapses",
}
"""Operators that a mechanism consists of, and what of it is gone with them."""
_LINE = re.compile(r"(\w+) = (\w+)\((\w*)")
_READ = re.compile(r"(\w+) = self\.(\S+)")


def unmet(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find mechanisms that were asked for and reached nothing, or not what was named for them."""
    record = record_of(subject.graph_module)
    if record is None:
        return
    for step in record.steps:
        yield Finding("", _ASKED, "", 1)
        for entry in step.unmet:
            layer, count = str(entry["layer"]), int(entry["considered"])
            message = (
                f"asked for and not there: {entry['mechanism']} - {entry['message']}; change the "
                "model or the options, or leave it out of the config"
            )
            yield Finding(layer, _ASKED, str(entry["mechanism"]), count, count, message)
        if step.config is not None:
            yield from _rates(subject, step, step.config)


def _rates(subject: Subject, step: TransformStep, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Find rates that a converter was asked for and no layer has."""
    given = [config, *({**config, **entry["options"]} for entry in config["overrides"])]
    states = [placed.state for placed in subject.states()]
    wanted = any(
        fields["fuzzy_lr_distribution"] != Distribution.BASELINE.value
        and fields["fuzzy_learning_rate_factor_nu"]
        for fields in given
    )
    if step.door != "transform" and wanted and not any(state.has_factors for state in states):
        message = f"asked for and not there: rates - 0 of {len(states)} weights have any"
        yield Finding("", _ASKED, "rates", max(1, len(states)), max(1, len(states)), message)


def kept(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find nodes of a mechanism that the graph had when the model was made, and has no more."""
    record = record_of(subject.graph_module)
    if record is None:
        return
    present = {node.name for node in whole_graph(subject.graph_module).nodes}
    read = {match[1]: match[2] for line in record.graph if (match := _READ.match(line))}
    for line in record.graph:
        match = _LINE.match(line)
        if match is None or match[2] not in _PLACED:
            continue
        name, operator, weight = match.groups()
        path = read.get(weight, "")
        gone = name not in present
        message = ""
        if gone:
            message = (
                f"its {_PLACED[operator]} ({name!r}) is gone from the graph that biofx.transform made; "
                "transform the model anew, or change graphs with passes"
            )
        yield Finding(owner_of(path) if path else "", _KEPT, path or name, 1, int(gone), message)
