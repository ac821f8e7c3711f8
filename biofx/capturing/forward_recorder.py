"""Writing down what a forward does while it runs on example inputs.

Every torch function that is called becomes a node, every layer of torch's a call of its module. Real
tensors flow, so types, containers, lengths and optional arguments are what they are; only where a *value*
would decide what Python does next (``bool``, ``item``) recording
stops, and the module in which it happens keeps its own forward.
"""

from __future__ import annotations

import operator
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from biofx.capturing.binding import bind_inputs
from biofx.capturing.builtin_questions import WHEN_RECORDED, questions_answered
from biofx.capturing.checkpoints import (
    OPTIONS,
    checkpointed_module,
    checkpoints_handled,
)
from biofx.capturing.frames import BY_VALUE, Frame, Keep
from biofx.capturing.python_names import ASKS_WHETHER_THE_SAME, asks_whether_the_same
from biofx.capturing.region_capture import is_plain_layer
from biofx.capturing.sized_by_values import gives_as_many_as_there_are, is_sized_by_values, leaves
from biofx.capturing.switches import Switches, SwitchPatches
from biofx.capturing.tensor_questions import DECIDING, DESCRIPTIONS, DEVICES, SIZES
from biofx.capturing.tracked import plain, tracked
from biofx.capturing.values import TORCH_FOLDER
from biofx.errors import InputError
from biofx.graph.autograd_functions import AppliedFunction, can_be_applied
from biofx.graph.checkpointing import call_checkpointed
from biofx.graph.in_place import changed_in_place
from biofx.layers.obstacles import hooks_of


