"""What tests of lowered layers share."""

from __future__ import annotations

from torch import nn

from biofx import BioGraphModule, capture
from biofx.layers.lowering import Lowering
from biofx.layers.sites import find_sites


def lowered(model: nn.Module) -> BioGraphModule:
    """Capture a model and make all its weights visible."""
    captured = capture(model)
    for site in find_sites(captured).found:
        Lowering(captured).lower(site)
    captured.graph.lint()
    captured.recompile()
    return captured
