"""Which files are images of which class: random trees against a slow twin and torchvision."""

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


def test_random_trees_with_traps_and_links(tmp_path):
    rng = np.random.default_rng()
    for i in range(30):
        root = tmp_path / f"{i}"
        random_tree(rng, root)
        listing = list_images(root)
        assert listing.classes == ("c 2", "c1", "c10")
        assert [path for path, _ in listing.files] == listed_slowly(root)
        for path, label in listing.files:
            assert path.startswith(f"{root}/{listing.classes[label]}/")


def test_the_order_of_trees_without_traps_is_torchvisions(tmp_path):
    assert SUFFIXES == IMG_EXTENSIONS
    rng = np.random.default_rng()
    for i in range(20):
        root = tmp_path / f"{i}"
        random_tree(rng, root)
        for folder, inner, files in os.walk(root, topdown=False):
            for name in [*inner, *files]:
                path = Path(folder, name)
                if path.is_symlink():
                    path.unlink()
                elif is_trap(name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert list_images(root).files == ImageFolder(str(root)).samples


def test_a_link_to_a_folder_above_multiplies_nothing(folder):
    before = list_images(folder).files
    for target in (".", "..", "../..", "../../..", "/"):
        (folder / "c" / f"to {target.replace('/', ' ')}").symlink_to(target)
    (folder / "up").symlink_to(".")
    (folder / "c" / "self").symlink_to("self")
    listing = list_images(folder)
    assert listing.files == before
    assert listing.ignored[LINKS] == 6
    beside = folder.parent / "more"
    write(beside / "y.JPEG", 1)
    (folder / "c" / "more").symlink_to(beside)
    (folder / "c" / "again").symlink_to(beside)  # the same folder
    assert [path for path, _ in list_images(folder).files][-2:] == [
        f"{folder}/c/x.JPEG",
        f"{folder}/c/again/y.JPEG",
    ]


def test_links_cannot_make_a_small_tree_a_huge_one(tmp_path):
    """Two links from each of 30 folders to the next: 2^30 paths."""
    for i in range(30):
        put(tmp_path / "src" / f"{i}" / "0.JPEG")
        for name in "ab":
            (tmp_path / "src" / f"{i}" / name).symlink_to(f"../{i + 1}" if i < 29 else "../0")
    assert len(list_images(tmp_path / "src").files) == 30 * 30


def test_what_is_passed_over_is_listed_by_suffix(folder):
    for name in (
        "a/1.avif",
        "b/2.AVIF",
        "b/3.jfif",
        "c/Thumbs.db",
        "c/._x.JPEG",
        "c/.DS_Store",
        "c/README",
        "top.jpg",
        ".x",
    ):
        put(folder / name)
    for name in (
        "a/@eaDir/x.jpg",
        "a/.ipynb_checkpoints/x.jpg",
        "@EADIR/x.jpg",
        "__MACOSX/a/._1.JPEG",
        "lost+found/x.jpg",
    ):
        put(folder / name)
    store = FolderStore(folder)
    assert store.notes[0].startswith("ignored: 3 hidden files, 2 .avif, 1 ")
    assert list_images(folder).ignored == {
        ".avif": 2, ".jfif": 1, ".db": 1, ".txt": 1, "hidden files": 3, "files without suffix": 1, "@EADIR folders": 1,
        "files beside the class folders": 1, "@eaDir folders": 1, "hidden folders": 1, "__MACOSX folders": 1,
        "lost+found folders": 1,
    }  # fmt: skip
    assert len(store) == 5


def test_a_note_is_one_short_line(folder):
    for i in range(1000):
        put(folder / "a" / f"file.{i:04d}\n")
    (note,) = list_images(folder).notes()
    assert len(note) < 400
    assert note.isprintable()
    assert note.startswith("ignored: 1 .0000\\n, 1 .0001\\n")
    assert note.endswith("991 of 991 other kinds")


def test_an_empty_class_says_what_lies_there_instead(folder):
    put(folder / "d" / "1.avif")
    (folder / "e").mkdir()
    with pytest.raises(
        ValueError,
        match=r"no images under d, e: 2 class folder.*\.webp; ignored: 1 \.avif, 1 \.txt",
    ):
        list_images(folder)


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="a/deep"):
        list_images(folder)
