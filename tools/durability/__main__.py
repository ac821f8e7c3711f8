"""Lets ``python tools/durability`` run the package from its folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from durability.table import main

    main(verbose="-v" in sys.argv)
