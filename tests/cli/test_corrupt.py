"""`fap-corrupt`: the copies are what `fap-eval --corrupt` computes, whole or absent."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from fap.cli import corrupt_arguments, corrupt_command
from fap.cli.corrupt import main
from pipelines import corrupt_copies, open_store
from pipelines.corrupt import NAMES, corrupt
from pipelines.corrupt_folder import RECORD
from pipelines.files import lock
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import RAW
from tests.conftest import noise_beton
from tests.evaluate.world import CHECKPOINT, WNIDS, run, write_checkpoint, write_folder

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]
SMALL = ("--size", "32", "--resize", "36")
SETS = ("--corruptions", "fog", "impulse_noise", "--severity", "2", "5")
KEYS = ("impulse_noise/2", "impulse_noise/5", "fog/2", "fog/5")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen images of six classes, and a checkpoint that knows them."""
    at = tmp_path_factory.mktemp("corrupt")
    write_folder(at / "val", WNIDS, 3, (40, 36))
    write_checkpoint(at / CHECKPOINT, WNIDS)
    return at


def made(world: Path, dst: Path, *words: str) -> None:
    assert main([str(world / "val"), str(dst), *SMALL, *words]) == 0


def refused(capfd: Capture, *words: str | Path) -> str:
    """The one line of a command that ends with exit code 1."""
    capfd.readouterr()
    assert main([str(word) for word in words]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("fap-corrupt: ")
    return line


def sets_in(dst: Path) -> list[str]:
    return sorted(str(path.relative_to(dst)) for path in dst.glob("*/[1-5]*"))


def hidden_in(dst: Path) -> list[str]:
    return sorted(path.name for path in dst.rglob(".*"))


def seen_by_evaluation(file: Path) -> np.ndarray:
    """By torchvision's own transforms, uint8 (32, 32, 3)."""
    picture = torchvision.transforms.Resize(36)(Image.open(file).convert("RGB"))
    return np.asarray(torchvision.transforms.CenterCrop(32)(picture))


# ------------------------------------------------------------------ what is written


def test_files_are_the_corrupted_centres_of_the_images(world: Path, tmp_path: Path) -> None:
    """In the published layout, each image with the number that it has in the folder."""
    made(world, tmp_path / "png", *SETS, "--seed", "3", "--format", "png")
    made(world, tmp_path / "jpeg", *SETS, "--seed", "3")
    assert sets_in(tmp_path / "png") == sets_in(tmp_path / "jpeg") == sorted(KEYS)
    for key in KEYS:
        name, severity = key.split("/")
        for number in range(18):
            wnid = WNIDS[number // 3]
            clean = seen_by_evaluation(world / "val" / wnid / f"{number % 3}.JPEG")
            want = corrupt(clean, name, int(severity), 3, number)
            file = tmp_path / "png" / key / wnid / f"{number % 3}.png"
            assert np.array_equal(np.asarray(Image.open(file)), want)
            content = io.BytesIO()
            Image.fromarray(want).save(content, "JPEG", quality=85, optimize=True)
            copy = tmp_path / "jpeg" / key / wnid / f"{number % 3}.JPEG"
            assert copy.read_bytes() == content.getvalue()
        assert len(list((tmp_path / "jpeg" / key).rglob("*.JPEG"))) == 18
    assert hidden_in(tmp_path / "jpeg") == [RECORD]


@pytest.mark.parametrize("form", ["png", "beton"])
def test_fap_eval_reads_the_number_that_it_computes(world: Path, tmp_path: Path, form: str) -> None:
    made(world, tmp_path / "c", *SETS, "--format", form)
    words = ["--corrupt", "fog", "impulse_noise", "--severity", "2", "5"]
    words += ["--imagenet-c", str(tmp_path / "c"), "--pipeline", "reference"]
    found, _ = run(world, *words, out=f"out-{form}")
    results = found["results"]
    assert found["unused"] == []
    for key in KEYS:
        assert results[f"fap_corrupt/{key}"] == results[f"computed/{key}"]
    assert len({results[f"computed/{key}"]["loss"] for key in KEYS}) == 4


def test_a_tar_gives_the_copies_of_its_folder(world: Path, tmp_path: Path) -> None:
    """It is also what fap-eval reads: one file, whatever lies in it."""
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(world / "val", "val", filter=lambda one: None if ".npz" in one.name else one)
    made(world, tmp_path / "folder", *SETS)
    assert main([str(tmp_path / "val.tar"), str(tmp_path / "tar"), *SMALL, *SETS]) == 0
    for file in (tmp_path / "folder").rglob("*.JPEG"):
        copy = tmp_path / "tar" / file.relative_to(tmp_path / "folder")
        assert copy.read_bytes() == file.read_bytes()
    shutil.copy(world / CHECKPOINT, tmp_path)
    found, _ = run(tmp_path, data="val.tar")
    assert found["results"]["clean"] == run(world, out="of-folder")[0]["results"]["clean"]


def test_small_images_are_copied_as_they_are(tmp_path: Path, capsys: Capture) -> None:
    """With CIFAR-10-C's constants; labels without names are numbers."""
    data = noise_beton(tmp_path / "cifar.beton", seed=1, count=24, classes=12)
    assert (
        main([str(data), str(tmp_path / "c"), *SETS[:2], "--severity", "3", "--format", "png"]) == 0
    )
    said = capsys.readouterr().out
    assert "in their own size" in said
    assert "with CIFAR-10-C's constants" in said
    assert "folders are called by their numbers" in said
    images = open_store(data)
    folders = sorted(os.listdir(tmp_path / "c" / "fog" / "3"))
    assert folders == [f"{label:02}" for label in range(12)]
    for number in (0, 13, 23):
        file = tmp_path / "c" / "fog" / "3" / f"{number % 12:02}" / f"{number:02}.png"
        want = corrupt(images.read(number).reshape(32, 32, 3), "fog", 3, 0, number)
        assert np.array_equal(np.asarray(Image.open(file)), want)


def test_sizes_and_constants_of_mixed_images(tmp_path: Path, capsys: Capture) -> None:
    write_folder(tmp_path / "val", ["a"], 2, (40, 36))
    write_folder(tmp_path / "val", ["b"], 1, (100, 80))
    words = [str(tmp_path / "val"), str(tmp_path / "c"), *SETS, "--format", "png", "--as-stored"]
    assert main(words) == 0
    assert "2 images of at most 64 px with CIFAR-10-C's" in capsys.readouterr().out
    for number, name in enumerate(("a/0", "a/1", "b/0")):
        clean = np.asarray(Image.open(tmp_path / "val" / f"{name}.JPEG"))
        copy = np.asarray(Image.open(tmp_path / "c" / "fog" / "5" / f"{name}.png"))
        assert np.array_equal(copy, corrupt(clean, "fog", 5, 0, number))


def test_which_sets_and_sizes_are_meant(world: Path) -> None:
    for words, names in (
        ((), NAMES[:15]),
        (("--corruptions", "extra"), NAMES[15:]),
        (("--corruptions", "all"), NAMES),
        (("--corruptions", "fog", "extra"), ("fog", *NAMES[15:])),
    ):
        args = corrupt_arguments.arguments([str(world / "val"), str(world / "none"), *words])
        sets = corrupt_arguments.sets_of(args)
        assert [how.name for how in sets] == [name for name in names for _ in range(5)]
        assert [how.severity for how in sets] == [*range(1, 6)] * len(names)
    store = open_store(world / "val")
    for words, fit in (
        ((), None),  # all are small
        (("--size", "96"), (96, 110)),
        (("--resize", "300"), (224, 300)),
        (SMALL, (32, 36)),
        (("--as-stored",), None),
    ):
        args = corrupt_arguments.arguments([str(world / "val"), str(world / "none"), *words])
        assert corrupt_command.fit_for(store, args) == fit


@pytest.mark.slow
def test_processes_make_the_same_files(world: Path, tmp_path: Path) -> None:
    made(world, tmp_path / "one", *SETS)
    made(world, tmp_path / "two", *SETS, "--workers", "2")
    for file in (tmp_path / "one").rglob("*.JPEG"):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert other.read_bytes() == file.read_bytes()
    assert sets_in(tmp_path / "two") == sorted(KEYS)


# ------------------------------------------------------------------ names


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    source = tmp_path / "val" / "n01"
    write_folder(tmp_path / "val", ["n01", "n02"], 1, (40, 36))
    image = Image.open(source / "0.JPEG")
    (source / "sub").mkdir()
    for name in ("0.png", "sub/0.jpg", "A.png", "a.png", f"{'x' * 250}.jpg"):
        image.save(source / name)
    assert main([str(tmp_path / "val"), str(tmp_path / "c"), *SETS[:2], "--severity", "1"]) == 0
    found = sorted(os.listdir(tmp_path / "c" / "fog" / "1" / "n01"))
    assert len(found) == 6
    assert len({name.casefold() for name in found}) == 6
    assert {"0.JPEG", "0-1.JPEG", "A.JPEG", "a-3.JPEG", "0-5.JPEG"} < set(found)
    with Image.open(tmp_path / "c" / "fog" / "1" / "n02" / "0.JPEG") as copy:
        assert copy.size == (40, 36)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "..", "@eaDir", "é" * 200])
