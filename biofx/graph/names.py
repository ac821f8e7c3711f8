"""Names of modules, parameters and buffers that can stand in the code of a graph.

``torch.fx`` writes a name into the code that it runs: ``self.name`` where it looks like an identifier, else
``getattr(self, "name")``. A quotation mark or a backslash in it would end that text early, and what follows
would be run; a keyword, or a letter that Python normalises to another, would name something else.
"""

from __future__ import annotations

import keyword
import unicodedata

import torch
from torch import nn

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
        for name in (*module._modules, *module._parameters, *module._buffers):
            if name not in settled and not _is_writable(name):
                place = f"{path}.{name}" if path else name
                raise CaptureError(
                    f"the model has something named {name!r}, at {place!r}, which the code of a graph cannot "
                    "carry; give it a name without quotation marks, backslashes and control characters that "
                    "is no keyword of Python"
                )
            settled.add(name)


def _is_writable(name: str) -> bool:
    if name.isidentifier():
        return not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name
    return name.isprintable() and not set(name) & {'"', "\\"}
