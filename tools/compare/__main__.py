"""The comparison in this folder's README, measured: ``python tools/compare``.

Each row is one check, run on biofx, on the package of the paper (where it is installed: ``pip install
--no-deps pytorch-bio-transformations==0.0.5``) and on what one would otherwise write by hand: gradient hooks
on the parameters, and a loop over the weights after each step. Exits with 1 where the README differs.
"""

from __future__ import annotations

import sys

from table import main

sys.exit(main())