def test_a_class_that_is_no_folder_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, capfd: Capture
) -> None:
    data = tmp_path / "odd.beton"
    with BetonWriter(data, 2) as writer:
        for label in range(2):
            pixels = np.full((8, 8, 3), 100 * label, np.uint8)
            writer.add(Sample(pixels.tobytes(), RAW, 8, 8), label)
        writer.commit([name, "plain"], {})
    words = [data, tmp_path / "dst" / "c", *SETS]
    assert "cannot be the name of a folder" in refused(capfd, *words)
    assert not (tmp_path / "dst").exists()
    assert main([*map(str, words), "--format", "beton"]) == 0
    assert open_store(tmp_path / "dst" / "c" / "fog" / "2.beton").classes == (name, "plain")


def test_labels_without_names_that_folders_would_count_otherwise(
    tmp_path: Path, capfd: Capture
) -> None:
    data = tmp_path / "gap.beton"
    with BetonWriter(data, 2) as writer:
        for label in (0, 2):
            writer.add(Sample(bytes(192), RAW, 8, 8), label)
        writer.commit(None, {})
    words = [data, tmp_path / "c", *SETS]
    assert "they are not 0 to 1" in refused(capfd, *words)
    assert main([*map(str, words), "--format", "beton"]) == 0
    assert open_store(tmp_path / "c" / "fog" / "2.beton").labels.tolist() == [0, 2]


