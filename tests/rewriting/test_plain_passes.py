"""Passes as plain values and back."""

from __future__ import annotations

from biofx.rewriting.plain_passes import without_removed_options


def test_an_option_that_older_files_have_is_left_out_where_it_has_its_only_value() -> None:
    old = {"pass": "split-weights", "options": {"gamma": 2, "mode": "neighbours"}}
    new = {"pass": "split-weights", "options": {"gamma": 2}}
    assert without_removed_options({"group": [old], "only": "fc"}) == {"group": [new], "only": "fc"}
    other = {"pass": "split-weights", "options": {"mode": "blocks"}}
    assert without_removed_options(other) == other
