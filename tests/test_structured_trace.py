"""What passes did is in torch's structured trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch, biofx
from torch import nn
model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
bio_model, report = biofx.transform(model, passes="scale-gradients,split-weights")
print(report)
print("---")
backend = biofx.backend(passes="scale-gradients{nu=0.3}", then="eager")
torch.compile(model, backend=backend)(torch.ones(3, 4))
print(backend.reports[0])
"""


def test_reports_are_artifacts_beside_those_of_the_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    (log,) = tmp_path.glob("*.log")
    found: list[str] = []
    names: set[str] = set()
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("\t"):
            if found and names == {"biofx_pipeline"}:
                found[-1] += line[1:] + "\n"
            continue
        record = json.loads(line[line.index("{") :])
        names = {record["artifact"]["name"]} if "artifact" in record else set()
        found += [""] if names == {"biofx_pipeline"} else []
    assert [text.strip() for text in found] == [text.strip() for text in done.stdout.split("---")]
