"""The command line: ``biofx demo | transform | passes | config | explain | plot | bisect``.

Exit codes: 0 done; 1 the model, a selector or an option was refused (one line on stderr says why); 2 the
command line itself is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from torch import nn

from biofx._version import __version__
from biofx.config import BioConfig
from biofx.errors import BiofxError, InputError, OptionError, suggest
from biofx.random_state import preserved_random_state
from biofx.rewriting.pass_text import parse_value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets what it can show
    try:
        options.run_command(options)
        sys.stdout.flush()
    except BiofxError as error:
        Console(stderr=True).print(
            f"biofx: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="biofx", description="Rewrite PyTorch models so that they learn like synapses."
    )
    parser.add_argument("--version", action="version", version=f"biofx {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train plain and rewritten networks side by side")
    demo.add_argument("--digits", action="store_true", help="learn to read digits once, not task after task")
    demo.add_argument("--seed", type=int, default=0, help="reproduces a run exactly (default: 0)")
    demo.add_argument("--seeds", type=int, help="pairs of networks (default: 3)")
    demo.add_argument("--tasks", type=int, help="tasks one after another (default: 60)")
    demo.add_argument("--epochs", type=int, help="of --digits: passes over the training set (default: 12)")
    demo.add_argument(
        "--out",
        dest="folder",
        type=Path,
        metavar="FOLDER",
        help="for the files (default: biofx-demo, or biofx-demo-digits)",
    )
    demo.set_defaults(run_command=_demo)

    transform = commands.add_parser("transform", help="rewrite a model and show what changed")
    _add_target(transform)
    transform.add_argument("--passes", help="pipeline text instead of the config's passes")
    transform.add_argument(
        "--only", action="append", metavar="SELECTOR", help="rewrite only these (repeatable)"
    )
    transform.add_argument(
        "--exclude", action="append", metavar="SELECTOR", help="leave these alone (repeatable)"
    )
    transform.add_argument(
        "--opaque", action="append", default=[], metavar="PATH", help="do not look into this module"
    )
    transform.add_argument("--graph", action="store_true", help="print the rewritten graph")
    transform.add_argument("--diff", action="store_true", help="print what differs between the two graphs")
    transform.add_argument(
        "--print-changed", action="store_true", help="print the difference after each pass"
    )
    transform.add_argument(
        "--table", action="store_true", help="print the remarks pass by pass, not as a tree"
    )
    transform.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    transform.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page to look at")
    transform.add_argument("--svg", type=Path, metavar="FILE", help="write a picture of the rewritten graph")
    transform.add_argument("--dot", type=Path, metavar="FILE", help="write the rewritten graph for Graphviz")
    transform.set_defaults(run_command=_transform)

    plot = commands.add_parser("plot", help="draw what a monitor recorded in a file of JSON lines")
    plot.add_argument("run", type=Path, metavar="RUN.jsonl", help="what biofx.Monitor(path=…) wrote")
    plot.add_argument("--out", type=Path, metavar="FILE", help="the picture (default: RUN.png)")
    plot.add_argument(
        "--layers", action="store_true", help="one row per layer at the end, instead of curves over the steps"
    )
    plot.set_defaults(run_command=_plot)

    bisect = commands.add_parser("bisect", help="find the pass and the node that make a predicate true")
    bisect.add_argument(
        "script",
        type=Path,
        metavar="SCRIPT.py",
        help="defines model and predicate(bio_model), and, where wanted, config and passes",
    )
    bisect.add_argument("--only", action="append", metavar="SELECTOR", help="rewrite only these (repeatable)")
    bisect.add_argument(
        "--exclude", action="append", metavar="SELECTOR", help="leave these alone (repeatable)"
    )
    bisect.add_argument(
        "--out",
        type=Path,
        default=Path("biofx-reproducer"),
        metavar="FOLDER",
        help="where the reproducer goes (default: biofx-reproducer)",
    )
    bisect.set_defaults(run_command=_bisect)

    passes = commands.add_parser("passes", help="list the passes and their options")
    passes.set_defaults(run_command=_passes)

    config = commands.add_parser("config", help="list the options of a config, or write a file of them")
    config.add_argument("--pass", dest="pass_name", metavar="NAME", help="only the options of this pass")
    config.add_argument("--rule", metavar="NAME", help="only the options of this rule of plasticity")
    config.add_argument(
        "--toml", action="store_true", help="as a TOML file of the defaults; so it is outside a terminal, too"
    )
    config.set_defaults(run_command=_show_config)

    explain = commands.add_parser("explain", help="show what a selector picks and what happens there")
    _add_target(explain)
    explain.add_argument("selector", metavar="SELECTOR", help="name, path, glob, re:… or type:…")
    explain.set_defaults(run_command=_explain)
    return parser


def _examples(options: argparse.Namespace) -> Any:
    from biofx.capture.example_text import examples_from_text

    return examples_from_text(options.example) if options.example else None


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "target", metavar="TARGET", help="MODULE:NAME or FILE.py:NAME of a model, or of what makes one"
    )
    command.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="[NAME=]TENSOR",
        help='an example input, such as "torch.randn(12, 4, 3)" (repeatable): shapes and dtypes, no code',
    )
    command.add_argument("--config", type=Path, metavar="FILE", help="a config in TOML")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="set a config field"
    )
    command.add_argument(
        "--override",
        action="append",
        default=[],
        nargs="+",
        metavar=("SELECTOR", "FIELD=VALUE"),
        help="set config fields for what a selector picks",
    )


def _config(options: argparse.Namespace) -> BioConfig:
    config = BioConfig.from_toml(options.config) if options.config else BioConfig()
    config = config.replace(**_assignments(options.set))
    for selector, *assignments in options.override:
        config = config.override(selector, **_assignments(assignments))
    return config


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"expected FIELD=VALUE, found {text!r}")
        fields[name.strip()] = parse_value(value)
    return fields


def _transform(options: argparse.Namespace) -> None:
    from biofx.graph.changes import diff_graphs, print_changed, render_diff
    from biofx.graph.printing import format_graph
    from biofx.progress import shown
    from biofx.rewriting.views.terminal import ModelTree
    from biofx.toml import write_whole
    from biofx.transform import transform

    console = Console()
    before: list[str] = []

    def observe(name: str, old: str, new: str) -> None:
        before.append(old)
        if options.print_changed:
            print_changed(name, old, new, console=console)

    model = load_target(options.target)
    with shown():
        bio_model, report = transform(
            model,
            _config(options),
            passes=options.passes,
            only=options.only,
            exclude=options.exclude,
            opaque=options.opaque,
            example_inputs=_examples(options),
            observe=observe,
        )
    for path, write in (
        (options.html, report.to_html),
        (options.svg, report.to_svg),
        (options.dot, report.to_dot),
    ):
        if path:
            write(path)
    if options.json:
        write_whole(options.json, report.to_json() + "\n")
    if options.diff:
        console.print(render_diff(diff_graphs(before[0], bio_model) if before else ""), soft_wrap=True)
    if options.graph:
        console.print(format_graph(bio_model), markup=False, highlight=False, soft_wrap=True)
    console.print(report if options.table else ModelTree(report))


def _plot(options: argparse.Namespace) -> None:
    from biofx.diagnostics.layer_plot import plot_layers
    from biofx.diagnostics.monitor import Monitor

    out = options.out or options.run.with_suffix(".png")
    monitor = Monitor.read(options.run)
    if options.layers:
        plot_layers(monitor.records, out)
    else:
        monitor.plot(out)
    Console().print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)


def _bisect(options: argparse.Namespace) -> None:
    from biofx.diagnostics.bisection import bisect
    from biofx.progress import shown

    script = load_script(options.script)
    predicate = getattr(script, "predicate", None)
    if predicate is not None and not callable(predicate):
        raise InputError(f"{options.script}: expected a function called predicate, found {predicate!r}")
    with shown():
        result = bisect(
            model_in(script, "model", str(options.script)),
            getattr(script, "config", None),
            predicate,
            passes=getattr(script, "passes", None),
            only=options.only,
            exclude=options.exclude,
            reproducer=options.out,
        )
    Console().print(str(result), markup=False, highlight=False, soft_wrap=True)


def _passes(options: argparse.Namespace) -> None:
    from biofx.rewriting.catalogue import describe_passes

    Console().print(describe_passes())


def _show_config(options: argparse.Namespace) -> None:
    from biofx.rewriting.config_text import commented_toml, describe_config

    console = Console()
    if options.toml or not console.is_terminal:  # as in biofx config > my.toml
        sys.stdout.write(commented_toml(options.pass_name, options.rule))
    else:
        console.print(describe_config(options.pass_name, options.rule))


def _explain(options: argparse.Namespace) -> None:
    from biofx.diagnostics.explain import explain

    model, examples = load_target(options.target), _examples(options)
    Console().print(explain(model, options.selector, _config(options), example_inputs=examples))


def _demo(options: argparse.Namespace) -> None:
    from biofx.demo import run_demo, run_digits

    names = ("seeds", "tasks", "epochs", "folder")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "tasks" in given and options.digits:
        raise InputError("expected --epochs with --digits, found --tasks; leave one of the two out")
    if "epochs" in given and not options.digits:
        raise InputError("expected --tasks, found --epochs, which --digits has; add that, or give --tasks")
    (run_digits if options.digits else run_demo)(seed=options.seed, **given)


def load_target(target: str) -> nn.Module:
    """Return the model that ``MODULE:NAME`` or ``FILE.py:NAME`` leads to.

    ``NAME`` is a module, or anything that returns one when called without arguments.

    Raises:
        InputError: the text is not of that form, or nothing, or no model, is there.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"expected MODULE:NAME or FILE.py:NAME, found {target!r}")
    with preserved_random_state():
        return model_in(_import(place), name, place)


