from __future__ import annotations

import networkx as nx
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biofx.analysis.joined_numbers import smallest_connected


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 30))
def test_smallest_of_each_component(data: st.DataObject, count: int) -> None:
    number = st.integers(0, count - 1)
    pairs = data.draw(st.lists(st.tuples(number, number), max_size=40))
    graph: nx.Graph = nx.Graph(pairs)
    graph.add_nodes_from(range(count))
    expected = {member: min(members) for members in nx.connected_components(graph) for member in members}
    given_pairs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    assert smallest_connected(count, given_pairs).tolist() == [expected[number] for number in range(count)]


def test_a_chain_from_its_far_end() -> None:
    count = 5000
    numbers = torch.arange(count - 1).flip(0)
    assert not smallest_connected(count, torch.stack((numbers, numbers + 1))).any()
