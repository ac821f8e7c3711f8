"""Activations as text and back: ``"torch.tanh"``, ``"torch.nn.ReLU"``, ``"identity"``.

A text chooses from a list: functions and modules of torch that do the same to each element of a tensor, and
what the user registers. So a config file or a checkpoint can name an activation, but never run code of its
own choosing; nothing is imported or called to find out what a text means.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from biofx.errors import OptionError, suggest


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE: dict[str, tuple[Any, frozenset[str]]] = {
    "torch.nn.functional": (
        F,
        _names(
            "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 "
            "selu sigmoid silu softplus softshrink softsign tanh tanhshrink"
        ),
    ),
    "torch.nn": (
        nn,
        _names(
            "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish "
            "PReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"
        ),
    ),
    "torch.special": (
        torch.special,
        _names(
            "digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 i0e i1 i1e log1p log_ndtr logit "
            "ndtr ndtri psi round sinc"
        ),
    ),
    "torch": (
        torch,
        _names(
            "abs absolute acos acosh arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh "
            "ceil celu cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 fix floor frac hardshrink i0 "
            "lgamma log log10 log1p log2 logit nan_to_num neg negative positive rad2deg reciprocal relu "
            "round rsqrt selu sgn sigmoid sign sin sinc sinh sqrt square tan tanh trunc"
        ),
    ),
}
"""What of torch a text may name, by the module that it is in: each maps a number to a number, by itself."""
_IDENTITY = "identity"
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_TAKEN = (_IDENTITY, "true", "false", "none", "torch")
_registered: dict[str, Callable[..., Any]] = {}


def identity(x: Any) -> Any:
    """Return ``x``: the weight-splitting activation of a linear synapse."""
    return x


def register_activation(name: str, function: Callable[..., Any]) -> None:
    """Let texts name an activation of your own: pipelines, config files, checkpoints, the command line.

    To be called where such a text is read, too: what is written down is the name alone. A function that is
    defined anew under the same name, in a notebook for example, takes the place of the old one.

    Args:
        name: letters, digits, ``_``, ``.`` and ``-``, beginning with a letter; none of torch's.
        function: from a tensor to one of the same shape, each element by itself; or a module.

    Raises:
        OptionError: the name is taken or no name, or there is no such function.

    >>> def doubled(x):
    ...     return 2 * x
    >>> register_activation("doubled", doubled)
    >>> callable_to_text(doubled), callable_from_text("doubled") is doubled
    ('doubled', True)
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.partition(".")[0] in _TAKEN:
        raise OptionError(
            f"expected a name of letters, digits, '_', '.' and '-' that is none of torch's, found {name!r}"
        )
    if isinstance(function, str):
        raise OptionError(f"{name}: expected a callable from tensor to tensor, found the text {function!r}")
    check_activation(name, function)
    before = _registered.get(name, function)
    if before is not function and _origin(before) != _origin(function):
        raise OptionError(f"expected a free name, found {name!r}, which means {before!r}; take another")
    _registered[name] = function


def registered_activations() -> dict[str, Callable[..., Any]]:
    """Return what has been registered, by name."""
    return dict(_registered)


def callable_to_text(function: Callable[..., Any]) -> str:
    """Return the name by which :func:`callable_from_text` finds the function again.

    Raises:
        OptionError: it has no such name: a function of neither torch nor the registered ones, one that does
            not do the same to each element, a module with options or state.

    >>> callable_to_text(torch.tanh), callable_to_text(nn.ReLU())
    ('torch.tanh', 'torch.nn.ReLU')
    """
    if function is identity or type(function) is nn.Identity:
        return _IDENTITY
    for name, known in _registered.items():
        if known is function:
            return name
    named: Any = function
    if isinstance(function, nn.Module):
        named = type(function) if _is_plain(function) else None
    # torch.special.expit calls itself special_expit
    own = str(getattr(named, "__name__", "")).removeprefix("special_")
    for place, (namespace, names) in ELEMENTWISE.items():
        for name in sorted(names, key=lambda name: (name != own, name)):
            if getattr(namespace, name) is named:
                return f"{place}.{name}"
    raise OptionError(
        "expected a callable that a text can name (an element-wise function of torch, a torch.nn activation "
        f"without options, what biofx.register_activation knows), found {function!r}; register it, or keep "
        "it in Python"
    )


def check_activation(name: str, value: Any) -> Callable[..., Any]:
    """Return the activation that a user gave as a callable or as a name.

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
    if text == _IDENTITY:
        return identity
    if text in _registered:
        return _registered[text]
    place, _, name = text.rpartition(".")
    namespace, names = ELEMENTWISE.get(place, (None, frozenset()))
    if name not in names:
        hint = suggest(name, names) if names else suggest(text, _registered)
        raise OptionError(
            f"expected an activation such as 'torch.tanh' or 'torch.nn.ReLU', found {text!r}{hint}; a text "
            "can name element-wise functions of torch and what biofx.register_activation(name, function) has "
            "registered, any other function is given as an object"
        )
    found: Any = getattr(namespace, name)
    instance: Callable[..., Any] = found() if isinstance(found, type) else found
    return instance


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is an activation of torch as its class makes it without being told anything."""
    kind: Any = type(module)
    names = ELEMENTWISE["torch.nn"][1]
    if kind.__name__ not in names or getattr(nn, kind.__name__) is not kind or module.state_dict():
        return False
    return bool(module.extra_repr() == kind().extra_repr()) and not list(module.children())


def _origin(function: Any) -> tuple[Any, Any]:
    """Return what stays the same when a function's definition runs again."""
    name = getattr(function, "__qualname__", "<object>")
    return getattr(function, "__module__", None), id(function) if "<" in name else name
