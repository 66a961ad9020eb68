"""One export: the checkpoint read, the format chosen by the name of what is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fap.evaluate.load import Plain, WhichWeights, load_plain_model
from fap.export.facts import Written, summary
from fap.export.hub_folder import write_hub_folder
from fap.export.onnx_file import write_onnx
from fap.export.tensors import write_safetensors, write_torch
from fap.nets.norm import Bn

ONNX = ".onnx"
SUFFIXES: dict[str, Callable[[Plain, Path], Written]] = {
    ".safetensors": write_safetensors,
    ".pth": write_torch,
    ".pt": write_torch,
}
KINDS = "NAME.safetensors, NAME.pth, NAME.onnx, or NAME/ for a folder of the Hugging Face Hub"


def export(
    path: str | Path,
    out: str | Path,
    *,
    normalise: bool = False,
    weights: WhichWeights | None = None,  # None: the average of a run that has one
    bn: Bn = "main",
) -> list[str]:
    """Write the plain model of a run's checkpoint to `out`, wholly or not at all; lines to print.

    `bn`: the norms that it gets.

    What is written was read again, or run, and compared before this function returns. Raises as
    `fap.evaluate.load.load_model`; ValueError too for a name of another format, and where there is
    something at `out`; ImportError if a format's package is missing.
    """
    place = Path(out)
    write = _writer(place, str(out), normalise)
    if place.is_symlink() or place.exists():
        raise ValueError(f"{place} exists; choose another name or remove it first")
    if not place.parent.is_dir():
        raise ValueError(f"{place.parent}: no such folder; make it first")
    plain = load_plain_model(path, weights, bn)
    try:
        written = write(plain, place)
    except FileExistsError:  # made by someone else in the meantime
        raise ValueError(f"{place} exists; choose another name or remove it first") from None
    what, *more = summary(plain)
    load = [f"load:  {written.load[0]}", *(f"       {line}" for line in written.load[1:])]
    return [f"wrote {out}: {what}", f"       {written.what}", *more, *load]


def _writer(place: Path, out: str, normalise: bool) -> Callable[[Plain, Path], Written]:
    suffix = place.suffix
    if suffix == ONNX:

        def write(plain: Plain, to: Path) -> Written:
            return write_onnx(plain, to, normalise)

        return write
    if normalise:
        raise ValueError("--normalise is for .onnx: weights alone cannot normalise")
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if not suffix or out.endswith(os.sep):
        return write_hub_folder
    raise ValueError(f"{place}: no format has the suffix {suffix!r}; choose {KINDS}")
