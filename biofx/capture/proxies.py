"""How a symbolic trace sees what a forward does with values: proxies, and a mode for calls without any.

A stock ``torch.fx.Proxy`` answers some questions of Python's wrongly: ``isinstance`` is false, ``hasattr``
true, ``x += y`` makes a new tensor, ``x.attribute = y`` and dictionary keys are lost. The proxies here answer
rightly, let the graph check the answer at each call, or refuse. Tensors that are made in a forward, random or
not, and whatever is computed from parameters alone would be constants; :class:`TensorMode` makes nodes of
them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Node, Proxy
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from biofx.capture.bytecode import CallSite
from biofx.capture.graph_breaks import DECIDES_BY_STORED_VALUE
from biofx.graph.node_kinds import AUGMENTED_ASSIGNMENTS
from biofx.torch_private import (
    HigherOrderOperator,
    ScriptMethod,
    is_erased,
    name_for_target,
    pytree,
    set_grad_enabled,
)

if TYPE_CHECKING:
    from biofx.capture.symbolic_builder import SymbolicBuilder

_OWN_ATTRIBUTES = frozenset({"tracer", "node", "_node", "root", "attr", "tensor", "path"})
_NO_TENSOR_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride", "item", "tolist"})


class _Typed:
    """Answers ``isinstance``: to torch with its class, to the model with the one that it is traced for."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        site = CallSite.of_caller()
        if not site.is_of_model or not site.queries_type:
            return type(self)
        return self.traced_type()  # type: ignore[attr-defined]


