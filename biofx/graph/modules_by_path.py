"""The modules of a model by their paths."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from biofx.graph.analysis_cache import cached_on_graph


@cached_on_graph
def modules_by_path(graph_module: GraphModule) -> Mapping[str, nn.Module]:
    """Return the modules of a model, itself under the empty path; one that goes by several is under each."""
    return dict(graph_module.named_modules(remove_duplicate=False))
