"""Archives that say more than they hold."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.checkpoints.checkpoint_file import plain
from biofx.errors import CheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))).graph_module
    biofx.save(model, tmp_path / "a.pt", extra={"epoch": 1})
    return tmp_path / "a.pt"


def packed_again(path: Path, method: int, **bombs: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (folder,) = {name.partition("/")[0] for name in entries}
    entries |= {f"{folder}/data/{name}": content for name, content in bombs.items()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
            archive.infolist()[-1].external_attr = 0  # as torch has it


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused_before_it_is_read(method: int, saved: Path) -> None:
    packed_again(saved, method, bomb=bytes(200 * 2**20))
    assert saved.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
            biofx.checkpoints.Checkpoint.read(saved)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def central_entry(content: bytearray, number: int) -> int:
    place = -1
    for _ in range(number + 1):
        place = content.index(b"PK\x01\x02", place + 1)
    return place


def claim(place: int, value: int) -> Callable[[bytearray], None]:
    """Let the second entry of the directory say something else."""

    def change(content: bytearray) -> None:
        struct.pack_into("<I", content, central_entry(content, 1) + place, value)

    return change


def both_sizes(value: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        claim(20, value)(content)
        claim(24, value)(content)

    return change


def onto_the_first(content: bytearray) -> None:
    first, second = central_entry(content, 0), central_entry(content, 1)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (claim(24, 2**31), "is compressed"),
        (both_sizes(2**31), "larger than its place"),
        (both_sizes(4000), "larger than its place"),
        (onto_the_first, "larger than its place"),
    ],
)
def test_an_archive_that_says_more_than_it_holds_is_refused(
    change: Callable[[bytearray], None], match: str, saved: Path
) -> None:
    packed_again(saved, zipfile.ZIP_STORED)
    biofx.checkpoints.Checkpoint.read(saved)
    content = bytearray(saved.read_bytes())
    change(content)
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        biofx.checkpoints.Checkpoint.read(saved)


def test_a_name_that_is_there_twice_is_refused(saved: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(saved, "a") as archive:
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(CheckpointError, match="is there twice"):
        biofx.checkpoints.Checkpoint.read(saved)


def test_values_within_each_other_are_gone_through_once() -> None:
    laughs: list[Any] = [1.0]
    for _ in range(60):  # 2 ** 60 places, if each were gone through
        laughs = [laughs, laughs]
    found = plain(laughs, "extra")
    assert found[0] is found[1]
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(CheckpointError, match="at most 100 values within each other"):
        plain(deep, "extra")


def test_numbers_and_texts_of_other_classes_become_plain(saved: Path) -> None:
    import numpy as np

    values = {
        "n": np.float64(0.5),
        "s": np.str_("text"),
        "size": torch.Size([2, 3]),
        "odd": "\ud800",
        "big": 2**200,
    }
    assert type(plain(values, "extra")["n"]) is float
    model = biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))).graph_module
    biofx.save(model, saved, extra=values)
    found = biofx.checkpoints.Checkpoint.read(saved).extra
    assert found == {"n": 0.5, "s": "text", "size": (2, 3), "odd": "\ud800", "big": 2**200}
