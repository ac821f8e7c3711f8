from __future__ import annotations

from torch import nn

import biofx
from biofx import BioConfig
from biofx.graph.graph_view import GraphView
from biofx.rewriting.remarks import PassReport, Remark
from biofx.rewriting.views.coverage import Coverage


def test_coverage_counts_layers_parameters_and_reasons(mlp: nn.Module) -> None:
    report = biofx.transform(mlp, BioConfig(weight_splitting_Gamma=2), only=["0", "2"]).report
    assert report.before is not None
    split = Coverage.of(report.passes[0], report.before)
    assert (split.layers, split.candidate_layers) == (2, 3)
    assert split.parameters == (4 * 6 + 6) + 6 * 4  # the second layer has no bias
    assert split.all_parameters == sum(p.numel() for p in mlp.parameters()) == 54 + 4 * 2 + 2
    assert split.fraction == 54 / 64
    assert split.reasons == {"not selected by only=['0', '2']": 1}


def test_reasons_come_with_the_commonest_first_and_a_layer_counts_once() -> None:
    remarks = [Remark("missed", n, "fc", why) for n, why in (("a", "x"), ("b", "y"), ("c", "y"))]
    remarks += [Remark("applied", "d", "fc", "done"), Remark("applied", "e", "fc", "done")]
    found = Coverage.of(PassReport("p", "p", tuple(remarks), ()), GraphView((), {}))
    assert list(found.reasons.items()) == [("y", 2), ("x", 1)]
    assert (found.layers, found.candidate_layers, found.fraction) == (1, 1, 0.0)
