"""Some images of a store as a store of its own, and a part held out of one for validation."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.boxes import BOX_FIELDS, Annotations
from pipelines.files import readable
from pipelines.intake.parts import validation_numbers
from pipelines.store import Store

SEED = 0  # of the draw, that of `fap-convert --val-split`


class SubsetStore(Store):
    """The images `numbers` of `whole`, in that order. Nothing is copied but the tables' rows.

    `whole` stays open, and is closed by whoever opened it, once. Class names and the order of the
    classes are those of `whole`, also where no image of a class is left.
    """

    def __init__(
        self,
        whole: Store,
        numbers: np.ndarray,  # int64 (n,)
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(whole.path)
        self.whole = whole
        self.numbers = numbers.astype(np.int64)
        self.classes = whole.classes
        self.heights = whole.heights[numbers]
        self.widths = whole.widths[numbers]
        self.labels = whole.labels[numbers]
        self.modes = whole.modes[numbers]
        self.sizes = whole.sizes[numbers]
        self.notes = tuple(notes)
        self.odd_classes_are_meant = whole.odd_classes_are_meant
        if whole.annotations is not None:
            self.annotations = _boxes_of(whole.annotations, self.numbers)
            self.labels = np.arange(len(numbers))  # an image's label is its number

    def read(self, index: int) -> np.ndarray:
        """See `Store.read`."""
        return self.whole.read(self._number(index))

    def read_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """See `Store.read_many`."""
        return self.whole.read_many([self._number(index) for index in indices])

    def content(self, index: int) -> bytes:
        """See `Store.content`."""
        return self.whole.content(self._number(index))

    def is_proven(self, index: int) -> bool:
        return self.whole.is_proven(self._number(index))

    def file(self, index: int) -> Path:
        return self.whole.file(self._number(index))

    def name_of(self, index: int) -> str:
        """Its file and its number in the whole store."""
        return self.whole.name_of(self._number(index))

    def files(self) -> list[Path]:
        """Those of the whole store: its tables say where the images lie."""
        return self.whole.files()

    def close(self) -> None:
        self.whole.close()

    def _number(self, index: int) -> int:
        if not 0 <= index < len(self.numbers):
            raise IndexError(index)
        return int(self.numbers[index])

    def _content_crc32(self) -> int:
        """Of the whole content, and of which images of it these are."""
        return zlib.crc32(self.numbers.tobytes(), self.whole._content_crc32())


class RelabelledStore(SubsetStore):
    """The images `numbers` of `whole` under other labels, which are places in `classes`."""

    def __init__(
        self,
        whole: Store,
        numbers: np.ndarray,  # int64 (n,)
        labels: np.ndarray,  # int64 (n,)
        classes: Sequence[str],
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(whole, numbers, notes)
        self.classes = tuple(classes)
        self.labels = labels.astype(np.int64)

    def _content_crc32(self) -> int:
        return zlib.crc32(self.labels.tobytes(), super()._content_crc32())


def held_out(store: Store, share: float) -> tuple[SubsetStore, SubsetStore]:
    """`store` without a share of every class, and that share: for training and for validation.

    The images held out are those that `fap-convert --val-split` puts into the second file, in
    whatever form the data are: by labels and order alone. Data for detection have no classes of
    images, so a share of all images is held out.

    Raises:
        ValueError: no image can be spared.
    """
    labels = store.labels
    if store.annotations is not None:
        labels = np.zeros(len(store), np.int64)
    if np.unique(labels, return_counts=True)[1].max() < 2:
        raise ValueError(
            f"{readable(store.path)}: no class has two images, so none can be held out"
        )
    chosen = validation_numbers(labels, share, SEED)
    rest = np.setdiff1d(np.arange(len(store)), chosen)
    of_each = "of every class" if store.annotations is None else "of the images"
    note = (
        f"held out of {readable(store.path)}: {share:g} {of_each}, "
        f"as fap-convert --val-split {share:g} would"
    )
    return SubsetStore(store, rest, store.notes), SubsetStore(store, chosen, [note])


def _boxes_of(
    whole: Annotations,
    numbers: np.ndarray,  # int64 (n,)
) -> Annotations:
    """The boxes of some images, one image after the other."""
    counts = np.diff(whole.first)[numbers]
    first = np.concatenate([[0], np.cumsum(counts)])
    # Every box of every image: where the image's boxes begin, and which of them it is.
    within = np.arange(first[-1]) - np.repeat(first[:-1], counts)
    boxes = np.repeat(whole.first[numbers], counts) + within
    return Annotations(first, **{name: getattr(whole, name)[boxes] for name in BOX_FIELDS})
