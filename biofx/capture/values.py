"""What flows through a forward while it is captured: stand-ins that write down what is done with them.

A stock ``torch.fx.Proxy`` answers some questions of Python's wrongly and without a word: ``isinstance`` is
false, ``hasattr`` true, ``x += y`` makes a new tensor, ``x.attribute = y`` and dictionary keys are lost.
"""

from __future__ import annotations

import dis
import linecache
import operator
import sys
import typing
from abc import ABCMeta
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Node, Proxy

from biofx.capture.identity_questions import is_asked_about_next, is_text_asked_about_next
from biofx.graph.guards import require_tensor
from biofx.graph.node_kinds import AUGMENTED_ASSIGNMENTS

if TYPE_CHECKING:
    from biofx.capture.model_tracer import ModelTracer

TORCH_FOLDER = torch.__path__[0]
_OWN_PACKAGE = __name__.partition(".")[0]
_OWN_ATTRIBUTES = frozenset({"tracer", "node", "_node", "root", "attr", "tensor", "path"})
_NO_TENSOR_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride", "item", "tolist"})
_ON_BEHALF = frozenset(
    {
        torch.nn.parameter.__file__,
        torch.__file__,
        torch.jit.__file__,
        torch._jit_internal.__file__,
        ABCMeta.__instancecheck__.__code__.co_filename,
        typing.__file__,
    }
)


def _asks_for_itself(frame: FrameType | None) -> bool:
    """Whether it is torch's or our own machinery that asks, and not the user's model."""
    while frame is not None and frame.f_code.co_filename in _ON_BEHALF:
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(TORCH_FOLDER):
        return True
    return str(frame.f_globals.get("__package__")).partition(".")[0] == _OWN_PACKAGE


def _asks_for_a_type(frame: FrameType) -> bool:
    """Whether a line of the model asks for a type, and not a function of torch that it calls."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    if "MATCH" in dis.opname[frame.f_code.co_code[frame.f_lasti]]:
        return True
    return any(name in (line or frame.f_code.co_names) for name in _TYPE_QUESTIONS)


_TYPE_QUESTIONS = ("isinstance", "is_tensor", "__class__")


class _Typed:
    """Answers ``isinstance``: with the truth to torch, with what it stands for to the user's model."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        if _asks_for_itself(frame) or not _asks_for_a_type(frame):
            return type(self)
        return self.stands_for()  # type: ignore[attr-defined]


class Value(_Typed, Proxy):
    """Stands for the result of a node."""

    tracer: ModelTracer

    def __getattr__(self, name: str) -> Any:
        if name == "_is_param" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        frame = sys._getframe(1)
        if not hasattr(Tensor, name) and not _asks_for_itself(frame) and _is_in_a_call(frame):
            self.refuse(f"asks whether a value has an attribute {name!r}")
        found = _Attribute(self, name)
        if is_asked_about_next(frame) and not _asks_for_itself(frame):
            self.tracer.expect_given(found, f"attribute {name!r}")
        return found

    def __getitem__(self, index: Any) -> Any:
        found: Any = self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        frame = sys._getframe(1)
        if is_asked_about_next(frame) and not _asks_for_itself(frame):
            self.tracer.expect_given(found, f"entry {index!r}")
        return found

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
        if not _asks_for_itself(sys._getframe(1)):
            self.refuse("uses a value as a key")
        return id(self)

    def __str__(self) -> str:
        self._refuse_to_decide_by_text(sys._getframe(1))
        return super().__repr__()

    def __format__(self, form: str) -> str:
        self._refuse_to_decide_by_text(sys._getframe(1))
        return super().__format__(form)

    def _refuse_to_decide_by_text(self, frame: FrameType) -> None:
        if is_text_asked_about_next(frame) and not _asks_for_itself(frame):
            self.refuse("decides by what a value looks like as a text")

    def __len__(self) -> int:
        self.refuse("asks for the length of a value")

    def length(self) -> Any:
        """Return what stands for its length."""
        return self.tracer.create_proxy("call_function", len, (self,), {})

    def __contains__(self, entry: object) -> bool:
        self.refuse("looks for something in a value")

    def __setitem__(self, index: Any, entry: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, entry), {})

    def refuse(self, what: str) -> NoReturn:
        """Raise a CaptureError that names the line."""
        self.tracer.refuse(f"{what}, which is not known before the graph runs")

    @property
    def may_be_none(self) -> bool:
        """Whether it may stand for None, or for a flag, as far as the graph says."""
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

    def stands_for(self) -> type:
        """Return the type to show to the user's model; the graph then checks it whenever it runs."""
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
        if node not in self.tracer.known_tensors:
            self.tracer.known_tensors.add(node)
            self.tracer.create_node("call_function", require_tensor, (node, self.tracer.where()), {})
        return Tensor


def _takes_a_part(index: Any) -> bool:
    """Whether an index is one that only tensors and sequences take, and leaves what they are."""
    return isinstance(index, slice) or (isinstance(index, tuple) and any(map(_takes_a_part, index)))


class _Attribute(Value):
    """Stands for an attribute of a value; a node only where it is not called as a method."""

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
        frame = sys._getframe(1)
        if is_asked_about_next(frame) and not _asks_for_itself(frame):
            self.tracer.expect_given(found, f"what {self.attr}() returns")
        return found


class StoredTensor(Value):
    """Stands for a parameter or buffer, whose shape is known."""

    def __init__(self, node: Node, tracer: ModelTracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        """Its number of axes."""
        return self.tensor.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return its shape, or one of its sizes."""
        return self.tensor.shape if dim is None else self.tensor.shape[dim]

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

    def stands_for(self) -> type:
        """Return its own type."""
        return type(self.tensor)


class TrainingFlag(Value):
    """``module.training``: a node where it is passed on, an error where it decides."""

    def __init__(self, tracer: ModelTracer, path: str) -> None:
        self.tracer = tracer
        self.path = path
        self._node: Node | None = None

    @property
    def node(self) -> Node:  # type: ignore[override]
        """The node that reads the flag, made when first asked for."""
        if self._node is None:
            target = f"{self.path}.training" if self.path else "training"
            self._node = self.tracer.create_node("get_attr", target, (), {}, target.replace(".", "_"))
        return self._node

    def forget_erased(self) -> None:
        """Make the node anew when asked for next, if it is no longer in the graph."""
        if self._node is not None and self._node._erased:
            self._node = None

    def __bool__(self) -> bool:
        return self.tracer.decide_by_mode(self.path)

    def stands_for(self) -> type:
        """Return the type of a flag."""
        return bool


def _is_in_a_call(frame: FrameType) -> bool:
    """Whether an attribute is looked up by a call (``hasattr``, ``getattr``) and not by a dot."""
    return "CALL" in dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _augmented(function: Callable[[Any, Any], Any]) -> Callable[[Value, Any], Any]:
    def assign(self: Value, other: Any) -> Any:
        changed = self.tracer.create_proxy("call_function", function, (self, other), {})
        return self.tensor if isinstance(self, StoredTensor) else changed

    return assign


for _name in AUGMENTED_ASSIGNMENTS:
    setattr(Value, f"__{_name}__", _augmented(getattr(operator, _name)))
