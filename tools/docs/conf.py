"""What Sphinx reads: how the site looks, and what of ours takes part in building it."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from biofx import __version__
from docs import cross_references, formulas, inline_code, sources

project, author = "biofx", "the authors of biofx"
release = version = __version__
html_title = f"biofx {__version__}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "index"
exclude_patterns = ["files"]  # copies to link to, not pages

html_theme = "furo"
html_copy_source = html_show_copyright = False
html_math_renderer = "mathml"
html_static_path, html_css_files = ["style"], ["site.css"]

nitpicky = True
smartquotes = False  # which would make one dash of --option
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
copybutton_prompt_text, copybutton_prompt_is_regexp = r">>> |\.\.\. ", True

add_module_names = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
toc_object_entries = False


def setup(app: Sphinx) -> None:
    """Let our parts take part."""
    for part in (cross_references, formulas, inline_code, sources):
        part.setup(app)