class Recorder(TorchFunctionMode):
    """Records one run of a model.

    Args:
        root: the model.
        kept: paths of modules that keep their own forward; what they call gets graphs of its own.
        opaque: paths of modules not to look into.
    """

    def __init__(self, root: nn.Module, kept: Mapping[str, str], opaque: frozenset[str]) -> None:
        super().__init__()
        self.frame: Frame | None = None
        self.busy = False
        self.graphs: dict[str, list[Graph]] = {}
        self.layers: dict[str, None] = {}
        self.paths_called: set[str] = set()
        self.assigned: set[tuple[str, str]] = set()
        """Paths of modules and names of their buffers to which nodes assign."""
        self._root = root
        self._kept = kept
        self._opaque = opaque
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._patches = SwitchPatches(self._switches, self.stop)
        self._failed: tuple[str, str] | None = None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the model, which must be in the mode to record.

        Raises:
            Keep: a module must keep its own forward.
            InputError: the model itself fails on these inputs.
        """
        answers = questions_answered(self._root.modules(), WHEN_RECORDED)
        with self._patched(), self._patches.patched(), checkpoints_handled(self._checkpoint), answers, self:
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
            raise Keep(
                path,
                f"{self._named(path)} catches {caught}, an exception that another input may not raise",
            )

    def stop(self, what: str) -> NoReturn:
        """Let the module that is running keep its own forward."""
        path = self.frame.innermost if self.frame is not None else ""
        raise Keep(path, f"{self._where(path)} {what}")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        frame = self.frame
        if frame is None or self.busy:
            return func(*args, **options)
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
                found = func(*args, **options)
        except Exception as error:
            self._failed = self._failed or (frame.innermost, f"{type(error).__name__}: {error}")
            raise
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
                frame.expect(len, (node,), len(found))
            return frame.take(node, found, in_place=name.endswith("_"))
        if (
            found is not None
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
        if attribute == "shape":
            return self._sizes(frame, args[0], found)
        if isinstance(found, Tensor):
            return frame.take(
                frame.node("call_function", getattr, (frame.node_of(args[0]), attribute)), found
            )
        return found

    def _size(self, frame: Frame, func: Any, name: str, args: Any, options: dict[str, Any]) -> Any:
        with self.quiet():
            found = func(*(plain(argument) for argument in args), **options)
        if isinstance(found, torch.Size):
            return self._sizes(frame, args[0], found)
        if frame.is_stored(args[0]):
            return found
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
        return torch.Size(
            tracked(size, frame, lambda place=place: frame.size_of(tensor, place))  # type: ignore[misc]
            for place, size in enumerate(found)
        )

    def _call(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self._paths.get(id(module))
        if self.busy:
            return original(module, *args, **kwargs)
        if path is not None:
            self.paths_called.add(path)
        if self.frame is None:
            return self._call_from_python(path, module, original, args, kwargs)
        frame = self.frame
        whole = path in self._kept or path in self._opaque or _is_leaf(module)
        # what is handed on is the business of the module that calls, not of the one that is called
        given = (frame.argument(tuple(args)), frame.argument(dict(kwargs))) if whole else ((), {})
        local = frame.enter(module)
        try:
            if not whole and hooks_of(module):
                self.stop(f"has {' and '.join(hooks_of(module))}")
            if not whole and asks_whether_the_same(type(module)):
                self.stop(ASKS_WHETHER_THE_SAME)
            if not whole:
                return original(module, *args, **kwargs)
            frame.switches.check()
            node = frame.node("call_module", local, *given)
            with self._in_python() if path in self._kept else self.quiet():
                found = original(module, *args, **kwargs)
            return frame.take(node, found)
        finally:
            frame.stack.pop()

    def _checkpoint(
        self, original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Write a checkpointed call of a module down as one node; the module gets a graph of its own."""
        frame = self.frame
        if frame is None or self.busy:
            return original(function, *args, **kwargs)
        module = checkpointed_module(function)
        if module is None or self._paths.get(id(module)) is None:
            self.stop("checkpoints (torch.utils.checkpoint) something else than the call of a submodule")
        if "context_fn" in kwargs:
            self.stop("checkpoints with a context_fn (torch.utils.checkpoint)")
        options = {name: value for name, value in kwargs.items() if name in OPTIONS}
        named = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        frame.switches.check()
        given = frame.argument(tuple(args)), frame.argument(named), frame.argument(options)
        local = frame.enter(module)
        frame.stack.pop()  # how it is called is the business of the module that calls
        node = frame.node("call_function", call_checkpointed, (frame.node("get_attr", local), *given))
        with self._in_python():
            found = original(function, *args, **kwargs)
        return frame.take(node, found)

    def _assign(self, module: nn.Module, name: str, value: Any) -> None:
        """Write an assignment to a buffer down; one that is not is noticed as a change of the module."""
        frame, path = self.frame, self._paths.get(id(module))
        before = vars(module).get("_buffers", {}).get(name)
        if frame is None or self.busy or path is None or before is None or before is value:
            return
        if isinstance(value, Tensor):
            frame.switches.check()
            if frame.assign(module, path, name, value):
                self.assigned.add((path, name))

    def _call_from_python(
        self, path: str | None, module: nn.Module, original: Any, args: Any, kwargs: Any
    ) -> Any:
        if path is None or path in self._opaque or _is_leaf(module):
            is_plain = path not in self._opaque and is_plain_layer(module)
            if path is not None and is_plain and len(args) == 1 and not kwargs:
                self.layers.setdefault(path)
            with self.quiet():
                return original(module, *args, **kwargs)
        only_holds = type(module).forward is nn.Sequential.forward
        if path in self._kept or only_holds or next(module.parameters(), None) is None:
            return original(module, *args, **kwargs)
        if hooks_of(module):
            raise Keep(path, f"{self._named(path)} has {' and '.join(hooks_of(module))}")
        return self._in_frame(path, module, lambda *a, **k: original(module, *a, **k), args, kwargs)

    def _in_frame(self, path: str, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if asks_whether_the_same(type(module)):
            raise Keep(path, f"{self._named(path)} {ASKS_WHETHER_THE_SAME}")
        outer, self.frame = self.frame, Frame(self, path, module)
        try:
            positional, named = bind_inputs(self.frame, module, args, kwargs)
            found = forward(*positional, **named)
            self.frame.output(found)
            self.graphs.setdefault(path, []).append(self.frame.graph)
        finally:
            self.frame = outer
        return _untracked(found)

    def _switches(self) -> Switches | None:
        return None if self.frame is None or self.busy else self.frame.switches

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
        original_apply = torch.autograd.Function.__dict__["apply"]
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._call(module, original_call, args, kwargs)

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            frame = recorder.frame
            if frame is None or recorder.busy:
                return original_apply.__func__(cls, *args, **kwargs)
            if not can_be_applied(cls):
                recorder.stop(f"calls {cls.__name__}, an autograd function with an apply() of its own")
            frame.switches.check()
            given = frame.argument(tuple(args)), frame.argument(dict(kwargs))
            node = frame.node("call_function", AppliedFunction(cls), *given)
            with recorder.quiet():
                found = original_apply.__func__(cls, *args, **kwargs)
            return frame.take(node, found)

        def set_attribute(module: nn.Module, name: str, value: Any) -> None:
            recorder._assign(module, name, value)
            original_set(module, name, value)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__setattr__ = set_attribute  # type: ignore[assignment, method-assign]
        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original_call  # type: ignore[method-assign]
            nn.Module.__setattr__ = original_set  # type: ignore[method-assign]
            torch.autograd.Function.apply = original_apply  # type: ignore[method-assign]

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


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) or Tracer().is_leaf_module(module, "")


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves(value))


def _untracked(value: Any) -> Any:
    """Return an output without numbers that remember; tensors and other things as they are."""
    if type(value) in (tuple, list):
        return type(value)(_untracked(entry) for entry in value)
    return plain(value)
