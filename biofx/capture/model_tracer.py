"""A symbolic tracer that writes down, or refuses, what the stock one loses.

Contexts of gradients and autocast are nodes, and so is a call of an autograd function. Contexts that a graph
has no place for and checkpointing are refused with the line of the model that asks for them.
"""

from __future__ import annotations

import dis
import functools
import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer

from biofx.capture.attribute_reads import Place, reads_noticed
from biofx.capture.builtin_questions import WHEN_TRACED, questions_answered
from biofx.capture.identity_questions import is_asked_about_next, names_asked_about
from biofx.capture.intercepted_calls import applications_handled, can_be_applied, checkpoints_handled
from biofx.capture.maths import maths_followed
from biofx.capture.mode_switches import SWITCHED, ModeSwitches
from biofx.capture.python_names import ASKS_WHETHER_THE_SAME, asks_whether_the_same
from biofx.capture.read_log import ReadLog
from biofx.capture.recording import Recorder, leaves_of
from biofx.capture.side_effects import Watch
from biofx.capture.state_of_others import Unknowns
from biofx.capture.switches import Switches, SwitchPatches
from biofx.capture.tracked import is_tracked_value, plain_number, sources_in
from biofx.capture.type_limits import limits_followed
from biofx.capture.values import TORCH_FOLDER, StoredTensor, TrainingFlag, Value
from biofx.errors import CaptureError
from biofx.graph.graph_functions import AppliedFunction, limit_of
from biofx.graph.guards import require_default, require_given
from biofx.graph.node_kinds import IS_NUMBER, changed_in_place
from biofx.layers.obstacles import hooks_of
from biofx.layers.transformer_layers import can_be_looked_into, pads_by_nesting, transformers_as_nodes
from biofx.progress import advance


class StartAgain(BaseException):
    """A module that cannot be traced is part of the graph already, by an earlier call that could be."""

    def __init__(self, kept: dict[str, str]) -> None:
        super().__init__()
        self.kept = kept


TOUCHES_STATE = (
    "touches what a module that keeps its own forward remembers from call to call, which a graph would not do"
)
_REMEDY = (
    "what Python decides from values cannot be part of a graph. Rewrite that line, or name the module in "
    "opaque=[…] to keep it as one call"
)


