"""Lets ``python -m biofx`` run the command line."""

import sys

from biofx.cli import main

if __name__ == "__main__":
    sys.exit(main())
