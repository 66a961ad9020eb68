"""Tars, and tars of tars, compressed or not: read where they lie.

`tarfile` reads the headers. What it passes over in silence is an error here: a damaged header ends
an archive for it, and so does the end of a truncated file.
"""

import bz2
import gzip
import lzma
import os
import tarfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pipelines.archives.tree import (
    LINKS,
    MOST_BYTES,
    SPECIAL,
    Content,
    RandomTree,
    Tree,
    checked_name,
    refuse_doubles,
)
from pipelines.files import first_bytes, open_regular, readable
from pipelines.progress import progress_of

BLOCK = tarfile.BLOCKSIZE
END = bytes(BLOCK)  # an archive ends with such blocks
MOST_HEADER = 1 << 20  # bytes: nothing larger is read while headers are
# Bytes of zeros at the end: two blocks, and what fills the last record of 20 blocks, as tar, bsdtar
# and Python write them. More of them are what a broken download leaves.
MOST_ZEROS = 22 * BLOCK

SUFFIX = ".tar"
NESTED = "tars inside tars inside a tar"

# First bytes of a compressed file, and what decompresses it.
COMPRESSIONS: dict[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ": ("xz", lzma.open),
}

# What `tarfile` and the decompressors raise for damage.
DAMAGE = (
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    OverflowError,
    OSError,
    EOFError,
)


class Member(NamedTuple):
    """A file of a tar, or a hard link to one: the same file under a second name."""

    name: str
    offset: int  # of its first byte in the outermost, decompressed file
    size: int  # bytes
    same_as: str | None = None  # of a link: the name of the file


class Members:
    """All files of a tar, in the order in which they lie; in columns, for there are millions."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.offsets = array("q")
        self.sizes = array("q")
        self.n_inner = 0  # members of the outermost tar that were tars
        self._number_of: dict[str, int] = {}  # of the first names

    def take(self, member: Member, folder: str = "") -> None:
        """Append a file. ValueError for a link to what is not before it."""
        offset, size = member.offset, member.size
        if member.same_as is not None:
            number = self._number(folder + member.same_as)
            if number is None:
                raise ValueError(
                    f"{readable(member.name)} is a link to {readable(member.same_as)}, which is not"
                    " before it"
                )
            offset, size = self.offsets[number], self.sizes[number]
        self.names.append(folder + member.name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def _number(self, name: str) -> int | None:
        """The place of a name. What knows it is made for the first link: most tars have none."""
        for number in range(len(self._number_of), len(self.names)):
            self._number_of[self.names[number]] = number
        return self._number_of.get(name)


# ------------------------------------------------------------------ bytes of the tar


class Bytes(ABC):
    """The bytes of a tar, decompressed."""

    @abstractmethod
    def at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer at the end only."""

    @abstractmethod
    def close(self) -> None: ...


