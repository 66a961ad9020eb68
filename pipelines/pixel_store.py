"""The images of a store as their own files show them, without a border that is no part of them.

A folder serves a PNG as a JPEG, as conversion would store it. Sets that are published as PNGs are
scored on the PNGs' own pixels: these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import readable
from pipelines.images import UNREADABLE, decode, reason
from pipelines.store import PLANES, RAW, DamagedData, Store

JPEGS = (".jpg", ".jpeg")


class PixelStore(Store):
    """What is no JPEG by its file's name is raw pixels; `border` pixels are cut off at each side.

    With a border all images are raw pixels. Labels and files are those of `whole`, which stays
    open, and is closed by whoever opened it. Raises ValueError for images that are nothing but
    border, and for images stored as planes.
    """

    def __init__(self, whole: Store, border: int = 0) -> None:
        super().__init__(whole.path)
        assert whole.annotations is None, "boxes would have to move with the border"
        if (whole.modes == PLANES).any():
            raise ValueError(
                f"{readable(whole.path)}: decoded planes hold no pixels of the file: convert the"
                " images again without --decoded"
            )
        self.whole = whole
        self.border = border
        self.classes = whole.classes
        self.labels = whole.labels
        self.notes = whole.notes
        self.odd_classes_are_meant = whole.odd_classes_are_meant
        self.heights = whole.heights - 2 * border
        self.widths = whole.widths - 2 * border
        is_raw = np.array([bool(border) or not _is_jpeg(whole, i) for i in range(len(whole))])
        self.modes = np.where(is_raw, RAW, whole.modes).astype(whole.modes.dtype)
        pixels_bytes = 3 * self.heights.astype(np.int64) * self.widths
        self.sizes = np.where(is_raw, pixels_bytes, whole.sizes)
        (small,) = np.nonzero(np.minimum(self.heights, self.widths) < 1)
        if len(small):
            first = int(small[0])
            raise ValueError(
                f"{whole.name_of(first)}: {whole.heights[first]} x {whole.widths[first]} pixels are"
                f" nothing but its border of {border}"
            )

    def read(self, index: int) -> np.ndarray:
        """See `Store.read`: RGB pixels, or a JPEG."""
        if self.modes[index] != RAW:
            return self.whole.read(index)
        sides = (int(self.whole.heights[index]), int(self.whole.widths[index]))
        if self.whole.modes[index] == RAW:
            pixels = self.whole.read(index).reshape(*sides, 3)
        else:
            pixels = self._decoded(index, sides)
        inner = pixels[self.border : sides[0] - self.border, self.border : sides[1] - self.border]
        return np.ascontiguousarray(inner).reshape(-1)

    def _decoded(self, index: int, sides: tuple[int, int]) -> np.ndarray:  # uint8 (H, W, 3)
        try:
            pixels = np.asarray(decode(self.whole.content(index)))
        except UNREADABLE as error:
            raise DamagedData(f"{self.name_of(index)}: {reason(error)}") from error
        if pixels.shape != (*sides, 3):
            raise DamagedData(
                f"{self.name_of(index)}: {pixels.shape[:2]} pixels, {sides} when it was scanned"
            )
        return pixels

    def file(self, index: int) -> Path:
        return self.whole.file(index)

    def name_of(self, index: int) -> str:
        return self.whole.name_of(index)

    def files(self) -> list[Path]:
        return self.whole.files()

    def close(self) -> None:
        self.whole.close()

    def identity(self) -> dict[str, Any]:
        """That of the images, and what is done to them."""
        return self.whole.identity() | {"decoded": True, "border": self.border}


def _is_jpeg(store: Store, index: int) -> bool:
    return store.modes[index] != RAW and store.file(index).suffix.lower() in JPEGS
