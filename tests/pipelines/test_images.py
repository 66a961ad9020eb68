"""One image file's bytes -> an upright RGB picture: Pillow's `exif_transpose` and `convert("RGB")`
are the twin.
"""

from __future__ import annotations

import re
import struct
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

from pipelines import images, jpeg, open_loader, open_store
from pipelines.convert import Encoding, convert_folder, encode
from pipelines.images import decode, open_image, plain_jpeg, reason, upright_jpeg, upright_sides
from pipelines.jpeg import jpeg_header

LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "BMP": {}, "PPM": {}, "GIF": {}}
MODES = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["RGB", "L", "1", "P", "LA", "RGBA"],
    "TIFF": ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"],
    "WEBP": ["RGB", "RGBA"],
    "BMP": ["RGB", "L", "1", "P", "RGBA"],
    "PPM": ["RGB", "L", "1"],
    "GIF": ["P", "L", "1"],
    "AVIF": ["RGB", "RGBA"],
}


def picture(rng: np.random.Generator, mode: str = "RGB") -> Image.Image:
    """Smooth colours, and a ramp of transparency where the mode has one; the sides differ."""
    width, height = (int(n) for n in rng.choice(np.arange(40, 90), 2, replace=False))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode[:-1])
        ramp = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
        image.putalpha(Image.fromarray(ramp))
        return image
    return image.quantize(32) if mode == "P" else image.convert(mode)


def saved(image: Image.Image, kind: str, turn: int = 1, **save: object) -> bytes:
    if turn != 1:
        exif = Image.Exif()
        exif[0x0112] = turn
        save["exif"] = exif.tobytes()
    image.save(out := BytesIO(), kind, **save)
    return out.getvalue()


def twin(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"))


def random_file(rng: np.random.Generator) -> tuple[str, bytes]:
    kind = str(rng.choice(list(MODES)))
    mode = str(rng.choice(MODES[kind]))
    turn = int(rng.integers(0, 10))  # 0 and 9 are none
    turns = turn if kind in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF") else 1
    save: dict = {"JPEG": {"quality": 92, "progressive": bool(rng.integers(2))}}.get(
        kind, LOSSLESS.get(kind, {})
    )
    if mode == "P" and rng.integers(2) and kind == "PNG":
        save = {"transparency": int(rng.integers(32))}
    return f"{kind} {mode} {turns}", saved(picture(rng, mode), kind, turns, **save)


def test_every_kind_mode_and_orientation_is_what_pillow_shows_upright() -> None:
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
        assert shown.getexif().get(0x0112, 1) in (0, 1, 9), what
        assert np.abs(np.asarray(shown).astype(int) - wanted).mean() < 25, (
            what
        )  # palettes are noise to a JPEG
        assert (out == data) == (plain_jpeg(data) is not None), what
        as_stored = encode(data, Encoding())
        assert (as_stored.data, as_stored.height, as_stored.width) == (out, *sides), what


def test_a_folder_and_its_beton_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the files hold, and so in every back end: the same pixels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng()
    for i in range(40):
        file = tmp_path / "src" / f"c{i % 3}" / f"{i}{rng.choice(['.JPEG', '.png', '.Tif'])}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random_file(rng)[1])
    convert_folder(tmp_path / "src", tmp_path / "out.beton")
    folder, beton = open_store(tmp_path / "src"), open_store(tmp_path / "out.beton")
    assert_array_equal(folder.labels, beton.labels)
    assert_array_equal(folder.heights, beton.heights)
    assert_array_equal(folder.widths, beton.widths)
    for i in range(40):
        assert folder.read(i).tobytes() == beton.read(i).tobytes(), folder.file(i)


def with_segments(
    jpeg: bytes, *segments: tuple[int, bytes], after_the_frame: bool = False
) -> bytes:
    blob = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
        for marker, content in segments
    )
    at = 2
    if after_the_frame:
        at = jpeg.index(b"\xff\xc0")
        at += 2 + struct.unpack_from(">H", jpeg, at + 2)[0]
    return jpeg[:at] + blob + jpeg[at:]


def exif_segment(turn: int) -> tuple[int, bytes]:
    exif = Image.Exif()
    exif[0x0112] = turn
    return 0xE1, exif.tobytes()  # begins with Exif\0\0


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
)


