"""Two processes of one group, for tests of distributed runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(script: Path, *arguments: str | Path) -> str:
    """Run a script on both ranks, as ``torchrun`` would, and return what they wrote to standard error.

    ``torchrun`` itself is a third process that imports torch first; one test of ours uses it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # the two talk over the loopback interface, whatever the machine's name resolves to
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
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
        for rank in range(2)
    ]
    try:
        return "".join(rank.communicate(timeout=300)[1] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
