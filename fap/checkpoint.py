"""Checkpoints: one `.safetensors` file each, complete or absent, never pickle.

A file is written under a temporary name, flushed to the disk and renamed, so a crash leaves the old
files and at most a stale temporary one. A CRC32 of the whole file (its own digits read as zeros)
stands in its
header: a damaged file is noticed before any of it is used. The checksum is no signature, so what
the file says is not trusted either: `run_meta` checks the metadata, `fap.evaluate.load` the model's
tensors.
"""

import errno
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from fap.config import Config, make_config, with_current_names
from fap.step.metrics import METRICS
from pipelines.files import GIGABYTE, open_regular, read_regular, shown, write_whole
from pipelines.names import checked_names

MOST_BYTES = 64 * GIGABYTE  # of a file
MOST_HEADER = 100_000_000  # bytes; safetensors reads no larger one either
MOST_META = 1 << 24  # characters of metadata; 21,841 class names are well below a megabyte
_MARK = b'"crc32":"'  # unescaped, so no tensor's name and no value of the metadata can contain it
_ZEROS = b"00000000"
_NAME = re.compile(r"step_([0-9]+)\.safetensors")
# Errors that belong to this one file, as damage does: a dangling or circular link, a bad sector.
_OF_THE_FILE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EIO, errno.ENXIO)


class DamagedCheckpoint(RuntimeError):  # noqa: N818
    """A file that is truncated, garbled or not of this program; the message names it and what is
    wrong.
    """


# ---------------------------------------------------------------------- the file


