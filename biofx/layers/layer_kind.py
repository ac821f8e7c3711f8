"""What a kind of layer is: its weights, its channels, and how its call is lowered and raised again.

*Lowered*, a layer's call is a call of its function on visible weights; *raised*, it is a call of a module
again. Each kind is an instance of a subclass of :class:`LayerKind`, and listed in :mod:`biofx.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from biofx.torch_private import collect_flat_weights

Reads = Callable[[str], Node]
"""Returns the node that reads what a module holds under a name."""
Held = dict[str, "Tensor | None"]
"""Parameters and buffers by their paths in a module."""


@dataclass(frozen=True)
class WeightSlot:
    """The place of one weight of a layer."""

    name: str = "weight"
    """Path of the parameter inside the layer's module."""
    role: str = "input"
    """What the weight's columns, its presynaptic units, are.

    ========================  ======================================================================
    ``"input"``               the layer's input
    ``"stacked"``             the units of the recurrent layer below, in all directions
    ``"hidden"``              the units of the same recurrent layer, a step before
    ``"projection"``          the units of the same recurrent layer, before they are projected
    ``"query"``, ``"key"``    the input that queries or keys are made from
    ``"value"``               the input that values are made from
    ``"query_key_value"``     all three, one below the other in the rows
    ``"attention_output"``    the values, summed by attention, head beside head
    ========================  ======================================================================
    """
    argument: tuple[int, str] = (1, "weight")
    """The argument of the function, by place and by name."""
    index: int | None = None
    """Its index, where that argument is a list."""
    blocks: int = 1
    """How many matrices are stacked in the rows (gates; query, key and value), a count."""
    layer: int = 0
    """Which of stacked recurrent layers it belongs to, from 0."""
    direction: int = 0
    """0 where a recurrent layer reads forwards, 1 where it reads backwards."""

    def read(self, node: Node) -> Any:
        """Return the weight in a call of the function."""
        found = argument(node, *self.argument)
        return found if self.index is None else found[self.index]

    def reader(self, node: Node) -> Node:
        """Return the node that reads the weight: the call."""
        return node

    def write(self, node: Node, weight: Node) -> None:
        """Put another weight in its place."""
        place, name = self.argument
        given: Any = weight
        if self.index is not None:
            given = list(argument(node, place, name))
            given[self.index] = weight
        if len(node.args) > place:
            node.args = (*node.args[:place], given, *node.args[place + 1 :])
        else:
            node.kwargs = {**node.kwargs, name: given}


ONE_WEIGHT = WeightSlot()
"""The slot of a layer whose weight is its function's second argument."""


def argument(node: Node, place: int, name: str) -> Any:
    """Return an argument of a node, given by place or by name; None if it is not given."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def become_call(node: Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None) -> None:
    """Let a node call a function instead of what it calls."""
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, kwargs or {}


def without_neutral(options: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without those that have their neutral value."""
    return {name: value for name, value in options.items() if name not in neutral or value != neutral[name]}


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer: its module class, its function, and where its channels are."""

    module_type: type[nn.Module]
    function: Callable[..., Any]
    kernel_axes: int = 0
    transposed: bool = False
    is_compound: bool = False
    """Whether it has several weights, which it takes as a list, and returns more than one tensor."""
    argument: tuple[int, str] = (1, "weight")
    """The argument of the function that is the weight, by place and by name; not of compound ones."""
    source: tuple[int, str] = (0, "input")
    """The argument that the weight acts on."""
    is_product: bool = False
    """Whether the function is a product of matrices, which is a layer if a parameter is its second factor."""
    why_no_channels: str = ""
    """Why its outputs cannot be summed, empty where they can, or where another reason says so."""
    why_no_units: str = ""
    """Why the entries of the weight are no synapses from one unit to another, empty where they are."""
    is_stack: bool = False
    """Whether the weight is a stack of matrices, of which each entry of the batch meets one."""
    units_axis: int = -1
    """Axis of the input and of the output that counts channels, of a product."""

    @property
    def name(self) -> str:
        """Name of the module class, of a product that of its function."""
        return str(self.function.__name__) if self.is_product else self.module_type.__name__

    @property
    def channel_axis(self) -> int:
        """Axis of the output that counts channels, from the end, so that a batch axis may be absent."""
        return self.units_axis - self.kernel_axes

    @property
    def output_axis(self) -> int:
        """Axis of the weight that counts postsynaptic units."""
        return self.transposed + self.is_stack

    @property
    def input_axis(self) -> int:
        """Axis of the weight that counts presynaptic units: 1 in ``(out, in, *)``, 0 if transposed.

        One more in a stack of those.
        """
        return (not self.transposed) + self.is_stack

    @property
    def matrix_axes(self) -> int:
        """Number of axes of the weight."""
        return 2 + self.kernel_axes + self.is_stack

    @property
    def takes_a_parametrization(self) -> bool:
        """Whether the weight may be computed by a parametrization, and still be lowered."""
        return not self.is_compound and not self.why_no_units

    def slots_of_module(self, module: nn.Module) -> tuple[WeightSlot, ...]:
        """Return the slots of the weights that a layer module has."""
        return (WeightSlot(argument=self.argument),)

    def slots_of_call(self, node: Node) -> tuple[WeightSlot, ...]:
        """Return the slots of the weights in a call of the function."""
        return (WeightSlot(argument=self.argument),)

    def computed_shape(self, module: Any) -> tuple[int, ...]:
        """Return the shape of a weight that a parametrization computes; not of compound layers."""
        raise NotImplementedError

    def blocker(self, node: Node, module: nn.Module | None) -> str | None:
        """Return why the gradient of the weight is left alone, None if it is not.

        Args:
            node: the call.
            module: what it calls, None if it calls the function.
        """
        return None

    def lower(self, node: Node, module: Any, reads: Reads) -> None:
        """Rewrite a call of a module in place, as a call of the function on visible weights.

        Args:
            node: the call.
            module: what it calls.
            reads: brings the module's weights, biases and settings into the graph.
        """
        raise NotImplementedError

    def raised(self, call: LoweredCall) -> LayerCall | None:
        """Return the module's call that does what a call of the function does, None if there is none.

        Raises:
            NotHeld: an argument is no parameter or buffer that a module could hold.
        """
        return None


# raising


class NotHeld(Exception):  # noqa: N818
    """An argument is no parameter or buffer that a module could hold."""


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer's function on parameters, and the module that does the same."""

    path: str
    """Where the module was that the call came from."""
    held: Held
    make: Callable[[], nn.Module]
    """Makes the module, on the meta device, with everything but what it holds."""
    options: str
    """Options of the module, as text: two calls with different ones are calls of two layers."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the module is called with."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two calls calls of one layer."""
        return (*((name, id(value)) for name, value in self.held.items()), self.options)

    def module(self) -> nn.Module:
        """Make the layer."""
        made = self.make()
        for path, value in self.held.items():
            owner_path, _, name = path.rpartition(".")
            owner: Any = made.get_submodule(owner_path)
            table = owner._buffers if name in owner._buffers else owner._parameters
            table[name] = value
        if isinstance(made, nn.RNNBase):
            collect_flat_weights(made)
        return made


