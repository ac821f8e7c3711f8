from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biofx.rewriting.views.layered_layout import LONGEST, Layout, layered_layout


def crossings(layout: Layout, edges: list[tuple[str, str]]) -> int:
    """Count pairs of straight pieces between neighbouring rows that cross."""
    pieces = set()
    for u, v in edges:
        points = [layout.places[u], *layout.routes[u, v], layout.places[v]]
        pieces |= set(itertools.pairwise(points))
    return sum(
        a[0][1] == b[0][1] and (a[0][0] - b[0][0]) * (a[1][0] - b[1][0]) < 0
        for a, b in itertools.combinations(sorted(pieces), 2)
    )


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    count = draw(st.integers(1, 30))
    names = [f"n{i}" for i in range(count)]
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names))
    return names, draw(st.lists(pairs.filter(lambda pair: pair[0] != pair[1]), max_size=60))


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_nodes_never_overlap_and_edges_point_down(graph: tuple[list[str], list[tuple[str, str]]]) -> None:
    names, edges = graph
    layout = layered_layout(names, edges, names[:1])
    rows: dict[int, list[float]] = {}
    for x, row in layout.places.values():
        assert 0 <= row < layout.rows
        assert 0 <= x <= layout.columns - 1 + 1e-9
        rows.setdefault(row, []).append(x)
    for xs in rows.values():
        assert all(right - left >= 1 - 2e-3 for left, right in itertools.pairwise(sorted(xs)))
    for u, v in edges:
        if names.index(u) < names.index(v):
            passed = [layout.places[u], *layout.routes[u, v], layout.places[v]]
            assert [row for _, row in passed] == list(range(passed[0][1], passed[-1][1] + 1))


def test_rows_are_longest_paths_and_weights_stand_above_their_use() -> None:
    names = ["x", "a", "b", "w", "s", "c"]
    edges = [("x", "a"), ("a", "b"), ("b", "c"), ("w", "s"), ("s", "c")]
    rows = {name: row for name, (_, row) in layered_layout(names, edges, ["x"]).places.items()}
    assert rows == {"x": 0, "a": 1, "b": 2, "w": 1, "s": 2, "c": 3}


def test_a_chain_with_weights_beside_it_is_straight() -> None:
    names, edges = ["x"], []
    for i in range(100):
        names += [f"w{i}", f"s{i}", f"y{i}"]
        edges += [(f"w{i}", f"y{i}"), (f"s{i}", f"y{i}"), (names[-4] if i else "x", f"y{i}")]
    xs = [layered_layout(names, edges, ["x"]).places[f"y{i}"][0] for i in range(100)]
    assert max(xs) - min(xs) < 0.2


def test_the_longest_path_is_straight_where_branches_leave_it() -> None:
    names, edges = ["x"], []
    for i in range(20):
        names += [f"a{i}", f"b{i}", f"d{i}", f"y{i}"]
        start = f"y{i - 1}" if i else "x"
        edges += [
            (start, f"a{i}"),
            (f"a{i}", f"b{i}"),
            (start, f"d{i}"),
            (f"b{i}", f"y{i}"),
            (f"d{i}", f"y{i}"),
        ]
    places = layered_layout(names, edges, ["x"]).places
    xs = [places[f"{letter}{i}"][0] for letter in "aby" for i in range(20)]
    assert max(xs) - min(xs) < 0.5


def test_barycentres_undo_crossings() -> None:
    names = [f"{letter}{i}" for letter in "abc" for i in range(6)]
    shuffled = random.Random(3).sample(range(6), 6)
    edges = [(f"a{i}", f"b{shuffled[i]}") for i in range(6)] + [
        (f"b{shuffled[i]}", f"c{i}") for i in range(6)
    ]
    assert crossings(layered_layout(names, edges), edges) == 0


def test_a_ladder_of_skip_edges_shares_its_way() -> None:
    names = [f"n{i}" for i in range(20)]
    edges = [*itertools.pairwise(names), *(("n0", name) for name in names[2:])]
    layout = layered_layout(names, edges, ["n0"])
    assert layout.columns < 2
    ways = [layout.routes["n0", name] for name in names[2:]]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(ways))


def test_the_longest_edges_take_no_place() -> None:
    names = [f"n{i}" for i in range(LONGEST + 10)]
    edges = [*itertools.pairwise(names), ("n0", names[-1]), ("n0", f"n{LONGEST}")]
    layout = layered_layout(names, edges, ["n0"])
    assert layout.routes["n0", names[-1]] == ()
    assert len(layout.routes["n0", f"n{LONGEST}"]) == LONGEST - 1


def test_equal_graphs_are_placed_alike_and_an_empty_one_is_empty() -> None:
    names = [f"n{i}" for i in range(50)]
    rng = random.Random(0)
    edges = [(names[rng.randrange(i)], names[i]) for i in range(1, 50)]
    assert layered_layout(names, edges) == layered_layout(list(names), list(edges))
    assert layered_layout([], []) == Layout({}, {}, 0, 1.0)


@pytest.mark.parametrize("reached", [True, False])
def test_edges_that_lead_back_decide_nothing(reached: bool) -> None:
    names = ["a", "b", "c"]
    layout = layered_layout(names, [("a", "b"), ("b", "c"), ("c", "a")], ["a"] if reached else [])
    assert [row for _, row in layout.places.values()] == [0, 1, 2]
    assert layout.routes["c", "a"] == ()
