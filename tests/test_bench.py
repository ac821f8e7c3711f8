"""The bench of large models runs on models small enough for a test; the real ones are of the known sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "tools" / "bench"


def test_large_models_are_timed_at_tiny_sizes(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH), *("--device", "cpu", "--large", "tiny", "--rounds", "1")]
    subprocess.run([*command, "--threads", "1", "--json", str(path)], check=True, capture_output=True)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["device"] == "cpu"
    assert [work["work"].partition(",")[0] for work in found["works"]] == [
        *("ResNet-50", "ViT-B/16", "GPT-2 small")
    ]
    for work in found["works"]:
        assert set(work["seconds"]) == {
            *("plain", "rates", "rates from their seed", "rates and signs", "rates and masks", "split in 2")
        }
        assert all(seconds > 0 for seconds in work["seconds"].values())


def test_the_real_sizes_are_those_of_the_papers() -> None:
    code = (
        "import torch\nfrom large_models import large_models\n"
        "for model in large_models(tiny=False):\n"
        "    with torch.device('meta'):\n"
        "        made = model.make()\n"
        "    print(model.name, sum(p.numel() for p in made.parameters()), sep='|')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=BENCH
    ).stdout
    counts = dict(line.split("|") for line in done.splitlines())
    # as torchvision and the papers count them; GPT-2 ties its readout to its embedding, which is apart here
    assert int(counts["ResNet-50"]) == 25_557_032
    assert int(counts["ViT-B/16"]) == 86_567_656
    assert int(counts["GPT-2 small"]) == 124_439_808 + 50257 * 768
