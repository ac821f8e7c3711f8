"""Restoring models, optimizers and attachments after a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.operators.parts import local

_OURS = __name__.partition(".")[0]


@contextmanager
def unchanged_on_failure(*holders: Any) -> Iterator[None]:
    """Restore objects if the block raises.

    Values are copied to the CPU, which needs memory for them while the block runs.

    Args:
        *holders: modules, optimizers, and objects of classes of this library.
    """
    put_back = keep(*holders)
    try:
        yield
    except BaseException:
        put_back()
        raise


def has_places_for(module: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether a state has exactly the keys and shapes of a module's tensors.

    Extra states are not compared.
    """
    held = {**dict(module.named_parameters(remove_duplicate=False)), **_saved_buffers(module)}
    if not all(isinstance(value, Tensor) for value in state_dict.values()):
        return False
    given = {key: value.shape for key, value in state_dict.items() if not key.endswith("_extra_state")}
    return given == {key: tensor.shape for key, tensor in held.items()}


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}{'.' if path else ''}{name}": buffer
        for path, part in module.named_modules(remove_duplicate=False)
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    }


def keep(*holders: Any) -> Callable[[], None]:
    """Record the content of objects, and return a function that restores it.

    Modules, optimizers and objects of this library are followed, and the dicts, lists and sets in them.
    Tensors get their values back; other objects are restored by reference.
    """
    undo: list[Callable[[], None]] = []
    seen: dict[int, Any] = {}
    waiting = [*holders]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept alive, so that no other object gets its id
        if isinstance(value, Tensor):
            undo.append(_undo_tensor(value))
        elif isinstance(value, (dict, list, set)):
            undo.append(_undo_container(value))
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            waiting += value
        elif isinstance(value, nn.Module):
            waiting += (
                [vars(module) for module in value.modules()]
                if any(value is holder for holder in holders)
                else ()
            )
        elif isinstance(value, Optimizer) or type(value).__module__.partition(".")[0] == _OURS:
            waiting.append(getattr(value, "__dict__", None))

    def put_back() -> None:
        for step in undo:
            step()

    return put_back


def _undo_tensor(tensor: Tensor) -> Callable[[], None]:
    data, place = tensor.detach(), _place_of(tensor)
    fixed = tensor.is_meta or (tensor.is_inference() and not torch.is_inference_mode_enabled())
    values = None if fixed else local(data).to("cpu", copy=True)

    @torch.no_grad()
    def put_back() -> None:
        if _place_of(tensor) != place:
            tensor.data = data
        if values is not None:
            local(data).copy_(values)

    return put_back


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return the address, shape, dtype, device and layout of a tensor."""
    part = local(tensor)
    try:
        pointer = part.data_ptr()
    except RuntimeError:  # sparse, or of a class without values of its own
        pointer = 0
    return pointer, part.shape, part.dtype, part.device, part.layout


def _undo_container(held: Any) -> Callable[[], None]:
    kind: Any = next(kind for kind in (dict, list, set) if isinstance(held, kind))
    entries = list(held.items() if kind is dict else held)
    fill = list.extend if kind is list else kind.update

    def put_back() -> None:
        kind.clear(held)
        fill(held, entries)

    return put_back
