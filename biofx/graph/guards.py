"""Checks that a captured graph makes when it runs, of what its capture relied on.

A captured graph holds the branch that Python took. Where that depends on an argument that was left out, or on
a value being a tensor, the graph checks it: a call of another kind is an error and not a wrong result.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx.node import has_side_effect
from torch.overrides import handle_torch_function, has_torch_function

from biofx.errors import InputError


@has_side_effect
def require_default(found: Any, default: object, name: str) -> None:
    """Check that an optional argument has the value with which the graph was captured.

    Raises:
        InputError: it has another.
    """
    if has_torch_function((found,)) and not isinstance(found, Tensor):
        return handle_torch_function(require_default, (found,), found, default, name)
    if found is not default and (isinstance(found, Tensor) or found != default):
        shown = type(found).__name__ if isinstance(found, Tensor) else repr(found)
        raise InputError(
            f"argument {name!r}: expected {default!r}, with which the graph was captured, found {shown}; "
            "capture a model that fixes the other value, e.g. a module whose forward passes it on"
        )
    return None


@has_side_effect
def require_tensor(found: Any, where: str) -> None:
    """Check that a value is a tensor, as it was when the graph was captured.

    Raises:
        InputError: it is not.
    """
    if has_torch_function((found,)) and not isinstance(found, Tensor):
        return handle_torch_function(require_tensor, (found,), found, where)
    if not isinstance(found, Tensor):
        raise InputError(
            f"expected a tensor, for which the graph was captured, found {type(found).__name__}; {where} "
            "asks for the type of this value"
        )
    return None


@has_side_effect
def require_given(found: Any, name: str, where: str) -> None:
    """Check that a value is neither None nor a flag, as it was when the graph was captured.

    Raises:
        InputError: it is.
    """
    if has_torch_function((found,)) and not isinstance(found, Tensor):
        return handle_torch_function(require_given, (found,), found, name, where)
    if found is None or isinstance(found, bool):
        raise InputError(
            f"{name}: expected a value, for which the graph was captured, found {found}; {where} "
            "asks whether there is one; give example_inputs like this one"
        )
    return None


@has_side_effect
def require_same(found: Any, expected: object, question: str, module: str) -> None:
    """Check that a value by which a forward decides is the one with which the forward was recorded.

    Raises:
        RecordingError: it is not.
    """
    if has_torch_function((found,)) and not isinstance(found, Tensor):
        return handle_torch_function(require_same, (found,), found, expected, question, module)
    if isinstance(found, Tensor) or found != expected:
        shown = type(found).__name__ if isinstance(found, Tensor) else repr(found)
        raise RecordingError(
            f"module {module!r} asks {question}: recorded with {expected!r}, found {shown}; give "
            f"example_inputs like this one, or name the module in opaque=[{module!r}]",
            module,
        )
    return None


@has_side_effect
def require_exported(
    found: Any, what: str, expected: Any, limits: tuple[tuple[int, int, int | None], ...] = ()
) -> None:
    """Check that an input is one for which a program was exported.

    Args:
        found: the input.
        what: its name, for the message.
        expected: of a tensor its sizes, None for those that are free; of anything else its value.
        limits: axes of free sizes, with the least and the greatest that each may be, None for no greatest.

    Raises:
        InputError: it is another.
    """
    if has_torch_function((found,)) and not isinstance(found, Tensor):
        return handle_torch_function(require_exported, (found,), found, what, expected, limits)
    if not isinstance(found, Tensor):
        if found != expected:
            raise InputError(f"{what}: expected {expected!r}{_EXPORTED}, found {found!r}")
        return None
    if found.dim() != len(expected):
        raise InputError(f"{what}: expected {len(expected)} axes{_EXPORTED}, found {found.dim()}")
    for axis, (size, fixed) in enumerate(zip(found.shape, expected, strict=True)):
        if fixed is not None and size != fixed:
            raise InputError(
                f"{what}: expected size {fixed} along axis {axis}{_EXPORTED}, found {size}; export it with "
                "dynamic_shapes where sizes may differ"
            )
    for axis, low, high in limits:
        size = found.shape[axis]
        if size < low or (high is not None and size > high):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            raise InputError(f"{what}: expected size {allowed} along axis {axis}{_EXPORTED}, found {size}")
    return None


_EXPORTED = ", for which the program was exported"


class RecordingError(InputError):
    """An input would take another path through a forward than the one that was recorded.

    Args:
        message: the message.
        module: path of the module that decides.
    """

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module
