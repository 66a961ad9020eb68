"""The bytes of one image file -> an upright RGB picture: one definition, for image folders and for
conversion alike.

A JPEG that every decoder shows as an upright RGB picture stays as it is, byte for byte. All else
that can be read is decoded by Pillow and encoded once, as a JPEG of quality 95 with 4:2:0 colours:

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

from contextlib import suppress
from io import BytesIO
from pathlib import Path
from struct import error as struct_error

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin

from pipelines.files import readable
from pipelines.jpeg import (
    BIG_PIXELS,
    ORIENTATION,
    PIXELS_PER_BYTE,
    check_jpeg,
    jpeg_header,
    one_big_at_a_time,
)
from pipelines.store import MAX_SIDE

FORMATS = (
    "JPEG",
    "PNG",
    "PPM",
    "BMP",
    "TIFF",
    "WEBP",
    "GIF",
    "AVIF",
)  # Pillow's names; others may run programs
QUALITY = 95  # of what is re-encoded
MAX_PIXELS = 1 << 29  # of what is decoded in full: 2 GB in Pillow
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
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    struct_error,
    Image.DecompressionBombError,
)


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Pillow's lazily decoded image. Unlike `Image.open`: FORMATS only, and without its limit of
    179 megapixels.

    Raises:
        ValueError: none of FORMATS, or damaged.
    """
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accepts = Image.OPEN.get(name, (None, None))
        if name == "JPEG":
            factory = (
                JpegImagePlugin.JpegImageFile
            )  # the registered one looks for a second image behind the first
        try:
            # A text instead of True says that this Pillow lacks the decoder.
            if factory is not None and accepts is not None and accepts(data[:16]) is True:
                return factory(BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct_error) as error:
            raise ValueError(f"a damaged or unusual {name} file: {error}") from error
    raise ValueError(
        f"not an image: its content is none of {', '.join(FORMATS)}"
        if data
        else "the file is empty"
    )


def _refuse(image: Image.Image) -> None:
    """ValueError for pixels without a defined range of values."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        what = f"pixels of 32 bits, signed or floating-point (Pillow's mode {image.mode})"
        raise ValueError(
            f"{what} have no defined range of values: save it with 8 or 16 unsigned bits"
        )
    if image.mode == "LAB":
        raise ValueError("LAB colours are not converted: save it as RGB")


def _turn(image: Image.Image, data: bytes) -> int:
    """The orientation, 1 to 8; 1 where there is none."""
    if image.format == "TIFF":
        return 1  # Pillow sets it upright itself, and its sides
    if image.format == "PNG" and not (
        b"eXIf" in data or b"Raw profile type" in data or b"adobe.xmp" in data
    ):
        return 1  # Pillow would decode all of it to look behind the pixels
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except Exception:  # ImageNet has unreadable Exif blocks around sound images
        return 1
    return int(turn) if turn in TURNS else 1


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """16 bits (or 12) -> 8, to nearest. Pillow's own conversion cuts at 255."""
    tags = getattr(image, "tag_v2", {})
    highest = 4095 if tuple(tags.get(258, ())) == (12,) else 65535  # TIFF's BitsPerSample
    levels = (np.arange(highest + 1) * 255 + highest // 2) // highest
    if tags.get(262) == 0:  # TIFF's PhotometricInterpretation: 0 is white
        levels = levels[::-1]
    return Image.fromarray(levels.astype(np.uint8).take(np.asarray(image), mode="clip"))


def _shrunk(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """`size` with `max_side` as its longer side."""
    longer = max(size)
    return max(1, round(size[0] * max_side / longer)), max(1, round(size[1] * max_side / longer))


def decode(data: bytes, max_side: int | None = None) -> Image.Image:
    """The upright RGB picture; where a side is above `max_side` pixels it is shrunk, by area
    average.

    Raises any of UNREADABLE for what is damaged or refused (see this module's docstring), or too
    large.
    """
    image = open_image(data)
    _refuse(image)
    full = image.size
    if max_side is None and max(full) > MAX_SIDE:
        raise ValueError(f"{full[0]} x {full[1]} pixels: sides above {MAX_SIDE} need --max-side")
    target = full if max_side is None or max(full) <= max_side else _shrunk(full, max_side)
    if target != full and image.format == "JPEG" and full[0] * full[1] > BIG_PIXELS:
        # The decoder's own 1/2, 1/4 or 1/8: if it can, no further than twice the wanted size, the
        # rest is averaged.
        spare = 2 if full[0] * full[1] <= MAX_PIXELS else 1
        image.draft(None, (spare * target[0], spare * target[1]))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{full[0]} x {full[1]} pixels: more than {MAX_PIXELS:,} are not decoded; shrink it"
            " otherwise"
        )
    with one_big_at_a_time(full):
        image.load()
        turn = _turn(image, data)
        grey = (
            _grey_of_8_bits(image) if image.mode == "I" or image.mode.startswith("I;16") else image
        )
        grey.info = {}  # a comment or a transparent colour has no meaning for the result
        picture = grey.convert("RGB")
        if target != full:
            picture = picture.resize(target, Image.Resampling.BOX)
        return picture.transpose(TURNS[turn]) if turn in TURNS else picture


def as_jpeg(picture: Image.Image, quality: int = QUALITY) -> bytes:
    """A baseline JPEG with 4:2:0 colours."""
    out = BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that every decoder shows as an upright RGB picture; else None.

    Raises ValueError for sides that so few bytes cannot fill.
    """
    header = jpeg_header(data)
    if header is None or not header.is_rgb:
        return None
    if header.height * header.width > PIXELS_PER_BYTE * len(data):
        raise ValueError(f"too few bytes for a JPEG of {header.height} x {header.width} pixels")
    if header.may_be_turned and _turn(open_image(data), data) != 1:
        return None
    return header.height, header.width


def upright_jpeg(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """What a file's content is served as, a JPEG, and its (height, width). Raises any of
    UNREADABLE.
    """
    sides = plain_jpeg(data)
    if sides is not None:
        return data, sides
    if data[:2] == b"\xff\xd8":
        with suppress(
            ImportError
        ):  # without libturbojpeg less damage is noticed: Pillow passes over its warnings
            check_jpeg(data)
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
    return (width, height) if _turn(image, data) in SWAPS_SIDES else (height, width)


def reason(error: Exception, path: str | Path = "") -> str:
    """An error's text for a list of damaged files, without `path`; with its type where that says
    more.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError)) and str(
        error
    ):
        return str(error).removeprefix(f"{readable(path)}: ")
    return f"{type(error).__name__}: {error}"
