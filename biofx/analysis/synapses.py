"""Which nodes have weights between units, which of them are split, and what is only compared."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from biofx.graph.analysis_cache import cached_on_graph
from biofx.graph.graph_functions import checkpointed_path
from biofx.graph.node_kinds import queries_metadata
from biofx.layers import kind_of_call
from biofx.operators.split_ops import fold_weight, pool_synapses, sum_synapses
from biofx.torch_private import grouped_product

_PRODUCTS: frozenset[Any] = frozenset(
    {
        *(operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm, torch.tensordot),
        *(grouped_product, F.grouped_mm),
    }
)
_PRODUCT_METHODS = frozenset({"matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__"})
_MATRIX_FUNCTIONS: frozenset[Any] = frozenset(
    {F.embedding, F.embedding_bag, F.bilinear, F.multi_head_attention_forward, torch.bilinear}
)


@cached_on_graph
def synaptic_nodes(graph_module: GraphModule) -> Set[Node]:
    """Return the nodes with weights between units: layers, opaque modules, products with a parameter."""
    constant: set[Node] = set()  # computed from what the model holds alone, whatever the input
    learned: set[Node] = set()  # those of them that follow from a parameter
    synaptic: set[Node] = set()
    for node in graph_module.graph.nodes:
        inputs = node.all_input_nodes
        found = _attribute(graph_module, node) if node.op == "get_attr" else None
        is_held = isinstance(found, (Tensor, float, int))
        if is_held or (inputs and all(source in constant for source in inputs)):
            constant.add(node)
            if isinstance(found, nn.Parameter) or any(source in learned for source in inputs):
                learned.add(node)
        elif is_synaptic(node, graph_module) or (
            _is_product(node) and any(source in learned for source in inputs)
        ):
            synaptic.add(node)
    return synaptic


def is_synaptic(node: Node, graph_module: GraphModule) -> bool:
    """Whether a node carries weights between units: a layer, or an opaque module with a matrix inside."""
    path = str(node.target) if node.op == "call_module" else checkpointed_path(node)
    if path is not None:
        module = graph_module.get_submodule(path)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return False
        return any(parameter.dim() >= 2 for parameter in module.parameters())
    kind = kind_of_call(node)
    is_layer = kind is not None and not kind.is_product  # a product may be of data alone
    return node.op == "call_function" and (is_layer or node.target in _MATRIX_FUNCTIONS)


def only_compared(graph: Graph, comparisons: Mapping[Node, Set[Node]], synaptic: Set[Node]) -> set[Node]:
    """Return the nodes whose every way on leads into a comparison before it meets another weight.

    Args:
        graph: the graph.
        comparisons: operations that compare values, and the values they compare.
        synaptic: the nodes with weights.
    """
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        users = [user for user in node.users if not queries_metadata(user)]
        if users and all(
            node in comparisons.get(user, ()) or (user in found and user not in synaptic) for user in users
        ):
            found.add(node)
    return found


def split_nodes(graph_module: GraphModule) -> set[Node]:
    """Return the synaptic nodes whose output already runs into a pool of synapses, or is folded into one."""
    split: set[Node] = set()
    graph = graph_module.graph
    for fold in graph.find_nodes(op="call_function", target=fold_weight):
        if fold.kwargs.get("rows", 1) != 1:
            split.update(fold.users)
    for kind in (pool_synapses, sum_synapses):
        for pool in graph.find_nodes(op="call_function", target=kind):
            split |= _nearest_sources(pool, synaptic_nodes(graph_module))
    return split


def _nearest_sources(node: Node, wanted: Set[Node]) -> set[Node]:
    """Return those of some nodes that feed a node, the nearest on each way."""
    found: set[Node] = set()
    seen: set[Node] = set()
    open_nodes = [node]
    while open_nodes:
        for source in open_nodes.pop().all_input_nodes:
            if source in wanted:
                found.add(source)
            elif source not in seen:
                seen.add(source)
                open_nodes.append(source)
    return found


def unit_output(layer: Node, graph_module: GraphModule) -> tuple[Node, str]:
    """Return the node with the activity of a layer's units: their nonlinearity, and its name.

    It is looked for where the output has one user alone: behind normalisation, pools of synapses, dropout and
    additions, up to the first nonlinearity. Without one, it is the layer itself, and the name is empty.
    """
    node = layer
    while len(node.users) == 1:
        (node,) = node.users
        name = short_name(node, graph_module)
        if name in _NONLINEARITIES:
            return node, name
        if name not in _ON_THE_WAY:
            break
    return layer, ""


def short_name(node: Node, graph_module: GraphModule) -> str:
    """Return a lower-case name that a function, a method and a module of one kind share."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))).__name__.lower()
    return str(getattr(node.target, "__name__", node.target)).rstrip("_").lower()


_NONLINEARITIES = frozenset(
    {
        *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leakyrelu", "leaky_relu", "mish"),
        *("prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh"),
        *("hardshrink", "softshrink", "tanhshrink", "threshold", "logsigmoid", "clamp"),
    }
)
_ON_THE_WAY = frozenset(
    {
        *("batchnorm1d", "batchnorm2d", "batchnorm3d", "batch_norm", "groupnorm", "group_norm"),
        *("instancenorm1d", "instancenorm2d", "instancenorm3d", "instance_norm", "layernorm", "layer_norm"),
        *("rmsnorm", "rms_norm", "syncbatchnorm"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "add", "iadd", "pool_synapses", "identity"),
    }
)


def _is_product(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _PRODUCT_METHODS
    return node.op == "call_function" and node.target in _PRODUCTS


def _attribute(graph_module: GraphModule, node: Node) -> Any:
    value: Any = graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value
