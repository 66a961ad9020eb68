"""Sets of images to evaluate on: what each one is, and how it is opened."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pipelines
from fap.evaluate.images import (
    ArrayImages,
    CorruptedImages,
    Corruption,
    Opened,
    Reading,
    Seen,
    StoredImages,
    look_at,
)
from fap.tasks.base import Judge, Result, Task
from fap.tasks.labels import ClassMap
from pipelines import Store
from pipelines.corrupt_store import CorruptedStore
from pipelines.pixel_store import PixelStore
from pipelines.sources import cifar10
from pipelines.sources.image_files import ImageFilesStore


@dataclass(frozen=True)
class EvalSet(ABC):
    """One number's worth of images. It can be opened more than once."""

    key: str  # clean | BENCHMARK | BENCHMARK/CORRUPTION/SEVERITY | folder/NAME
    source: Path  # for messages
    reading: Reading
    class_map: ClassMap | None = field(default=None, kw_only=True)
    """What its classes are among the model's; None: they have the model's names."""

    @abstractmethod
    def open(self) -> AbstractContextManager[Opened]:
        """Raises ValueError, OSError, ImportError or DamagedData."""

    def judge(self, task: Task) -> Judge:
        """What its images are judged by: the task, unless it has measures of its own."""
        return task

    def in_words(self, task: Task, result: Result) -> str:
        """The number that matters most, for the progress of the work."""
        number = result[task.primary]
        return f"{task.percents[task.primary]} {number:.2%} of {result['count']:,} images"

    def build(self) -> None:  # noqa: B027
        """Make what `open` is to show, unless it is there. Raises as `open`."""


@dataclass(frozen=True)
class CleanSet(EvalSet):
    """A store that somebody else opened, and closes."""

    data: Seen

    @contextmanager
    def open(self) -> Iterator[StoredImages]:
        yield StoredImages(self.reading, self.data)


@dataclass(frozen=True)
class ComputedSet(EvalSet):
    """The same, corrupted here."""

    data: Seen
    corruption: Corruption
    workers: Executor

    @contextmanager
    def open(self) -> Iterator[CorruptedImages]:
        yield CorruptedImages(self.reading, self.data, self.corruption, self.workers)


@dataclass(frozen=True)
class CorruptedStoreSet(EvalSet):
    """The same, corrupted as they are stored: photographs that a detector resizes afterwards."""

    data: Seen
    corruption: Corruption
    workers: Executor

    @contextmanager
    def open(self) -> Iterator[StoredImages]:
        settings = self.corruption._asdict()
        store = CorruptedStore(self.data.store, pool=self.workers, **settings)
        identity = self.data.identity | {"corrupted": settings}
        yield StoredImages(self.reading, Seen(store, identity, self.data.stamps))


def as_its_files_show(store: Store) -> Store:
    """Files of a folder or a tar as benchmarks mean them: a PNG is its own pixels."""
    return PixelStore(store) if isinstance(store, ImageFilesStore) else store


def whole(store: Store) -> Store:
    """The view that shows a folder as training and validation see it, PNGs as JPEGs."""
    return store


@dataclass(frozen=True)
class StoredSet(EvalSet):
    """The folder or `.beton` at `source`."""

    view: Callable[[Store], Store] = field(default=as_its_files_show, kw_only=True)
    """What of the store is shown, and how; it raises ValueError for a wrong folder."""

    @contextmanager
    def open(self) -> Iterator[StoredImages]:
        with closing(pipelines.open_store(self.source)) as store:
            seen = self.view(store)
            images = StoredImages(self.reading, look_at(seen))
            images.unused = seen.notes
            yield images


@dataclass(frozen=True)
class ArraySet(EvalSet):
    """One severity of the CORRUPTION.npy at `source`."""

    severity: int
    classes: tuple[str, ...]  # in the order of its labels

    @contextmanager
    def open(self) -> Iterator[ArrayImages]:
        images = ArrayImages(self.reading, self.source, self.severity, self.classes)
        _, greatest = images.labels
        if greatest < len(cifar10.CLASSES) < len(self.classes):
            raise ValueError(
                f"{self.source}: labels 0 to {greatest}: those of CIFAR-10-C, where "
                f"{len(self.classes)} classes are expected: give its folder to --cifar10-c"
            )
        yield images
