"""The kinds of layers that have weights: their modules, their functions, and where their units are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from biofx.layers.attention_ops import attend
from biofx.layers.recurrent_ops import recurrent


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer: its module class, its function, and where its channels are."""

    module_type: type[nn.Module]
    function: Callable[..., Any]
    kernel_axes: int
    transposed: bool = False
    is_compound: bool = False
    """Whether it has several weights, which it takes as a list, and returns more than one tensor."""

    @property
    def name(self) -> str:
        """Name of the module class."""
        return self.module_type.__name__

    @property
    def channel_axis(self) -> int:
        """Axis of the output that counts channels, from the end, so that a batch axis may be absent."""
        return -1 - self.kernel_axes

    @property
    def output_axis(self) -> int:
        """Axis of the weight that counts postsynaptic units."""
        return 1 - self.input_axis

    @property
    def input_axis(self) -> int:
        """Axis of the weight that counts presynaptic units: 1 in ``(out, in, *)``, 0 if transposed."""
        return 0 if self.transposed else 1


LAYER_KINDS = (
    LayerKind(nn.Linear, F.linear, 0),
    LayerKind(nn.Conv1d, F.conv1d, 1),
    LayerKind(nn.Conv2d, F.conv2d, 2),
    LayerKind(nn.Conv3d, F.conv3d, 3),
    LayerKind(nn.ConvTranspose1d, F.conv_transpose1d, 1, transposed=True),
    LayerKind(nn.ConvTranspose2d, F.conv_transpose2d, 2, transposed=True),
    LayerKind(nn.ConvTranspose3d, F.conv_transpose3d, 3, transposed=True),
)
KIND_OF_FUNCTION: dict[Any, LayerKind] = {kind.function: kind for kind in LAYER_KINDS}
"""Which kind of layer with one weight a function computes."""

RNN, GRU, LSTM = (LayerKind(kind, recurrent, 0, is_compound=True) for kind in (nn.RNN, nn.GRU, nn.LSTM))
ATTENTION = LayerKind(nn.MultiheadAttention, attend, 0, is_compound=True)
COMPOUND_KINDS = (RNN, GRU, LSTM, ATTENTION)
"""The kinds of layers with several weights."""


_LAYER_TYPES = tuple(kind.module_type for kind in LAYER_KINDS)
_COMPOUND_TYPES = tuple(kind.module_type for kind in COMPOUND_KINDS)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer module with one weight, None for anything else."""
    if not isinstance(module, _LAYER_TYPES):
        return None
    return next((kind for kind in LAYER_KINDS if isinstance(module, kind.module_type)), None)


def compound_kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer module with several weights, None for anything else."""
    if not isinstance(module, _COMPOUND_TYPES):
        return None
    return next((kind for kind in COMPOUND_KINDS if isinstance(module, kind.module_type)), None)


def kind_of_call(node: Node) -> LayerKind | None:
    """Return the kind of layer that a call of a function computes, None for anything else."""
    if node.op != "call_function":
        return None
    if node.target is attend:
        return ATTENTION
    if node.target is recurrent:
        return {"GRU": GRU, "LSTM": LSTM}.get(str(node.kwargs["mode"]), RNN)
    return KIND_OF_FUNCTION.get(node.target)
