"""`open_store`: the table of sources, and paths as users write them."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipelines import DamagedData, open_store, sources
from pipelines.sources.beton import BetonStore
from pipelines.sources.folder import FolderStore
from pipelines.store import JPG, Store
from tests.conftest import as_jpeg
from tests.pipelines.samples import small_beton


@pytest.fixture
def small(tmp_path: Path, photos: list[np.ndarray]) -> Path:
    return small_beton(tmp_path / "small.beton", photos)


class OneImage(Store):
    """A source as an extension would add it: a JPEG file is a data set of one image."""

    described_as = "a single .jpg file"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.data = self.path.read_bytes()
        self.classes = ("the image",)
        self.heights = np.array([60], np.int32)
        self.widths = np.array([80], np.int32)
        self.labels = np.array([0], np.int64)
        self.modes = np.array([JPG], np.uint8)
        self.sizes = np.array([len(self.data)], np.int64)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.suffix == ".jpg"

    def read(self, index: int) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8)

    def _content_crc32(self) -> int:
        return zlib.crc32(self.data)


def test_an_added_source_is_found(
    tmp_path: Path, small: Path, jpeg_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.jpg"
    file.write_bytes(as_jpeg(np.zeros((60, 80, 3), np.uint8)))
    before = re.escape(sources.accepted())
    with pytest.raises(ValueError, match=rf"x\.jpg: expected {before};"):
        open_store(file)
    monkeypatch.setattr(sources, "SOURCES", (*sources.SOURCES, OneImage))
    store = open_store(file)
    assert isinstance(store, OneImage)
    assert store.read(0).tobytes() == file.read_bytes()
    assert store.identity() == {
        "count": 1,
        "classes": ("the image",),
        "content": f"{zlib.crc32(store.data):08x}",
    }
    # The others are opened as before, and an error names all of them.
    assert isinstance(open_store(small), BetonStore)
    assert isinstance(open_store(jpeg_folder), FolderStore)
    others = ".*".join(re.escape(source.described_as) for source in sources.SOURCES)
    accepted = f"expected {others}"
    for path in (tmp_path / "nothing.jpg", Path("/dev/null")):
        with pytest.raises(ValueError, match=f"{path}: .*{accepted}"):
            open_store(path)


def test_every_source_in_the_table_says_what_it_accepts() -> None:
    told = [source.described_as for source in sources.SOURCES]
    assert {"a .beton file", "an image folder"} <= set(told)
    assert all(told)
    assert len(set(told)) == len(told)


def test_a_folder_is_no_beton_whatever_its_name(jpeg_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.beton").symlink_to(jpeg_folder)
    assert isinstance(open_store(tmp_path / "x.beton"), FolderStore)


def test_a_beton_needs_no_special_name_and_a_name_is_no_beton(small: Path) -> None:
    other = small.rename(small.with_name("train.ffcv"))
    assert isinstance(open_store(other), BetonStore)
    other.write_bytes(b"PK" + other.read_bytes()[2:])
    with pytest.raises(ValueError, match=r"train\.ffcv: expected a \.beton file, an image"):
        open_store(other)
    with pytest.raises(DamagedData, match=r"x\.beton: not a version 2 FFCV file"):
        open_store(other.rename(small.with_name("x.beton")))


def test_open_store_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.beton: no such file"):
        open_store(tmp_path / "nothing.beton")


@pytest.mark.parametrize("what", ["a named pipe", "/dev/zero", "a link to itself"])
def test_a_beton_is_a_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.beton"
    match what:
        case "a named pipe":
            os.mkfifo(path)
        case "a link to itself":
            path.symlink_to(path)
        case _:
            path.symlink_to(what)
    with pytest.raises((ValueError, OSError), match=r"x\.beton"):
        open_store(path)


def test_home_and_unreadable_names_in_paths(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(small.parent))
    assert len(open_store("~/small.beton")) == 6
    odd = os.fsdecode(os.fsencode(small.parent) + b"/caf\xe9\n.beton")
    small.rename(odd)
    os.truncate(odd, 1000)
    with pytest.raises(DamagedData, match=r"caf\\udce9\\n\.beton: ") as caught:
        open_store(odd)
    assert str(caught.value).isprintable()
