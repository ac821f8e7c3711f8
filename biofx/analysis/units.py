"""The analysis of units: for each weight, whose activity it reads at each input channel.

Units begin where a layer makes them, at the model's inputs, and behind operations that end what is known.
They are numbered in that order. Units that are added up or multiplied are one: they are joined in pairs, and
:mod:`biofx.analysis.unit_groups` finds one that represents all that hang together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from biofx.analysis.forward import TABLE, Call, CannotFollow, Entry, ForwardAnalysis, rule_for
from biofx.analysis.joined_numbers import smallest_connected
from biofx.analysis.layout import Axis, UnitLayout
from biofx.analysis.synapses import synaptic_nodes
from biofx.graph.analysis_cache import forget_analyses
from biofx.graph.node_kinds import changed_in_place, number_nodes
from biofx.graph.regions import RegionUse, region_input, region_output
from biofx.layers.layer_kind import LayerKind
from biofx.layers.norms import gain_behind
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite, named_parameters


@dataclass(frozen=True)
class Source:
    """Units that begin somewhere, numbered one after another from ``first``."""

    kind: str
    """``"layer"``: outputs of a layer; ``"input"``: what depends on no weight; ``"open"``: outputs of an
    operation that ends groups; ``"constant"``: entries that are no unit's."""
    name: str
    """Of a layer the path of its weight, else the node's name."""
    first: int
    count: int

    @property
    def units(self) -> Tensor:
        """The numbers of the units, int64, ``(count,)``."""
        return torch.arange(self.first, self.first + self.count)


@dataclass(frozen=True)
class Reading:
    """The units that one weight reads."""

    site: WeightSite
    units: Tensor
    """The unit at each input channel, int64, ``(input channels,)``."""
    nonnegative: bool
    """Whether the activity that it reads can never be negative."""
    layout: UnitLayout | None = None
    """Where the units are in the value that it reads, None for units inside a layer."""


@dataclass(frozen=True)
class UnitValue:
    """What is known of the units of one value."""

    layout: UnitLayout | None = None
    """Where its units are; None where it has none, or where that is open."""
    origin: Node | None = None
    """The node whose output holds its units, where it is open along which axis they are: the model's input,
    or the result of an operation without a rule."""
    rank: int | None = None
    """Number of its axes with a batch axis, where known."""
    nonnegative: bool = False
    """Whether none of its entries can be negative."""
    parts: tuple[UnitValue, ...] | None = None
    """Of a tuple or list, its entries."""
    tail: tuple[UnitValue, ...] | None = None
    """Of a tuple of unknown length, its last entries."""
    number: int | None = None
    """Of a whole number that the graph computes from sizes, its value."""
    size_of: int | None = None
    """Of the size of an axis 1, of a product of sizes how many axes it is the size of; None for all else."""
    is_statistic: bool = False
    """Whether it is a number over all units, such as their mean square, and so the activity of none."""

    @property
    def has_units(self) -> bool:
        """Whether it carries the activity of units."""
        return self.layout is not None or self.origin is not None

    def replace(self, **changes: Any) -> UnitValue:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


NOTHING = UnitValue()
"""What parameters, sizes and flags carry."""


