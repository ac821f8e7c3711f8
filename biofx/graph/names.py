"""Names of modules, parameters and buffers that can stand in the code of a graph.

``torch.fx`` writes a name into the code that it runs: ``self.name`` where it looks like an identifier, else
``getattr(self, "name")``. A quotation mark or a backslash in it would end that text early, and what follows
would be run; a keyword, or a letter that Python normalises to another, would name something else.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from biofx.errors import CaptureError


def refuse_unwritable_names(model: nn.Module) -> None:
    """Refuse a model with a name that code cannot carry.

    Raises:
        CaptureError: a module, parameter or buffer has such a name.
    """
    settled: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # which is called as a whole, and has names that code can carry
        plain = (name for name, value in vars(module).items() if issubclass(type(value), Tensor))
        for name in (*module._modules, *module._parameters, *module._buffers, *plain):
            if name not in settled and not _is_writable(name):
                place = f"{path}.{name}" if path else name
                raise CaptureError(
                    f"the model has something named {name!r}, at {place!r}, which the code of a graph cannot "
                    "carry; give it a name without quotation marks, backslashes and control characters that "
                    "is no keyword of Python"
                )
            settled.add(name)


def refuse_taken_names(model: nn.Module, taken: Collection[str]) -> None:
    """Refuse a model that has, itself, a name under which its rewritten form has something else.

    Args:
        model: the model.
        taken: names of attributes that graph modules have.

    Raises:
        CaptureError: a module, parameter, buffer or other attribute of it has such a name.
    """
    found = taken_name(model, taken)
    if found is not None:
        kind = next((word for word, held in _holders(model) if found in held), "attribute")
        raise CaptureError(
            f"the model ({type(model).__name__}) has {kind} {found!r}, a name that graph modules use "
            "themselves; call it something else, or make the model a submodule of one that only calls it, "
            "and transform that"
        )


def taken_name(module: nn.Module, taken: Collection[str]) -> str | None:
    """Return the name of something that a module holds, of those that are taken; None if it holds none."""
    return next((name for _, held in _holders(module) for name in held if name in taken), None)


def refuse_names_of_states(model: nn.Module, name: str, kind: type[nn.Module]) -> None:
    """Refuse a model that has something else where the state of plasticity goes.

    Raises:
        CaptureError: a module has, under that name, something that is not of that kind.
    """
    for path, module in model.named_modules():
        held = next((entries[name] for _, entries in _holders(module) if name in entries), None)
        if held is not None and not isinstance(held, kind):
            place = f"{path}.{name}" if path else name
            raise CaptureError(
                f"the model has something named {name!r}, at {place!r}, where the state of a layer's "
                "plasticity goes; call it something else"
            )


def _holders(module: nn.Module) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Return what a module has by name, and what to call each kind."""
    own: dict[str, Any] = {
        "submodule": module._modules,
        "parameter": module._parameters,
        "buffer": module._buffers,
    }
    return (*own.items(), ("attribute", vars(module)))


def _is_writable(name: str) -> bool:
    if name.isidentifier():
        return not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name
    return name.isprintable() and not set(name) & {'"', "\\"}