class PlainBytes(Bytes):
    """Those of a file, at any place, from many threads."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open_regular(path)

    def n_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def at(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        self._file.close()


class StreamedBytes(Bytes):
    """Those of a compressed file, from its beginning to its end: an offset may only go forward.

    It may go back by less than CHUNK.
    """

    CHUNK = 1 << 20

    def __init__(self, path: Path, decompress: Callable[..., Any]) -> None:
        self._file: IO[bytes] = open_regular(path)
        self._stream = decompress(self._file)
        self._begin = 0  # offset of the buffer's first byte
        self._buffer = bytearray()

    def at(self, offset: int, size: int) -> bytes:
        assert offset >= self._begin, "a stream does not go back"
        while (end := self._begin + len(self._buffer)) < offset + size:
            part = self._stream.read(self.CHUNK)
            if not part:
                break
            self._buffer += part
            surplus = min(offset, end) - self.CHUNK - self._begin
            if surplus > 0:
                del self._buffer[:surplus]
                self._begin += surplus
        first = offset - self._begin
        return bytes(self._buffer[first : first + size])

    def close(self) -> None:
        self._stream.close()
        self._file.close()


class _Part(RawIOBase):
    """A part of a tar as a file, for `tarfile` to read headers from."""

    def __init__(self, data: Bytes, begin: int, end: int | None) -> None:
        self._data = data
        self._begin = begin
        self._end = end  # None: that of the data, which nobody knows yet
        self._at = begin

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at - self._begin

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._at = self._begin + offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        if self._end is not None:
            size = max(0, min(size, self._end - self._at))
        data = self._data.at(self._at, size)
        self._at += len(data)
        return data


# ------------------------------------------------------------------ trees


class TarTree(RandomTree):
    """A tar whose members can be read at any place.

    A member X.tar of the outermost tar is a folder X with the files of that tar: so ImageNet's tar
    of 1,000 tars is a tree of class folders.

    Raises:
        ValueError: a damaged or truncated archive, doubled names, names that lead outside.
    """

    described_as = "a tar"

    def __init__(self, path: Path, *, keep_open: bool = True) -> None:
        self.path = path
        self.passed_over = Counter()
        self._bytes: PlainBytes | None = PlainBytes(path)
        try:
            members = _members(self._bytes, self._bytes.n_bytes(), path, self.passed_over)
        except BaseException:
            self.close()
            raise
        self.described_as = _described(self.described_as, members)
        self.names = members.names
        self.positions = np.array(members.offsets, np.int64)
        self.sizes = np.array(members.sizes, np.int64)
        if not keep_open:
            self.close()

    def read(self, number: int, most: int | None = None) -> bytes:
        size = int(self.sizes[number])
        if most is not None:
            size = min(size, most)
        offset = int(self.positions[number])
        if self._bytes is not None:
            data = self._bytes.at(offset, size)
        else:
            with open_regular(self.path) as file:
                data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise ValueError(f"{size:,} bytes expected at {offset:,}, {len(data):,} found")
        return data

    def close(self) -> None:
        if self._bytes is not None:
            self._bytes.close()
            self._bytes = None


class StreamedTar(Tree):
    """A compressed tar: listed once from beginning to end, and read once more.

    Raises as `TarTree`.
    """

    described_as = "a tar"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed_over = Counter()
        compression = compression_of(path)
        assert compression is not None
        name, self._decompress = compression
        data = StreamedBytes(path, self._decompress)
        try:
            members = _members(data, None, path, self.passed_over)
        finally:
            data.close()
        self.described_as = f"{_described(self.described_as, members)}, {name}"
        self.names = members.names
        self.sizes = np.array(members.sizes, np.int64)
        self._offsets = np.array(members.offsets, np.int64)

    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        data = StreamedBytes(self.path, self._decompress)
        try:
            for number in numbers[np.argsort(self._offsets[numbers], kind="stable")].tolist():
                size = int(self.sizes[number])
                found = data.at(int(self._offsets[number]), size)
                yield number, _given(found, size)
        except DAMAGE as error:
            raise ValueError(f"{readable(self.path)}: damaged: {error}") from error
        finally:
            data.close()


def compression_of(path: Path) -> tuple[str, Callable[..., Any]] | None:
    """How a file is compressed, and what opens it; None where it is not."""
    head = first_bytes(path, max(map(len, COMPRESSIONS)))
    for beginning, how in COMPRESSIONS.items():
        if head.startswith(beginning):
            return how
    return None


def has_tar_header(path: Path) -> bool:
    """Whether a file begins as a tar does that is not older than POSIX's."""
    return first_bytes(path, BLOCK)[257:262] == b"ustar"


def _given(data: bytes, size: int) -> Callable[[], bytes]:
    """A call that gives what has been read."""

    def give() -> bytes:
        if len(data) != size:
            raise ValueError(f"{size:,} bytes expected, {len(data):,} found")
        return data

    return give


