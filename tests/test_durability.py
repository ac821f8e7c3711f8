from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def durability() -> Any:
    """The tool, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("durability", ROOT / "tools" / "durability.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["durability"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_what_survives_what(golden: Callable[[str, str], None]) -> None:
    table = durability().table()
    assert {cell for row in table.splitlines()[1:] for cell in row[24:].split()} <= {
        "kept",
        "refused",
        "idle",
    }
    golden("durability", table)
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_mechanism_that_is_lost_shows() -> None:
    """The measurement itself: a journey that forgets the mechanism, or changes it, does not pass."""
    tool = durability()

    def forgets(bio_model: Any) -> Any:
        return tool.arrived(tool.untransformed(bio_model))

    for name in ("split", "signs", "signs, abs", "signs, expand", "factors", "from seed"):
        assert tool.measure(name, forgets) == "LOST"
    assert tool.measure("activity", forgets) == "LOST"
    assert tool.measure("rules", forgets) == "refused"

    def doubles(bio_model: Any) -> Any:
        return tool.Arrived(lambda x: bio_model(x) * 2, tool.by_backward(bio_model), bio_model)

    assert tool.measure("factors", doubles) == "WRONG"
    assert tool.measure("factors", lambda model: 1 / 0) == "CRASH"
