"""`NAME.beton.json`: what a `.beton` cannot say about itself, and a checksum of every image.

It is JSON with a checksum of its own. What is read from it is trusted no more than other data.
"""

import base64
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.files import read_regular, readable, shown
from pipelines.names import checked_names
from pipelines.store import DamagedData

VERSION = 2
MOST_BYTES = 1 << 28  # of a sidecar: 40 million images' checksums


class Sidecar(NamedTuple):
    """The content of a sidecar."""

    classes: tuple[str, ...] | None
    encoding: dict[str, Any]  # how convert made the `.beton`
    crc32: np.ndarray  # uint32 (N,), one per sample's encoded bytes
    tables_crc32: int  # header, field descriptors, metadata and allocation table, in this order


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
        "crc32": base64.b64encode(np.asarray(sidecar.crc32, "<u4").tobytes()).decode(),
        "tables_crc32": sidecar.tables_crc32,
    }
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
    crc32 = np.frombuffer(base64.b64decode(content["crc32"], validate=True), "<u4")
    encoding = content["encoding"]
    tables_crc32 = content["tables_crc32"]
    # `type`, since True is an instance of int.
    if type(content["count"]) is not int or content["count"] != len(crc32):
        raise ValueError("count is not the number of checksums")
    if type(tables_crc32) is not int or type(encoding) is not dict:
        raise ValueError("tables_crc32 must be a number and encoding an object")
    return Sidecar(checked_names(content["classes"]), encoding, crc32, tables_crc32)


def content_checksum(content: dict[str, Any]) -> int:
    """CRC-32 of a sidecar's entries, of all but the checksum itself, whatever their order."""
    entries = {name: value for name, value in content.items() if name != "checksum"}
    return zlib.crc32(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())