@dataclass(frozen=True)
class LoweredCall:
    """A call of a layer's function, and what its arguments hold."""

    node: Node
    root: nn.Module
    """What holds what the arguments read."""
    path: str
    """Where the module was that the call came from."""
    before: nn.Module
    """That module."""

    def hold(self, source: Any) -> Any:
        """Return the tensor that an argument reads, None where it is None.

        Raises:
            NotHeld: it reads something else.
        """
        if source is None:
            return None
        if not isinstance(source, Node) or source.op != "get_attr":
            raise NotHeld
        owner, _, name = str(source.target).rpartition(".")
        value = getattr(self.root.get_submodule(owner), name)
        if not isinstance(value, Tensor):
            raise NotHeld
        return value

    def parameters(self, sources: Mapping[str, Any]) -> Held:
        """Return the parameters that arguments read, by name, None where an argument is.

        Raises:
            NotHeld: one reads something else.
        """
        held = {name: self.hold(source) for name, source in sources.items()}
        if any(value is not None and not isinstance(value, nn.Parameter) for value in held.values()):
            raise NotHeld
        return held

    def weight(self, sources: Mapping[str, Any]) -> tuple[Held, Tensor]:
        """Return :meth:`parameters`, and the one among them that is called ``weight``.

        Raises:
            NotHeld: one reads something else, or there is no weight.
        """
        held = self.parameters(sources)
        if held["weight"] is None:
            raise NotHeld
        return held, held["weight"]

    def call(
        self,
        make: Callable[..., nn.Module],
        args: tuple[Any, ...],
        held: Held,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LayerCall:
        """Return the call, with ``inputs`` and ``kwargs``, of a module made with ``args`` and ``options``."""

        def made() -> nn.Module:
            return make(*args, **options, device="meta")

        described = repr((args, sorted(options.items())))
        return LayerCall(self.path, held, made, described, inputs, kwargs or {})


# what keeps a layer's call from being lowered

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooks_of(module: nn.Module) -> list[str]:
    """Return the kinds of hooks registered on a module, readable."""
    return [name.strip("_").replace("_", " ") for name in _HOOKS if getattr(module, name)]


def hooks_blocker(module: nn.Module) -> str | None:
    """Return why a module's hooks keep its call from being lowered, None if it has none."""
    hooks = hooks_of(module)
    return f"it has {' and '.join(hooks)}, which would no longer run" if hooks else None


def computed(name: str) -> str:
    """Say that a weight is not a parameter."""
    return f"its {name} is computed by a parametrization, not a parameter"


def own_method(module: nn.Module, kind: type[nn.Module], methods: tuple[str, ...]) -> str | None:
    """Return a message about the first method that a module does not share with its kind, None if it does."""
    for method in methods:
        if method in vars(module):
            return f"its {method} was replaced on the instance"
        if getattr(type(module), method, None) is not getattr(kind, method, None):
            return f"{type(module).__name__} has a {method} of its own, not {kind.__name__}'s"
    return None


def lowering_blocker(
    node: Node, module: nn.Module, kind: LayerKind, slots: tuple[WeightSlot, ...]
) -> str | None:
    """Return why a layer's call cannot be replaced by its function on visible weights, None if it can."""
    if blocker := hooks_blocker(module):
        return blocker
    for slot in slots:
        owner, _, name = slot.name.rpartition(".")
        held = name in module.get_submodule(owner)._parameters
        parametrized = is_parametrized(module, name) and "bias" in module._parameters
        if not held and not (kind.takes_a_parametrization and parametrized):
            return computed(slot.name)
    overridden = ("forward", "_conv_forward")
    if any(name in vars(module) for name in overridden):
        return "its forward was replaced on the instance"
    if any(getattr(type(module), m, None) is not getattr(kind.module_type, m, None) for m in overridden):
        return f"{type(module).__name__} has a forward of its own, not {kind.name}'s"
    if kind.takes_a_parametrization and len(node.args) + len(node.kwargs) != 1:
        return "it is called with more than its input (output_size), which its function does not take"
    return kind.blocker(node, module)
