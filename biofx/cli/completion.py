"""Completion of arguments in a shell, by shtab, which is imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
_FILES = frozenset({"checkpoint", "config", "json", "html", "svg", "dot", "run", "script", "target"})
_FOLDERS = frozenset({"folder"})


class PrintCompletion(argparse.Action):
    """Prints the script that completes the parser's arguments, and ends."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, choices=SHELLS)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Print the script for the shell that is named."""
        try:
            import shtab
        except ImportError as error:
            parser.exit(
                1,
                f"biofx: completion needs the package shtab: pip install 'biofx[completion]' ({error})\n",
            )
        _mark_files(parser)
        sys.stdout.write(shtab.complete(parser, shell=str(values)) + "\n")
        parser.exit()


def _mark_files(parser: argparse.ArgumentParser) -> None:
    """Say which arguments are files, as shtab wants to be told."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_files(command)
        marked: Any = action
        if action.dest in _FILES or action.metavar == "FILE":
            marked.complete = shtab.FILE
        elif action.dest in _FOLDERS or action.metavar == "FOLDER":
            marked.complete = shtab.DIRECTORY
