"""Lets ``python tools/docs`` run the package from its folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from docs.command import main

    sys.exit(main())