class Value(_Typed, Proxy):
    """The result of a node."""

    tracer: SymbolicBuilder

    def __getattr__(self, name: str) -> Any:
        if name == "_is_param" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        site = CallSite.of_caller()
        if not hasattr(Tensor, name) and site.is_of_model and site.is_a_call:
            self.refuse(f"asks whether a value has an attribute {name!r}")
        return self._checked(_Attribute(self, name), f"attribute {name!r}", site)

    def __getitem__(self, index: Any) -> Any:
        found: Any = self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        return self._checked(found, f"entry {index!r}", CallSite.of_caller())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: ``callable(x)`` was true, or what comes in is a function."""
        self.refuse("calls a value")

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _OWN_ATTRIBUTES:
            self.refuse(
                "makes a parameter" if name == "_is_param" else f"sets the attribute {name!r} of a value"
            )
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        if CallSite.of_caller().is_of_model:
            self.refuse("uses a value as a key")
        return id(self)

    def __str__(self) -> str:
        self._refuse_to_decide_by_text(CallSite.of_caller())
        return super().__repr__()

    def __format__(self, form: str) -> str:
        self._refuse_to_decide_by_text(CallSite.of_caller())
        return super().__format__(form)

    def __len__(self) -> int:
        self.refuse("asks for the length of a value")

    def length(self) -> Any:
        """Return a proxy of its length."""
        return self.tracer.create_proxy("call_function", len, (self,), {})

    def __contains__(self, entry: object) -> bool:
        self.refuse("looks for something in a value")

    def __setitem__(self, index: Any, entry: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, entry), {})

    def refuse(self, what: str) -> NoReturn:
        """Raise a CaptureError that names the line."""
        self.tracer.refuse(f"{what}, which is not known before the graph runs")

    def _checked(self, found: Value, name: str, site: CallSite) -> Value:
        """Return a proxy; the graph checks that it is given, where the model compares it with None."""
        if site.compares_identity_next and site.is_of_model:
            self.tracer.expect_given(found, name)
        return found

    def _refuse_to_decide_by_text(self, site: CallSite) -> None:
        if site.compares_text_next and site.is_of_model:
            self.refuse("decides by what a value looks like as a text")

    @property
    def may_be_none(self) -> bool:
        """Whether it may be None, or a flag, as far as the graph says."""
        return self._may_give_none(self.node)

    def _may_give_none(self, node: Node) -> bool:
        if node.op == "call_module":
            return not self.tracer.returns_a_tensor(str(node.target))
        if node.target is operator.getitem:
            source = node.args[0]
            inside_a_call = isinstance(source, Node) and source.op == "call_module"
            return not _takes_a_part(node.args[1]) and (
                inside_a_call or not isinstance(source, Node) or self._may_give_none(source)
            )
        of_something_else = node.op == "call_method" and not hasattr(Tensor, str(node.target))
        return of_something_else or node.op == "placeholder" or node.target is getattr

    def traced_type(self) -> type:
        """Return the class that the forward is traced for, which the graph checks at each call."""
        node = self.node
        known = (
            (node.op == "placeholder" and not str(node.target).startswith("*") and not self.tracer.prefix)
            or (node.op == "call_module" and self.tracer.returns_a_tensor(str(node.target)))
            or (node.op == "call_method" and node.target not in _NO_TENSOR_METHODS)
            or (
                node.op == "call_function" and str(getattr(node.target, "__module__", "")).startswith("torch")
            )
        )
        if not known:
            self.refuse("asks for the type of a value")
        self.tracer.expect_tensor(node)
        return Tensor


def _takes_a_part(index: Any) -> bool:
    """Whether an index is one that only tensors and sequences take, and leaves what they are."""
    return isinstance(index, slice) or (isinstance(index, tuple) and any(map(_takes_a_part, index)))


class _Attribute(Value):
    """An attribute of a value; a node only where it is not called as a method."""

    def __init__(self, root: Value, attr: str) -> None:
        self.root = root
        self.attr = attr
        self.tracer = root.tracer
        self._node: Node | None = None

    @property
    def node(self) -> Node:  # type: ignore[override]
        """The node that reads the attribute, made when first asked for."""
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)
        return self._checked(found, f"what {self.attr}() returns", CallSite.of_caller())


class StoredTensor(Value):
    """A parameter or buffer, whose shape is known."""

    def __init__(self, node: Node, tracer: SymbolicBuilder, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    shape = property(lambda self: self.tensor.shape)
    ndim = property(lambda self: self.tensor.ndim)

    def size(self, *dim: Any, **named: Any) -> Any:
        """Return its shape, or one of its sizes."""
        return self.tensor.size(*dim, **named)

    def dim(self) -> int:
        """Return its number of axes."""
        return self.tensor.dim()

    def numel(self) -> int:
        """Return its number of elements."""
        return self.tensor.numel()

    def __len__(self) -> int:
        return len(self.tensor)

    def length(self) -> int:
        """Return the number of its rows."""
        return len(self.tensor)

    def traced_type(self) -> type:
        """Return its own class."""
        return type(self.tensor)


class TrainingFlag(Value):
    """``module.training``: a node where it is passed on, an error where it decides."""

    def __init__(self, tracer: SymbolicBuilder, path: str) -> None:
        self.tracer = tracer
        self.path = path
        self._node: Node | None = None

    @property
    def node(self) -> Node:  # type: ignore[override]
        """The node that reads the flag, made when first asked for, and again after a graph break."""
        if self._node is None or is_erased(self._node):
            target = f"{self.path}.training" if self.path else "training"
            self._node = self.tracer.create_node("get_attr", target, (), {}, target.replace(".", "_"))
        return self._node

    def __bool__(self) -> bool:
        return self.tracer.decide_by_mode(self.path)

    def traced_type(self) -> type:
        """Return the class of a flag."""
        return bool


def _augmented(function: Callable[[Any, Any], Any]) -> Callable[[Value, Any], Any]:
    def assign(self: Value, other: Any) -> Any:
        changed = self.tracer.create_proxy("call_function", function, (self, other), {})
        return self.tensor if isinstance(self, StoredTensor) else changed

    return assign


for _name in AUGMENTED_ASSIGNMENTS:
    setattr(Value, f"__{_name}__", _augmented(getattr(operator, _name)))


_TENSOR_ATTRIBUTES = frozenset(str.split("T mT H mH data grad imag real"))
_OF_VALUES = frozenset(str.split("__bool__ __complex__ __contains__ __float__ __index__ __int__"))
_CONSTANT = frozenset(
    str.split(
        """__format__ __hash__ __len__ __repr__ __str__ data_ptr dim element_size get_device is_complex
        is_contiguous is_floating_point nelement ndimension numel size storage_offset stride"""
    )
)
"""Queries about a tensor that is no proxy, whose answers do not change."""
_FACTORIES: frozenset[Any] = frozenset(
    getattr(torch, name)
    for name in str.split(
        """arange as_tensor asarray bernoulli empty empty_strided eye full hamming_window hann_window linspace
        logspace multinomial normal ones poisson rand randint randn randperm scalar_tensor tensor tril_indices
        triu_indices zeros"""
    )
)


class TensorMode(TorchFunctionMode):
    """Makes nodes of the torch functions that a forward calls, with proxies or without."""

    def __init__(self, tracer: SymbolicBuilder) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is set_grad_enabled:
            if not self._tracer.is_switching:
                self._tracer.refuse("switches gradients by itself, which a graph would drop")
            return func(*args, **options)
        if any(isinstance(leaf, (Value, Tensor)) for leaf in pytree.tree_leaves((args, options))):
            return self._on_tensors(func, tuple(args), options)
        if func in _FACTORIES:
            return self._call(func, tuple(args), options)
        made = func(*args, **options)
        return self._call(func, tuple(args), options) if isinstance(made, Tensor) else made

    def _on_tensors(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            attribute = func.__self__.__name__
            if name == "__set__":
                self._tracer.refuse(
                    f"sets {attribute!r} of a tensor, which a graph would do once and never again"
                )
            if attribute in _TENSOR_ATTRIBUTES:
                return self._call(getattr, (args[0], attribute), {})
            return func(*args, **options)
        if name in _OF_VALUES:
            self._tracer.refuse(DECIDES_BY_STORED_VALUE)
        if name in _CONSTANT or isinstance(func, (ScriptMethod, HigherOrderOperator)):
            return func(*args, **options)
        return self._call(func, args, options)

    def _call(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if is_tensor_method_or_property(func):
            return self._tracer.create_proxy("call_method", func.__name__, args, options)
        name = None if func is getattr else name_for_target(self._tracer.graph, func.__name__)
        return self._tracer.create_proxy("call_function", func, args, options, name=name)
