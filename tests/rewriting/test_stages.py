from __future__ import annotations

import pytest
from torch import nn

import biofx
from biofx import Pipeline, Remark
from biofx.rewriting.stages import stages_of


@pytest.mark.parametrize(
    "text",
    [
        "scale-gradients{nu=0.1}",
        "split-weights,constrain-signs,scale-gradients",
        '((split-weights){only="0"},(constrain-signs,scale-gradients){exclude="4"}){exclude="1"}',
    ],
)
def test_stages_do_one_after_the_other_what_the_pipeline_does(text: str, mlp: nn.Module) -> None:
    pipeline = Pipeline.parse(text)
    whole = pipeline(biofx.capture(mlp))
    graph_module = biofx.capture(mlp)
    remarks: list[Remark] = []
    for stage in stages_of(pipeline):
        graph_module, report = stage(graph_module)
        remarks += report.remarks
    assert biofx.format_graph(graph_module) == biofx.format_graph(whole.graph_module)
    assert tuple(remarks) == whole.report.remarks


def test_a_pipeline_that_is_switched_off_has_no_stage() -> None:
    assert stages_of(Pipeline.parse("(split-weights){enabled=false}")) == ()
