"""The offline kit: sheets keep every bit, versions are pinned, uploads fit and arrive whole."""

import os
import re
import shutil
import signal
import subprocess
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bench.gpu.sheets")
from bench.gpu import build_kit, imports, sheets, thin
from pipelines import open_store
from pipelines.sources.cifar10 import CLASSES

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "bench" / "gpu"


def data(count: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng()
    return rng.integers(0, 256, (count, side, side, 3), np.uint8), rng.integers(0, 10, count)


# One image; a row but for one; whole rows; more than one sheet.
@pytest.mark.parametrize("count", [1, 49, 100, 131])
def test_sheets_keep_every_bit(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "IMAGES_PER_SHEET", 100)
    images, labels = data(count, side=5)
    written = sheets.write(tmp_path, "train", images, labels)
    names = ["train_00.webp"]
    if count > 100:
        names.append("train_01.webp")
    assert [p.name for p in written] == names
    again, labels_again = sheets.read(tmp_path, "train")
    assert np.array_equal(again, images)
    assert np.array_equal(labels_again, labels)
    assert (again.dtype, labels_again.dtype) == (np.uint8, np.int64)


@pytest.fixture
def sheets_of_50(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "IMAGES_PER_SHEET", 50)


@pytest.mark.usefixtures("sheets_of_50")
def test_some_of_the_sheets_are_a_smaller_set(tmp_path: Path) -> None:
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
        sheets.write(tmp_path, "train", images, labels + 256)
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


def test_the_kit_has_what_the_project_imports_and_the_machine_lacks() -> None:
    """Detection's scorer: without it no detector trains."""
    source = (ROOT / "fap" / "tasks" / "coco.py").read_text()
    (scorer,) = re.findall(r"^ *from (\w+) import COCO", source, re.MULTILINE)
    assert scorer.replace("_", "-") in build_kit.PACKAGES


@pytest.mark.parametrize(
    ("inside", "fine"), [("data/notes.txt", True), ("data/bin/x", False), ("purelib/m.py", False)]
)
def test_a_wheel_is_unpacked_where_its_files_are_found(
    inside: str, fine: bool, tmp_path: Path
) -> None:
    wheel = tmp_path / "m-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.mkdir("m-1.data/data")
        archive.writestr(f"m-1.data/{inside}", "")
        archive.writestr("m/__init__.py", "")
    if fine:
        build_kit.check_unpackable(wheel)
        return
    with pytest.raises(SystemExit, match=f"m-1.data/{inside}"):
        build_kit.check_unpackable(wheel)


def test_an_upload_that_does_not_fit_ends_the_build(tmp_path: Path, capsys) -> None:
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
    names = set(imports.modules())
    assert {"fap.step.step", "fap.cli.train", "pipelines", "bench.gpu.sheets"} <= names
    assert "pipelines.loaders.ffcv" in names
    for name in imports.NOT_NEEDED:  # a module that has moved would be needed again
        assert (ROOT / Path(*name.split("."))).with_suffix(".py").is_file()
        assert name not in names
    assert imports.failures(["json", "no_such_module_here"]) == {
        "no_such_module_here": "ModuleNotFoundError: No module named 'no_such_module_here'"
    }


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """A container of GPU code as in .nv_fatbin: entries of (sort, architecture, payload)."""
    body = b""
    for sort, architecture, payload in entries:
        header = bytearray(64)
        thin.ENTRY.pack_into(header, 0, sort, 0, len(header), len(payload))
        thin.ARCHITECTURE.pack_into(header, thin.ARCHITECTURE_AT, architecture)
        body += header + payload
    return thin.CONTAINER.pack(thin.MAGIC, 1, 16, len(body)) + body


def test_thinning_zeroes_the_code_of_other_gpus_only() -> None:
    first = container((2, 80, b"A" * 24), (2, 90, b"B" * 16), (1, 90, b"P" * 8))
    second = container((2, 90, b"C" * 8))
    before = b"ELF....." + first + bytes(8) + second + b"after..."
    section = range(8, len(before) - 8)
    data = bytearray(before)
    assert thin.thin(data, section, architecture=90) == 24 + 8
    assert bytes(data) == before.replace(b"A" * 24, bytes(24)).replace(b"P" * 8, bytes(8))
    with pytest.raises(ValueError, match="no code for sm_70"):
        thin.thin(data, section, architecture=70)


# ------------------------------------------------------------------ the scripts

# They run in a tree whose imports and suite are stubs.

IMPORTS = "import sys; print('IMPORT FAILED fap.step.step: no torch'); sys.exit(1)"
STUB = """
import argparse, os, sys
from pathlib import Path
import kit_module
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--seconds", type=int)
a, others = parser.parse_known_args()
(a.out / "cells").mkdir()
(a.out / "cells" / "log.txt").write_text("log")
(a.out / "table.md").write_text("| table |")
print("python path", os.environ["PYTHONPATH"])
print("seconds", a.seconds, *others)
sys.exit(1)  # something was not measured
"""

WAITS_FOR_ITS_RESULTS = """
import tarfile, time
archive = Path(os.environ["OUT"]) / "run1.tgz"
while not archive.exists() or "./cells/log.txt" not in tarfile.open(archive).getnames():
    time.sleep(0.05)
print("came back")
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A repository root with both uploads, made of little."""
    tree = tmp_path / "tree"
    (tree / "bench" / "gpu").mkdir(parents=True)
    for name, code in (("imports", IMPORTS), ("suite", STUB), ("study", STUB)):
        (tree / "bench" / "gpu" / f"{name}.py").write_text(code)
    first = tree / ".gpu"
    second = tree / ".gpu2"
    for folder in ("cifar10", "wheels", "photos", "site"):
        (first / folder).mkdir(parents=True)
    (second / "cifar10").mkdir(parents=True)
    for name in build_kit.SCRIPTS:
        shutil.copy(SCRIPTS / name, first)
    with zipfile.ZipFile(first / "wheels" / "kit_module-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("kit_module.py", "")
    (first / "photos" / "photos-1-py3-none-any.whl").touch()
    (first / "cifar10" / "test_00.webp").write_bytes(b"pixels")
    (second / "cifar10" / "train_00.webp").write_bytes(b"pixels")
    build_kit.write_sums(first, "first.sha256")
    build_kit.write_sums(second, "second.sha256")
    return tree


Done = subprocess.CompletedProcess[str]


def script(machine: Path, *command: str, timeout: float = 60, **environment: str) -> Done:
    """Run a script as a user of the GPU machine does; its folders stand beside the tree."""
    own = ("PYTHONPATH", "FAP_DRY_RUN")
    kept = {k: v for k, v in os.environ.items() if k not in own}
    folders = {"OUT": str(machine.parent / "out"), "FAP_KIT": str(machine.parent / "kit")}
    words = ["bash", *command]
    process = subprocess.Popen(
        words,
        cwd=machine,
        env=kept | folders | environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # as a machine that is taken away
    return Done(words, process.returncode, out, err)


def said(done: Done, what: str) -> list[str]:
    """The words of the first line that begins with `what`."""
    for line in done.stdout.splitlines():
        if line.startswith(what):
            return line.split()
    raise AssertionError(f"no line begins with {what!r}:\n{done.stdout}")


@pytest.mark.slow
def test_the_first_command_measures_even_when_an_import_fails(machine: Path) -> None:
    shutil.rmtree(machine / ".gpu2")
    slow = machine / "bench" / "gpu" / "imports.py"
    slow.write_text("import time; time.sleep(1.1)\n" + IMPORTS)
    done = script(machine, ".gpu/run1.sh", "300")
    assert done.returncode == 1, "the suite's own"
    assert "IMPORT FAILED fap.step.step" in done.stdout
    assert said(done, "python path")[-1] == f"{machine}:{machine.parent / 'kit' / 'site'}"
    assert 240 < int(said(done, "seconds")[1]) < 300, "set-up counts"
    assert said(done, "seconds")[2:] == ["--skip", "study"]
    assert (machine / "data" / "photos" / "photos-1-py3-none-any.whl").exists()
    assert "SETUP FAILED" not in done.stdout


def test_what_comes_back_is_an_archive_the_tables_and_the_log(machine: Path) -> None:
    script(machine, ".gpu/run1.sh")
    out = machine.parent / "out"
    assert sorted(p.name for p in out.iterdir()) == ["run1.log", "run1.tgz", "table.md"]
    assert "seconds 5" in (out / "run1.log").read_text()
    with tarfile.open(out / "run1.tgz") as archive:
        assert {"./table.md", "./cells/log.txt"} <= set(archive.getnames())


@pytest.mark.slow
def test_results_come_back_while_the_command_runs(machine: Path) -> None:
    """The command goes on until its own results are there; without them the script hangs."""
    suite = machine / "bench" / "gpu" / "suite.py"
    suite.write_text(STUB.replace("sys.exit(1)", WAITS_FOR_ITS_RESULTS))
    done = script(machine, ".gpu/run1.sh", FAP_PACK_SECONDS="0.5")
    assert "came back" in done.stdout


@pytest.mark.slow
def test_the_commands_dry_forms(machine: Path) -> None:
    first = script(machine, ".gpu/run1.sh", FAP_DRY_RUN="1")
    assert 480 < int(said(first, "seconds")[1]) <= 540, "the default fits a call of 560 s"
    assert said(first, "seconds")[2:] == ["--dry-run"]
    second = script(machine, ".gpu/run2.sh", FAP_DRY_RUN="1")
    assert said(second, "seconds")[2:] == ["--toy"]


@pytest.mark.slow
def test_the_second_command_has_both_uploads(machine: Path) -> None:
    second = machine / ".gpu2"
    kit = machine.parent / "kit"
    second.rename(machine / "later")
    script(machine, ".gpu/run1.sh")
    shutil.rmtree(machine / ".gpu")
    (machine / "later").rename(second)
    done = script(machine, str(kit / "run2.sh"), "200")
    assert 140 < int(said(done, "seconds")[1]) <= 200
    assert said(done, "seconds")[2:] == ["--kit", str(kit / "cifar10")]
    sheets_there = sorted(p.name for p in (kit / "cifar10").iterdir())
    assert sheets_there == ["test_00.webp", "train_00.webp"]
    assert "SETUP" not in done.stdout.replace("SETUP: going on without", "")


@pytest.mark.slow
def test_a_damaged_upload_is_named_and_a_new_one_replaces_it(machine: Path) -> None:
    sheet = machine / ".gpu" / "cifar10" / "test_00.webp"
    sheet.write_bytes(b"half")
    done = script(machine, ".gpu/run1.sh")
    assert "cifar10/test_00.webp: FAILED" in done.stdout
    assert "SETUP FAILED: the upload .gpu is damaged" in done.stdout
    assert said(done, "seconds")
    sheet.write_bytes(b"pixels")
    assert "SETUP FAILED" not in script(machine, ".gpu/run1.sh").stdout
    assert (machine.parent / "kit" / "cifar10" / "test_00.webp").read_bytes() == b"pixels"


def test_the_scripts_name_modules_that_exist() -> None:
    """A module that moves must move in the scripts too, which no import checks."""
    for script_file in sorted(SCRIPTS.glob("*.sh")):
        text = script_file.read_text()
        names = re.findall(r"(?:-m|from|import) ((?:fap|pipelines|bench)\.[\w.]+)", text)
        names += re.findall(r" (fap\.\w[\w.]*|pipelines\.\w[\w.]*)", text)
        for name in names:
            path = ROOT / Path(*name.split("."))
            assert path.is_dir() or path.with_suffix(".py").is_file(), (script_file.name, name)
