"""What is read from the command line before torch is imported: overrides, and how the output should look."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence

_ASSIGNMENT = re.compile(r"\s*[A-Za-z_]\w*\s*=(?!=)")
_OVERRIDE = re.compile(r"(?s)(?P<selector>.+?)\s*:(?P<fields>\s*[A-Za-z_]\w*\s*=(?!=).*)")
_NEXT_FIELD = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=(?!=))")


def expand_overrides(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``--override SELECTOR FIELD=VALUE …`` as ``--override=SELECTOR: FIELD=VALUE`` for each field.

    What follows and is no assignment is left for the command: the name of the model is never taken.

    >>> expand_overrides(["--override", "fc*", "seed=1", "model.py:Net"])
    ['--override=fc*: seed=1', 'model.py:Net']
    >>> expand_overrides(["--override", "fc1: seed=1, nu=2", "--diff"])
    ['--override=fc1: seed=1, nu=2', '--diff']
    """
    found: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument != "--override" or not rest:
            found.append(argument)
            continue
        selector = rest.pop(0)
        fields = []
        while rest and not _OVERRIDE.fullmatch(selector) and _ASSIGNMENT.match(rest[0]):
            fields.append(rest.pop(0))
        found += [f"--override={selector}: {field}" for field in fields] or [f"--override={selector}"]
    return found


def split_override(text: str) -> tuple[str, list[str]] | None:
    """Return selector and assignments of ``SELECTOR: FIELD=VALUE, FIELD=VALUE``, None for another text.

    >>> split_override("re:layer4.*: weight_splitting_Gamma=2, fuzzy_lr_distribution=normal")
    ('re:layer4.*', ['weight_splitting_Gamma=2', 'fuzzy_lr_distribution=normal'])
    """
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        return None
    return match["selector"].strip(), [field.strip() for field in _NEXT_FIELD.split(match["fields"])]


@contextlib.contextmanager
def output_as_asked(color: str, *, quiet: bool) -> Iterator[None]:
    """Colour what is printed, always, never or in a terminal alone (``"auto"``); quiet: print nothing.

    Errors are printed all the same.
    """
    wanted: dict[str, str | None] = {}
    if color == "always":
        plain = os.environ.get("TERM") in (None, "", "dumb", "unknown")
        wanted = {"FORCE_COLOR": "1", "NO_COLOR": None, **({"TERM": "xterm-256color"} if plain else {})}
        wanted |= {} if sys.stdout.isatty() else {"TTY_INTERACTIVE": "0"}  # in a file, no line is drawn again
    elif color == "never":
        wanted = {"NO_COLOR": "1", "FORCE_COLOR": None, "TERM": "dumb"}
    before = {name: os.environ.get(name) for name in wanted}
    with contextlib.ExitStack() as restored:
        restored.callback(_set, before)
        _set(wanted)
        if quiet:
            nowhere = restored.enter_context(open(os.devnull, "w", encoding="utf-8"))
            restored.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
