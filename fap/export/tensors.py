"""Plain weights in one file: .safetensors, or .pth as torch.save writes it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fap import checkpoint
from fap.checkpoint import DamagedCheckpoint
from fap.evaluate.load import Plain
from fap.export.facts import Written, constructor, header
from fap.nets.weights.torch_file import tensors_in
from pipelines.files import read_regular, write_whole


def write_safetensors(plain: Plain, out: Path) -> Written:
    """The weights with a header that says what they are. Raises OSError, DamagedCheckpoint."""
    text = header(plain)
    checkpoint.save(out, plain.weights, {}, overwrite=False, **text)
    try:
        checkpoint.load(out)  # its checksum says that these are the bytes that were written
    except (OSError, DamagedCheckpoint):
        out.unlink(missing_ok=True)
        raise
    load = f"model.load_state_dict(safetensors.torch.load_file({str(out)!r}), strict=True)"
    return Written(
        "weights, read again and compared", (f"model = {constructor(plain.config)}", load)
    )


def write_torch(plain: Plain, out: Path) -> Written:
    """A plain state dict and nothing else: torch.load with weights_only reads it. Raises OSError"""
    file = io.BytesIO()
    # Copies: a view would be written with all of its storage.
    torch.save({k: v.detach().clone().contiguous() for k, v in plain.weights.items()}, file)
    write_whole(out, [file.getbuffer()], overwrite=False)
    try:
        state, _ = tensors_in(read_regular(out, len(file.getbuffer())))
        if not same(state, plain.weights):
            raise ValueError("other tensors")
    except (OSError, ValueError) as error:
        out.unlink(missing_ok=True)
        raise OSError(f"{out}: what was written is not what is there: {error}") from None
    load = f"model.load_state_dict(torch.load({str(out)!r}, weights_only=True), strict=True)"
    return Written(
        "weights, read again and compared", (f"model = {constructor(plain.config)}", load)
    )


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit, NaN included."""
    if one.keys() != other.keys():
        return False
    return all(
        one[k].dtype == v.dtype and one[k].shape == v.shape and _bytes(one[k]) == _bytes(v)
        for k, v in other.items()
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
