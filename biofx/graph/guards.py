"""Checks that a captured graph makes when it runs, of what its capture took for granted.

Capturing a forward settles what Python decided on the way. Where that rests on an argument left out, or on
a value being a tensor, the graph says so itself: another kind of call is then an error and no wrong result.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx.node import has_side_effect
from torch.overrides import handle_torch_function, has_torch_function

from biofx.errors import InputError


@has_side_effect
def require_default(found: Any, default: object, name: str) -> None:
    """Check that an optional argument has the value that the graph was captured with.

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
    """Check that a value is a tensor, as the graph's capture took it to be.

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
    """Check that a value is neither None nor a flag, as the graph's capture took it to be.

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
    """Check that what decided about the way through a forward is what it was when that was recorded.

    Raises:
        InputError: it is not.
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


class RecordingError(InputError):
    """A forward was recorded on a way that another input does not take."""

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module


def by_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """Return what a forward uses in the mode that its module is in."""
    if has_torch_function((training,)):
        return handle_torch_function(by_mode, (training,), training, in_training, in_evaluation)
    return in_training if training else in_evaluation
