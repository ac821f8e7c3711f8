"""What an audit looks at, and what it found: how much of each layer was checked, and how much of it is wrong.

The form of :meth:`Audit.to_dict` is an object with these keys; a reader should check ``schema``:

``schema``
    ``"biofx.audit/1"``; the number goes up when a key changes its meaning or disappears.
``model``, ``ok``
    Class name of the model; whether every invariant holds.
``invariants``
    What each invariant says, by name.
``layers``
    For each layer, by path, and each invariant, by name: ``checked`` and ``violated`` (counts, 0 where the
    layer has nothing to check), ``messages`` (one per fault) and ``details`` (further counts, no faults).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import GraphModule, Node

from biofx.errors import InvariantError
from biofx.graph.joined_graph import whole_view
from biofx.graph.regions import region_paths
from biofx.layers import dense_kind_of
from biofx.layers.constant_part import ConstantPart, WeightUse, weight_uses
from biofx.plasticity.bio_module import BioModule

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


SCHEMA = "biofx.audit/1"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    layer: str
    """Path of the layer, empty for the model itself."""
    invariant: str
    """Name of the invariant."""
    subject: str
    """Path of the weight or buffer, or name of the node, that was checked."""
    checked: int
    """Entries (synapses, factors, uses, …) that were looked at, a count."""
    violated: int = 0
    """How many of them break the invariant, a count."""
    message: str = ""
    """What is wrong and what to do; empty where nothing is wrong."""
    details: Mapping[str, int] = field(default_factory=dict)
    """Further counts that are no faults."""

    def __str__(self) -> str:
        counts = f"{self.violated} of {self.checked}" if self.violated else f"{self.checked}"
        message = f": {self.message}" if self.message else ""
        return f"{self.subject or '(the model)'}: {self.invariant}, {counts}{message}"


@dataclass(frozen=True)
class Audit:
    """Every invariant of a model at one moment; print it, ``rich.print`` it, or take :meth:`to_dict`."""

    model: str
    """Class name of the model."""
    layers: tuple[str, ...]
    """Paths of its layers, in the model's order."""
    invariants: Mapping[str, str]
    """What each invariant says, by name."""
    findings: tuple[Finding, ...]
    """Everything that was checked."""

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What breaks an invariant."""
        return tuple(finding for finding in self.findings if finding.violated)

    @property
    def ok(self) -> bool:
        """Whether every invariant holds."""
        return not self.faults

    def raise_if_broken(self) -> Audit:
        """Return the audit, if every invariant holds.

        Raises:
            InvariantError: one does not; the message names layers and counts.
        """
        if not self.ok:
            raise InvariantError(str(self))
        return self

    def summary(self) -> str:
        """Return one line: what was checked, and how much of it is wrong."""
        if self.ok:
            return f"{self.model}: every invariant holds"
        broken = ", ".join(dict.fromkeys(fault.invariant for fault in self.faults))
        return f"{self.model}: {len(self.faults)} fault{'s' * (len(self.faults) > 1)} ({broken})"

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain values, in the schema that this module's docstring describes."""
        table = self._table()
        return {
            "schema": SCHEMA,
            "model": self.model,
            "ok": self.ok,
            "invariants": dict(self.invariants),
            "layers": {
                layer: {name: _merged(table.get((layer, name), [])) for name in self.invariants}
                for layer in self.layers
            },
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.summary()}; {len(self.findings)} checks>"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield self.summary()
        yield from (f"  {fault}" for fault in self.faults)
        for layer, counts in self._counts():
            yield f"  {layer}: {', '.join(words for words, _ in counts)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        shown.add_column("layer", overflow="fold", style="bold")
        shown.add_column("checked", overflow="fold")
        for layer, counts in self._counts():
            parts = [Text(words, style="bold red" if is_wrong else "") for words, is_wrong in counts]
            shown.add_row(Text(layer), Text(", ").join(parts))
        faults = [Text(str(fault), style="red") for fault in self.faults]
        yield Group(Text(self.summary(), style="bold" if self.ok else "bold red"), *faults, shown)

    def _counts(self) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
        """Yield each layer with words on what was checked there, and whether some of it is wrong."""
        table = self._table()
        for layer in self.layers:
            counts = []
            for name in self.invariants:
                if (layer, name) in table:
                    whole = _merged(table[layer, name])
                    wrong = f"{whole['violated']} of " if whole["violated"] else ""
                    counts.append((f"{name} {wrong}{whole['checked']}", bool(wrong)))
            if counts:
                yield layer or "(the model)", counts

    def _table(self) -> dict[tuple[str, str], list[Finding]]:
        """Return the findings that checked something, by layer and invariant."""
        table: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            if finding.checked:
                table.setdefault((finding.layer, finding.invariant), []).append(finding)
        return table


