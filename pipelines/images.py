"""The bytes of one image file -> an upright RGB picture.

It is one definition, for image folders and for conversion alike. A JPEG that every decoder shows as
an upright RGB picture stays as it is, byte for byte. All else that can be read is decoded by Pillow
and encoded once, as a JPEG of quality 95 with 4:2:0 colours:

- Turned and mirrored pictures are set upright: by the Exif orientation, or XMP's where Exif has
  none, wherever it stands in the file.
- Grey, 1-bit, palette, CMYK and YCbCr become RGB as Pillow's `convert("RGB")` makes it. Colour
  profiles are not applied. Transparency is dropped: a transparent pixel shows the colour that is
  stored under it.
- Grey of 16 bits (PNG, TIFF, PGM) is scaled: 0..65535 -> 0..255, to nearest; TIFF's 12 bits
  likewise, from 0..4095. Of 16 bits per colour channel Pillow keeps the upper eight.
- Of several frames or pages (GIF, TIFF, WebP) it is the first.
- Refused, with the reason: 32-bit, signed and floating-point pixels, which have no defined range;
  LAB; JPEGs of 12 bits; what is none of FORMATS.
"""

import os
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin

from pipelines import turbojpeg
from pipelines.files import readable
from pipelines.jpeg import (
    ORIENTATION,
    PIXELS_PER_BYTE,
    UPRIGHT,
    is_big,
    is_jpeg,
    jpeg_header,
    one_big_at_a_time,
)
from pipelines.store import MAX_SIDE

# Pillow's names. Its other formats may run programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")
FIRST_BYTES = 16  # by which Pillow's formats know their files
QUALITY = 95  # of what is re-encoded
MAX_PIXELS = 1 << 29  # of what is decoded in full: 2 GB in Pillow

# How to set upright what an orientation says is turned; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)

# Where a PNG may hold its orientation: a block of Exif, the same in ImageMagick's text, or XMP.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"adobe.xmp")

# TIFF 6.0, section 8.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
WHITE_IS_ZERO = 0

# What Pillow raises for a damaged file, and we for one that is refused.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    struct.error,
    Image.DecompressionBombError,
)


# ------------------------------------------------------------------ any format, by Pillow


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Pillow's lazily decoded image.

    Unlike `Image.open` it knows FORMATS only, and has no limit of 179 megapixels.

    Raises:
        ValueError: none of FORMATS, or damaged.
    """
    if not data:
        raise ValueError("the file is empty")
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is None or accepts is None:
            continue
        if name == "JPEG":
            # The registered one looks for a second image behind the first.
            factory = JpegImagePlugin.JpegImageFile
        try:
            # A text instead of True says that this Pillow lacks the decoder.
            if accepts(data[:FIRST_BYTES]) is True:
                return factory(BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            raise ValueError(f"a damaged or unusual {name} file: {error}") from error
    raise ValueError(f"not an image: its content is none of {', '.join(FORMATS)}")


def _refuse(image: Image.Image) -> None:
    """ValueError for pixels without a defined range of values."""
    # Pillow holds the 16 bits of a PNG or PPM in its mode of 32.
    of_16_bits = image.format in ("PNG", "PPM")
    if image.mode == "F" or (image.mode == "I" and not of_16_bits):
        raise ValueError(
            f"pixels of 32 bits, signed or floating-point (Pillow's mode {image.mode}) have no"
            " defined range of values: save it with 8 or 16 unsigned bits"
        )
    if image.mode == "LAB":
        raise ValueError("LAB colours are not converted: save it as RGB")


def _turn(image: Image.Image, data: bytes) -> int:
    """The orientation, 1 to 8; 1 where there is none."""
    if image.format == "TIFF":
        return UPRIGHT  # Pillow sets it upright itself, and its sides
    if image.format == "PNG" and not any(mark in data for mark in PNG_ORIENTATION):
        return UPRIGHT  # Pillow would decode all of it to look behind the pixels
    try:
        turn = image.getexif().get(ORIENTATION, UPRIGHT)
    except Exception:  # ImageNet has unreadable Exif blocks around sound images
        return UPRIGHT
    if turn in TURNS:
        return int(turn)
    return UPRIGHT


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """16 bits (or 12) -> 8, to nearest. Pillow's own conversion cuts at 255."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    n_bits = 16
    if tuple(tags.get(BITS_PER_SAMPLE, ())) == (12,):
        n_bits = 12
    highest = (1 << n_bits) - 1
    levels = (np.arange(highest + 1) * 255 + highest // 2) // highest
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = levels[::-1]
    return Image.fromarray(levels.astype(np.uint8).take(np.asarray(image), mode="clip"))


def decode(data: bytes, max_side: int | None = None) -> Image.Image:
    """The upright RGB picture; with a side above `max_side` pixels shrunk, by area average.

    Area average: a pixel is the mean of the rectangle of the image that it covers, to nearest, a
    part of a pixel counting as that part. What Pillow shows is shrunk as it is stored, before it is
    set upright.

    Raises any of UNREADABLE for what is damaged or refused (see this module's docstring), or too
    large. Of a JPEG libjpeg-turbo's warnings are damage.
    """
    if is_jpeg(data):
        sides = plain_jpeg(data)
        if sides is not None and not is_big(*sides):
            return _decode_plain_jpeg(data, sides, max_side)
        turbojpeg.check_jpeg(data)  # Pillow passes over its warnings
    return _decode_by_pillow(data, max_side)


def _decode_plain_jpeg(data: bytes, sides: tuple[int, int], max_side: int | None) -> Image.Image:
    """One of height and width `sides`, shown as Pillow shows it, for less work."""
    height, width = sides
    target = _target((width, height), max_side)
    pixels = np.empty((height, width, 3), np.uint8)
    turbojpeg.decode(data, pixels)
    return Image.fromarray(_shrunk(pixels, target))


def _decode_by_pillow(data: bytes, max_side: int | None) -> Image.Image:
    image = open_image(data)
    _refuse(image)
    full = image.size
    width, height = full
    target = _target(full, max_side)
    if target != full and image.format == "JPEG" and is_big(width, height):
        # The decoder's own 1/2, 1/4 or 1/8: if it can, no further than twice the wanted size, the
        # rest is averaged.
        spare = 2 if width * height <= MAX_PIXELS else 1
        image.draft(None, (spare * target[0], spare * target[1]))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels: more than {MAX_PIXELS:,} are not decoded;"
            " shrink it otherwise"
        )
    with one_big_at_a_time(width, height):
        image.load()
        turn = _turn(image, data)
        picture = _as_rgb(image)
        if target != full:
            picture = Image.fromarray(_shrunk(np.asarray(picture), target))
        if turn in TURNS:
            picture = picture.transpose(TURNS[turn])
        return picture


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey_of_8_bits(image)
    image.info = {}  # a comment or a transparent colour has no meaning for the result
    return image.convert("RGB")


