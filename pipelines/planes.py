"""Decoded planes: what a sample of mode PLANES holds, and how the bytes of an image file become it.

A 4:2:0 JPEG is stored as three planes: brightness (Y) at full size, two of colour (Cb, Cr) at half
the sides. Kept like this it needs no decoder, takes half the bytes of RGB pixels, and shows exactly
what libjpeg-turbo shows of the JPEG at its most accurate.
"""

import numpy as np
from PIL import Image

from pipelines import turbojpeg
from pipelines.images import decode, open_image, plain_jpeg
from pipelines.jpeg import is_jpeg, one_big_at_a_time
from pipelines.store import MAX_SIDE

CHROMA_420 = "420"  # TurboJPEG's name
GREY = "L"  # Pillow's name
YCBCR = "YCbCr"  # Pillow's, and TurboJPEG's

# JFIF 1.02: R, G and B in Y, and in Cb and Cr.
Y_OF_RGB = np.array([0.299, 0.587, 0.114], np.float32)
COLOURS_OF_RGB = np.array([[-0.168736, 0.5], [-0.331264, -0.418688], [0.5, -0.081312]], np.float32)
NO_COLOUR = np.float32(128)
BAND = 256  # rows at once, an even number: as floats a picture is four times as large


def half(side: int) -> int:
    """The side of a plane of colours, pixels."""
    return (side + 1) // 2


def split_planes(
    sample: np.ndarray,  # uint8 (n,), of mode PLANES
    height: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y (H, W), Cb and Cr (each half the sides, rounded up): views of the sample."""
    n_grey = height * width
    colours = sample[n_grey:].reshape(2, half(height), half(width))
    return sample[:n_grey].reshape(height, width), colours[0], colours[1]


def encode_planes(
    data: bytes,  # of an image file that `pipelines.images` reads
    max_side: int | None = None,  # pixels; larger images are shrunk, by area average
) -> tuple[bytes, int, int]:
    """The sample of mode PLANES to store for an image file, its height and its width.

    Of a 4:2:0 JPEG that is neither turned nor shrunk, the planes are those of the decoder, bit for
    bit. All else is decoded to the upright RGB picture as for a JPEG (`images.decode`),
    converted as JFIF defines it, and its colours are averaged over 2 x 2 pixels.

    Raises any of `images.UNREADABLE`. What a JPEG's decoder merely warns of it does not notice:
    `turbojpeg.check_jpeg` does.
    """
    if is_jpeg(data):
        sides = plain_jpeg(data)
        # A side of one pixel is one that the decoder cannot halve.
        as_it_is = sides is not None and min(sides) > 1 and max(sides) <= (max_side or MAX_SIDE)
        if sides is not None and as_it_is and _is_420(data):
            return _decoders_planes(data, *sides), *sides
    picture = decode(data, max_side)
    return planes_of_picture(picture), picture.height, picture.width


def _is_420(data: bytes) -> bool:
    """Whether a JPEG's colours are YCbCr, at half the sides of its brightness."""
    header = turbojpeg.read_header(data)
    return header.colours == YCBCR and header.chroma == CHROMA_420


def _decoders_planes(data: bytes, height: int, width: int) -> bytes:
    """The planes of a 4:2:0 JPEG as libjpeg-turbo decodes them, by its accurate DCT.

    As grey it gives Y alone. At half the sides it gives Cb and Cr as they are, since it then
    shrinks nothing but Y (jpeg_calc_output_dimensions in jdmaster.c).
    """
    with one_big_at_a_time(width, height):
        grey = _drafted(data, GREY, (width, height))
        colours = _drafted(data, YCBCR, (width // 2, height // 2))
    assert colours.shape[:2] == (half(height), half(width))
    # The whole planes, in their order: `split_planes` takes them apart.
    return b"".join([grey.tobytes(), colours[..., 1].tobytes(), colours[..., 2].tobytes()])


def _drafted(
    data: bytes,
    mode: str,  # colours
    least: tuple[int, int],  # width and height
) -> np.ndarray:
    """A JPEG decoded by libjpeg-turbo at the smallest of its sizes that is no smaller than asked.

    uint8 (height, width) in grey, (height, width, 3) in YCbCr.
    """
    image = open_image(data)
    image.draft(mode, least)
    return np.asarray(image)


def planes_of_picture(picture: Image.Image) -> bytes:
    """The planes of an RGB picture: each value rounded once, colours averaged over 2 x 2 pixels."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    grey = np.empty((height, width), np.uint8)
    colours = np.empty((2, half(height), half(width)), np.uint8)
    for top in range(0, height, BAND):
        rgb = pixels[top : top + BAND].astype(np.float32)
        grey[top : top + BAND] = np.rint(rgb @ Y_OF_RGB)
        # At an odd border the last pixels count twice, so that the mean is of what there is.
        even = np.pad(rgb, ((0, len(rgb) % 2), (0, width % 2), (0, 0)), mode="edge")
        mean = even.reshape(half(len(rgb)), 2, half(width), 2, 3).mean((1, 3))
        both = np.rint(mean @ COLOURS_OF_RGB + NO_COLOUR).clip(0, 255)
        colours[:, top // 2 : (top + BAND) // 2] = np.moveaxis(both, -1, 0)
    return grey.tobytes() + colours.tobytes()
