"""Images to evaluate on: how they are read for a checkpoint, and what they are."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from concurrent.futures import Executor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import pipelines
from fap.sections import DataConfig
from fap.tasks.base import Task
from pipelines import Batch, EpochPlan, Store
from pipelines.back_ends import EvalFilter
from pipelines.corrupt_batches import corrupted
from pipelines.sizes import Size, sides_of, size_in_words
from pipelines.sources import arrays

BackEnd = str  # one of `pipelines.BACK_ENDS`
Batches = Generator[tuple[Tensor, Tensor], None, None]
"""uint8 images (B, 3, H, W), and what each row is: (B, ...)."""

# What computes pixels, by name and module: another version may round otherwise.
PIXELS = {
    "opencv": "cv2",
    "pillow": "PIL",
    "scipy": "scipy",
    "numpy": "numpy",
    "simplejpeg": "simplejpeg",
}
NO_LABEL = -1  # of a padding row, for `pipelines.corrupt_batches.build`


@dataclass(frozen=True)
class Reading:
    """How images are read for one checkpoint, whichever they are."""

    task: Task
    size: Size  # pixels: of the model's images
    resize: int  # pixels: the shorter side before the centre crop
    crop: Literal["center", "letterbox"]
    filter: EvalFilter
    batch: int
    device: str
    back_end: BackEnd | None  # None: the one that suits the data

    @classmethod
    def of(
        cls,
        task: Task,
        data: DataConfig,
        *,
        batch: int | None,  # None: what suits the task
        device: str,
        back_end: BackEnd | None,
    ) -> Reading:
        """As a checkpoint's own validation reads them: its task, its config's `data`."""
        return cls(
            task=task,
            size=data.size,
            resize=data.resize,
            crop=data.eval_crop,
            filter=data.eval_filter,
            batch=batch or task.eval_batch,
            device=device,
            back_end=back_end,
        )

    def back_end_for(self, path: Path) -> BackEnd:
        """The back end that reads the data at `path`."""
        if self.back_end is not None:
            return self.back_end
        if path.is_dir():
            return "reference"
        # On CPU cores also where a GPU is: their pixels are Pillow's.
        return pipelines.best_loader([], gpu=False)

    def as_stored(self) -> Reading:
        """For images that have the model's size already: no resize, no crop."""
        return replace(self, resize=max(sides_of(self.size)))

    @property
    def fitted(self) -> int | str:
        """What fits an image into `size`: `resize`, which means nothing to a letterbox, or that."""
        if self.crop == "letterbox":
            return self.crop
        return self.resize

    def geometry(self) -> dict[str, Any]:
        """What an image goes through, as a part of an identity."""
        field = "crop" if self.crop == "letterbox" else "resize"
        return {"size": self.size, field: self.fitted, "filter": self.filter}


