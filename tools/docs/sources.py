"""Sources that docstrings and pages name by DOI or arXiv number become links."""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx

_NAMED = re.compile(r"(doi|arXiv) (\d[\w./()-]*[\w)])")
_PLACES = {"doi": "https://doi.org/", "arXiv": "https://arxiv.org/abs/"}


def setup(app: Sphinx) -> None:
    """Look at each page that has been read."""
    app.connect("doctree-read", _link)


def _link(app: Sphinx, page: nodes.document) -> None:
    for text in list(page.findall(nodes.Text)):
        if isinstance(text.parent, (nodes.reference, nodes.literal, nodes.literal_block, nodes.title)):
            continue
        plain, parts, end = text.astext(), [], 0
        for found in _NAMED.finditer(plain):
            parts += [nodes.Text(plain[end : found.start(2)])]
            parts += [nodes.reference("", found[2], refuri=_PLACES[found[1]] + found[2])]
            end = found.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(plain[end:])])
