"""The kinds of layers that have weights, and where in a graph weights are.

A kind is an instance of a subclass of :class:`~biofx.layers.layer_kind.LayerKind`. It lies in the file of its
family, which lists it, and that list is joined with the others here: ``single_weight``, ``recurrent``,
``attention``.
Normalisations, whose weights are no synapses, are in :mod:`biofx.layers.norms`.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from biofx.layers.attention import ATTENTION
from biofx.layers.layer_kind import LayerKind
from biofx.layers.recurrent import CELL_KINDS, RECURRENT_KINDS, cell_kind, recurrent_kind
from biofx.layers.single_weight import (
    DENSE_KINDS,
    KIND_OF_FUNCTION,
    UNITLESS_KINDS,
    DenseKind,
    product_of,
)

COMPOUND_KINDS = (*RECURRENT_KINDS, *CELL_KINDS, ATTENTION)
"""The kinds of layers with several weights."""
KINDS = (*DENSE_KINDS, *COMPOUND_KINDS, *UNITLESS_KINDS)
"""All kinds that are modules."""
LAYERS_OF_SEVERAL_INPUTS: tuple[type[nn.Module], ...] = (
    *(nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell, nn.MultiheadAttention),
    *(nn.Bilinear, nn.EmbeddingBag),
)
"""Layers that take more than one tensor, or a state, or flags."""
_TYPES = tuple(kind.module_type for kind in KINDS)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer module, None for anything else."""
    if not isinstance(module, _TYPES):
        return None
    return next(kind for kind in KINDS if isinstance(module, kind.module_type))


def dense_kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer module with one weight, from units to units; None for anything else."""
    kind = kind_of(module)
    return kind if isinstance(kind, DenseKind) else None


def kind_of_call(node: Node) -> LayerKind | None:
    """Return the kind of layer that a call of a function computes, None for anything else."""
    if (product := product_of(node)) is not None or node.op != "call_function":
        return product
    if node.target is ATTENTION.function:
        return ATTENTION
    if node.target is RECURRENT_KINDS[0].function:
        return recurrent_kind(node)
    if node.target is CELL_KINDS[0].function:
        return cell_kind(node)
    return KIND_OF_FUNCTION.get(node.target)
