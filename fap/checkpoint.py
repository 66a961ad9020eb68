"""Checkpoints: one `.safetensors` file each, complete or absent, never pickle.

A file is written under a temporary name, flushed to the disk and renamed, so a crash leaves the old files
and at most a stale temporary one. A CRC32 of the whole file (its own digits read as zeros) stands in its
header: a damaged file is noticed before any of it is used.
"""

import json
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fap import models, norm
from fap.config import Config, make_config

_MARK = b'"crc32":"'  # unescaped, so no tensor's name and no value of the metadata can contain it
_ZEROS = b"00000000"


class DamagedCheckpoint(RuntimeError):  # noqa: N818
    """A file that is truncated, garbled or not of this program; the message names it and what is wrong."""


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: dict[str, Any], **header: str) -> None:
    """Write `tensors` (any shape, layout, device; views of one storage too) and `meta` (JSON) atomically.

    `header` stands beside `meta`, for other readers. Raises OSError (a full disk, say) after removing what it had
    written; a file at `path` stays as it was.
    """
    # One fresh contiguous copy each: safetensors refuses views of one storage, such as a flat buffer's.
    copies = {k: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for k, t in tensors.items()}
    blob = safetensors.torch.save(copies, header | {"meta": json.dumps(meta), "crc32": _ZEROS.decode()})
    at = blob.index(_MARK) + len(_MARK)
    temporary = (path := Path(path)).with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines([blob[:at], b"%08x" % zlib.crc32(blob), memoryview(blob)[at + len(_ZEROS) :]])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself survive a power cut
    finally:
        os.close(folder)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (contiguous, on the CPU) and the metadata of a file that `save` wrote.

    Raises DamagedCheckpoint for anything else, FileNotFoundError where there is no file.
    """
    blob = Path(path).read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or end > len(blob):
        raise DamagedCheckpoint(f"{path}: truncated inside its header, or no safetensors file ({len(blob)} bytes)")
    at = blob.find(_MARK, 8, end) + len(_MARK)
    if at < len(_MARK):
        raise DamagedCheckpoint(f"{path}: no checksum in its header, so it is no checkpoint of this program")
    rest = at + len(_ZEROS)
    found = b"%08x" % zlib.crc32(memoryview(blob)[rest:], zlib.crc32(blob[:at] + _ZEROS))
    try:
        if found != blob[at:rest]:
            header = json.loads(blob[8:end])
            size = end + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
            wrong = f"truncated, {len(blob)} of {size} bytes" if len(blob) < size else "wrong checksum"
            raise DamagedCheckpoint(f"{path}: {wrong}")
        return safetensors.torch.load(blob), json.loads(json.loads(blob[8:end])["__metadata__"]["meta"])
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: garbled header ({error})") from error


class Checkpoints:
    """The checkpoints of a run, `folder/step_00001234.safetensors`: the last `keep` of them."""

    def __init__(self, folder: str | Path, keep: int = 2, say: Callable[[str], Any] = warnings.warn) -> None:
        """`say` is told about files that `newest` skips. A save needs room for `keep` + 1 files."""
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint must be kept")
        self.folder, self.keep, self.say = Path(folder), keep, say

    def paths(self) -> list[Path]:
        """Complete files, oldest step first; not checked for damage."""
        return sorted((p for p in self.folder.glob("step_*.safetensors") if p.stem[5:].isdigit()), key=_step)

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> Path:
        """Save `step`; only once it is complete, remove what is no longer kept. Errors as `save`; one writer.

        Files of later steps go as well: they are the damaged ones `newest` skipped when the run was resumed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".step_*.tmp"):  # a killed save's; first, since the room may be needed
            stale.unlink()
        path = self.folder / f"step_{step:08d}.safetensors"
        save(path, tensors, meta)
        until = [p for p in self.paths() if _step(p) <= step]
        for old in set(self.paths()) - set(until[-self.keep :]):
            old.unlink()
        return path

    def newest(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """The newest undamaged checkpoint; None where there is no file at all.

        Raises DamagedCheckpoint where there are files and none is good: we do not start over unasked.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return (path, *load(path))
            except DamagedCheckpoint as error:
                self.say(f"skipped a damaged checkpoint: {error}")
        if paths:
            raise DamagedCheckpoint(f"{self.folder}: all {len(paths)} are damaged; remove them to start over")
        return None


def _step(path: Path) -> int:
    return int(path.stem[5:])


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Config, dict[str, Any]]:
    """The converted model of a run's checkpoint, in evaluation mode, the run's config and the checkpoint's metadata.

    Raises DamagedCheckpoint, FileNotFoundError, or ValueError for a checkpoint that is not of a training run.
    """
    state, meta, config = _model_state(path)
    aux = any(k.endswith("aux.running_mean") for k in state)
    model = models.build(config.model.name, config.model.classes, aux=aux, size=config.data.size)
    model.load_state_dict(state)
    return model.to(device).eval(), config, meta


def export(path: str | Path, out: str | Path) -> dict[str, str]:
    """Write the plain model of a run's checkpoint; returns the metadata written beside it, as text.

    The file's tensors are a state dict that the unconverted torchvision or timm model loads with strict=True.
    Raises as `load_model`; ValueError too if `out` exists.
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists; choose another name or remove it first")
    state, meta, config = _model_state(path)
    header = {"num_classes": config.model.num_classes, "size": config.data.size, "step": meta["step"],
              "mean": config.data.mean, "std": config.data.std}  # fmt: skip
    text = {"model": config.model.name, "run": config.name} | {k: json.dumps(v) for k, v in header.items()}
    save(out, norm.export(state, meta["step"]), {}, **text)
    return text


def _model_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], Config]:
    tensors, meta = load(path)
    if not {"config", "step"} <= meta.keys():
        raise ValueError(f"{path}: no checkpoint of a training run (its metadata has no config or step)")
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return state, meta, make_config(meta["config"])
