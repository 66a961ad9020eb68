"""The folder of a run: one process at a time, and nothing written before the run has begun."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from pipelines.files import lock, write_whole

LOCK = ".lock"
MOST_TRIES = 100  # to lock a folder that others remove meanwhile
FILES = (LOCK, "config.yaml", "versions.json", "metrics.jsonl", "result.json")


class RunFolder:
    """`path`, and who may write into it.

    `take` locks it, `begin` writes the first files once a step has shown that the run can start,
    `has_begun` makes them stay. `release` unlocks it and, if the run has not begun, leaves the
    place as it was. Ranks other than the first only read: they neither take it nor begin.
    """

    def __init__(self, path: Path, say: Callable[[str], Any]) -> None:
        self.path = path
        self.begun = False
        self._say = say
        self._lock: IO[bytes] | None = None
        self._has_locks = True  # its file system
        self._made: list[Path] = []  # the folders that were not there, the outermost first
        self._was_empty = False
        self._written: list[tuple[Path, Path | None]] = []  # and where their former content lies

    def take(self, *, may_go_on: bool) -> None:
        """Lock the folder, made where it is missing.

        Raises:
            ValueError: another process holds it; or it holds an earlier run and not `may_go_on`;
                or one of its files is something else, such as a named pipe, on which we would wait
                for ever.
            OSError: it cannot be made.
        """
        for name in FILES:
            path = self.path / name
            if os.path.lexists(path) and not path.is_file():
                raise ValueError(
                    f"{path}: is not a file, and a run writes one of this name; remove it"
                )
        parents = [self.path, *self.path.parents]
        self._made = [folder for folder in reversed(parents) if not folder.exists()]
        self._lock = self._locked()
        is_empty = os.listdir(self.path) == [LOCK]
        # Without locks another process may be about to write here: nothing of its is removed.
        self._was_empty = is_empty and self._has_locks
        if not is_empty and not may_go_on:
            raise ValueError(
                f"{self.path} holds an earlier run and is never overwritten: "
                "resume=auto, another name or seed"
            )

    def _locked(self) -> IO[bytes]:
        """The lock file, open and locked; the folder is made where it is missing."""
        path = self.path / LOCK
        for _ in range(MOST_TRIES):
            self._make()
            try:
                file = open(path, "ab")  # noqa: SIM115
            except FileNotFoundError:  # a process that could not start has just removed the folder
                continue
            self._lock_file(file)
            # Its last holder may have removed the file after we opened it; then others lock another
            # file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
            file.close()
        raise OSError(f"{path}: cannot be made, or others remove it all the time")

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"run.dir: the folder of the run cannot be made: {error.strerror}"
            raise OSError(error.errno, problem, str(self.path)) from None

    def _lock_file(self, file: IO[bytes]) -> None:
        try:
            self._has_locks = lock(file)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"another process trains in {self.path}: wait for it, or use another name or seed "
                "(several processes of one run are started with torchrun)"
            ) from None
        if not self._has_locks:
            self._say(
                f"warning: the file system of {self.path} has no locks: "
                "never start two runs in this folder"
            )

    def begin(self, files: Mapping[str, str], step: int) -> None:
        """Write what says how the run runs from `step` on.

        What said otherwise before is kept as NAME-until-step-N, unless none of its steps have been
        saved: then this attempt takes its place. Raises OSError; `release` then undoes it.
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
        """Unlock the folder; if the run has not begun, leave the place as it was.

        Raises nothing: errors are those of a folder that is gone or failing, and nobody could do
        anything about them.
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
