"""The graph under construction in a symbolic trace: its nodes, and the checks that it makes at each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.fx import Node, Proxy, Tracer

from biofx.capture.attribute_reads import ReadLog
from biofx.capture.bytecode import CallSite, compares_identities, names_compared
from biofx.capture.context_tracking import ContextPatches, OpenContexts
from biofx.capture.graph_breaks import (
    COMPARES_IDENTITIES,
    DECIDES_BY_VALUE,
    READS_OUTSIDE,
    SWITCHED,
    Refusals,
)
from biofx.capture.proxies import StoredTensor, TrainingFlag, Value
from biofx.capture.symbolic_scalars import is_symbolic, plain_number, sources_in
from biofx.graph.guards import require_given, require_tensor
from biofx.graph.node_kinds import IS_NUMBER, changed_in_place
from biofx.model.modes import ModeSwitches
from biofx.torch_private import rename


class SymbolicBuilder(Tracer):
    """The part of a tracer that adds nodes; its proxies are :class:`biofx.capture.proxies.Value`.

    Args:
        root: the model.
        foreign: ids of tensors that must not find their way into the graph.
        prefix: path of ``root`` itself, for messages.
        kept: paths of modules that keep their eager forward, and why; None where none may.
        mode: the mode to trace, None for a graph that must be right in both.
        mode_switches: what train() and eval() change.
    """

    def __init__(
        self,
        root: nn.Module,
        foreign: frozenset[int],
        prefix: str,
        kept: dict[str, str] | None,
        mode: bool | None,
        mode_switches: ModeSwitches | None,
    ) -> None:
        super().__init__()
        self.kept = kept
        self.prefix = prefix
        self.log = ReadLog(self)
        self.refusals = Refusals(root, prefix, lambda: self._innermost)
        self.is_following = False
        """Whether what happens now is traced."""
        self.asks: set[tuple[str, str]] = set()
        """Paths of modules that let ``training`` decide, and of those whose it was."""
        self._foreign = foreign
        self._mode = mode
        self._mode_switches = mode_switches or ModeSwitches()
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._parameters = {path for path, _ in root.named_parameters()}
        self._stored: dict[int, tuple[str, Tensor]] = {
            id(tensor): (path, tensor) for path, tensor in (*root.named_parameters(), *root.named_buffers())
        }
        self._tensors: dict[str, StoredTensor] = {}
        self._shared: dict[Any, Node] = {}
        """Nodes that are added once: reads of numbers, and checks of values."""
        self._constants: set[str] = set()
        self._contexts = OpenContexts(self)
        self._patches = ContextPatches(lambda: self._contexts, self.stop)

    # refusals

    def refuse(self, what: str, remedy: str | None = None) -> NoReturn:
        """Raise a CaptureError for what the running line does; if the model catches it, again at the end."""
        self.refusals.refuse(what, remedy)

    def stop(self, what: str) -> NoReturn:
        """Refuse what a context does."""
        self.refuse(what, "Open it around the model instead")

    def where(self) -> str:
        """Return the module that is running, and the line."""
        return self.refusals.where()

    @property
    def _innermost(self) -> str:
        """Path of the module that is running."""
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""

    # attributes of modules

    def has_parameters(self, path: str) -> bool:
        """Whether a module has any, or is the whole model."""
        return not path or next(self._modules[path].parameters(), None) is not None

    def decide_by_mode(self, path: str) -> bool:
        """Return whether the module at a path is in training, to Python code that decides by it.

        The graph is right in one mode only then; see :class:`biofx.capture.both_modes.OneMode`. A module
        without parameters can as well be one call.
        """
        self.asks.add((self._innermost, path))
        if self._mode is None or not self.has_parameters(path):
            self.refuse(
                "does one thing in training and another in evaluation, and a graph would keep only one",
                remedy="Pass self.training on to a function that takes it",
            )
        return self._mode

    def attribute_read(self, owner: nn.Module, names: tuple[str, ...], value: Any, site: CallSite) -> Any:
        """Note that a forward reads an attribute; return what it gets."""
        path = self._paths.get(id(owner))
        if path is None:
            self.refuse(READS_OUTSIDE.format(".".join(names)))
        key = path, names[0]
        if key in self._mode_switches.unclear:
            self.refuse(SWITCHED.format(names[0]))
        pair = self._mode_switches.values.get(key)
        if pair is not None:
            value = value if self._mode is None else pair[0 if self._mode else 1]
            kinds = (float, int) if site.is_operand else (float,)
            if any(type(of_mode) not in kinds for of_mode in pair):
                self.decide_by_mode(path)
        return self.log.take(path, names, value, site)

    @property
    def is_current(self) -> bool:
        """Whether numbers of modules are followed now."""
        return self.is_following

    @property
    def is_switching(self) -> bool:
        """Whether a context is being entered or left."""
        return self._patches.is_switching

    def attribute_node(self, target: str) -> Node:
        """Return the node that reads a number of a module."""

        def make() -> Node:
            node = self.create_node("get_attr", target, (), {}, target.replace(".", "_"))
            node.meta[IS_NUMBER] = True
            return node

        return self._once(target, make)

    def auxiliary(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Add what is computed from numbers of modules."""
        return self.create_node("call_function", function, args, {})

    def expect(self, function: Callable[..., Any], operands: tuple[Any, ...], found: Any) -> None:
        """Note that numbers of modules decide something."""
        sources = sources_in(operands)
        for path, names in sorted(sources):
            if (path, names[0]) in self._mode_switches.values:
                self.decide_by_mode(path)
        self.log.decided_by(sources)

    # nodes and checks

    def write(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Add a call of a function."""
        given = tuple(arg if isinstance(arg, Node) else self.create_arg(arg) for arg in args)
        return self.create_node("call_function", function, given, {})

    def returns_a_tensor(self, path: str) -> bool:
        """Whether a module that is one call may be taken to return a tensor."""
        return path not in (self.kept or ())

    def expect_tensor(self, node: Node) -> None:
        """Let the graph check that the value of a node is a tensor."""
        self._once(
            (require_tensor, node),
            lambda: self.create_node("call_function", require_tensor, (node, self.where()), {}),
        )

    def expect_given(self, value: Value, name: str) -> None:
        """Let the graph check that a value is not None, which Python compares it with."""
        node = value.node
        if not value.may_be_none or (require_given, node) in self._shared:
            return
        if self.prefix:  # what Python hands to a region is not known
            self.refuse(f"asks whether {name} is None, which is not known before the graph runs")
        self._once(
            (require_given, node),
            lambda: self.create_node("call_function", require_given, (node, name, self.where()), {}),
        )

    def _expect_arguments(
        self, kind: type[nn.Module], forward: Callable[..., Any], given: Mapping[str, Any]
    ) -> None:
        """Let the graph check the arguments that the forward of a class compares with None."""
        if any(isinstance(value, Value) for value in given.values()) and compares_identities(kind):
            self.refuse(COMPARES_IDENTITIES)
        for name in names_compared(forward.__code__) if hasattr(forward, "__code__") else ():
            value = given.get(name)
            if isinstance(value, Value) and not isinstance(value, TrainingFlag):
                self.expect_given(value, f"argument {name!r}")

    def _once(self, key: Any, make: Callable[[], Node]) -> Node:
        """Return the node that is added once for a key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _read(self, tensor: Tensor) -> StoredTensor:
        path, _ = self._stored[id(tensor)]
        if path not in self._tensors:
            self._tensors[path] = StoredTensor(self.create_node("get_attr", path, (), {}), self, tensor)
        return self._tensors[path]

    # what torch.fx.Tracer calls

    def proxy(self, node: Node) -> Value:
        """Return the proxy of a node."""
        return Value(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        """Refuse to decide by a value."""
        self.refuse(DECIDES_BY_VALUE, "Rewrite that line")

    def iter(self, obj: Proxy) -> Any:
        """Refuse to iterate over a value."""
        self.refuse(
            "iterates over a value, whose length is not known before the graph runs", "Rewrite that line"
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """Return the proxy of a parameter or buffer that a module is asked for."""
        return self._read(attr_val) if id(attr_val) in self._stored else attr_val

    def create_arg(self, a: Any) -> Any:
        """Return an argument in the form that a node can hold."""
        if isinstance(a, Value) or is_symbolic(a):
            return a.node
        if isinstance(a, Tensor):
            if id(a) in self._stored:
                return self._read(a).node
            if id(a) in self._foreign:
                self.refuse("uses a tensor of the original model, which the result must not share")
            if isinstance(a, nn.Parameter):
                self.refuse(
                    "uses a parameter that no module holds", "Register it (nn.ParameterList holds several)"
                )
            node: Any = super().create_arg(a)
            if str(node.target).startswith("_tensor_constant"):
                self._constants.add(str(node.target))
            return node
        a = plain_number(a)
        if not isinstance(a, Proxy) and isinstance(a, dict) and type(a) is not dict:
            self.refuse(
                f"passes on or returns a {type(a).__name__}, which a graph would turn into a plain dict",
                "Use a dict, a tuple or a list",
            )
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Node:
        """Add a node, unless its effect depends on a context that would be lost."""
        if kind.startswith("call"):
            self._contexts.check()
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        if node.name == "self":  # a submodule of that name; the code of the graph means the module by it
            rename(node, "self_")
        for changed in changed_in_place(node):
            if changed.op == "get_attr" and changed.target in self._parameters:
                self.refuse("writes into a parameter, which rewritten graphs read before and after")
        return node