def _merged(findings: list[Finding]) -> dict[str, Any]:
    details: dict[str, int] = {}
    for finding in findings:
        for name, count in finding.details.items():
            details[name] = details.get(name, 0) + count
    return {
        "checked": sum(finding.checked for finding in findings),
        "violated": sum(finding.violated for finding in findings),
        "messages": [finding.message for finding in findings if finding.message],
        "details": details,
    }


@dataclass(frozen=True)
class Placed:
    """A plasticity state where it was found in the model."""

    place: str
    """Path of the state, e.g. ``layer1.conv.bio_mod``."""
    layer: str
    """Path of the layer that it sits in."""
    state: BioModule


@dataclass(frozen=True)
class Subject:
    """A model under audit."""

    graph_module: GraphModule
    """The model; its regions are shown as parts of one graph."""
    graphs: Mapping[str, GraphModule]
    """The modules that run a graph, the model itself and its regions, by path."""
    parameters: dict[int, tuple[str, nn.Parameter]]
    """The parameters by id, each with the first path it goes by."""
    placed: tuple[Placed, ...]
    """Every place where a plasticity state sits; the state of a tied weight may sit in several."""
    layers: tuple[str, ...]
    """Paths of the modules with parameters or a plasticity state, in the model's order."""

    @classmethod
    def of(cls, graph_module: GraphModule) -> Subject:
        """Look through the modules of a model."""
        parameters: dict[int, tuple[str, nn.Parameter]] = {}
        for path, parameter in graph_module.named_parameters(remove_duplicate=False):
            parameters.setdefault(id(parameter), (path, parameter))
        placed: list[Placed] = []
        layers: dict[str, None] = {}
        for path, module in graph_module.named_modules(remove_duplicate=False):
            if isinstance(module, BioModule):
                placed.append(Placed(path, layer_around(path), module))
            elif "bio_mod" in path.split("."):
                continue  # in the state of a layer's weight
            elif module._parameters or dense_kind_of(module) is not None or "bio_mod" in module._modules:
                layers.setdefault(path)
        regions = ((path, graph_module.get_submodule(path)) for path in region_paths(graph_module))
        graphs = {"": graph_module, **{path: m for path, m in regions if isinstance(m, GraphModule)}}
        return cls(whole_view(graph_module), graphs, parameters, tuple(placed), tuple(layers))

    def states(self) -> list[Placed]:
        """Return each state that belongs to a layer once, where it was found first."""
        first: dict[int, Placed] = {}
        for placed in self.placed:
            if placed.state.is_linked:
                first.setdefault(id(placed.state), placed)
        return list(first.values())

    def path_of(self, parameter: nn.Parameter, otherwise: str) -> str:
        """Return the first path a parameter goes by."""
        return self.parameters.get(id(parameter), (otherwise, parameter))[0]


@dataclass(frozen=True)
class Uses:
    """The weights of a model on their way through its graph."""

    constants: ConstantPart
    of_parameter: dict[int, list[WeightUse]]
    """The uses of each parameter, by the parameter's id."""
    of_constraint: dict[Node, list[WeightUse]]
    """The uses that pass through each sign constraint."""

    @classmethod
    def of(cls, graph_module: GraphModule) -> Uses:
        """Walk through a graph."""
        constants = ConstantPart(graph_module)
        found = cls(constants, {}, {})
        for use in weight_uses(constants):
            found.of_parameter.setdefault(id(use.parameter), []).append(use)
            for node in use.constraints:
                found.of_constraint.setdefault(node, []).append(use)
        return found


def finding(
    layer: str, subject: str, checked: int, violated: int = 0, message: str = "", **details: int
) -> Finding:
    """Return a finding of an invariant, which adds its name; the message is for what is violated alone."""
    return Finding(layer, "", subject, checked, violated, message if violated else "", details)


@dataclass(frozen=True)
class Invariant:
    """Something that every transformed model promises."""

    name: str
    description: str
    find: Callable[[Subject, Uses], Iterator[Finding]]

    def __call__(self, subject: Subject, uses: Uses) -> Iterator[Finding]:
        """Yield what was checked, with and without fault."""
        return (replace(found, invariant=self.name) for found in self.find(subject, uses))


def invariant(
    name: str, description: str
) -> Callable[[Callable[[Subject, Uses], Iterator[Finding]]], Invariant]:
    """Make an invariant of a function that yields findings."""
    return lambda find: Invariant(name, description, find)


def layer_around(place: str) -> str:
    """Return the path of the layer in which a state sits.

    >>> layer_around("layer1.conv.bio_mod"), layer_around("bio_mod.projection")
    ('layer1.conv', '')
    """
    parts = place.split(".")
    return ".".join(parts[: parts.index("bio_mod")]) if "bio_mod" in parts else place.rpartition(".")[0]


def owner_of(path: str) -> str:
    """Return the path of the module that holds a parameter or buffer; of a state's buffer, the layer."""
    owner = path.rpartition(".")[0]
    return layer_around(owner) if "bio_mod" in owner.split(".") else owner
