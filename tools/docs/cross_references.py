"""What a docstring refers to: a name of ours must exist, and is a link where the reference has it."""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from biofx.config import BioConfig
from biofx.options import declared_options

_OURS = "biofx"


def setup(app: Sphinx) -> None:
    """Listen for docstrings, and for references that Sphinx cannot resolve."""
    app.connect("autodoc-process-docstring", _leave_out_options, priority=1)  # before others read them
    app.connect("autodoc-process-docstring", _show_remedy)
    app.connect("missing-reference", _resolve)


def _leave_out_options(app: Sphinx, kind: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Leave out the declared options of a docstring, which have a page of their own."""
    if kind == "class" and hasattr(found, "__dataclass_fields__") and declared_options(found):
        page = "options" if found is BioConfig else "passes"
        lines[lines.index("Attributes:") :] = [f"Its fields: :doc:`/reference/{page}`."]


def _show_remedy(app: Sphinx, kind: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [re.sub("^Remedy:", "**Remedy:**", line) for line in lines]


def _resolve(
    app: Sphinx, env: BuildEnvironment, reference: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Return a link, plain code for what the reference leaves out; None, an error, for what is nowhere."""
    if reference.get("refdomain") != "py":
        return None
    target: str = reference["reftarget"]
    objects = env.domains.python_domain.objects
    found = _find(target, reference.get("py:module") or _OURS)
    own = "" if found is None else f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    known = [own] if own in objects else [name for name in objects if name.endswith(f".{target}")]
    places = {(objects[name].docname, objects[name].node_id) for name in known}
    if len(places) == 1:
        ((docname, anchor),) = places
        link = nodes.reference("", "", content, internal=True)
        link["refuri"] = f"{app.builder.get_relative_uri(reference['refdoc'], docname)}#{anchor}"
        return link
    return content if found is not None or not target.startswith(f"{_OURS}.") else None


def _find(target: str, module: str) -> Any:
    """Return what a dotted name leads to, in full or from a module; None for nothing."""
    for name in (target, f"{module}.{target}"):
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            try:
                return functools.reduce(
                    getattr, parts[count:], importlib.import_module(".".join(parts[:count]))
                )
            except (ImportError, AttributeError):
                continue
    return None