def save(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    meta: dict[str, Any],
    *,
    overwrite: bool = True,
    **header: str,
) -> None:
    """Write `tensors` (any shape, layout, device; views of one storage too) and `meta` (JSON)
    atomically.

    `header` stands beside `meta`, for other readers. Raises OSError (a full disk, say) after
    removing what it had written; a file at `path` stays as it was. Once the file has its name,
    nothing is raised.
    """
    # One fresh contiguous copy each: safetensors refuses views of one storage, such as a flat
    # buffer's.
    copies = {k: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for k, t in tensors.items()}
    blob = safetensors.torch.save(
        copies, header | {"meta": json.dumps(meta), "crc32": _ZEROS.decode()}
    )
    at = blob.index(_MARK) + len(_MARK)
    parts: list[bytes | memoryview] = [
        blob[:at],
        b"%08x" % zlib.crc32(blob),
        memoryview(blob)[at + len(_ZEROS) :],
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
    """As `load`, and what the file's content is: its checksum and size, which no copy or new date
    changes.
    """
    try:
        at, end = _header(
            path
        )  # first, so that of a huge file that is none of ours nothing more is read
        blob = read_regular(path, MOST_BYTES)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from None
    rest = at + len(_ZEROS)
    found = b"%08x" % zlib.crc32(memoryview(blob)[rest:], zlib.crc32(blob[:at] + _ZEROS))
    try:
        header = json.loads(blob[8:end])
        if found != blob[at:rest]:
            size = end + max(
                (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0
            )
            wrong = (
                f"truncated, {len(blob)} of {shown(size)} bytes"
                if len(blob) < size
                else "wrong checksum"
            )
            raise DamagedCheckpoint(f"{path}: {wrong}")
        text = header["__metadata__"]["meta"]
        if len(text) > MOST_META:
            raise DamagedCheckpoint(
                f"{path}: {len(text):,} characters of metadata, at most {MOST_META:,} are read"
            )
        meta = json.loads(text)
        if not isinstance(meta, dict):
            raise DamagedCheckpoint(f"{path}: its metadata is no mapping but {shown(meta)}")
        return safetensors.torch.load(blob), meta, f"{found.decode()}-{len(blob)}"
    except (
        safetensors.SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise DamagedCheckpoint(f"{path}: garbled header ({brief(error)})") from error


def _header(path: str | Path) -> tuple[int, int]:
    """Where the checksum's digits stand in a file, and where its header ends. Raises as `load`;
    ValueError for no file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        end = 8 + int.from_bytes(head, "little")
        if len(head) == 8 and end <= min(size, MOST_HEADER):
            head += file.read(end - 8)
        if len(head) != end:
            raise DamagedCheckpoint(
                f"{path}: truncated inside its header, or no safetensors file ({size} bytes)"
            )
    at = head.find(_MARK, 8) + len(_MARK)
    if at < len(_MARK):
        raise DamagedCheckpoint(
            f"{path}: no checksum in its header, so it is no checkpoint of this program"
        )
    return at, end


def brief(error: Exception, most: int = 400) -> str:
    """An error's text for one line of a message, cut where a file could make it long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."


# ---------------------------------------------------------------------- the metadata of a run


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Numbers = Annotated[dict[Annotated[str, Field(max_length=100)], float], Field(max_length=1000)]
_Text = Annotated[str, Field(max_length=1000)]


class DataIdentity(_Strict):
    """What a run's data is, wherever it lies; `pipelines.Store.identity` says it."""

    count: _Count
    # Any, because pydantic's own check of a text refuses surrogates.
    classes: Annotated[Any, BeforeValidator(checked_names)]
    """tuple[str, ...] | None: the class names in the order of the labels."""
    content: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class RunMeta(_Strict):
    """The metadata of a training run's checkpoint, as `Run` writes it and everyone else reads it."""

    config: Annotated[dict[str, Any], BeforeValidator(with_current_names), Field(max_length=1000)]
    """`Config.model_dump(mode="json")`; `make_config` accepts it, and `model.num_classes` is set.
    """
    step: _Count
    closed: _Count
    """Epochs evaluated and logged."""
    totals: _Numbers
    """Sums over the steps of the epoch so far, by the names of `fap.step.step.METRICS`."""
    best: _Numbers
    last: _Numbers
    seconds: Annotated[float, Field(ge=0, le=1e12)]
    world: Annotated[int, Field(ge=1, le=1 << 20)]
    versions: Annotated[dict[_Text, _Text | None], Field(max_length=1000)]
    train: DataIdentity
    val: DataIdentity

    @model_validator(mode="after")
    def _check(self) -> "RunMeta":
        if self.closed > self.step:
            raise ValueError(f"closed = {self.closed} epochs in step = {self.step} steps")
        if self.totals.keys() != set(METRICS):
            raise ValueError("totals has other names than this version's metrics")
        if "epoch" not in self.best or len(self.best) != 2:
            raise ValueError("best must hold one metric and epoch")
        return self


def run_meta(path: str | Path, meta: dict[str, Any]) -> RunMeta:
    """The metadata of the checkpoint at `path`, checked. Raises DamagedCheckpoint, or ValueError if
    it is none of a run.
    """
    if not {"config", "step"} <= meta.keys():
        raise ValueError(
            f"{path}: no checkpoint of a training run (its metadata has no config or step)"
        )
    try:
        found = RunMeta.model_validate(meta)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"][:4]))
        raise DamagedCheckpoint(
            f"{path}: metadata: {shown(field)}: {brief(ValueError(first['msg']))}"
        ) from None
    config = _config_of(path, found)
    names = found.train.classes
    if config.model.num_classes is None:
        raise DamagedCheckpoint(f"{path}: metadata: config.model.num_classes is not set")
    if names is not None and len(names) > config.model.num_classes:
        raise DamagedCheckpoint(
            f"{path}: metadata: {len(names)} class names, but config.model.num_classes ="
            f" {config.model.num_classes}"
        )
    return found


def _config_of(path: str | Path, meta: RunMeta) -> Config:
    try:
        return make_config(meta.config)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise DamagedCheckpoint(
            f"{path}: metadata: its config is none of this version: {brief(error)}"
        ) from None


# ---------------------------------------------------------------------- the checkpoints of a run


class Checkpoints:
    """The checkpoints of a run, `folder/step_00001234.safetensors`: the last `keep` of them."""

    def __init__(
        self, folder: str | Path, keep: int = 2, say: Callable[[str], Any] = warnings.warn
    ) -> None:
        """`say` is told about files that `newest` skips or `save` cannot remove. A save needs room
        for `keep` + 1 files.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint must be kept")
        self.folder = Path(folder)
        self.keep = keep
        self.say = say

    def paths(self) -> list[Path]:
        """Complete files, oldest step first; not checked for damage."""
        return [path for path in self._named() if path.is_file()]

    def _named(self) -> list[Path]:
        """Whatever is named like a checkpoint: folders and dangling links too."""
        return sorted(
            (p for p in self.folder.glob("step_*.safetensors") if _NAME.fullmatch(p.name)),
            key=_step,
        )

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> Path:
        """Save `step`; only once it is complete, remove what is no longer kept. Errors as `save`;
        one writer.

        Files of later steps go as well: they are the damaged ones `newest` skipped when the run was
        resumed. What cannot be removed is said, not raised: by then the checkpoint has been saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}.safetensors"
        if path.is_dir():  # before gigabytes are written
            raise IsADirectoryError(
                errno.EISDIR, "a folder has the name of the checkpoint", str(path)
            )
        self._remove(
            [*self.folder.glob(".step_*.tmp")]
        )  # a killed save's; first, since the room may be needed
        save(path, tensors, meta)
        until = [p for p in self.paths() if _step(p) <= step]
        self._remove([old for old in self.paths() if old not in until[-self.keep :]])
        return path

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
                return (path, *load(path))
            except DamagedCheckpoint as error:
                self.say(f"skipped a damaged checkpoint: {error}")
            except OSError as error:
                if error.errno not in _OF_THE_FILE:
                    raise
                self.say(f"skipped a checkpoint that cannot be read: {path}: {error.strerror}")
        if named:
            raise DamagedCheckpoint(
                f"{self.folder}: all {len(named)} are damaged; remove them to start over"
            )
        return None


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
