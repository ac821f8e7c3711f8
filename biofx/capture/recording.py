"""Writing down what torch is asked to compute while a forward is captured.

Tensors made in a forward, random or not, and whatever is computed from parameters alone become nodes, so
that every call of the graph computes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from biofx.capture.values import Value

if TYPE_CHECKING:
    from biofx.capture.model_tracer import ModelTracer


class Recorder(TorchFunctionMode):
    """Writes down what torch is asked to compute where no stand-in is there to do it."""

    def __init__(self, tracer: ModelTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch._C._set_grad_enabled:
            if not self._tracer.is_switching:
                self._tracer.refuse("switches gradients by itself, which a graph would drop")
            return func(*args, **options)
        if any(isinstance(leaf, (Value, Tensor)) for leaf in leaves_of((args, options))):
            return self._on_tensors(func, tuple(args), options)
        if func in _FACTORIES:
            return self._record(func, tuple(args), options)
        made = func(*args, **options)
        return self._record(func, tuple(args), options) if isinstance(made, Tensor) else made

    def _on_tensors(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            attribute = func.__self__.__name__
            if name == "__set__":
                self._tracer.refuse(
                    f"sets {attribute!r} of a tensor, which a graph would do once and never again"
                )
            if attribute in _TENSOR_ATTRIBUTES:
                return self._record(getattr, (args[0], attribute), {})
            return func(*args, **options)
        if name in _DESCRIPTIONS:
            return func(*args, **options)
        if name in _VALUE_READERS:
            self._tracer.refuse("decides by the value of a tensor, which may change after the capture")
        if isinstance(func, (torch._C.ScriptMethod, torch._ops.HigherOrderOperator)):
            return func(*args, **options)
        return self._record(func, args, options)

    def _record(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if is_tensor_method_or_property(func):
            return self._tracer.create_proxy("call_method", func.__name__, args, options)
        name = None if func is getattr else self._tracer.graph._target_to_str(func.__name__)
        return self._tracer.create_proxy("call_function", func, args, options, name=name)


_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "grad", "imag", "real"})
_VALUE_READERS = frozenset({"__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__"})
_DESCRIPTIONS = frozenset(
    {
        *("__format__", "__hash__", "__len__", "__repr__", "__str__", "data_ptr", "dim", "element_size"),
        *(
            "get_device",
            "is_complex",
            "is_contiguous",
            "is_floating_point",
            "nelement",
            "ndimension",
            "numel",
        ),
        *("size", "storage_offset", "stride"),
    }
)
_FACTORY_NAMES = (
    *(
        "arange",
        "as_tensor",
        "asarray",
        "bernoulli",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "hamming_window",
    ),
    *("hann_window", "linspace", "logspace", "multinomial", "normal", "ones", "poisson", "rand", "randint"),
    *("randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
)
_FACTORIES: frozenset[Any] = frozenset(getattr(torch, name) for name in _FACTORY_NAMES)


def leaves_of(value: Any) -> Iterator[Any]:
    """Yield what lies in nested tuples, lists and dicts."""
    if isinstance(value, Proxy):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from leaves_of(entry)
    elif isinstance(value, dict):
        yield from leaves_of(list(value.values()))
    else:
        yield value
