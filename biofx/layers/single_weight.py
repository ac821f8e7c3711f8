"""Layers with one weight: linear, convolutions, products with a parameter, look-ups, bilinear.

A new kind is an entry of ``DENSE_KINDS`` or ``UNITLESS_KINDS`` below; one that takes several inputs also of
:data:`biofx.layers.LAYERS_OF_SEVERAL_INPUTS`.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from biofx.graph.observed_functions import SHAPE
from biofx.layers.layer_kind import (
    LayerCall,
    LayerKind,
    LoweredCall,
    Reads,
    become_call,
    without_neutral,
)
from biofx.torch_private import grouped_product, padding_of

_OPTIONS = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
"""What a convolution takes besides tensors, and the neutral values, which are left out."""
_LOOKUP_OPTIONS: dict[str, Any] = {
    "padding_idx": None,
    "max_norm": None,
    "norm_type": 2.0,
    "scale_grad_by_freq": False,
    "mode": "mean",
    "sparse": False,
    "include_last_offset": False,
}
"""What the functions that look up take besides tensors, and the neutral values, which are left out."""
_LOOKUP_INPUTS = ("offsets", "per_sample_weights")


class DenseKind(LayerKind):
    """A linear layer or a convolution, transposed or not."""

    def computed_shape(self, module: Any) -> tuple[int, ...]:
        """Return ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if transposed."""
        if self.kernel_axes == 0:
            return (module.out_features, module.in_features)
        ends = (module.out_channels, module.in_channels)
        first, second = ends[::-1] if self.transposed else ends
        return (first, second // module.groups, *module.kernel_size)

    def lower(self, node: Node, module: Any, reads: Reads) -> None:
        """Rewrite ``fc(x)`` as ``linear(x, weight, bias)``; padding other than with zeros becomes a node."""
        (source,) = (*node.args, *node.kwargs.values())
        weight = reads("weight")
        bias = () if module.bias is None else (reads("bias"),)
        options = self._options(module) if self.kernel_axes else {}
        if getattr(module, "padding_mode", "zeros") != "zeros":
            source = _padded(node, source, module)
            options.pop("padding", None)
        become_call(node, self.function, (source, weight, *bias), options)

    def _options(self, module: nn.Module) -> dict[str, Any]:
        names = [name for name in _OPTIONS if name != "output_padding" or self.transposed]
        given = {name: getattr(module, name) for name in names}
        return {name: value for name, value in given.items() if _differs(value, _OPTIONS[name])}

    def raised(self, call: LoweredCall) -> LayerCall | None:
        """Return the call of a module with the same weight and bias."""
        node = call.node
        options: dict[str, Any] = {name: value for name, value in node.kwargs.items() if name != "bias"}
        if not isinstance(call.before, self.module_type) or not set(options) <= set(_OPTIONS):
            return None
        if not 1 < len(node.args) < 4:
            return None
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        held, weight = call.weight({"weight": node.args[1], "bias": bias})
        first, second, *kernel = weight.shape
        second *= options.get("groups", 1)
        ends = (first, second) if self.transposed else (second, first)
        sizes = (*ends, tuple(kernel)) if self.kernel_axes else ends
        return call.call(self.module_type, sizes, held, (node.args[0],), bias=bias is not None, **options)


def _padded(node: Node, source: Any, module: Any) -> Node:
    """Insert the padding that a convolution with a padding mode of its own does by itself."""
    arguments = (source, padding_of(module))
    mode: dict[str, Any] = {"mode": str(module.padding_mode)}
    with node.graph.inserting_before(node):
        padded = node.graph.create_node("call_function", F.pad, arguments, mode, f"{node.name}_padded")
    padded.meta = dict(node.meta)
    return padded


def _differs(value: Any, neutral: int) -> bool:
    return any(entry != neutral for entry in value) if isinstance(value, tuple) else value != neutral


class LookupKind(LayerKind):
    """A layer that looks rows of its weight up."""

    def computed_shape(self, module: Any) -> tuple[int, ...]:
        """Return ``(entries, features)``."""
        return (module.num_embeddings, module.embedding_dim)

    def blocker(self, node: Node, module: nn.Module | None) -> str | None:
        """Return why the weight has no dense gradient, None if it has."""
        options: Any = vars(module) if module is not None else _arguments(self.function, node)
        if options.get("max_norm") is not None:
            return "its forward changes its weight in place (max_norm)"
        if options.get("sparse", False) is not False:
            return "its gradient is sparse, and factors are dense (sparse=True)"
        return None

    def lower(self, node: Node, module: Any, reads: Reads) -> None:
        """Rewrite ``embed(x)`` as ``embedding(x, weight)``."""
        given = _arguments(self.module_type.forward, node, module)
        args = (given.pop("input"), reads("weight"))
        held = {name: getattr(module, name, neutral) for name, neutral in _LOOKUP_OPTIONS.items()}
        options = {name: value for name, value in given.items() if value is not None and name != "self"}
        options |= without_neutral(held, _LOOKUP_OPTIONS)
        become_call(node, self.function, args, options)

    def raised(self, call: LoweredCall) -> LayerCall | None:
        """Return the call of a module with the same weight."""
        node = call.node
        if not isinstance(call.before, self.module_type) or len(node.args) != 2:
            return None
        options: dict[str, Any] = dict(node.kwargs)
        inputs = {name: options.pop(name) for name in _LOOKUP_INPUTS if name in options}
        held, weight = call.weight({"weight": node.args[1]})
        return call.call(self.module_type, tuple(weight.shape), held, (node.args[0],), inputs, **options)


class BilinearKind(LayerKind):
    """A layer whose weights multiply the activity of two units."""

    def computed_shape(self, module: Any) -> tuple[int, ...]:
        """Return ``(out, in1, in2)``."""
        return (module.out_features, module.in1_features, module.in2_features)

    def lower(self, node: Node, module: Any, reads: Reads) -> None:
        """Rewrite ``layer(x, y)`` as ``bilinear(x, y, weight, bias)``."""
        given = _arguments(self.module_type.forward, node, module)
        args = (given["input1"], given["input2"], reads("weight"))
        bias = () if module.bias is None else (reads("bias"),)
        become_call(node, self.function, (*args, *bias))

    def raised(self, call: LoweredCall) -> LayerCall | None:
        """Return the call of a module with the same weight and bias."""
        node = call.node
        if not isinstance(call.before, self.module_type) or node.kwargs or not 2 < len(node.args) < 5:
            return None
        bias = node.args[3] if len(node.args) > 3 else None
        held, weight = call.weight({"weight": node.args[2], "bias": bias})
        out, first, second = weight.shape
        sizes = (first, second, out)
        return call.call(self.module_type, sizes, held, node.args[:2], bias=bias is not None)


def _arguments(function: Any, node: Node, *before: Any) -> dict[str, Any]:
    bound: dict[str, Any] = inspect.signature(function).bind(*before, *node.args, **node.kwargs).arguments
    return bound


DENSE_KINDS = (
    DenseKind(nn.Linear, F.linear, 0),
    DenseKind(nn.Conv1d, F.conv1d, 1),
    DenseKind(nn.Conv2d, F.conv2d, 2),
    DenseKind(nn.Conv3d, F.conv3d, 3),
    DenseKind(nn.ConvTranspose1d, F.conv_transpose1d, 1, transposed=True),
    DenseKind(nn.ConvTranspose2d, F.conv_transpose2d, 2, transposed=True),
    DenseKind(nn.ConvTranspose3d, F.conv_transpose3d, 3, transposed=True),
)
"""The kinds with one weight whose entries are synapses from one unit to another."""

_LOOKED_UP = "its rows are looked up, and no unit is presynaptic to them"
EMBEDDING = LookupKind(nn.Embedding, F.embedding, transposed=True, why_no_units=_LOOKED_UP)
EMBEDDING_BAG = LookupKind(nn.EmbeddingBag, F.embedding_bag, transposed=True, why_no_units=_LOOKED_UP)
BILINEAR = BilinearKind(
    *(nn.Bilinear, F.bilinear),
    argument=(2, "weight"),
    why_no_units="each of its weights has two presynaptic units, whose activity is multiplied",
)
LOOKUP_KINDS = (EMBEDDING, EMBEDDING_BAG)
"""The kinds that look rows of their weight up, to which no unit is presynaptic."""
UNITLESS_KINDS = (*LOOKUP_KINDS, BILINEAR)
"""The kinds with one weight whose entries are not from one unit to another."""
KIND_OF_FUNCTION: dict[Any, LayerKind] = {
    **{kind.function: kind for kind in (*DENSE_KINDS, *UNITLESS_KINDS)},
    torch.bilinear: BILINEAR,
}

_MATMUL, _MM, _ADDMM = (
    LayerKind(nn.Linear, function, transposed=True, argument=weight, source=source, is_product=True)
    for function, weight, source in (
        (torch.matmul, (1, "other"), (0, "input")),
        (torch.mm, (1, "mat2"), (0, "input")),
        (torch.addmm, (2, "mat2"), (1, "mat1")),
    )
)
_PRODUCTS: dict[Any, LayerKind] = {
    **dict.fromkeys((torch.matmul, operator.matmul, Tensor.matmul, "matmul", "__matmul__"), _MATMUL),
    **dict.fromkeys((torch.mm, Tensor.mm, "mm"), _MM),
    **dict.fromkeys((torch.addmm, Tensor.addmm, "addmm"), _ADDMM),
}


_LEFT: dict[int, LayerKind] = {
    axis: LayerKind(
        *(nn.Linear, torch.matmul),
        argument=(0, "input"),
        source=(1, "other"),
        is_product=True,
        units_axis=axis,
    )
    for axis in (-1, -2)
}
"""``weight @ x``, by the axis of units in ``x``."""
_STACKED = LayerKind(
    *(nn.Linear, grouped_product),
    transposed=True,
    argument=(1, "mat2"),
    is_product=True,
    is_stack=True,
)
_STACKED_FUNCTIONS = frozenset({grouped_product, F.grouped_mm})


def _in_observed_run(node: Node) -> LayerKind | None:
    """Return the kind of a product that is known as a layer only where the shapes of values are.

    A weight in front meets the first or the second axis from the end, as its other factor is a vector or not.
    A stack of weights meets groups of a batch, as the experts of a mixture do.
    """
    if node.target in _STACKED_FUNCTIONS:
        return _STACKED if len(node.args) > 1 else None
    if _PRODUCTS[node.target] is not _MATMUL or len(node.args) != 2 or not _is_held(node.args[0]):
        return None
    shape = node.args[1].meta.get(SHAPE, ()) if isinstance(node.args[1], Node) else ()
    return None if not shape or _is_held(node.args[1]) else _LEFT[max(-2, -len(shape))]


def _is_held(node: Any) -> bool:
    """Whether a value follows from what the model holds alone."""
    pending = [node]
    while pending:
        current = pending.pop()
        if not isinstance(current, Node):
            return False
        sources = current.all_input_nodes
        if current.op != "get_attr" and (current.op == "call_module" or not sources):
            return False
        pending += sources
    return True


_EINSUMS = {
    (place, transposed): LayerKind(
        *(nn.Linear, torch.einsum),
        transposed=transposed,
        argument=(place, "operands"),
        source=(3 - place, "operands"),
        is_product=True,
    )
    for place in (1, 2)
    for transposed in (False, True)
}


def _einsum_of(node: Node) -> LayerKind | None:
    """Return the kind of an ``einsum`` that replaces the last axis of one operand by the other, a matrix.

    >>> import torch.fx
    >>> graph = torch.fx.Graph()
    >>> x, weight = graph.placeholder("x"), graph.placeholder("weight")
    >>> for equation in ("bti,oi->bto", "io,...i->...o", "bi,oi->b"):
    ...     kind = _einsum_of(graph.call_function(torch.einsum, (equation, x, weight)))
    ...     print(equation, None if kind is None else (kind.argument[0], kind.transposed))
    bti,oi->bto (2, False)
    io,...i->...o (1, True)
    bi,oi->b None
    """
    if len(node.args) != 3 or not isinstance(node.args[0], str):
        return None
    before, _, result = node.args[0].replace(" ", "").partition("->")
    terms = before.split(",")
    for place in (1, 2) if len(terms) == 2 else ():
        weight, source = terms[place - 1], terms[2 - place]
        summed = source[-1:]
        if len(weight) != 2 or len(set(weight)) != 2 or summed not in weight or summed in ("", "."):
            continue
        (made,) = set(weight) - {summed}
        if result == source[:-1] + made and max(map(source.count, set(source) - {"."})) == 1:
            return _EINSUMS[place, weight[0] == summed]
    return None


def product_of(node: Node) -> LayerKind | None:
    """Return the kind of a product of matrices, None for anything else.

    As a layer it has its weight the other way round, ``(in, out)``. One with factors of its own (alpha, beta)
    is no layer.
    """
    if node.target is torch.einsum and not node.kwargs:
        return _einsum_of(node)
    if SHAPE in node.meta and (node.target in _PRODUCTS or node.target in _STACKED_FUNCTIONS):
        known = _in_observed_run(node)
        if known is not None:
            return known
    kind = _PRODUCTS.get(node.target) if node.op in ("call_function", "call_method") else None
    if kind is None or not set(node.kwargs) <= {"input", kind.argument[1], kind.source[1]}:
        return None
    return kind
