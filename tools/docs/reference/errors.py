"""The page of the errors: what each means and what to do."""

from __future__ import annotations

import inspect
import re

from biofx import errors
from docs.reference.markup import directive, section


def error_classes() -> str:
    """Return the page: the tree, then each class in its order."""
    story = inspect.getdoc(errors) or ""
    introduction, _, tree = story.partition("\n\n")
    names = (re.match(r"[├│└─ ]*\w+Error\b", line) for line in tree.splitlines())
    drawn = [found[0] for found in names if found]
    found = sorted(
        map(vars(errors).__getitem__, errors.__all__), key=lambda cls: inspect.getsourcelines(cls)[1]
    )
    parts = [
        introduction,
        directive("code-block", "text", "\n".join(drawn)),
        *(
            section(cls.__name__, directive("autoclass", f"biofx.errors.{cls.__name__}", show_inheritance=""))
            for cls in found
        ),
    ]
    return "\n\n".join(parts)
