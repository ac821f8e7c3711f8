"""The command line: ``biofx demo | transform | check | diff | explain | passes | config | plot | bisect``.

Exit codes: 0 done; 1 the model, a selector or an option was refused (one line on stderr says why); 2 the
command line itself is wrong; 3 ``check`` found a fault, or ``diff`` a difference; 130 interrupted.

Arguments are read before torch is imported, so that ``--version``, ``--help`` and completion answer at once.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from biofx._startup import import_everything
from biofx.cli.options import expand_overrides, output_as_asked
from biofx.cli.parser import make_parser
from biofx.errors import BiofxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(expand_overrides(given))
    with ExitStack() as output:
        output.enter_context(output_as_asked(options.color, quiet=options.quiet))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without Unicode gets what it can show
        import_everything()
        place, _, name = options.command.partition(":")
        try:
            code = getattr(importlib.import_module(f"biofx.cli.{place}"), name)(options)
            sys.stdout.flush()
        except BiofxError as error:
            _show(error)
            return 1
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    return int(code or 0)


def _show(error: BiofxError) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"biofx: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
