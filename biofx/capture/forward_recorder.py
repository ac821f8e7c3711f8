"""Writing down what a forward does while it runs on example inputs.

Every torch function that is called becomes a node, every layer of torch's a call of its module. Real
tensors flow, so types, containers, lengths and optional arguments are what they are; only where a *value*
would decide what Python does next (``bool``, ``item``) recording
stops, and the module in which it happens keeps its own forward. It goes on unrecorded until it returns; what
was written of it is taken back and becomes one call. So one run finds all such modules.
"""

from __future__ import annotations

import operator
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from biofx.capture.attribute_reads import Place, reads_noticed
from biofx.capture.binding import bind_inputs
from biofx.capture.builtin_questions import WHEN_RECORDED, questions_answered
from biofx.capture.frames import BY_VALUE, Frame, GraphBreak
from biofx.capture.intercepted_calls import (
    OPTIONS,
    applications_handled,
    can_be_applied,
    checkpointed_module,
    checkpoints_handled,
)
from biofx.capture.maths import maths_followed
from biofx.capture.mode_switches import ModeSwitches
from biofx.capture.python_names import ASKS_WHETHER_THE_SAME, asks_whether_the_same
from biofx.capture.read_log import Read
from biofx.capture.region_capture import is_leaf, is_plain_layer
from biofx.capture.sized_by_values import gives_as_many_as_there_are, is_sized_by_values, leaves
from biofx.capture.switches import Switches, SwitchPatches
from biofx.capture.tensor_questions import (
    DECIDING,
    DESCRIBING,
    DESCRIPTIONS,
    DEVICES,
    KINDS,
    NUMBERS,
    SIZES,
)
from biofx.capture.tracked import Type, plain, plain_inside, tracked
from biofx.capture.type_limits import limits_followed
from biofx.capture.values import TORCH_FOLDER
from biofx.errors import InputError
from biofx.graph.graph_functions import AppliedFunction, call_checkpointed
from biofx.graph.node_kinds import changed_in_place
from biofx.layers.layer_kinds import LAYERS_OF_SEVERAL_INPUTS
from biofx.layers.obstacles import hooks_of
from biofx.layers.transformer_layers import pads_by_nesting, transformers_as_nodes
from biofx.model.graph_module import why_not_a_graph_module


