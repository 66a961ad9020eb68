"""The images of a store, corrupted as they are stored: before any resize, as COCO-C is made.

The benchmark corrupts whole photographs, and detectors resize them afterwards (Michaelis et al.,
2019). `pipelines.corrupt_batches` corrupts what a classifier sees, as ImageNet-C does.
"""

from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corrupt import check_corruption, corrupt
from pipelines.images import UNREADABLE, open_image, reason
from pipelines.store import JPG, RAW, DamagedData, Store


class CorruptedStore(Store):
    """Every image of `clean` as raw pixels, corrupted by `pool` when it is read.

    Labels, boxes, sides and files are those of `clean`, which stays open. Raises ValueError for an
    unknown name or severity.
    """

    def __init__(
        self, clean: Store, *, name: str, severity: int, pool: Executor, seed: int = 0
    ) -> None:
        super().__init__(clean.path)
        check_corruption(name, severity)
        self.clean = clean
        self.classes = clean.classes
        self.annotations = clean.annotations
        self.heights = clean.heights
        self.widths = clean.widths
        self.labels = clean.labels
        self.modes = np.full_like(clean.modes, RAW)
        self.sizes = 3 * clean.heights.astype(np.int64) * clean.widths
        self.name = name
        self.severity = severity
        self.seed = seed
        self.pool = pool

    def read(self, index: int) -> np.ndarray:
        """See `Store.read`: the pixels are a function of the clean image, its number and the seed.

        The calling thread waits for the pool, so as many threads as it has processes keep it busy.
        """
        encoded = self.clean.read(index)
        sides = None
        if self.clean.modes[index] != JPG:
            sides = (int(self.heights[index]), int(self.widths[index]))
        settings = (self.name, self.severity, self.seed, index)
        try:
            pixels: np.ndarray = self.pool.submit(_corrupted, encoded, sides, *settings).result()
        except UNREADABLE as error:
            raise DamagedData(f"{self.file(index)}: sample {index}: {reason(error)}") from error
        return pixels.reshape(-1)

    def file(self, index: int) -> Path:
        return self.clean.file(index)

    def identity(self) -> dict[str, Any]:
        """That of the clean images, and what is done to them."""
        corruption = {"corruption": self.name, "severity": self.severity, "seed": self.seed}
        return self.clean.identity() | corruption


def _corrupted(
    encoded: np.ndarray,  # uint8 (n,): a JPEG, or the pixels of an image of `sides`
    sides: tuple[int, int] | None,
    name: str,
    severity: int,
    seed: int,
    index: int,
) -> np.ndarray:  # uint8 (H, W, 3)
    """Runs in a process of the pool."""
    if sides is None:
        image = np.asarray(open_image(encoded.tobytes()).convert("RGB"))
    else:
        image = encoded.reshape(*sides, 3)
    return corrupt(image, name, severity, seed, index)
