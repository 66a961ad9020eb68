"""The folder that corrupted copies go to: what they are made of, and which sets of them are whole.

FOLDER/CORRUPTION/SEVERITY is a set, as ImageNet-C is published, or SEVERITY.beton. A set gets its
name when it is complete. So a command that was stopped goes on where it was, if it would make the
same images: a hidden record says what the sets were made of.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.files import (
    listed,
    lock,
    read_regular,
    readable,
    shown,
    sync_file_system,
    sync_folder,
    write_whole,
)
from pipelines.sources.sidecar import sidecar_path

RECORD = ".fap-corrupt.json"  # hidden: it is none of the benchmark's sets
MOST_RECORD = 1 << 28  # bytes; it holds the names of the classes
TRIES = 10  # to remove a folder, while a worker that was stopped writes its last image
SECONDS_BETWEEN_TRIES = 0.3


class CopiesFolder:
    """`root`, for sets made of `made_of`: all that decides their pixels, but for their names.

    Raises ValueError for a folder that holds something else, or sets made of something else;
    OSError. Nothing is written yet.
    """

    def __init__(self, root: Path, made_of: dict[str, Any], *, is_beton: bool) -> None:
        self.root = root
        self.made_of = json.loads(json.dumps(made_of))  # as it is read again
        self.is_beton = is_beton
        self._check()

    def begin(self) -> None:
        """Make the folder and its record. Raises as the class."""
        self.root.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.made_of, indent=1).encode()
        try:
            write_whole(self.root / RECORD, [content], overwrite=False)
        except FileExistsError:  # perhaps by another command since
            self._check()

    def place(self, name: str, severity: int) -> Path:
        suffix = ".beton" if self.is_beton else ""
        return self.root / name / f"{severity}{suffix}"

    def has(self, name: str, severity: int) -> bool:
        """Whether the set is there. ValueError where something else has its name."""
        place = self.place(name, severity)
        if not os.path.lexists(place):
            return False
        if place.is_file() if self.is_beton else place.is_dir():
            return True
        raise ValueError(f"{readable(place)}: is in the way; remove it")

    @contextmanager
    def turn(self, name: str, severity: int) -> Iterator[None]:
        """For the block no other command makes this set. ValueError if one does."""
        place = self.place(name, severity)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_name(f".{place.name}.lock"), "ab") as file:
            try:
                lock(file)  # gone with its process, even a killed one
            except BlockingIOError:
                raise ValueError(f"{readable(place)}: another command is making it") from None
            for left in place.parent.glob(f".{place.name}.*.part"):  # by a killed one
                remove_folder(left)
            if self.is_beton and not place.exists():  # killed between its two renames
                sidecar_path(place).unlink(missing_ok=True)
            yield
            # Left behind after a failure: whoever waits has the same file open.
            with suppress(FileNotFoundError):
                os.unlink(file.name)

    def _check(self) -> None:
        if not os.path.lexists(self.root):
            return
        if not self.root.is_dir():
            raise ValueError(f"{readable(self.root)}: is no folder; choose another name")
        record = self.root / RECORD
        if not os.path.lexists(record):
            others = sorted(os.listdir(self.root))
            others = [name for name in others if not name.startswith(f".{RECORD}")]  # half a record
            if others:
                raise ValueError(
                    f"{readable(self.root)}: holds something else already ({listed(others)}); "
                    "choose a new or an empty folder"
                )
            return
        try:
            found = json.loads(read_regular(record, MOST_RECORD))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{readable(record)}: is no record of fap-corrupt: {error}") from None
        if found != self.made_of:
            raise ValueError(
                f"{readable(self.root)}: holds sets that were made otherwise: "
                f"{_difference(found, self.made_of)}; choose another folder"
            )


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """What a record says otherwise, in words."""
    if not isinstance(found, dict):
        return "its record is none"
    parts = []
    for key in {**found, **wanted}:
        there, here = found.get(key), wanted.get(key)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            inner = [k for k in {**there, **here} if there.get(k) != here.get(k)]
            there = {k: there.get(k) for k in inner}
            here = {k: here.get(k) for k in inner}
        parts.append(f"{key} was {shown(there, 80)} and is {shown(here, 80)}")
    return ", ".join(parts)


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """A new folder, which is called `place` when the block has ended; where that fails it is gone.

    Raises OSError.
    """
    part = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        yield part
        sync_file_system(part)
        os.rename(part, place)
    except BaseException:
        remove_folder(part)
        raise
    sync_folder(place.parent)


def remove_folder(folder: Path) -> None:
    """As far as possible: what is left is hidden, and removed by the next command."""
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(SECONDS_BETWEEN_TRIES)
