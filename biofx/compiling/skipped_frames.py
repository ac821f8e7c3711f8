"""Says which layers dynamo leaves to Python although a backend of biofx was to rewrite them.

Dynamo calls a backend for what it compiles. A function that it cannot compile it runs as it is, and tells
nobody but its logs; what that function calls of torch's own layers then has no rates and no signs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType

from torch import nn

from biofx.compiling.dynamo_frames import compiling_frame
from biofx.errors import BiofxWarning
from biofx.torch_private import is_left_to_python, on_end_of_compilation, origin_of_backend

Named = Iterator[tuple[str, nn.Parameter]]


def watch_skipped_frames() -> None:
    """Look at each compilation that ends.

    ``torch._dynamo.reset()`` forgets that, and so each backend asks for it again.
    """
    on_end_of_compilation(_look)


def _look(of_compilation: object) -> None:
    error, frame = sys.exc_info()[1], compiling_frame()
    if error is None or frame is None or not is_left_to_python(error) or frame.f_locals.get("one_graph"):
        return
    backend = origin_of_backend(frame.f_locals.get("compiler_fn"))
    left_to_python: Callable[[Named], list[str]] | None = getattr(backend, "left_to_python", None)
    if left_to_python is None:
        return
    code: CodeType = frame.f_locals["code"]
    seen = {**frame.f_locals["globals"], **frame.f_locals["locals"]}
    named = (seen.get(name) for name in (*frame.f_locals["locals"], *code.co_names))
    owners = {id(value): value for value in named if isinstance(value, nn.Module)}
    used = (entry for owner in owners.values() for entry in _used_directly(owner, ""))
    if left := left_to_python(used):
        _warn(code, str(error), left)


def _used_directly(owner: nn.Module, path: str) -> Named:
    """Yield the parameters that a module's own code may use, by itself or in layers of torch.

    The code of users' modules inside of it is compiled by itself.
    """
    for name, parameter in owner._parameters.items():
        if parameter is not None:
            yield f"{path}{name}", parameter
    for name, module in owner._modules.items():
        if module is not None and type(module).__module__.startswith("torch.nn.modules."):
            yield from _used_directly(module, f"{path}{name}.")


def _warn(code: CodeType, error: str, left: list[str]) -> None:
    reason = error.strip().splitlines()[0] if error.strip() else "it says no reason"
    file, line = code.co_filename, code.co_firstlineno
    place = f"{getattr(code, 'co_qualname', code.co_name)} ({Path(file).name}:{line})"
    shown = ", ".join([*map(repr, left[:3]), *["…"] * (len(left) > 3)])
    way = "set torch._dynamo.config.allow_rnn = True, or " if "LSTM" in reason else ""
    message = (
        f"torch.compile runs {place} in Python: {reason}. No mechanism acts on what it uses itself "
        f"({shown}); {way}transform the model first and compile the result: "
        "torch.compile(biofx.transform(model, config).graph_module)"
    )
    try:
        warnings.warn_explicit(message, BiofxWarning, file, line)
    except BiofxWarning as found:  # where warnings are errors: dynamo's own counts do not survive one here
        warnings.showwarning(found, BiofxWarning, file, line)
