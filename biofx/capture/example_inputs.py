"""The call that a user means by ``x``, ``(x,)``, ``{"x": x}`` or ``((x,), {})`` as example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn

from biofx.errors import InputError

ExampleInputs: TypeAlias = Any
"""One input, a tuple or list of inputs by position, a mapping of inputs by name, or ``(args, kwargs)``."""
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
_EXPECTED = "expected x, (x, y), {'x': x} or (args, kwargs), e.g. ((x,), {'mask': mask})"


def as_call(model: nn.Module, given: ExampleInputs) -> Call:
    """Return example inputs as positional and keyword arguments.

    ``(args, kwargs)`` are taken as they are, as ``torch.export.export`` takes them and the ``example_inputs``
    of its programs are; ``kwargs`` may be None. Else a tuple or list is taken for the arguments by position,
    a mapping for those by name, unless the model's forward takes it only as one argument.

    Args:
        model: the model, of which the signature of the forward is read.
        given: the example inputs.

    Raises:
        InputError: the forward does not take them, or they could be two calls.
    """
    if isinstance(given, (str, bytes, bool, int, float, complex, type, nn.Module)):
        shown = type(given).__name__ if isinstance(given, nn.Module) else repr(given)
        raise InputError(f"example_inputs: {_EXPECTED}; found {shown}")
    signature = _signature(model)
    found = [call for call in _calls(given) if _takes(signature, call)]
    if not found and _may_be_one_input(signature, given) and _takes(signature, ((given,), {})):
        return (given,), {}
    if not found:
        raise InputError(
            f"example_inputs: {_EXPECTED}, for forward{signature}; found {_described(given)}, which it does "
            "not take"
        )
    if len(found) == 1 or _is_a_call(given):
        return found[0]
    if _is_a_call_without_names(given):
        raise InputError(
            "example_inputs: a None after a tuple may be no keyword arguments, or the second input; write "
            "((x, y), {}) for the former, (((x, y), None), {}) for the latter"
        )
    raise InputError(
        "example_inputs: a mapping after an input may hold keyword arguments, or be the second input; write "
        "((x,), {...}) for the former, ((x, {...}), {}) for the latter"
    )


def _calls(given: Any) -> Iterator[Call]:
    """Yield the calls that example inputs may mean, the most obvious first."""
    if _is_a_call(given):
        yield tuple(given[0]), dict(given[1])
    if _is_a_call_without_names(given):
        yield tuple(given[0]), {}
    if _has_names(given):
        yield (), dict(given)
    if type(given) in (tuple, list):
        yield tuple(given), {}
        if len(given) == 2 and _has_names(given[1]):
            yield (given[0],), dict(given[1])


def _is_a_call(given: Any) -> bool:
    is_pair = isinstance(given, tuple) and len(given) == 2
    return is_pair and isinstance(given[0], (tuple, list)) and _has_names(given[1])


def _is_a_call_without_names(given: Any) -> bool:
    """Whether it is ``(args, None)``, as ``torch.export.export(model, args, None)`` is called."""
    is_pair = isinstance(given, tuple) and len(given) == 2
    return is_pair and isinstance(given[0], (tuple, list)) and given[1] is None


def _has_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _may_be_one_input(signature: inspect.Signature, given: Any) -> bool:
    """Whether a container may be one input: not if it is empty, or has names of arguments."""
    if isinstance(given, Mapping) and any(name in signature.parameters for name in given):
        return False
    return not isinstance(given, (tuple, list, Mapping)) or len(given) > 0


def _takes(signature: inspect.Signature, call: Call) -> bool:
    args, kwargs = call
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of a forward; of one without, that of a function that takes anything."""
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None)


def _described(given: Any) -> str:
    if type(given) in (tuple, list):
        return f"a {type(given).__name__} of {len(given)}"
    names = f" of {', '.join(map(repr, given))}" if isinstance(given, Mapping) else ""
    return f"a {type(given).__name__}{names}"
