"""Commands about what was saved: ``check`` and ``diff``. Exit code 3 says that something was found."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from torch import nn

from biofx import checkpoints, diagnostics
from biofx.checkpoints import Checkpoint
from biofx.cli.targets import examples_of, load_target
from biofx.config import BioConfig
from biofx.diagnostics.differences import differences
from biofx.errors import InputError
from biofx.model.graph_module import BioGraphModule
from biofx.toml import write_whole

FOUND = 3
_SHOWN = 20
"""Lines of a list, so that a short one fits a terminal."""


def check(options: argparse.Namespace) -> int:
    """Load a checkpoint and audit what is in it."""
    saved = Checkpoint.read(options.checkpoint)
    model, examples = load_target(options.target), examples_of(options)
    recorded = any(step.recorded for step in saved.record.steps)
    if recorded and examples is None and not isinstance(model, BioGraphModule):
        raise InputError(
            "the model was captured with example inputs, which a checkpoint does not hold: give such again, "
            'as --example "torch.randn(12, 4, 3)"'
        )
    audit = diagnostics.check(checkpoints.load(saved, model, example_inputs=examples))
    if options.json:
        write_whole(options.json, audit.to_json() + "\n")
    Console().print(audit)
    return 0 if audit.ok else FOUND


def diff(options: argparse.Namespace) -> int:
    """Say what differs between two models, configs or checkpoints."""
    one, other = _thing(options.one), _thing(options.other)
    found = differences(one, other)
    shown = found if options.all or len(found) <= _SHOWN else found[: _SHOWN - 1]
    console = Console()
    for line in shown or ["no difference"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(shown) < len(found):
        console.print(f"… and {len(found) - len(shown)} more: --all shows them", highlight=False)
    return FOUND if found else 0


def _thing(text: str) -> BioConfig | Checkpoint | nn.Module:
    """Return what a text names: a config, a checkpoint or a model.

    Raises:
        InputError: it names nothing.
    """
    if text.endswith(".toml"):
        return BioConfig.from_toml(text)
    if Path(text).is_file():
        return Checkpoint.read(text)
    if ":" not in text:
        raise InputError(f"expected MODULE:NAME or FILE.py:NAME of a model, or a file, found {text!r}")
    return load_target(text)
