"""Checkpoints: one `.safetensors` file each, complete or absent, never pickle.

A file is written under a temporary name, flushed to the disk and renamed, so a crash leaves the old
files and at most a stale temporary one. A CRC32 of the whole file (its own digits read as zeros)
stands in its header: a damaged file is noticed before any of it is used. The checksum is no
signature, so what the file says is not trusted either: `fap.run_meta` checks the metadata,
`fap.evaluate.load` the model's tensors.
"""

import errno
import json
import os
import re
import secrets
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from pipelines.files import (
    GIGABYTE,
    NO_LINKS_HERE,
    first_bytes,
    listed,
    one_line,
    open_regular,
    read_regular,
    shown,
    sync_folder,
    write_whole,
)

MOST_BYTES = 64 * GIGABYTE  # of a file
MOST_HEADER = 100_000_000  # bytes; safetensors reads no larger one either
MOST_META = 1 << 24  # characters of metadata; 21,841 class names are well below a megabyte
COPY_BYTES = 1 << 22  # at a time
LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, little-endian
CHECKSUM = b'"crc32":"'  # unescaped, so no tensor's name and no value of the metadata contains it
ZEROS = b"00000000"  # in place of the checksum's digits while it is computed
NAME = re.compile(r"step_([0-9]+)\.safetensors")
FOLDER = "checkpoints"  # in that of a run
BEST = "best.safetensors"  # beside the others: the checkpoint of the best epoch
# Errors that belong to this one file, as damage does: a dangling or circular link, a bad sector.
OF_THE_FILE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EIO, errno.ENXIO)
# What parsing a header raises if it is nonsense, or nested too deeply.
GARBLED = (
    safetensors.SafetensorError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)


class DamagedCheckpoint(RuntimeError):  # noqa: N818
    """A file that is truncated, garbled or not of this program; the message says which and why."""


# ---------------------------------------------------------------------- the file


class Header(NamedTuple):
    """Offsets in a file, in bytes."""

    digits: int  # where the checksum's digits begin
    end: int  # where the tensors begin


def save(
    path: str | Path,
    tensors: Mapping[str, Tensor],  # any shape, layout, device; views of one storage too
    meta: dict[str, Any],  # JSON
    *,
    overwrite: bool = True,
    **header: str,  # stands beside `meta`, for other readers
) -> None:
    """Write a file completely or not at all.

    Raises OSError (a full disk, say) after removing what it had written; a file at `path` stays as
    it was. Once the file has its name, nothing is raised.
    """
    # One fresh contiguous copy each: safetensors refuses views of one storage, such as a flat
    # buffer's.
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    texts = header | {"meta": json.dumps(meta), "crc32": ZEROS.decode()}
    blob = safetensors.torch.save(copies, texts)
    digits = blob.index(CHECKSUM) + len(CHECKSUM)
    # The checksum is put in between two parts of the blob, so gigabytes are not copied once more.
    parts: list[bytes | memoryview] = [
        blob[:digits],
        b"%08x" % zlib.crc32(blob),
        memoryview(blob)[digits + len(ZEROS) :],
    ]
    write_whole(path, parts, overwrite=overwrite)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (contiguous, on the CPU) and the metadata of a file that `save` wrote.

    Raises DamagedCheckpoint for anything else, a folder or a named pipe too, and OSError where it
    cannot be opened.
    """
    tensors, meta, _ = load_with_content(path)
    return tensors, meta


def load_with_content(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """As `load`, and the file's checksum and size: its content, whatever its name and date."""
    try:
        # The header first: of a huge file that is none of ours nothing more is read.
        digits, end = _find_header(path)
        blob = read_regular(path, MOST_BYTES)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from None
    rest = digits + len(ZEROS)
    begin = zlib.crc32(blob[:digits] + ZEROS)
    checksum = b"%08x" % zlib.crc32(memoryview(blob)[rest:], begin)
    try:
        header = json.loads(blob[LENGTH_BYTES:end])
        if checksum != blob[digits:rest]:
            raise DamagedCheckpoint(f"{path}: {_damage(header, end, len(blob))}")
        meta = _metadata(path, header)
        tensors = safetensors.torch.load(blob)
    except GARBLED as error:
        raise DamagedCheckpoint(f"{path}: garbled header ({one_line(error)})") from error
    return tensors, meta, f"{checksum.decode()}-{len(blob)}"


