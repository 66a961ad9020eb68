"""The writer of `.beton`: nothing half-written, whatever stops it, whoever else writes."""

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


ROOT = Path(__file__).resolve().parents[2]


def no_trace(folder: Path) -> bool:
    return not [p for p in folder.iterdir() if "out.beton" in p.name]


def test_samples_larger_than_a_page(tmp_path: Path) -> None:
    """3 x 1800 x 1800 bytes need 16 MiB pages; the small ones before and after stay readable."""
    (tmp_path / "src" / "a").mkdir(parents=True)
    for i, side in enumerate((30, 1800, 40, 1800, 50)):
        (tmp_path / "src" / "a" / f"{i}.png").write_bytes(encoded(picture(i, side, side), "PNG"))
    convert_folder(
        tmp_path / "src", tmp_path / "out.beton", Encoding(raw=True), allow_odd_classes=True
    )
    store = open_store(tmp_path / "out.beton")
    for i, side in enumerate((30, 1800, 40, 1800, 50)):
        np.testing.assert_array_equal(decoded(store, i), np.asarray(picture(i, side, side)))
    page = int(np.fromfile(tmp_path / "out.beton", "<u4", 1, offset=4)[0])
    first, last = store._ptrs // page, (store._ptrs + store.sizes - 1) // page
    assert page == 16 << 20
    assert (first == last).all()


STARTING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fap.cli.convert import main
print(1, flush=True)
sys.exit(main(sys.argv[1:]))
"""


def without_locks(file) -> bool:
    return False


def test_a_file_system_without_locks(folder: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(beton, "lock", without_locks)
    dst, part = tmp_path / "out.beton", tmp_path / "out.beton.part"
    part.write_bytes(b"another conversion's")
    assert main([str(folder), str(dst)]) == 1
    assert (
        "no locks on this file system say whether another conversion is writing it"
        in capfd.readouterr().err
    )
    assert part.read_bytes() == b"another conversion's"
    part.unlink()
    assert main([str(folder), str(dst)]) == 0
    assert "out.beton.part: no locks on this file system" in capfd.readouterr().err
    assert check(dst) == []
    other = BetonWriter(tmp_path / "2.beton", 1)
    with other, pytest.raises(ValueError, match="if none is, remove it"):
        BetonWriter(tmp_path / "2.beton", 1)


def test_a_part_that_its_writer_has_renamed_is_left_alone(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """The lock of a file that was opened just before its writer finished: emptying it would destroy
    the result.
    """
    dst, part = tmp_path / "out.beton", tmp_path / "out.beton.part"
    part.write_bytes(b"complete")

    def finished_since(file) -> bool:
        part.rename(dst)
        return True

    monkeypatch.setattr(beton, "lock", finished_since)
    with pytest.raises(ValueError, match="another conversion was writing it"):
        convert_folder(folder, dst)
    assert dst.read_bytes() == b"complete"


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_part_that_is_no_file_is_left_alone(
    kind: str, folder: Path, tmp_path: Path, capfd
) -> None:
    part, precious = tmp_path / "out.beton.part", tmp_path / "precious"
    precious.write_text("mine")
    if kind == "pipe":
        os.mkfifo(part)
    elif kind == "folder":
        part.mkdir()
    else:
        part.symlink_to(precious if kind == "link" else "nowhere")
    assert main([str(folder), str(tmp_path / "out.beton")]) == 1
    assert "out.beton.part: exists and is not a file" in capfd.readouterr().err
    assert precious.read_text() == "mine"
    assert os.path.lexists(part)
    assert not (tmp_path / "nowhere").exists()


def test_a_dangling_link_is_not_overwritten(folder: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "out.beton").symlink_to("nowhere")
    assert main([str(folder), str(tmp_path / "out.beton")]) == 1
    assert "exists and is not overwritten" in capfd.readouterr().err


def test_both_names_are_made_durable_after_both_contents(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    dst, done = tmp_path / "out.beton", []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        done.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    convert_folder(folder, dst)
    assert done == [
        "out.beton.part",
        "out.beton.part.json",
        "out.beton.json",
        "out.beton",
        tmp_path.name,
    ]


def test_a_folder_that_cannot_be_made_durable_is_no_success(
    folder: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(beton, "sync_folder", fail)
    assert main([str(folder), str(tmp_path / "out.beton")]) == 1
    told = capfd.readouterr()
    assert "out.beton'" in told.err
    assert "images" not in told.out


@pytest.mark.parametrize("after", [1, 2])
def test_stopped_between_the_two_renames(
    after: int, folder: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    replace, calls = os.replace, []

    def stopped(source: Path, target: Path) -> None:
        replace(source, target)
        calls.append(target)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(os, "replace", stopped)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert main([str(folder), str(tmp_path / "out.beton")]) == 129
    assert [
        signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ] == before
    told = capfd.readouterr().err
    if after == 1:
        assert "stopped by SIGHUP; nothing was written" in told
        assert no_trace(tmp_path)
    else:
        assert "stopped by SIGHUP; the file is complete" in told
        assert check(tmp_path / "out.beton") == []


def test_a_signal_that_nohup_ignores_stays_ignored(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    add = BetonWriter.add

    def hung_up(*arguments) -> None:
        add(*arguments)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(BetonWriter, "add", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main([str(folder), str(tmp_path / "out.beton")]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_semaphores_are_needed_to_convert(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Without /dev/shm there are none."""
    import _multiprocessing

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    assert main([str(folder), str(tmp_path / "out.beton")]) == 0
    assert main(["--check", str(tmp_path / "out.beton")]) == 0


