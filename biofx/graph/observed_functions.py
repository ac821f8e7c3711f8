"""What stands in the graph of an observed run for what was not seen to be made."""

from __future__ import annotations

from typing import NoReturn

from biofx.errors import PassError

SHAPE = "observed_shape"
"""The key in the ``meta`` of nodes of observed runs under which the shape of a value lies."""


def made_elsewhere() -> NoReturn:
    """Stand for a tensor that no torch function was seen to make.

    Raises:
        PassError: always; an observed run is for analysis, not for running.
    """
    raise PassError("the graph of an observed run is for analysis, and cannot be run")
