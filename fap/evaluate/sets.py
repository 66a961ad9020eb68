"""Sets of images to evaluate on: what each one is, and how it is opened."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
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
from pipelines.corrupt_store import CorruptedStore


@dataclass(frozen=True)
class EvalSet(ABC):
    """One number's worth of images. It can be opened more than once."""

    key: str  # clean | BENCHMARK/CORRUPTION/SEVERITY | imagenet_r | stylized
    source: Path  # for messages
    reading: Reading

    @property
    def restrict(self) -> bool:
        """Only the logits of its own classes count."""
        return self.key == "imagenet_r"

    @abstractmethod
    def open(self) -> AbstractContextManager[Opened]:
        """Raises ValueError, OSError, ImportError or DamagedData."""

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


@dataclass(frozen=True)
class StoredSet(EvalSet):
    """The folder or `.beton` at `source`."""

    @contextmanager
    def open(self) -> Iterator[StoredImages]:
        with closing(pipelines.open_store(self.source, exact=True)) as store:
            yield StoredImages(self.reading, look_at(store))


@dataclass(frozen=True)
class ArraySet(EvalSet):
    """One severity of the CORRUPTION.npy at `source`."""

    severity: int

    @contextmanager
    def open(self) -> Iterator[ArrayImages]:
        yield ArrayImages(self.reading, self.source, self.severity)
