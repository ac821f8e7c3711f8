"""What survives what: every mechanism through everything that happens to a model, measured.

``python tools/durability`` prints the table, with ``-v`` what was raised in each cell. A cell compares
outputs and gradients with the mechanism's definition, written out by hand below, after making sure that the
plain model would not pass.

kept     outputs and gradients are those of the definition
refused  biofx raises an error that says why and what to do
idle     the mechanism does nothing there, by design: see the notes
unrun    there is no CUDA device to run it on
LOST, WRONG, CRASH  what must not be in the table
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch._C._distributed_c10d import HashStore

import biofx
from durability.changes import CHANGES
from durability.journeys import JOURNEYS, NEEDS_A_GPU, Journey
from durability.measures import MEASURES, values_and_gradients
from durability.mechanisms import MECHANISMS

NO_DEVICE = "unrun"
NOTES = """\
kept: outputs and gradients are those of the mechanism's definition, written out by hand; refused: an error
says why and what to do; idle: nothing is observed where inputs are no batches (torch.func);
unrun: there is no CUDA device here."""


@contextmanager
def one_process_group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def after_journey(name: str, journey: Journey) -> str:
    """Compare a mechanism with its definition after a journey."""
    return MEASURES.get(name, values_and_gradients)(MECHANISMS[name], journey)


def measure(name: str, taken: Callable[[str], str], *, verbose: bool = False) -> str:
    """Return what goes into one cell, with the error if there is one and it is asked for."""
    try:
        return taken(name)
    except biofx.BiofxError as error:
        return f"refused: {error}" if verbose else "refused"
    except AssertionError:
        raise
    except Exception as error:
        return f"CRASH: {type(error).__name__}: {error}" if verbose else "CRASH"


ROWS: dict[str, Callable[[str], str]] = {
    **{name: partial(after_journey, journey=journey) for name, journey in JOURNEYS.items()},
    **CHANGES,
}


def table(*, verbose: bool = False) -> str:
    """Measure the rows and return the table."""
    torch.set_num_threads(1)
    columns = list(MECHANISMS)
    rows = [["", *columns]]
    with warnings.catch_warnings(), one_process_group():
        warnings.simplefilter("ignore")
        for name, taken in ROWS.items():
            if name in NEEDS_A_GPU and not torch.cuda.is_available():
                rows.append([name, *[NO_DEVICE] * len(columns)])
                continue
            rows.append([name, *(measure(column, taken, verbose=verbose) for column in columns)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns) + 1)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def main(*, verbose: bool = False) -> None:
    """Print the table and its notes."""
    print(f"{table(verbose=verbose)}\n\n{NOTES}")
