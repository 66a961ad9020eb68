"""Several `.beton` files as one data set: `shards/*.beton`.

The order is that of the sorted paths, then that in each file: zero-padded numbers, as
`fap-convert --shard` writes them, give the order of the one file that was divided.
"""

import glob
import re
import struct
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np

from pipelines.ahead import run_ahead
from pipelines.boxes import BOX_FIELDS, Annotations
from pipelines.files import listed, readable, shown
from pipelines.sources.beton import BetonStore
from pipelines.sources.handles import OpenFiles
from pipelines.store import Store

OPENERS = 4  # threads: they cost a tenth on a local disk, and hide the latency of a network one
OPENED_AHEAD = 16  # shards whose class names are in memory at once
MOST_NOTES = 5  # of the shards
MOST_NAMED = 6  # missing shards
NUMBERED = re.compile(r"(?P<name>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.beton", re.DOTALL)


def is_pattern(path: str | Path) -> bool:
    """Whether it is a pattern for several files. A file or folder of that very name is none."""
    return glob.has_magic(str(path)) and not Path(path).exists()


def shards_of(pattern: str | Path) -> list[Path]:
    """The files that a pattern matches, in the order of their paths.

    Raises:
        ValueError: there are none, one is no `.beton`, or of files that are called
            `NAME-3-of-8.beton` some are missing.
    """
    paths = sorted(Path(path) for path in glob.glob(str(pattern), recursive=True))
    if not paths:
        raise ValueError(f"{readable(pattern)}: no file matches this pattern")
    for path in paths:
        if not BetonStore.accepts(path):
            raise ValueError(
                f"{readable(pattern)}: matches {readable(path)}, which is no .beton file:"
                " a pattern such as 'shards/*.beton' leaves others out"
            )
    _refuse_missing(pattern, paths)
    return paths


