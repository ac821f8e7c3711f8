"""Commands that rewrite a model: ``transform``, ``explain``, ``bisect``."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from biofx import diagnostics
from biofx import transform as rewrite
from biofx.cli.targets import examples_of, load_script, load_target, model_in
from biofx.cli.values import config_of
from biofx.diagnostics import explain as explaining
from biofx.errors import InputError
from biofx.graph.changes import diff_graphs, print_changed, render_diff
from biofx.graph.printing import format_graph
from biofx.progress import shown
from biofx.rewriting.views.terminal import ModelTree
from biofx.toml import write_whole


def transform(options: argparse.Namespace) -> None:
    """Rewrite a model and show what changed."""
    console = Console()
    before: list[str] = []

    def observe(name: str, old: str, new: str) -> None:
        before.append(old)
        if options.print_changed:
            print_changed(name, old, new, console=console)

    model = load_target(options.target)
    with _progress(options):
        bio_model, report = rewrite(
            model,
            config_of(options),
            passes=options.passes,
            only=options.only,
            exclude=options.exclude,
            opaque=options.opaque,
            example_inputs=examples_of(options),
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


def explain(options: argparse.Namespace) -> None:
    """Show what a selector picks and what happens there."""
    model, examples = load_target(options.target), examples_of(options)
    found = explaining.explain(model, options.selector, config_of(options), example_inputs=examples)
    Console().print(found)


def bisect(options: argparse.Namespace) -> None:
    """Find the pass and the node that make a predicate true."""
    script = load_script(options.script)
    predicate = getattr(script, "predicate", None)
    if predicate is not None and not callable(predicate):
        raise InputError(f"{options.script}: expected a function called predicate, found {predicate!r}")
    with _progress(options):
        result = diagnostics.bisect(
            model_in(script, "model", str(options.script)),
            getattr(script, "config", None),
            predicate,
            passes=getattr(script, "passes", None),
            only=options.only,
            exclude=options.exclude,
            reproducer=options.out,
        )
    Console().print(str(result), markup=False, highlight=False, soft_wrap=True)


def _progress(options: argparse.Namespace) -> AbstractContextManager[None]:
    return shown() if sys.stderr.isatty() and not options.quiet else nullcontext()
