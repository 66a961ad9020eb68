"""Hugging Face's parquet files: a column of images, and one of labels.

An image is a struct of `bytes` and `path`, or bytes alone. Labels are numbers. Files are read from
beginning to end, a few rows at a time.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.archives.names import in_class_order
from pipelines.extras import needs
from pipelines.files import first_bytes, listed, open_regular, readable
from pipelines.intake.collection import Collection, Content, Image
from pipelines.intake.wnids import class_names, without_wnid
from pipelines.names import checked_names

SUFFIX = ".parquet"
FIRST_BYTES = b"PAR1"
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png")
SPLIT_FOLDERS = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "test": "test",
}
ROWS = 64  # read at once: a few megabytes
BUFFER_BYTES = 8 << 20  # of a row group, which may have any size


class Columns(NamedTuple):
    """What to read of a file."""

    image: str
    of_struct: bool  # an image is a struct, its file's content being `bytes`
    has_paths: bool  # and its file's name `path`
    label: str
    class_names: tuple[str, ...] | None  # as Hugging Face's features name them

    @property
    def content(self) -> str:
        return f"{self.image}.bytes" if self.of_struct else self.image

    def cells(self, column: Any) -> list[Any]:
        """The bytes of each row of the image column."""
        if not self.of_struct:
            return column.to_pylist()
        return [cell and cell["bytes"] for cell in column.to_pylist()]


class ParquetFiles(Collection):
    """The rows of parquet files, which are to have the same columns.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: damaged files, or without such columns.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        with needs("parquet", "reading parquet files"):
            import pyarrow.parquet  # noqa: F401
        self.path = path
        self.described_as = f"{len(files):,} parquet file(s)"
        self.ignored = {}
        self._files = list(files)
        self._columns = _columns(files[0])
        names: list[str] = []
        labels: list[int] = []
        self._first = [0]  # number of the first row of each file, and of all rows
        for file in files:
            if _columns(file) != self._columns:
                raise ValueError(
                    f"{readable(file)}: its columns are not those of {readable(files[0])}"
                )
            more_names, more_labels = _index(file, self._columns)
            names += more_names
            labels += more_labels
            self._first.append(len(labels))
        if not labels:
            raise ValueError(f"{readable(path)}: no rows")
        if min(labels) < 0:
            raise ValueError(
                f"{readable(path)}: a label is {min(labels)}, which means that there is none: is it"
                " the test split? --split train or val"
            )
        self.classes = class_names(names, labels) or self._columns.class_names
        order = in_class_order(labels, [without_wnid(name) for name in names])
        self._rows = np.array(order, np.int64)  # of all files together
        self._names = names
        self.labels = np.array(labels, np.int64)[self._rows]

    def name(self, number: int) -> str:
        return self._names[self._rows[number]]

    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        rows = self._rows[numbers]
        order = np.argsort(rows)
        ends = np.searchsorted(rows[order], self._first)
        for file, first, begin, end in zip(self._files, self._first, ends, ends[1:], strict=False):
            of_this_file = order[begin:end]
            if len(of_this_file):
                rows_here = (rows[of_this_file] - first).tolist()
                numbers_here = numbers[of_this_file].tolist()
                yield from self._of_one_file(file, dict(zip(rows_here, numbers_here, strict=True)))

    def _of_one_file(self, file: Path, wanted: dict[int, int]) -> Iterator[Content]:
        """`wanted`: numbers of the images by row of the file."""
        columns = self._columns
        row = 0
        with _opened(file) as parquet:
            for batch in parquet.iter_batches(ROWS, columns=[columns.content]):
                for cell in columns.cells(batch.column(0)):
                    if row in wanted:
                        yield wanted[row], _given(cell)
                    row += 1


def parquet_files(folder: Path) -> list[Path]:
    """Those in a folder, sorted, and where Hugging Face's `datasets` has them below it."""
    found: list[Path] = []
    for place in (".", "data", *SPLIT_FOLDERS):
        found += (folder / place).glob(f"*{SUFFIX}")
    return sorted(found)


def split_of(file: Path) -> str | None:
    """What Hugging Face's file names say: train-00000-of-00294.parquet; or their folder's name."""
    for word in (re.split(r"[-_.]", file.name)[0], file.parent.name):
        if word in SPLIT_FOLDERS:
            return SPLIT_FOLDERS[word]
    return None


def is_parquet(path: Path) -> bool:
    """Whether a file begins as parquet does."""
    return first_bytes(path, len(FIRST_BYTES)) == FIRST_BYTES


def _given(cell: bytes | None) -> Callable[[], Image]:
    def give() -> Image:
        if cell is None:
            raise ValueError("has no bytes: the file only names an image that lies elsewhere")
        return cell

    return give


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The open file. Damage, wherever in the block it is met, is a ValueError that names it."""
    import pyarrow
    import pyarrow.parquet

    open_regular(file).close()  # never a pipe, on which pyarrow would wait for ever
    try:
        options = {"buffer_size": BUFFER_BYTES, "page_checksum_verification": True}
        with pyarrow.parquet.ParquetFile(str(file), **options) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{readable(file)}: damaged or no parquet file: {error}") from error


def _index(file: Path, columns: Columns) -> tuple[list[str], list[int]]:
    """Names of the images, and labels, of a file's rows."""
    with _opened(file) as parquet:
        wanted = [columns.label]
        if columns.has_paths:
            wanted.append(f"{columns.image}.path")
        table = parquet.read(columns=wanted)
        labels = table.column(columns.label).to_pylist()
        paths: list[str | None] = [None] * len(labels)
        if columns.has_paths:
            paths = [cell and cell["path"] for cell in table.column(columns.image).to_pylist()]
    if None in labels:
        row = labels.index(None)
        raise ValueError(f"{readable(file)}: row {row:,} has no label")
    # An image without a path is called by its row.
    names = [path or f"{file.name}/{row:08}" for row, path in enumerate(paths)]
    return names, labels


def _columns(file: Path) -> Columns:
    """Which columns of a file are meant."""
    import pyarrow.types as types

    with _opened(file) as parquet:
        schema = parquet.schema_arrow
    images: dict[str, set[str]] = {}  # names of the columns, and what is in their structs
    labels: list[str] = []
    for field in schema:
        if types.is_struct(field.type):
            inner = {part.name for part in field.type}
            if "bytes" in inner:
                images[field.name] = inner
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            images[field.name] = set()
        elif types.is_integer(field.type):
            labels.append(field.name)
    image = _one_of(list(images), IMAGE_COLUMNS, "images", file, schema.names)
    label = _one_of(labels, LABEL_COLUMNS, "numbers as labels", file, schema.names)
    inner = images[image]
    return Columns(image, "bytes" in inner, "path" in inner, label, _class_names(schema, label))


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """What Hugging Face's `datasets` noted of the labels; None where it did not."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        names = noted["info"]["features"][label]["names"]
        return checked_names(names)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _one_of(
    found: Sequence[str], usual: Sequence[str], what: str, file: Path, names: Sequence[str]
) -> str:
    """The column with the first usual name, or the only one."""
    for name in usual:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"{readable(file)}: needs one column of {what}, called {' or '.join(usual)};"
        f" its columns are {listed(names, 12)}"
    )
