"""JPEG files: what their headers say, and libjpeg-turbo's verdict on the rest."""

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from struct import error as struct_error
from struct import unpack_from
from typing import NamedTuple

PIXELS_PER_BYTE = (
    512  # a JPEG's block of 64 takes at least a bit: damaged sides must not ask for gigabytes
)

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's markers of frame headers


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the content of a JPEG's segments, the last being the scan's (0xDA).
    ITU T.81, table B.1.

    It ends before a marker that does not belong there: a decoder may go on elsewhere than we would.
    """
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        yield marker, at + 4, end
        if marker == 0xDA:
            return
        at = end


def jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's frame header, as stored; None where there is none."""
    for marker, start, _ in jpeg_segments(data):
        if marker in FRAMES:
            return struct.unpack_from(">HH", data, start + 1) if start + 5 <= len(data) else None
    return None


BIG_PIXELS = 1 << 26  # above, one image at a time is decoded, however many threads there are

APP1, SCAN = 0xE1, 0xDA  # JPEG's markers: Exif and XMP; the pixels begin

PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive: what every decoder knows

ORIENTATION, SHORT = 0x0112, 3  # Exif 2.3, table 4; TIFF's type

_one_big_image = threading.Lock()


class JpegHeader(NamedTuple):
    """What a JPEG's segments before its pixels say."""

    height: int  # pixels, as stored
    width: int
    frame: int  # the marker of the frame header: the kind of compression
    precision: int  # bits per sample
    components: int  # 1 grey, 3 colour, 4 CMYK
    may_be_turned: bool  # there is an Exif or XMP block that may say so; Pillow has to read it

    @property
    def is_rgb(self) -> bool:
        """Whether every decoder shows it, and in colours."""
        return (
            self.frame in PLAIN_FRAMES
            and self.precision == 8
            and self.components == 3
            and self.height * self.width > 0
        )


def jpeg_header(data: bytes) -> JpegHeader | None:
    """None where `data` is no JPEG, or no whole chain of segments leads to its pixels."""
    frame = None
    may_be_turned = False
    for marker, start, end in jpeg_segments(data):
        if end > len(data):
            return None
        if marker in FRAMES:
            if frame is not None or end - start < 6:
                return None
            precision, height, width, components = unpack_from(">BHHB", data, start)
            frame = height, width, marker, precision, components
        elif marker == APP1:
            exif = data.startswith(b"Exif\0\0", start) and not _surely_upright(
                data[start + 6 : end]
            )
            may_be_turned |= exif or data.find(b"tiff:Orientation", start, end) >= 0
        elif marker == SCAN:
            return None if frame is None else JpegHeader(*frame, may_be_turned)
    return None


def _surely_upright(exif: bytes) -> bool:
    """Whether an Exif block is well-formed and has no orientation, or 1. Ten times as fast as
    asking Pillow.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return False
    try:
        (at,) = unpack_from(f"{order}I", exif, 4)
        (n_entries,) = unpack_from(f"{order}H", exif, at)
        for i in range(n_entries):
            tag, kind, count, value = unpack_from(f"{order}HHIH", exif, at + 2 + 12 * i)
            if tag == ORIENTATION and (kind, count, value) != (SHORT, 1, 1):
                return False
    except struct_error:
        return False
    return True


def one_big_at_a_time(size: tuple[int, int]) -> AbstractContextManager[object]:
    """To be held while an image of `size` is decoded."""
    return _one_big_image if size[0] * size[1] > BIG_PIXELS else nullcontext()


@cache
def turbojpeg() -> ctypes.CDLL:
    """The library of libjpeg-turbo. Raises ImportError with the remedy where it is missing."""
    try:
        lib = ctypes.CDLL("libturbojpeg.so.0")
    except OSError as error:
        raise ImportError(
            f"libturbojpeg is missing ({error}): apt-get install libturbojpeg0"
        ) from error
    lib.tjInitDecompress.restype = ctypes.c_void_p
    lib.tjGetErrorStr2.restype = ctypes.c_char_p
    return lib


def check_jpeg(data: bytes, shrink: int = 8) -> tuple[int, int]:
    """Decode at 1/shrink size: the (height, width) of the whole. Holds no GIL.

    Raises:
        ValueError: libjpeg-turbo's error or warning.
    """
    lib = turbojpeg()
    handle = ctypes.c_void_p(lib.tjInitDecompress())

    def call(function: Callable[..., int], *arguments: object) -> None:
        if function(handle, data, ctypes.c_ulong(len(data)), *arguments):
            raise ValueError(lib.tjGetErrorStr2(handle).decode(errors="replace"))

    try:
        width, height, subsampling, colours = (ctypes.c_int() for _ in range(4))
        call(
            lib.tjDecompressHeader3,
            *(ctypes.byref(number) for number in (width, height, subsampling, colours)),
        )
        if width.value * height.value > PIXELS_PER_BYTE * len(data):
            raise ValueError(f"too few bytes for a JPEG of {height.value} x {width.value} pixels")
        w, h = -(-width.value // shrink), -(-height.value // shrink)
        pixels = (
            11 if colours.value in (3, 4) else 0
        )  # TJPF_CMYK for TJCS_CMYK and TJCS_YCCK, else TJPF_RGB
        with one_big_at_a_time((width.value, height.value)):
            call(lib.tjDecompress2, ctypes.create_string_buffer(w * h * 4), w, 0, h, pixels, 0)
        return height.value, width.value
    finally:
        lib.tjDestroy(handle)
