"""libjpeg-turbo: decode and check JPEGs. The only module that imports its wheel, simplejpeg.

It does not encode: below quality 96 simplejpeg computes the fast DCT, 1.2 dB worse at 95 than what
Pillow makes (see `images.as_jpeg`).

Any number of threads may call these functions at once. They hold no GIL while the library works.
Errors *and warnings* of libjpeg-turbo are ValueErrors: after a warning it would have filled the
rest of an image with grey.
"""

import struct
from typing import NamedTuple

import numpy as np
import simplejpeg

from pipelines.jpeg import (
    DCT_FRAMES,
    FRAME,
    FRAMES,
    PIXELS_PER_BYTE,
    jpeg_segments,
    one_big_at_a_time,
)

# simplejpeg's names.
RGB = "RGB"
GREY = "Gray"
CMYK = "CMYK"
FOUR_COMPONENTS = (CMYK, "YCCK")

SMALLEST = 8  # the largest divisor of the sides
CONTEXT_ROWS = 8  # of the image: no subsampled colour depends on more rows below its own


class Header(NamedTuple):
    """What libjpeg-turbo reads from a JPEG's header."""

    height: int  # pixels, as stored
    width: int
    colours: str  # RGB, YCbCr, Gray, CMYK or YCCK, as stored
    chroma: str  # the subsampling: 444, 422, 420, 440, 411 or Gray


def read_header(data: bytes | bytearray | np.ndarray) -> Header:
    """Raises ValueError for what libjpeg-turbo does not decode."""
    try:
        return Header(*simplejpeg.decode_jpeg_header(data))
    except KeyError:  # simplejpeg has no name for it
        raise ValueError("Could not determine subsampling type for JPEG image") from None


def decode(
    data: bytes | np.ndarray,  # of a JPEG; uint8 (n,)
    image: np.ndarray,  # uint8 (ceil(H / divisor), ceil(W / divisor), 3), C order: filled with RGB
    divisor: int = 1,  # of the sides H and W: 1, 2, 4 or 8
    *,
    fast_dct: bool = False,
    fast_upsampling: bool = False,
) -> None:
    """Decode a JPEG of grey or three colours, all of it, into `image`.

    Of a damaged one, `image` may hold a part. Where both sides are below 7 pixels, libjpeg-turbo
    may take another divisor that gives the same sides.

    Raises:
        ValueError: libjpeg-turbo's error or warning, CMYK colours, or other sides than `image` has.
    """
    assert image.flags.c_contiguous and image.dtype == np.uint8
    header = read_header(data)
    if header.colours in FOUR_COMPONENTS:
        raise ValueError(f"{header.colours} colours are not shown as RGB")
    height, width = _shrunk(header.height, divisor), _shrunk(header.width, divisor)
    if image.shape != (height, width, 3):
        raise ValueError(f"it has {header.height} x {header.width} pixels")
    if divisor > 1:
        _dct_frame(data)
    simplejpeg.decode_jpeg(
        data,
        RGB,
        fastdct=fast_dct,
        fastupsample=fast_upsampling,
        min_height=height,
        min_width=width,
        buffer=image,
    )


def decode_top(
    data: bytes | np.ndarray,  # of a JPEG that is known to be sound; uint8 (n,)
    image: np.ndarray,  # uint8 (rows, ceil(W / divisor), 3), C order: filled with RGB
    divisor: int = 1,  # of the sides H and W: 1, 2, 4 or 8
    *,
    fast_dct: bool = False,
) -> None:
    """Decode the uppermost rows of a JPEG, as many as `image` has; those below cost nothing.

    The last CONTEXT_ROWS / divisor of them differ from those of `decode`: their colours depend on
    rows that are not decoded. So may all of an image that is at most 8 pixels wide, since another
    divisor gives the same sides. What libjpeg-turbo merely warns of is not noticed.

    Raises:
        ValueError: libjpeg-turbo's error, or a JPEG of other sides or colours.
    """
    assert image.flags.c_contiguous and image.dtype == np.uint8
    rows, width, _ = image.shape
    # simplejpeg offers none of libjpeg-turbo's ways to stop. So the frame header is made to say
    # that the image ends there. The library then warns of bytes that it has no use for.
    shorter = bytearray(data)
    height_at = _dct_frame(shorter) + 1  # behind the bits per sample
    struct.pack_into(">H", shorter, height_at, rows * divisor)
    header = read_header(shorter)
    if header.colours in FOUR_COMPONENTS:
        raise ValueError(f"{header.colours} colours are not shown as RGB")
    if (_shrunk(header.height, divisor), _shrunk(header.width, divisor)) != (rows, width):
        raise ValueError(f"it is {header.width} pixels wide")
    simplejpeg.decode_jpeg(
        shorter, RGB, fastdct=fast_dct, min_height=rows, min_width=width, buffer=image, strict=False
    )


def check_jpeg(data: bytes | np.ndarray, divisor: int = SMALLEST) -> tuple[int, int]:
    """Decode at 1/divisor of the sides; returns the (height, width) of the whole.

    At 1/8 all entropy-coded data are read, which is where damage can be noticed, and hardly a pixel
    is computed.

    Raises:
        ValueError: libjpeg-turbo's error or warning.
    """
    height, width, colours, _ = read_header(data)
    if width * height > PIXELS_PER_BYTE * len(data):
        raise ValueError(f"too few bytes for a JPEG of {height} x {width} pixels")
    _dct_frame(data)
    least_work = GREY
    if colours in FOUR_COMPONENTS:
        least_work = CMYK  # what else it would turn them into
    with one_big_at_a_time(width, height):
        simplejpeg.decode_jpeg(
            data, least_work, min_height=_shrunk(height, divisor), min_width=_shrunk(width, divisor)
        )
    return height, width


def _dct_frame(data: bytes | bytearray | np.ndarray) -> int:
    """Where the frame header's content begins, in a JPEG that consists of DCT coefficients.

    Raises ValueError for another. A lossless one is decoded at its full size whatever was asked
    for. simplejpeg's buffer is as small as asked for, and libjpeg-turbo would write behind its end.
    """
    if isinstance(data, np.ndarray):
        data = data.tobytes()
    for marker, start, _ in jpeg_segments(data):
        # The decoder takes the same one: it skips the segments before it as we do, and a second one
        # is an error.
        if marker in FRAMES:
            if marker in DCT_FRAMES and start + FRAME.size <= len(data):
                return start
            break
    raise ValueError("unsupported JPEG process: it is not made of DCT coefficients")


def _shrunk(side: int, divisor: int) -> int:
    """libjpeg-turbo rounds the sides of a shrunk image up."""
    return -(-side // divisor)
