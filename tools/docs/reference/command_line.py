"""The page of the commands, from the parser that reads them."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Iterator

from biofx import cli
from biofx.cli.parser import make_parser
from docs.reference.markup import directive, section


def command_line() -> str:
    """Return the page: each command with its usage and its options."""
    parser = make_parser()
    story = (inspect.getdoc(cli) or "").partition("\n\n")[2]
    return "\n\n".join([parser.description or "", story, *map(_command, _commands(parser))])


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            yield from ((command, helps.get(name, "")) for name, command in action.choices.items())


def _command(found: tuple[argparse.ArgumentParser, str]) -> str:
    command, summary = found
    usage = textwrap.dedent(f"       {command.format_usage().removeprefix('usage: ')}").strip()
    options = [
        directive("option", ", ".join(_spellings(action)), _escaped(action.help or ""))
        for action in command._actions
        if not isinstance(action, argparse._HelpAction)
    ]
    said = command.description or f"{summary[:1].upper()}{summary[1:]}."
    return section(
        command.prog,
        _escaped(said),
        directive("code-block", "text", usage),
        directive("program", command.prog),
        *options,
    )


def _spellings(action: argparse.Action) -> list[str]:
    names = action.metavar or action.dest.upper()
    argument = "" if action.nargs == 0 else " ".join([names] if isinstance(names, str) else names)
    if not action.option_strings:
        return [argument]
    return [f"{spelling} {argument}".strip() for spelling in action.option_strings]


def _escaped(text: str) -> str:
    """Return a text of the parser without what reStructuredText would take for markup."""
    return text.replace("\\", "\\\\").replace("*", "\\*").replace("`", "\\`")
