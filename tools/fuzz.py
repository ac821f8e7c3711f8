"""``python tools/fuzz.py 10``: ten minutes of random models, configs and files, other ones in each round."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(minutes: float) -> int:
    """Run rounds until the time is up or one finds something; return its exit code."""
    end = time.monotonic() + 60 * minutes
    rounds = 0
    while time.monotonic() < end:
        seed = int.from_bytes(os.urandom(4), "little")
        command = [sys.executable, "-m", "pytest", "tests/test_fuzz.py", f"--hypothesis-seed={seed}"]
        environment = {**os.environ, "BIOFX_FUZZ_EXAMPLES": "100"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        rounds += 1
        if done.returncode:
            print(f"seed {seed}:\n{done.stdout}")
            return done.returncode
    print(f"{rounds} rounds of 100 examples for each property found nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 10))
