"""The images of a store, corrupted as they are stored: before any resize, as COCO-C is made.

The benchmark corrupts whole photographs, and detectors resize them afterwards (Michaelis et al.,
2019). `pipelines.corrupt_batches` corrupts what a classifier sees, as ImageNet-C does.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corrupt import check_corruption, corrupt
from pipelines.files import readable
from pipelines.images import UNREADABLE, open_image, reason
from pipelines.store import JPG, PLANES, RAW, DamagedData, Store


class CorruptedStore(Store):
    """Every image of `clean` as raw pixels, corrupted by `pool` when it is read.

    Labels, boxes, sides and files are those of `clean`, which stays open. Raises ValueError for an
    unknown name or severity, and for images stored as planes.
    """

    def __init__(
        self, clean: Store, *, name: str, severity: int, pool: Executor, seed: int = 0
    ) -> None:
        super().__init__(clean.path)
        check_corruption(name, severity)
        if (clean.modes == PLANES).any():
            raise ValueError(
                f"{readable(clean.path)}: decoded planes cannot be corrupted: convert the images"
                " again without --decoded"
            )
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
        return self._result(index, self._begun(index))

    def read_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """See `Store.read_many`: one calling thread keeps the whole pool busy."""
        begun: list[Future[np.ndarray]] = []
        try:
            begun.extend(self._begun(index) for index in indices)
            return [self._result(*one) for one in zip(indices, begun, strict=True)]
        finally:
            for future in begun:  # nobody wants the others where one fails
                future.cancel()

    def _begun(self, index: int) -> Future[np.ndarray]:
        encoded = self.clean.read(index)
        is_jpeg = bool(self.clean.modes[index] == JPG)
        sides = (int(self.heights[index]), int(self.widths[index]))
        settings = (self.name, self.severity, self.seed, index)
        return self.pool.submit(_corrupted, encoded, is_jpeg, sides, *settings)

    def _result(self, index: int, begun: Future[np.ndarray]) -> np.ndarray:
        try:
            return begun.result().reshape(-1)
        except _UndecodedError as error:
            raise DamagedData(f"{self.name_of(index)}: {error}") from error

    def file(self, index: int) -> Path:
        return self.clean.file(index)

    def name_of(self, index: int) -> str:
        return self.clean.name_of(index)

    def files(self) -> list[Path]:
        return self.clean.files()

    def identity(self) -> dict[str, Any]:
        """That of the clean images, and what is done to them."""
        corruption = {"corruption": self.name, "severity": self.severity, "seed": self.seed}
        return self.clean.identity() | corruption


class _UndecodedError(Exception):
    """Of an image, in the words of the reason; what else fails is no fault of the data."""


def _corrupted(
    encoded: np.ndarray,  # uint8 (n,): a JPEG, or pixels
    is_jpeg: bool,
    sides: tuple[int, int],  # pixels: height and width
    name: str,
    severity: int,
    seed: int,
    index: int,
) -> np.ndarray:  # uint8 (H, W, 3)
    """Runs in a process of the pool."""
    if not is_jpeg:
        return corrupt(encoded.reshape(*sides, 3), name, severity, seed, index, as_coco_c=True)
    try:
        image = np.asarray(open_image(encoded.tobytes()).convert("RGB"))
    except UNREADABLE as error:
        raise _UndecodedError(reason(error)) from None
    return corrupt(image, name, severity, seed, index, as_coco_c=True)
