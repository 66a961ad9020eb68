"""The sidecar of a `.beton`: what it says, what it finds, and damage of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import sidecar
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_layout import FIELD, HEADER
from pipelines.sources.beton_writer import write_sidecar
from pipelines.sources.sidecar import read_sidecar, sidecar_path
from pipelines.store import DamagedData
from tests.pipelines.samples import add_sidecar, contents, flip_bit, small_beton

TABLES = HEADER.itemsize + 2 * FIELD.itemsize  # where the metadata begin
TABLE_BYTES = 6 * 24  # of the metadata, and of the allocation table


@pytest.fixture
def small(tmp_path: Path, photos: list[np.ndarray]) -> Path:
    return small_beton(tmp_path / "small.beton", photos)


def test_a_sidecar_finds_every_flip(small: Path) -> None:
    add_sidecar(small)
    good = contents(small)
    end = small.stat().st_size
    store = BetonStore(small)
    rng = np.random.default_rng()
    metadata = range(TABLES, TABLES + TABLE_BYTES)
    allocations = range(end - TABLE_BYTES, end)
    tables = [*range(HEADER.itemsize), *metadata, *allocations]
    for at in tables[::3]:
        bit = int(rng.integers(8))
        flip_bit(small, at, bit)
        with pytest.raises(DamagedData, match=r"small\.beton"):
            BetonStore(small)
        flip_bit(small, at, bit)
    first = int(store._ptrs[2])
    for at in rng.integers(first, first + int(store.sizes[2]), 50).tolist():
        bit = int(rng.integers(8))
        flip_bit(small, at, bit)
        with pytest.raises(DamagedData, match=r"small\.beton: sample 2: wrong checksum"):
            store.read(2)
        assert store.read(3).tobytes() == good[3][1]
        flip_bit(small, at, bit)


def test_sidecar_round_trip_and_damage(small: Path) -> None:
    assert read_sidecar(small) is None
    add_sidecar(small)
    found = read_sidecar(small)
    assert found is not None
    assert found.classes == BetonStore(small).classes == tuple("abcdef")
    assert found.encoding == {"quality": 90}
    assert len(found.crc32) == 6
    text = sidecar_path(small).read_text()
    for bad in (
        "",
        "[]",
        "{}",
        "3",
        '"version"',
        text[:-20],
        text.replace('"count": 6', '"count": 7'),
        text.replace("A", "!"),
    ):
        sidecar_path(small).write_text(bad)
        with pytest.raises(DamagedData, match=r"small\.beton\.json"):
            BetonStore(small)


def test_every_entry_of_a_sidecar_is_under_its_checksum(small: Path) -> None:
    add_sidecar(small)
    side = sidecar_path(small)
    good = json.loads(side.read_text())
    other = {
        "version": 3,
        "count": 5,
        "classes": ["b", "a", "c", "d", "e", "f"],  # other labels for the same images
        "encoding": {"quality": 91},
        "crc32": good["crc32"][:-4] + "AAAA",
        "tables_crc32": good["tables_crc32"] ^ 1,
        "checksum": good["checksum"] ^ 1,
        "more": 1,
    }
    assert set(good) < set(other)
    for name, value in other.items():
        side.write_text(json.dumps(good | {name: value}))
        with pytest.raises(DamagedData, match=r"small\.beton\.json"):
            BetonStore(small)
    side.write_text(json.dumps(dict(reversed(good.items())), indent=1))  # the same entries
    assert BetonStore(small).classes == tuple("abcdef")


def test_every_flip_of_a_sidecar_is_noticed_or_changes_nothing(small: Path) -> None:
    add_sidecar(small)
    side = sidecar_path(small)
    good = side.read_bytes()
    intact = read_sidecar(small)
    assert intact is not None
    rng = np.random.default_rng()
    for at in rng.integers(0, len(good), 150).tolist():
        flip_bit(side, at, int(rng.integers(8)))
        try:
            found = read_sidecar(small)
        except DamagedData as error:
            if str(side) not in str(error):
                raise
        else:
            assert found is not None
            assert found[:2] == intact[:2]
            assert found.tables_crc32 == intact.tables_crc32
            np.testing.assert_array_equal(found.crc32, intact.crc32)
        side.write_bytes(good)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "b", "c", "d", "e", "a"], "class name 'a' stands 2 times"),
        (["a", "b", "c", "d", "e"], "labels 0 to 5, but .* names 5 classes"),
        (["a", "b", "c", "d", "e", 6], "a class name is 6"),
        (
            ["a", "b", "c", "d", "e", ""],
            "a class name is '': must be a text of 1 to 1,000 characters",
        ),
        (["a", "b", "c", "d", "e", "f" * 1001], "a class name is 'ff.*1,003 characters"),
        ([], "must be a list of class names"),
        ("abcdef", "must be a list of class names"),
        ({"a": 1}, "must be a list of class names"),
        ([["a"]] * 6, r"a class name is \['a'\]"),
    ],
)
def test_class_names_are_texts_unique_and_enough(
    small: Path, classes: object, message: str
) -> None:
    """With a checksum that fits: it guards against damage, not against a hostile writer."""
    with pytest.raises((ValueError, DamagedData), match=message):
        write_sidecar(
            small,
            classes=classes,  # type: ignore[arg-type]
            encoding={},
            crc32=np.zeros(6, np.uint32),
        )
    assert not sidecar_path(small).exists()
    add_sidecar(small)
    content = json.loads(sidecar_path(small).read_text()) | {"classes": classes}
    content["checksum"] = sidecar.content_checksum(content)
    sidecar_path(small).write_text(json.dumps(content))
    with pytest.raises(DamagedData, match=message):
        BetonStore(small)


ODD_FILES = {
    "a named pipe": os.mkfifo,
    "a folder": os.mkdir,
    "/dev/zero": lambda path: os.symlink("/dev/zero", path),
    "a dangling link": lambda path: os.symlink("nowhere", path),
    "a link to itself": lambda path: os.symlink(path, path),
}


@pytest.mark.parametrize("what", ODD_FILES)
def test_a_sidecar_is_a_bounded_file(small: Path, what: str) -> None:
    ODD_FILES[what](sidecar_path(small))
    with pytest.raises(DamagedData, match=r"small\.beton\.json"):
        BetonStore(small)
    assert BetonStore(small, use_sidecar=False).classes is None


def test_a_sidecar_that_is_too_large_is_neither_read_nor_written(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sidecar(small)
    monkeypatch.setattr(sidecar, "MOST_BYTES", 100)
    with pytest.raises(DamagedData, match=r"small\.beton\.json.*more than 100 bytes"):
        BetonStore(small)
    sidecar_path(small).unlink()
    with pytest.raises(ValueError, match="at most 100 are read again"):
        add_sidecar(small)
    assert not sidecar_path(small).exists()
