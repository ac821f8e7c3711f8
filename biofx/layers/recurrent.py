"""Recurrent layers: ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``, and their cells, which go one step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import Node

from biofx.layers.layer_kind import (
    Held,
    LayerCall,
    LayerKind,
    LoweredCall,
    Reads,
    WeightSlot,
    argument,
    become_call,
    without_neutral,
)
from biofx.operators.compound_ops import GATES, recurrent, recurrent_step
from biofx.torch_private import flat_weight_names

_WEIGHTS = (2, "weights")
_NEUTRAL = {"num_layers": 1, "dropout": 0.0, "bidirectional": False, "batch_first": False}


class RecurrentKind(LayerKind):
    """A recurrent layer, of several layers and in two directions if it is."""

    def slots_of_module(self, module: Any) -> tuple[WeightSlot, ...]:
        """Return the slots of the matrices, in torch's order."""
        options = {"bias": module.bias, "projects": module.proj_size > 0}
        return tuple(_slots(module.mode, module.num_layers, module.bidirectional, **options))

    def slots_of_call(self, node: Node) -> tuple[WeightSlot, ...]:
        """Return the slots of the matrices among the weights."""
        mode, layers, bidirectional, each = _shape(node)
        return tuple(_slots(mode, layers, bidirectional, bias=each > 3, projects=each in (3, 5)))

    def lower(self, node: Node, module: Any, reads: Reads) -> None:
        """Rewrite ``rnn(x, h)`` as ``recurrent(x, h, weights, training, …)``."""
        bound = inspect.signature(self.module_type.forward).bind(module, *node.args, **node.kwargs)
        given = bound.arguments
        weights = [reads(name) for name in flat_weight_names(module)]
        options = {
            name: getattr(module, name) for name in ("mode", "num_layers", "bidirectional", "batch_first")
        }
        options["dropout"] = reads("dropout")  # which may be changed at any time
        args = (given["input"], given.get("hx"), weights, reads("training"))
        become_call(node, self.function, args, without_neutral(options, _NEUTRAL))

    def raised(self, call: LoweredCall) -> LayerCall | None:
        """Return the call of a module with the same weights and biases."""
        node = call.node
        x, state, weights, _ = node.args
        options: dict[str, Any] = dict(node.kwargs)
        mode = options.pop("mode")
        first: Any = call.hold(weights[0])  # type: ignore[index]
        *_, each = _shape(node)
        held: Held = {}
        for slot in self.slots_of_call(node):
            held |= call.parameters({slot.name: slot.read(node)})
            if each > 3 and slot.role == "hidden":
                for offset, name in ((1, "bias_ih"), (2, "bias_hh")):
                    source = weights[slot.index + offset]  # type: ignore[index, operator]
                    held |= call.parameters({slot.name.replace("weight_hh", name): source})
        projected = next((value for name, value in held.items() if name.startswith("weight_hr")), None)
        if mode.startswith("RNN_"):
            options["nonlinearity"] = mode.removeprefix("RNN_").lower()
        if projected is not None:
            options["proj_size"] = projected.shape[0]
        sizes = (first.shape[1], first.shape[0] // GATES[mode])
        inputs = (x,) if state is None else (x, state)
        return call.call(self.module_type, sizes, held, inputs, bias=each > 3, **options)


def _shape(node: Node) -> tuple[str, int, bool, int]:
    """Return the mode, the layers, whether there are two directions, and the weights of each chain."""
    layers: Any = node.kwargs.get("num_layers", 1)
    bidirectional = bool(node.kwargs.get("bidirectional", False))
    each = len(argument(node, *_WEIGHTS)) // (layers * (1 + bidirectional))
    return str(node.kwargs["mode"]), layers, bidirectional, each


def _slots(
    mode: str, num_layers: int, bidirectional: bool, *, bias: bool, projects: bool
) -> Iterator[WeightSlot]:
    start = 0
    for layer in range(num_layers):
        for direction in range(1 + bidirectional):
            end = f"l{layer}{'_reverse' if direction else ''}"
            roles = [("weight_ih", "stacked" if layer else "input"), ("weight_hh", "hidden")]
            places = [start, start + 1]
            start += 4 if bias else 2
            if projects:
                roles.append(("weight_hr", "projection"))
                places.append(start)
                start += 1
            for (name, role), place in zip(roles, places, strict=True):
                blocks = 1 if role == "projection" else GATES[mode]
                yield WeightSlot(f"{name}_{end}", role, _WEIGHTS, place, blocks, layer, direction)


RNN, GRU, LSTM = RECURRENT_KINDS = tuple(
    RecurrentKind(kind, recurrent, is_compound=True) for kind in (nn.RNN, nn.GRU, nn.LSTM)
)


def recurrent_kind(node: Node) -> LayerKind:
    """Return the kind that a call of :func:`~biofx.operators.compound_ops.recurrent` is of."""
    return {"GRU": GRU, "LSTM": LSTM}.get(str(node.kwargs["mode"]), RNN)


class CellKind(LayerKind):
    """A cell, which a loop calls at each step with the state that it returned."""

    def slots_of_module(self, module: Any) -> tuple[WeightSlot, ...]:
        """Return the slots of the matrices ih and hh."""
        return _slots_of_cell(_mode_of(module))

    def slots_of_call(self, node: Node) -> tuple[WeightSlot, ...]:
        """Return the slots of the matrices ih and hh among the weights."""
        return _slots_of_cell(str(node.kwargs["mode"]))

    def lower(self, node: Node, module: Any, reads: Reads) -> None:
        """Rewrite ``cell(x, h)`` as ``recurrent_step(x, h, weights, mode=…)``."""
        given = inspect.signature(self.module_type.forward).bind(module, *node.args, **node.kwargs).arguments
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
        args = (given["input"], given.get("hx"), [reads(name) for name in names])
        become_call(node, self.function, args, {"mode": _mode_of(module)})

    def raised(self, call: LoweredCall) -> LayerCall | None:
        """Return the call of a cell with the same weights and biases."""
        x, state, weights = call.node.args
        mode = str(call.node.kwargs["mode"])
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        sources: Any = dict(zip(names, weights, strict=False))  # type: ignore[arg-type]
        held = call.parameters(sources)
        first: Any = held["weight_ih"]
        options: dict[str, Any] = {"bias": len(sources) > 2}
        if mode.startswith("RNN_"):
            options["nonlinearity"] = mode.removeprefix("RNN_").lower()
        sizes = (first.shape[1], first.shape[0] // GATES[mode])
        inputs = (x,) if state is None else (x, state)
        return call.call(self.module_type, sizes, held, inputs, **options)


def _mode_of(module: Any) -> str:
    """Return the mode of a cell, as that of a recurrent layer is named."""
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    return "GRU" if isinstance(module, nn.GRUCell) else "LSTM"


def _slots_of_cell(mode: str) -> tuple[WeightSlot, ...]:
    roles = (("weight_ih", "input"), ("weight_hh", "hidden"))
    return tuple(
        WeightSlot(name, role, _WEIGHTS, place, GATES[mode]) for place, (name, role) in enumerate(roles)
    )


_FED_BACK = "its output is its own state a step later, which sums over neighbours would change"
RNN_CELL, GRU_CELL, LSTM_CELL = CELL_KINDS = tuple(
    CellKind(kind, recurrent_step, is_compound=True, why_no_channels=_FED_BACK)
    for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
)


def cell_kind(node: Node) -> LayerKind:
    """Return the kind that a call of :func:`~biofx.operators.compound_ops.recurrent_step` is of."""
    return {"GRU": GRU_CELL, "LSTM": LSTM_CELL}.get(str(node.kwargs["mode"]), RNN_CELL)
