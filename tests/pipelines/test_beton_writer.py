"""The writer of `.beton`: nothing half-written, whatever stops it, whoever else writes."""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fap.cli.convert import main
from pipelines import open_store
from pipelines.convert import Encoding, check
from pipelines.convert_images import convert_images
from pipelines.sources import beton_writer
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_layout import FIELD, HEADER
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.sources.sidecar import sidecar_path
from pipelines.store import PLANES, RAW
from tests.pipelines.many_fields import planes_of
from tests.pipelines.samples import decoded, encoded, image_folder, no_trace, picture

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "src")


def test_samples_larger_than_a_page(tmp_path: Path) -> None:
    """3 x 1800 x 1800 bytes need 16 MiB pages; the small ones before and after stay readable."""
    sides = (30, 1800, 40, 1800, 50)
    src = tmp_path / "src"
    dst = tmp_path / "out.beton"
    (src / "a").mkdir(parents=True)
    for i, side in enumerate(sides):
        (src / "a" / f"{i}.png").write_bytes(encoded(picture(i, side, side), "PNG"))
    convert_images(src, dst, Encoding(raw=True), allow_odd_classes=True)
    store = BetonStore(dst)
    for i, side in enumerate(sides):
        np.testing.assert_array_equal(decoded(store, i), np.asarray(picture(i, side, side)))
    page = int(np.fromfile(dst, HEADER, 1)["page_size"][0])
    assert page == 16 << 20
    first_page = store._ptrs // page
    last_page = (store._ptrs + store.sizes - 1) // page
    assert (first_page == last_page).all()


def test_gaps_in_the_table_are_zero(tmp_path: Path, seed: int) -> None:
    """Not what the memory held: equal samples make equal files, and nothing else gets into them."""
    rng = np.random.default_rng(seed)
    dst = tmp_path / "out.beton"
    sides = rng.integers(1, 9, (50, 2)).tolist()
    with BetonWriter(dst, len(sides)) as writer:
        for label, (height, width) in enumerate(sides):
            writer.add(Sample(rng.bytes(3 * height * width), RAW, height, width), label)
        writer.commit(None, {})
    ptrs = BetonStore(dst)._ptrs.tolist()
    wanted = b"".join(
        # Mode, width, height, pointer; to the next multiple of 8 there is a gap of 3 bytes; label.
        struct.pack("<BHHQ3xq", RAW, width, height, ptr, label)
        for label, ((height, width), ptr) in enumerate(zip(sides, ptrs, strict=True))
    )
    begin = HEADER.itemsize + 2 * FIELD.itemsize
    assert dst.read_bytes()[begin : begin + len(wanted)] == wanted


# ------------------------------------------------------------------ places, and planes


def test_samples_in_any_order_with_places_left_empty(tmp_path: Path, seed: int) -> None:
    """Labels, sides and bytes are those of the samples in the order of their places."""
    rng = np.random.default_rng(seed)
    samples = [Sample(rng.bytes(3 * h * w), RAW, h, w) for h, w in rng.integers(1, 9, (20, 2))]
    places = rng.permutation(30)[:20].tolist()
    with BetonWriter(tmp_path / "out.beton", 30) as writer:
        for label, (sample, place) in enumerate(zip(samples, places, strict=True)):
            writer.add(sample, label, place)
        writer.commit([f"c{i}" for i in range(20)], {})
    store = BetonStore(tmp_path / "out.beton")
    assert len(store) == 20
    assert check(tmp_path / "out.beton") == []
    for i, k in enumerate(np.argsort(places).tolist()):
        assert store.labels[i] == k
        assert store.read(i).tobytes() == samples[k].data
        assert (store.heights[i], store.widths[i]) == samples[k][2:4]


def test_what_is_written_is_handed_to_the_disk_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[tuple[int, int]] = []

    def advise(descriptor: int, start: int, n_bytes: int, advice: int) -> None:
        handed.append((start, start + n_bytes))
        raise OSError("a file system that takes no advice")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(beton_writer, "HAND_OVER_BYTES", 1000)
    path = tmp_path / "x.beton"
    with BetonWriter(path, 9) as writer:
        for label in range(9):
            writer.add(Sample(bytes([label]) * 450, RAW, 10, 15), label)
        writer.commit(None, {})
    begin = int(BetonStore(path)._ptrs[0])
    assert handed == [(begin + 1350 * k, begin + 1350 * (k + 1)) for k in range(3)]