def usable_device(device: str) -> str:
    """`device` if torch can use it. Raises ValueError."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


@cache
def pixel_versions() -> dict[str, str | None]:
    """The versions of what computes pixels; None for what is not there, and so computes none."""
    versions: dict[str, str | None] = {}
    for name, module in PIXELS.items():
        versions[name] = None
        with suppress(ImportError):
            versions[name] = import_module(module).__version__
    return versions


class Seen(NamedTuple):
    """An open store, and what it was when it was looked at."""

    store: Store
    identity: dict[str, Any]
    stamps: str


def look_at(store: Store) -> Seen:
    # The stamps first: a change from here on is noticed.
    stamps = stamps_of(store.files())
    return Seen(store, store.identity(), stamps)


def stamps_of(files: Iterable[Path]) -> str:
    """Sizes and times of files as they are now: another value means that one has changed.

    Needed because a store's identity covers only some images where there are no checksums.
    `st_ctime` also shows a replacement that was given the old date.
    """
    sha256 = hashlib.sha256()
    for file in files:
        found = os.stat(file)
        numbers = f"\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\0{found.st_ino}\n"
        sha256.update(os.fsencode(file) + numbers.encode())
    return sha256.hexdigest()


class Corruption(NamedTuple):
    """A corruption of stored images, computed here."""

    name: str
    severity: int
    seed: int


class Opened(ABC):
    """One set of images, open."""

    classes: tuple[str, ...] | None  # names in the order of the labels
    labels: tuple[int, int]  # the least and the greatest
    count: int  # images
    n_batches: int
    store: Store | None  # that the images are in; None: in arrays
    identity: dict[str, Any]
    """JSON: what the images are, by content, and what is done to them; `files` are the stamps."""
    unbuilt = False
    """A kept set that is not there yet: `EvalSet.build` it, then open it again."""
    unused: tuple[str, ...] = ()
    """What of the folder belongs to the set in no way, and what of its images is left out."""

    @abstractmethod
    def stamps(self) -> str:
        """Of the files as they are now, to be compared with those of `identity`."""

    @abstractmethod
    def batches(self) -> Batches:
        """All images once, with their targets."""


class StoredImages(Opened):
    """The images of a store, resized and cropped as for validation."""

    store: Store

    def __init__(self, reading: Reading, seen: Seen) -> None:
        store = seen.store
        self.store = store
        self.reading = reading
        self.device = reading.device
        self.plan = self._plan_of(len(store), reading.batch)
        back_end = reading.back_end_for(store.path)
        self.loader = pipelines.open_loader(
            back_end, store, size=reading.size, device=reading.device
        )
        self.references = reading.task.references(store, self.plan)
        self.classes = store.classes
        self.labels = reading.task.labels(store)
        self.count = len(store)
        self.n_batches = len(self.plan)
        self.identity = {
            **reading.geometry(),
            "batch": reading.batch,
            "back end": back_end,
            "pixels": pixel_versions(),
            "data": seen.identity,
            "files": seen.stamps,
        }

    def stamps(self) -> str:
        return stamps_of(self.store.files())

    def batches(self) -> Batches:
        # All at once, so that no batch waits for a copy.
        return self._beside(self.references.to(self.device))

    def labelled(self) -> Batches:
        """All images once, with the store's own labels whatever the task; `NO_LABEL` is padding."""
        return self._beside(torch.from_numpy(self.plan.look_up(self.store.labels, NO_LABEL)))

    def first(self, most: int) -> tuple[Tensor, Tensor]:  # uint8 (B, 3, H, W), (B, ...), on the CPU
        """The first images with their targets; no others are read or corrupted."""
        n = min(most, self.count)
        plan = self._plan_of(n, n)
        references = self.reading.task.references(self.store, plan)
        with closing(self._shown(plan)) as batches:
            return next(batches).images.cpu(), references[0]

    def _plan_of(self, count: int, batch: int) -> EpochPlan:
        """The first `count` images, `batch` at a time."""
        return pipelines.eval_plan(
            self.store.heights[:count],
            self.store.widths[:count],
            size=self.reading.size,
            resize=self.reading.resize,
            batch=batch,
            crop=self.reading.crop,
            filter=self.reading.filter,
        )

    def _beside(
        self,
        values: Tensor,  # (steps, B, ...)
    ) -> Batches:
        with closing(self._shown(self.plan)) as batches:
            for batch in batches:
                yield batch.images, values[batch.step]

    def _shown(self, plan: EpochPlan) -> Generator[Batch, None, None]:
        return self.loader.load(plan)


class CorruptedImages(StoredImages):
    """The images of a store, corrupted by `workers` after resize and crop."""

    def __init__(
        self, reading: Reading, seen: Seen, corruption: Corruption, workers: Executor
    ) -> None:
        super().__init__(reading, seen)
        self.corruption = corruption
        self.workers = workers
        self.identity["corrupted"] = corruption._asdict()

    def _shown(self, plan: EpochPlan) -> Generator[Batch, None, None]:
        return corrupted(
            super()._shown(plan), plan.index, pool=self.workers, **self.corruption._asdict()
        )


class ArrayImages(Opened):
    """One severity of a corruption of CIFAR-10-C: images of the model's size, shown as they are."""

    store = None

    def __init__(
        self, reading: Reading, file: Path, severity: int, classes: tuple[str, ...]
    ) -> None:
        """Raises ValueError for images of another size, DamagedData and OSError."""
        self.files = [file, file.with_name("labels.npy")]
        stamps = self.stamps()  # first, as in `look_at`
        part = arrays.read_severity(file, severity, len(classes))
        self.part = part
        height, width = part.images.shape[1:3]
        sides = sides_of(reading.size)
        if (height, width) != sides:
            raise ValueError(
                f"{file}: its images have {height} x {width} pixels, "
                f"the model takes {size_in_words(sides)}"
            )
        self.batch = reading.batch
        self.starts = range(0, len(part.images), reading.batch)
        self.classes = classes
        self.labels = (int(part.labels.min()), int(part.labels.max()))
        self.count = len(part.images)
        self.n_batches = len(self.starts)
        self.identity = {
            "content": part.content,
            "severity": severity,
            "batch": reading.batch,
            "files": stamps,
        }

    def stamps(self) -> str:
        return stamps_of(self.files)

    def batches(self) -> Batches:
        # The benchmark is one of class labels: they are the targets, and no row is padding.
        labels = torch.from_numpy(self.part.labels)
        for start in self.starts:
            rows = slice(start, start + self.batch)
            images = torch.from_numpy(self.part.images[rows].copy()).permute(0, 3, 1, 2)
            yield images, labels[rows]
