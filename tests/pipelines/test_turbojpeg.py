"""libjpeg-turbo through its wheel: the same pixels as Pillow's, and nothing written elsewhere."""

from __future__ import annotations

import random
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipelines.images import as_jpeg
from pipelines.turbojpeg import CONTEXT_ROWS, check_jpeg, decode, decode_top, read_header
from tests.pipelines import samples
from tests.pipelines.image_files import saved

CHROMA = ("444", "422", "420")  # in the order of Pillow's numbers for them
GUARD = 64  # bytes before and behind an image, which must stay as they are
UNTOUCHED = 77


def random_jpeg(rng: np.random.Generator, mode: str = "RGB", **save: object) -> bytes:
    """Of any sides from 1 to 99 pixels."""
    height, width = (int(side) for side in rng.integers(1, 100, 2))
    image = samples.picture(int(rng.integers(1 << 30)), height, width).convert(mode)
    return saved(image, "JPEG", **{"quality": int(rng.integers(30, 101)), **save})


def decoded(data: bytes, divisor: int = 1, **how: bool) -> np.ndarray:
    """By `decode`, into a buffer with a guard on either side."""
    header = read_header(data)
    height = -(-header.height // divisor)
    width = -(-header.width // divisor)
    n_bytes = height * width * 3
    memory = np.full(GUARD + n_bytes + GUARD, UNTOUCHED, np.uint8)
    image = memory[GUARD : GUARD + n_bytes].reshape(height, width, 3)
    try:
        decode(data, image, divisor, **how)
    finally:
        assert (memory[:GUARD] == UNTOUCHED).all()
        assert (memory[-GUARD:] == UNTOUCHED).all()
    return image


def twin(data: bytes, divisor: int = 1) -> np.ndarray:
    """By Pillow."""
    image = Image.open(BytesIO(data))
    # Of the sizes 1/1, 1/2, 1/4 and 1/8 Pillow takes the smallest that is at least the given one.
    image.draft(None, (image.width // divisor, image.height // divisor))
    return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------ decoding


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_pillow(mode: str) -> None:
    rng = np.random.default_rng()
    for k in range(60):
        how = {"subsampling": k % 3} if mode == "RGB" else {}
        data = random_jpeg(rng, mode, progressive=k % 4 == 0, **how)
        assert (decoded(data) == twin(data)).all()


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_shrunk_pixels_are_those_of_pillow(divisor: int) -> None:
    """Odd sides too. libjpeg-turbo chooses the scale by the sides: it must be the one meant."""
    rng = np.random.default_rng()
    compared = 0
    while compared < 60:
        data = random_jpeg(rng, subsampling=compared % 3)
        height, width, *_ = read_header(data)
        found = decoded(data, divisor)
        wanted = (-(-height // divisor), -(-width // divisor))
        assert found.shape == (*wanted, 3)
        if min(height, width) >= divisor:  # else Pillow decodes no such image
            compared += 1
            if max(height, width) > 6 * divisor:  # other scales give other sides
                assert (found == twin(data, divisor)).all()


def test_sides_of_every_small_image() -> None:
    for height in range(1, 18):
        for width in range(1, 18):
            data = saved(samples.picture(height, height, width), "JPEG")
            for divisor in (1, 2, 4, 8):
                decoded(data, divisor)


def test_fast_ways_show_nearly_the_same() -> None:
    data = samples.encoded(samples.picture(0, 300, 400), "JPEG", quality=90)
    accurate = decoded(data).astype(int)
    for how in ({"fast_dct": True}, {"fast_upsampling": True}):
        difference = np.abs(decoded(data, **how) - accurate)
        assert difference.max() > 0
        assert difference.mean() < 1


def test_arrays_are_read_as_bytes_are() -> None:
    data = samples.jpeg(0)
    encoded = np.frombuffer(data, np.uint8)
    assert not encoded.flags.writeable
    image = np.empty((30, 40, 3), np.uint8)
    decode(encoded, image, divisor=2)
    assert (image == decoded(data, 2)).all()
    assert read_header(encoded) == read_header(data) == (60, 80, "YCbCr", "420")
    assert check_jpeg(encoded) == check_jpeg(data) == (60, 80)


def top_of(data: bytes, rows: int, divisor: int = 1, width: int | None = None) -> np.ndarray:
    """By `decode_top`, into a buffer with a guard on either side: as many rows."""
    width = width or -(-read_header(data).width // divisor)
    n_bytes = rows * width * 3
    memory = np.full(GUARD + n_bytes + GUARD, UNTOUCHED, np.uint8)
    image = memory[GUARD : GUARD + n_bytes].reshape(rows, width, 3)
    try:
        decode_top(data, image, divisor, fast_dct=True)
    finally:
        assert (memory[:GUARD] == UNTOUCHED).all()
        assert (memory[-GUARD:] == UNTOUCHED).all()
    return image


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_the_top_is_that_of_the_whole(divisor: int) -> None:
    """But for the rows whose colours depend on what is not decoded; at half size there are none."""
    rng = np.random.default_rng()
    for case in range(120):
        how: dict[str, object] = {"subsampling": int(rng.integers(3))}
        how["progressive"] = bool(rng.integers(2))
        how["restart_marker_blocks"] = int(rng.choice([0, 1, 5]))
        data = random_jpeg(rng, "RGB" if case % 4 else "L", **how)
        if read_header(data).width <= 8:  # there two divisors may give the same sides
            continue
        whole = decoded(data, divisor, fast_dct=True)
        for rows in rng.integers(1, len(whole) + 1, 3).tolist():
            top = top_of(data, rows, divisor)
            same = rows
            if rows < len(whole):
                same = max(0, rows - CONTEXT_ROWS // divisor)
            np.testing.assert_array_equal(top[:same], whole[:same], f"{how} {rows} {whole.shape}")


def test_the_top_of_what_is_no_sound_rgb_jpeg() -> None:
    rng = np.random.default_rng()
    good = saved(samples.picture(1, 64, 80), "JPEG")
    for width in (79, 81, 200):
        with pytest.raises(ValueError, match="80 pixels wide"):
            top_of(good, 24, width=width)
    with pytest.raises(ValueError, match="not made of DCT coefficients"):
        top_of(lossless(64, 80), 24)
    with pytest.raises(ValueError, match="CMYK colours"):
        top_of(saved(samples.picture(1, 64, 80).convert("CMYK"), "JPEG"), 24)
    for data in (b"", b"\xff\xd8", good[:100]):
        with pytest.raises(ValueError):
            top_of(data, 24, width=80)
    # Damage is an error or not, but never more than the image is written, nor a crash.
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        with suppress(ValueError):
            top_of(bytes(bad[: rng.integers(len(bad)) + 1]), 24, width=80)


@pytest.mark.parametrize("shape", [(60, 80, 3), (30, 41, 3), (29, 40, 3), (40, 30, 3)])
def test_other_sides_than_announced_are_refused(shape: tuple[int, int, int]) -> None:
    image = np.full(shape, UNTOUCHED, np.uint8)
    with pytest.raises(ValueError, match="60 x 80 pixels"):
        decode(samples.jpeg(0), image, divisor=2)
    assert (image == UNTOUCHED).all()


def test_four_components_are_checked_and_not_shown() -> None:
    data = saved(samples.picture(0).convert("CMYK"), "JPEG")
    assert read_header(data).colours == "CMYK"
    assert check_jpeg(data) == (60, 80)
    with pytest.raises(ValueError, match="CMYK"):
        decoded(data)


def test_damage_is_an_error_and_stays_inside() -> None:
    """Warnings are errors: bytes in the middle become zeros, or the end is missing."""
    rng = random.Random(0)
    for k in range(100):
        data = bytearray(samples.jpeg(k % 20, progressive=k % 3 == 0))
        at = rng.randrange(600, len(data) - 12)
        del data[at:]
        for divisor in (1, 2):
            with pytest.raises(ValueError):
                decoded(bytes(data), divisor)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", bytes(100)])
def test_no_jpeg(data: bytes) -> None:
    for function in (read_header, check_jpeg):
        with pytest.raises(ValueError):
            function(data)


# ------------------------------------------------------------------ JPEGs that nobody else writes


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def lossless(height: int, width: int, n_bits: int = 8) -> bytes:
    """ITU T.81, process 14: a grey area in three components, every difference 0."""
    components = range(1, 4)
    frame = struct.pack(">BHHB", n_bits, height, width, 3)
    frame += b"".join(bytes([c, 0x11, 0]) for c in components)
    # Its table has codes of one and two bits, for differences of 0 and 1 bit.
    table = bytes([0]) + bytes([1, 1, *[0] * 14]) + bytes([0, 1])
    scan = bytes([3]) + b"".join(bytes([c, 0]) for c in components) + bytes([1, 0, 0])
    pixels = bytes(-(-height * width * 3 // 8))
    parts = (segment(0xC3, frame), segment(0xC4, table), segment(0xDA, scan), pixels)
    return b"\xff\xd8" + b"".join(parts) + b"\xff\xd9"


def test_a_lossless_jpeg_is_never_shrunk() -> None:
    """libjpeg-turbo would write all of it into the buffer of the shrunk one."""
    data = lossless(64, 80)
    assert (decoded(data) == 128).all()
    for divisor in (2, 8):
        with pytest.raises(ValueError, match="process"):
            decoded(data, divisor)
    with pytest.raises(ValueError, match="process"):
        check_jpeg(data)


def test_12_bits_are_refused() -> None:
    data = bytearray(samples.jpeg(0))
    frame = data.index(b"\xff\xc0")
    data[frame + 1] = 0xC1  # extended
    data[frame + 4] = 12
    with pytest.raises(ValueError):
        check_jpeg(bytes(data))


def test_a_subsampling_without_a_name_is_refused() -> None:
    data = bytearray(samples.jpeg(0))
    frame = data.index(b"\xff\xc0")
    data[frame + 11] = 0x31  # luma: three by one
    with pytest.raises(ValueError, match="subsampling"):
        read_header(bytes(data))


def test_sides_that_so_few_bytes_cannot_fill_are_refused() -> None:
    data = bytearray(samples.jpeg(0))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 30000, 30000)
    with pytest.raises(ValueError, match="too few bytes"):
        check_jpeg(bytes(data))


# ------------------------------------------------------------------ the check


def test_decoding_at_one_eighth_finds_what_full_decoding_finds() -> None:
    rng = random.Random(0)
    n_sound = 0
    for k in range(300):
        data = bytearray(samples.jpeg(k % 20, progressive=k % 3 == 0))
        at = rng.randrange(600, len(data))
        if k % 2:
            data[at] ^= 1 << rng.randrange(8)
        else:
            del data[at:]
        sound = decodes(bytes(data), divisor=8)
        assert sound == decodes(bytes(data), divisor=1), k
        n_sound += sound
    assert 30 < n_sound < 270


def decodes(data: bytes, divisor: int) -> bool:
    try:
        check_jpeg(data, divisor)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------ threads


def test_many_threads_at_once() -> None:
    rng = np.random.default_rng(0)
    files = [random_jpeg(rng) for _ in range(40)]
    alone = [decoded(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for image, wanted in zip(pool.map(decoded, files), alone, strict=True):
                assert (image == wanted).all()


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("what", ["decode", "check", "encode"])
def test_other_threads_run_meanwhile(what: str, no_forced_switches: None) -> None:
    """Nothing makes a thread give up the GIL here but the function itself."""
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    image = Image.fromarray(noise)
    data = as_jpeg(image, 90)
    target = np.empty_like(noise)
    work = {
        "decode": lambda: decode(data, target),
        "check": lambda: check_jpeg(data),
        "encode": lambda: as_jpeg(image),
    }
    begun = threading.Event()
    seen_at_work = threading.Event()
    told = []

    def run() -> None:
        begun.set()
        for _ in range(20):  # on a busy machine the other thread may come late
            work[what]()
            told.append(seen_at_work.is_set())

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    seen_at_work.set()
    thread.join()
    assert any(told)