def _described(what: str, members: Members) -> str:
    return f"{what} of {members.n_inner:,} tars" if members.n_inner else what


# ------------------------------------------------------------------ headers


def _members(data: Bytes, n_bytes: int | None, path: Path, passed_over: Counter[str]) -> Members:
    """All files of a tar, and of the tars in it."""
    found = Members()
    n_done = 0
    with progress_of(n_bytes, "index", "B") as update:
        for member in _headers(data, 0, n_bytes, path, passed_over):
            if member.name.endswith(SUFFIX):
                folder = f"{member.name.removesuffix(SUFFIX)}/"
                _take_inner(data, member, folder, path, passed_over, found)
            else:
                found.take(member)
            update(member.offset + member.size - n_done)
            n_done = member.offset + member.size
    refuse_doubles(found.names, path)
    return found


def _take_inner(
    data: Bytes,
    outer: Member,
    folder: str,  # what it stands for
    path: Path,
    passed_over: Counter[str],
    found: Members,
) -> None:
    """The files of a tar inside a tar."""
    found.n_inner += 1
    end = outer.offset + outer.size
    for member in _headers(data, outer.offset, end, path / outer.name, passed_over):
        if member.name.endswith(SUFFIX):
            passed_over[NESTED] += 1
        else:
            found.take(member, folder)


def _headers(
    data: Bytes,
    begin: int,
    end: int | None,
    path: Path,  # for messages
    passed_over: Counter[str],
) -> Iterator[Member]:
    """The files of the tar in [begin, end). Raises ValueError, see `TarTree`."""
    part: Any = _Part(data, begin, end)
    at = 0
    try:
        archive: Any = tarfile.TarFile(
            fileobj=part, mode="r", encoding="utf-8", errors="surrogateescape"
        )
        while (info := archive.next()) is not None:
            archive.members.clear()  # it would keep them all
            at = archive.offset
            member = _member(info, begin, end, path, passed_over)
            if member is not None:
                yield member
        _check_the_end(part, archive.offset)
    except DAMAGE as error:
        raise ValueError(
            f"{readable(path)}: a damaged or truncated tar, near byte {at:,}: {error}"
        ) from error


def _member(
    info: tarfile.TarInfo, begin: int, end: int | None, path: Path, passed_over: Counter[str]
) -> Member | None:
    """A file, or None for what is none or is passed over. ValueError for a damaged one."""
    name = checked_name(info.name, path)
    if info.isdir():
        return None
    if info.issym():
        passed_over[LINKS] += 1
        return None
    if info.islnk():
        return Member(name, 0, 0, same_as=checked_name(info.linkname, path))
    if not info.isreg() or info.issparse():
        passed_over[SPECIAL] += 1
        return None
    offset = begin + info.offset_data
    if not name or info.size < 0:
        raise ValueError(f"a member called {readable(info.name)!r} of {info.size:,} bytes")
    if end is not None and offset + info.size > end:
        left = max(0, end - offset)
        raise ValueError(f"{readable(name)} has {info.size:,} bytes, {left:,} follow")
    if info.size > MOST_BYTES and not name.endswith(SUFFIX):
        raise ValueError(f"{readable(name)} has {info.size:,} bytes, more than {MOST_BYTES:,}")
    return Member(name, offset, info.size)


def _check_the_end(part: _Part, at: int) -> None:
    """ValueError where an archive that `tarfile` takes to end at `at` does not end there."""
    part.seek(at)
    rest = part.read(MOST_ZEROS + 1)
    if rest[:BLOCK] != END:
        raise ValueError("no end of the archive, or a header that is none")
    if rest.strip(b"\0"):
        raise ValueError(
            "more follows behind the end of the archive: is it several tars in one file?"
        )
    if len(rest) > MOST_ZEROS:
        raise ValueError(
            f"more than {MOST_ZEROS:,} zeros follow, as after a download that broke off: fetch it"
            " again, or unpack it if it is meant so"
        )
