"""How the time of a transform grows with the model, and the memory of a training step with its mechanisms."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from models import fully_connected
from torch import nn

import biofx

_COUNTS = (10, 100, 1000, 10000)
_CONFIGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "rates, float32": {},
    "rates, bfloat16": {"fuzzy_lr_dtype": "bfloat16"},
    "rates from their seed": {"fuzzy_lr_dtype": "seed"},
}
MEMORY_GOALS = {"rates from their seed": 0.3}
"""Excess of peak memory over the plain model's that is wanted, in units of the parameters."""
_PEAK = """
import resource, sys, torch, biofx
from pathlib import Path
sys.path.insert(0, {place!r})
from models import fully_connected, training_step
torch.set_num_threads({threads})
model, x = fully_connected(), torch.randn(100, 3072)
config = {config!r}
if config is not None:
    model = biofx.transform(model, config, share_parameters=True).graph_module
step = training_step(model, x)
for _ in range(3):
    step()
# what getrusage counts begins with what the process that started this one held
status = Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
held = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
print(1024 * (held or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])[0])
"""


def transform_times() -> dict[str, Any]:
    """Return seconds of a full transform for models of growing numbers of nodes, and the log-log slope."""
    seconds: dict[str, float] = {}
    for count in _COUNTS:
        layers = [nn.Linear(4, 4) if place % 2 else nn.ReLU() for place in range(count)]
        model = nn.Sequential(*layers, nn.Linear(4, 2))
        started = time.perf_counter()
        biofx.transform(model, {"weight_splitting_Gamma": 2, "apply_dales_principle": True})
        seconds[str(count)] = time.perf_counter() - started
    slope = math.log(seconds["10000"] / seconds["100"]) / math.log(100)
    return {"seconds": seconds, "slope": slope}


def memory() -> dict[str, Any]:
    """Return peak bytes of FCNet's training, in processes of their own, and the excess in its parameters."""
    place = str(Path(__file__).parent)
    peaks: dict[str, float] = {}
    for name, config in _CONFIGS.items():
        script = _PEAK.format(place=place, config=config, threads=torch.get_num_threads())
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        peaks[name] = float(done.stdout)
    parameters = 4 * sum(parameter.numel() for parameter in fully_connected().parameters())
    excess = {name: (peak - peaks["plain"]) / parameters for name, peak in peaks.items()}
    return {"peak_bytes": peaks, "excess_over_parameters": excess}