def test_the_orientation_is_found_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = picture(np.random.default_rng(0))
    jpeg = saved(image, "JPEG", quality=95)
    thumbnails = [(0xED, bytes(65000))] * 4
    files = {
        "behind 260 KB": with_segments(jpeg, *thumbnails, exif_segment(6)),
        "behind the frame header": with_segments(jpeg, exif_segment(6), after_the_frame=True),
        "behind fill bytes": with_segments(jpeg, exif_segment(6)).replace(
            b"\xff\xe1", b"\xff\xff\xff\xe1", 1
        ),
        "in XMP": with_segments(jpeg, (0xE1, XMP)),
        "Exif before XMP": with_segments(jpeg, exif_segment(6), (0xE1, XMP.replace(b"6", b"3"))),
    }
    wanted = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    (tmp_path / "a").mkdir()
    for name, data in files.items():
        assert jpeg_header(data).may_be_turned, name
        assert plain_jpeg(data) is None, name
        assert upright_sides(data) == wanted.shape[:2], name
        assert np.abs(np.asarray(decode(data)) - wanted).mean() < 4, name
        (tmp_path / "a" / f"{name}.JPEG").write_bytes(data)
    store = open_store(tmp_path)  # which reads headers of 64 KB first
    assert (store.heights == wanted.shape[0]).all()
    assert (store.widths == wanted.shape[1]).all()
    elsewhere = with_segments(jpeg, (0xE1, b"Exif\0\0garbage"), (0xEC, exif_segment(6)[1]))
    assert plain_jpeg(elsewhere) == (image.height, image.width)


def test_exif_blocks_read_without_pillow_say_what_pillow_says() -> None:
    """Random ones, most of them damaged."""
    rng = np.random.default_rng()
    jpeg = saved(picture(rng), "JPEG")
    verdicts = []
    for _ in range(400):
        exif = Image.Exif()
        exif[0x010F] = "maker"
        exif[0x8769] = {0x9003: "2020:01:01 00:00:00"}
        if rng.integers(3):
            exif[0x0112] = int(rng.choice([0, 1, 1, 1, 3, 6, 9]))
        exif.endian = str(rng.choice(["<", ">"]))
        block = bytearray(exif.tobytes())
        for _ in range(int(rng.integers(3))):
            block[rng.integers(6, len(block))] = rng.choice([0, 1, 6, 18, rng.integers(256)])
        data = with_segments(jpeg, (0xE1, bytes(block[: rng.integers(8, 2 * len(block))])))
        theirs = twin_turn(data)
        assert (plain_jpeg(data) is None) == (theirs in range(2, 9)), bytes(block)
        verdicts.append((jpeg_header(data).may_be_turned, theirs in range(2, 9)))
    assert {(False, False), (True, False), (True, True)} == set(verdicts)


def twin_turn(data: bytes) -> object:
    try:
        return Image.open(BytesIO(data)).getexif().get(0x0112, 1)
    except Exception:
        return 1


