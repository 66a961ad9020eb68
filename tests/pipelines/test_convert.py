"""fap-convert: bytes preserved, FFCV's own Loader reads the result, every bad input is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fap.cli.convert import main
from pipelines import convert as convert_module
from pipelines import open_store
from pipelines.convert import BadImages, Encoding, check, encode
from pipelines.convert_images import convert_images
from pipelines.planes import encode_planes
from pipelines.sources.beton import BetonStore
from pipelines.sources.sidecar import Sidecar, read_sidecar, sidecar_path
from pipelines.store import JPG, PLANES, RAW
from tests.pipelines.samples import (
    ORIENTATION,
    decoded,
    encoded,
    exif_of,
    image_folder,
    jpeg,
    no_trace,
    picture,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "src")


def sidecar_of(path: Path) -> Sidecar:
    sidecar = read_sidecar(path)
    assert sidecar is not None
    return sidecar


def test_jpegs_are_kept_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out.beton"
    done = convert_images(folder, dst)
    assert (done["count"], done["verbatim"], done["skipped"]) == (6, 6, [])
    store = open_store(dst)
    assert store.classes == ("cat", "dog")
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1]
    paths = sorted(folder.glob("cat/*.JPEG")) + sorted(folder.glob("dog/*.JPEG"))
    for i, path in enumerate(paths):
        assert store.read(i).tobytes() == path.read_bytes()
    assert sidecar_of(dst).encoding == done
    assert check(dst) == []


@pytest.mark.slow
def test_ffcv_loader_reads_the_file(folder: Path, tmp_path: Path) -> None:
    """In a subprocess: importing ffcv changes torch's thread count, its loader leaves threads."""
    (folder / "dog" / "4.JPEG").write_bytes(encoded(picture(4), "PNG"))
    dst = tmp_path / "out.beton"
    convert_images(folder, dst)
    code = """
import sys, numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
options = {"batch_size": 7, "num_workers": 1, "order": OrderOption.SEQUENTIAL}
loader = Loader(sys.argv[1], **options, pipelines=pipelines)
for images, labels in loader:
    np.savez(sys.argv[2], images=images.copy(), labels=labels.copy())
"""
    command = [sys.executable, "-c", code, str(dst), str(tmp_path / "seen.npz")]
    subprocess.run(command, check=True, timeout=300)
    seen = np.load(tmp_path / "seen.npz")
    assert seen["labels"].ravel().tolist() == [0, 0, 0, 1, 1, 1, 1]
    store = open_store(dst)
    for i in range(7):
        # FFCV decodes with the fast DCT.
        assert np.abs(seen["images"][i].astype(int) - decoded(store, i)).mean() < 2


