"""The offline kit's own parts: sheets of images keep every bit, wheels' versions are the pinned ones, uploads fit."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bench.gpu.sheets")
from bench.gpu import build_kit, imports, sheets
from pipelines import open_store
from pipelines.cifar10 import CLASSES


def data(count: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng()
    return rng.integers(0, 256, (count, side, side, 3), np.uint8), rng.integers(0, 10, count)


# One image; a row but for one; whole rows; more than one sheet.
@pytest.mark.parametrize("count", [1, 49, 100, 131])
def test_sheets_keep_every_bit(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "IMAGES_PER_SHEET", 100)
    images, labels = data(count, side=5)
    written = sheets.write(tmp_path, "train", images, labels)
    assert [p.name for p in written] == ["train_00.webp", "train_01.webp"][: 1 + (count > 100)]
    again, labels_again = sheets.read(tmp_path, "train")
    assert np.array_equal(again, images)
    assert np.array_equal(labels_again, labels)
    assert (again.dtype, labels_again.dtype) == (np.uint8, np.int64)


def test_some_of_the_sheets_are_a_smaller_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "IMAGES_PER_SHEET", 50)
    images, labels = data(150, side=4)
    written = sheets.write(tmp_path, "train", images, labels)
    written[1].unlink()
    kept = np.r_[0:50, 100:150]
    again, labels_again = sheets.read(tmp_path, "train")
    assert np.array_equal(again, images[kept])
    assert np.array_equal(labels_again, labels[kept])


def test_what_cannot_be_sheets(tmp_path: Path) -> None:
    images, labels = data(3)
    with pytest.raises(ValueError, match="labels from"):
        sheets.write(tmp_path, "train", images, labels + 250)
    with pytest.raises(ValueError, match="no sheets test_"):
        sheets.read(tmp_path, "test")
    sheets.write(tmp_path, "test", images, labels)
    (tmp_path / "test_00.npy").unlink()
    with pytest.raises(OSError, match=r"test_00\.npy"):
        sheets.read(tmp_path, "test")


def test_sheets_become_a_beton(tmp_path: Path) -> None:
    images, labels = data(60)
    sheets.write(tmp_path, "test", images, labels)
    assert sheets.beton(tmp_path, "test", tmp_path / "test.beton") == 60
    store = open_store(tmp_path / "test.beton")
    assert store.classes == CLASSES
    assert store.labels.tolist() == labels.tolist()
    for i, image in enumerate(images):
        assert store.read(i).tobytes() == image.tobytes()


def test_versions_are_the_pinned_ones() -> None:
    text = "# a comment\nNumPy==2.4.6\ntyping_extensions==4.16.0\n"
    assert build_kit.pinned("numpy", text) == "numpy==2.4.6"
    assert build_kit.pinned("typing-extensions", text) == "typing-extensions==4.16.0"
    with pytest.raises(ValueError, match="no version of num"):
        build_kit.pinned("num", text)
    for package in (*build_kit.PACKAGES, "ffcv"):
        assert build_kit.constraint(package).startswith(f"{package}==")


def test_an_upload_that_does_not_fit_ends_the_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uploads = [tmp_path / ".gpu", tmp_path / ".gpu2"]
    for upload, mib in zip(uploads, (57, 59), strict=True):
        (upload / "cifar10").mkdir(parents=True)
        with (upload / "cifar10" / "train_00.webp").open("wb") as file:
            file.truncate(mib << 20)  # a hole: no disk is used
    build_kit.check_sizes(uploads, tree=(1 << 20) - 1)
    assert ".gpu: 58.0 MiB" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"\.gpu2 would not fit"):
        build_kit.check_sizes(uploads, tree=1 << 20)


def test_a_broken_build_leaves_the_old_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_kit, "ROOT", tmp_path)
    monkeypatch.setattr(build_kit, "tree_size", lambda: 0)
    monkeypatch.chdir(tmp_path)
    for upload in (build_kit.FIRST, build_kit.SECOND):
        (tmp_path / upload).mkdir()
        (tmp_path / upload / "old").touch()

    def build(first: Path, second: Path, work: Path) -> None:
        for folder in (first, second):
            folder.mkdir()
            (folder / "new").touch()
        if broken:
            raise SystemExit("kit: no network")

    monkeypatch.setattr(build_kit, "build", build)
    broken = True
    with pytest.raises(SystemExit, match="no network"):
        build_kit.main()
    assert sorted(p.name for p in tmp_path.glob(".gpu*/*")) == ["old", "old"]
    broken = False
    build_kit.main()
    assert sorted(p.name for p in tmp_path.glob(".gpu*/*")) == ["new", "new"]
    assert not list((tmp_path / "build").iterdir())


def test_the_sums_are_sha256sums(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"whole")
    build_kit.write_sums(tmp_path, "sums")
    command = ["sha256sum", "--check", "--quiet", "sums"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    (tmp_path / "folder" / "a").write_bytes(b"damaged")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1


def test_a_module_that_does_not_import_is_named() -> None:
    assert {"fap.step", "fap.cli.train", "pipelines", "pipelines.ffcv", "bench.gpu.sheets"} <= set(imports.modules())
    assert imports.failures(["json", "no_such_module_here"]) == {
        "no_such_module_here": "ModuleNotFoundError: No module named 'no_such_module_here'"
    }