def _refuse_missing(pattern: str | Path, paths: Sequence[Path]) -> None:
    """ValueError where a job of `fap-convert --shard` has not written its file."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for path in paths:
        numbered = NUMBERED.fullmatch(str(path))
        if numbered is not None:
            found[numbered["name"], numbered["count"]].add(int(numbered["number"]))
    for (name, digits), numbers in found.items():
        count = int(digits)
        n_missing = count - len(numbers)
        if n_missing > 0:
            first = 0 if 0 in numbers else 1  # fap-convert --shard counts from 1 on
            missing = (number for number in range(first, first + count) if number not in numbers)
            files = [
                f"{name}-{number:0{len(digits)}}-of-{digits}.beton"
                for number in islice(missing, MOST_NAMED)
            ]
            raise ValueError(
                f"{readable(pattern)}: {n_missing:,} of {count:,} shards are missing:"
                f" {listed(files, longest=200)}: convert them; to use only some, give them"
                " names without '-of-'"
            )


class ShardedStore(Store):
    """The samples of all files that a pattern matches. They have the same classes.

    Raises:
        ValueError: no file, one that is no `.beton`, or other class names in one of them.
        DamagedData: as `BetonStore`; the message names the file.
    """

    described_as = "several .beton files (in quotes: 'shards/*.beton')"

    shards: list[BetonStore]

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.shards = []
        openings = _openings(shards_of(self.path), OpenFiles())
        with closing(run_ahead(openings, OPENERS, OPENED_AHEAD)) as opened:
            for shard in opened:
                self.shards.append(shard)
                self._take_classes(shard)
        self._join()

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """A pattern, to which nothing of that very name exists."""
        return is_pattern(path)

    def read(self, index: int) -> np.ndarray:
        """See `Store.read`."""
        shard, within = self._place_of(index)
        return self.shards[shard].read(within)

    def read_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """See `Store.read_many`: each shard reads its own at once."""
        rows_of: dict[int, list[int]] = defaultdict(list)
        places = [self._place_of(index) for index in indices]
        for row, (shard, _) in enumerate(places):
            rows_of[shard].append(row)
        found: list[np.ndarray | None] = [None] * len(places)
        for shard, rows in rows_of.items():
            read = self.shards[shard].read_many([places[row][1] for row in rows])
            for row, data in zip(rows, read, strict=True):
                found[row] = data
        return [data for data in found if data is not None]

    def is_proven(self, index: int) -> bool:
        shard, within = self._place_of(index)
        return self.shards[shard].is_proven(within)

    def file(self, index: int) -> Path:
        """The shard that holds sample `index`."""
        return self.shards[self._place_of(index)[0]].path

    def name_of(self, index: int) -> str:
        """The shard, and the sample's number in it."""
        shard, within = self._place_of(index)
        return self.shards[shard].name_of(within)

    def files(self) -> list[Path]:
        """See `Store.files`."""
        return [path for shard in self.shards for path in shard.files()]

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    def _place_of(self, index: int) -> tuple[int, int]:
        """The number of its shard, and its number there."""
        if not 0 <= index < self._starts[-1]:
            raise IndexError(index)
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _take_classes(self, shard: BetonStore) -> None:
        """ValueError unless they are those of the first one, which all then share in memory."""
        first = self.shards[0]
        why = _difference(first.classes, shard.classes)
        if not why and (first.annotations is None) != (shard.annotations is None):
            why = "only one of the two has boxes"
        if why:
            raise ValueError(
                f"{readable(shard.path)} does not belong with {readable(first.path)}: {why}"
            )
        shard.classes = first.classes

    def _join(self) -> None:
        """The tables of all, of which those of each become views: nothing is there twice."""
        shards = self.shards
        self._starts = [0]
        for shard in shards:
            self._starts.append(self._starts[-1] + len(shard))
        self.classes = shards[0].classes
        self.odd_classes_are_meant = all(shard.odd_classes_are_meant for shard in shards)
        for name in ("heights", "widths", "labels", "modes", "sizes"):
            joined = np.concatenate([getattr(shard, name) for shard in shards])
            setattr(self, name, joined)
            for shard, start in zip(shards, self._starts, strict=False):
                setattr(shard, name, joined[start : start + len(shard)])
        annotations = [shard.annotations for shard in shards if shard.annotations is not None]
        if annotations:
            self.annotations = _joined(annotations)
            self.labels = np.arange(len(self.labels))  # an image's label is its number
        notes = [note for shard in shards for note in shard.notes]
        if len(notes) > MOST_NOTES:
            notes[MOST_NOTES:] = [f"and {len(notes) - MOST_NOTES:,} more notes on its files"]
        n = len(shards)
        self.notes = (f"{n:,} file(s), {shards[0].path.name} to {shards[-1].path.name}", *notes)

    def _content_crc32(self) -> int:
        if len(self.shards) == 1:  # the same data as the one file
            return self.shards[0]._content_crc32()
        crc32 = 0
        for shard in self.shards:
            crc32 = zlib.crc32(struct.pack("<I", shard.tables_crc32), crc32)
            if shard.crc32 is not None:
                crc32 = zlib.crc32(shard.crc32.tobytes(), crc32)
        if any(shard.crc32 is None for shard in self.shards):
            crc32 = self._crc32_of_some_samples(crc32)
        return crc32


def _openings(paths: Sequence[Path], among: OpenFiles) -> Iterator[Callable[[], BetonStore]]:
    def opening(path: Path) -> Callable[[], BetonStore]:
        return lambda: BetonStore(path, among=among)

    for path in paths:
        yield opening(path)


def _difference(first: Sequence[str] | None, other: Sequence[str] | None) -> str:
    """How the class names of a shard differ from those of the first; nothing if they do not."""
    if first == other:
        return ""
    if first is None or other is None:
        return "only one of the two names classes"
    for i, (a, b) in enumerate(zip(first, other, strict=False)):
        if a != b:
            return f"its class {i} is {shown(b, 60)}, not {shown(a, 60)}"
    return f"it names {len(other):,} classes, not {len(first):,}"


def _joined(parts: Sequence[Annotations]) -> Annotations:
    """The boxes of all images, one after the other."""
    firsts = [np.zeros(1, np.int64)]
    n_boxes = 0
    for part in parts:
        firsts.append(part.first[1:] + n_boxes)
        n_boxes += len(part.classes)
    fields = {}
    for name in BOX_FIELDS:
        fields[name] = np.concatenate([getattr(part, name) for part in parts])
    return Annotations(np.concatenate(firsts), **fields)
