"""`NAME.beton.json`: what a `.beton` cannot say about itself, and a checksum of every image.

It names the classes, and holds the boxes of data for detection.

It is JSON with a checksum of its own. What is read from it is trusted no more than other data.
"""

import base64
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.boxes import BOX_FIELDS, Annotations
from pipelines.files import GIGABYTE, read_regular, readable, shown
from pipelines.names import checked_names
from pipelines.store import DamagedData

VERSION = 2
MOST_BYTES = GIGABYTE  # of a sidecar: checksums of 200 million images, or 32 million boxes

# What is kept of Annotations: arrays of numbers as the file holds them, in base64.
BOXES_PER_IMAGE = "boxes_per_image"
STORED = {BOXES_PER_IMAGE: "<u4", "boxes": "<f4", "classes": "<i4", "crowd": "u1", "area": "<f4"}
MOST_BOXES = 30_000_000  # they take 25 bytes each, a third more in base64


class Sidecar(NamedTuple):
    """The content of a sidecar."""

    classes: tuple[str, ...] | None
    encoding: dict[str, Any]  # how convert made the `.beton`
    crc32: np.ndarray  # uint32 (N,), one per sample's encoded bytes
    tables_crc32: int  # header, field descriptors, metadata and allocation table, in this order
    annotations: Annotations | None = None


def sidecar_path(path: str | Path) -> Path:
    """`NAME.beton.json` for `NAME.beton`."""
    return Path(f"{path}.json")


def read_sidecar(path: str | Path) -> Sidecar | None:
    """The sidecar of the `.beton` at `path`, None where there is none.

    Raises:
        DamagedData: it cannot be read, or is not what `sidecar_text` would make.
    """
    side = sidecar_path(path)
    if not os.path.lexists(side):
        return None
    try:
        return parse_sidecar(read_regular(side, MOST_BYTES))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        why = readable(f"{type(error).__name__}: {error}", 400)  # never the whole file
        raise DamagedData(
            f"{readable(side)}: {why}: convert again, or delete it to read without checksums"
        ) from error


def sidecar_text(sidecar: Sidecar) -> str:
    """The JSON of a sidecar.

    Raises:
        ValueError: it has more bytes than would be read again.
    """
    # The order of the entries is that of the file.
    content: dict[str, Any] = {
        "version": VERSION,
        "count": len(sidecar.crc32),
        "classes": sidecar.classes,
        "encoding": sidecar.encoding,
        "crc32": _base64(sidecar.crc32, "<u4"),
        "tables_crc32": sidecar.tables_crc32,
    }
    if sidecar.annotations is not None:
        content["annotations"] = _annotations_entry(sidecar.annotations)
    content["checksum"] = content_checksum(content)
    text = json.dumps(content)
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text):,} bytes, and at most {MOST_BYTES:,} are read again")
    return text


def parse_sidecar(text: str | bytes) -> Sidecar:
    """The opposite of `sidecar_text`. Raises one of many errors for what that would not make."""
    content = json.loads(text)
    if content["version"] != VERSION:
        raise ValueError(f"version {shown(content['version'], 40)}, not {VERSION}")
    if content["checksum"] != content_checksum(content):
        raise ValueError("its content is not that of its checksum")
    crc32 = _numbers(content["crc32"], "<u4")
    encoding = content["encoding"]
    tables_crc32 = content["tables_crc32"]
    # `type`, since True is an instance of int.
    if type(content["count"]) is not int or content["count"] != len(crc32):
        raise ValueError("count is not the number of checksums")
    if type(tables_crc32) is not int or type(encoding) is not dict:
        raise ValueError("tables_crc32 must be a number and encoding an object")
    annotations = None
    if "annotations" in content:
        annotations = _parse_annotations(content["annotations"], len(crc32))
    return Sidecar(checked_names(content["classes"]), encoding, crc32, tables_crc32, annotations)


def content_checksum(content: dict[str, Any]) -> int:
    """CRC-32 of a sidecar's entries, of all but the checksum itself, whatever their order."""
    entries = {name: value for name, value in content.items() if name != "checksum"}
    crc32 = 0
    # Entry by entry: the text of all would be another copy of the largest.
    for part in json.JSONEncoder(sort_keys=True, separators=(",", ":")).iterencode(entries):
        crc32 = zlib.crc32(part.encode(), crc32)
    return crc32


# ------------------------------------------------------------------ arrays


def _annotations_entry(annotations: Annotations) -> dict[str, str]:
    """What `_parse_annotations` reads."""
    entry = {BOXES_PER_IMAGE: _base64(np.diff(annotations.first), STORED[BOXES_PER_IMAGE])}
    for name in BOX_FIELDS:
        entry[name] = _base64(getattr(annotations, name), STORED[name])
    return entry


def _parse_annotations(entry: Any, n_images: int) -> Annotations:
    """The opposite of `_annotations_entry`. Raises ValueError or TypeError for another entry."""
    if type(entry) is not dict or entry.keys() != STORED.keys():
        raise ValueError(f"annotations must be an object of {', '.join(STORED)}")
    stored = {name: _numbers(entry[name], dtype) for name, dtype in STORED.items()}
    if len(stored[BOXES_PER_IMAGE]) != n_images:
        raise ValueError(f"annotations: {BOXES_PER_IMAGE} must have one number per image")
    if stored["crowd"].max(initial=0) > 1:
        raise ValueError("annotations: crowd must be 0 or 1")
    stored["boxes"] = stored["boxes"].reshape(-1, 4)
    first = np.concatenate([[0], np.cumsum(stored[BOXES_PER_IMAGE], dtype=np.int64)])
    fields: dict[str, np.ndarray] = {}
    for name, dtype in BOX_FIELDS.items():
        fields[name] = stored[name].astype(dtype)
    try:
        return Annotations(first, **fields)
    except ValueError as error:
        raise ValueError(f"annotations: {error}") from None


def _base64(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def _numbers(text: Any, dtype: str) -> np.ndarray:
    """The opposite of `_base64`. Raises ValueError or TypeError for what is no such text."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