class Recorder(TorchFunctionMode):
    """Records one run of a model.

    Args:
        root: the model.
        kept: paths of modules that keep their own forward; what they call gets graphs of its own.
        opaque: paths of modules not to look into.
        mode_switches: what train() and eval() change.
    """

    def __init__(
        self,
        root: nn.Module,
        kept: Mapping[str, str],
        opaque: frozenset[str],
        mode_switches: ModeSwitches | None = None,
    ) -> None:
        super().__init__()
        self.frame: Frame | None = None
        self.busy = False
        self.graphs: dict[str, list[Graph]] = {}
        self.reads: dict[str, list[Read]] = {}
        """What was read from attributes on the way to the graphs."""
        self.mode_switches = mode_switches or ModeSwitches()
        self.layers: dict[str, None] = {}
        self.calls: Counter[str] = Counter()
        """How often each module was called."""
        self.asks: set[tuple[str, str]] = set()
        """Paths of modules that asked for ``training``, and of those whose it was."""
        self.assigned: set[tuple[str, str]] = set()
        """Paths of modules and names of their buffers to which nodes assign."""
        self._root = root
        self._kept = kept
        self._opaque = opaque
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._patches = SwitchPatches(self._switches, self.stop, self.give_up)
        self.found: dict[str, str] = {}
        """Paths of further modules that must keep their own forward, and why."""
        self.asks_sizes = False
        """Whether a forward that is recorded could learn how large a tensor is."""
        self.is_stale = False
        """Whether what calls those modules, or what they call, has to be recorded anew."""
        self._failed: tuple[str, str] | None = None
        self.failed_in = ""
        """Path of the innermost module out of which an exception came."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the model, which must be in the mode to record.

        Raises:
            Keep: a module must keep its own forward.
            InputError: the model itself fails on these inputs.
        """
        with (
            self._patched(),
            self._patches.patched(),
            checkpoints_handled(self._checkpoint),
            transformers_as_nodes(),
            limits_followed(Type.limit, lambda value: isinstance(value, Type)),
            questions_answered(self._root.modules(), WHEN_RECORDED),
            reads_noticed(self._root.modules(), self),
            maths_followed(self._root.modules()),
            self,
        ):
            try:
                if "" in self._kept:
                    self._root(*args, **kwargs)
                else:
                    self._in_frame("", self._root, self._root.forward, args, dict(kwargs))
            except Exception as error:
                raise InputError(
                    f"example_inputs: the model fails on them: {type(error).__name__}: {error}"
                ) from error
        if self._failed is not None:
            path, caught = self._failed
            raise GraphBreak(
                path,
                f"{self._named(path)} catches {caught}, an exception that another input may not raise",
            )

    def stop(self, what: str) -> NoReturn:
        """Let the module that is running keep its own forward."""
        path = self.frame.innermost if self.frame is not None else ""
        raise GraphBreak(path, f"{self._where(path)} {what}")

    def following(self) -> Frame | None:
        """Return the frame into which what happens now belongs, None if it belongs into none."""
        frame = self.frame
        return None if self.busy or frame is None or frame.given_up is not None else frame

    @property
    def is_following(self) -> bool:
        """Whether what happens now belongs into a graph."""
        return self.following() is not None

    def attribute_read(self, owner: nn.Module, names: tuple[str, ...], value: Any, place: Place) -> Any:
        """Note that a forward reads an attribute; return what to go on with."""
        frame = self.following()
        if frame is None:
            return value
        try:
            return frame.attribute_read(owner, names, value, place)
        except GraphBreak as keep:
            self.give_up(keep)
            return value

    def path_of(self, module: nn.Module) -> str | None:
        """Return the path of a module in the whole model, None if it has none."""
        return self._paths.get(id(module))

    def give_up(self, refusal: BaseException) -> None:
        """Let the module that is running go on unrecorded, if it is not the whole model."""
        frame = self.frame
        if (
            not isinstance(refusal, GraphBreak)
            or frame is None
            or not refusal.path
            or refusal.path in self.found
        ):
            raise refusal
        self.found[refusal.path] = refusal.reason
        frame.given_up = refusal.path

    def _is_kept(self, path: str | None) -> bool:
        return path in self._kept or path in self.found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        frame = self.following()
        if frame is None:
            return _called(func, args, options)
        done: list[Any] = []
        try:
            return self._followed(frame, func, args, options, done)
        except GraphBreak as keep:
            self.give_up(keep)
            return done[0] if done else _called(func, args, options)

    def _followed(self, frame: Frame, func: Any, args: Any, options: dict[str, Any], done: list[Any]) -> Any:
        """Do what is asked and write it down; ``done`` holds what came out, should the writing stop."""
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return self._attribute(frame, func, name, args)
        if name in SIZES:
            return self._size(frame, func, name, args, options)
        if name in DECIDING:
            self.stop(f"asks for the value of a tensor ({name})")
        if func is torch._C._set_grad_enabled and not self._patches.is_switching:
            self.stop("switches gradients by itself")
        try:
            with self.quiet():
                found = _called(func, args, options)
        except Exception as error:
            self._failed = self._failed or (frame.innermost, f"{type(error).__name__}: {error}")
            raise
        done.append(found)
        if (
            isinstance(found, Tensor)
            or (isinstance(found, (tuple, list)) and _has_tensors(found))
            or name == "__setitem__"
        ):
            frame.switches.check()
            node = self._write(frame, func, name, args, options)
            if any(frame.is_parameter(changed) for changed in changed_in_place(node)):
                self.stop("writes into a parameter")
            if is_sized_by_values(func, name, args, options):
                node.meta[BY_VALUE] = True
            if isinstance(found, (tuple, list)) and gives_as_many_as_there_are(name):
                self.asks_sizes = True
                frame.expect(len, (node,), len(found))
            return frame.take(node, found, in_place=name.endswith("_"))
        if found is not None and (name in KINDS or name in NUMBERS or name in DESCRIPTIONS):
            return self._described(frame, func, name, args, options, found)
        if (
            found is not None
            and found is not NotImplemented  # tensor == None, on which Python goes on by itself
            and name not in DESCRIPTIONS
            and any(isinstance(x, Tensor) for x in leaves((args, options)))
        ):
            self.stop(f"asks for something that depends on the value of a tensor ({name})")
        return found

    def _write(
        self, frame: Frame, func: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Node:
        arguments, named = frame.argument(tuple(args)), frame.argument(options)
        if name in ("__getitem__", "__setitem__"):
            function = operator.getitem if name == "__getitem__" else operator.setitem
            return frame.node("call_function", function, arguments, named)
        if is_tensor_method_or_property(func):
            return frame.node("call_method", name, arguments, named)
        return frame.node("call_function", func, arguments, named)

    def _attribute(self, frame: Frame, func: Any, name: str, args: tuple[Any, ...]) -> Any:
        attribute = func.__self__.__name__
        if name == "__set__":
            self.stop(f"sets {attribute!r} of a tensor")
        with self.quiet():
            found = func(*args)
        if attribute in ("requires_grad", "grad_fn", "is_leaf") and not frame.is_stored(args[0]):
            self.stop(f"asks whether a tensor has a gradient ({attribute})")
        if attribute in DEVICES:
            frame.switches.devices_asked.add(args[0].device.type)
        self.asks_sizes |= attribute == "nbytes"
        if attribute in DESCRIBING:
            return frame.description(args[0], attribute, found)
        if attribute == "shape":
            return self._sizes(frame, args[0], found)
        if isinstance(found, Tensor):
            return frame.take(
                frame.node("call_function", getattr, (frame.node_of(args[0]), attribute)), found
            )
        return found

    def _described(
        self, frame: Frame, func: Any, name: str, args: Any, options: dict[str, Any], found: Any
    ) -> Any:
        """Return the answer to a question about types or devices, and let the graph ask it too."""
        if any(isinstance(leaf, Tensor) and not frame.knows(leaf) for leaf in leaves((args, options))):
            return found
        if name in KINDS:
            frame.expect(getattr(torch, name), (*args, *options.values()), found)
        elif name == "type":
            frame.expect(name, args, found)
        elif name in NUMBERS or isinstance(found, torch.dtype):

            def make() -> Node:
                made = self._write(frame, func, name, args, options)
                made.meta["auxiliary"] = True
                return made

            return frame.remembered(found, make)
        return found

    def _size(self, frame: Frame, func: Any, name: str, args: Any, options: dict[str, Any]) -> Any:
        with self.quiet():
            found = func(*(plain(argument) for argument in args), **options)
        if isinstance(found, torch.Size):
            return self._sizes(frame, args[0], found)
        if frame.is_stored(args[0]):
            return found
        self.asks_sizes = True
        if name == "__len__":  # Python makes it a number that remembers nothing
            frame.expect(len, (args[0],), found)
            return found
        method = {"nelement": "numel"}.get(name, name)
        rest, named = frame.argument(tuple(args[1:])), frame.argument(options)

        def make() -> Node:
            made = frame.node("call_method", method, (frame.node_of(args[0]), *rest), named)
            made.meta["auxiliary"] = True
            return made

        return tracked(found, frame, make)

    def _sizes(self, frame: Frame, tensor: Tensor, found: torch.Size) -> Any:
        if frame.is_stored(tensor):
            return found
        self.asks_sizes = True
        return torch.Size(
            tracked(size, frame, lambda place=place: frame.size_of(tensor, place))  # type: ignore[misc]
            for place, size in enumerate(found)
        )

    def _call(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        frame, path = self.frame, self._paths.get(id(module))
        if self.busy or (frame is not None and frame.given_up is not None):
            return original(module, *args, **kwargs)
        was_called = self.calls[path or ""] > 0
        if path is not None:
            self.calls[path] += 1
        if frame is None:
            return self._call_from_python(path, module, original, args, kwargs)
        if not self._succeeds(lambda: frame.local_path(module)) or path is None:
            return original(module, *args, **kwargs)
        if hooks_of(module) and not self._is_whole(path, module):
            self.found[path] = f"{self._where(path)} has {' and '.join(hooks_of(module))}"
        if self._is_called_whole(path, module, args, kwargs):
            return self._call_whole(frame, path, module, original, args, kwargs)
        mark = frame.mark()
        try:
            with frame.inside(module, path):
                if asks_whether_the_same(type(module)):
                    self._succeeds(lambda: self.stop(ASKS_WHETHER_THE_SAME))
                found = original(module, *args, **kwargs)
        except Exception as error:
            self.failed_in = self.failed_in or path
            if frame.given_up == path:
                frame.go_back(mark)
                self._failed = self._failed or (frame.innermost, f"{type(error).__name__}: {error}")
            raise
        if frame.given_up != path:
            return found
        self.is_stale |= was_called or next(module.children(), None) is not None
        frame.go_back(mark)
        return self._call_whole(frame, path, module, lambda *_, **__: found, args, kwargs)

    def _is_whole(self, path: str | None, module: nn.Module) -> bool:
        return self._is_kept(path) or path in self._opaque or is_leaf(module)

    def _is_called_whole(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> bool:
        return self._is_whole(path, module) or pads_by_nesting(module, args, kwargs)

    def _call_whole(
        self, frame: Frame, path: str, module: nn.Module, original: Any, args: Any, kwargs: Any
    ) -> Any:
        """Write a call of a module down as one node."""
        given: list[Any] = []

        def prepare() -> None:
            # what is handed on is the business of the module that calls, not of the one that is called
            frame.switches.check()
            given.extend((frame.argument(tuple(args)), frame.argument(dict(kwargs))))

        if not self._succeeds(prepare):
            return original(module, *args, **kwargs)
        with frame.inside(module, path):
            node = frame.node("call_module", frame.local_path(module), *given)
            with self._in_python() if self._is_kept(path) else self.quiet():
                found = original(module, *plain_inside(args), **plain_inside(kwargs))
            return frame.take(node, found)

    def _succeeds(self, write: Callable[[], object]) -> bool:
        """Write something down; whether that can be done, else the module that is running is given up."""
        try:
            write()
        except GraphBreak as keep:
            self.give_up(keep)
            return False
        return True

    def _checkpoint(
        self, original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Write a checkpointed call of a module down as one node; the module gets a graph of its own."""
        frame = self.following()
        written: list[Node] = []
        if frame is None or not self._succeeds(
            lambda: written.append(self._written_checkpoint(frame, function, args, kwargs))
        ):
            return original(function, *args, **kwargs)
        with self._in_python():
            found = original(function, *plain_inside(args), **plain_inside(kwargs))
        return frame.take(written[0], found)

    def _written_checkpoint(
        self, frame: Frame, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Node:
        module = checkpointed_module(function)
        if module is None or self._paths.get(id(module)) is None:
            self.stop("checkpoints (torch.utils.checkpoint) something else than the call of a submodule")
        if "context_fn" in kwargs:
            self.stop("checkpoints with a context_fn (torch.utils.checkpoint)")
        options = {name: value for name, value in kwargs.items() if name in OPTIONS}
        named = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        frame.switches.check()
        given = frame.argument(tuple(args)), frame.argument(named), frame.argument(options)
        return frame.node(
            "call_function", call_checkpointed, (frame.node("get_attr", frame.local_path(module)), *given)
        )

    def _apply(self, original: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write the application of an autograd function down."""
        frame = self.following()
        written: list[Node] = []
        if frame is None or not self._succeeds(
            lambda: written.append(self._applied(frame, function, args, kwargs))
        ):
            return original(*args, **kwargs)
        with self.quiet():
            found = original(*args, **kwargs)
        return frame.take(written[0], found)

    def _applied(self, frame: Frame, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        if not can_be_applied(function):
            self.stop(f"calls {function.__name__}, an autograd function with an apply() of its own")
        frame.switches.check()
        given = frame.argument(tuple(args)), frame.argument(dict(kwargs))
        return frame.node("call_function", AppliedFunction(function), *given)

    def _assign(self, module: nn.Module, name: str, value: Any) -> None:
        """Write an assignment to a buffer down; one that is not is noticed as a change of the module."""
        frame, path = self.following(), self._paths.get(id(module))
        before = vars(module).get("_buffers", {}).get(name)
        if frame is None or path is None or before is None or before is value:
            return

        def write() -> None:
            frame.switches.check()
            if frame.assign(module, path, name, value):
                self.assigned.add((path, name))

        if isinstance(value, Tensor):
            self._succeeds(write)

    def _call_from_python(
        self, path: str | None, module: nn.Module, original: Any, args: Any, kwargs: Any
    ) -> Any:
        if path is None or path in self._opaque or is_leaf(module):
            is_plain = path not in self._opaque and is_plain_layer(module)
            takes_more = isinstance(module, LAYERS_OF_SEVERAL_INPUTS)
            if path is not None and is_plain and (takes_more or (len(args) == 1 and not kwargs)):
                self.layers.setdefault(path)
            with self.quiet():
                return original(module, *args, **kwargs)
        only_holds = type(module).forward is nn.Sequential.forward
        if self._is_kept(path) or only_holds or next(module.parameters(), None) is None:
            return original(module, *args, **kwargs)
        if hooks_of(module):
            self.found[path] = f"{self._named(path)} has {' and '.join(hooks_of(module))}"
            return original(module, *args, **kwargs)
        if (reason := why_not_a_graph_module(module)) is not None:
            self.found[path] = f"{self._named(path)} is called from Python, and {reason}"
            return original(module, *args, **kwargs)
        return self._in_frame(path, module, lambda *a, **k: original(module, *a, **k), args, kwargs)

    def _in_frame(self, path: str, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        frame = Frame(self, path, module)
        outer, self.frame = self.frame, frame
        bound: list[Any] = [args, kwargs]
        try:
            if asks_whether_the_same(type(module)):
                raise GraphBreak(path, f"{self._named(path)} {ASKS_WHETHER_THE_SAME}")
            self._succeeds(lambda: bound.__setitem__(slice(None), bind_inputs(frame, module, args, kwargs)))
            found = forward(*bound[0], **bound[1])
            if frame.given_up is None and self._succeeds(lambda: frame.output(found)):
                self.graphs.setdefault(path, []).append(frame.graph)
                self.reads.setdefault(path, []).extend(frame.log.reads)
            else:
                self.is_stale = True
        finally:
            self.frame = outer
        return plain_inside(found)

    def _ask(self, module: nn.Module) -> None:
        """Note that something may depend on the mode that a module is in."""
        frame, path = self.following(), self._paths.get(id(module))
        if frame is not None and path is not None:
            self.asks.add((frame.innermost, path))
            if path in self.mode_switches.stuck and is_leaf(module):
                frame.note_flag(module)

    def _switches(self) -> Switches | None:
        frame = self.following()
        return None if frame is None else frame.switches

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Run something of torch's own, which is one node."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    @contextmanager
    def _in_python(self) -> Iterator[None]:
        """Run a forward that stays in Python; what it calls gets graphs of its own."""
        outer, self.frame = self.frame, None
        try:
            yield
        finally:
            self.frame = outer

    @contextmanager
    def _patched(self) -> Iterator[None]:
        original_call, original_set = nn.Module.__call__, nn.Module.__setattr__
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._call(module, original_call, args, kwargs)

        def set_attribute(module: nn.Module, name: str, value: Any) -> None:
            recorder._assign(module, name, value)
            original_set(module, name, value)

        def training(module: nn.Module) -> Any:
            recorder._ask(module)
            held = vars(module)
            return held["training"] if "training" in held else module.__getattr__("training")

        def set_training(module: nn.Module, flag: bool) -> None:
            vars(module)["training"] = flag

        module_class: Any = nn.Module
        module_class.training = property(training, set_training)
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__setattr__ = set_attribute  # type: ignore[assignment, method-assign]
        try:
            with applications_handled(self._apply):
                yield
        finally:
            del module_class.training
            nn.Module.__call__ = original_call  # type: ignore[method-assign]
            nn.Module.__setattr__ = original_set  # type: ignore[method-assign]

    def _named(self, path: str) -> str:
        kind = type(self._root.get_submodule(path)).__name__
        return f"module {path!r} ({kind})" if path else f"the model ({kind})"

    def _where(self, path: str) -> str:
        named = self._named(path)
        for frame in traceback.extract_stack(sys._getframe(2))[::-1]:
            if not frame.filename.startswith(TORCH_FOLDER) and not frame.filename.startswith(_OWN_FOLDER):
                return f"{named}, {frame.filename}:{frame.lineno} ({frame.line})"
        return named


_OWN_FOLDER = str(Path(__file__).parent.parent)


def _called(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if func is Tensor.type:  # the one method that does not let a stand-in for a type take over
        args, options = plain_inside(args), plain_inside(options)
    return func(*args, **options)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves(value))
