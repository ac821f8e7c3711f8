"""Reproducers: a folder with a script that shows a failure again, and the model that the script starts from.

An exception inside :func:`biofx.transform` or a converter writes one, into the folder that the environment
variable ``BIOFX_REPRODUCER`` names, else into a new folder for temporary files; a note on the exception says
where. The value ``off`` switches this off. :func:`biofx.bisect` writes one if it is given a folder.

``model.pt`` is a pickle, like every file of ``torch.save``: load those of others only if you trust them. Both
files contain the model and code of the user, and only their owner can read them.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from biofx.callables import registered_activations
from biofx.config import BioConfig
from biofx.errors import BiofxError, InputError, OptionError, PassError, add_note
from biofx.graph.node_kinds import number_read
from biofx.graph.printing import format_graph
from biofx.graph.regions import region_paths
from biofx.model.attribute_guards import GUARDS
from biofx.model.graph_module import BioGraphModule
from biofx.model.inlined_modules import INLINED
from biofx.rewriting.pass_base import BROKE_ITS_CONTRACT, Pass
from biofx.rewriting.pipeline import Pipeline, stages_of
from biofx.rewriting.source_bundle import SourceBundle

PLACE = "BIOFX_REPRODUCER"
"""The environment variable with the folder for reproducers of exceptions, or ``off``."""

_is_off: ContextVar[bool] = ContextVar("biofx_reproducers_off", default=False)
_NOTE = "to see it again, run: "
_MOST_BYTES = 64 * 2**20
"""The most bytes of weights in a reproducer; more are left out, and the script draws random ones."""


def write_reproducer(
    folder: str | os.PathLike[str],
    graph_module: GraphModule,
    passes: Sequence[Pass],
    story: str,
    *,
    config: BioConfig | None = None,
    predicate: Callable[[Any], object] | None = None,
) -> Path:
    """Write a script that runs passes on a graph module, and then the predicate on the result.

    Args:
        folder: created if need be; if it contains a reproducer already, a number is added to its name.
        graph_module: the model before the passes; it is not changed.
        passes: what to run, in order.
        story: what the script shows; the comment at its top.
        config: given to ``transform`` along with the passes.
        predicate: included as source and called before and after the passes; None to call only the passes.

    Returns:
        The script's path.

    Raises:
        OptionError: the folder cannot be written.
        InputError: a pass, or the predicate, uses something that cannot be included.
    """
    bundle = SourceBundle()
    called = None if predicate is None else bundle.add(predicate, "predicate")
    code = f"biofx.Pipeline(({''.join(f'{_pass_code(entry, bundle)}, ' for entry in passes)}))"
    without_weights = _bytes(graph_module) > _MOST_BYTES
    saved = {
        "model": _standalone(graph_module, without_weights),
        "values": bundle.values,
        "config": None if config is None else config.to_dict(),
    }
    script = _script(story, format_graph(graph_module), bundle.source, code, called, without_weights)
    packed = io.BytesIO()
    try:
        torch.save(saved, packed)
    except Exception as error:
        raise InputError(f"the model, or what the predicate uses, cannot be pickled: {error}") from error
    contents = {"model.pt": packed.getvalue(), "reproduce.py": script.encode("utf-8", "backslashreplace")}
    try:
        return _written(Path(folder), contents) / "reproduce.py"
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write a reproducer to {str(folder)!r}: {error}") from error


@contextmanager
def without_reproducers() -> Iterator[None]:
    """Write no reproducers inside this context, for callers that expect some passes to fail."""
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


@contextmanager
def reproducing(make: Callable[[], BioGraphModule], pipeline: Pass) -> Iterator[None]:
    """Write a reproducer for an exception inside this context, and say where in a note on the exception.

    None is written for what biofx raises on purpose, except for a pass that broke its contract. What fails
    while the reproducer is written becomes a note too, so that the exception that is raised stays the same.

    Args:
        make: returns the model as it was before the pipeline.
        pipeline: what is run inside the context.
    """
    try:
        yield
    except Exception as error:
        _note_reproducer(error, make, pipeline)
        raise


def _note_reproducer(error: Exception, make: Callable[[], BioGraphModule], pipeline: Pass) -> None:
    wanted = os.environ.get(PLACE, "")
    if wanted == "off" or _is_off.get() or not _is_a_fault(error):
        return
    try:
        graph_module, stage = _before_the_failure(make(), pipeline, error)
        folder = wanted or os.path.join(tempfile.mkdtemp(prefix="biofx-"), "reproducer")
        raised = f"{type(error).__name__}: {error}".strip()
        path = write_reproducer(folder, graph_module, [stage], f"{stage}\nraises {raised}")
        note = f"{_NOTE}python {path}  ({PLACE}=FOLDER or off decides where)"
    except Exception as second:
        note = f"no reproducer was written: {type(second).__name__}: {second}"
    if hasattr(error, "add_note"):
        add_note(error, note)
    else:
        logging.getLogger("biofx").error(note)


def _is_a_fault(error: Exception) -> bool:
    """Whether an exception is a fault and not a refusal, and has no reproducer yet."""
    if any(str(note).startswith(_NOTE) for note in getattr(error, "__notes__", ())):
        return False
    return not isinstance(error, BiofxError) or (
        isinstance(error, PassError) and BROKE_ITS_CONTRACT in str(error)
    )


def _before_the_failure(
    graph_module: BioGraphModule, pipeline: Pass, error: Exception
) -> tuple[BioGraphModule, Pass]:
    """Run the passes again one by one; return the first that fails like before, and the graph before it."""
    start = graph_module
    for stage in stages_of(pipeline):
        try:
            with without_reproducers():
                graph_module = stage(graph_module).graph_module
        except Exception as again:
            if type(again) is type(error):
                return graph_module, stage
            break
    return start, pipeline


def _pass_code(entry: Pass, bundle: SourceBundle) -> str:
    """Return an expression for a pass: its pipeline text where that can be parsed, else its fields."""
    try:
        text = str(entry)
        by_name = any(name in text for name in registered_activations())  # the script does not register them
        if not by_name and Pipeline.parse(text).passes in ((entry,), getattr(entry, "passes", None)):
            return f"biofx.Pipeline.parse({text!r})"
    except BiofxError:
        pass
    name = bundle.add(type(entry))
    given = []
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if field.name == "passes":
            given.append(f"passes=({''.join(f'{_pass_code(inner, bundle)}, ' for inner in value)})")
        elif field.init and field.compare and value is not field.default and value != field.default:
            given.append(f"{field.name}={_value_code(value, f'{name}_{field.name}', bundle)}")
    return f"{name}({', '.join(given)})"


def _value_code(value: Any, name: str, bundle: SourceBundle) -> str:
    if isinstance(value, (type(None), bool, int, str)):
        return repr(value)
    if callable(value) and not isinstance(value, nn.Module):
        return bundle.add(value, name if getattr(value, "__name__", "<lambda>") == "<lambda>" else None)
    return bundle.add_value(name, value)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _standalone(graph_module: GraphModule, without_weights: bool) -> BioGraphModule:
    """Return a copy without classes of the user, except for modules that the graph calls or Python runs."""
    memo: dict[int, Any] = {}
    if without_weights:
        for parameter in graph_module.parameters():
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            memo[id(parameter)] = empty
        memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in graph_module.buffers()}
    copied = BioGraphModule.copy_of(graph_module, memo)
    if region_paths(copied):
        return copied  # a module that Python runs keeps its class
    called = {str(node.target) for node in copied.graph.nodes if node.op == "call_module"}
    for path, module in list(copied.named_modules()):
        is_ours = type(module).__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])
        if path and path not in called and not is_ours:
            plain = nn.Module()
            vars(plain).update({name: vars(module)[name] for name in _MODULE_STATE})
            copied.set_submodule(path, plain)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        number = number_read(graph_module, node)
        if number is not None:
            _put_number(copied, str(node.target).split("."), number)
    for name in (INLINED, GUARDS):  # of the modules that were there
        vars(copied).pop(name, None)
    return copied


def _put_number(root: nn.Module, path: Sequence[str], number: float) -> None:
    """Store a number at the path from which the graph reads it."""
    holder: Any = root
    for name in path[:-1]:
        if not hasattr(holder, name):
            vars(holder)[name] = SimpleNamespace()
        holder = getattr(holder, name)
    vars(holder)[path[-1]] = number


_MODULE_STATE = ("training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def _written(wanted: Path, contents: Mapping[str, bytes]) -> Path:
    """Write new files that only their owner can read, into a folder that has none of their names yet.

    Existing files and symlinks are neither followed nor replaced.

    Raises:
        OSError: the files cannot be written; none of them remains.
        ValueError: the folder is not a path.
    """
    number, folder = 1, wanted
    while any(os.path.lexists(folder / name) for name in contents):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    made: list[Path] = []
    try:
        for name, content in contents.items():
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            made.append(folder / name)
            with open(descriptor, "wb") as file:
                file.write(content)
    except OSError:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return folder


def _script(
    story: str, graph: str, source: str, passes: str, predicate: str | None, without_weights: bool
) -> str:
    """Return the script; texts from outside are literals or comments in it, or code of the user."""
    known = {"torch": torch.__version__}  # with the build, which its package does not tell
    names = ("biofx", "torch", "networkx", "rich")
    packages = [f"{name} {known.get(name) or version(name)}" for name in names]
    versions = ", ".join((*packages, f"Python {platform.python_version()}"))
    lines = (*story.splitlines(), "", f"Written with {versions}, on {platform.platform()}.")
    comment = "\n".join((_CODING, *(f"# {_printable(line)}".rstrip() for line in lines)))
    shown = "\n".join(f"#   {_printable(line)}" for line in graph.splitlines())
    weights = _DRAW_WEIGHTS if without_weights else ""
    run = _CALL_PREDICATE.format(predicate=predicate) if predicate else "print(report)\n"
    parts = (
        f"{comment}\n#\n# The graph before:\n{shown}",
        "from pathlib import Path\n\nimport torch\n\nimport biofx",
        'saved = torch.load(Path(__file__).with_name("model.pt"), weights_only=False)',
        'globals().update(saved["values"])',
        *([source.strip()] if source.strip() else []),
        f'model = saved["model"]{weights}',
        'config = None if saved["config"] is None else biofx.BioConfig.from_dict(saved["config"])',
        f"passes = {passes}",
        f"bio_model, report = biofx.transform(model, config, passes=passes)\n{run}",
    )
    return "\n\n".join(parts)


_CODING = "# -*- coding: utf-8 -*-"
"""The first line: Python uses the first of several encodings, and a story may contain one."""


def _printable(line: str) -> str:
    """Return a line in which characters that a comment cannot contain are escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


_DRAW_WEIGHTS = """
# the weights are too large for a reproducer; these are random
model.to_empty(device="cpu")
draw = torch.Generator().manual_seed(0)
for parameter in model.parameters():
    parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
for buffer in model.buffers():
    buffer.zero_()"""

_CALL_PREDICATE = """print(report)
print("before the passes:", {predicate}(biofx.capture(model)))
print("after the passes: ", {predicate}(bio_model))
"""
