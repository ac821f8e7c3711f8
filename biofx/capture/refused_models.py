"""Models that cannot be captured: wrapped, not copyable, or with names or methods that a graph would lose.

``torch.fx`` writes a name into the code that it runs: ``self.name`` where it is an identifier, else
``getattr(self, "name")``. A quotation mark or a backslash in it would end that text early, and what follows
would be run; a keyword, or a letter that Python normalises to another, would name something else.
"""

from __future__ import annotations

import copy
import keyword
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from biofx.capture.bytecode import methods_mentioned
from biofx.errors import CaptureError, InputError
from biofx.graph.regions import joined_path
from biofx.model.copies import deep_copy
from biofx.model.graph_module import (
    NAMES_OF_GRAPH_MODULES,
    NAMES_OF_MODELS,
    BioGraphModule,
    taken_name,
    user_class,
)
from biofx.plasticity.bio_state import BioState
from biofx.static_inspection import content_of, is_of

_WRAPPERS = {
    "DistributedDataParallel": "wrap the result instead: DistributedDataParallel(bio_model)",
    "DataParallel": "wrap the result instead: DataParallel(bio_model)",
    "FullyShardedDataParallel": "shard the result instead",
    "FSDPModule": "shard the result instead: fully_shard(bio_model)",
    "OptimizedModule": "transform the model first and compile the result: torch.compile(bio_model)",
    "ScriptModule": "transform the model before it is scripted",
    "AveragedModel": "transform model.module and average the result",
}
_METHODS_OF_THE_CALL = ("__call__", "_call_impl")


def check_input(model: object) -> None:
    """Check that an object is a module that is not wrapped, compiled or lazy.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        hint = "; create an instance of it first" if isinstance(model, type) else ""
        raise InputError(f"expected a torch.nn.Module, found {what}{hint}")
    for path, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)
        if wrapper is not None and (not path or wrapper != "ScriptModule"):
            what = f"one whose module {path!r} is a {wrapper}" if path else f"a {wrapper}"
            raise InputError(f"expected an unwrapped model, found {what}; {_WRAPPERS[wrapper]}")
    for path, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"expected initialised parameters, found {path!r} still lazy; run the model once first"
            )


def check_paths(model: nn.Module, opaque: Sequence[str]) -> None:
    """Check that ``opaque`` holds paths of modules of a model.

    Raises:
        InputError: it does not.
    """
    if isinstance(opaque, str):
        raise InputError(f"opaque: expected a list of module paths, found the text {opaque!r}")
    paths = {path for path, _ in model.named_modules() if path}
    for path in opaque:
        if path not in paths:
            raise InputError(
                f"opaque: expected the path of a module, found {path!r}, which the model does not have"
            )


def check_names(model: nn.Module) -> None:
    """Check that code can hold the names of the modules, parameters and buffers of a model.

    Raises:
        CaptureError: it cannot hold one of them.
    """
    checked: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # which is called as a whole, and has names that code can hold
        plain = (name for name, value in vars(module).items() if is_of(value, Tensor))
        for name in (*module._modules, *module._parameters, *module._buffers, *plain):
            if name not in checked and not _is_writable(name):
                raise CaptureError(
                    f"the model has something named {name!r}, at {joined_path(path, name)!r}, which the code "
                    "of a graph cannot carry; give it a name without quotation marks, backslashes and "
                    "control characters that is no keyword of Python"
                )
            checked.add(name)


def _is_writable(name: str) -> bool:
    if name.isidentifier():
        return not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name
    return name.isprintable() and not set(name) & {'"', "\\"}


def check_conflicts(model: nn.Module) -> None:
    """Check that a model has nothing that graph modules have of their own, or that they would lose.

    Raises:
        CaptureError: it defines its call, has a forward of its own on the instance, or uses a name that
            graph modules use, or that the state of a layer's plasticity has.
    """
    for name in _METHODS_OF_THE_CALL:
        if getattr(type(model), name, None) is not getattr(nn.Module, name, None):
            raise CaptureError(
                f"the model ({type(model).__name__}) has a {name}() of its own, which the result would not "
                "have. Make the model a submodule of one that only calls it, and transform that"
            )
    if "forward" in vars(model):
        raise CaptureError(
            f"the model ({type(model).__name__}) has had its forward replaced on the instance, which a copy "
            "cannot follow. Make the new forward a method of a class"
        )
    if (found := taken_name(model, NAMES_OF_GRAPH_MODULES | NAMES_OF_MODELS)) is not None:
        kinds: dict[str, Collection[str]] = {
            "submodule": model._modules,
            "parameter": model._parameters,
            "buffer": model._buffers,
        }
        kind = next((word for word, held in kinds.items() if found in held), "attribute")
        raise CaptureError(
            f"the model ({type(model).__name__}) has {kind} {found!r}, a name that graph modules use "
            "themselves; call it something else, or make the model a submodule of one that only calls it, "
            "and transform that"
        )
    for path, module in model.named_modules():
        held = (module._modules, module._parameters, module._buffers, vars(module))
        state = next((entries["bio_mod"] for entries in held if "bio_mod" in entries), None)
        if state is not None and not isinstance(state, BioState):
            raise CaptureError(
                f"the model has something named 'bio_mod', at {joined_path(path, 'bio_mod')!r}, where the "
                "state of a layer's plasticity goes; call it something else"
            )


def copy_of(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of a model that is independent of it.

    Raises:
        InputError: it cannot be copied.
        CaptureError: it holds a function that refers to its modules, which a copy would use too.
    """
    try:
        copied = deep_copy(model, memo)
    except Exception as error:
        raise InputError(
            f"expected a model that copy.deepcopy can copy; {_what_cannot_be_copied(model)} makes it fail: "
            f"{error}"
        ) from error
    originals = {id(module) for module in model.modules()}
    for path, module in copied.named_modules():
        for name, value in vars(module).items():
            for function in _functions_in(value):
                cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
                used = [content.__self__ if is_of(content, MethodType) else content for content in cells]
                if any(id(content) in originals for content in used):
                    owner = f"module {path!r}" if path else "the model"
                    raise CaptureError(
                        f"{owner} holds a function ({function.__qualname__}, in {name!r}) that refers to "
                        "modules of the model, and would go on using the original's. Make it a method"
                    )
    return copied


def _what_cannot_be_copied(model: nn.Module) -> str:
    """Return the attribute of a model that makes a copy of it fail, or else the model's class."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                try:
                    copy.deepcopy(value)
                except Exception:
                    return f"attribute {joined_path(path, name)!r} ({type(value).__name__})"
    return type(model).__name__


def _functions_in(value: Any) -> Iterator[FunctionType]:
    if is_of(value, FunctionType):
        yield value
    elif is_of(value, (list, tuple)):
        yield from (entry for entry in content_of(value) if is_of(entry, FunctionType))
    elif is_of(value, dict):
        yield from (entry for _, entry in content_of(value) if is_of(entry, FunctionType))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def check_methods(captured: BioGraphModule) -> None:
    """Check that the eager forward of a captured model finds the methods of its class.

    Raises:
        CaptureError: it uses one of a name that graph modules have themselves.
    """
    origin = user_class(captured)
    if origin is None or not captured.keeps_forward:
        return
    if hidden := sorted(methods_mentioned(origin) & NAMES_OF_GRAPH_MODULES):
        raise CaptureError(
            f"the forward of the model ({origin.__name__}) runs in Python and uses {hidden[0]!r} of its "
            "class, a name that graph modules use themselves; call it something else, or make the model a "
            "submodule of one that only calls it, and transform that"
        )
