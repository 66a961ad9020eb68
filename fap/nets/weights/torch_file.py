"""Tensors out of a file of `torch.save`, of which nothing is executed."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipelines.files import listed, one_line, shown

ZIP = b"PK\x03\x04"
# torch.save before 1.6, and after it on request: a pickle of its magic number.
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
JSON_AT = 8  # where a safetensors file has the brace of its header, whatever the bytes before
# Where training scripts keep a state dict, the best of several first, as timm chooses.
KEYS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema",
    "state_dict", "model_state_dict", "model", "net", "teacher", "module",
)  # fmt: skip


def is_torch_file(content: bytes) -> bool:
    return content.startswith((ZIP, OLD)) and content[JSON_AT : JSON_AT + 1] != b"{"


def tensors_in(content: bytes) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict in the content of a file of `torch.save`, and notes on where in it.

    Raises ValueError for a pickle that holds more than tensors and plain values, and for one
    without a state dict.
    """
    _refuse_compression(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages that are untyped now
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a garbled pickle may raise anything
        raise ValueError(
            f"no file of tensors alone ({_reason(error)}); it is not read any further, because "
            "unpickling can run any code"
        ) from None
    state, notes = _state_dict(found)
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"its tensor {shown(name)} is no plain one, but {tensor.layout}")
        # A view may claim any size over a few bytes.
        if tensor.numel() * tensor.element_size() > len(content):
            raise ValueError(
                f"its tensor {shown(name)} of shape {shown(tuple(tensor.shape))} is larger than it"
            )
    return state, notes


def _reason(error: Exception) -> str:
    """What torch found, without its advice to load the file all the same."""
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked:
        return f"it asks for {shown(asked[1], 100)}"
    if not text or "weights_only" in text:
        return "a garbled pickle, or one that asks for more"
    return one_line(error, 150)


def _refuse_compression(content: bytes) -> None:
    """torch.save compresses nothing: so a file is as large as what is in it."""
    if not content.startswith(ZIP):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed = [one for one in archive.infolist() if one.file_size > len(content)]
            packed += [one for one in archive.infolist() if one.compress_type]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(f"a garbled or truncated file ({one_line(error)})") from None
    if packed:
        raise ValueError("its parts are compressed, which torch.save never does")


def _state_dict(found: Any) -> tuple[dict[str, Tensor], list[str]]:
    if _is_state_dict(found):
        return dict(found), []
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__} and no state dict")
    keys = [key for key in KEYS if _is_state_dict(found.get(key))]
    if not keys:
        names = listed([str(key) for key in found])
        raise ValueError(f"no state dict under any of its keys ({names or 'it is empty'})")
    note = f"its {keys[0]!r}"
    if len(keys) > 1:
        note += f" is taken, not its {', '.join(map(repr, keys[1:]))}"
    else:
        note += " is taken"
    return dict(found[keys[0]]), [note]


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(tensor, Tensor) for tensor in value.values())
    )
