"""`.beton` files of any fields, written as FFCV's writer does; and images as planes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.jpeg import jpeg_sides
from pipelines.store import JPG, RAW
from tests.conftest import PAGE

FLOAT, INT, RGB, BYTES, ARRAY, JSON, TENSOR = range(7)
HEADER = np.dtype("<u2, <u2, <u4, <u8, <u8")
DESCRIPTOR = np.dtype("u1, 16u1, 1024u1")
ALLOCATION = np.dtype("<u8, <u8, <u8")
METADATA = {  # FFCV's `metadata_type` of each
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    RGB: np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]),
    BYTES: np.dtype([("ptr", "<u8"), ("size", "<u8")]),
    ARRAY: np.dtype("<u8"),
    JSON: np.dtype([("ptr", "<u8"), ("size", "<u8")]),
    TENSOR: np.dtype("<u8"),
}


class Column(NamedTuple):
    """One field of all samples.

    An image is a JPEG's bytes or an array (H, W, 3), an array an array, JSON anything JSON has.
    """

    name: str
    type_id: int
    values: Sequence[object]


def write_fields(path: Path, columns: Sequence[Column], *, page: int = PAGE, seed: int = 0) -> Path:
    """All that a sample allocates lies within one page; the allocation table is shuffled."""
    n = len(columns[0].values)
    row = np.dtype(
        [(f"f{i}", METADATA[each.type_id]) for i, each in enumerate(columns)], align=True
    )
    table = np.zeros(n, row)
    tables_bytes = HEADER.itemsize + len(columns) * DESCRIPTOR.itemsize + table.nbytes
    body = bytearray(tables_bytes + -tables_bytes % page)
    allocations = []
    for i in range(n):
        pieces = [stored(column.type_id, column.values[i]) for column in columns]
        if sum(len(piece or b"") for piece in pieces) > -len(body) % page:
            body.extend(bytes(-len(body) % page))
        for column, piece, cell in zip(columns, pieces, row.names, strict=True):
            at = len(body)
            table[cell][i] = metadata_of(column.type_id, column.values[i], at, len(piece or b""))
            if piece is not None:
                allocations.append((i, at, len(piece)))
                body.extend(piece)
    body.extend(bytes(-len(body) % page))

    header = np.array([(2, len(columns), page, n, len(body))], HEADER)
    head = header.tobytes() + b"".join(map(descriptor, columns)) + table.tobytes()
    body[: len(head)] = head
    order = np.random.default_rng(seed).permutation(len(allocations))
    path.write_bytes(bytes(body) + np.array(allocations, ALLOCATION)[order].tobytes())
    return path


def stored(type_id: int, value: object) -> bytes | None:
    """What the field allocates; None: nothing."""
    if type_id in (FLOAT, INT):
        return None
    if type_id == JSON:
        return json.dumps(value).encode() + b"\0"
    if isinstance(value, np.ndarray):
        return value.tobytes()
    assert isinstance(value, bytes)
    return value


def metadata_of(type_id: int, value: object, at: int, size: int) -> object:
    if type_id in (FLOAT, INT):
        return value
    if type_id in (ARRAY, TENSOR):
        return at
    if type_id != RGB:
        return at, size
    if isinstance(value, bytes):
        height, width = jpeg_sides(value)
        return JPG, width, height, at
    return RAW, value.shape[1], value.shape[0], at


def descriptor(column: Column) -> bytes:
    arguments = b""
    if column.type_id in (ARRAY, TENSOR):
        shape = np.zeros(32, "<u8")
        first = column.values[0]
        shape[: first.ndim] = first.shape
        dtype = json.dumps(first.dtype.descr).encode()
        arguments = shape.tobytes() + np.array(len(dtype), "<u8").tobytes() + dtype
    name = column.name.encode().ljust(16, b"\0")
    return bytes([column.type_id]) + name + arguments.ljust(1024, b"\0")


def planes_of(image: np.ndarray) -> bytes:
    """Y, Cb, Cr of an image (H, W, 3), chroma of every other row and column."""
    channels = np.asarray(Image.fromarray(image).convert("YCbCr"))
    luma = channels[:, :, 0].tobytes()
    return luma + channels[::2, ::2, 1].tobytes() + channels[::2, ::2, 2].tobytes()


def planes_columns(images: Sequence[np.ndarray], labels: Sequence[int]) -> list[Column]:
    """The fields of a `.beton` of planes."""
    return [
        Column("planes", BYTES, [planes_of(image) for image in images]),
        Column("label", INT, labels),
        Column("height", INT, [len(image) for image in images]),
        Column("width", INT, [len(image[0]) for image in images]),
    ]
