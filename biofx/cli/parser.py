"""The commands and their arguments. Nothing here imports torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from biofx._version import __version__
from biofx.cli.completion import PrintCompletion

_EXIT_CODES = """\
exit codes:
  0    done
  1    the model, a selector or an option was refused: a line on stderr says why
  2    the command line itself is wrong
  3    check found a fault, or diff a difference
  130  interrupted
"""
_THING = "MODULE:NAME or FILE.py:NAME of a model, a config in TOML, or a checkpoint"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; ``command`` of what it reads is ``FILE:FUNCTION`` of this folder."""
    parser = argparse.ArgumentParser(
        prog="biofx",
        description="Rewrite PyTorch models so that they learn like synapses.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"biofx {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        metavar="SHELL",
        help="print what completes arguments in bash, zsh or tcsh (pip install 'biofx[completion]')",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_demo, _transform, _explain, _check, _diff, _passes, _config, _plot, _bisect):
        add(commands)
    return parser


def _command(commands: Any, name: str, function: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text)
    command.set_defaults(command=function)
    command.add_argument("--quiet", action="store_true", help="print nothing but errors; files are written")
    command.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="default: auto, in a terminal"
    )
    return command


def _demo(commands: Any) -> None:
    demo = _command(commands, "demo", "running:demo", "train plain and rewritten networks side by side")
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


def _transform(commands: Any) -> None:
    transform = _command(
        commands, "transform", "transforming:transform", "rewrite a model and show what changed"
    )
    _add_target(transform)
    _add_config(transform)
    transform.add_argument("--passes", help="pipeline text instead of the config's passes")
    _add_selection(transform)
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


def _explain(commands: Any) -> None:
    explain = _command(
        commands, "explain", "transforming:explain", "show what a selector picks and what happens there"
    )
    _add_target(explain)
    _add_config(explain)
    explain.add_argument("selector", metavar="SELECTOR", help="name, path, glob, re:… or type:…")


def _check(commands: Any) -> None:
    check = _command(commands, "check", "comparing:check", "load a checkpoint and audit what is in it")
    check.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what biofx.save wrote")
    _add_target(check)
    check.add_argument("--json", type=Path, metavar="FILE", help="write the audit as JSON")


def _diff(commands: Any) -> None:
    diff = _command(commands, "diff", "comparing:diff", "say what differs between two of a kind")
    diff.add_argument("one", metavar="A", help=_THING)
    diff.add_argument("other", metavar="B", help="another of the same kind")
    diff.add_argument("--all", action="store_true", help="every line, where a list is long")


def _passes(commands: Any) -> None:
    _command(commands, "passes", "running:passes", "list the passes and their options")


def _config(commands: Any) -> None:
    config = _command(
        commands, "config", "running:config", "list the options of a config, or write a file of them"
    )
    config.add_argument("--pass", dest="pass_name", metavar="NAME", help="only the options of this pass")
    config.add_argument("--rule", metavar="NAME", help="only the options of this rule of plasticity")
    config.add_argument(
        "--toml", action="store_true", help="as a TOML file of the defaults; so it is outside a terminal, too"
    )


def _plot(commands: Any) -> None:
    plot = _command(commands, "plot", "running:plot", "draw what a monitor recorded in a file of JSON lines")
    plot.add_argument("run", type=Path, metavar="RUN.jsonl", help="what biofx.Monitor(path=…) wrote")
    plot.add_argument("--out", type=Path, metavar="FILE", help="the picture (default: RUN.png)")
    plot.add_argument(
        "--layers", action="store_true", help="one row per layer at the end, instead of curves over the steps"
    )


def _bisect(commands: Any) -> None:
    bisect = _command(
        commands, "bisect", "transforming:bisect", "find the pass and the node that make a predicate true"
    )
    bisect.add_argument(
        "script",
        type=Path,
        metavar="SCRIPT.py",
        help="defines model and predicate(bio_model), and, where wanted, config and passes",
    )
    _add_selection(bisect)
    bisect.add_argument(
        "--out",
        type=Path,
        default=Path("biofx-reproducer"),
        metavar="FOLDER",
        help="where the reproducer goes (default: biofx-reproducer)",
    )


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--only", action="append", metavar="SELECTOR", help="rewrite only these (repeatable)"
    )
    command.add_argument(
        "--exclude", action="append", metavar="SELECTOR", help="leave these alone (repeatable)"
    )


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


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, metavar="FILE", help="a config in TOML")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set a config field; values as in Python or TOML (repeatable)",
    )
    command.add_argument(
        "--override",
        action="append",
        default=[],
        metavar='"SELECTOR: FIELD=VALUE, …"',
        help="set config fields for what a selector picks (repeatable, the last one wins)",
    )
