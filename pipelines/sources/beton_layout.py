"""The layout of a `.beton`, FFCV's format, version 2: header, field descriptors, tables.

A sample has any number of fields. Here stands what their metadata look like, and which of them are
the image and the label: the others are skipped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipelines.files import listed, readable

VERSION = 2  # of FFCV's format
MOST_TOLD = 12  # fields that a message lists

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("fields", "<u2"),
        ("page_size", "<u4"),  # bytes, a power of two
        ("num_samples", "<u8"),
        ("alloc_ptr", "<u8"),  # where the allocation table begins
    ]
)

FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])

# A row of the allocation table: of every sample, one for each field of variable size.
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

# ------------------------------------------------------------------ kinds of fields

FLOAT_FIELD = 0
INT_FIELD = 1
IMAGE_FIELD = 2
BYTES_FIELD = 3
ARRAY_FIELD = 4
JSON_FIELD = 5
TENSOR_FIELD = 6

INTEGER = np.dtype("<i8")
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
POINTER = np.dtype("<u8")


class Kind(NamedTuple):
    """What FFCV keeps of one type of field in a sample's metadata."""

    name: str  # for messages
    metadata: np.dtype
    pointer: str | None = None  # the entry of `metadata` that points to the data, if it has entries


KINDS = {
    FLOAT_FIELD: Kind("float", np.dtype("<f8")),
    INT_FIELD: Kind("integer", INTEGER),
    IMAGE_FIELD: Kind("RGB image", IMAGE, "data_ptr"),
    BYTES_FIELD: Kind("bytes", BYTES, "ptr"),
    ARRAY_FIELD: Kind("array", POINTER),
    JSON_FIELD: Kind("JSON", BYTES, "ptr"),
    TENSOR_FIELD: Kind("tensor", POINTER),
}
ALLOCATING = {IMAGE_FIELD, BYTES_FIELD, ARRAY_FIELD, JSON_FIELD, TENSOR_FIELD}


class Field(NamedTuple):
    """One field of every sample."""

    name: str
    type_id: int  # a key of KINDS

    def __str__(self) -> str:
        return f"{readable(self.name) or '(no name)'} ({KINDS[self.type_id].name})"


def parse_fields(descriptors: bytes) -> list[Field]:
    """The fields that the descriptors announce.

    Raises:
        ValueError: a type whose metadata are not known; the message names the field.
    """
    fields = []
    for descriptor in np.frombuffer(descriptors, FIELD):
        name = descriptor["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
        type_id = int(descriptor["type_id"])
        if type_id not in KINDS:
            raise ValueError(
                f"field {readable(name) or '(no name)'} is of type {type_id}, a custom one whose"
                " size nobody but its author knows: write the file again without it"
            )
        fields.append(Field(name, type_id))
    return fields


def field_descriptors(fields: Sequence[Field]) -> np.ndarray:
    """The opposite of `parse_fields`, for fields without arguments: FIELD (len(fields),)."""
    descriptors = np.zeros(len(fields), FIELD)
    for descriptor, field in zip(descriptors, fields, strict=True):
        descriptor["type_id"] = field.type_id
        name = np.frombuffer(field.name.encode("ascii"), np.uint8)
        descriptor["name"][: len(name)] = name
    return descriptors


def metadata_row(fields: Sequence[Field]) -> np.dtype:
    """A row of the metadata, its columns called "0", "1", ...: names may be those of others too."""
    columns = [(str(i), KINDS[field.type_id].metadata) for i, field in enumerate(fields)]
    return np.dtype(columns, align=True)


def pointers_of(
    fields: Sequence[Field],
    table: np.ndarray,  # rows of `metadata_row`, (N,)
    i: int,
) -> np.ndarray:
    """Where the data of field i, which has some, lie: uint64 (N,)."""
    column = table[str(i)]
    entry = KINDS[fields[i].type_id].pointer
    if entry is None:
        return column
    return column[entry]


# ------------------------------------------------------------------ the fields that are read

# The fields of files that fap-convert writes.
IMAGES = (Field("image", IMAGE_FIELD), Field("label", INT_FIELD))
PLANES_AND_SIDES = (
    Field("planes", BYTES_FIELD),
    Field("label", INT_FIELD),
    Field("height", INT_FIELD),
    Field("width", INT_FIELD),
)


class Chosen(NamedTuple):
    """Places of the fields that are read."""

    pixels: int  # an RGB image, or planes
    label: int
    height: int | None = None  # of planes; an RGB image tells its own
    width: int | None = None

    @property
    def planes(self) -> bool:
        """Whether the pixels are planes."""
        return self.height is not None


def choose(fields: Sequence[Field]) -> Chosen:
    """Which fields are the image and the label.

    They are the only RGB image and the only integer, whatever their names; among several, those
    named `image` and `label`. A file without an RGB image may have planes instead, and the image's
    height and width, all by name.

    Raises:
        ValueError: there are none, or several of another name, or one of that name has another
            type: then the one that is left may be anything.
    """
    has_planes = any(field.name == "planes" for field in fields)
    if has_planes and not any(field.type_id == IMAGE_FIELD for field in fields):
        return Chosen(*(_named(fields, wanted) for wanted in PLANES_AND_SIDES))
    return Chosen(*(_only_or_named(fields, wanted) for wanted in IMAGES))


def _only_or_named(fields: Sequence[Field], wanted: Field) -> int:
    of_the_type = [i for i, field in enumerate(fields) if field.type_id == wanted.type_id]
    is_named = any(field.name == wanted.name for field in fields)
    if len(of_the_type) == 1 and not is_named:
        return of_the_type[0]
    return _named(fields, wanted)


def _named(fields: Sequence[Field], wanted: Field) -> int:
    found = [i for i, field in enumerate(fields) if field == wanted]
    if len(found) != 1:
        told = listed([str(field) for field in fields], MOST_TOLD)
        raise ValueError(
            f"{len(fields)} fields, {told}: need one RGB image and one integer label;"
            f" {len(found)} are {wanted}"
        )
    return found[0]