class UnitCall(Call):
    """One operation in a graph, as a rule of the unit analysis sees it."""

    def __init__(self, node: Node, module: nn.Module | None, analysis: UnitAnalysis) -> None:
        super().__init__(node, module)
        self.analysis = analysis

    def value(self, argument: Any) -> UnitValue:
        """Return what is known of an argument."""
        if isinstance(argument, Node):
            return self.analysis.values[argument]
        if isinstance(argument, (list, tuple)):
            return UnitValue(parts=tuple(self.value(entry) for entry in argument))
        if isinstance(argument, int) and not isinstance(argument, bool):
            return UnitValue(number=argument, nonnegative=argument >= 0)
        return UnitValue(nonnegative=isinstance(argument, float) and argument >= 0)

    @property
    def x(self) -> UnitValue:
        """What is known of the first argument."""
        return self.value(self.first)

    @property
    def layout(self) -> UnitLayout | None:
        """Where the units of the first argument are, None where that is open."""
        return self.x.layout

    @property
    def sites(self) -> list[WeightSite]:
        """The weights of a layer."""
        return self.analysis.sites[self.node]

    @property
    def operands(self) -> tuple[UnitValue, UnitValue]:
        """What is known of the two arguments of an operator."""
        return self.value(self.argument(0, "input")), self.value(self.argument(1, "other"))

    def numbers(self, arguments: Sequence[Any]) -> list[int | None]:
        """Return the whole numbers that arguments hold, None for each that is not known."""
        return [self.value(argument).number for argument in arguments]

    def position(self, axis: Any, value: UnitValue | None = None, *, added: int = 0) -> int:
        """Return an axis of the first argument (or of ``value``) counted from the end.

        Args:
            axis: as given to the operation.
            value: whose axis it is.
            added: how many axes more the result has, where ``axis`` is one of the result.

        Raises:
            CannotFollow: it is counted from the front of a value whose rank is not known.
        """
        number = self.value(axis).number
        rank = (self.x if value is None else value).rank
        if number is None:
            raise CannotFollow("an axis is computed in the graph")
        if number < 0:
            return number
        if rank is None:
            raise CannotFollow(
                f"axis {number} is counted from the front, and the number of axes is not known"
            )
        return number - rank - added

    def positions(self, axes: Any) -> list[int]:
        """Return one axis or several of the first argument counted from the end."""
        return [self.position(axis) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]

    def ends(self, reason: str) -> UnitValue:
        """Say that the units of the arguments end here; those of the result are new."""
        return self.analysis.end(self.node, reason)

    def keeps(self, value: UnitValue | None = None, **changes: Any) -> UnitValue:
        """Return that the result has the units of the first argument (or of ``value``) where they were."""
        kept = self.x if value is None else value
        return kept.replace(**{"number": None, "parts": None, "tail": None, "size_of": None, **changes})

    def moves_unknown(self, **changes: Any) -> UnitValue:
        """Return that the result has units if the first argument has, and that it is as open where."""
        x = self.x
        moved = UnitValue(origin=self.node, nonnegative=x.nonnegative) if x.origin is not None else NOTHING
        return moved.replace(**changes)

    def unified(self, values: Sequence[UnitValue]) -> UnitValue:
        """Return the value of a result whose units are those of several values, one by one.

        Values without units are left out, and so are those of one entry where the others have many.
        """
        values = [value for value in values if value.has_units]
        if not values:
            return NOTHING
        ranks = {value.rank for value in values}
        rank = ranks.pop() if len(ranks) == 1 else None
        known = [value.layout for value in values if value.layout is not None]
        if not known:
            statistic = all(value.is_statistic for value in values)
            if all(value.origin is values[0].origin for value in values):
                return UnitValue(origin=values[0].origin, rank=rank, is_statistic=statistic)
            self.analysis.note_same(self.node, values)
            return UnitValue(origin=self.node, rank=rank, is_statistic=statistic)
        pattern = max(known, key=lambda layout: layout.labels.numel())
        shape = tuple(pattern.labels.shape)
        for value in values:
            layout = self.analysis.decide(value, pattern.axes, shape)
            if layout.axes == pattern.axes and layout.labels.shape == pattern.labels.shape:
                self.analysis.join(pattern.labels, layout.labels)
            elif layout.labels.numel() != 1:
                return self.ends("it joins units that lie along different axes, or differ in number")
        if rank is None:
            rank = max((value.rank for value in values if value.rank is not None), default=None)
        return UnitValue(layout=pattern, rank=rank)

    def are_one(self, left: UnitValue, right: UnitValue) -> bool:
        """Whether two values hold the same units, one by one, as far as is known by now."""
        if left.layout is None or right.layout is None or left.layout.axes != right.layout.axes:
            return False
        return self.analysis.are_one(left.layout.labels, right.layout.labels)

    def unify_rows(self, table: Tensor) -> None:
        """Make all units of each row of a ``(rows, units)`` table one."""
        self.analysis.join(table[:, :1].expand_as(table), table)

    def compares(self, *operands: Any) -> None:
        """Say that arguments are only compared with each other (queries and keys), not passed on."""
        nodes = {operand for operand in operands if isinstance(operand, Node)}
        self.analysis.comparisons.setdefault(self.node, set()).update(nodes)
        layouts = [self.analysis.values[operand].layout for operand in nodes]
        self.analysis.compared += [layout.labels.flatten() for layout in layouts if layout is not None]

    def known_layout(self, value: UnitValue, axes: tuple[Axis, ...]) -> UnitLayout | None:
        """Return the layout along ``axes`` of a value that left it open and has been read so before."""
        return self.analysis.known_layout(value, axes)

    def constants(self, count: int) -> Tensor:
        """Return units for entries that are constant, ``(count,)``."""
        return self.analysis.new_units("constant", "constant", count)

    def normalises(self, value: UnitValue | None = None) -> None:
        """Say that the operation has a gain, which may be negative, on the first argument or on ``value``."""
        self.analysis.norms[self.node] = self.x if value is None else value

    def is_gain(self, argument: Any) -> bool:
        """Whether an argument is a parameter with one number for each unit, or with one for all."""
        return self.analysis.is_observed and gain_behind(argument, self.analysis.parameters) is not None


