"""Interleaved timing: whatever disturbs the machine disturbs all candidates alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, *, cpu_time: bool = False
) -> dict[str, float]:
    """Return each candidate's median seconds, all of them run in turn in every round.

    Each runs twice ahead of the first round, unmeasured: to compile, to warm up, to allocate. With
    ``cpu_time`` the seconds are those that the process spent computing: on a machine that is busy with other
    things, threads that wait for each other take longer than any work.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-2, rounds):
        for name, run in candidates.items():
            _wait()
            started = clock()
            run()
            _wait()
            if number >= 0:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
