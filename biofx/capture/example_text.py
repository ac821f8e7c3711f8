"""Example inputs as text, which the command line takes: ``torch.randn(12, 4, 3)``; no code is run."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from biofx.capture.example_inputs import Call
from biofx.errors import OptionError, suggest

_MAKERS = ("randn", "rand", "zeros", "ones", "randint", "arange")
_RANDOM = ("randn", "rand", "randint")
_SPELLED = "torch.randn(12, 4, 3), torch.randint(0, 100, (2, 16)) or mask=torch.ones(2, 16, dtype=torch.bool)"


def examples_from_text(texts: Iterable[str]) -> Call:
    """Return the call that texts describe, one for each input.

    Args:
        texts: each ``torch.randn(SIZES)``, ``rand``, ``zeros``, ``ones``, ``randint(LOW, HIGH, SIZES)`` or
            ``arange(END)``, with ``dtype=torch.…`` or without; after ``NAME=`` it is an argument by name.

    Returns:
        Positional and keyword arguments. Random values come from a generator of their own.

    Raises:
        OptionError: a text is something else.

    >>> args, kwargs = examples_from_text(["torch.randn(4, 3)", "mask=torch.ones(4, dtype=torch.bool)"])
    >>> args[0].shape, kwargs["mask"].dtype
    (torch.Size([4, 3]), torch.bool)
    """
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        by_name = bool(equals) and name.strip().isidentifier()
        made = _tensor(rest if by_name else text, generator)
        if by_name:
            kwargs[name.strip()] = made
        else:
            args.append(made)
    return tuple(args), kwargs


def _tensor(text: str, generator: torch.Generator) -> Tensor:
    try:
        call: Any = ast.parse(text.strip(), mode="eval").body
        owner, maker = call.func.value.id, str(call.func.attr)
        given = [ast.literal_eval(entry) for entry in call.args]
        named = {str(keyword.arg): _option(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise OptionError(f"example: expected {_SPELLED}, found {text!r}") from None
    if owner != "torch" or maker not in _MAKERS:
        raise OptionError(
            f"example: expected one of {', '.join(f'torch.{name}' for name in _MAKERS)}, found "
            f"'{owner}.{maker}'{suggest(maker, _MAKERS)}"
        )
    random = {"generator": generator} if maker in _RANDOM else {}
    try:
        made: Tensor = getattr(torch, maker)(*given, **named, **random)
    except (TypeError, RuntimeError, ValueError) as error:
        raise OptionError(f"example: {text!r} makes no tensor: {str(error).splitlines()[0]}") from None
    return made


def _option(value: Any) -> Any:
    """Return a literal, or the dtype that ``torch.NAME`` names."""
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "torch":
        found = getattr(torch, value.attr, None)
        if isinstance(found, torch.dtype):
            return found
    return ast.literal_eval(value)
