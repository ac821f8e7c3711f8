"""Print the tables: ``python tools/simulate``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulate.ranks import main

if __name__ == "__main__":
    main()
