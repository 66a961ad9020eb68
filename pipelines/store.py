"""The contract of a source: encoded images by index, with what must be known of them beforehand."""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.boxes import Annotations
from pipelines.files import listed, readable, shown

# How a sample's bytes are to be read; the first two are FFCV's numbers.
JPG = 0  # a JPEG that every decoder shows as an upright RGB picture
RAW = 1  # pixels, RGB in the order height, width, channel
PLANES = 2  # the planes of a 4:2:0 JPEG, decoded: see `planes_bytes`; FFCV has no such mode

MAX_SIDE = 32767  # pixels; an epoch plan's windows are int16
IDENTITY_SAMPLES = 256  # samples whose bytes say what data without checksums is

# Names of folders that are parts of a data set, and not classes.
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


class DamagedData(RuntimeError):  # noqa: N818
    """A data file is not what it says it is.

    The message names the file and, if it is one, the sample.
    """


def planes_bytes(
    heights: np.ndarray,  # integers (N,), pixels
    widths: np.ndarray,  # integers (N,), pixels
) -> np.ndarray:
    """The bytes of samples of mode PLANES, int64 (N,).

    Such a sample is full-range YCbCr as JFIF has it, uint8: Y of height x width, then Cb, then Cr,
    each of half the height and half the width, rounded up. Nothing lies between them.
    """
    heights = np.asarray(heights, np.int64)
    widths = np.asarray(widths, np.int64)
    return heights * widths + 2 * ((heights + 1) // 2) * ((widths + 1) // 2)


class Store(ABC):
    """N encoded images with labels: what plans are drawn for and what loaders read.

    To add a source, write a subclass in pipelines/sources/ and name it in the table there
    (`SOURCES`). It needs:

    - `accepts(path)` and `described_as`, by which `open_store` finds it and errors name it;
    - `__init__(path)`, which fills every attribute below that has no default, and raises ValueError
      for a user's mistake and DamagedData for a file that contradicts itself;
    - `read(index)`.

    The attributes are one row of numbers per image, no pixels: loaders and plans index them freely.
    Opened again, the data must have the same order and labels. Nobody writes to the arrays.

    Data for detection have `annotations`, which `Annotations.check` accepts for the sides and
    `classes`. Then `classes` are those of the boxes, and an image's label is its number.

    `read(index)` is called from many threads at once, with any index, in any order. It returns the
    same bytes each time, and those that the tables announce: a JPEG whose frame header says
    (heights[index], widths[index]), or that many raw pixels, or their planes. What it cannot read
    it refuses. It never returns another sample's bytes, or half of them.

    `identity()` says what the data is, wherever it lies. A run is resumed, and a result is found
    again, only on data of the same identity. So a copy must keep it and a change should alter it:
    neither paths nor times belong into it, but order, labels and sides do. A source that has a
    checksum of every image, or tables of its own, overrides `_content_crc32`.
    """

    described_as = ""  # what `accepts` accepts, for messages: "a .beton file"

    path: Path
    classes: tuple[str, ...] | None  # names in the order of the labels; None: labels have none
    heights: np.ndarray  # int32 (N,), pixels, 1 to MAX_SIDE
    widths: np.ndarray  # int32 (N,), pixels, 1 to MAX_SIDE
    labels: np.ndarray  # int64 (N,), places in `classes` where there are any; see above
    modes: np.ndarray  # uint8 (N,): JPG, RAW or PLANES
    sizes: np.ndarray  # int64 (N,), bytes as they are stored
    annotations: Annotations | None = None  # the boxes of detection
    notes: tuple[str, ...] = ()  # lines to print where the data is opened: what was passed over
    odd_classes_are_meant = False  # see `check_classes`

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether `path`, which exists, is for this source. A look at it, not a check of it."""
        return False

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Bytes of one sample, uint8 (n,): a JPEG, raw RGB in HWC order, or planes.

        n is `sizes[index]`, unless the source stores the image in another form than it serves it.

        Raises:
            DamagedData: the bytes cannot be read, or are not those of the tables or of the
                checksum.
        """

    def read_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """`read` of each, at once where that is faster."""
        return [self.read(index) for index in indices]

    def content(self, index: int) -> bytes:
        """The bytes of one sample as they are stored: a whole PNG, which `read` serves as a JPEG.

        Its identity depends on them. Raises as `read`.
        """
        return self.read(index).tobytes()

    def is_proven(self, index: int) -> bool:
        """Whether `read` compares a sample with a checksum taken when all of it was decoded.

        Then whoever decodes it again may leave out what is not shown, where damage could be.
        """
        return False

    def file(self, index: int) -> Path:
        """The file that holds sample `index`, for messages."""
        return self.path

    def name_of(self, index: int) -> str:
        """Sample `index` by its file and its number there, for messages."""
        return f"{readable(self.file(index))}: sample {index}"

    def files(self) -> list[Path]:
        """Every file that the data are in, once, and those that say more about them."""
        return list(dict.fromkeys(self.file(index) for index in range(len(self))))

    def close(self) -> None:  # noqa: B027
        """Release file handles."""

    # ------------------------------------------------------------------ what the data is

    def identity(self) -> dict[str, Any]:
        """What this data is, wherever it lies: `count`, `classes`, and `content`.

        `content` is a checksum of tables, images and annotations. Without a sidecar, and for a
        folder, it covers the bytes of some images only, spread evenly.
        """
        content = self._content_crc32()
        if self.annotations is not None:
            content = self.annotations.crc32(content)
        return {"count": len(self), "classes": self.classes, "content": f"{content:08x}"}

    def _content_crc32(self) -> int:
        """The checksum in `identity`: of the tables and of the bytes of some samples."""
        return self._crc32_of_some_samples(self._crc32_of_tables())

    def _crc32_of_tables(self, crc32: int = 0) -> int:
        """Continue a checksum with labels, sizes and sides."""
        tables = np.stack([self.labels, self.sizes, self.heights, self.widths])
        return zlib.crc32(tables.astype(np.int64).tobytes(), crc32)

    def _crc32_of_some_samples(self, crc32: int) -> int:
        """Continue a checksum with the content of IDENTITY_SAMPLES samples."""
        n = min(IDENTITY_SAMPLES, len(self))
        for index in np.linspace(0, len(self) - 1, n, dtype=int).tolist():
            crc32 = zlib.crc32(self.content(index), crc32)
        return crc32

    # ------------------------------------------------------------------ for the reader of a log

    def describe(self) -> list[str]:
        """Lines that reveal a mistake before a long run.

        They tell the images, the classes with the first and last names, and images (or boxes) per
        class. `notes` are others.
        """
        if self.annotations is not None:
            return self._describe_boxes(self.annotations)
        if self.classes is None:
            names = f"labels {self.labels.min()} to {self.labels.max()} without class names"
            counts = np.unique(self.labels, return_counts=True)[1]
            return [self._counted(names, counts)]
        counts = np.bincount(self.labels, minlength=len(self.classes))
        lines = [self._counted(_first_to_last(self.classes), counts)]
        return lines + _without("images", self.classes, counts)

    def _counted(self, names: str, counts: np.ndarray) -> str:
        """`counts`: images of each class."""
        return f"{len(self):,} images, {names}, {_least_to_most(counts)} images per class"

    def _describe_boxes(self, annotations: Annotations) -> list[str]:
        """The lines of data with annotations. Crowd boxes count for none of the numbers."""
        assert self.classes is not None
        classes_of_boxes = annotations.classes[~annotations.crowd]
        counts = np.bincount(classes_of_boxes, minlength=len(self.classes))
        n_crowd = int(annotations.crowd.sum())
        n_without = int((np.diff(annotations.first) == 0).sum())
        most = int(annotations.trained_per_image().max())
        lines = [
            f"{len(self):,} images, {len(classes_of_boxes):,} boxes and {n_crowd:,} crowd boxes,"
            f" {_first_to_last(self.classes)}, {_least_to_most(counts)} boxes per class",
            f"{n_without:,} images without boxes, at most {most:,} boxes on one image",
        ]
        return lines + _without("boxes", self.classes, counts)

    def check_classes(self) -> None:
        """ValueError where the class names say that this is not training data.

        It may be, say, the folder above it. Data converted with `fap-convert --allow-odd-classes`
        passes, and so do data with annotations: their classes were named by whoever drew the boxes,
        never by folders.
        """
        if self.classes is None or self.annotations is not None or self.odd_classes_are_meant:
            return
        check_class_names(self.path, self.classes)


def _first_to_last(classes: Sequence[str]) -> str:
    # A single class has one name to show, not two.
    ends = dict.fromkeys(readable(name, 60) for name in (classes[0], classes[-1]))
    return f"{len(classes):,} class(es) {' to '.join(ends)}"


def _least_to_most(counts: np.ndarray) -> str:
    return " to ".join(dict.fromkeys([f"{counts.min():,}", f"{counts.max():,}"]))


def _without(what: str, classes: Sequence[str], counts: np.ndarray) -> list[str]:
    """A line that names the classes of which there is nothing; none where there are none."""
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not empty:
        return []
    return [
        f"no {what} of {len(empty):,} class(es): {listed(empty)};"
        " the labels of the others do not move"
    ]


def check_class_names(path: Path, classes: Sequence[str]) -> None:
    """ValueError for a single class, and for names such as train and val.

    Those are the folders in the root of ImageNet.
    """
    splits = [name for name in classes if _letters(name) in SPLITS]
    remedy = "or, if they are meant, convert with --allow-odd-classes"
    # Half of them or two, but not one among many: vehicles include a train.
    if splits and (2 * len(splits) >= len(classes) or len(splits) > 1):
        raise ValueError(
            f"{readable(path)}: class folders called {shown(', '.join(splits))} look like parts of"
            f" a data set: give {readable(path / splits[0])}, {remedy}"
        )
    if len(classes) == 1:
        raise ValueError(
            f"{readable(path)}: the only class is {shown(classes[0])}:"
            f" give a folder with one folder per class, {remedy}"
        )


def _letters(name: str) -> str:
    """Without digits and the like: `Train2017` is a split too."""
    return re.sub("[^a-z]", "", name.lower())
