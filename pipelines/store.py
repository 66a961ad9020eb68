"""Encoded images by index. `BetonStore` reads FFCV's format, version 2, and trusts nothing in the
file.
"""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import readable, shown

JPG, RAW = 0, 1  # FFCV's mode byte
MAX_SIDE = 32767  # pixels; an epoch plan's windows are int16
IDENTITY_SAMPLES = 256  # samples whose bytes say what data without checksums is
SPLITS = {
    "train",
    "training",
    "val",
    "valid",
    "validation",
    "dev",
    "test",
    "testing",
    "eval",
}  # not names of classes


class DamagedData(RuntimeError):  # noqa: N818
    """A data file is not what it says it is. The message names the file and, if it is one, the
    sample.
    """


class Store(ABC):
    """N encoded images with labels; `read` may be called from any thread."""

    path: Path
    classes: tuple[str, ...] | None
    heights: np.ndarray  # int32 (N,), pixels
    widths: np.ndarray  # int32 (N,), pixels
    labels: np.ndarray  # int64 (N,)
    modes: np.ndarray  # uint8 (N,): JPG or RAW
    sizes: np.ndarray  # int64 (N,), encoded bytes
    notes: tuple[str, ...] = ()  # lines to print where the data is opened: what was passed over
    odd_classes_are_meant = False  # see `check_classes`

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Encoded bytes of one sample, uint8 (sizes[index],): a JPEG, or raw RGB in HWC order.

        Raises:
            DamagedData: the bytes cannot be read, or are not those of the tables or of the
            checksum.
        """

    def file(self, index: int) -> Path:
        """The file that holds sample `index`, for messages."""
        return self.path

    def identity(self) -> dict[str, Any]:
        """What this data is, wherever it lies: `count`, `classes`, and `content`, a checksum of
        tables and images.

        Without a sidecar, and for a folder, `content` covers the bytes of some images only, spread
        evenly.
        """
        return {
            "count": len(self),
            "classes": self.classes,
            "content": f"{self._content_crc32():08x}",
        }

    def describe(self) -> list[str]:
        """Lines that reveal a mistake before a long run: images, classes, the first and last names,
        images per class.

        `notes` are others.
        """
        if self.classes is None:
            names = f"labels {self.labels.min()} to {self.labels.max()} without class names"
            counts = np.unique(self.labels, return_counts=True)[1]
        else:
            ends = dict.fromkeys(readable(name, 60) for name in (self.classes[0], self.classes[-1]))
            names = f"{len(self.classes):,} class(es) {' to '.join(ends)}"
            counts = np.bincount(self.labels, minlength=len(self.classes))
        each = " to ".join(dict.fromkeys([f"{counts.min():,}", f"{counts.max():,}"]))
        lines = [f"{len(self):,} images, {names}, {each} images per class"]
        empty = (
            [] if self.classes is None else [self.classes[i] for i in np.flatnonzero(counts == 0)]
        )
        if empty:
            few = ", ".join([readable(name, 60) for name in empty[:5]] + ["..."] * (len(empty) > 5))
            lines.append(
                f"no images of {len(empty):,} class(es): {few}; the labels of the others do not"
                " move"
            )
        return lines

    def check_classes(self) -> None:
        """ValueError where the class names say that this is not training data but, say, the folder
        above it.

        Data converted with `fap-convert --allow-odd-classes` passes.
        """
        if self.classes is not None and not self.odd_classes_are_meant:
            check_class_names(self.path, self.classes)

    @abstractmethod
    def _content_crc32(self) -> int:
        """See `identity`."""

    def _crc32_of_some(self, crc32: int, read: Callable[[int], bytes]) -> int:
        """Continue a checksum with the bytes that `read` gives for IDENTITY_SAMPLES samples."""
        for index in np.linspace(
            0, len(self) - 1, min(IDENTITY_SAMPLES, len(self)), dtype=int
        ).tolist():
            crc32 = zlib.crc32(read(index), crc32)
        return crc32

    def close(self) -> None:  # noqa: B027
        """Release file handles."""


def check_class_names(path: Path, classes: Sequence[str]) -> None:
    """ValueError for a single class, and for names such as train and val, which are an ImageNet
    root's folders.
    """
    splits = [name for name in classes if re.sub("[^a-z]", "", name.lower()) in SPLITS]
    meant = "if they are meant, convert with --allow-odd-classes"
    # Half of them or two, but not one among many: vehicles include a train.
    if splits and (2 * len(splits) >= len(classes) or len(splits) > 1):
        inner = readable(path / splits[0])
        names = shown(", ".join(splits))
        raise ValueError(
            f"{readable(path)}: class folders called {names} look like parts of a data set: give"
            f" {inner}, or, {meant}"
        )
    if len(classes) == 1:
        only = shown(classes[0])
        raise ValueError(
            f"{readable(path)}: the only class is {only}: give a folder with one folder per class,"
            f" or, {meant}"
        )