# ------------------------------------------------------------------ going on, and refusing to


def signalled_at(call: int, number: int) -> None:
    """A signal for this process when image number `call` of all sets is written."""
    patch = pytest.MonkeyPatch()
    calls = iter(range(10_000))

    def then(write: Callable[..., None]) -> Callable[..., None]:
        def watched(*arguments: Any) -> None:
            if next(calls) == call:
                os.kill(os.getpid(), number)
            write(*arguments)

        return watched

    patch.setattr(corrupt_copies, "_write", then(corrupt_copies._write))
    patch.setattr(BetonWriter, "add", then(BetonWriter.add))


SIGNALLED = """
import sys
from fap.cli.corrupt import main
from tests.cli.test_corrupt import signalled_at
signalled_at(25, int(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""


def signalled(number: signal.Signals, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, which gets a signal in the middle of its second set."""
    argv = [sys.executable, "-c", SIGNALLED, str(int(number)), *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_what_was_killed_goes_on_after_the_last_whole_set(
    world: Path, tmp_path: Path, capsys: Capture
) -> None:
    dst = tmp_path / "c"
    words = [str(world / "val"), str(dst), *SMALL, *SETS]
    killed = signalled(signal.SIGKILL, *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sets_in(dst) == ["impulse_noise/2"]
    assert any(name.endswith(".part") for name in hidden_in(dst))
    first = dst / "impulse_noise" / "2"
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*.JPEG")}
    assert main(words) == 0
    assert "; 1 of them whole" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*.JPEG")} == before
    assert hidden_in(dst) == [RECORD]
    made(world, tmp_path / "whole", *SETS)
    for file in (tmp_path / "whole").rglob("*.JPEG"):
        assert (dst / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()
    # Other sets of the same images may join them; nothing is made twice.
    made(world, dst, "--corruptions", "fog", "contrast", "--severity", "2")
    assert sets_in(dst) == sorted([*KEYS, "contrast/2"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jpeg", "beton"])
def test_a_signal_leaves_whole_sets_only(world: Path, tmp_path: Path, form: str) -> None:
    words = [str(world / "val"), str(tmp_path / "c"), *SMALL, *SETS, "--format", form]
    stopped = signalled(signal.SIGTERM, *words)
    assert stopped.returncode == 143, stopped.stderr
    (line,) = stopped.stderr.splitlines()
    assert line.startswith("fap-corrupt: stopped by SIGTERM; the same command goes on")
    left = [name for name in sets_in(tmp_path / "c") if not name.endswith(".json")]
    assert left == ["impulse_noise/2" if form == "jpeg" else "impulse_noise/2.beton"]
    assert not list(tmp_path.rglob("*.part"))
    assert main(words) == 0
    assert hidden_in(tmp_path / "c") == [RECORD]


def test_a_beton_that_was_killed_before_it_had_its_name_is_made_again(
    world: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "c"
    made(world, dst, *SETS, "--format", "beton")
    before = {path: path.read_bytes() for path in dst.glob("*/*")}
    os.rename(dst / "fog" / "2.beton", dst / "fog" / "2.beton.part")  # its sidecar was renamed
    os.rename(dst / "fog" / "5.beton", dst / "fog" / "5.beton.part")
    os.rename(dst / "fog" / "5.beton.json", dst / "fog" / "5.beton.part.json")
    made(world, dst, *SETS, "--format", "beton")
    assert {path: path.read_bytes() for path in dst.glob("*/*")} == before


def test_sets_that_were_made_otherwise_are_refused(
    world: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "c"
    made(world, dst, *SETS)
    val = world / "val"
    for words, message in (
        ((*SMALL, "--seed", "1"), "seed was 0 and is 1"),
        ((*SMALL, "--quality", "90"), "quality was 85 and is 90"),
        ((*SMALL, "--format", "png"), "format was 'jpeg' and is 'png'"),
        (("--size", "32", "--resize", "40"), "shown was {'resize': 36} and is {'resize': 40}"),
        (("--as-stored",), "shown was {'size': 32, 'resize': 36} and is 'as stored'"),
    ):
        assert message in refused(capfd, val, dst, *SETS, *words)
    other = shutil.copytree(val, tmp_path / "other")
    (other / "n01" / "0.JPEG").unlink()
    assert "source was {'count': 18, " in refused(capfd, other, dst, *SETS, *SMALL)
    with monkeypatch.context() as patch:
        versions = {**corrupt_command.pixel_versions(), "opencv": "0.1"}
        patch.setattr(corrupt_command, "pixel_versions", lambda: versions)
        assert "and is {'opencv': '0.1'}" in refused(capfd, val, dst, *SETS, *SMALL)
    assert sets_in(dst) == sorted(KEYS)
    moved = shutil.copytree(val, tmp_path / "moved")  # the same images
    assert main([str(moved), str(dst), *SETS, *SMALL]) == 0


def test_a_folder_that_holds_something_else_is_left_alone(
    world: Path, tmp_path: Path, capfd: Capture
) -> None:
    val = world / "val"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "holds something else already (mine.txt)" in refused(
        capfd, val, tmp_path / "full", *SETS
    )
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    assert "is no folder" in refused(capfd, val, tmp_path / "full" / "mine.txt", *SETS)
    for dst in (val / "c", world, val):
        assert "lie in one another" in refused(capfd, val, dst, *SETS)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / RECORD).write_text("{")
    assert "is no record of fap-corrupt" in refused(capfd, val, broken, *SETS)
    made(world, tmp_path / "c", *SETS)
    shutil.rmtree(tmp_path / "c" / "fog" / "2")
    (tmp_path / "c" / "fog" / "2").write_text("in the way")
    assert "2: is in the way" in refused(capfd, val, tmp_path / "c", *SETS, *SMALL)
    # What holds nothing is nobody's.
    (tmp_path / "empty").mkdir()
    made(world, tmp_path / "empty", *SETS)


def test_two_commands_do_not_make_one_set(world: Path, tmp_path: Path, capfd: Capture) -> None:
    dst = tmp_path / "c"
    made(world, dst, *SETS)
    shutil.rmtree(dst / "fog" / "5")
    with open(dst / "fog" / ".5.lock", "ab") as held:
        assert lock(held)
        words = (world / "val", dst, *SETS, *SMALL)
        assert "fog/5: another command is making it" in refused(capfd, *words)
        assert not (dst / "fog" / "5").exists()
    made(world, dst, *SETS)
    assert (dst / "fog" / "5").is_dir()


# ------------------------------------------------------------------ a world that fails


def test_too_little_room_is_said_before_anything_is_written(
    world: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (world / "val", tmp_path / "c", *SETS, *SMALL)
    disk = namedtuple("disk", "f_frsize f_bavail f_files f_favail")
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: disk(4096, 2, 1000, 1000))
        assert "MB needed, 0.0 MB free: take fewer --corruptions" in refused(capfd, *words)
        line = refused(capfd, *words, "--format", "beton")
        assert f"c: {4 * 18 * 32 * 32 * 3 / 1e6:.1f} MB needed" in line
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: disk(4096, 1 << 20, 1000, 71))
        assert "72 files are needed" in refused(capfd, *words)
    assert not (tmp_path / "c").exists()


FULL = """
import resource, sys
from fap.cli.corrupt import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2400, 2400))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_of_a_set(world: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: of a PNG of noise, but not of the record."""
    words = [str(world / "val"), str(tmp_path / "c"), *SMALL, "--format", "png"]
    words += ["--corruptions", "brightness", "impulse_noise", "--severity", "5"]
    argv = [sys.executable, "-c", FULL, *words]
    full = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 1, full.stderr
    (line,) = full.stderr.splitlines()
    assert line.startswith("fap-corrupt: [Errno 27] File too large: ")
    assert "impulse_noise" in line
    assert sets_in(tmp_path / "c") == []
    assert not list(tmp_path.rglob("*.part"))
    assert json.loads((tmp_path / "c" / RECORD).read_text())["seed"] == 0


def test_a_source_that_changes_makes_no_set(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "val", WNIDS, 1, (40, 36))
    write = corrupt_copies._write

    def touched(*arguments: Any) -> None:
        os.utime(tmp_path / "val" / "n03" / "0.JPEG")
        write(*arguments)

    monkeypatch.setattr(corrupt_copies, "_write", touched)
    line = refused(capfd, tmp_path / "val", tmp_path / "c", *SETS)
    assert "files changed while they were read" in line
    assert sets_in(tmp_path / "c") == []


def test_a_damaged_image_is_named(world: Path, tmp_path: Path, capfd: Capture) -> None:
    source = shutil.copytree(world / "val", tmp_path / "val")
    file = source / "n04" / "1.JPEG"
    file.write_bytes(file.read_bytes()[:-300])
    for more in ((), SMALL):
        dst = tmp_path / f"c{len(more)}"
        assert "n04/1.JPEG" in refused(capfd, source, dst, *SETS, *more)
        assert sets_in(dst) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: DST"),
        (("c", "--as-stored", "--size", "32"), "go with neither --resize nor --size"),
        (("c", "--format", "png", "--quality", "85"), "--quality is of JPEGs"),
        (("c", "--quality", "0"), "--quality 0: must be 1 to 100"),
        (("c", "--seed", "-1"), "--seed -1: must be 0"),
        (("c", "--workers", "0"), "--workers 0: must be 1"),
        (("c", "--corruptions", "rain"), "invalid choice: 'rain'"),
        (("c", "--severity", "6"), "invalid choice: 6"),
    ],
)
def test_words_that_mean_nothing(words: tuple[str, ...], message: str, capfd: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["src", *words])
    assert message in capfd.readouterr().err


def test_what_cannot_be_corrupted_is_said(world: Path, tmp_path: Path, capfd: Capture) -> None:
    dst = tmp_path / "c"
    assert "no such file or folder" in refused(capfd, tmp_path / "nowhere", dst)
    (tmp_path / "val.zip").write_bytes(b"PK")
    assert "fap-convert makes a .beton of" in refused(capfd, tmp_path / "val.zip", dst)
    line = refused(capfd, world / "val", dst, "--size", "40", "--resize", "36")
    assert "--resize 36: must be at least --size, 40" in line
    write_folder(tmp_path / "root", ["train", "val"], 1, (40, 36))
    assert "look like parts of a data set" in refused(capfd, tmp_path / "root", dst)
    assert not dst.exists()
