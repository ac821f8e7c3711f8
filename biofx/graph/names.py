"""Names of modules, parameters and buffers that can stand in the code of a graph.

``torch.fx`` writes a name into the code that it runs: ``self.name`` where it looks like an identifier, else
``getattr(self, "name")``. A quotation mark or a backslash in it would end that text early, and what follows
would be run; a keyword, or a letter that Python normalises to another, would name something else.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Iterator

from torch import nn

from biofx.errors import CaptureError


def refuse_unwritable_names(model: nn.Module) -> None:
    """Refuse a model with a name that code cannot carry.

    Raises:
        CaptureError: a module, parameter or buffer has such a name.
    """
    for path in _paths(model):
        for name in path.split("."):
            if name and not _is_writable(name):
                raise CaptureError(
                    f"the model has something named {name!r}, at {path!r}, which the code of a graph cannot "
                    "carry; give it a name without quotation marks, backslashes and control characters that "
                    "is no keyword of Python"
                )


def _paths(model: nn.Module) -> Iterator[str]:
    yield from (path for path, _ in model.named_modules(remove_duplicate=False))
    yield from (path for path, _ in model.named_parameters(remove_duplicate=False))
    yield from (path for path, _ in model.named_buffers(remove_duplicate=False))


def _is_writable(name: str) -> bool:
    if name.isidentifier():
        return not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name
    return name.isprintable() and not set(name) & {'"', "\\"}
