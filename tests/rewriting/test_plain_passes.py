"""Passes as plain values and back."""

from __future__ import annotations

from biofx.passes import SplitWeights
from biofx.rewriting.plain_passes import pass_to_plain, with_new_options


def test_options_that_older_files_do_not_have_are_added_with_their_defaults() -> None:
    now = pass_to_plain(SplitWeights(gamma=3))
    written_by_0_1_0 = {"pass": "split-weights", "options": {"gamma": 3, "mode": "neighbours"}}
    without_mode = {
        "pass": "split-weights",
        "options": {"gamma": 3, "activation": now["options"]["activation"]},
    }
    for old in (written_by_0_1_0, without_mode):
        assert with_new_options({"group": [old], "only": "fc"}) == {"group": [now], "only": "fc"}


def test_options_that_a_file_has_stay() -> None:
    plain = {"pass": "split-weights", "options": {"mode": "blocks"}}
    assert with_new_options(plain)["options"]["mode"] == "blocks"
    unknown = {"pass": "of-another-package", "options": {"size": 2}}
    assert with_new_options(unknown) == unknown
