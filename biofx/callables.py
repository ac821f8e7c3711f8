"""Activations as text and back: ``"torch.tanh"``, ``"torch.nn.ReLU"``, ``"identity"``.

Only functions and option-free modules of torch have a text form, so that a config file can name an
activation but never run code of its own choosing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from biofx.errors import OptionError, suggest

_NAMESPACES: dict[str, Any] = {
    "torch.nn.functional": F,
    "torch.nn": nn,
    "torch.special": torch.special,
    "torch": torch,
}


def identity(x: Any) -> Any:
    """Return ``x``: the weight-splitting activation of a linear synapse."""
    return x


def callable_to_text(function: Callable[..., Any]) -> str:
    """Return the name by which :func:`callable_from_text` finds the function again.

    Raises:
        OptionError: it has no such name: a function that is not torch's, a module with options or state.

    >>> callable_to_text(torch.tanh), callable_to_text(nn.ReLU())
    ('torch.tanh', 'torch.nn.ReLU')
    """
    if function is identity or type(function) is nn.Identity:
        return "identity"
    named: Any = function
    if isinstance(function, nn.Module):
        plain = not (function.extra_repr() or function.state_dict() or list(function.children()))
        named = type(function) if plain else None
    # torch.special.expit calls itself special_expit
    name = str(getattr(named, "__name__", "")).removeprefix("special_")
    for place, namespace in _NAMESPACES.items():
        if name and getattr(namespace, name, None) is named:
            return f"{place}.{name}"
    raise OptionError(
        "expected a callable that a text can name (a function of torch, a torch.nn module without options), "
        f"found {function!r}; keep it in Python"
    )


def check_activation(name: str, value: Any) -> Callable[..., Any]:
    """Return the activation that a user gave as a callable or as the name of one of torch's.

    Raises:
        OptionError: it is neither, or it is a class instead of an instance; the message starts with ``name``.
    """
    if isinstance(value, str):
        try:
            return callable_from_text(value)
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from error
    if isinstance(value, type):
        raise OptionError(
            f"{name}: expected a callable from tensor to tensor, found the class {value.__name__}; "
            f"create an instance: {value.__name__}()"
        )
    if not callable(value):
        raise OptionError(f"{name}: expected a callable from tensor to tensor, found {value!r}")
    function: Callable[..., Any] = value
    return function


def callable_from_text(text: str) -> Callable[..., Any]:
    """Return what :func:`callable_to_text` named; a module class comes back as an instance.

    Raises:
        OptionError: the text names nothing of the kind; the nearest names are given.
    """
    if text == "identity":
        return identity
    place, _, name = text.rpartition(".")
    namespace = _NAMESPACES.get(place)
    # vars, not getattr: a module's own __getattr__ may import
    found: Any = None if namespace is None or name.startswith("_") else vars(namespace).get(name)
    is_module = isinstance(found, type) and issubclass(found, nn.Module)
    if not callable(found) or (isinstance(found, type) and not is_module):
        hint = suggest(name, dir(namespace) if namespace is not None else ())
        raise OptionError(
            f"expected an activation such as 'torch.tanh' or 'torch.nn.ReLU', found {text!r}{hint}"
        )
    try:
        instance: Callable[..., Any] = found() if is_module else found
    except TypeError as error:
        raise OptionError(f"expected a module that needs no options, found {text!r}: {error}") from error
    return instance
