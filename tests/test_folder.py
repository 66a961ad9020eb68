import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from pipelines import DamagedData, open_store
from pipelines.folder import FolderStore


@pytest.fixture(autouse=True)
def _cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, seed: int, side: tuple[int, int] = (40, 30), mode: str = "RGB", **save) -> np.ndarray:
    """A smooth picture, so that JPEG hardly changes it; (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(small).resize(side, Image.Resampling.BICUBIC)
    image.convert(mode).save(path, save.pop("format", "JPEG"), **save)
    return np.asarray(image)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "images"
    for i, name in enumerate(["b/1.JPEG", "a/2.jpeg", "a/10.jpg", "a/deep/0.JPEG", "c/x.JPEG"]):
        write(root / name, i, (40 + i, 30 + 2 * i))
    (root / "a" / "notes.txt").write_text("no image")
    return root


def decode(data: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


def test_order_and_labels_are_torchvisions_and_bytes_are_the_files(folder):
    store, twin = open_store(folder), ImageFolder(str(folder))
    assert isinstance(store, FolderStore)
    assert list(store.classes) == twin.classes and len(store) == len(twin)
    for i, (path, label) in enumerate(twin.samples):
        assert store.file(i) == Path(path) and store.labels[i] == label
        assert store.read(i).tobytes() == Path(path).read_bytes() and store.sizes[i] == os.path.getsize(path)
        assert (store.widths[i], store.heights[i]) == Image.open(path).size
    assert store.heights.dtype == np.int32 and store.labels.dtype == np.int64 and not store.modes.any()


def test_index_is_used_and_notices_changes(folder, monkeypatch):
    FolderStore(folder)
    scanned: list[str] = []
    sides = FolderStore._sides
    monkeypatch.setattr(FolderStore, "_sides", lambda s, f: scanned.append(os.path.relpath(f, folder)) or sides(s, f))
    again = FolderStore(folder)
    assert not scanned and again.heights[again.labels == 2].tolist() == [38]
    write(folder / "c/x.JPEG", 9, (50, 60))  # changed
    write(folder / "b/0.JPEG", 9, (50, 61))  # new
    (folder / "a/10.jpg").unlink()
    changed = FolderStore(folder)
    assert sorted(scanned) == ["b/0.JPEG", "c/x.JPEG"]
    assert len(changed) == 5 and changed.heights[changed.labels > 0].tolist() == [61, 30, 60]
    (folder / ".fap-index.npz").write_bytes(b"PK damaged")
    assert FolderStore(folder).heights.tolist() == changed.heights.tolist() and len(scanned) == 7


def test_read_only_folder_is_indexed_in_the_users_cache(folder, tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if Path(target).is_relative_to(folder):
            raise PermissionError(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    first = FolderStore(folder)
    assert len(list((tmp_path / "cache" / "fap").iterdir())) == 1
    monkeypatch.setattr(FolderStore, "_sides", lambda *_: pytest.fail("scanned again"))
    assert FolderStore(folder).heights.tolist() == first.heights.tolist()


@pytest.mark.parametrize("kind", ["png named JPEG", "CMYK", "grey", "EXIF-rotated"])
def test_what_imagenet_really_holds(folder, kind):
    path = folder / "c/x.JPEG"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save = {
        "png named JPEG": {"format": "PNG"},
        "CMYK": {"mode": "CMYK", "quality": 95},
        "grey": {"mode": "L", "quality": 95},
        "EXIF-rotated": {"exif": exif, "quality": 95},
    }[kind]
    picture = write(path, 3, (44, 36), **save).astype(int)
    store = FolderStore(folder)
    data = store.read(4)
    header = Image.open(io.BytesIO(data.tobytes()))
    assert header.format == "JPEG" and header.mode in ("RGB", "L") and header.size == (44, 36)
    assert (data.tobytes() == path.read_bytes()) == (kind in ("grey", "EXIF-rotated"))
    if kind == "grey":
        picture = np.asarray(Image.fromarray(picture.astype(np.uint8)).convert("L"))[..., None].astype(int)
    assert np.abs(decode(data) - picture).mean() < 3


def test_damage_and_mistakes_name_the_file(folder, tmp_path):
    store = FolderStore(folder)
    write(folder / "c/x.JPEG", 9, (50, 60))
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4: \(60, 50\) pixels, \(38, 44\) when"):
        store.read(4)
    (folder / "c/x.JPEG").write_bytes(b"\0" * 900)
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4"):
        store.read(4)
    with pytest.raises(ValueError, match=r"1 files are no images, such as c/x\.JPEG"):
        FolderStore(folder)
    (folder / "c/x.JPEG").unlink()
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4"):
        store.read(4)
    with pytest.raises(ValueError, match="no images under c"):
        FolderStore(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images under CLASS"):
        FolderStore(tmp_path / "empty")
    shutil.rmtree(folder / "c")
    assert len(FolderStore(folder)) == 4
