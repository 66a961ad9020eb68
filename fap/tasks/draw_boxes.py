"""Boxes drawn into a picture: what is there, and what was found, with class and score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

TRUE = (40, 200, 80)  # colours: of what is there
FOUND = (250, 60, 60)  # of what was found
WIDTH = 2  # pixels of a found box's lines; those of a true one are half as wide
TEXT_HEIGHT = 11  # pixels of Pillow's own font


class Found(NamedTuple):
    """A detection."""

    box: Sequence[float]  # left, top, right, bottom in pixels of the picture
    words: str  # "dog 0.87"


def drawn(
    picture: Image.Image,
    true: Iterable[Sequence[float]],  # left, top, right, bottom in pixels of the picture
    found: Iterable[Found],
) -> Image.Image:
    """A copy of the picture with the true boxes below the found ones."""
    result = picture.convert("RGB")
    pen = ImageDraw.Draw(result)
    for box in true:
        pen.rectangle([*box], outline=TRUE, width=WIDTH // 2)
    for one in found:
        left, top, *_ = one.box
        pen.rectangle([*one.box], outline=FOUND, width=WIDTH)
        # Above the box, or inside it where there is no room above.
        y = top - TEXT_HEIGHT if top >= TEXT_HEIGHT else top + WIDTH
        pen.text((left + WIDTH, y), one.words, fill=FOUND)
    return result
