"""Following the contexts that a forward opens while it is captured, and noticing those that cannot be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch.autograd import grad_mode
from torch.fx import Graph, Node, Proxy
from torch.nn.utils import parametrize

from biofx.capture.tracked import plain
from biofx.capture.values import TORCH_FOLDER
from biofx.graph.contexts import BEGINNINGS, autocast_nesting, begin_autocast, begin_grad_mode


class Writer(Protocol):
    """Who writes the nodes of a graph."""

    @property
    def graph(self) -> Graph:
        """The graph."""

    def write(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write a call of a function down."""

    def stop(self, what: str) -> NoReturn:
        """Say that what a forward does cannot be part of the graph."""


@dataclass(frozen=True)
class _Open:
    """A context that is open."""

    context: int
    begin: Node
    modes: tuple[Any, ...]


class Switches:
    """Writes down the contexts that one forward opens.

    Args:
        writer: of the graph.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._before = ambient_modes()
        self._open: list[_Open] = []
        self._loose: object = None
        self.devices_asked: set[str] = set()
        """Types of devices that the forward asked tensors for, and may now use as constants."""

    def check(self) -> None:
        """Stop where something is in force that no context of the graph accounts for."""
        modes = self._open[-1].modes if self._open else self._before
        if self._loose is not None or ambient_modes() != modes:
            self._writer.stop(
                "works under a context (torch.inference_mode, a default dtype, a seed, gradients switched "
                "without with, …), which a graph would drop"
            )

    def check_end(self) -> None:
        """Stop where a forward returns with a context open."""
        self.check()
        if self._open:
            self._writer.stop("leaves a context open")

    def forget_loose(self) -> None:
        """Let a switch outside any context no longer count: what made it was taken back."""
        self._loose = None

    @property
    def depth(self) -> int:
        """How many contexts are open, a count."""
        return len(self._open)

    def go_back(self, depth: int) -> None:
        """Forget the contexts opened since there were so many: what opened them is taken back."""
        del self._open[depth:]
        self._loose = None

    def made(self, switch: object) -> None:
        """Note a ``set_grad_enabled``, which acts at once, whether or not it is used as a context."""
        self._loose = switch

    def begun(self, context: object, begin: Callable[..., Any], options: tuple[Any, ...]) -> None:
        """Write down that a context was entered."""
        if self._loose is context:
            self._loose = None
        anchor = next((node for node in self._writer.graph.nodes if node.op == "placeholder"), None)
        if anchor is None:
            self._writer.stop("opens a context in a forward without arguments")
        if begin is begin_autocast and options[0] in self.devices_asked:
            self._writer.stop("opens torch.autocast for a device that it may have asked a tensor for")
        place = len(self._open)
        self._open.append(_Open(id(context), anchor, ambient_modes()))
        try:
            node = self._writer.write(begin, (anchor, *options))
        except BaseException:
            del self._open[place:]
            raise
        self._open[place] = _Open(id(context), node, self._open[place].modes)

    def ended(self, context: object, *, failed: bool) -> None:
        """Write down that a context was left; nothing is written of a forward that fails."""
        innermost = self._open.pop() if self._open else None
        if failed:
            self._loose = innermost  # a forward that goes on all the same is not followed further
            return
        if innermost is None or innermost.context != id(context):
            self._writer.stop("leaves contexts in another order than it enters them")
        if next(iter(reversed(self._writer.graph.nodes))) is innermost.begin:
            self._writer.graph.erase_node(innermost.begin)  # nothing happened in it
        else:
            self._writer.write(BEGINNINGS[innermost.begin.target], (innermost.begin,))  # type: ignore[index]


def ambient_modes() -> tuple[Any, ...]:
    """Return what is in force around an operation and would be lost with the Python code around it."""
    return (
        autocast_nesting(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch.get_default_dtype(),
        torch.initial_seed(),
        parametrize._cache_enabled > 0,
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        *(asked() for asked in _ATTENTION_KERNELS),
    )


_ATTENTION_KERNELS = (
    *(torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled),
    *(torch._C._get_math_sdp_enabled, torch._C._get_cudnn_sdp_enabled),
)


class SwitchPatches:
    """Lets the contexts that are entered anywhere reach the switches of the forward that is captured.

    Args:
        current: returns those switches, None where what happens is not to be written down.
        stop: refuses what cannot be part of a graph.
        give_up: is handed what a refusal raises, and returns if the forward is to go on all the same.
    """

    def __init__(
        self,
        current: Callable[[], Switches | None],
        stop: Callable[[str], NoReturn],
        give_up: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._current = current
        self._stop = stop
        self._give_up = give_up or _raise
        self.is_switching = False
        self._given: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Follow every context that is entered meanwhile."""
        with (
            self._following(grad_mode.no_grad, begin_grad_mode, lambda context: (False,)),
            self._following(grad_mode.enable_grad, begin_grad_mode, lambda context: (True,)),
            self._following(grad_mode.set_grad_enabled, begin_grad_mode, lambda context: (context.mode,)),
            self._following(torch.autocast, begin_autocast, self._autocast_options),
            self._noting_loose(grad_mode.set_grad_enabled),
            self._noting_autocasts(),
            self._noticing_questions(),
        ):
            yield

    def _following(self, kind: Any, begin: Callable[..., Any], options: Callable[[Any], Any]) -> Any:
        enter, leave = kind.__enter__, kind.__exit__

        def entered(context: Any) -> Any:
            switches = self._current()
            with self._switching():
                found = None if _is_open_question(context) else enter(context)
            if switches is not None:
                try:
                    self._tried(switches.begun, context, begin, options(context))
                except BaseException:
                    with self._switching():
                        leave(context, None, None, None)
                    raise
            return found

        def left(context: Any, kind_of: Any, error: Any, trace: Any) -> Any:
            switches = self._current()
            with self._switching():
                found = leave(context, kind_of, error, trace)
            if switches is not None:
                self._tried(switches.ended, context, failed=kind_of is not None)
            return found

        return _replaced(kind, __enter__=entered, __exit__=left)

    def _noting_loose(self, kind: Any) -> Any:
        make, decorate = kind.__init__, kind.__call__

        def made(switch: Any, mode: Any) -> None:
            with self._switching() as was_switching:
                if isinstance(mode, Proxy):
                    switch.prev, switch.mode = torch.is_grad_enabled(), mode
                else:
                    make(switch, mode)
            switches = None if was_switching else self._current()
            if switches is not None:
                switches.made(switch)

        def decorated(switch: Any, function: Any) -> Any:
            with self._switching():
                found = decorate(switch, function)
            if (switches := self._current()) is not None:
                switches.forget_loose()
            return found

        return _replaced(kind, __init__=made, __call__=decorated)

    def _noting_autocasts(self) -> Any:
        make = torch.autocast.__init__

        def made(
            context: Any,
            device_type: str,
            dtype: torch.dtype | None = None,
            enabled: bool = True,
            cache_enabled: bool | None = None,
        ) -> None:
            make(context, device_type, plain(dtype), enabled, cache_enabled)
            self._given[id(context)] = context, (device_type, dtype, enabled, cache_enabled)

        return _replaced(torch.autocast, __init__=made)

    def _autocast_options(self, context: Any) -> tuple[Any, ...]:
        """Return what an autocast was made with: None stands for what is in force when it is entered."""
        if id(context) in self._given:
            return self._given[id(context)][1]
        return (context.device, context.fast_dtype, context._enabled, context._cache_enabled)

    def _noticing_questions(self) -> Any:
        def noticed(name: str, what: str) -> Callable[..., Any]:
            asked = getattr(torch, name)

            def question(*args: Any) -> Any:
                if not self.is_switching and self._current() is not None and not _is_asked_by_torch():
                    self._tried(self._stop, f"asks {what}, which is not known before the graph runs")
                return asked(*args)

            return question

        return _replaced(torch, **{name: noticed(name, what) for name, what in _QUESTIONS.items()})

    def _tried(self, note: Callable[..., None], *args: Any, **options: Any) -> None:
        try:
            note(*args, **options)
        except BaseException as refusal:
            self._give_up(refusal)

    @contextmanager
    def _switching(self) -> Iterator[bool]:
        before, self.is_switching = self.is_switching, True
        try:
            yield before
        finally:
            self.is_switching = before


_QUESTIONS = {
    "is_grad_enabled": "whether gradients are on",
    **dict.fromkeys(("is_autocast_enabled", "is_autocast_cpu_enabled"), "whether autocast is on"),
    **dict.fromkeys(
        ("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"), "to what autocast casts"
    ),
}
"""Functions of torch that ask in what context they are called, and what they ask."""


def _raise(refusal: BaseException) -> NoReturn:
    raise refusal


def _is_open_question(context: Any) -> bool:
    """Whether a context switches gradients by something that is known only when the graph runs."""
    return isinstance(getattr(context, "mode", None), Proxy)


def _is_asked_by_torch() -> bool:
    return sys._getframe(2).f_code.co_filename.startswith((TORCH_FOLDER, __file__))


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: (name in vars(owner), getattr(owner, name)) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, (was_its_own, value) in before.items():
            if was_its_own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)
