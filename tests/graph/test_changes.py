from __future__ import annotations

import pytest
from torch import nn
from torch.fx import Node

import biofx
from biofx.graph import changes
from biofx.graph.printing import format_node

EVERYTHING = {"weight_splitting_Gamma": 2, "apply_dales_principle": True}


def test_every_state_of_a_graph_is_turned_into_text_once(
    mlp: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []

    def counted(node: Node) -> str:
        printed.append(node.name)
        return format_node(node)

    monkeypatch.setattr(changes, "format_node", counted)
    report = biofx.transform(mlp, EVERYTHING).report
    states = 1 + sum(bool(entry.changes) for entry in report.passes)
    assert states > 3
    assert printed.count("output") == states
