"""The folder of a run: one process at a time, and nothing written before the run has proved that it
can start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from pipelines.files import lock, write_whole

LOCK = ".lock"
FILES = (LOCK, "config.yaml", "versions.json", "metrics.jsonl", "result.json")


class RunFolder:
    """`path`, and who may write into it.

    `take` locks it, `begin` writes the first files, `release` unlocks it and, if the run has not
    begun, leaves the place as it was. Ranks other than the first only read and call none of them.
    """

    def __init__(self, path: Path, say: Callable[[str], Any]) -> None:
        self.path = path
        self.begun = False
        self._say = say
        self._lock: IO[bytes] | None = None
        self._made: list[Path] = []  # the folders that were not there, the outermost first
        self._was_empty = False
        self._exclusive = True
        self._written: list[tuple[Path, Path | None]] = []  # and where their former content lies

    def take(self, *, may_go_on: bool) -> None:
        """Lock the folder, made where it is missing.

        Raises:
            ValueError: another process holds it; or it holds an earlier run and not `may_go_on`; or
                one of its files is something else, such as a named pipe, on which we would wait for
                ever.
            OSError: it cannot be made.
        """
        for path in (self.path / name for name in FILES):
            if os.path.lexists(path) and not path.is_file():
                raise ValueError(
                    f"{path}: is not a file, and a run writes one of this name; remove it"
                )
        self._made = [p for p in reversed([self.path, *self.path.parents]) if not p.exists()]
        self._lock = self._locked()
        empty = os.listdir(self.path) == [LOCK]
        self._was_empty = empty and self._exclusive
        if not empty and not may_go_on:
            raise ValueError(
                f"{self.path} holds an earlier run and is never overwritten: resume=auto, another"
                " name or seed"
            )

    def _locked(self) -> IO[bytes]:
        for _ in range(100):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                file = open(self.path / LOCK, "ab")  # noqa: SIM115
            except FileNotFoundError:  # a process that could not start has just removed the folder
                continue
            try:
                self._exclusive = lock(file)
                if not self._exclusive:
                    self._say(
                        f"warning: the file system of {self.path} has no locks: never start two"
                        " runs in this folder"
                    )
            except BlockingIOError:
                file.close()
                raise ValueError(
                    f"another process trains in {self.path}: wait for it, or use another name or"
                    " seed (several processes of one run are started with torchrun)"
                ) from None
            # Its last holder may have removed the file after we opened it; then others lock another
            # file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path / LOCK)):
                    return file
            file.close()
        raise OSError(f"{self.path / LOCK}: cannot be made, or others remove it all the time")

    def begin(self, files: Mapping[str, str], step: int) -> None:
        """Write what says how the run runs from `step` on. Raises OSError; `release` then undoes
        it.

        What said otherwise before is kept as NAME-until-step-N, unless none of its steps have been
        saved: then this attempt takes its place.
        """
        for name, text in files.items():
            path = self.path / name
            former: Path | None = None
            if path.exists():
                if path.is_file() and path.read_bytes() == text.encode():
                    continue
                former = path.with_stem(f"{path.stem}-until-step-{step}")
                if step == 0 or former.exists():
                    former = path.with_name(f".{name}.former")
                os.replace(path, former)
            self._written.append((path, former))
            write_whole(path, [text.encode()])

    def has_begun(self) -> None:
        """Nothing can go wrong any more: what `begin` wrote stays."""
        self.begun = True
        for _, former in self._written:
            if former is not None and former.name.startswith("."):
                former.unlink(missing_ok=True)

    def release(self) -> None:
        """Errors are those of a folder that is gone or failing: nobody could do anything about
        them.
        """
        if not self.begun:
            with contextlib.suppress(OSError):
                self._undo()
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
        if not self.begun:
            with contextlib.suppress(OSError):
                for folder in reversed(self._made):
                    folder.rmdir()  # fails if something else has been put there
        if self._lock is not None:
            self._lock.close()
        self._lock = None
        self._made = []

    def _undo(self) -> None:
        if self._was_empty:
            self._remove_all_but_the_lock()
            return
        for path, former in self._written:
            if former is None:
                path.unlink(missing_ok=True)
            else:
                os.replace(former, path)

    def _remove_all_but_the_lock(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