def model_in(found: Any, name: str, place: str) -> nn.Module:
    """Return the model of that name in a module; ``place`` is what messages call it.

    Raises:
        InputError: nothing, or no model, is there.
    """
    target = f"{place}:{name}"
    with preserved_random_state():
        for part in name.split("."):
            if not hasattr(found, part):
                raise InputError(f"{place!r} has no {part!r}{suggest(part, dir(found))}")
            found = getattr(found, part)
        if isinstance(found, nn.Module):
            return found
        try:
            made = found() if callable(found) else found
        except Exception as error:
            raise InputError(
                f"expected a model from {target}(), which fails: {_first_line(error)}"
            ) from error
    if not isinstance(made, nn.Module):
        raise InputError(f"expected {target!r} to give a torch.nn.Module, found a {type(made).__name__}")
    return made


def load_script(path: str | Path) -> ModuleType:
    """Return what a Python file defines; a file that was read before is read again.

    Raises:
        InputError: there is none, or it fails.
    """
    with preserved_random_state():
        return _import_file(Path(path))


def _import(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _import_file(Path(place))
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise InputError(f"cannot import {place!r}: {_first_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"expected a Python file, found none at {str(path)!r}")
    beside = str(path.resolve().parent)
    if beside not in sys.path:  # as Python does for a script: it may import what lies beside it
        sys.path.insert(0, beside)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise InputError(f"cannot import {str(path)!r}: {_first_line(error)}") from error
    return module


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
