"""On the site, a name in inline code leads to its place in the reference; in the repository it is plain code.

``biofx.attach``, ``Rule``, ``weight_splitting_Gamma``, ``split-weights`` and ``rejuvenate_units`` all do.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from biofx.config import config_options

_KIND = "inline-code"
_NAME = re.compile(r"[A-Za-z][\w.-]+(\(\))?")


def setup(app: Sphinx) -> None:
    """Mark what may be a name when a page is read, and look it up when all are."""
    app.connect("doctree-read", _mark)
    app.connect("missing-reference", _look_up)


def _mark(app: Sphinx, page: nodes.document) -> None:
    name = app.env.docname
    for block in page.findall(nodes.literal_block):  # doctests end with a blank line
        block.children[:] = [nodes.Text(block.astext().rstrip("\n"))]
    if name.startswith("reference/"):  # where references are written
        return
    for literal in list(page.findall(nodes.literal)):
        in_link = isinstance(literal.parent, (nodes.reference, pending_xref, nodes.title))
        if not in_link and _NAME.fullmatch(literal.astext()):
            mark = pending_xref("", refdomain="", reftype=_KIND, reftarget=literal.astext(), refdoc=name)
            literal.replace_self(mark)
            mark += literal


def _look_up(
    app: Sphinx, env: BuildEnvironment, mark: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    if mark["reftype"] != _KIND:
        return None
    place = _place(mark["reftarget"].removesuffix("()"), env)
    if place is None or place[0] == mark["refdoc"]:
        return content
    link = nodes.reference("", "", content, internal=True)
    link["refuri"] = f"{app.builder.get_relative_uri(mark['refdoc'], place[0])}#{place[1]}"
    return link


def _place(name: str, env: BuildEnvironment) -> tuple[str, str] | None:
    """Return page and anchor of a pass, a rule, a field of a config or a public name."""
    labels, objects = env.domains.standard_domain.anonlabels, env.domains.python_domain.objects
    for label in (f"pass-{name}", f"rule-{name}"):
        if label in labels:
            page, anchor = labels[label]
            return page, anchor
    field = f"biofx.BioConfig.{name}" if name in config_options() else name
    for public in (field, f"biofx.{name}", f"biofx.errors.{name}", f"biofx.passes.{name}"):
        if public.startswith("biofx.") and public in objects:
            return objects[public].docname, objects[public].node_id
    return None
