"""Whether Python runs the command line, which reads its arguments before anything imports torch.

``import biofx`` imports all of it at once, so that operators are registered when an exported program is
loaded and whatever is pickled is found. The command line alone imports nothing until it knows what it was
asked for: ``biofx --version`` would take seconds otherwise.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path


def _is_command_line() -> bool:
    """Whether it is ``python -m biofx``, or the script that is installed beside Python."""
    if not sys.argv:
        return False
    if sys.argv[0] == "-m":  # so it is while Python looks for the module
        asked = sys.orig_argv
        return "-m" in asked and asked[asked.index("-m") + 1 :][:1] == ["biofx"]
    script = Path(os.path.realpath(sys.argv[0]))
    scripts = Path(sys.executable).parent
    return script.stem == "biofx" and script.parent in (scripts, scripts / "Scripts")


_is_reading = _is_command_line()


def is_reading_arguments() -> bool:
    """Whether this is ``biofx`` or ``python -m biofx``, and its arguments are still to be read."""
    return _is_reading


def import_everything() -> None:
    """Import what ``import biofx`` imports elsewhere; does nothing where that has been done."""
    global _is_reading
    if _is_reading:
        _is_reading = False
        module = sys.modules["biofx"]
        # meanwhile, a name that is not there yet is no mistake
        vars(module).pop("__getattr__", None)
        importlib.reload(module)
