"""Where to draw the nodes of a directed acyclic graph: in rows, every edge pointing down.

Source: Sugiyama, Tagawa, Toda, "Methods for visual understanding of hierarchical system structures" (IEEE
Transactions on Systems, Man, and Cybernetics 11, 1981): rows by longest path, order within rows by
barycentres. Places within rows minimise the squared distance to a node's neighbours under the order, which
is isotonic regression.

Deviations: what does not depend on an input (a weight and what is done to it) stands right above its use,
and gives way to what does; all gives way to the longest path of the data, which stays straight.
All edges of a node that pass a row share one place there. An edge over more than :data:`LONGEST` rows takes
no place in them, so that time and space grow linearly with the number of nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

LONGEST = 48
"""Rows over which an edge is led around other nodes, a count."""

_ORDER_SWEEPS = 8
_PLACE_SWEEPS = 8
_TRUNK, _BRANCH, _SIDE = 1.0, 0.01, 1e-4  # weight of a place on the longest path, on another, on none
_WAY = 0.01  # the same, of an edge that passes a row, next to the node it comes from
_PASSING = 0.25  # width of an edge that passes a row, in columns


@dataclass(frozen=True)
class Layout:
    """Places of nodes; a column is as wide as a node and the gap beside it."""

    places: Mapping[str, tuple[float, int]]
    """For each node its column, a multiple of the column width from the left, and its row from the top."""
    routes: Mapping[tuple[str, str], tuple[tuple[float, int], ...]]
    """For each edge the places that it passes in the rows between, in the same units."""
    rows: int
    """How many rows there are, a count."""
    columns: float
    """Width of the widest row, in columns."""


def layered_layout(
    order: Sequence[str], edges: Iterable[tuple[str, str]], inputs: Iterable[str] = ()
) -> Layout:
    """Place the nodes of a graph.

    Args:
        order: the nodes' names; an edge that leads backwards in it is drawn upwards, and decides nothing.
        edges: pairs of names, source and target.
        inputs: nodes that stand at the top even where they have no source.
    """
    number = {name: place for place, name in enumerate(order)}
    pairs = [pair for pair in dict.fromkeys(edges) if pair[0] in number and pair[1] in number]
    forward = [(number[u], number[v]) for u, v in pairs if number[u] < number[v]]
    ranks, weights = _ranks(len(order), forward, {number[name] for name in inputs if name in number})
    slots = _Slots(ranks, weights, forward)
    slots.sort_by_barycentres()
    columns = slots.columns()
    places = {name: (columns[place], ranks[place]) for name, place in number.items()}
    routes: dict[tuple[str, str], tuple[tuple[float, int], ...]] = dict.fromkeys(pairs, ())
    for u, v in forward:
        passed = slots.passed(u, v)
        routes[order[u], order[v]] = tuple((columns[slot], slots.row[slot]) for slot in passed)
    return Layout(places, routes, max(ranks, default=-1) + 1, max(columns, default=0.0) + 1)


def _ranks(count: int, edges: list[tuple[int, int]], inputs: set[int]) -> tuple[list[int], list[float]]:
    """Return each node's row and the weight of its place.

    The row is the longest path to the node, and for what no input reaches, right above its use.
    """
    before: list[list[int]] = [[] for _ in range(count)]
    after: list[list[int]] = [[] for _ in range(count)]
    for u, v in edges:
        before[v].append(u)
        after[u].append(v)
    ranks = [0] * count
    reached = [node in inputs for node in range(count)]
    for each in range(count):
        for source in before[each]:
            ranks[each] = max(ranks[each], ranks[source] + 1)
            reached[each] = reached[each] or reached[source]
    for each in reversed(range(count)):
        if not reached[each] and after[each]:
            ranks[each] = min(ranks[user] for user in after[each]) - 1
    weights = [_BRANCH if is_reached else _SIDE for is_reached in reached]
    node: int | None = max((n for n in range(count) if reached[n]), key=ranks.__getitem__, default=None)
    while node is not None:
        weights[node] = _TRUNK
        node = max((n for n in before[node] if reached[n]), key=ranks.__getitem__, default=None)
    return ranks, weights


class _Slots:
    """What takes a place in a row: the nodes, numbered as given, and the edges that pass, numbered behind."""

    def __init__(self, ranks: list[int], weights: list[float], edges: list[tuple[int, int]]) -> None:
        self.row = list(ranks)
        self._weight = list(weights)
        self.nodes = len(ranks)
        self._passing: dict[tuple[int, int], int] = {}
        self.above: list[list[int]] = [[] for _ in ranks]
        self.below: list[list[int]] = [[] for _ in ranks]
        for u, v in edges:
            if ranks[v] - ranks[u] > LONGEST:
                continue
            last = u
            for row in range(ranks[u] + 1, ranks[v]):
                if (u, row) not in self._passing:
                    self._passing[u, row] = len(self.row)
                    self.row.append(row)
                    self._weight.append(self._weight[u] * _WAY)
                    self.above.append([])
                    self.below.append([])
                    self._join(last, self._passing[u, row])
                last = self._passing[u, row]
            self._join(last, v)
        origin = {slot: u for (u, _), slot in self._passing.items()}
        self.rows: list[list[int]] = [[] for _ in range(max(self.row, default=-1) + 1)]
        for slot in sorted(range(len(self.row)), key=lambda slot: (origin.get(slot, slot), slot)):
            self.rows[self.row[slot]].append(slot)

    def _join(self, upper: int, lower: int) -> None:
        self.above[lower].append(upper)
        self.below[upper].append(lower)

    def passed(self, u: int, v: int) -> list[int]:
        """Return the slots an edge passes, from the top."""
        if self.row[v] - self.row[u] > LONGEST:
            return []
        return [self._passing[u, row] for row in range(self.row[u] + 1, self.row[v])]

    def sort_by_barycentres(self) -> None:
        """Order each row by the mean place of the neighbours above, then below, in turn."""
        place = [0.0] * len(self.row)
        for row in self.rows:
            self._take_places(row, place)
        for sweep in range(_ORDER_SWEEPS):
            down = sweep % 2 == 0
            near = self.above if down else self.below
            for row in self.rows if down else reversed(self.rows):
                wanted = {
                    slot: sum(place[other] for other in near[slot]) / len(near[slot])
                    if near[slot]
                    else place[slot]
                    for slot in row
                }
                row.sort(key=wanted.__getitem__)
                self._take_places(row, place)

    @staticmethod
    def _take_places(row: list[int], place: list[float]) -> None:
        for number, slot in enumerate(row):
            place[slot] = number - (len(row) - 1) / 2

    def columns(self) -> list[float]:
        """Return where each slot stands in its row, the leftmost at 0."""
        width = [1.0 if slot < self.nodes else _PASSING for slot in range(len(self.row))]
        offsets = [0.0] * len(self.row)
        for row in self.rows:
            for left, right in pairwise(row):
                offsets[right] = offsets[left] + (width[left] + width[right]) / 2
        middle = {number: offsets[row[-1]] / 2 for number, row in enumerate(self.rows) if row}
        column = [offsets[slot] - middle[self.row[slot]] for slot in range(len(self.row))]
        for sweep in range(_PLACE_SWEEPS):
            down = sweep % 2 == 0
            near = self.above if down else self.below
            for row in self.rows if down else reversed(self.rows):
                self._settle(row, near, column, offsets)
        leftmost = min(column, default=0.0)
        return [round(value - leftmost, 3) for value in column]

    def _settle(
        self, row: list[int], near: list[list[int]], column: list[float], offsets: list[float]
    ) -> None:
        """Bring a row as close to its neighbours as its order and widths allow: pool adjacent violators."""
        blocks: list[tuple[float, float, int]] = []  # mean, weight, members
        for slot in row:
            others = near[slot]
            members, weight = 1, self._weight[slot]
            pulls = [self._weight[other] for other in others]
            wanted = column[slot]
            if others:
                wanted = sum(p * column[other] for p, other in zip(pulls, others, strict=True)) / sum(pulls)
            mean = wanted - offsets[slot]
            while blocks and blocks[-1][0] >= mean:
                earlier, its_weight, its_members = blocks.pop()
                mean = (mean * weight + earlier * its_weight) / (weight + its_weight)
                weight, members = weight + its_weight, members + its_members
            blocks.append((mean, weight, members))
        slots = iter(row)
        for mean, _, members in blocks:
            for _ in range(members):
                slot = next(slots)
                column[slot] = mean + offsets[slot]
