"""The kinds of layers that have weights: their modules, their functions, and where their units are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from biofx.operators.compound_ops import attend, recurrent


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer: its module class, its function, and where its channels are."""

    module_type: type[nn.Module]
    function: Callable[..., Any]
    kernel_axes: int
    transposed: bool = False
    is_compound: bool = False
    """Whether it has several weights, which it takes as a list, and returns more than one tensor."""
    argument: tuple[int, str] = (1, "weight")
    """The argument of the function that is the weight, by place and by name; not of compound ones."""
    source: tuple[int, str] = (0, "input")
    """The argument that the weight acts on."""
    is_product: bool = False
    """Whether the function is a product of matrices, which is a layer if a parameter is its second factor."""

    why_no_units: str = ""
    """Why the entries of the weight are no synapses from one unit to another, empty where they are."""

    @property
    def name(self) -> str:
        """Name of the module class, of a product that of its function."""
        return str(self.function.__name__) if self.is_product else self.module_type.__name__

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

_MATMUL, _MM, _ADDMM = (
    LayerKind(nn.Linear, function, 0, transposed=True, argument=weight, source=source, is_product=True)
    for function, weight, source in (
        (torch.matmul, (1, "other"), (0, "input")),
        (torch.mm, (1, "mat2"), (0, "input")),
        (torch.addmm, (2, "mat2"), (1, "mat1")),
    )
)
_PRODUCT_OF: dict[Any, LayerKind] = {
    **dict.fromkeys((torch.matmul, operator.matmul, Tensor.matmul, "matmul", "__matmul__"), _MATMUL),
    **dict.fromkeys((torch.mm, Tensor.mm, "mm"), _MM),
    **dict.fromkeys((torch.addmm, Tensor.addmm, "addmm"), _ADDMM),
}
"""Which product a function or method is; as a layer it has its weight the other way round, ``(in, out)``."""

RNN, GRU, LSTM = (LayerKind(kind, recurrent, 0, is_compound=True) for kind in (nn.RNN, nn.GRU, nn.LSTM))
ATTENTION = LayerKind(nn.MultiheadAttention, attend, 0, is_compound=True)
COMPOUND_KINDS = (RNN, GRU, LSTM, ATTENTION)
"""The kinds of layers with several weights."""


_LOOKED_UP = "its rows are looked up, and no unit is presynaptic to them"
EMBEDDING, EMBEDDING_BAG, BILINEAR = UNITLESS_KINDS = (
    LayerKind(nn.Embedding, F.embedding, 0, transposed=True, why_no_units=_LOOKED_UP),
    LayerKind(nn.EmbeddingBag, F.embedding_bag, 0, transposed=True, why_no_units=_LOOKED_UP),
    LayerKind(
        *(nn.Bilinear, F.bilinear, 0),
        argument=(2, "weight"),
        why_no_units="each of its weights has two presynaptic units, whose activity is multiplied",
    ),
)
"""The kinds of layers with one weight that is not from one unit to another."""
_UNITLESS_OF: dict[Any, LayerKind] = {
    **{kind.function: kind for kind in UNITLESS_KINDS},
    torch.bilinear: BILINEAR,
}
LAYERS_OF_SEVERAL_INPUTS: tuple[type[nn.Module], ...] = (
    *(nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell, nn.MultiheadAttention),
    *(nn.Bilinear, nn.EmbeddingBag),
)
"""Layers that take more than one tensor, or a state, or flags."""
_LAYER_TYPES = tuple(kind.module_type for kind in LAYER_KINDS)
_COMPOUND_TYPES = tuple(kind.module_type for kind in COMPOUND_KINDS)

LAYER_TYPES = (*_LAYER_TYPES, *_COMPOUND_TYPES, *(kind.module_type for kind in UNITLESS_KINDS))
"""The classes of all these layers."""


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


def unitless_kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer module whose weight is not from one unit to another, None otherwise."""
    return next((kind for kind in UNITLESS_KINDS if isinstance(module, kind.module_type)), None)


def kind_of_call(node: Node) -> LayerKind | None:
    """Return the kind of layer that a call of a function computes, None for anything else."""
    if node.target in _PRODUCT_OF and node.op != "call_module":
        return _product_of(node)
    if node.op != "call_function":
        return None
    if node.target is attend:
        return ATTENTION
    if node.target is recurrent:
        return {"GRU": GRU, "LSTM": LSTM}.get(str(node.kwargs["mode"]), RNN)
    return KIND_OF_FUNCTION.get(node.target) or _UNITLESS_OF.get(node.target)


def _product_of(node: Node) -> LayerKind | None:
    """Return the kind of a product as it stands; one with factors of its own (alpha, beta) is no layer."""
    kind = _PRODUCT_OF[node.target]
    named = set(node.kwargs) <= {"input", kind.argument[1], kind.source[1]}
    return kind if named else None