def test_no_place_is_filled_twice(tmp_path: Path) -> None:
    sample = Sample(bytes(3), RAW, 1, 1)
    with BetonWriter(tmp_path / "out.beton", 3) as writer:
        writer.add(sample, 0, 1)
        with pytest.raises(AssertionError, match="two samples for place 1"):
            writer.add(sample, 0, 1)
    assert no_trace(tmp_path)


def write_planes(path: Path, photos: list[np.ndarray]) -> None:
    with BetonWriter(path, len(photos), planes=True) as writer:
        for i, image in enumerate(photos):
            height, width, _ = image.shape
            writer.add(Sample(planes_of(image), PLANES, height, width), i % 4)
        writer.commit("abcd", {})


def test_planes_are_written(tmp_path: Path, photos: list[np.ndarray]) -> None:
    write_planes(tmp_path / "out.beton", photos)
    store = open_store(tmp_path / "out.beton")
    assert store.labels.tolist() == [i % 4 for i in range(len(photos))]
    assert set(store.modes.tolist()) == {PLANES}
    for i, image in enumerate(photos):
        assert store.read(i).tobytes() == planes_of(image)
        assert (store.heights[i], store.widths[i]) == image.shape[:2]
    assert store.notes == ()
    assert check(tmp_path / "out.beton") == []
    with open(tmp_path / "out.beton", "r+b") as file:
        file.seek(int(store._ptrs[3]))
        file.write(b"\x01\x02\x03")
    assert check(tmp_path / "out.beton") == [
        f"sample 3: {tmp_path / 'out.beton'}: sample 3: wrong checksum"
    ]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")
def test_ffcv_loader_reads_planes(tmp_path: Path, photos: list[np.ndarray]) -> None:
    """In a subprocess: importing ffcv changes torch's thread count, its loader leaves threads."""
    write_planes(tmp_path / "out.beton", photos)
    code = """
import sys, numpy as np
from ffcv.fields.bytes import BytesDecoder
from ffcv.fields.decoders import IntDecoder
from ffcv.loader import Loader, OrderOption
ints = {name: [IntDecoder()] for name in ("label", "height", "width")}
options = {"batch_size": 40, "num_workers": 1, "order": OrderOption.SEQUENTIAL}
loader = Loader(sys.argv[1], **options, pipelines={"planes": [BytesDecoder()], **ints})
for planes, *found in loader:
    np.savez(sys.argv[2], planes=planes.copy(), ints=np.concatenate(found, 1))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out.beton"), str(tmp_path / "seen.npz")]
    subprocess.run(command, check=True, timeout=300)
    seen = np.load(tmp_path / "seen.npz")
    for i, image in enumerate(photos):
        assert seen["ints"][i].tolist() == [i % 4, *image.shape[:2]]
        data = planes_of(image)
        assert seen["planes"][i, : len(data)].tobytes() == data


# ------------------------------------------------------------------ whatever stops it

STARTING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fap.cli.convert import main
print(1, flush=True)
sys.exit(main(sys.argv[1:]))
"""


def without_locks(file: object) -> bool:
    return False


def test_a_file_system_without_locks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.setattr(beton_writer, "lock", without_locks)
    dst = tmp_path / "out.beton"
    part = tmp_path / "out.beton.part"
    part.write_bytes(b"another conversion's")
    assert main([str(folder), str(dst)]) == 1
    told = "no locks on this file system say whether another conversion is writing it"
    assert told in capfd.readouterr().err
    assert part.read_bytes() == b"another conversion's"
    part.unlink()
    assert main([str(folder), str(dst)]) == 0
    assert "out.beton.part: no locks on this file system" in capfd.readouterr().err
    assert check(dst) == []
    other = BetonWriter(tmp_path / "2.beton", 1)
    with other, pytest.raises(ValueError, match="if none is, remove it"):
        BetonWriter(tmp_path / "2.beton", 1)