class ModelTracer(Tracer):
    """Traces one model; its proxies are :class:`biofx.values.Value`."""

    def __init__(
        self,
        root: nn.Module,
        opaque: frozenset[str],
        foreign: frozenset[int],
        prefix: str,
        kept: dict[str, str] | None,
        watch: Watch,
        mode: bool | None = None,
        unknowns: Unknowns | None = None,
        mode_switches: ModeSwitches | None = None,
    ) -> None:
        super().__init__()
        self._mode = mode
        self._mode_switches = mode_switches or ModeSwitches()
        self.log = ReadLog(self)
        self._numbers: dict[str, Node] = {}
        self.is_following = False
        """Whether what happens now is traced."""
        self.asks: set[tuple[str, str]] = set()
        """Paths of modules that let ``training`` decide, and of those whose it was."""
        self.refusals: list[CaptureError] = []
        self.kept = kept
        self.prefix = prefix
        self._watch = watch
        self._unknowns = unknowns
        self.calls: list[str] = []
        self.known_tensors: set[Node] = set()
        self.known_values: set[Node] = set()
        self._opaque = opaque
        self._foreign = foreign
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._stored: dict[int, tuple[str, Tensor]] = {}
        self._parameters = {path for path, _ in root.named_parameters()}
        for path, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._stored[id(tensor)] = (path, tensor)
        self._reads: dict[str, StoredTensor] = {}
        self._constants: set[str] = set()
        self._switches = Switches(self)
        self._patches = SwitchPatches(lambda: self._switches, self.refuse)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Let everything that a forward does reach this tracer."""
        with ExitStack() as stack:
            stack.enter_context(self._flags_as_nodes())
            stack.enter_context(questions_answered(self._modules.values(), WHEN_TRACED))
            stack.enter_context(applications_handled(self._apply))
            stack.enter_context(transformers_as_nodes())
            stack.enter_context(self._patches.patched())
            stack.enter_context(checkpoints_handled(self._refuse_checkpoint))
            stack.enter_context(limits_followed(self._limit, lambda value: isinstance(value, Value)))
            stack.enter_context(reads_noticed(self._modules.values(), self))
            stack.enter_context(maths_followed(self._modules.values()))
            stack.enter_context(Recorder(self))
            self.is_following = True
            try:
                yield
            finally:
                self.is_following = False

    def _limit(self, dtype: Value, name: str) -> Proxy:
        return self.create_proxy("call_function", limit_of, (dtype, name), {})

    def has_parameters(self, path: str) -> bool:
        """Whether a module has any, or is the whole model."""
        return not path or next(self._modules[path].parameters(), None) is not None

    def decide_by_mode(self, path: str) -> bool:
        """Return whether the module at a path is in training, to Python code that decides by it.

        What is traced holds in one mode only then; see :class:`biofx.capture.both_modes.OneMode`. A module
        without parameters had better be one call.
        """
        running = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
        self.asks.add((running, path))
        if self._mode is None or not self.has_parameters(path):
            self.refuse(
                "does one thing in training and another in evaluation, and a graph would keep only one",
                remedy="Pass self.training on to a function that takes it",
            )
        return self._mode

    def attribute_read(self, owner: nn.Module, names: tuple[str, ...], value: Any, place: Place) -> Any:
        """Note that a forward reads an attribute; return what to go on with."""
        path = self._paths.get(id(owner))
        if path is None:
            self.refuse(f"reads attribute {'.'.join(names)!r} of a module outside of it")
        key = path, names[0]
        if key in self._mode_switches.unclear:
            self.refuse(SWITCHED.format(names[0]))
        pair = self._mode_switches.values.get(key)
        if pair is not None:
            value = value if self._mode is None else pair[0 if self._mode else 1]
            kinds = (float, int) if place.is_operand else (float,)
            if any(type(of_mode) not in kinds for of_mode in pair):
                self.decide_by_mode(path)
        return self.log.take(path, names, value, place)

    @property
    def is_current(self) -> bool:
        """Whether numbers of modules are followed just now."""
        return self.is_following

    def attribute_node(self, target: str) -> Node:
        """Return the node that reads a number of a module."""
        if target not in self._numbers:
            self._numbers[target] = self.create_node("get_attr", target, (), {}, target.replace(".", "_"))
            self._numbers[target].meta[IS_NUMBER] = True
        return self._numbers[target]

    def auxiliary(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write down what is computed from numbers of modules."""
        return self.create_node("call_function", function, args, {})

    def expect(self, function: Callable[..., Any], operands: tuple[Any, ...], found: Any) -> None:
        """Note that numbers of modules decide something."""
        sources = sources_in(operands)
        for path, names in sorted(sources):
            if (path, names[0]) in self._mode_switches.values:
                self.decide_by_mode(path)
        self.log.decided_by(sources)

    @property
    def is_switching(self) -> bool:
        """Whether a context that is written down switches gradients just now."""
        return self._patches.is_switching

    def write(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write a call of a function down."""
        found: Node = self.create_node(
            "call_function",
            function,
            tuple(a if isinstance(a, Node) else self.create_arg(a) for a in args),
            {},
        )
        return found

    def stop(self, what: str) -> NoReturn:
        """Refuse what a context does."""
        self.refuse(what, "Open it around the model instead")

    def refuse(self, what: str, remedy: str | None = None) -> NoReturn:
        """Raise a CaptureError, and again in the end if the model swallows it."""
        path = self._innermost
        keep = (
            f"name the module in opaque=[{path!r}] to keep it as one call"
            if path
            else "put the lines in a submodule and name that in opaque=[…]"
        )
        self._refuse(f"{self.where()} {what}. {f'{remedy}, or {keep}' if remedy else keep.capitalize()}")

    def refuse_at(self, path: str, what: str) -> NoReturn:
        """Do the same for a call of a module, which is not running yet."""
        whole = ".".join(part for part in (self.prefix, path) if part)
        self._refuse(f"{self.named(path)} {what}, or name it in opaque=[{whole!r}] to keep it as one call")

    def _refuse(self, message: str) -> NoReturn:
        error = CaptureError(message)
        self.refusals.append(error)
        raise error

    def where(self) -> str:
        """Name the module call that is being traced, and the line of it that is running."""
        return self.describe(list(traceback.walk_stack(None)))

    def describe(self, frames: Sequence[tuple[Any, int]]) -> str:
        """Name the innermost of ``frames`` (innermost first) that runs the user's model."""
        for frame, line in frames:
            first = frame.f_code.co_varnames[:1]  # self, by whatever name
            module = frame.f_locals.get(first[0]) if first else None
            file = frame.f_code.co_filename
            if (
                id(module) in self._paths
                and isinstance(module, nn.Module)
                and hasattr(type(module), frame.f_code.co_name)  # it is a method of the module's
                and not file.startswith(TORCH_FOLDER)
            ):
                source = linecache.getline(file, line).strip()
                return f"{self._named(module)}, {file}:{line} ({source})" if source else self._named(module)
        return "the model's forward"

    def _named(self, module: nn.Module) -> str:
        return self.named(self._paths.get(id(module), ""))

    def named(self, path: str) -> str:
        """Name a module of the traced one, for a reader who sees the whole model."""
        whole = ".".join(part for part in (self.prefix, path) if part)
        kind = type(self._modules[path]).__name__
        return f"module {whole!r} ({kind})" if whole else f"the model ({kind})"

    def refusal_of(self, error: Exception) -> CaptureError:
        """Return what to tell of an exception that came out of a forward."""
        if isinstance(error, CaptureError):
            return error
        frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        return CaptureError(f"cannot capture {self.describe(frames[::-1])}: {error}; {_REMEDY}")

    @property
    def _innermost(self) -> str:
        inner = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
        return ".".join(part for part in (self.prefix, inner) if part)

    def returns_a_tensor(self, path: str) -> bool:
        """Whether a module that is one call may be taken to return a tensor."""
        return path not in (self.kept or ())

    def expect_given(self, value: Value, name: str) -> None:
        """Let the graph check that a value is not None, which Python goes on to ask about."""
        if not value.may_be_none or value.node in self.known_values:
            return
        if self.prefix:  # what Python hands to a region is not known
            self.refuse(f"asks whether {name} is None, which is not known before the graph runs")
        self.known_values.add(value.node)
        self.create_node("call_function", require_given, (value.node, name, self.where()), {})

    def _expect_arguments(
        self, kind: type[nn.Module], forward: Callable[..., Any], given: Mapping[str, Any]
    ) -> None:
        """Let the graph check the arguments that the forward of a class compares with None."""
        if any(isinstance(value, Value) for value in given.values()) and asks_whether_the_same(kind):
            self.refuse(ASKS_WHETHER_THE_SAME)
        for name in names_asked_about(forward.__code__) if hasattr(forward, "__code__") else ():
            value = given.get(name)
            if isinstance(value, Value) and not isinstance(value, TrainingFlag):
                self.expect_given(value, f"argument {name!r}")

    # What follows overrides torch.fx.Tracer, which calls it.

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        """Trace, and check that nothing but the model's own tensors is changed in place."""
        graph = super().trace(root, concrete_args)
        if _catches(root):
            self.refuse(_CATCHING, "Do without")
        if _takes_nothing_in(graph):
            self.refuse("takes optional arguments alone, of which it is not known which ones will be given")
        for node in graph.nodes:
            if isinstance(node.type, str):
                node.type = None  # an annotation as text, which torch.jit.script could not make sense of
            for changed in changed_in_place(node):
                if changed.op == "get_attr" and changed.target in self._constants:
                    raise CaptureError(
                        f"the model's forward changes in place ({node.name}) a tensor that no module holds "
                        "and no call makes anew. Make it with torch.tensor, or make it a buffer"
                    )
        return graph

    def proxy(self, node: Node) -> Value:
        """Return what stands for a node."""
        return Value(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        """Refuse to decide anything by a value."""
        self.refuse("decides by a value, which is not known before the graph runs", "Rewrite that line")

    def iter(self, obj: Proxy) -> Any:
        """Refuse to iterate over a value."""
        self.refuse(
            "iterates over a value, whose length is not known before the graph runs", "Rewrite that line"
        )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module becomes one call."""
        whole = (
            module_qualified_name in self._opaque
            or module_qualified_name in (self.kept or ())
            or isinstance(m, torch.jit.ScriptModule)
        )
        return whole or (super().is_leaf_module(m, module_qualified_name) and not can_be_looked_into(m))

    def path_of_module(self, mod: nn.Module) -> str:
        """Return the path of a module."""
        if id(mod) not in self._paths:
            self.refuse(
                f"calls a {type(mod).__name__} that is not a submodule of the model",
                "Make it one (nn.ModuleList and nn.ModuleDict hold several)",
            )
        path: str = self._paths[id(mod)]
        return path

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module: one node for a leaf, its own forward otherwise."""
        path = self.path_of_module(m)
        advance("capture", len(self._paths))
        if self.is_leaf_module(m, path):
            self.calls.append(path)
            found = super().call_module(m, forward, args, kwargs)
            return self._expect_result(found) if path in (self.kept or ()) else found
        mark = _Mark.of(self)
        try:
            if hooks := hooks_of(m):
                self.refuse_at(
                    path,
                    f"has {' and '.join(hooks)}, which a graph runs once, while it is captured, and never "
                    "again. Remove them first",
                )
            self.calls.append(path)
            own = inspect.unwrap(type(m).forward)
            names = own.__code__.co_varnames[1:] if hasattr(own, "__code__") else ()
            self._expect_arguments(type(m), own, dict(zip(names, args, strict=False)) | kwargs)
            if pads_by_nesting(m, args, kwargs):
                forward = functools.partial(self._call_whole, path)
            found = super().call_module(m, forward, args, kwargs)
            if self.kept is not None and len(self.refusals) > mark.refusals:
                raise self.refusals[mark.refusals]
            if _catches(m):
                self.refuse_at(path, f"{_CATCHING}. Do without")
            if self._unknowns is not None and self._unknowns.are_touched():
                self.refuse_at(path, f"{TOUCHES_STATE}. Let that module do so itself")
            return found
        except Exception as error:
            if self.kept is None:
                raise
            first = next(iter(self.refusals[mark.refusals :]), None)
            self.kept[path] = str(first or self.refusal_of(error))
            if path in self.calls[: mark.calls] or self._unknowns is not None:
                raise StartAgain(self.kept) from error
            self._go_back(mark, m)
        self.calls.append(path)
        return self._expect_result(super().call_module(m, forward, args, kwargs))

    def _expect_result(self, found: Any) -> Any:
        """Let the graph check what a module that keeps its own forward returns, if it is asked about."""
        frames = (frame for frame, _ in traceback.walk_stack(None))
        caller = next(frame for frame in frames if not _is_on_behalf(frame))
        if isinstance(found, Value) and is_asked_about_next(caller):
            self.expect_given(found, "what it returns")
        return found

    def _go_back(self, mark: _Mark, module: nn.Module) -> None:
        """Forget what was traced since a mark."""
        for node in reversed(self.graph.nodes):
            if node is mark.last:
                break
            self.graph.erase_node(node)
        self._reads = {path: read for path, read in self._reads.items() if not read.node._erased}
        self.known_tensors = {node for node in self.known_tensors if not node._erased}
        self.known_values = {node for node in self.known_values if not node._erased}
        self._numbers = {target: node for target, node in self._numbers.items() if not node._erased}
        self.log.forget(mark.reads)
        for flag in self._flags.values():
            flag.forget_erased()
        for path in self.calls[mark.calls :]:
            self.num_calls[path] -= 1
        del self.refusals[mark.refusals :]
        del self.calls[mark.calls :]
        self.module_stack.clear()
        self.module_stack.update(mark.module_stack)
        self._watch.restore(module)
        self._switches.forget_loose()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """Return what stands for a parameter or buffer that a module is asked for."""
        return self._read(attr_val) if id(attr_val) in self._stored else attr_val

    def create_arg(self, a: Any) -> Any:
        """Return an argument in the form that a node can hold."""
        if isinstance(a, Value) or is_tracked_value(a):
            return a.node
        if isinstance(a, Tensor):
            if id(a) in self._stored:
                return self._read(a).node
            if id(a) in self._foreign:
                self.refuse("uses a tensor of the model that went in, which the result must not share")
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
        """Write a node down, unless its effect depends on a context that would be lost."""
        if kind.startswith("call"):
            self._switches.check()
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        if node.name == "self":  # a submodule of that name; the code of the graph means the module by it
            node._rename("self_")
        for changed in changed_in_place(node):
            if changed.op == "get_attr" and changed.target in self._parameters:
                self.refuse("writes into a parameter, which rewritten graphs read before and after")
        return node

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, Any]:
        """Return the stand-ins for the arguments, optional ones that steer Python with their defaults.

        An argument that is None, a flag or a text by default is one that forwards look at before they
        compute; and what ``**kwargs`` might hold is not known. So these count as not given.
        """
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
        if inspect.unwrap(root_fn) is not root_fn and not plain:
            self.refuse("is decorated, and takes more than plain arguments, which a graph cannot follow")
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for place, value in enumerate(args):
            if not isinstance(value, Proxy):
                continue
            name = str(value.node.target)
            if name.startswith("**"):
                self.graph.erase_node(value.node)
                args[place] = {}
            elif name in parameters and _steers(parameters[name].default):
                default = args[place] = parameters[name].default
                self.create_node("call_function", require_default, (value.node, default, name), {})
        given = {str(value.node.target): value for value in args if isinstance(value, Value)}
        self._expect_arguments(type(self.root), inspect.unwrap(root_fn), given)
        return function, args

    def _call_whole(self, path: str, *args: Any, **kwargs: Any) -> Proxy:
        return self.create_proxy("call_module", path, args, kwargs)

    def _read(self, tensor: Tensor) -> StoredTensor:
        path, _ = self._stored[id(tensor)]
        if path not in self._reads:
            self._reads[path] = StoredTensor(self.create_node("get_attr", path, (), {}), self, tensor)
        return self._reads[path]

    def _refuse_checkpoint(self, *call: Any) -> NoReturn:
        self.refuse(
            "uses torch.utils.checkpoint, which a graph would drop",
            "Switch checkpointing off first, or give example_inputs",
        )

    @contextmanager
    def _flags_as_nodes(self) -> Iterator[None]:
        flags = {path: module.training for path, module in self._modules.items()}
        shown = self._flags = {path: TrainingFlag(self, path) for path in self._modules}
        for path, module in self._modules.items():
            module.__dict__["training"] = shown[path]
        try:
            yield
        finally:
            switched = [path for path, m in self._modules.items() if not isinstance(m.training, TrainingFlag)]
            for path, module in self._modules.items():
                module.__dict__["training"] = flags[path]
        if switched:
            raise CaptureError(
                f"the model's forward switches module {switched[0]!r} to training or evaluation, which a "
                "graph would do once and never again. Do it outside the forward, or name the module that "
                "does it in opaque=[…]"
            )

    def _apply(self, original: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write an autograd.Function down as one call, even one without an operation of its own."""
        if any(isinstance(leaf, Value) for leaf in leaves_of((args, kwargs))):
            if not can_be_applied(function):
                self.refuse(f"calls {function.__name__}, an autograd function with an apply() of its own")
            return self.create_proxy("call_function", AppliedFunction(function), args, kwargs)
        return original(*args, **kwargs)


@dataclass(frozen=True)
class _Mark:
    """How far a tracer had come before it entered a module."""

    last: Node | None
    refusals: int
    calls: int
    module_stack: dict[str, Any]
    reads: int

    @classmethod
    def of(cls, tracer: ModelTracer) -> _Mark:
        last = next(iter(reversed(tracer.graph.nodes)), None)
        stack = dict(tracer.module_stack)
        return cls(last, len(tracer.refusals), len(tracer.calls), stack, len(tracer.log.reads))


_CATCHING = "catches exceptions, and a graph does not know which way that goes"


def _catches(module: nn.Module) -> bool:
    """Whether the forward of a module has an ``except`` clause."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any(code.co_code[::2].count(number) for number in _EXCEPTS)


_EXCEPTS = [dis.opmap[name] for name in ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH") if name in dis.opmap]


def _takes_nothing_in(graph: Graph) -> bool:
    """Whether a graph has arguments, one of them None by default, and computes nothing with any."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    users = [user for node in inputs for user in node.users]
    guarded = [user for user in users if user.target is require_default]
    return len(guarded) == len(users) and any(user.args[1] is None for user in guarded)


def _is_on_behalf(frame: FrameType) -> bool:
    """Whether a frame runs code of torch's or of ours."""
    return frame.f_code.co_filename.startswith((TORCH_FOLDER, _OWN_FOLDER))


_OWN_FOLDER = str(Path(__file__).parent)


def _steers(default: object) -> bool:
    return default is None or isinstance(default, (bool, str))
