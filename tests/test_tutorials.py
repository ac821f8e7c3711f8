"""The tutorials run as notebooks, what they say holds, and the notebooks are those of the scripts."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import biofx

FOLDER = Path(__file__).parent.parent / "tools" / "tutorials"
TUTORIALS = ("pretrained_dale", "transformer_plasticity", "ei_network")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Jupyter, neurogym and gymnasium


def tool() -> Any:
    """Return the module that makes notebooks, as it is run from its folder."""
    for package in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[notebooks]'")
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, folder: Path, *, then: str = "", **parameters: object) -> str:
    """Run a tutorial in a folder with other lengths, and code behind it; return what it printed."""
    tools = tool()
    notebook = tools.notebook_of(name)
    if then:
        last = copy.deepcopy(notebook.cells[-1])
        last.update(id="then", source=then)
        notebook.cells.append(last)
    tools.run(notebook, folder, parameters)
    return "".join(output.text for output in outputs_of(notebook) if output.output_type == "stream")


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def committed(name: str) -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_notebook_is_that_of_its_script(name: str) -> None:
    made, found = tool().notebook_of(name), committed(name)
    remedy = f"python tools/tutorials/make_notebooks.py {name}"
    assert [(cell.cell_type, cell.source) for cell in found.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ], remedy
    assert [cell.id for cell in found.cells] == [cell.id for cell in made.cells], remedy


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_notebook_can_be_read_on_a_repository_page(name: str) -> None:
    found = committed(name)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # from start to end
    kinds = {kind for output in outputs_of(found) for kind in output.get("data", {})}
    assert "image/png" in kinds
    for cell in code:
        assert len(cell.source.splitlines()) <= 45
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = output.get("text") or output.data.get("text/plain", "")
            assert len(text.splitlines()) <= 20
            assert len(text) < 2500


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_notebook_says_nothing_of_the_machine_that_made_it(name: str) -> None:
    found = committed(name)
    texts = [json.dumps({**output, "data": {}}) for output in outputs_of(found)]
    texts += [output.data["text/plain"] for output in outputs_of(found) if "data" in output]
    for word in ("/tmp", "/home", "/root", "/usr", "site-packages", str(Path.home()), sys.prefix):
        assert not any(word in text for text in texts), word
    assert found.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_a_pretrained_network_keeps_its_accuracy_under_dale(tmp_path: Path) -> None:
    told = run("pretrained_dale", tmp_path, EPOCHS=2, IMAGES=400)
    shown = dict(re.findall(r"^(pretrained|with signs|after fine-tuning|deployed): +([0-9.]+)%", told, re.M))
    assert len(shown) == 4
    assert float(shown["pretrained"]) > 20
    assert shown["with signs"] == shown["pretrained"]
    assert shown["after fine-tuning"] != shown["pretrained"]
    assert shown["deployed"] == shown["after fine-tuning"]
    assert "its 16 units became 16 excitatory and 16 inhibitory ones" in told
    assert "every invariant holds" in told
    left = tmp_path / "biofx-dale"
    assert (left / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "<svg" in (left / "graph.svg").read_text(encoding="utf-8")
    assert isinstance(torch.load(left / "deployed.pt", weights_only=False), torch.nn.Module)


def test_a_transformer_learns_with_plasticity(tmp_path: Path) -> None:
    left = tmp_path / "biofx-transformer"
    left.mkdir()
    (left / "run.jsonl").write_text("what an earlier run left\n")
    told = run("transformer_plasticity", tmp_path, EPOCHS=6, IMAGES=400)
    applied = re.findall(r"applied (\S+): 2048 factors, lognormal", told)
    assert applied == [f"encoder.layers.{place}.linear{number}" for place in (0, 1) for number in (1, 2)]
    assert "equal: True" in told
    assert "factors act on the update of each weight" in told
    before, after = map(float, re.findall(r"^(?:before|after): +([0-9.]+)%", told, re.M))
    assert after > before + 15
    assert "48 steps" in told
    assert "every invariant holds" in told
    replaced = dict(re.findall(r"(\S+): (\d+) replaced", told))
    assert int(replaced["encoder.layers.0.linear1.weight"]) > 0
    records = biofx.Monitor.read(left / "run.jsonl").records
    assert [record.step for record in records] == list(range(0, 48, 5))
    for picture in ("run.png", "layers.png"):
        assert (left / picture).read_bytes().startswith(b"\x89PNG")


def test_excitatory_and_inhibitory_units_learn_to_decide(tmp_path: Path) -> None:
    if importlib.util.find_spec("neurogym") is None:
        pytest.skip("the tutorial needs neurogym: pip install -e '.[neuro]'")
    keep = 'torch.save({"signs": SIGNS, "before": before, "after": after, "curves": curves}, "found.pt")'
    told = run("ei_network", tmp_path, then=keep, LOOP_STEPS=60, LAYER_STEPS=5)
    # recurrent weights and readouts
    assert told.count("80 excitatory and 20 inhibitory presynaptic units") == 4
    assert told.count("none of 100 self-connections") == 2
    assert told.count("every invariant holds") == 2
    right = [float(share) for share in re.findall(r"decides right in ([0-9.]+) ±", told)]
    assert len(right) == 2
    assert right[0] > 65
    found = torch.load(tmp_path / "found.pt")
    signs = torch.tensor(found["signs"])
    for before, after, curve in zip(found["before"], found["after"], found["curves"], strict=True):
        assert not torch.equal(before, after)
        for weights in (before, after):
            assert not bool((weights * signs < 0).any())
            assert not bool(weights.diagonal().any())
            assert bool((weights != 0).any(0).all())
        coherences, shares, _ = zip(*curve, strict=True)
        assert len(coherences) == 13
        assert all(0 <= share <= 100 for share in shares)
    assert found["curves"][0][-1][1] - found["curves"][0][0][1] > 50
    assert (tmp_path / "biofx-ei" / "networks.png").read_bytes().startswith(b"\x89PNG")
