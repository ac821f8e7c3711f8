"""``python tools/docs [FOLDER]``: the documentation as a site, without a network.

Needs Sphinx: ``pip install -e ".[docs]" -c tools/constraints.txt``, and for that Python 3.11 or newer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from docs.figures import draw_figures
from docs.reference import write_reference
from docs.staging import Stage, StagingError

HERE = Path(__file__).resolve().parent
_TRAINERS = ("accelerate", "lightning", "pytorch_lightning", "skorch", "transformers")
"""Packages that ``biofx.integrations`` imports where they are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the site and return the exit code: 0 where nothing was warned of."""
    parser = argparse.ArgumentParser(
        prog="python tools/docs", description="Build the documentation as a site."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("biofx-docs"), metavar="FOLDER")
    parser.add_argument(
        "--long",
        action="store_true",
        help="draw the figures from longer runs (some minutes in place of seconds)",
    )
    parser.add_argument("--keep-figures", action="store_true", help="take those of the last build")
    options = parser.parse_args(arguments)
    try:
        from sphinx.cmd.build import build_main
    except ImportError as error:
        raise SystemExit(f"the site needs Sphinx: pip install 'biofx[docs]' ({error})") from error
    os.environ.update(NO_COLOR="1", COLUMNS="90")  # for what argparse says, which the reference quotes
    for name in _TRAINERS:  # shown as where they are missing, which takes no seconds to import
        sys.modules[name] = None  # type: ignore[assignment]
    stage = Stage(options.folder / ".stage")
    write_reference(stage)
    draw_figures(stage, long=options.long, keep=options.keep_figures)
    try:
        stage.add_pages(HERE / "pages")
    except StagingError as error:
        print(error, file=sys.stderr)
        return 1
    for gone in stage.remove_the_rest():
        (options.folder / gone).with_suffix(".html").unlink(missing_ok=True)
    own = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(HERE), "-d", str(options.folder / ".doctrees")]
    failed = build_main([*own, str(stage.folder), str(options.folder)])
    if failed:  # else the next build would read those pages as good, and warn of nothing
        shutil.rmtree(options.folder / ".doctrees", ignore_errors=True)
    else:
        print(f"wrote {options.folder / 'index.html'}")
    return int(failed)
