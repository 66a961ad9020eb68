"""An image folder as a store: its bytes, its index, damage and odd files."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from pipelines import DamagedData, open_store
from pipelines.sources.folder import FolderStore
from tests.pipelines.image_files import write, write_folder
from tests.pipelines.samples import decoded, exif_of


@pytest.fixture(autouse=True)
def _cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images")


def test_order_and_labels_are_torchvisions_and_bytes_are_the_files(folder: Path) -> None:
    store = open_store(folder)
    twin = ImageFolder(str(folder))
    assert isinstance(store, FolderStore)
    assert list(store.classes) == twin.classes
    assert len(store) == len(twin)
    for i, (path, label) in enumerate(twin.samples):
        assert store.file(i) == Path(path)
        assert store.labels[i] == label
        assert store.read(i).tobytes() == Path(path).read_bytes()
        assert store.sizes[i] == os.path.getsize(path)
        assert (store.widths[i], store.heights[i]) == Image.open(path).size
    assert store.heights.dtype == store.widths.dtype == np.int32
    assert store.labels.dtype == store.sizes.dtype == np.int64
    assert not store.modes.any()


def test_index_is_used_and_notices_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FolderStore(folder)
    scanned: list[str] = []
    sides = FolderStore._sides

    def watched(store: FolderStore, index: int) -> tuple[int, int]:
        scanned.append(os.path.relpath(store.file(index), folder))
        return sides(store, index)

    monkeypatch.setattr(FolderStore, "_sides", watched)
    again = FolderStore(folder)
    assert not scanned
    assert again.heights[again.labels == 2].tolist() == [38]
    write(folder / "c/x.JPEG", 9, (50, 60))  # changed
    write(folder / "b/0.JPEG", 9, (50, 61))  # new
    (folder / "a/10.jpg").unlink()
    changed = FolderStore(folder)
    assert sorted(scanned) == ["b/0.JPEG", "c/x.JPEG"]
    assert len(changed) == 5
    assert changed.heights[changed.labels > 0].tolist() == [61, 30, 60]
    (folder / ".fap-index.npz").write_bytes(b"PK damaged")
    assert FolderStore(folder).heights.tolist() == changed.heights.tolist()
    assert len(scanned) == 7


def test_read_only_folder_is_indexed_in_the_users_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refuse(source: str, target: str) -> None:
        if Path(target).is_relative_to(folder):
            raise PermissionError(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    first = FolderStore(folder)
    assert len(list((tmp_path / "cache" / "fap").iterdir())) == 1
    monkeypatch.setattr(FolderStore, "_sides", lambda *_: pytest.fail("scanned again"))
    assert FolderStore(folder).heights.tolist() == first.heights.tolist()


FOUND_IN_IMAGENET: dict[str, dict[str, Any]] = {
    "png named JPEG": {"image_format": "PNG"},
    "CMYK": {"mode": "CMYK", "quality": 95},
    "grey": {"mode": "L", "quality": 95},
    "EXIF-rotated": {"exif": exif_of(6), "quality": 95},  # to be turned by 90 degrees
    "EXIF, upright": {"exif": exif_of(1), "quality": 95},
}


@pytest.mark.parametrize("what", FOUND_IN_IMAGENET)
def test_what_imagenet_really_holds(folder: Path, what: str) -> None:
    path = folder / "c/x.JPEG"
    picture = write(path, 3, (44, 36), **FOUND_IN_IMAGENET[what])
    store = FolderStore(folder)
    data = store.read(4)
    header = Image.open(io.BytesIO(data.tobytes()))
    match what:
        case "grey":
            picture = np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))
        case "EXIF-rotated":
            picture = np.rot90(picture, -1)
    height, width, _ = picture.shape
    assert (header.format, header.mode, header.size) == ("JPEG", "RGB", (width, height))
    assert (store.heights[4], store.widths[4]) == (height, width)
    is_the_file = data.tobytes() == path.read_bytes()
    assert is_the_file == (what == "EXIF, upright")
    assert np.abs(decoded(store, 4).astype(int) - picture).mean() < 4


def test_damage_and_mistakes_name_the_file(folder: Path, tmp_path: Path) -> None:
    store = FolderStore(folder)
    write(folder / "c/x.JPEG", 9, (50, 60))
    told = r"c/x\.JPEG: sample 4: \(60, 50\) pixels, \(38, 44\) when"
    with pytest.raises(DamagedData, match=told):
        store.read(4)
    (folder / "c/x.JPEG").write_bytes(b"\0" * 900)
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4"):
        store.read(4)
    with pytest.raises(ValueError, match=r"1 files cannot be used: .*\n  c/x\.JPEG: not an image"):
        FolderStore(folder)
    (folder / "c/x.JPEG").unlink()
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4"):
        store.read(4)
    with pytest.raises(ValueError, match="no images under c"):
        FolderStore(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no images under CLASS"):
        FolderStore(empty)
    write(empty / "0.JPEG", 0)
    told = "no images under CLASS.*ignored: 1 files beside the class folders"
    with pytest.raises(ValueError, match=told):
        FolderStore(empty)
    shutil.rmtree(folder / "c")
    assert len(FolderStore(folder)) == 4


@pytest.mark.parametrize("what", ["named pipe", "/dev/zero", "folder", "dangling"])
def test_images_are_files(folder: Path, what: str) -> None:
    store = FolderStore(folder)
    image = folder / "c/x.JPEG"
    image.unlink()
    anew = r"1 files cannot be used(.|\n)*c/x\.JPEG: (is a|No such file)"
    match what:
        case "named pipe":
            os.mkfifo(image)
        case "folder":
            image.mkdir()
            anew = "no images under c"
        case _:
            image.symlink_to(what)
    told = r"c/x\.JPEG: sample 4: (is a|No such file)"
    with pytest.raises(DamagedData, match=told):
        store.read(4)
    with pytest.raises(DamagedData, match=told):
        store.identity()
    with pytest.raises(ValueError, match=anew):
        FolderStore(folder)


def test_a_huge_file_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "c/x.JPEG").write_bytes(b"\xff\xd8")
    os.truncate(folder / "c/x.JPEG", 3 << 30)  # sparse
    with pytest.raises(ValueError, match=r"c/x\.JPEG: has more than 1,073,741,824 bytes"):
        FolderStore(folder)


def test_odd_file_names(folder: Path) -> None:
    names = [b"caf\xe9.JPEG", b"new\nline.JPEG", b"tab\t'quote\".JPEG", b"n" * 250 + b".jpg"]
    for i, name in enumerate(names):
        write(folder / "a" / "tmp.JPEG", i)
        os.rename(folder / "a" / "tmp.JPEG", os.path.join(os.fsencode(folder), b"b", name))
    for _ in range(2):  # the second time from the index
        store = FolderStore(folder)
        assert len(store) == 9
        for i in range(9):
            assert store.read(i).tobytes() == store.file(i).read_bytes()
    assert store.identity()["count"] == 9
    for i in range(9):
        store.file(i).write_bytes(b"damaged")
        with pytest.raises(DamagedData) as caught:
            store.read(i)
        assert str(caught.value).isprintable()
    for name in ("a", "c"):
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=r"b/caf\\udce9\.JPEG: not an image"):
        FolderStore(folder)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def poison(index: Path, **change: np.ndarray) -> None:
    """Write other arrays into an index."""
    with np.load(index) as good:
        np.savez(index, **{**good, **change})


def test_an_index_cannot_make_sides_wrong_in_silence(folder: Path) -> None:
    FolderStore(folder)
    index = folder / ".fap-index.npz"
    with np.load(index) as good:
        table = good["table"].copy()
    table[4, 2:] = 7, 9
    poison(index, table=table)
    store = FolderStore(folder)
    assert (store.heights[4], store.widths[4]) == (7, 9)
    told = r"c/x\.JPEG: sample 4: \(38, 44\) pixels, \(7, 9\) when .*fap-index"
    with pytest.raises(DamagedData, match=told):
        store.read(4)
    for sides in ((0, 9), (-1, 9), (9, 40000)):
        table[4, 2:] = sides
        poison(index, table=table)
        with pytest.raises(ValueError, match=r"c/x\.JPEG: .* pixels: sides must be 1 to 32767"):
            FolderStore(folder)


@pytest.mark.parametrize(
    "what", ["named pipe", "/dev/zero", "folder", "old", "pickle", "floats", "compressed", "short"]
)
def test_an_index_that_is_none_is_made_again(folder: Path, tmp_path: Path, what: str) -> None:
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # which a float holds
    wanted = FolderStore(folder)
    index = folder / ".fap-index.npz"
    with np.load(index) as good:
        tables = dict(good)
    index.unlink()
    wrong = tables["table"].copy()
    wrong[:, 2:] = 5  # the sides
    match what:
        case "named pipe":
            os.mkfifo(index)
        case "folder":
            index.mkdir()
        case "/dev/zero":
            index.symlink_to(what)
        case "old":  # sides as stored, before there was a version
            np.savez(index, names=tables["names"], table=wrong)
        case "pickle":
            np.savez(index, **tables | {"table": np.array([Trap(tmp_path / "trap")] * 5)})
        case "floats":
            np.savez(index, **tables | {"table": wrong.astype(float)})
        case "compressed":
            np.savez_compressed(index, **tables | {"table": wrong})
        case "short":
            np.savez(index, **tables | {"table": wrong[:3]})
    for _ in range(2):
        assert FolderStore(folder).heights.tolist() == wanted.heights.tolist()
    assert not (tmp_path / "trap").exists()


def test_no_home_and_a_read_only_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's uid without an account: the index has no place, which costs a scan."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(np, "savez", read_only)
    assert len(FolderStore(folder)) == 5
    assert not (folder / ".fap-index.npz").exists()


def test_no_semaphores_are_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /dev/shm there are none."""
    import _multiprocessing
    import multiprocessing.synchronize  # which looks at them when it is imported

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    with pytest.raises(OSError, match="not implemented"):
        multiprocessing.get_context().Lock()
    assert len(FolderStore(folder)) == 5