def shrink(
    pixels: np.ndarray,  # uint8 (H, W, 3)
    max_side: int | None,
) -> np.ndarray:
    """Pixels as `decode` shrinks a picture; ValueError for what is too large to stay as it is."""
    height, width, _ = pixels.shape
    return _shrunk(pixels, _target((width, height), max_side))


def _target(
    size: tuple[int, int],  # width, height
    max_side: int | None,
) -> tuple[int, int]:
    """`size` with `max_side` as its longer side, or as it is if that is no longer.

    ValueError for one that is too large to stay as it is.
    """
    longer = max(size)
    if max_side is None and longer > MAX_SIDE:
        raise ValueError(f"{size[0]} x {size[1]} pixels: sides above {MAX_SIDE} need --max-side")
    if max_side is None or longer <= max_side:
        return size
    first = max(1, round(size[0] * max_side / longer))
    second = max(1, round(size[1] * max_side / longer))
    return first, second


def _shrunk(
    pixels: np.ndarray,  # uint8 (H, W, 3)
    size: tuple[int, int],  # width, height
) -> np.ndarray:
    """The area average, uint8 (height, width, 3); `pixels` themselves if they have that size."""
    width, height = size
    if pixels.shape == (height, width, 3):
        return pixels
    # Not at the top: numba takes a second to import, and few conversions shrink.
    from pipelines.loaders.area import area_resize

    whole = (0.0, 0.0, float(pixels.shape[0]), float(pixels.shape[1]))
    shrunk = np.empty((height, width, 3), np.uint8)
    area_resize(pixels, whole, False, shrunk, (0, 0, height, width))
    return shrunk


# ------------------------------------------------------------------ as a JPEG


def as_jpeg(picture: Image.Image, quality: int = QUALITY) -> bytes:
    """A baseline JPEG with 4:2:0 colours."""
    # While Pillow encodes into a file's descriptor other threads may run. While it encodes into a
    # BytesIO it holds the GIL.
    with open(os.memfd_create("jpeg"), "w+b", buffering=0) as file:
        picture.save(file, "JPEG", quality=quality)
        return os.pread(file.fileno(), file.tell(), 0)


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that every decoder shows as an upright RGB picture; else None.

    Raises ValueError for sides that so few bytes cannot fill.
    """
    header = jpeg_header(data)
    if header is None or not header.is_rgb:
        return None
    if header.height * header.width > PIXELS_PER_BYTE * len(data):
        raise ValueError(f"too few bytes for a JPEG of {header.height} x {header.width} pixels")
    if header.may_be_turned and _turn(open_image(data), data) != UPRIGHT:
        return None
    return header.height, header.width


def upright_jpeg(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """What a file's content is served as, a JPEG, and its (height, width).

    Raises any of UNREADABLE.
    """
    sides = plain_jpeg(data)
    if sides is not None:
        return data, sides
    picture = decode(data)
    return as_jpeg(picture), (picture.height, picture.width)


def upright_sides(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright picture, without decoding it.

    Of a JPEG, `data` may end where the pixels begin. Raises any of UNREADABLE.
    """
    header = jpeg_header(data)
    if header is not None and header.is_rgb and not header.may_be_turned:
        return header.height, header.width
    image = open_image(data)
    _refuse(image)
    width, height = image.size
    if _turn(image, data) in SWAPS_SIDES:
        return width, height
    return height, width


def unturned_sides(data: bytes) -> tuple[int, int]:
    """(height, width) of a picture that no orientation turns or mirrors, without decoding it.

    For what was drawn on the picture, such as boxes: nobody knows which way up it was shown. Raises
    any of UNREADABLE, ValueError for a turned one.
    """
    header = jpeg_header(data)
    if header is not None and header.is_rgb and not header.may_be_turned:
        return header.height, header.width
    image = open_image(data)
    _refuse(image)
    turn = _turn(image, data)
    if image.format == "TIFF":
        turn = getattr(image, "tag_v2", {}).get(ORIENTATION, UPRIGHT)
    if turn in TURNS:
        raise ValueError(
            f"its Exif orientation ({turn}) turns or mirrors it, and its boxes may be of either"
            " picture: save it upright, with the boxes of that"
        )
    return image.height, image.width


def reason(error: Exception, path: str | Path = "") -> str:
    """An error's text for a list of damaged files, without `path`.

    Its type is told where that says more.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    says_enough = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
    if isinstance(error, says_enough) and str(error):
        return str(error).removeprefix(f"{readable(path)}: ")
    return f"{type(error).__name__}: {error}"
