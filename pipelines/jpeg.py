"""JPEG files: what their headers say, and which are so big that they are decoded alone."""

import struct
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

# A JPEG's block of 64 pixels takes at least a bit: damaged sides must not ask for gigabytes.
PIXELS_PER_BYTE = 512

# ------------------------------------------------------------------ big images

BIG_PIXELS = 1 << 26  # above, one image at a time is decoded, however many threads there are

_one_big_image = threading.Lock()


def is_big(width: int, height: int) -> bool:
    """Whether an image, JPEG or not, takes so much memory that it must be decoded alone."""
    return width * height > BIG_PIXELS


def one_big_at_a_time(width: int, height: int) -> AbstractContextManager[object]:
    """To be held while an image of that size is decoded."""
    if is_big(width, height):
        return _one_big_image
    return nullcontext()


# ------------------------------------------------------------------ segments: ITU T.81, table B.1

START = b"\xff\xd8"  # of every JPEG
LENGTH_BYTES = 2  # a segment's length comes first and counts itself

PREFIX = 0xFF  # of a marker, which is the byte behind it; there may be several
FIRST_MARKER = 0xC0  # those below are reserved
FIRST_WITHOUT_CONTENT = 0xD0  # restart, start and end of an image
LAST_WITHOUT_CONTENT = 0xD9
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2  # frame headers
HUFFMAN_TABLES, RESERVED, ARITHMETIC_TABLES = 0xC4, 0xC8, 0xCC  # the others among 0xC0 to 0xCF
SCAN = 0xDA  # the pixels begin
APP1 = 0xE1  # Exif or XMP

FRAMES = frozenset(range(0xC0, 0xD0)) - {HUFFMAN_TABLES, RESERVED, ARITHMETIC_TABLES}
PLAIN_FRAMES = (BASELINE, EXTENDED, PROGRESSIVE)  # what every decoder knows
DCT_FRAMES = (*PLAIN_FRAMES, 0xC9, 0xCA)  # the same, and two with arithmetic coding: not lossless

FRAME = struct.Struct(">BHHB")  # bits per sample, height, width, components
SIDES = struct.Struct(">HH")  # height and width, behind the bits per sample


def is_jpeg(data: bytes | bytearray) -> bool:
    """Whether `data` begins as a JPEG does."""
    return data.startswith(START)


def jpeg_segments(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the content of a JPEG's segments, the last being the scan's.

    It ends before a marker that does not belong there: a decoder may go on elsewhere than we would.
    """
    if not is_jpeg(data):
        return
    at = len(START)
    while at + 2 + LENGTH_BYTES <= len(data) and data[at] == PREFIX:
        marker = data[at + 1]
        if marker == PREFIX:  # a fill byte
            at += 1
            continue
        if marker < FIRST_MARKER or FIRST_WITHOUT_CONTENT <= marker <= LAST_WITHOUT_CONTENT:
            return
        length = data[at + 2] << 8 | data[at + 3]
        end = at + 2 + length
        yield marker, at + 2 + LENGTH_BYTES, end
        if marker == SCAN:
            return
        at = end


def jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's frame header, as stored; None where there is none."""
    for marker, start, _ in jpeg_segments(data):
        if marker in FRAMES:
            if start + 1 + SIDES.size > len(data):
                return None
            height, width = SIDES.unpack_from(data, start + 1)
            return height, width
    return None


class JpegHeader(NamedTuple):
    """What a JPEG's segments before its pixels say."""

    height: int  # pixels, as stored
    width: int
    frame: int  # the marker of the frame header: how it is compressed
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
            if frame is not None or end - start < FRAME.size:
                return None
            precision, height, width, components = FRAME.unpack_from(data, start)
            frame = (height, width, marker, precision, components)
        elif marker == APP1:
            may_be_turned |= _may_turn(data, start, end)
        elif marker == SCAN:
            if frame is None:
                return None
            return JpegHeader(*frame, may_be_turned)
    return None


# ------------------------------------------------------------------ orientation

EXIF = b"Exif\0\0"  # an APP1 segment of Exif begins with it; a TIFF file follows
XMP_ORIENTATION = b"tiff:Orientation"
ORIENTATION = 0x0112  # Exif 2.3, table 4
UPRIGHT = 1
ONE_SHORT = (3, 1)  # TIFF's type of a 16-bit number, and how many
ENTRY_BYTES = 12  # of TIFF's directory: tag, type, count, value


def _may_turn(data: bytes, start: int, end: int) -> bool:
    """Whether an APP1 segment may say that the image is turned."""
    if data.startswith(EXIF, start) and not _surely_upright(data[start + len(EXIF) : end]):
        return True
    return data.find(XMP_ORIENTATION, start, end) >= 0


def _surely_upright(tiff: bytes) -> bool:
    """Whether an Exif block is well-formed and has no orientation, or 1.

    It is ten times as fast as asking Pillow.
    """
    match tiff[:4]:
        case b"II*\0":
            order = "<"
        case b"MM\0*":
            order = ">"
        case _:
            return False
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (n_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for i in range(n_entries):
            at = directory + 2 + ENTRY_BYTES * i
            tag, value_type, count, value = struct.unpack_from(f"{order}HHIH", tiff, at)
            if tag == ORIENTATION and (value_type, count, value) != (*ONE_SHORT, UPRIGHT):
                return False
    except struct.error:  # an address or a length behind the end
        return False
    return True
