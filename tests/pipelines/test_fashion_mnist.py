"""Fashion-MNIST: the published order, sources that fail, and copies that are damaged."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import fashion_mnist

ROOT = Path(__file__).resolve().parents[2]
CONTENT = {
    "train-images-idx3-ubyte": bytes(16) + bytes(range(196)) * 8,  # two images
    "train-labels-idx1-ubyte": bytes(8) + bytes([9, 0]),
    "t10k-images-idx3-ubyte": bytes(16) + bytes(range(195, -1, -1)) * 4,
    "t10k-labels-idx1-ubyte": bytes(8) + bytes([2]),
}


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small archives, which are the published ones here."""
    folder = tmp_path / "archives"
    folder.mkdir()
    sha256 = {}
    for name, content in CONTENT.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        sha256[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "SHA256", sha256)
    return folder


def test_the_published_order() -> None:
    root = ROOT / "data" / "fashion_mnist"
    if not list(root.glob("*-ubyte")):
        pytest.skip("no Fashion-MNIST under data/; `make demo-detection` fetches it")
    images, labels = fashion_mnist.load("test", root)
    assert images.dtype == np.uint8
    assert images.shape == (10_000, 28, 28)
    assert labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert np.bincount(labels).tolist() == [1_000] * 10
    assert fashion_mnist.CLASSES[9] == "ankle boot"


def test_the_first_source_that_has_it(
    tmp_path: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fails(folder: Path) -> Path:
        asked.append("fails")
        raise TimeoutError("no answer")

    def another(folder: Path) -> Path:
        asked.append("another")
        for name in CONTENT:
            (folder / f"{name}.gz").write_bytes(gzip.compress(b"another data set"))
        return folder

    def has_it(folder: Path) -> Path:
        asked.append("has it")
        return archives

    sources = {"one": fails, "two": another}
    monkeypatch.setattr(fashion_mnist, "SOURCES", sources)
    root = tmp_path / "data"
    with pytest.raises(OSError, match=r"one: no answer; two: train-images.*wrong sha256.*apt-get"):
        fashion_mnist.load("train", root)
    assert not list(root.iterdir())

    sources["three"] = has_it
    asked.clear()
    images, labels = fashion_mnist.load("train", root)
    assert asked == ["fails", "another", "has it"]
    assert images.tobytes() == CONTENT["train-images-idx3-ubyte"][16:]
    assert images.shape == (2, 28, 28)
    assert labels.tolist() == [9, 0]
    assert sorted(file.name for file in root.iterdir()) == sorted(CONTENT)

    _, labels = fashion_mnist.load("test", root)
    assert labels.tolist() == [2]
    assert len(asked) == 3  # the copy is there


def test_the_debian_package_needs_no_root(
    tmp_path: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands that behave as Debian's, the first of which may fail."""
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "apt-get": f'[ -z "$FAILS" ] || {{ echo "E: no such mirror" >&2; exit 100; }}\n'
        f"touch {fashion_mnist.PACKAGE}_1_all.deb",
        "dpkg-deb": f'[ -e "$2" ] && mkdir -p {fashion_mnist.INSTALLED}\n'
        f"cp {archives}/* {fashion_mnist.INSTALLED}",
    }
    for name, lines in commands.items():
        (tools / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"Debian": fashion_mnist._from_debian})
    monkeypatch.setenv("FAILS", "yes")
    with pytest.raises(OSError, match="Debian: apt-get download: E: no such mirror"):
        fashion_mnist.load("train", tmp_path / "data")
    monkeypatch.setenv("FAILS", "")
    _, labels = fashion_mnist.load("train", tmp_path / "data")
    assert labels.tolist() == [9, 0]


@pytest.mark.parametrize(
    "damage",
    [b"", b"no archive", gzip.compress(bytes(999), mtime=0)[:-9]],
    ids=["empty", "no archive", "cut short"],
)
def test_a_damaged_archive_is_one_line(
    tmp_path: Path, archives: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    (archives / "t10k-images-idx3-ubyte.gz").write_bytes(damage)
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"here": lambda _: archives})
    with pytest.raises(OSError, match=r"here: .+") as caught:
        fashion_mnist.load("test", tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_damaged_copy_is_refused(tmp_path: Path, archives: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, content in CONTENT.items():
        (root / name).write_bytes(content)
    damaged = root / "t10k-labels-idx1-ubyte"
    damaged.write_bytes(CONTENT[damaged.name][:-1])
    assert len(fashion_mnist.load("train", root)[0]) == 2
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte: damaged .*delete it"):
        fashion_mnist.load("test", root)
    damaged.unlink()
    os.mkfifo(damaged)
    with pytest.raises(ValueError, match="is a named pipe"):
        fashion_mnist.load("test", root)
    with pytest.raises(ValueError, match="must be train or test"):
        fashion_mnist.load("validation", root)  # type: ignore[arg-type]