def _find_header(path: str | Path) -> Header:
    """Look at a file's header alone. Raises as `load`, and ValueError for what is no file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(LENGTH_BYTES)
        end = LENGTH_BYTES + int.from_bytes(head, "little")
        if len(head) == LENGTH_BYTES and end <= min(size, MOST_HEADER):
            head += file.read(end - LENGTH_BYTES)
        if len(head) != end:
            raise DamagedCheckpoint(
                f"{path}: truncated inside its header, or no safetensors file ({size} bytes)"
            )
    mark = head.find(CHECKSUM, LENGTH_BYTES)
    if mark < 0:
        raise DamagedCheckpoint(
            f"{path}: no checksum in its header, so it is no checkpoint of this program"
            " (plain weights: model.init, fap-eval)"
        )
    return Header(mark + len(CHECKSUM), end)


def _damage(header: Any, header_end: int, length: int) -> str:
    """Why the checksum of a file of `length` bytes is wrong."""
    ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    size = header_end + max(ends, default=0)
    if length < size:
        return f"truncated, {length} of {shown(size)} bytes"
    return "wrong checksum"


def _metadata(path: str | Path, header: Any) -> dict[str, Any]:
    text = header["__metadata__"]["meta"]
    if len(text) > MOST_META:
        raise DamagedCheckpoint(
            f"{path}: {len(text):,} characters of metadata, at most {MOST_META:,} are read"
        )
    meta = json.loads(text)
    if not isinstance(meta, dict):
        raise DamagedCheckpoint(f"{path}: its metadata is no mapping but {shown(meta)}")
    return meta


# ---------------------------------------------------------------------- the checkpoints of a run


class Checkpoints:
    """The checkpoints of a run, `folder/step_00001234.safetensors`: the last `keep` of them.

    `folder/best.safetensors` is a second name of the best epoch's, a hard link, so that it stays
    when it is no longer one of the last. It takes room of its own only then.
    """

    def __init__(
        self, folder: str | Path, keep: int = 2, say: Callable[[str], Any] = warnings.warn
    ) -> None:
        """A save needs room for `keep` + 1 files.

        `say` is told about files that `newest` skips or `save` cannot remove.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint must be kept")
        self.folder = Path(folder)
        self.keep = keep
        self.say = say
        self._best: int | None = None  # the step of the best one, once it has been looked at

    def paths(self) -> list[Path]:
        """Complete files, oldest step first; not checked for damage."""
        return [path for path in self._named() if path.is_file()]

    def names(self, step: int) -> dict[str, str]:
        """Where those of a finished run lie, in the run's folder: its last one, and the best."""
        found = {"last": self._path(step)}
        if (self.folder / BEST).is_file():
            found["best"] = self.folder / BEST
        return {name: f"{self.folder.name}/{path.name}" for name, path in found.items()}

    def _named(self) -> list[Path]:
        """Whatever is named like a checkpoint: folders and dangling links too."""
        found = self.folder.glob("step_*.safetensors")
        return sorted((path for path in found if NAME.fullmatch(path.name)), key=_step)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: dict[str, Any],
        best: int | None = None,  # the step of the best checkpoint so far; None: none is kept
    ) -> Path:
        """Save `step`; only once it is complete, remove what is no longer kept. One writer.

        Files of later steps go as well: they are the damaged ones that `newest` skipped when the
        run was resumed. Raises as `fap.checkpoint.save`. What cannot be linked or removed is said,
        not raised: by then the checkpoint has been saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        if path.is_dir():  # before gigabytes are written
            raise IsADirectoryError(
                errno.EISDIR, "a folder has the name of the checkpoint", str(path)
            )
        # What a killed save left behind goes first, since its room may be needed.
        self._remove([*self.folder.glob(".step_*.tmp"), *self.folder.glob(f".{BEST}.*.tmp")])
        save(path, tensors, meta)
        # Before the best one is removed under its first name.
        self.keep_best(best)
        until = [old for old in self.paths() if _step(old) <= step]
        kept = until[-self.keep :]
        self._remove([old for old in self.paths() if old not in kept])
        return path

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.safetensors"

    def keep_best(self, step: int | None) -> None:
        """Make `best.safetensors` the checkpoint of `step`; None: there shall be none.

        It is looked at whenever another process may have left it: one that was killed before it
        could link, or whose last steps were lost with a damaged file.
        """
        second = self.folder / BEST
        if step is None:
            self._remove([second])
            return
        if step == self._best:
            return
        first = self._path(step)
        try:
            if first.is_file():
                _link(first, second)
            elif _step_said(second) != step:
                self._remove([second])
                self.say(
                    f"warning: the checkpoint of the best epoch, step {step}, is not there any "
                    f"more; {second} will be that of the next better one"
                )
            self._best = step
        except OSError as error:
            self.say(f"warning: {second} could not be written: {error}")

    def _remove(self, paths: list[Path]) -> None:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self.say(f"warning: {path} is no longer needed, but cannot be removed: {error}")

    def newest(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """The newest undamaged checkpoint; None where there is nothing of that name at all.

        Raises DamagedCheckpoint where there are files and none is good: we do not start over
        unasked. Raises OSError for what is not the file's own fault, such as a lack of permission.
        """
        named = self._named()
        for path in reversed(named):
            try:
                tensors, meta = load(path)
            except DamagedCheckpoint as error:
                self.say(f"skipped a damaged checkpoint: {error}")
            except OSError as error:
                if error.errno not in OF_THE_FILE:
                    raise
                self.say(f"skipped a checkpoint that cannot be read: {path}: {error.strerror}")
            else:
                return path, tensors, meta
        if named:
            raise DamagedCheckpoint(
                f"{self.folder}: all {len(named)} are damaged; remove them to start over"
            )
        return None


def _link(first: Path, second: Path) -> None:
    """Give a file a second name, at once or not at all; a copy where there are no hard links."""
    temporary = second.with_name(f".{second.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.link(first, temporary)
        os.replace(temporary, second)
    except OSError as error:
        if error.errno not in NO_LINKS_HERE:
            raise
        write_whole(second, _blocks(first))
        return
    finally:
        # Renaming one name of a file to another one of its names does nothing.
        temporary.unlink(missing_ok=True)
    sync_folder(second.parent)


def _blocks(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        block = file.read(COPY_BYTES)
        while block:
            yield block
            block = file.read(COPY_BYTES)


def _step_said(path: Path) -> Any:
    """The step in a checkpoint's metadata, which nobody has checked; None where there is none."""
    try:
        _, end = _find_header(path)
        header = json.loads(first_bytes(path, end)[LENGTH_BYTES:])
        return _metadata(path, header).get("step")
    except (OSError, DamagedCheckpoint, *GARBLED):
        return None