def test_a_part_that_its_writer_has_renamed_is_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was opened just before its writer finished: emptying it would destroy the result."""
    dst = tmp_path / "out.beton"
    part = tmp_path / "out.beton.part"
    part.write_bytes(b"complete")

    def finished_since(file: object) -> bool:
        part.rename(dst)
        return True

    monkeypatch.setattr(beton_writer, "lock", finished_since)
    with pytest.raises(ValueError, match="another conversion was writing it"):
        convert_images(folder, dst)
    assert dst.read_bytes() == b"complete"


@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "folder"])
def test_a_part_that_is_no_file_is_left_alone(
    what: str, folder: Path, tmp_path: Path, capfd: Capture
) -> None:
    part = tmp_path / "out.beton.part"
    precious = tmp_path / "precious"
    precious.write_text("mine")
    match what:
        case "pipe":
            os.mkfifo(part)
        case "folder":
            part.mkdir()
        case "link":
            part.symlink_to(precious)
        case "dangling link":
            part.symlink_to("nowhere")
    assert main([str(folder), str(tmp_path / "out.beton")]) == 1
    assert "out.beton.part: exists and is not a file" in capfd.readouterr().err
    assert precious.read_text() == "mine"
    assert os.path.lexists(part)
    assert not (tmp_path / "nowhere").exists()


def test_a_dangling_link_is_not_overwritten(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "out.beton").symlink_to("nowhere")
    assert main([str(folder), str(tmp_path / "out.beton")]) == 1
    assert "exists and is not overwritten" in capfd.readouterr().err


def test_both_names_are_made_durable_after_both_contents(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync = os.fsync
    replace = os.replace

    def sync(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        done.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    convert_images(folder, tmp_path / "out.beton")
    assert done == [
        "out.beton.part",
        "out.beton.part.json",
        "out.beton.json",
        "out.beton",
        tmp_path.name,
    ]


def test_a_folder_that_cannot_be_made_durable_is_no_success(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(beton_writer, "sync_folder", fail)
    assert main([str(folder), str(tmp_path / "out.beton")]) == 1
    told = capfd.readouterr()
    assert "out.beton'" in told.err
    assert "left out" not in told.out


@pytest.mark.parametrize("after", [1, 2])
def test_stopped_between_the_two_renames(
    after: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    replace = os.replace
    calls = []

    def stopped(source: Path, target: Path) -> None:
        replace(source, target)
        calls.append(target)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(os, "replace", stopped)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(each) for each in signals]
    assert main([str(folder), str(tmp_path / "out.beton")]) == 129
    assert [signal.getsignal(each) for each in signals] == before
    told = capfd.readouterr().err
    if after == 1:
        assert "stopped by SIGHUP; nothing was written" in told
        assert no_trace(tmp_path)
    else:
        assert "stopped by SIGHUP; the file is complete" in told
        assert check(tmp_path / "out.beton") == []


def test_a_signal_that_nohup_ignores_stays_ignored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = BetonWriter.add

    def hung_up(*arguments: Any) -> None:
        add(*arguments)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(BetonWriter, "add", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main([str(folder), str(tmp_path / "out.beton")]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_semaphores_are_needed_to_convert(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without /dev/shm there are none."""
    import _multiprocessing

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    assert main([str(folder), str(tmp_path / "out.beton")]) == 0
    assert main(["--check", str(tmp_path / "out.beton")]) == 0


SLOW_WRITER = """
import signal, sys, time
# A shell's background jobs inherit it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pipelines.sources.beton_writer import BetonWriter
from fap.cli.convert import main
real = BetonWriter.add
def add(self, sample, label, place=None):
    real(self, sample, label, place)
    self._file.flush()
    print("added", flush=True)
    time.sleep(0.3)
BetonWriter.add = add
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
    ids=str,
)
def test_stopped_half_way_leaves_no_result(
    folder: Path, tmp_path: Path, sent: int, code: int
) -> None:
    dst = tmp_path / "out.beton"
    command = [sys.executable, "-c", SLOW_WRITER, str(folder), str(dst)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert "6 images" in process.stdout.readline()
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
        convert_images(folder, dst)
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
        assert "6 images" in process.stdout.readline()
        assert process.stdout.readline() == "added\n"
        with pytest.raises(ValueError, match="another conversion"):
            convert_images(folder, dst)
        process.stdout.read()
        assert process.wait(60) == 0
    assert check(dst) == []


@pytest.mark.slow
def test_disk_full(folder: Path, tmp_path: Path) -> None:
    """A limit on the file's size stands in for a full disk: write(2) fails half-way."""
    code = "import sys; from fap.cli.convert import main; sys.exit(main(sys.argv[1:]))"
    most = beton_writer.PAGE_BYTES + 3000

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out.beton")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
    )
    assert result.returncode == 1
    assert "out.beton" in result.stderr
    assert "too large" in result.stderr
    assert no_trace(tmp_path)
