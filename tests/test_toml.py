"""TOML files: whole or not at all, and whatever is in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biofx import toml
from biofx.errors import OptionError


@pytest.mark.parametrize(
    "value",
    [
        True,
        0,
        -7,
        10**30,
        0.1,
        1e-300,
        1e16,
        'quotes " and \\ backslash',
        "newline\n tab\t return\r delete\x7f null\x00",
        "Mäder, 神経, 🧠",
        ["a", 'b"', 3],
        [[1], ["x"]],
    ],
)
def test_a_value_is_read_as_it_was_written(tmp_path: Path, value: Any) -> None:
    toml.write(tmp_path / "x.toml", {"key": value})
    assert toml.read(tmp_path / "x.toml") == {"key": value}
    assert type(toml.read(tmp_path / "x.toml")["key"]) is type(value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_is_read_as_it_was_written(tmp_path: Path, text: str) -> None:
    toml.write(tmp_path / "x.toml", {"key": text})
    assert toml.read(tmp_path / "x.toml") == {"key": text}


def test_a_list_of_mappings_becomes_an_array_of_tables_behind_the_plain_values(tmp_path: Path) -> None:
    toml.write(tmp_path / "x.toml", {"tables": [{"a": 1}, {"a": 2}], "plain": "x"})
    assert (tmp_path / "x.toml").read_text() == 'plain = "x"\n\n[[tables]]\na = 1\n\n[[tables]]\na = 2\n'


@pytest.mark.parametrize("value", [None, object(), {"a": 1}, print])
def test_a_value_without_a_form_is_refused_before_the_file_is_touched(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.toml"
    path.write_text("old = 1\n")
    with pytest.raises(OptionError, match="expected a value that TOML can carry"):
        toml.write(path, {"key": value})
    assert path.read_text() == "old = 1\n"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.toml"
    path.write_text("old = 1\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OptionError, match=r"cannot write .*x\.toml: .*No space left"):
        toml.write(path, {"new": 2})
    assert path.read_text() == "old = 1\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.toml"]


def test_a_text_that_no_file_can_hold_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("old = 1\n")
    with pytest.raises(OptionError, match="cannot write"):
        toml.write(path, {"key": "\ud800"})
    assert path.read_text() == "old = 1\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.toml"]


def test_a_folder_that_is_not_there_is_an_option_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot write"):
        toml.write(tmp_path / "missing" / "x.toml", {"key": 1})


def test_a_rewritten_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("old = 1\n")
    path.chmod(0o640)
    toml.write(path, {"new": 2})
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not toml at all", "readable TOML file"),
        (b"a = 1\na = 2\n", "readable TOML file"),
        (b"\xff\xfe\x00", "readable TOML file"),
        (b"x = " + b"[" * 100_000, "readable TOML file"),
        (b"# " + b"x" * 2**20, "at most 1048576 bytes"),
    ],
    ids=["no-toml", "key-twice", "no-utf-8", "deep", "huge"],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        toml.read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        toml.read(tmp_path / "x.toml")


def test_a_folder_is_no_toml_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="readable TOML file"):
        toml.read(tmp_path)
