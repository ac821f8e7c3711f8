"""Tests against the packages of the extra ``clients``, each skipped where its package is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let clients warn of their own affairs; a warning that biofx causes is an error here too."""
    for item in items:
        if HERE in item.path.parents:
            # in front of a test's own marks, which decide where they say something else
            item.add_marker(pytest.mark.filterwarnings("error:::biofx"), append=False)
            item.add_marker(pytest.mark.filterwarnings("ignore"), append=False)
