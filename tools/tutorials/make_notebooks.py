"""The tutorials as notebooks with their outputs: ``python tools/tutorials/make_notebooks.py [NAME …]``.

A tutorial is a script whose cells begin with ``# %%``; texts are strings behind ``# %% [markdown]``. This
reads it, runs it and writes the notebook beside it; one whose code has not changed keeps its outputs, unless
``--again`` is given. It needs ``pip install -e ".[notebooks]"``, and for
ei_network the extra ``neuro``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
TUTORIALS = ("pretrained_dale", "transformer_plasticity", "ei_network")
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook_of(name: str) -> Any:
    """Return the notebook that a tutorial's script is, without outputs."""
    notebook = jupytext.read(HERE / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # the same whenever it is made
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    return notebook


def run(notebook: Any, folder: Path, parameters: Mapping[str, object] | None = None) -> None:
    """Run a notebook in a folder; its cells get their outputs.

    Args:
        notebook: as :func:`notebook_of` returns it.
        folder: where it runs, and leaves what it writes.
        parameters: of the cell tagged so, assigned behind it.
    """
    assigned = "\n".join(f"{name} = {value!r}" for name, value in (parameters or {}).items())
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    written = cell.source
    cell.source += f"\n{assigned}" if assigned else ""
    paths = [str(HERE), str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name=_KERNEL["name"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute(env=environment)
    cell.source = written
    notebook.metadata.language_info = {"name": "python"}  # without what this machine's Python is


def keep_outputs(notebook: Any, path: Path) -> bool:
    """Take over the outputs of an earlier notebook if its code is the same, and return whether it is."""
    if not path.is_file():
        return False
    new, old = (
        [cell for cell in one.cells if cell.cell_type == "code"]
        for one in (notebook, nbformat.read(path, as_version=4))
    )
    if [cell.source for cell in new] != [cell.source for cell in old]:
        return False
    for cell, earlier in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = earlier.outputs, earlier.execution_count
    return True


def main(names: list[str], *, again: bool = False) -> None:
    """Write the notebooks of these tutorials, or of all; ``again`` runs also those whose code is the same."""
    if unknown := set(names) - set(TUTORIALS):
        sys.exit(f"no tutorial {' or '.join(sorted(unknown))}; there are {', '.join(TUTORIALS)}")
    for name in names or TUTORIALS:
        notebook = notebook_of(name)
        path = HERE / f"{name}.ipynb"
        if again or not keep_outputs(notebook, path):
            with tempfile.TemporaryDirectory() as folder:
                run(notebook, Path(folder))
        nbformat.write(notebook, path)
        print(f"wrote {path.name}, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if word != "--again"], again="--again" in sys.argv)
