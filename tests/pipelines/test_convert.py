"""fap-convert: bytes preserved, FFCV's own Loader reads the result, every bad input is found."""

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


def decoded(store, index: int) -> np.ndarray:
    data = store.read(index)
    if store.modes[index] == RAW:
        return data.reshape(store.heights[index], store.widths[index], 3)
    return np.asarray(Image.open(BytesIO(data.tobytes())))


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
