"""One image file's bytes -> an upright RGB picture.

Pillow's `exif_transpose` and `convert("RGB")` are the twin.
"""

from __future__ import annotations

import re
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

from pipelines import images, jpeg, open_loader, open_store
from pipelines.convert import Encoding, encode
from pipelines.convert_images import convert_images
from pipelines.images import (
    decode,
    open_image,
    plain_jpeg,
    reason,
    unturned_sides,
    upright_jpeg,
    upright_sides,
)
from pipelines.store import MAX_SIDE
from pipelines.turbojpeg import check_jpeg
from tests.pipelines.image_files import LOSSLESS, picture, random_file, saved
from tests.pipelines.samples import ORIENTATION


def twin(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"))


def test_every_format_mode_and_orientation_is_what_pillow_shows_upright() -> None:
    rng = np.random.default_rng()
    for _ in range(120):
        what, data = random_file(rng)
        wanted = twin(data)
        assert_array_equal(np.asarray(decode(data)), wanted, what)
        assert upright_sides(data) == wanted.shape[:2], what
        out, sides = upright_jpeg(data)
        assert sides == wanted.shape[:2], what
        shown = Image.open(BytesIO(out))
        assert (shown.format, shown.mode, shown.size) == ("JPEG", "RGB", sides[::-1]), what
        assert shown.getexif().get(ORIENTATION, 1) in (0, 1, 9), what
        # Palettes are noise to a JPEG.
        assert np.abs(np.asarray(shown).astype(int) - wanted).mean() < 25, what
        assert (out == data) == (plain_jpeg(data) is not None), what
        as_stored = encode(data, Encoding())
        assert (as_stored.data, as_stored.height, as_stored.width) == (out, *sides), what


def test_pictures_that_an_orientation_turns_are_told_from_others() -> None:
    """Boxes were drawn on one of the two pictures, and nobody knows on which."""
    rng = np.random.default_rng()
    n_turned = 0
    for _ in range(120):
        what, data = random_file(rng)
        turn = int(what.split()[-1])
        if 2 <= turn <= 8:
            n_turned += 1
            with pytest.raises(ValueError, match=rf"orientation \({turn}\) turns or mirrors it"):
                unturned_sides(data)
        else:
            assert unturned_sides(data) == upright_sides(data) == twin(data).shape[:2], what
    assert 0 < n_turned < 120


def test_a_folder_and_its_beton_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the files hold, and so in every back end: the same pixels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng()
    for i in range(40):
        suffix = rng.choice([".JPEG", ".png", ".Tif"])
        file = tmp_path / "src" / f"c{i % 3}" / f"{i}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random_file(rng)[1])
    convert_images(tmp_path / "src", tmp_path / "out.beton")
    folder = open_store(tmp_path / "src")
    beton = open_store(tmp_path / "out.beton")
    assert_array_equal(folder.labels, beton.labels)
    assert_array_equal(folder.heights, beton.heights)
    assert_array_equal(folder.widths, beton.widths)
    for i in range(40):
        assert folder.read(i).tobytes() == beton.read(i).tobytes(), folder.file(i)


UNSIGNED, SIGNED = 1, 2  # TIFF's SampleFormat


def tiff(
    image: np.ndarray, bits: int, white_is_zero: bool = False, sample_format: int = UNSIGNED
) -> bytes:
    """A little-endian TIFF of one strip; 12 bits are packed."""
    height, width = image.shape[:2]
    strip = image.tobytes()
    if bits == 12:
        first, second = image.reshape(-1, 2).astype(np.uint32).T
        three_bytes = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
        strip = np.stack(three_bytes, 1).astype(np.uint8).tobytes()
    strip_offset = 8  # behind the header
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,  # not compressed
        262: int(not white_is_zero),
        273: strip_offset,
        277: 1,  # sample per pixel
        278: height,  # rows of the strip
        279: len(strip),
        339: sample_format,
    }
    long = 4  # TIFF's type
    entries = b"".join(struct.pack("<HHII", tag, long, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", strip_offset + len(strip)) + strip + directory


RAMP = np.linspace(0, 65535, 120 * 160).round().astype(np.uint16).reshape(120, 160)
DEEP = {
    "PNG": saved(Image.fromarray(RAMP), "PNG"),
    "TIFF": saved(Image.fromarray(RAMP), "TIFF"),
    "TIFF, big-endian": saved(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
    "TIFF, compressed": saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "TIFF, by hand": tiff(RAMP, 16),
    "TIFF, 0 is white": tiff(65535 - RAMP, 16, white_is_zero=True),
    "PGM": b"P5\n160 120\n65535\n" + RAMP.astype(">u2").tobytes(),
    "PGM in text": b"P2\n160 120\n65535\n" + " ".join(str(n) for n in RAMP.ravel()).encode(),
}


@pytest.mark.parametrize("what", DEEP)
def test_grey_of_16_bits_is_scaled_to_nearest(what: str) -> None:
    wanted = np.floor(RAMP / 65535 * 255 + 0.5)
    for channel in np.moveaxis(np.asarray(decode(DEEP[what])), -1, 0):
        assert_array_equal(channel, wanted)
    assert upright_sides(DEEP[what]) == RAMP.shape


def test_grey_of_12_bits_and_deep_colours_are_scaled() -> None:
    twelve = RAMP >> 4
    wanted = np.floor(twelve / 4095 * 255 + 0.5)
    pgm = b"P5\n160 120\n4095\n" + twelve.astype(">u2").tobytes()
    assert_array_equal(np.asarray(decode(tiff(twelve, 12)))[..., 0], wanted)
    # Pillow scales PGM by way of 16 bits.
    assert np.abs(np.asarray(decode(pgm))[..., 0] - wanted).max() <= 1
    colours = np.repeat(RAMP[..., None], 3, 2)
    ppm = b"P6\n160 120\n65535\n" + colours.astype(">u2").tobytes()
    assert np.abs(np.asarray(decode(ppm)).astype(int) - (colours >> 8)).max() <= 1


def twelve_bit_jpeg() -> bytes:
    data = bytearray(saved(picture(np.random.default_rng(0)), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


LONG = Image.fromarray(RAMP.astype(np.int32))
FLOATING = Image.fromarray((RAMP / 65535).astype(np.float32))
OF_32_BITS = "32 bits, signed or floating"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
GIF = saved(picture(np.random.default_rng(0), "P"), "GIF")
PNG = saved(picture(np.random.default_rng(0)), "PNG")
REFUSED = {
    "32-bit TIFF": (saved(LONG, "TIFF"), OF_32_BITS),
    "signed 16-bit TIFF": (tiff(RAMP, 16, sample_format=SIGNED), OF_32_BITS),
    "float TIFF": (saved(FLOATING, "TIFF"), OF_32_BITS),
    "LAB TIFF": (saved(Image.new("LAB", (40, 30)), "TIFF"), "LAB"),
    "JPEG of 12 bits": (twelve_bit_jpeg(), "12"),
    "EPS": (EPS, "not an image: its content is none of JPEG, PNG"),
    "text": (b"<html>404</html>", "not an image"),
    "empty": (b"", "the file is empty"),
    "GIF's head": (GIF[:9], "damaged or unusual GIF"),
    "PNG's head": (PNG[:20], "Truncated"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_defined_pixels_is_refused_with_the_reason(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, why = REFUSED[what]
    for read in (decode, upright_jpeg, lambda data: encode(data, Encoding())):
        with pytest.raises(images.UNREADABLE) as caught:
            read(data)
        assert why in reason(caught.value)
        assert "BytesIO" not in reason(caught.value)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.JPEG").write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"1 files cannot be used: (.|\n)*a/x\.JPEG: .*{re.escape(why)}"
    ):
        open_store(tmp_path)


def test_the_first_of_several_frames() -> None:
    rng = np.random.default_rng(0)
    frames = [picture(rng, "P").resize((40, 30)) for _ in range(3)]
    wanted = np.asarray(frames[0].convert("RGB"))
    for name in ("GIF", "TIFF", "WEBP", "PNG"):
        data = saved(frames[0], name, save_all=True, append_images=frames[1:], **LOSSLESS[name])
        assert_array_equal(np.asarray(decode(data)), wanted, name)


def test_what_is_encoded_again_carries_nothing_along() -> None:
    grey = picture(np.random.default_rng(0), "L")
    for data in (
        saved(grey, "GIF", comment=b"remark " * 20_000),
        saved(grey, "JPEG", 6, comment=b"remark", dpi=(300, 300)),
    ):
        out, _ = upright_jpeg(data)
        assert not any(word in out for word in (b"remark", b"Exif"))
        assert np.asarray(Image.open(BytesIO(out))).shape == np.asarray(decode(data)).shape


def test_no_limit_of_pillows_but_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its limit lowered instead of an image of 189 megapixels; that one is in a slow test."""
    image = picture(np.random.default_rng(0)).resize((800, 400))
    of_jpeg = saved(image, "JPEG", quality=95)
    of_png = saved(image, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for data in (of_jpeg, of_png):
        assert decode(data, max_side=100).size == (100, 50)
        assert decode(data).size == (800, 400)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.JPEG").write_bytes(of_jpeg)
    convert_images(tmp_path, tmp_path / "out.beton", allow_odd_classes=True)
    store = open_store(tmp_path / "out.beton")
    assert open_loader("reference", store, size=64)._decode(0, store.read(0)).shape == (400, 800, 3)

    monkeypatch.setattr(jpeg, "BIG_PIXELS", 50_000)
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    assert decode(of_jpeg, max_side=100).size == (100, 50)  # decoded at a quarter
    for data, limit in ((of_png, 100), (of_png, None), (of_jpeg, None), (of_jpeg, 700)):
        with pytest.raises(ValueError, match="800 x 400 pixels: more than 100,000"):
            decode(data, limit)
    with pytest.raises(ValueError, match=f"40000 x 20 pixels: sides above {MAX_SIDE} need"):
        decode(saved(Image.new("L", (40000, 20)), "PNG"))
    assert decode(saved(Image.new("L", (40000, 2)), "JPEG"), 2000).size == (2000, 1)


def test_a_big_jpeg_is_shrunk_while_it_is_decoded_and_hardly_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    image = picture(rng).resize((1000, 640), Image.Resampling.BICUBIC)
    for turn in (1, 6):
        data = saved(image, "JPEG", turn, quality=95)
        for side in (50, 100, 333, 999):
            whole = Image.fromarray(twin(data))
            wanted = area_average(whole, side)
            monkeypatch.setattr(jpeg, "BIG_PIXELS", 1 << 26)
            assert np.abs(np.asarray(decode(data, side)) - wanted).max() <= 1
            monkeypatch.setattr(jpeg, "BIG_PIXELS", 1000)
            ours = np.asarray(decode(data, side))
            assert ours.shape == wanted.shape
            assert np.abs(ours - wanted).mean() < 2


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_shrinking_is_the_area_average(image_format: str) -> None:
    rng = np.random.default_rng()
    for _ in range(20):
        data = saved(picture(rng), image_format)
        for side in (1, 7, 20, 39):
            ours = np.asarray(decode(data, side)).astype(int)
            wanted = area_average(Image.fromarray(twin(data)), side)
            assert np.abs(ours - wanted).max() <= 1


def area_average(image: Image.Image, max_side: int) -> np.ndarray:
    """The twin: shares of rows and columns as matrices, in float64."""
    factor = max_side / max(image.size)
    rows = shares(image.height, max(1, round(image.height * factor)))
    columns = shares(image.width, max(1, round(image.width * factor)))
    mean = np.einsum("yh,xw,hwc->yxc", rows, columns, np.asarray(image), optimize=True)
    return np.floor(mean + 0.5).astype(int)


def shares(n: int, n_out: int) -> np.ndarray:
    """(n_out, n): how much of each place each of n_out equal parts of a line of n covers."""
    edges = np.arange(n_out + 1).reshape(-1, 1) * n / n_out
    places = np.arange(n)
    covered = np.minimum(edges[1:], places + 1) - np.maximum(edges[:-1], places)
    return np.maximum(covered, 0) * n_out / n


@pytest.mark.parametrize("quality", [10, 90, 95, 100])
def test_encoding_again_is_what_pillow_makes_of_what_it_decodes(quality: int) -> None:
    rng = np.random.default_rng()
    for subsampling in (0, 1, 2):
        data = saved(picture(rng), "JPEG", quality=92, subsampling=subsampling)
        out = BytesIO()
        Image.open(BytesIO(data)).save(out, "JPEG", quality=quality)
        assert encode(data, Encoding(quality=quality)).data == out.getvalue()


def test_a_damaged_jpeg_that_must_be_encoded_again_is_noticed_in_a_folder_too() -> None:
    """Pillow passes over libjpeg's warnings: its grey bars would become a sound JPEG."""
    found = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        data = bytearray(saved(picture(rng).resize((200, 150)), "JPEG", 6))
        at = int(rng.integers(len(data) // 2, len(data) - 20))
        data[at : at + 8] = bytes(8)
        try:
            check_jpeg(bytes(data))
        except ValueError:
            found += 1
            with pytest.raises(images.UNREADABLE):
                upright_jpeg(bytes(data))
    assert found > 5


def test_open_image_reads_what_pillow_reads() -> None:
    rng = np.random.default_rng()
    for _ in range(20):
        what, data = random_file(rng)
        ours = open_image(data)
        theirs = Image.open(BytesIO(data))
        assert (ours.size, ours.mode) == (theirs.size, theirs.mode), what


@pytest.mark.slow
def test_189_megapixels() -> None:
    image = Image.effect_noise((1400, 1400), 60).convert("RGB").resize((14000, 13500))
    data = saved(image, "JPEG", quality=60)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(BytesIO(data))
    small = encode(data, Encoding(max_side=512))
    assert (small.height, small.width) == (494, 512)
    assert encode(data, Encoding()).verbatim
