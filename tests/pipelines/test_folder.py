"""An image folder as a store: its bytes, its index, damage and odd files."""

from __future__ import annotations

import contextlib, errno, fcntl, hashlib, io, json, multiprocessing, os, pwd, random, re, resource, shutil, signal, stat, struct, subprocess, sys, tarfile, tempfile, threading, time, zlib
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fap.cli.convert import main
from pipelines import DamagedData, images, jpeg, machine, open_loader, open_store, sources
from pipelines import convert as convert_module
from pipelines.convert import BadImages, Encoding, check, convert_folder, encode
from pipelines.images import decode, open_image, plain_jpeg, reason, upright_jpeg, upright_sides
from pipelines.jpeg import check_jpeg, jpeg_header, jpeg_sides
from pipelines.machine import memory_limit_bytes, settle_in, temporary_caches, thread_limit, usable_cores, writable
from pipelines.sources import beton_writer, cifar10, sidecar
from pipelines.sources.beton import ALLOCATION, FIELD, HEADER, BetonStore
from pipelines.sources.beton_writer import BetonWriter, write_sidecar
from pipelines.sources.folder import FolderStore
from pipelines.sources.listing import LINKS, SUFFIXES, list_images
from pipelines.sources.sidecar import read_sidecar, sidecar_path
from pipelines.store import JPG, RAW, Store, check_class_names
from tests.conftest import as_jpeg, write_beton
from tests.pipelines import image_files, samples, trees