def tiff(
    image: np.ndarray,
    bits: int,
    white_is_zero: bool = False,
    sample_format: int = 1,
    photometric: int | None = None,
) -> bytes:
    """A little-endian TIFF of one strip; 12 bits are packed."""
    height, width = image.shape[:2]
    if bits == 12:
        pairs = image.reshape(-1, 2).astype(np.uint32)
        packed = np.stack(
            [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1
        )
        strip = packed.astype(np.uint8).tobytes()
    else:
        strip = image.tobytes()
    photometric = int(not white_is_zero) if photometric is None else photometric
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(strip),
        339: sample_format,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


RAMP = np.linspace(0, 65535, 120 * 160).round().astype(np.uint16).reshape(120, 160)
DEEP = {
    "PNG": saved(Image.fromarray(RAMP), "PNG"),
    "TIFF": saved(Image.fromarray(RAMP), "TIFF"),
    "TIFF, big-endian": saved(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
    "TIFF, compressed": saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "TIFF, by hand": tiff(RAMP, 16),
    "TIFF, 0 is white": tiff(65535 - RAMP, 16, white_is_zero=True),
    "PGM": b"P5\n160 120\n65535\n" + RAMP.astype(">u2").tobytes(),
    "PGM in text": b"P2\n160 120\n65535\n" + " ".join(map(str, RAMP.ravel())).encode(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_of_16_bits_is_scaled_to_nearest(kind: str) -> None:
    wanted = np.floor(RAMP / 65535 * 255 + 0.5)
    for channel in np.moveaxis(np.asarray(decode(DEEP[kind])), -1, 0):
        assert_array_equal(channel, wanted)
    assert upright_sides(DEEP[kind]) == RAMP.shape


def test_grey_of_12_bits_and_deep_colours_are_scaled() -> None:
    twelve = RAMP >> 4
    wanted = np.floor(twelve / 4095 * 255 + 0.5)
    pgm = b"P5\n160 120\n4095\n" + twelve.astype(">u2").tobytes()
    for data in (tiff(twelve, 12), pgm):
        assert (
            np.abs(np.asarray(decode(data))[..., 0] - wanted).max() <= 1
        )  # Pillow scales PGM by way of 16 bits
    assert_array_equal(np.asarray(decode(tiff(twelve, 12)))[..., 0], wanted)
    colours = np.repeat(RAMP[..., None], 3, 2)
    ppm = b"P6\n160 120\n65535\n" + colours.astype(">u2").tobytes()
    assert np.abs(np.asarray(decode(ppm)).astype(int) - (colours >> 8)).max() <= 1


def twelve_bit_jpeg() -> bytes:
    data = bytearray(saved(picture(np.random.default_rng(0)), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
REFUSED = {
    "32-bit TIFF": (
        saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        "32 bits, signed or floating",
    ),
    "signed 16-bit TIFF": (tiff(RAMP, 16, sample_format=2), "32 bits, signed or floating"),
    "float TIFF": (
        saved(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
        "32 bits, signed or floating",
    ),
    "LAB TIFF": (saved(Image.new("LAB", (40, 30)), "TIFF"), "LAB"),
    "JPEG of 12 bits": (twelve_bit_jpeg(), "12"),
    "EPS": (EPS, "not an image: its content is none of JPEG, PNG"),
    "text": (b"<html>404</html>", "not an image"),
    "empty": (b"", "the file is empty"),
    "GIF's head": (
        saved(picture(np.random.default_rng(0), "P"), "GIF")[:9],
        "damaged or unusual GIF",
    ),
    "PNG's head": (saved(picture(np.random.default_rng(0)), "PNG")[:20], "Truncated"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_defined_pixels_is_refused_with_the_reason(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, why = REFUSED[kind]
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


def test_the_first_of_several_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [picture(rng, "P").resize((40, 30)) for _ in range(3)]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **LOSSLESS[kind])
        assert_array_equal(np.asarray(decode(data)), np.asarray(frames[0].convert("RGB")), kind)


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
    jpeg, png = saved(image, "JPEG", quality=95), saved(image, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for data in (jpeg, png):
        assert decode(data, max_side=100).size == (100, 50)
        assert decode(data).size == (800, 400)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.JPEG").write_bytes(jpeg)
    convert_folder(tmp_path, tmp_path / "out.beton", allow_odd_classes=True)
    store = open_store(tmp_path / "out.beton")
    assert open_loader("reference", store, size=64)._decode(0).shape == (400, 800, 3)

    monkeypatch.setattr(images, "BIG_PIXELS", 50_000)
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    assert decode(jpeg, max_side=100).size == (100, 50)  # decoded at a quarter
    for data, limit in ((png, 100), (png, None), (jpeg, None), (jpeg, 700)):
        with pytest.raises(ValueError, match="800 x 400 pixels: more than 100,000"):
            decode(data, limit)
    with pytest.raises(ValueError, match="40000 x 20 pixels: sides above 32767 need --max-side"):
        decode(saved(Image.new("L", (40000, 20)), "PNG"))
    assert decode(saved(Image.new("L", (40000, 2)), "JPEG"), 2000).size == (2000, 1)


def test_a_big_jpeg_is_shrunk_while_it_is_decoded_and_hardly_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    image = picture(rng).resize((1000, 640), Image.Resampling.BICUBIC)
    for turn in (1, 6):
        jpeg = saved(image, "JPEG", turn, quality=95)
        for side in (50, 100, 333, 999):
            whole = Image.fromarray(twin(jpeg))
            whole.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
            monkeypatch.setattr(images, "BIG_PIXELS", 1 << 26)
            assert np.abs(np.asarray(decode(jpeg, side)).astype(int) - np.asarray(whole)).max() <= 1
            monkeypatch.setattr(images, "BIG_PIXELS", 1000)
            ours = decode(jpeg, side)
            assert ours.size == whole.size
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(whole)).mean() < 2


def test_of_big_images_one_at_a_time_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(picture(np.random.default_rng(0)), "PNG")
    monkeypatch.setattr(images, "BIG_PIXELS", 100)
    with jpeg._one_big_image:
        thread = threading.Thread(target=decode, args=[data])
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()


def test_a_damaged_jpeg_that_must_be_encoded_again_is_noticed_in_a_folder_too() -> None:
    """Pillow passes over libjpeg's warnings: its grey bars would become a sound JPEG."""
    found = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        data = bytearray(saved(picture(rng).resize((200, 150)), "JPEG", 6))
        at = int(rng.integers(len(data) // 2, len(data) - 20))
        data[at : at + 8] = bytes(8)
        try:
            images.check_jpeg(bytes(data))
        except ValueError:
            found += 1
            with pytest.raises(images.UNREADABLE):
                upright_jpeg(bytes(data))
    assert found > 5


def test_open_image_reads_what_pillow_reads() -> None:
    rng = np.random.default_rng()
    for _ in range(20):
        what, data = random_file(rng)
        ours, theirs = open_image(data), Image.open(BytesIO(data))
        assert (ours.size, ours.mode) == (theirs.size, theirs.mode), what


@pytest.mark.slow
def test_189_megapixels(tmp_path: Path) -> None:
    image = Image.effect_noise((1400, 1400), 60).convert("RGB").resize((14000, 13500))
    data = saved(image, "JPEG", quality=60)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(BytesIO(data))
    small = encode(data, Encoding(max_side=512))
    assert (small.height, small.width) == (494, 512)
    assert encode(data, Encoding()).verbatim
