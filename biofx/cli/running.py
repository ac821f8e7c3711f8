"""Commands that take no model: ``demo``, ``passes``, ``config``, ``plot``."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from biofx.errors import InputError


def demo(options: argparse.Namespace) -> None:
    """Train plain and rewritten networks side by side."""
    from biofx.demo import run_demo, run_digits

    names = ("seeds", "tasks", "epochs", "folder")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "tasks" in given and options.digits:
        raise InputError("expected --epochs with --digits, found --tasks; leave one of the two out")
    if "epochs" in given and not options.digits:
        raise InputError("expected --tasks, found --epochs, which --digits has; add that, or give --tasks")
    (run_digits if options.digits else run_demo)(seed=options.seed, **given)


def passes(options: argparse.Namespace) -> None:
    """List the passes and their options."""
    from biofx.rewriting.catalogue import describe_passes

    Console().print(describe_passes())


def config(options: argparse.Namespace) -> None:
    """List the options of a config, or write a file of them."""
    from biofx.rewriting.config_text import commented_toml, describe_config

    console = Console()
    if options.toml or not console.is_terminal:  # as in biofx config > my.toml
        sys.stdout.write(commented_toml(options.pass_name, options.rule))
    else:
        console.print(describe_config(options.pass_name, options.rule))


def plot(options: argparse.Namespace) -> None:
    """Draw what a monitor recorded."""
    from biofx.diagnostics.layer_plot import plot_layers
    from biofx.diagnostics.monitor import Monitor

    out = options.out or options.run.with_suffix(".png")
    monitor = Monitor.read(options.run)
    if options.layers:
        plot_layers(monitor.records, out)
    else:
        monitor.plot(out)
    Console().print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)