def checkpoint_at(path: str | Path, *, best: bool = False) -> Path:
    """The checkpoint that `path` means: a file, or the newest one of a run, or its `best` one.

    A run is given by its folder, such as runs/NAME/seed0, or by the folder `checkpoints` in it. A
    path that is no folder is returned as it is: `load` says what is wrong with it. Raises
    ValueError for a folder without what is wanted, and for a file where the best one is.
    """
    path = Path(path)
    if not path.is_dir():
        if best:
            raise ValueError(f"{path}: is no folder; the best checkpoint is that of a run's folder")
        return path
    folder = path / FOLDER
    if not folder.is_dir():
        if path.resolve().name != FOLDER:
            raise ValueError(_no_run(path))
        folder = path
    if best:
        if not (folder / BEST).is_file():
            raise ValueError(
                f"{folder}: has no {BEST}: no epoch of the run has been evaluated yet, "
                "or it ran with run.keep_best = false"
            )
        return folder / BEST
    found = Checkpoints(folder).paths()
    if not found:
        raise ValueError(f"{folder}: has no checkpoint yet")
    return found[-1]


def _no_run(path: Path) -> str:
    """What to say about a folder that is not a run's; of one of several seeds, which there are."""
    seeds = sorted(each.parent for each in path.glob(f"*/{FOLDER}") if each.is_dir())
    if seeds:
        return f"{path}: holds the runs {listed([seed.name for seed in seeds])}: give one of them"
    return f"{path}: is no folder of a run (it has no folder {FOLDER!r} in it)"


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
