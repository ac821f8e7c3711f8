"""Calls of torch functions in an eager trace: what becomes a node, and what is a query.

A function that returns tensors becomes a node. One that returns a size, a type or a device is a tensor query,
which the graph asks again: where the answer is used, or to check that it is the same where it decides. A
query for values breaks the graph.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import is_tensor_method_or_property

from biofx.capture.graph_breaks import ASKS_FOR_VALUE
from biofx.capture.graph_builder import DATA_DEPENDENT, GraphBuilder
from biofx.capture.symbolic_scalars import plain, plain_inside, symbolic
from biofx.graph.node_kinds import changed_in_place
from biofx.torch_private import pytree, registered_name, set_grad_enabled

if TYPE_CHECKING:
    from biofx.capture.eager_tracer import EagerTracer


_OF_DEVICE = frozenset(str.split("device is_cpu is_cuda is_meta is_mps is_xpu"))
_DESCRIPTIONS = frozenset(str.split("device dtype itemsize nbytes"))
"""Attributes that describe a tensor, which the graph reads again."""
_NUMBERS = frozenset(str.split("get_device element_size"))
"""Methods that return such a description as a number."""
_CHECKED = frozenset(str.split("can_cast is_complex is_floating_point is_signed"))
"""Queries about types, whose answers the graph checks."""
_SIZES = frozenset(str.split("size numel nelement __len__"))
_OF_VALUES = frozenset(
    str.split(
        """__bool__ __complex__ __contains__ __float__ __index__ __int__ item tolist numpy __array__
        is_nonzero equal allclose __dlpack__ untyped_storage storage requires_grad_ retain_grad
        register_hook backward stride data_ptr"""
    )
)
"""Queries for values, or gradients: what Python does next then depends on them."""
_CONSTANT = frozenset(
    str.split(
        """__format__ __hash__ __repr__ __str__ dim ndimension element_size get_device is_complex
        is_contiguous is_floating_point is_signed is_inference is_conj is_neg is_same_size result_type
        can_cast promote_types has_names is_tensor is_storage storage_offset type is_pinned is_shared
        is_set_to"""
    )
)
"""Queries whose answers no value changes."""


class TorchCall:
    """One call of a torch function.

    Args:
        tracer: the tracer that follows it.
        function: the function, as ``__torch_function__`` gets it.
        args: its arguments.
        kwargs: likewise by name.
    """

    def __init__(
        self, tracer: EagerTracer, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._tracer = tracer
        self._function = function
        self._name: str = getattr(function, "__name__", "")
        self._args = args
        self._kwargs = kwargs
        self._result: list[Any] = []

    def untraced(self) -> Any:
        """Return what the function returns; it is called once at most."""
        if not self._result:
            args, kwargs = self._args, self._kwargs
            if self._function is Tensor.type:  # the one method that does not accept a symbolic type
                args, kwargs = plain_inside(args), plain_inside(kwargs)
            self._result.append(self._function(*args, **kwargs))
        return self._result[0]

    def traced(self, builder: GraphBuilder) -> Any:
        """Return what the forward gets, and add to the graph what gives it.

        Raises:
            GraphBreak: a graph cannot give it.
        """
        name, tracer = self._name, self._tracer
        if name in ("__get__", "__set__"):
            return self._attribute(builder)
        if name in _SIZES:
            return self._size(builder)
        if name in _OF_VALUES:
            tracer.stop(ASKS_FOR_VALUE.format(name))
        if self._function is set_grad_enabled and not tracer.is_switching:
            tracer.stop("switches gradients by itself")
        try:
            with tracer.quiet():
                found = self.untraced()
        except Exception as error:
            tracer.note_failure(error)
            raise
        if (
            isinstance(found, Tensor)
            or (isinstance(found, (tuple, list)) and _holds_tensors(found))
            or name == "__setitem__"
        ):
            return self._computed(builder, found)
        if found is not None and (name in _CHECKED or name in _NUMBERS or name in _CONSTANT):
            return self._described(builder, found)
        if (
            found is not None
            and found is not NotImplemented  # tensor == None, after which Python tries the other operand
            and name not in _CONSTANT
            and _holds_tensors((self._args, self._kwargs))
        ):
            tracer.stop(f"asks for something that depends on the value of a tensor ({name})")
        return found

    def _computed(self, builder: GraphBuilder, found: Any) -> Any:
        builder.contexts.check()
        node = self._write(builder)
        if any(builder.is_parameter(changed) for changed in changed_in_place(node)):
            self._tracer.stop("writes into a parameter")
        if has_data_dependent_shape(self._function, self._name, self._args, self._kwargs):
            node.meta[DATA_DEPENDENT] = True
        if isinstance(found, (tuple, list)) and self._name.partition(".")[0] in _MANY:
            self._tracer.asks_sizes = True
            builder.expect(len, (node,), len(found))
        return builder.take(node, found, in_place=self._name.endswith("_"))

    def _write(self, builder: GraphBuilder) -> Node:
        arguments, named = builder.argument(tuple(self._args)), builder.argument(self._kwargs)
        if self._name in ("__getitem__", "__setitem__"):
            function = operator.getitem if self._name == "__getitem__" else operator.setitem
            return builder.node("call_function", function, arguments, named)
        if is_tensor_method_or_property(self._function):
            return builder.node("call_method", self._name, arguments, named)
        return builder.node("call_function", self._function, arguments, named)

    def _attribute(self, builder: GraphBuilder) -> Any:
        attribute, tensor = self._function.__self__.__name__, self._args[0]
        if self._name == "__set__":
            self._tracer.stop(f"sets {attribute!r} of a tensor")
        with self._tracer.quiet():
            found = self._function(*self._args)
        if attribute in ("requires_grad", "grad_fn", "is_leaf") and not builder.is_stored(tensor):
            self._tracer.stop(f"asks whether a tensor has a gradient ({attribute})")
        if attribute in _OF_DEVICE:
            builder.contexts.devices_asked.add(tensor.device.type)
        self._tracer.asks_sizes |= attribute == "nbytes"
        if attribute in _DESCRIPTIONS:
            return builder.description(tensor, attribute, found)
        if attribute == "shape":
            return self._sizes(builder, found)
        if isinstance(found, Tensor):
            return builder.take(
                builder.node("call_function", getattr, (builder.node_of(tensor), attribute)), found
            )
        return found

    def _described(self, builder: GraphBuilder, found: Any) -> Any:
        """Return the answer to a query about types or devices, which the graph asks, too."""
        name, args = self._name, self._args
        leaves = pytree.tree_leaves((args, self._kwargs))
        if any(isinstance(leaf, Tensor) and not builder.knows(leaf) for leaf in leaves):
            return found
        if name in _CHECKED:
            builder.expect(getattr(torch, name), (*args, *self._kwargs.values()), found)
        elif name == "type":
            builder.expect(name, args, found)
        elif name in _NUMBERS or isinstance(found, torch.dtype):

            def make() -> Node:
                made = self._write(builder)
                made.meta["auxiliary"] = True
                return made

            return builder.remembered(found, make)
        return found

    def _size(self, builder: GraphBuilder) -> Any:
        tensor, *rest = self._args
        with self._tracer.quiet():
            found = self._function(*map(plain, self._args), **self._kwargs)
        if isinstance(found, torch.Size):
            return self._sizes(builder, found)
        if builder.is_stored(tensor):
            return found
        self._tracer.asks_sizes = True
        if self._name == "__len__":  # Python makes a plain number of it
            builder.expect(len, (tensor,), found)
            return found
        method = "numel" if self._name == "nelement" else self._name
        places, named = builder.argument(tuple(rest)), builder.argument(self._kwargs)
        return symbolic(
            found, builder, lambda: builder.auxiliary(method, (builder.node_of(tensor), *places), named)
        )

    def _sizes(self, builder: GraphBuilder, found: torch.Size) -> Any:
        tensor = self._args[0]
        if builder.is_stored(tensor):
            return found
        self._tracer.asks_sizes = True

        def size(place: int) -> Any:
            return symbolic(
                found[place], builder, lambda: builder.auxiliary("size", (builder.node_of(tensor), place))
            )

        return torch.Size(map(size, range(len(found))))


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


# data-dependent shapes

_ALWAYS = frozenset(
    str.split(
        """nonzero argwhere masked_select unique unique_consecutive _unique2 bincount unique_dim histc
        combinations repeat_interleave tensor_split segment_reduce _pack_padded_sequence
        _pad_packed_sequence to_sparse"""
    )
)
_TAKE_SIZES = frozenset(
    str.split(
        """arange range linspace logspace zeros ones full empty eye rand randn randint randperm tril_indices
        triu_indices new_zeros new_ones new_full new_empty expand view reshape repeat tile broadcast_to
        narrow split chunk unflatten pad"""
    )
)
_MANY = frozenset(str.split("unbind split chunk tensor_split hsplit vsplit dsplit __iter__"))
"""Functions that return a tuple whose length depends on the size of a tensor."""
_KNOWN_NAMESPACES = ("aten", "prims", "biofx")


def has_data_dependent_shape(function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the shape of what a function returns depends on the values of a tensor."""
    name = name.partition(".")[0]
    if name == "__getitem__":
        return any(_counts_or_bounds(index) for index in pytree.tree_leaves(args[1]))
    if name == "one_hot":  # as many classes as there are, unless given
        return len(args) == 1 and kwargs.get("num_classes", -1) == -1
    if name == "where":
        return len(args) == 1
    if name in _TAKE_SIZES:
        return any(_is_a_whole_number(size) for size in pytree.tree_leaves((args, kwargs)))
    return name in _ALWAYS or _is_of_another_library(function)


def _counts_or_bounds(index: Any) -> bool:
    if isinstance(index, slice):
        return any(isinstance(bound, Tensor) for bound in (index.start, index.stop, index.step))
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_a_whole_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()


def _is_of_another_library(function: Any) -> bool:
    """Whether a function is a registered operator, of which nothing is known."""
    qualified = registered_name(function)
    return isinstance(qualified, str) and qualified.partition("::")[0] not in _KNOWN_NAMESPACES
