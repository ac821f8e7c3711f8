"""How much of a model was rewritten, by all passes or by one, and why the rest was left alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from biofx.graph.joined_graph import whole_graph
from biofx.graph.modules_by_path import modules_by_path
from biofx.graph.regions import graph_breaks_of, innermost_around
from biofx.layers.weight_site import Sites


@dataclass(frozen=True)
class LeftAlone:
    """A parameter that nothing was done with."""

    path: str
    elements: int
    """A count."""
    reason: str
    is_visible: bool
    """Whether a graph reads it; if not, nothing could have been done."""


@dataclass(frozen=True)
class MechanismCoverage:
    """How far one mechanism reached (see :mod:`biofx.rewriting.mechanism_coverage` for what counts)."""

    mechanism: str
    """``"signed"``, ``"scaled"`` or ``"split"``."""
    weights: int
    """Weights on which it acts, a count; a layer with several has as many."""
    all_weights: int
    """Weights that it is for, a count."""
    elements: int
    """Elements of those on which it acts, a count; free rows are left out."""
    all_elements: int
    """Elements of those that it is for, a count."""
    reasons: Mapping[str, int]
    """Why it does not act on the rest, with the elements for each reason, the most first."""
    exempt: Mapping[str, int]
    """What it is not for, by reason, with the elements of each, the most first; not in the counts above."""

    @property
    def fraction(self) -> float:
        """Share of the weights that it is for on which it acts, in [0, 1]; 1 where it is for none."""
        return self.weights / self.all_weights if self.all_weights else 1.0

    def __str__(self) -> str:
        rest = "; ".join(f"{elements}: {reason}" for reason, elements in self.reasons.items())
        share = self.elements / self.all_elements if self.all_elements else 1.0
        return (
            f"{self.mechanism}: {self.weights} of {self.all_weights} weights, "
            f"{self.elements} of {self.all_elements} elements ({share:.1%})" + (f"; {rest}" if rest else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**vars(self), "reasons": dict(self.reasons), "exempt": dict(self.exempt)}


@dataclass(frozen=True)
class ModelCoverage:
    """Every parameter of a model: rewritten, or left alone with a reason."""

    total: int
    """Elements of all parameters, a count; a parameter with two names counts once."""
    rewritten: int
    """Elements of those whose layer some pass rewrote, a count."""
    left: tuple[LeftAlone, ...]
    kept: Mapping[str, str]
    """Paths of the modules that keep their eager forward in Python, and why."""
    mechanisms: tuple[MechanismCoverage, ...] = ()
    """How far the mechanisms reached whose passes ran."""

    @property
    def visible(self) -> int:
        """Elements of the parameters that are read in a graph, a count."""
        return self.total - sum(entry.elements for entry in self.left if not entry.is_visible)

    def __str__(self) -> str:
        whole = max(1, self.total)
        return (
            f"{self.total} parameters: {self.rewritten} rewritten ({self.rewritten / whole:.1%}), "
            f"{self.visible} visible ({self.visible / whole:.1%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "total": self.total,
            "rewritten": self.rewritten,
            "visible": self.visible,
            "left": [dict(vars(entry)) for entry in self.left],
            "kept": dict(self.kept),
            "mechanisms": [entry.to_dict() for entry in self.mechanisms],
        }


@dataclass(frozen=True)
class PassCoverage:
    """How much of a model one pass reached."""

    layers: int
    """Layers with at least one candidate that it rewrote, a count."""
    candidate_layers: int
    """Layers with at least one candidate, a count."""
    parameters: int
    """Elements of the parameters in the layers that it rewrote, a count."""
    all_parameters: int
    """Elements of all the model's parameters, a count."""
    reasons: Mapping[str, int]
    """Why candidates were left alone, and how many for each reason, the most frequent first."""

    @property
    def fraction(self) -> float:
        """Share of the model's parameters that lie in rewritten layers, in [0, 1]."""
        return self.parameters / self.all_parameters if self.all_parameters else 0.0


def coverage_of(
    graph_module: GraphModule, sites: Sites, missed: Mapping[str, str], applied: Iterable[str]
) -> ModelCoverage:
    """Return what of a model was rewritten.

    Args:
        graph_module: the model as it is now.
        sites: of its weights.
        missed: paths of layers, and why a pass left them alone.
        applied: paths of layers that a pass rewrote.
    """
    kept = graph_breaks_of(graph_module)
    parameters = dict(graph_module.named_parameters())
    layer_of = {id(site.parameter): site.layer for site in sites.found}
    computing = {site.layer: site.layer for site in sites.found if site.is_computed}
    wrapped = {id(site.parameter) for site in sites.reads if site.operators}
    read = set(_parameters_read(graph_module))
    done = set(applied)
    rewritten = 0
    left: list[LeftAlone] = []
    for path, parameter in parameters.items():
        owner = path.partition(".parametrizations.")[0]  # of a weight that is computed, not of a parameter
        layer = layer_of.get(id(parameter), computing.get(owner) if owner != path else None)
        if (layer is not None and layer in done) or id(parameter) in wrapped:
            rewritten += parameter.numel()
            continue
        visible = layer is not None or id(parameter) in read
        if layer is not None:
            reason = missed.get(layer, "no pass acts on it")
        elif visible:
            owner = type(graph_module.get_submodule(path.rpartition(".")[0])).__name__
            reason = f"no weight between units that passes act on, but {path.rpartition('.')[2]} of {owner}"
        else:
            reason = _why_hidden(path, kept)
        left.append(LeftAlone(path, parameter.numel(), reason, visible))
    return ModelCoverage(sum(p.numel() for p in parameters.values()), rewritten, tuple(left), kept)


def _parameters_read(graph_module: GraphModule) -> Iterator[int]:
    """Yield the ids of the parameters that a graph reads, directly or in a module of torch."""
    modules = modules_by_path(graph_module)
    for node in whole_graph(graph_module).nodes:
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            held = modules[path]._parameters.get(name) if path in modules else None
            if held is not None:
                yield id(held)
        elif node.op == "call_module" and _is_from_torch(modules[str(node.target)]):
            yield from map(id, modules[str(node.target)].parameters())


def _is_from_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")


def _why_hidden(path: str, kept: Mapping[str, str]) -> str:
    around = innermost_around(path, kept)
    return "never used in the forward" if around is None else f"used by Python: {kept[around]}"
