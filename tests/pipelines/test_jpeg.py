"""JPEG headers, against Pillow; big images one at a time."""

from __future__ import annotations

import struct
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import jpeg, open_store
from pipelines.images import decode, plain_jpeg, upright_sides
from pipelines.jpeg import APP1, SCAN, START, jpeg_header, jpeg_segments, jpeg_sides
from pipelines.turbojpeg import check_jpeg
from tests.conftest import as_jpeg
from tests.pipelines import samples
from tests.pipelines.image_files import picture, saved
from tests.pipelines.samples import ORIENTATION, exif_of


def test_jpeg_sides(photos: list[np.ndarray]) -> None:
    data = as_jpeg(photos[0])
    exif = with_segments(data, (APP1, b"abcd"))
    assert jpeg_sides(data) == jpeg_sides(exif) == photos[0].shape[:2]
    for bad in (b"", START, data[1:], data[:100], START + bytes(50)):
        assert jpeg_sides(bad) is None


def test_the_segments_of_a_jpeg_lead_to_its_pixels(photos: list[np.ndarray]) -> None:
    data = with_segments(as_jpeg(photos[0]), (APP1, b"abcd"))
    found = list(jpeg_segments(data))
    first, *_, last = found
    assert first == (APP1, 6, 10)
    assert data[first[1] : first[2]] == b"abcd"
    assert last[0] == SCAN
    # Each begins four bytes behind the end of the one before: marker and length.
    assert [start for _, start, _ in found[1:]] == [end + 4 for _, _, end in found[:-1]]


def with_segments(
    data: bytes, *segments: tuple[int, bytes], after_the_frame: bool = False
) -> bytes:
    """A JPEG with more segments, (marker, content) each, in front of its own."""
    blob = b""
    for marker, content in segments:
        blob += struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    at = len(START)
    if after_the_frame:
        frame = data.index(b"\xff\xc0")
        (length,) = struct.unpack_from(">H", data, frame + 2)
        at = frame + 2 + length
    return data[:at] + blob + data[at:]


def exif_segment(turn: int) -> tuple[int, bytes]:
    return APP1, exif_of(turn)  # begins with Exif\0\0


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
)


def test_the_orientation_is_found_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = picture(np.random.default_rng(0))
    plain = saved(image, "JPEG", quality=95)
    turned = with_segments(plain, exif_segment(6))
    thumbnails = [(0xED, bytes(65000))] * 4
    other_xmp = XMP.replace(b"6", b"3")
    files = {
        "behind 260 KB": with_segments(plain, *thumbnails, exif_segment(6)),
        "behind the frame header": with_segments(plain, exif_segment(6), after_the_frame=True),
        "behind fill bytes": turned.replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1),
        "in XMP": with_segments(plain, (APP1, XMP)),
        "Exif before XMP": with_segments(plain, exif_segment(6), (APP1, other_xmp)),
    }
    wanted = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    (tmp_path / "a").mkdir()
    for name, data in files.items():
        header = jpeg_header(data)
        assert header is not None, name
        assert header.may_be_turned, name
        assert plain_jpeg(data) is None, name
        assert upright_sides(data) == wanted.shape[:2], name
        assert np.abs(np.asarray(decode(data)) - wanted).mean() < 4, name
        (tmp_path / "a" / f"{name}.JPEG").write_bytes(data)
    store = open_store(tmp_path)  # which reads headers of 64 KB first
    assert (store.heights == wanted.shape[0]).all()
    assert (store.widths == wanted.shape[1]).all()
    elsewhere = with_segments(plain, (APP1, b"Exif\0\0garbage"), (0xEC, exif_of(6)))
    assert plain_jpeg(elsewhere) == (image.height, image.width)


def test_exif_blocks_read_without_pillow_say_what_pillow_says() -> None:
    """Random ones, most of them damaged."""
    rng = np.random.default_rng()
    plain = saved(picture(rng), "JPEG")
    verdicts = set()
    for _ in range(400):
        data = with_segments(plain, (APP1, random_exif(rng)))
        is_turned = twin_turn(data) in range(2, 9)
        assert (plain_jpeg(data) is None) == is_turned, data
        header = jpeg_header(data)
        assert header is not None
        verdicts.add((header.may_be_turned, is_turned))
    assert verdicts == {(False, False), (True, False), (True, True)}


MAKER = 0x010F
EXIF_DIRECTORY = 0x8769
DATE = 0x9003


def random_exif(rng: np.random.Generator) -> bytes:
    exif = Image.Exif()
    exif[MAKER] = "maker"
    exif[EXIF_DIRECTORY] = {DATE: "2020:01:01 00:00:00"}
    if rng.integers(3):
        exif[ORIENTATION] = int(rng.choice([0, 1, 1, 1, 3, 6, 9]))
    exif.endian = str(rng.choice(["<", ">"]))
    block = bytearray(exif.tobytes())
    for _ in range(int(rng.integers(3))):
        block[rng.integers(6, len(block))] = rng.choice([0, 1, 6, 18, rng.integers(256)])
    return bytes(block[: rng.integers(8, 2 * len(block))])


def twin_turn(data: bytes) -> object:
    try:
        return Image.open(BytesIO(data)).getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def test_of_big_images_one_at_a_time_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(np.random.default_rng(0))
    monkeypatch.setattr(jpeg, "BIG_PIXELS", 100)
    for work, data in ((decode, saved(image, "PNG")), (check_jpeg, saved(image, "JPEG"))):
        with jpeg._one_big_image:
            thread = threading.Thread(target=work, args=[data])
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        thread.join(10)
        assert not thread.is_alive()


def test_other_images_do_not_wait_for_a_big_one() -> None:
    with jpeg._one_big_image:
        thread = threading.Thread(target=decode, args=[samples.jpeg(0)])
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