SLOW_WRITER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
from pipelines import convert
from fap.cli.convert import main
real = convert.BetonWriter.add
def add(self, sample, label):
    real(self, sample, label)
    self._file.flush()
    print("added", flush=True)
    time.sleep(0.3)
convert.BetonWriter.add = add
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (signal.SIGKILL, -9),
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 138),
    ],
    ids=lambda s: str(s),
)
def test_stopped_half_way_leaves_no_result(
    folder: Path, tmp_path: Path, sent: int, code: int
) -> None:
    dst = tmp_path / "out.beton"
    command = [sys.executable, "-c", SLOW_WRITER, str(folder), str(dst)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        for _ in range(2):
            assert process.stdout.readline() == "added\n"
        assert dst.with_name("out.beton.part").stat().st_size > 1000
        process.send_signal(sent)
        if code > 0:
            process.send_signal(sent)  # an impatient user's second one
        assert process.wait(60) == code
        assert "Traceback" not in process.stderr.read()
    if sent == signal.SIGKILL:  # the partial file stays under its own name and is in nobody's way
        assert not dst.exists()
        assert not sidecar_path(dst).exists()
        convert_folder(folder, dst)
        assert check(dst) == []
        assert not dst.with_name("out.beton.part").exists()
    else:
        assert no_trace(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_stopped_while_it_starts(folder: Path, tmp_path: Path, sent: int, code: int) -> None:
    """Half a second in, torch is being loaded."""
    command = [sys.executable, "-c", STARTING, str(folder), str(tmp_path / "out.beton")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "1\n"
        time.sleep(0.5)
        process.send_signal(sent)
        assert process.wait(60) == code
        assert "Traceback" not in process.stderr.read()
    assert no_trace(tmp_path)


@pytest.mark.slow
def test_two_conversions_to_one_file(folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out.beton"
    command = [sys.executable, "-c", SLOW_WRITER, str(folder), str(dst)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "added\n"
        with pytest.raises(ValueError, match="another conversion"):
            convert_folder(folder, dst)
        process.stdout.read()
        assert process.wait(60) == 0
    assert check(dst) == []


def test_disk_full(folder: Path, tmp_path: Path) -> None:
    """A limit on the file's size stands in for a full disk: write(2) fails half-way."""
    code = "import sys; from fap.cli.convert import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out.beton")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, ((8 << 20) + 3000, (8 << 20) + 3000)
        ),
    )
    assert result.returncode == 1
    assert "out.beton" in result.stderr
    assert "too large" in result.stderr
    assert no_trace(tmp_path)