RGB = picture(1)
GREY = RGB.convert("L")
OTHERS = {  # content, what it shows, how much of it a palette or a JPEG may lose
    "a PNG named .JPEG": (encoded(RGB, "PNG"), RGB, 4),
    "a PNG with a palette": (encoded(RGB.quantize(64), "PNG"), RGB, 15),
    "CMYK": (encoded(RGB.convert("CMYK"), "JPEG", quality=95), RGB, 4),
    "grey": (encoded(GREY, "JPEG", quality=95), GREY.convert("RGB"), 4),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_content_becomes_an_rgb_jpeg(what: str) -> None:
    data, wanted, tolerance = OTHERS[what]
    sample = encode(data, Encoding())
    assert sample.mode == JPG
    assert not sample.verbatim
    result = Image.open(BytesIO(sample.data))
    assert (result.format, result.mode, result.size) == ("JPEG", "RGB", wanted.size)
    assert np.abs(np.asarray(result) - np.asarray(wanted, int)).mean() < tolerance


def test_exif_rotation_is_applied_once() -> None:
    sample = encode(jpeg(2, exif=exif_of(6)), Encoding())
    result = Image.open(BytesIO(sample.data))
    assert (sample.height, sample.width) == (80, 60)
    assert result.size == (60, 80)
    assert result.getexif().get(ORIENTATION, 1) == 1
    wanted = np.asarray(picture(2).transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(np.asarray(result) - wanted).mean() < 4
    for harmless in (1, 0, 99):
        assert encode(jpeg(2, exif=exif_of(harmless)), Encoding()).verbatim


@pytest.mark.parametrize("blob", [b"garbage that is no TIFF", b"", b"II*\0\xff\xff\xff\xff"])
def test_an_unreadable_exif_block_does_not_make_an_image_bad(blob: bytes) -> None:
    assert encode(jpeg(2, exif=b"Exif\0\0" + blob), Encoding()).verbatim
    grey = encoded(picture(2).convert("L"), "JPEG", exif=b"Exif\0\0" + blob)
    sample = encode(grey, Encoding())
    assert (sample.height, sample.width) == (60, 80)


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
        convert_images(folder, dst)
    assert {Path(path).stem for path, _ in caught.value.bad} == set(BAD)
    assert all(path in str(caught.value) for path, _ in caught.value.bad)
    assert no_trace(tmp_path)
    done = convert_images(folder, dst, skip_bad=True)
    assert {Path(path).stem for path in done["skipped"]} == set(BAD)
    store = open_store(dst)
    assert store.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert store.read(5).tobytes() == (folder / "dog" / "2.JPEG").read_bytes()
    assert store.notes == (f"7 damaged images were left out when {dst} was made",)


def test_a_class_that_loses_all_its_images_moves_no_labels(
    folder: Path, tmp_path: Path, capfd: Capture
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
    left_out = [line for line in out if "left out: " in line]
    assert left_out == [f"left out: cow/{i}.JPEG" for i in range(3)]
    assert "9 images, 3 class(es) cat to dog, 0 to 6 images per class" in out
    assert "no images of 1 class(es): cow; the labels of the others do not move" in out
    assert out[-1] == f"{dst}: 9 images, 3 left out"


def test_the_command_says_what_it_found_and_what_it_ignored(
    folder: Path, tmp_path: Path, capfd: Capture
) -> None:
    (folder / "cat" / "4.avif").write_bytes(b"")
    (folder / "dog" / "@eaDir").mkdir()
    (folder / "dog" / "4.JPEG").write_bytes(jpeg(4))
    assert main([str(folder), str(tmp_path / "out.beton")]) == 0
    assert capfd.readouterr().out.splitlines() == [
        f"{folder}: an image folder: 7 images, 2 class(es) cat to dog",
        "ignored: 1 .avif, 1 .txt, 1 @eaDir folders",
        "7 images, 2 class(es) cat to dog, 3 to 4 images per class",
        f"{tmp_path}/out.beton: 7 images, 0 left out",
    ]
    assert sidecar_of(tmp_path / "out.beton").encoding["ignored"] == {
        ".avif": 1,
        ".txt": 1,
        "@eaDir folders": 1,
    }


def test_a_long_list_of_damaged_images_is_cut_on_screen_and_whole_in_the_sidecar(
    folder: Path, tmp_path: Path, capfd: Capture
) -> None:
    for i in range(57):
        (folder / "dog" / f"bad {i:02d}.JPEG").write_bytes(b"")
    dst = tmp_path / "out.beton"
    assert main([str(folder), str(dst)]) == 1
    lines = capfd.readouterr().err.splitlines()
    what = "57 image(s) cannot be used: mend or remove them, or use --skip-bad"
    assert lines[0] == f"fap-convert: {what}"
    assert lines[1] == f"  {folder}/dog/bad 00.JPEG: the file is empty"
    assert lines[21:] == ["  and 37 more"]
    assert main([str(folder), str(dst), "--skip-bad"]) == 0
    out = capfd.readouterr().out
    assert out.count("left out: ") == 20
    assert f"and 37 more, all in {dst}.json" in out
    assert sidecar_of(dst).encoding["skipped"] == [f"dog/bad {i:02d}.JPEG" for i in range(57)]


@pytest.mark.parametrize(
    "names", [("train", "val"), ("train",), ("birds",), ("Validation", "train")]
)
def test_what_is_no_folder_of_classes_stops_with_a_hint(
    names: tuple[str, ...], folder: Path, tmp_path: Path, capfd: Capture
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
        convert_images(folder, tmp_path / "out.beton")
    assert {Path(path).stem: why for path, why in caught.value.bad} == {
        "pipe": "is a named pipe, not a file",
        "zero": "is a character device, not a file",
        "gone": "No such file or directory",
    }


def test_no_memory_is_not_the_images_fault(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """Otherwise --skip-bad would leave sound images out."""

    def refuse(*_: object) -> None:
        raise MemoryError

    (folder / "dog" / "4.JPEG").write_bytes(encoded(picture(4), "PNG"))
    monkeypatch.setattr(convert_module, "decode", refuse)
    assert main([str(folder), str(tmp_path / "out.beton"), "--skip-bad"]) == 1
    assert "dog/4.JPEG: not enough memory; fewer --threads" in capfd.readouterr().err
    assert no_trace(tmp_path)


def test_odd_file_and_class_names(folder: Path, tmp_path: Path, capfd: Capture) -> None:
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
    assert out[1] == r"left out: caf\udce9\n/bad\n.JPEG"
    assert r"6 images, 2 class(es) caf\udce9\n to cat, 3 images per class" in out
    store = open_store(dst)
    assert store.classes == (os.fsdecode(b"caf\xe9\n"), "cat")
    assert store.labels.tolist() == [0] * 3 + [1] * 3
    assert check(dst) == []


def test_the_users_home_in_paths(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["~/src", "~/out.beton"]) == 0
    assert main(["--check", "~/out.beton"]) == 0
    assert (tmp_path / "out.beton").exists()


def test_max_side_quality_and_raw(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "big.JPEG").write_bytes(encoded(picture(9, 300, 200), "JPEG", quality=95))
    small_path = tmp_path / "side.beton"
    convert_images(folder, small_path, Encoding(max_side=150))
    small = open_store(small_path)
    assert (small.heights[3], small.widths[3]) == (150, 100)
    assert sidecar_of(small_path).encoding["verbatim"] == 6
    coarse_path = tmp_path / "q.beton"
    convert_images(folder, coarse_path, Encoding(quality=50))
    assert open_store(coarse_path).sizes.sum() < small.sizes.sum()
    raw_path = tmp_path / "raw.beton"
    convert_images(folder, raw_path, Encoding(raw=True))
    raw = open_store(raw_path)
    assert set(raw.modes) == {RAW}
    wanted = np.asarray(Image.open(folder / "cat" / "0.JPEG"))
    np.testing.assert_array_equal(decoded(raw, 0), wanted)


def test_decoded_planes(folder: Path, tmp_path: Path, capfd: Capture) -> None:
    """By the command, of JPEGs, of what else an image file may be, and of raw pixels."""
    (folder / "cat" / "3.JPEG").write_bytes(encoded(picture(7, 31, 47), "PNG"))
    dst = tmp_path / "planes.beton"
    assert main([str(folder), str(dst), "--decoded", "yuv420"]) == 0
    store = open_store(dst)
    assert set(store.modes) == {PLANES}
    assert sidecar_of(dst).encoding["planes"] is True
    assert check(dst) == []
    paths = sorted(folder.glob("cat/*.JPEG")) + sorted(folder.glob("dog/*.JPEG"))
    for i, path in enumerate(paths):
        data, height, width = encode_planes(path.read_bytes())
        assert store.read(i).tobytes() == data
        assert (store.heights[i], store.widths[i]) == (height, width)
    raw = tmp_path / "raw.beton"
    assert main([str(folder), str(raw), "--raw"]) == 0
    assert main([str(raw), str(tmp_path / "again.beton"), "--decoded=yuv420", "--max-side=40"]) == 0
    again = open_store(tmp_path / "again.beton")
    assert max(again.heights.max(), again.widths.max()) == 40
    assert again.classes == store.classes
    assert main([str(dst), str(tmp_path / "x.beton")]) == 1
    assert "holds decoded planes: convert what it was made from" in capfd.readouterr().err
    (folder / "dog" / "1.JPEG").write_bytes(zeroed((folder / "dog" / "1.JPEG").read_bytes()))
    assert main([str(folder), str(tmp_path / "y.beton"), "--decoded", "yuv420"]) == 1
    assert "dog/1.JPEG" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_side": 0}, "max_side = 0"),
        ({"quality": 101}, "quality = 101"),
        ({"quality": 90, "raw": True}, "quality = 90: only JPEGs have one"),
        ({"quality": 90, "planes": True}, "quality = 90: only JPEGs have one"),
        ({"raw": True, "planes": True}, "raw and planes: choose one"),
    ],
)
def test_impossible_encodings(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding(**kwargs)


def test_command_messages_and_exit_codes(folder: Path, tmp_path: Path, capfd: Capture) -> None:
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
    folder: Path, tmp_path: Path, capfd: Capture
) -> None:
    dst = tmp_path / "out.beton"
    convert_images(folder, dst)
    store = BetonStore(dst)
    good = dst.read_bytes()
    at = int(store._ptrs[4] + store.sizes[4] // 2)
    dst.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert main(["--check", str(dst)]) == 1
    assert "sample 4" in capfd.readouterr().out
    dst.write_bytes(good[:-24])
    assert main(["--check", str(dst)]) == 1
    end = int(store._ptrs[4] + store.sizes[4])
    dst.write_bytes(good[:at] + bytes(end - at) + good[end:])
    sidecar_path(dst).unlink()  # then the JPEGs are decoded
    assert len(check(dst)) == 1
