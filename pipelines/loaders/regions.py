"""What of an image an evaluation shows, for back ends that resize a region of it and not the whole.

Words: the image, H x W pixels, is resized to the sides of its place; the canvas is cut out of that.
All arrays have a row per image and, unless said otherwise, two columns: down and across.
"""

from typing import NamedTuple

import numpy as np

from pipelines.back_ends import Filter

SLACK = 2  # source pixels around what the filter reads, for positions that are rounded


def support_of(filter_: Filter) -> int:
    """How far a filter reaches to either side, in pixels of the larger of image and place."""
    return 2 if filter_ == "bicubic" else 1


def weight_at(distance: np.ndarray, filter_: Filter) -> np.ndarray:
    """A filter at distances >= 0 from its centre: a triangle, or Keys' cubic with a = -1/2."""
    if filter_ == "bilinear":
        return np.maximum(1 - distance, 0)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


class Regions(NamedTuple):
    """Regions of images, and what of each is resized to the whole canvas."""

    # int64 (n, 2): top and left, then height and width, in pixels of the image; may reach outside.
    corner: np.ndarray
    shape: np.ndarray
    # float32 (n, 2): from where to where, in pixels of the region.
    shown_from: np.ndarray
    shown_to: np.ndarray


def regions(
    image: np.ndarray,  # (n, 2) height and width
    place: np.ndarray,  # (n, 4) top, left, height, width on the canvas, which it covers
    canvas: tuple[int, int],  # height, width
    *,
    inside: bool,  # cut at the image's borders
    filter_: Filter = "bilinear",
) -> Regions:
    """The parts that the filter reads for the pixels on the canvas."""
    scale = image / place[:, 2:]
    shown_from = -place[:, :2] * scale
    shown_to = (np.array(canvas) - place[:, :2]) * scale
    reach = support_of(filter_) * np.maximum(scale, 1) + SLACK
    first = np.floor(shown_from - reach).astype(np.int64)
    last = np.ceil(shown_to + reach).astype(np.int64)
    if inside:
        first = first.clip(0)
        last = np.minimum(last, image)
    return Regions(
        corner=first,
        shape=last - first,
        shown_from=(shown_from - first).astype(np.float32),
        shown_to=(shown_to - first).astype(np.float32),
    )


def two_passes(
    region: Regions,
    sides: np.ndarray,  # (n, 2) of the canvas
) -> dict[str, np.ndarray]:
    """What a resize across, which keeps all rows, and one down, which keeps all columns, are told.

    float32 (n, 2): of the first one `line_...`, the sides of its result, and from where to where it
    goes; of the second one, whose result has the canvas' sides, `shown_...` likewise.
    """
    line_sides = np.stack([region.shape[:, 0], sides[:, 1]], 1).astype(np.float32)
    nothing = np.zeros_like(region.shown_from[:, 0])
    return {
        "line_sides": line_sides,
        "line_from": np.stack([nothing, region.shown_from[:, 1]], 1),
        "line_to": np.stack([line_sides[:, 0], region.shown_to[:, 1]], 1),
        "shown_from": np.stack([region.shown_from[:, 0], nothing], 1),
        "shown_to": np.stack([region.shown_to[:, 0], line_sides[:, 1]], 1),
    }


def show_borders(
    image: np.ndarray,  # (n, 2)
    place: np.ndarray,  # (n, 4)
    canvas: tuple[int, int],
    filter_: Filter = "bilinear",
) -> bool:
    """Whether some image shows a border of it, and it matters what is taken for the pixels beyond.

    It does where the image shrinks. Where it is enlarged, all bilinear filters take its outermost
    pixel, and cubic ones differ. A pixel of the canvas sees no further than the next ones.
    """
    before = -place[:, :2]
    after = place[:, :2] + place[:, 2:] - np.array(canvas)
    matters = place[:, 2:] != image
    if filter_ == "bilinear":
        matters = place[:, 2:] < image
    at_a_border = np.minimum(before, after) < support_of(filter_) + 1
    return bool((matters & at_a_border).any())


def shares_inside(
    sides: np.ndarray,  # (n,) of the images, along one side
    begins: np.ndarray,  # (n,) where their places begin on the canvas, not above 0
    resized: np.ndarray,  # (n,) sides of their places
    n_out: int,  # the canvas' side
    filter_: Filter = "bilinear",
) -> np.ndarray:
    """float32 (n, n_out): how much of the filter's weight lies inside the image.

    Around an image with zeros a filter gives too little by this factor, compared with Pillow, which
    leaves out what lies beyond the borders.
    """
    scale = (sides / resized)[:, None]
    widening = np.maximum(scale, 1)
    reach = support_of(filter_) * widening
    centre = (np.arange(n_out) - begins[:, None] + 0.5) * scale
    first = np.floor(centre - reach)
    total = np.zeros_like(centre)
    inside = np.zeros_like(centre)
    for k in range(int(np.ceil(2 * reach.max(initial=1))) + 2):
        pixel = first + k
        weight = weight_at(np.abs(pixel + 0.5 - centre) / widening, filter_)
        total += weight
        inside += weight * ((pixel >= 0) & (pixel < sides[:, None]))
    return (inside / total).astype(np.float32)
