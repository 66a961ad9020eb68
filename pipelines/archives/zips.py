"""Zips: their members are read and decompressed one by one."""

import contextlib
import lzma
import stat
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from pipelines.archives.tree import (
    LINKS,
    MOST_BYTES,
    SPECIAL,
    RandomTree,
    checked_name,
    refuse_doubles,
)
from pipelines.files import open_regular, readable

# Bits of a member's flags.
ENCRYPTED = 0x1
UTF_8 = 0x800  # its name is

# What zipfile and its decompressors raise for damage.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)


class ZipTree(RandomTree):
    """A zip.

    Raises:
        ValueError: a damaged or truncated archive, doubled names, names that lead outside, a member
            with a password.
    """

    described_as = "a zip"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed_over = Counter()
        self._file = open_regular(path)
        try:
            self._zip = zipfile.ZipFile(self._file)
            self._infos: list[zipfile.ZipInfo] = []
            names: list[str] = []
            for info in self._zip.infolist():
                self._take(info, names)
        except (*DAMAGE, ValueError, OSError) as error:
            self._file.close()
            raise ValueError(f"{readable(path)}: a damaged or truncated zip: {error}") from error
        self.names = names
        refuse_doubles(names, path)
        self.positions = np.array([info.header_offset for info in self._infos], np.int64)
        self.sizes = np.array([info.file_size for info in self._infos], np.int64)

    def _take(self, info: zipfile.ZipInfo, names: list[str]) -> None:
        """Remember a member if it is a file."""
        name = checked_name(_filename(info), self.path)
        if not name or info.is_dir():
            return
        mode = info.external_attr >> 16  # 0 where it was not made on a Unix
        if stat.S_ISLNK(mode):
            self.passed_over[LINKS] += 1
        elif stat.S_IFMT(mode) and not stat.S_ISREG(mode):
            self.passed_over[SPECIAL] += 1
        elif info.flag_bits & ENCRYPTED:
            raise ValueError(f"{readable(name)} has a password: unzip it")
        elif info.file_size > MOST_BYTES:
            raise ValueError(
                f"{readable(name)} has {info.file_size:,} bytes, more than {MOST_BYTES:,}"
            )
        else:
            names.append(name)
            self._infos.append(info)

    def read(self, number: int, most: int | None = None) -> bytes:
        info = self._infos[number]
        try:
            with self._zip.open(info) as member:  # its checksum is checked at its end
                return member.read(info.file_size if most is None else most)
        except DAMAGE as error:
            raise ValueError(f"damaged in its zip: {error}") from error

    def close(self) -> None:
        self._zip.close()
        self._file.close()


def _filename(info: zipfile.ZipInfo) -> str:
    """A member's name, as UTF-8 also where the archive does not say that it is.

    Info-ZIP writes UTF-8 without the flag; Python reads what has none in the code page of DOS.
    """
    if not info.flag_bits & UTF_8:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename
