"""Several processes of one group, for tests of distributed runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(script: Path, *arguments: str | Path) -> str:
    """Run a script on two ranks, as :func:`run_on_ranks` does."""
    return run_on_ranks(2, script, *arguments)


def run_on_ranks(count: int, script: Path, *arguments: str | Path) -> str:
    """Run a script on some ranks, as ``torchrun`` would, and return what they wrote to standard error.

    ``torchrun`` itself is a third process that imports torch first; one test of ours uses it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # they talk over the loopback interface, whatever the machine's name resolves to
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    shared["LOCAL_WORLD_SIZE"] = str(count)
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    try:
        return "".join(rank.communicate(timeout=300)[1] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