@pytest.fixture(autouse=True)
def _cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def decode(data: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


def test_order_and_labels_are_torchvisions_and_bytes_are_the_files(folder):
    store, twin = open_store(folder), ImageFolder(str(folder))
    assert isinstance(store, FolderStore)
    assert list(store.classes) == twin.classes and len(store) == len(twin)
    for i, (path, label) in enumerate(twin.samples):
        assert store.file(i) == Path(path) and store.labels[i] == label
        assert store.read(i).tobytes() == Path(path).read_bytes() and store.sizes[
            i
        ] == os.path.getsize(path)
        assert (store.widths[i], store.heights[i]) == Image.open(path).size
    assert (
        store.heights.dtype == np.int32 and store.labels.dtype == np.int64 and not store.modes.any()
    )


def test_index_is_used_and_notices_changes(folder, monkeypatch):
    FolderStore(folder)
    scanned: list[str] = []
    sides = FolderStore._sides
    monkeypatch.setattr(
        FolderStore,
        "_sides",
        lambda s, f: scanned.append(os.path.relpath(f, folder)) or sides(s, f),
    )
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


@pytest.mark.parametrize(
    "kind", ["png named JPEG", "CMYK", "grey", "EXIF-rotated", "EXIF, upright"]
)
def test_what_imagenet_really_holds(folder, kind):
    path = folder / "c/x.JPEG"
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "EXIF-rotated" else 1  # to be turned by 90 degrees
    save = {
        "png named JPEG": {"format": "PNG"},
        "CMYK": {"mode": "CMYK", "quality": 95},
        "grey": {"mode": "L", "quality": 95},
    }.get(kind, {"exif": exif, "quality": 95})
    picture = write(path, 3, (44, 36), **save).astype(int)
    store = FolderStore(folder)
    data = store.read(4)
    header = Image.open(io.BytesIO(data.tobytes()))
    if kind == "grey":
        picture = np.asarray(
            Image.fromarray(picture.astype(np.uint8)).convert("L").convert("RGB")
        ).astype(int)
    if kind == "EXIF-rotated":
        picture = np.rot90(picture, -1)
    height, width, _ = picture.shape
    assert (header.format, header.mode, header.size) == ("JPEG", "RGB", (width, height))
    assert (store.heights[4], store.widths[4]) == (height, width)
    assert (data.tobytes() == path.read_bytes()) == (kind == "EXIF, upright")
    assert np.abs(decode(data) - picture).mean() < 4


def test_damage_and_mistakes_name_the_file(folder, tmp_path):
    store = FolderStore(folder)
    write(folder / "c/x.JPEG", 9, (50, 60))
    with pytest.raises(
        DamagedData, match=r"c/x\.JPEG: sample 4: \(60, 50\) pixels, \(38, 44\) when"
    ):
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
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images under CLASS"):
        FolderStore(tmp_path / "empty")
    write(tmp_path / "empty" / "0.JPEG", 0)
    with pytest.raises(
        ValueError, match=r"no images under CLASS.*ignored: 1 files beside the class folders"
    ):
        FolderStore(tmp_path / "empty")
    shutil.rmtree(folder / "c")
    assert len(FolderStore(folder)) == 4


@pytest.mark.parametrize("kind", ["named pipe", "/dev/zero", "folder", "dangling"])
def test_images_are_files(folder, kind):
    store = FolderStore(folder)
    image = folder / "c/x.JPEG"
    image.unlink()
    if kind == "named pipe":
        os.mkfifo(image)
    elif kind == "folder":
        image.mkdir()
    else:
        image.symlink_to(kind)
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4: (is a|No such file)"):
        store.read(4)
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4: (is a|No such file)"):
        store.identity()
    wanted = (
        "no images under c"
        if kind == "folder"
        else r"1 files cannot be used(.|\n)*c/x\.JPEG: (is a|No such file)"
    )
    with pytest.raises(ValueError, match=wanted):
        FolderStore(folder)


def test_a_huge_file_is_not_read(folder, monkeypatch):
    (folder / "c/x.JPEG").write_bytes(b"\xff\xd8")
    os.truncate(folder / "c/x.JPEG", 3 << 30)  # sparse
    with pytest.raises(ValueError, match=r"c/x\.JPEG: has more than 1,073,741,824 bytes"):
        FolderStore(folder)


def test_odd_file_names(folder):
    names = [b"caf\xe9.JPEG", b"new\nline.JPEG", b"tab\t'quote\".JPEG", b"n" * 250 + b".jpg"]
    for i, name in enumerate(names):
        source = write(folder / "a" / "tmp.JPEG", i)
        os.rename(folder / "a" / "tmp.JPEG", os.path.join(os.fsencode(folder), b"b", name))
    for _ in range(2):  # the second time from the index
        store = FolderStore(folder)
        assert len(store) == 9
        for i in range(9):
            assert store.read(i).tobytes() == store.file(i).read_bytes()
    assert source.size
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

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def poison(index: Path, **change) -> None:
    with np.load(index) as good:
        np.savez(index, **{**good, **change})


def test_an_index_cannot_make_sides_wrong_in_silence(folder):
    FolderStore(folder)
    index = folder / ".fap-index.npz"
    with np.load(index) as good:
        table = good["table"].copy()
    table[4, 2:] = 7, 9
    poison(index, table=table)
    store = FolderStore(folder)
    assert (store.heights[4], store.widths[4]) == (7, 9)
    with pytest.raises(
        DamagedData, match=r"c/x\.JPEG: sample 4: \(38, 44\) pixels, \(7, 9\) when .*fap-index"
    ):
        store.read(4)
    for sides in ((0, 9), (-1, 9), (9, 40000)):
        table[4, 2:] = sides
        poison(index, table=table)
        with pytest.raises(ValueError, match=r"c/x\.JPEG: .* pixels: sides must be 1 to 32767"):
            FolderStore(folder)


@pytest.mark.parametrize(
    "kind", ["named pipe", "/dev/zero", "folder", "old", "pickle", "floats", "compressed", "short"]
)
def test_an_index_that_is_none_is_made_again(folder, tmp_path, kind):
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # which a float holds
    wanted = FolderStore(folder)
    index = folder / ".fap-index.npz"
    with np.load(index) as good:
        tables = dict(good)
    index.unlink()
    wrong = tables["table"] * [1, 1, 0, 0] + [0, 0, 5, 5]
    match kind:
        case "named pipe":
            os.mkfifo(index)
        case "folder":
            index.mkdir()
        case "/dev/zero":
            index.symlink_to(kind)
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


def test_no_home_and_a_read_only_folder(folder, monkeypatch):
    """A container's uid without an account: the index has no place, which costs a scan."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(
        Path,
        "home",
        lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")),
    )
    monkeypatch.setattr(
        np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    assert len(FolderStore(folder)) == 5
    assert not (folder / ".fap-index.npz").exists()


def test_no_semaphores_are_needed(folder, monkeypatch):
    """Without /dev/shm there are none."""
    import _multiprocessing

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    with pytest.raises(OSError, match="not implemented"):
        multiprocessing.get_context().Lock()
    assert len(FolderStore(folder)) == 5