UnitRule: TypeAlias = Callable[[UnitCall], UnitValue]
"""Says where the units of an operation's result are, given where those of its arguments are."""

OBSERVED_ONLY: set[UnitRule] = set()
"""The rules that hold in graphs of observed runs alone (see :attr:`UnitAnalysis.is_observed`)."""


def observed_only(rule: UnitRule) -> UnitRule:
    """Let a rule hold in graphs of observed runs alone."""
    OBSERVED_ONLY.add(rule)
    return rule


def add_unit_rule(target: Callable[..., Any] | str | type[nn.Module], rule: UnitRule) -> None:
    """Teach the unit analysis an operation; an earlier rule for it is replaced.

    Args:
        target: a function, the name of a tensor method, or a module class whose calls are nodes of the graph.
        rule: takes a :class:`UnitCall` and returns a :class:`UnitValue`. Most rules are one line:
            ``lambda call: call.keeps()`` for an operation that leaves every unit where it is.

    >>> import torch, biofx
    >>> biofx.add_unit_rule(torch.erf, lambda call: call.keeps(nonnegative=False))
    """
    TABLE[target] = dataclasses.replace(TABLE.get(target, Entry()), units=rule)
    forget_analyses()


class UnitAnalysis(ForwardAnalysis[UnitValue]):
    """What has been found out about the units of a graph; rules add to it through :class:`UnitCall`."""

    is_observed: ClassVar[bool] = False
    """Whether the graph is that of an observed run.

    Only there are norms and gains that are written out looked through, and heads of values shared: files of
    earlier versions hold the text of graphs without, and must load.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.sources: list[Source] = []
        self.readings: list[Reading] = []
        self.norms: dict[Node, UnitValue] = {}
        """Normalisations, and what they are given."""
        self.produced: dict[str, UnitLayout] = {}
        """The units of each layer, by the path of its weight."""
        self.comparisons: dict[Node, set[Node]] = {}
        """Operations that compare values, and the values they compare."""
        self.compared: list[Tensor] = []
        """The units that comparisons read."""
        self.fed_by_region: dict[Node, str] = {}
        """What depends on no weight but on what Python passes to a region, and the path of the region."""
        self.count = 0
        """How many units there are."""
        self.pairs: list[Tensor] = []
        """Units that are one, ``(2, pairs)`` each."""
        self.same_columns: list[Tensor] = []
        """The pairs among them that say nothing but that one weight reads both, at several of its uses."""
        self._smallest: tuple[tuple[int, int], Tensor] | None = None
        self._decided: dict[tuple[Node, tuple[Axis, ...], tuple[int, ...]], UnitLayout] = {}
        self._same: dict[Node, list[Node]] = {}
        self._columns: dict[str, Tensor] = {}
        self._input_axes: dict[str, int] = {}
        self._fed: set[Node] = set()
        self.sites: dict[Node, list[WeightSite]] = {}
        """The weights of each layer; the first of sub-weights stands for all that are added up."""
        self._further: dict[Any, list[WeightSite]] = {}
        for site in find_sites(graph_module).found:
            if site.is_further:
                self._further.setdefault(_place(site), []).append(site)
            elif not site.kind.why_no_units:
                self.sites.setdefault(site.node, []).append(site)
        self.parameters = named_parameters(graph_module)
        """The parameters by every path, each with the first path that it goes by."""
        self._synaptic = synaptic_nodes(graph_module)
        self._use = RegionUse(graph_module, graph_module.graph)
        self.numbers = number_nodes(graph_module, graph_module.graph)
        """The present values of the nodes that read numbers of modules, or compute with them alone."""
        self.walk()

    def value_of(self, node: Node) -> UnitValue:
        """Return what is known of a node's value, and note what its weights read."""
        self._note_what_feeds(node)
        if node.op == "placeholder":
            return UnitValue(origin=node)
        if node in self.numbers:  # taken to keep its sign
            return UnitValue(nonnegative=self.numbers[node] >= 0)
        if node.op in ("get_attr", "output") or node.target is region_output:
            return NOTHING
        if node.target is region_input:
            raise CannotFollow(f"what feeds it is not known: Python calls {node.args[0]!r}")
        if node not in self.sites and self._use.is_run_by_python(node):
            raise CannotFollow(f"Python runs {node.target!r}")
        value = self.called(UnitCall(node, self.module_of(node), self))
        for changed in changed_in_place(node):
            self.values[changed] = value
            if node in self._fed:
                self._fed.add(changed)
        return value

    def end(self, node: Node, reason: str) -> UnitValue:
        """Note that groups end at a node; its output holds new units."""
        self.ended[node] = reason
        return UnitValue(origin=node)

    def called(self, call: UnitCall) -> UnitValue:
        """Return what the rule for an operation says of its result."""
        node = call.node
        if node in self.sites:
            rule = TABLE.get(self.sites[node][0].kind, TABLE[LayerKind]).units
        else:
            rule = rule_for("units", node, call.module)
        if rule is not None and (self.is_observed or rule not in OBSERVED_ONLY):
            try:
                return rule(call)  # type: ignore[no-any-return]
            except CannotFollow as end:
                return self.end(node, str(end))
        sources = [self.values[source] for source in node.all_input_nodes]
        if any(value.has_units or value.parts for value in sources):
            named = call.name if call.module is None else f"a {call.name}"
            return self.end(node, f"no rule says what {named} does with units")
        return UnitValue(origin=node) if call.module is not None and sources else NOTHING

    def _note_what_feeds(self, node: Node) -> None:
        """Note whether weights feed a node, or Python does, behind which there may be weights."""
        sources = [source for source in node.all_input_nodes if source in self._fed]
        is_synaptic = node in self._synaptic
        if node.target is region_input:
            self.fed_by_region[node] = str(node.args[0])
        elif sources and not is_synaptic and all(source in self.fed_by_region for source in sources):
            self.fed_by_region[node] = self.fed_by_region[sources[0]]
        if is_synaptic or sources or node in self.fed_by_region:
            self._fed.add(node)

    # layers with weights, through their rules

    def made(self, path: str, count: int, position: int = -1) -> UnitLayout:
        """Return the units that a weight makes, the same however often it is used."""
        if path not in self.produced:
            self.produced[path] = UnitLayout.along(self.new_units("layer", path, count), position)
        return self.produced[path]

    def is_turned(self, site: WeightSite) -> bool:
        """Whether a weight was read the other way round before, so that its rows were columns."""
        return self._input_axes.setdefault(site.parameter_path, site.kind.input_axis) != site.kind.input_axis

    def read(self, site: WeightSite, source: Any) -> None:
        """Note that a weight reads the units of a value along the axis of its channels."""
        value = self.values[source] if isinstance(source, Node) else NOTHING
        if not value.has_units and isinstance(source, Node):
            value = UnitValue(origin=source, nonnegative=value.nonnegative)
        position, size = site.kind.channel_axis, site.input_channels
        axes, shape = (Axis(position, (0,)),), (size,)
        try:
            columns = self.decide(value, axes, shape).columns(position, size)
        except CannotFollow as error:
            self.ended[site.node] = f"what it reads is not known: {error}"
            columns = self.decide(UnitValue(origin=site.node), axes, shape).labels[:, None]
        self.join(columns[:, :1].expand_as(columns), columns)
        self.read_units(site, columns[:, 0], nonnegative=value.nonnegative, layout=value.layout)

    def read_units(
        self, site: WeightSite, units: Tensor, *, nonnegative: bool, layout: UnitLayout | None = None
    ) -> None:
        """Note that a weight reads certain units, one at each input channel; all its sub-weights do."""
        for own in (site, *self._further.get(_place(site), ())):
            if not self.is_turned(own):
                before = len(self.pairs)
                self.join(self._columns.setdefault(own.parameter_path, units), units)
                self.same_columns += self.pairs[before:]
            self.readings.append(Reading(own, units, nonnegative, layout))

    # units and layouts

    def new_units(self, kind: str, name: str, count: int) -> Tensor:
        """Return the numbers of units that begin here, int64, ``(count,)``."""
        self.sources.append(Source(kind, name, self.count, count))
        self.count += count
        return self.sources[-1].units

    def join(self, left: Tensor, right: Tensor) -> None:
        """Make units one, entry by entry."""
        if not _is_same_tensor(left, right):
            self.pairs.append(torch.stack((left.flatten(), right.flatten())))

    def are_one(self, left: Tensor, right: Tensor) -> bool:
        """Whether units are one, entry by entry, as far as is known by now."""
        if left.shape != right.shape or torch.equal(left, right):
            return left.shape == right.shape
        if self._smallest is None or self._smallest[0] != (self.count, len(self.pairs)):
            pairs = torch.cat([torch.empty(2, 0, dtype=torch.int64), *self.pairs], 1)
            self._smallest = (self.count, len(self.pairs)), smallest_connected(self.count, pairs)
        return torch.equal(self._smallest[1][left], self._smallest[1][right])

    def note_same(self, node: Node, values: Sequence[UnitValue]) -> None:
        """Remember that a node's units are those of values that are all open."""
        self._same[node] = [value.origin for value in values if value.origin is not None]

    def decide(self, value: UnitValue, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> UnitLayout:
        """Return a value's layout, which from now on is along ``axes`` where it was open.

        Raises:
            CannotFollow: the value carries no units.
        """
        if value.layout is not None:
            return value.layout
        if value.origin is None:
            raise CannotFollow("it carries no units")
        made: list[Node] = []
        pending = [value.origin]
        while pending:
            node = pending.pop()
            if (node, axes, shape) not in self._decided:
                units = self.new_units("open" if node in self._fed else "input", node.name, math.prod(shape))
                self._decided[node, axes, shape] = UnitLayout(units.reshape(shape), axes)
                made.append(node)
                pending += reversed(self._same.get(node, ()))
        for node in made:
            for other in self._same.get(node, ()):
                left, right = self._decided[node, axes, shape], self._decided[other, axes, shape]
                self.join(left.labels, right.labels)
        return self._decided[value.origin, axes, shape]

    def known_layout(self, value: UnitValue, axes: tuple[Axis, ...]) -> UnitLayout | None:
        """Return the layout along ``axes`` that another reader has decided, None if none or several have."""
        found = [
            layout
            for (origin, along, _), layout in self._decided.items()
            if origin is value.origin and along == axes
        ]
        return found[0] if len(found) == 1 else None


def _place(site: WeightSite) -> tuple[Any, ...]:
    """Return what the sub-weights have in common that a layer reads as one weight."""
    return site.node, site.slot.argument, site.slot.index


def _is_same_tensor(left: Tensor, right: Tensor) -> bool:
    # an expanded tensor begins where the tensor begins that it is expanded from, so strides count
    same_place = left.data_ptr() == right.data_ptr() and left.dtype == right.dtype
    return same_place and left.shape == right.shape and left.stride() == right.stride()
