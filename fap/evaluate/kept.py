"""Corrupted sets that are kept: each one a `.beton` of raw images, computed once, then read."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from fap.evaluate.images import CorruptedImages, Opened
from fap.evaluate.results import digest, safe_name
from fap.evaluate.sets import ComputedSet, EvalSet, StoredSet
from pipelines.corrupt_batches import build
from pipelines.files import lock
from pipelines.progress import tracked
from pipelines.sizes import size_in_words
from pipelines.sources.sidecar import read_sidecar, sidecar_path

SECONDS_BETWEEN_TRIES = 0.5  # while another process builds the set


@dataclass(frozen=True)
class KeptSet(EvalSet):
    """What `computed` shows, kept in `folder`."""

    computed: ComputedSet
    folder: Path

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """The kept images; while they are not there, those they will be made from, as `unbuilt`."""
        with self.computed.open() as computed:
            contents = self._contents(computed)
            file = self._file(contents)
            if not _is_whole(file, contents):
                computed.unbuilt = True
                yield computed
                return
        # By the back end that reads the data, though another one may suit a .beton better: who
        # evaluates a folder needs no second one.
        back_end = self.reading.back_end_for(self.source)
        reading = replace(self.reading.as_stored(), back_end=back_end)
        with StoredSet(self.key, file, reading).open() as stored:
            stored.identity["built from"] = contents
            yield stored

    def build(self) -> None:
        """One process builds the set, others wait for it."""
        with self.computed.open() as computed:
            contents = self._contents(computed)
            file = self._file(contents)
            if _is_whole(file, contents):
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file.with_suffix(".lock"), "ab") as turn:
                _wait_for(turn)
                if not _is_whole(file, contents):
                    self._write(file, contents, computed)

    def _write(self, file: Path, contents: dict[str, Any], computed: CorruptedImages) -> None:
        # There may be one of a build that was killed between its two renames.
        sidecar_path(file).unlink(missing_ok=True)
        with closing(computed.labelled()) as batches:
            build(
                tracked(batches, f"building {file.name}", "batch", computed.n_batches),
                file,
                capacity=computed.n_batches * self.reading.batch,
                classes=computed.classes,
                encoding=contents,
            )

    def _contents(self, computed: CorruptedImages) -> dict[str, Any]:
        """JSON: what the kept set holds, whatever computes it."""
        # The batch changes no pixel. Nor do dates where checksums cover every image. A set is not
        # built again for them.
        irrelevant = {"batch"}
        if getattr(computed.store, "crc32", None) is not None:
            irrelevant.add("files")
        relevant = {k: v for k, v in computed.identity.items() if k not in irrelevant}
        return {"set": self.key, **relevant}

    def _file(self, contents: dict[str, Any]) -> Path:
        key = safe_name(self.key.replace("/", "-"))
        size = size_in_words(self.reading.size).replace(" ", "")
        name = f"{size}-{self.reading.fitted}-{key}-{digest(contents)[:12]}.beton"
        return self.folder / name


def _is_whole(file: Path, contents: dict[str, Any]) -> bool:
    """Whether the kept set is there.

    Raises ValueError for another file of its name, DamagedData for damage.
    """
    if not file.exists():
        return False
    sidecar = read_sidecar(file)
    if sidecar is None or digest(sidecar.encoding) != digest(contents):
        raise ValueError(
            f"{file}: is not the set that it is named for; remove it, and it is built again"
        )
    return True


def _wait_for(turn: IO[bytes]) -> None:
    """Lock an open file, however long another process holds it."""
    while True:
        try:
            lock(turn)
            return
        except BlockingIOError:
            time.sleep(SECONDS_BETWEEN_TRIES)
