"""Files that many threads read at any place; of many, a bounded number is open at once."""

import os
import resource
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import IO

from pipelines.files import open_regular, readable
from pipelines.store import DamagedData

FEWEST_OPEN = 16
MOST_OPEN = 1 << 14
AT_ONCE = 1 << 30  # bytes: Linux reads at most 2 GiB


class _Open:
    """An open file, closed when nobody holds it: a thread that still reads from it does."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def __del__(self) -> None:
        self.file.close()


class Handle:
    """A regular file. It stays open, or among others, of which only those read last do.

    Raises:
        ValueError, OSError: as `open_regular`.
    """

    def __init__(self, path: Path, among: "OpenFiles | None" = None) -> None:
        self.path = path
        self._among = among
        self._is_closed = False
        opened = _Open(open_regular(path))
        self._stamp = _stamp_of(opened.file)
        self.size = self._stamp[2]  # bytes, when it was opened first
        self._held: _Open | None = None
        if among is None:
            self._held = opened
        else:
            among.add(self, opened)

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset` on, or what the file has of them.

        pread, not mmap: a file that shrinks under us is a short count instead of a SIGBUS.

        Raises:
            OSError: as the file system has it.
            DamagedData: another file lies there since.
            ValueError: it is closed.
        """
        opened = self._opened()
        descriptor = opened.file.fileno()
        raw = os.pread(descriptor, min(size, AT_ONCE), offset)
        if len(raw) == size:
            return raw
        parts = [raw]
        n_read = len(raw)
        while parts[-1] and n_read < size:
            parts.append(os.pread(descriptor, min(size - n_read, AT_ONCE), offset + n_read))
            n_read += len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        self._is_closed = True
        self._held = None
        if self._among is not None:
            self._among.remove(self)

    def _opened(self) -> _Open:
        if self._held is not None:
            return self._held
        if self._is_closed or self._among is None:
            raise ValueError(f"{readable(self.path)}: is closed")
        opened = self._among.find(self)
        if opened is None:
            opened = _Open(open_regular(self.path))
            # What was checked when the file was opened first holds for that file only.
            if _stamp_of(opened.file) != self._stamp:
                raise DamagedData(f"{readable(self.path)}: was changed while it was in use")
            self._among.add(self, opened)
        return opened


def _stamp_of(file: IO[bytes]) -> tuple[int, int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class OpenFiles:
    """Which of many files are open: those that were read last.

    `most` of them: by default a quarter of what the process may have open (`ulimit -n`), since it
    reads two data sets and needs files for other things.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._opened: OrderedDict[Handle, _Open] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._opened)

    def find(self, handle: Handle) -> _Open | None:
        """The file if it is open; from now on it is the one that was read last."""
        with self._lock:
            opened = self._opened.get(handle)
            if opened is not None:
                self._opened.move_to_end(handle)
            return opened

    def add(self, handle: Handle, opened: _Open) -> None:
        """Keep it open; those that were not read for longest make room."""
        most = self._most or _a_quarter_of_the_limit()
        dropped = []
        with self._lock:
            self._opened[handle] = opened
            while len(self._opened) > most:
                dropped.append(self._opened.popitem(last=False))
        # They are closed here, outside the lock.

    def remove(self, handle: Handle) -> None:
        with self._lock:
            self._opened.pop(handle, None)


def _a_quarter_of_the_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_OPEN
    return min(max(soft // 4, FEWEST_OPEN), MOST_OPEN)
