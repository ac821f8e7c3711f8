"""Callables as text and back, without ever importing anything a file asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from biofx.errors import OptionError

PREFIX = "import:"


def callable_to_text(function: Callable[..., Any]) -> str:
    """Return ``"import:MODULE:NAME"`` for a function, or for an option-free module instance its class.

    Raises:
        OptionError: when the callable cannot be found again under a name (a lambda, a closure, a
            module built with arguments).

    >>> callable_to_text(nn.ReLU())
    'import:torch.nn.modules.activation:ReLU'
    """
    if isinstance(function, nn.Module):
        if function.state_dict() or function.extra_repr():
            raise OptionError(
                f"expected a callable that a text can name, found the module {function!r}, whose options or "
                "state a text cannot carry; pass a plain function instead"
            )
        named: Any = type(function)
    else:
        named = function
    module, name = getattr(named, "__module__", None), getattr(named, "__qualname__", "")
    module = module or "torch"  # torch's own built-in functions carry no module
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not named:
        raise OptionError(
            f"expected a callable that a text can name, found {function!r}, which no import path leads to; "
            "define it at the top level of a module, or build the pass in Python"
        )
    return f"{PREFIX}{module}:{name}"


def callable_from_text(text: str) -> Callable[..., Any]:
    """Return what :func:`callable_to_text` named; a module class comes back as an instance.

    Only modules that are already imported are looked at, so that a config file can never run code.

    Raises:
        OptionError: malformed text, a module that is not imported, a name it does not have.
    """
    module, _, name = text.removeprefix(PREFIX).partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not text.startswith(PREFIX) or not callable(found):
        raise OptionError(
            f"expected a callable written as '{PREFIX}MODULE:NAME' of an already imported module, "
            f"found {text!r}; import that module first, or check the name"
        )
    instance: Callable[..., Any] = (
        found() if isinstance(found, type) and issubclass(found, nn.Module) else found
    )
    return instance
