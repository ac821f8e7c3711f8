"""The API reference, from the docstrings: ``python tools/reference.py [FOLDER]``.

Needs pdoc: ``pip install -e ".[docs]" -c tools/constraints.txt``.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import biofx

_LANGUAGES = [
    f"biofx.{name}"
    for name in (
        *("select", "rewriting.pass_text", "rewriting.report", "errors"),
        *("diagnostics.monitor_sinks", "rewriting.reproducer"),
    )
]
"""Modules whose docstrings define what users write or read: selectors, pipeline texts, files, errors."""


def main(folder: Path) -> None:
    """Write a page for each module, and a search over all of them.

    A docstring that cannot be rendered is an error.
    """
    try:
        render, pdoc = importlib.import_module("pdoc.render"), importlib.import_module("pdoc")
    except ImportError as error:
        raise SystemExit(f"the reference needs pdoc: pip install 'biofx[docs]' ({error})") from error
    render.configure(docformat="google", footer_text=f"biofx {biofx.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # a type that only its own module imports is then shown by its name, which is all that it takes
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        pdoc.pdoc("biofx", *_LANGUAGES, output_directory=folder)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "biofx-reference")
    main(target)
    print(f"wrote {target / 'index.html'}")
