"""Layers of an exported program become calls of modules again, at the paths where they were.

An exported graph has functions on weights, and says for each in which module it was called. Where that was a
layer of torch and the function is all that it does, the graph calls a layer with the same weights. So
selectors, printouts and passes see what they see of the model itself.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from biofx.capture.aten_functions import arguments_of
from biofx.graph.regions import joined_path
from biofx.layers import kind_of_call
from biofx.layers.layer_kind import LayerCall, LoweredCall, NotHeld, argument
from biofx.layers.norms import norm_kind_of_call
from biofx.torch_private import flat_weight_names, name_for_target, rename

_NORMS_WITH_MOMENTS: Mapping[Any, tuple[type[nn.Module], ...]] = {
    F.batch_norm: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    F.instance_norm: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}
_OF_NORMS = ((0, "input"), (1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))
_DROPOUTS: Mapping[Any, tuple[type[nn.Module], ...]] = {
    F.dropout: (nn.Dropout,),
    F.alpha_dropout: (nn.AlphaDropout,),
    torch.feature_dropout: (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
}
FLAGS: Mapping[Any, tuple[int, str]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), (2, "training")),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), (2, "training")),
    torch.feature_dropout: (2, "train"),
    F.rrelu: (3, "training"),
    F.batch_norm: (5, "training"),
    F.instance_norm: (5, "use_input_stats"),
}
"""Where functions are told whether they are in training."""
_RECURRENT: Mapping[Any, tuple[Any, str | None]] = {
    torch.ops.aten.lstm.input: (nn.LSTM, None),
    torch.ops.aten.gru.input: (nn.GRU, None),
    torch.ops.aten.rnn_tanh.input: (nn.RNN, "tanh"),
    torch.ops.aten.rnn_relu.input: (nn.RNN, "relu"),
}


@dataclass
class Layers:
    """Puts layers at the paths of modules that are empty but for their parameters."""

    root: nn.Module
    graph: Graph
    training: bool
    """The mode in which the program was exported."""
    _placed: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def raise_all(self) -> None:
        """Call a layer wherever a function does what a layer did."""
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            try:
                call = self._call_of(node)
            except NotHeld:
                continue
            if call is not None and self._place(call, node):
                flag = flag_of(node)
                self._become(node, call)
                if flag is not None:
                    self.root.get_submodule(call.path).training = flag

    def _call_of(self, node: Node) -> LayerCall | None:
        if node.target in _NORMS_WITH_MOMENTS:
            return self._norm(node)
        if node.target in _DROPOUTS:
            return self._dropout(node)
        if node.target in _RECURRENT:
            return self._recurrent(node)
        kind: Any = kind_of_call(node) or norm_kind_of_call(node)
        if kind is None or getattr(kind, "is_product", False) or getattr(kind, "is_compound", False):
            return None
        types = getattr(kind, "module_types", None) or (kind.module_type,)
        found = self._lowered(node, types)
        return None if found is None else kind.raised(found)

    def _lowered(self, node: Node, types: tuple[type[nn.Module], ...]) -> LoweredCall | None:
        """Return a call that was one of a layer of these types, None if it was not."""
        path, called = next(iter(reversed(node.meta["nn_module_stack"].values())), ("", ""))
        kind = next((kind for kind in types if full_name(kind) == full_name(called)), None)
        if kind is None:
            return None
        before: nn.Module = kind.__new__(kind)
        nn.Module.__init__(before)
        return LoweredCall(node, self.root, path, before)

    def _norm(self, node: Node) -> LayerCall | None:
        found = self._lowered(node, _NORMS_WITH_MOMENTS[node.target])
        if found is None:
            return None
        x, mean, variance, weight, bias = (argument(node, place, name) for place, name in _OF_NORMS)
        momentum, eps = argument(node, 6, "momentum"), argument(node, 7, "eps")
        if not (isinstance(momentum, float) and isinstance(eps, float)):
            return None
        held = found.parameters({"weight": weight, "bias": bias})
        moments = {"running_mean": mean, "running_var": variance}
        held |= {name: found.hold(source) for name, source in moments.items()}
        tracked = mean is not None
        if tracked:
            held["num_batches_tracked"] = self._held(joined_path(found.path, "num_batches_tracked"))
        size = next((value.numel() for value in held.values() if value is not None), None)
        if size is None:
            raise NotHeld
        return found.call(
            *(type(found.before), (size,), held, (x,)),
            eps=eps,
            momentum=momentum,
            affine=weight is not None,
            track_running_stats=tracked,
        )

    def _dropout(self, node: Node) -> LayerCall | None:
        found = self._lowered(node, _DROPOUTS[node.target])
        if found is None:
            return None
        options: Any = {"p": argument(node, 1, "p")}
        kind: Any = type(found.before)
        return LayerCall(found.path, {}, lambda: kind(**options), repr(options), (node.args[0],))

    def _recurrent(self, node: Node) -> LayerCall | None:
        kind, nonlinearity = _RECURRENT[node.target]
        found, given = self._lowered(node, (kind,)), arguments_of(node)
        if found is None:
            return None
        weights = [found.hold(source) for source in given["params"]]
        tensors = [weight for weight in weights if isinstance(weight, nn.Parameter)]
        if len(tensors) != len(weights):
            raise NotHeld
        gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
        units, read = tensors[1].shape[0] // gates, tensors[1].shape[1]
        options: dict[str, Any] = {"proj_size": read} if read != units else {}
        options |= {} if nonlinearity is None else {"nonlinearity": nonlinearity}
        options |= {
            "num_layers": given["num_layers"],
            "bias": given["has_biases"],
            "dropout": given["dropout"],
            "bidirectional": given["bidirectional"],
            "batch_first": given["batch_first"],
        }
        sizes = (tensors[0].shape[1], units)
        names = flat_weight_names(kind(*sizes, **options, device="meta"))
        held: Any = dict(zip(names, tensors, strict=True))
        state = given["hx"]
        inputs = (given["input"],) if _is_zero(state) else (given["input"], _state(state))
        return found.call(kind, sizes, held, inputs, **options)

    def _place(self, call: LayerCall, node: Node) -> bool:
        """Put the layer of a call at its path; return whether it is there."""
        if call.path in self._placed:
            return self._placed[call.path] == call.key
        owner, _, name = call.path.rpartition(".")
        parent = self.root.get_submodule(owner)
        present = parent._modules.get(name)
        held = () if present is None else (*present._parameters, *present._buffers, *present._modules)
        if not set(held) <= set(call.held):
            return False
        parent.add_module(name, call.module())
        parent._modules[name].train(self.training)  # type: ignore[union-attr]
        self._placed[call.path] = call.key
        return True

    def _become(self, node: Node, call: LayerCall) -> None:
        if node.target is torch.ops.aten.lstm.input:
            nest_states(node)
        if node.target is F.batch_norm:
            _drop_count(node, joined_path(call.path, "num_batches_tracked"))
        node.op, node.target, node.args, node.kwargs = "call_module", call.path, call.args, dict(call.kwargs)
        rename(node, name_for_target(node.graph, call.path))

    def _held(self, path: str) -> Tensor | None:
        owner, _, name = path.rpartition(".")
        found = self.root.get_submodule(owner)._buffers.get(name)
        if found is None:
            raise NotHeld
        return found


def flag_of(node: Node) -> bool | None:
    """Return whether a call says that it is one of training; None if it says nothing."""
    if node.op != "call_function":
        return None
    if node.target in _RECURRENT:
        return bool(arguments_of(node)["train"])
    if node.target not in FLAGS:
        return None
    if node.target in _NORMS_WITH_MOMENTS and argument(node, 1, "running_mean") is None:
        return None
    found = argument(node, *FLAGS[node.target])
    return found if isinstance(found, bool) else None


def full_name(kind: Any) -> str:
    """Return the name of a class with its module; a text is one already."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _is_zero(state: Any) -> bool:
    """Whether a first state consists of zeros that the program makes, as the layer does by itself."""
    states = state if isinstance(state, (list, tuple)) else (state,)
    return all(
        isinstance(each, Node) and each.target in (torch.zeros, torch.ops.aten.zeros.default)
        for each in states
    )


def _state(state: Any) -> Any:
    return tuple(state) if isinstance(state, (list, tuple)) else state


def nest_states(node: Node) -> None:
    """Let what reads the three results of the operator read those of the layer: ``y, (h, c)``."""
    for part in [user for user in node.users if user.target is operator.getitem and user.args[1] != 0]:
        with node.graph.inserting_before(part):
            states = node.graph.call_function(operator.getitem, (node, 1))
        part.args = (states, int(part.args[1]) - 1)  # type: ignore[arg-type]


def _drop_count(node: Node, path: str) -> None:
    """Remove the counting of batches, which the layer does by itself."""
    for read in node.graph.find_nodes(op="get_attr", target=path):
        for user in list(read.users):
            if user.target == "add_" and not user.users:
                node.graph.erase_node(user)
