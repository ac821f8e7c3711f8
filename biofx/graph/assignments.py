"""Assignments to buffers (``self.mean = …``) as nodes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.fx.node import has_side_effect

from biofx.errors import CaptureError
from biofx.graph.guards import RecordingError

OWN_MODULE = "own_module"
"""The attribute of a graph module that is the module itself."""


@has_side_effect
def assign_buffer(owner: nn.Module, name: str, value: Any, path: str) -> None:
    """Let a module hold another tensor as a buffer, of the same shape and type as before.

    Args:
        owner: the module.
        name: of the buffer in it.
        value: the tensor.
        path: of ``owner`` in the whole model.

    Raises:
        RecordingError: it has another shape or type, which the graph may have taken for granted.
        CaptureError: the graph is being traced again, which would lose the assignment.
    """
    if isinstance(value, Proxy):
        raise CaptureError(
            f"a graph that assigns to a buffer ({name!r}) cannot be traced again; copy it (copy.deepcopy, "
            "pickle) or transform it as it is"
        )
    before = owner._buffers[name]
    if before is None or (before.shape, before.dtype) != (value.shape, value.dtype):
        was = "None" if before is None else f"{tuple(before.shape)} of {before.dtype}"
        raise RecordingError(
            f"module {path!r} assigns to its buffer {name!r}: expected {was} as before, found "
            f"{tuple(value.shape)} of {value.dtype}; name the module in opaque=[{path!r}]",
            path,
        )
    setattr(owner, name, value)
