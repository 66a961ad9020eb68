"""An image folder in ImageNet's layout as a store: no conversion, headers scanned once into a
cached index.

Classes, files and their order are those of torchvision's ImageFolder, without what is no part of a
data set: hidden files and folders, those that a NAS, a Mac, a notebook or Windows leaves, and
folders met a second time through a link. What is passed over is counted and told. Each image is
served as conversion would store it: see images.py.
"""

import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pipelines.ahead import run_ahead
from pipelines.files import open_regular, read_regular, readable
from pipelines.images import UNREADABLE, reason, upright_jpeg, upright_sides
from pipelines.jpeg import jpeg_header
from pipelines.store import JPG, MAX_SIDE, DamagedData, Store

# multiprocessing's ThreadPool would need semaphores, and so /dev/shm.
THREADS, CHUNK = 16, 256  # threads that wait for the disk, files of one task
HEAD = 65536  # bytes that nearly always hold what stands before a JPEG's pixels
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)  # torchvision's
# folders that are no classes and hold no images of one, in lower case; hidden ones are left out
# anyway
FOREIGN = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "__macosx", "__pycache__",
    "lost+found", "$recycle.bin", "system volume information",
}  # fmt: skip
INDEX, INDEX_VERSION = ".fap-index.npz", 2  # 1 held the sides as stored, not the upright ones
INDEX_BYTES = 1 << 30  # at most
MOST_KINDS, MOST_NAMES = 10, 5  # that a message lists

LINKS = "links to folders that are listed anyway"
HIDDEN_FILES, HIDDEN_FOLDERS = "hidden files", "hidden folders"
NO_SUFFIX = "files without suffix"
BESIDE = "files beside the class folders"


class Listing(NamedTuple):
    """The images of a folder."""

    classes: tuple[str, ...]
    files: list[tuple[str, int]]  # path and label, in torchvision's order
    ignored: dict[str, int]  # suffix or kind of what was passed over, and how often

    def notes(self) -> tuple[str, ...]:
        """A line that says what was passed over; none where nothing was."""
        if not self.ignored:
            return ()
        kinds = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        told = [f"{count:,} {readable(kind, 60)}" for kind, count in kinds[:MOST_KINDS]]
        rest = sum(count for _, count in kinds[MOST_KINDS:])
        if rest:
            told.append(f"{rest:,} of {len(kinds) - MOST_KINDS:,} other kinds")
        return (f"ignored: {', '.join(told)}",)


def list_images(root: Path) -> Listing:
    """The images below the class folders of `root`.

    Raises:
        ValueError: no class folders, a class without images.
        OSError: a folder cannot be read.
    """
    ignored: Counter[str] = Counter()
    above = {_identity(folder) for folder in (root, *root.resolve().parents)}
    classes = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if not _is_folder(entry):
            if not entry.name.startswith(INDEX):
                ignored[HIDDEN_FILES if entry.name.startswith(".") else BESIDE] += 1
        elif kind := _kind_of_foreign(entry.name):
            ignored[kind] += 1
        elif entry.is_symlink() and _identity(entry.path) in above:
            ignored[LINKS] += 1
        else:
            classes.append(entry.name)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: _images_below(os.path.join(root, name), above), classes))
    for _, passed_over in found:
        ignored += passed_over
    listing = Listing(
        tuple(classes),
        [(path, label) for label, (paths, _) in enumerate(found) for path in paths],
        dict(ignored),
    )
    empty = [
        readable(name, 60) for name, (paths, _) in zip(classes, found, strict=True) if not paths
    ]
    if empty or not classes:
        few = ", ".join(empty[:MOST_NAMES] + ["..."] * (len(empty) > MOST_NAMES))
        what = (
            f"{len(empty):,} class folder(s) without images: remove them, or fill them with"
            if empty
            else "images are"
        )
        expected = f"{what} files named {', '.join(SUFFIXES)}"
        raise ValueError(
            "; ".join(
                [
                    f"{readable(root)}: no images under {few or 'CLASS/IMAGE.JPEG'}: {expected}",
                    *listing.notes(),
                ]
            )
        )
    return listing


def _images_below(top: str, above: set[tuple[int, int]]) -> tuple[list[str], Counter[str]]:
    """Paths of the images of one class, and what was passed over. Every folder is listed once,
    links after the rest.
    """
    found: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()
    seen = set(above)
    folders, links = [top], list[str]()
    while folders or links:
        if folders:
            folder = folders.pop()
        else:
            links.sort()
            folder = links.pop(0)
            if _identity(folder) in seen:
                ignored[LINKS] += 1
                continue
        seen.add(_identity(folder))
        for entry in os.scandir(folder):
            name = entry.name
            if _is_folder(entry):
                kind = _kind_of_foreign(name)
                if kind:
                    ignored[kind] += 1
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)
            elif name.startswith("."):
                ignored[HIDDEN_FILES] += 1
            elif name.lower().endswith(SUFFIXES):
                found.append((folder, name))
            else:
                ignored[os.path.splitext(name)[1].lower() or NO_SUFFIX] += 1
    return [os.path.join(folder, name) for folder, name in sorted(found)], ignored


def _identity(folder: str | Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _kind_of_foreign(name: str) -> str:
    """What to count a folder as that is passed over; "" for one of the data."""
    if name.lower() in FOREIGN:
        return f"{name} folders"
    return HIDDEN_FOLDERS if name.startswith(".") else ""


def in_order(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    threads: int,
    chunk: int,
    what: str,
    unit: str = "img",
) -> Generator[Any, None, None]:
    """`map` on a pool of threads, in order, with few results waiting, and a progress bar on a
    terminal.
    """

    def some(first: int) -> list[Any]:
        return [work(item) for item in items[first : first + chunk]]

    calls = ((lambda first=first: some(first)) for first in range(0, len(items), chunk))
    with (
        tqdm(total=len(items), desc=what, unit=unit, delay=1, disable=None) as progress,
        contextlib.closing(run_ahead(calls, threads, 4 * threads)) as done,
    ):
        for results in done:
            yield from results
            progress.update(len(results))


class FolderStore(Store):
    """`path`/CLASS/**/IMAGE. Upright RGB JPEGs are served byte for byte; what else can be read (a
    PNG named .JPEG, grey, CMYK, turned by Exif) becomes such a JPEG each time it is read: see
    images.py.

    Raises:
        ValueError: no class folders, a class without images, files that are no images.
    """

    classes: tuple[str, ...]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        listing = list_images(self.path)
        self.classes = listing.classes
        self.notes = listing.notes()
        self._names = [os.path.relpath(file, path) for file, _ in listing.files]
        self.labels = np.array([label for _, label in listing.files], np.int64)
        self.sizes, _, heights, widths = self._scan().T.copy()
        self.heights, self.widths = heights.astype(np.int32), widths.astype(np.int32)
        self.modes = np.full(len(listing.files), JPG, np.uint8)

    def file(self, index: int) -> Path:
        """Where sample `index` lies."""
        return self.path / self._names[index]

    def read(self, index: int) -> np.ndarray:
        """A JPEG, uint8 (n,); n differs from `sizes[index]` if the file had to be re-encoded. See
        `Store.read`.
        """
        expected = int(self.heights[index]), int(self.widths[index])
        try:
            data, found = upright_jpeg(read_regular(self.file(index)))
        except UNREADABLE as error:
            raise self._damaged(index, reason(error, self.file(index))) from error
        if found != expected:
            raise self._damaged(
                index, f"{found} pixels, {expected} when it was scanned (into {INDEX})"
            )
        return np.frombuffer(data, np.uint8)

    def _damaged(self, index: int, what: str) -> DamagedData:
        return DamagedData(f"{readable(self.file(index))}: sample {index}: {what}")

    def _content_crc32(self) -> int:
        # Neither where the folder lies nor when its files were written: a copy is the same data.
        names = "\0".join(self._names).encode(errors="surrogateescape")
        tables = np.stack([self.labels, self.sizes, self.heights, self.widths]).tobytes()
        return self._crc32_of_some(zlib.crc32(tables, zlib.crc32(names)), self._content)

    def _content(self, index: int) -> bytes:
        try:
            return read_regular(self.file(index))
        except (OSError, ValueError) as error:
            raise self._damaged(index, reason(error, self.file(index))) from error

    def _scan(self) -> np.ndarray:
        """Bytes, mtime in ns, height and width of every file: the cached index saves reading
        headers again.
        """
        places = self._index_places()
        known: dict[tuple[str, int, int], tuple[int, int]] = {}  # name, bytes, mtime: sides
        for place in places:
            with contextlib.suppress(Exception):  # bad, old or missing: it is made again
                known |= _read_index(place)
        n_known = len(known)

        def row(name: str) -> tuple[int, int, int, int] | str:
            path = os.path.join(self.path, name)
            try:
                stat = os.stat(path)
                key = name, stat.st_size, stat.st_mtime_ns
                if key not in known:
                    known[key] = self._sides(path)
                sides = known[key]
            except UNREADABLE as error:
                return reason(error, path)
            if not 0 < min(sides) <= max(sides) <= MAX_SIDE:
                return f"{sides[0]} x {sides[1]} pixels: sides must be 1 to {MAX_SIDE}"
            return *key[1:], *sides

        rows = list(in_order(row, self._names, THREADS, CHUNK, "image headers"))
        bad = [
            f"{name}: {what}"
            for name, what in zip(self._names, rows, strict=True)
            if isinstance(what, str)
        ]
        if bad:
            few = "\n  ".join(readable(line) for line in bad[:MOST_NAMES])
            more = f"\n  and {len(bad) - MOST_NAMES:,} more" if len(bad) > MOST_NAMES else ""
            remedy = "mend or remove them (fap-convert lists all, and --skip-bad leaves them out)"
            raise ValueError(
                f"{readable(self.path)}: {len(bad):,} files cannot be used: {remedy}\n  {few}{more}"
            )
        table = np.array(rows, np.int64)
        for place in places if len(known) > n_known else ():
            # Read-only or full: the next place, else they are scanned again.
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                _write_index(place, self._names, table)
                break
        return table

    def _index_places(self) -> list[Path]:
        """In the folder, and in the user's cache if that is read-only."""
        places = [self.path / INDEX]
        with contextlib.suppress(RuntimeError):  # no HOME, and a user without an account
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fap"
            places.append(cache / f"{hashlib.sha256(bytes(self.path.resolve())).hexdigest()}.npz")
        return places

    def _sides(self, path: str) -> tuple[int, int]:
        """Upright (height, width) from the file's header. Raises any of UNREADABLE."""
        with open_regular(path) as file:
            head = file.read(HEAD)
        return upright_sides(head if jpeg_header(head) else read_regular(path))


def _read_index(place: Path) -> dict[tuple[str, int, int], tuple[int, int]]:
    """(name, bytes, mtime): (height, width). Raises any exception for what `_write_index` did not
    write.
    """
    content = io.BytesIO(read_regular(place, INDEX_BYTES))
    with zipfile.ZipFile(content) as archive:  # compressed, it could be of any size
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    with np.load(content, allow_pickle=False) as index:
        assert index["version"] == INDEX_VERSION
        names = os.fsdecode(index["names"].tobytes()).split("\0")
        table = index["table"]
    assert table.dtype == np.int64
    rows = table.tolist()
    return {
        (name, size, mtime): (height, width)
        for name, (size, mtime, height, width) in zip(names, rows, strict=True)
    }


def _write_index(place: Path, names: Sequence[str], table: np.ndarray) -> None:
    # Joined: an array of texts would take the longest name's room for each.
    joined = np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp.npz")
    try:
        np.savez(temporary, version=np.array(INDEX_VERSION), names=joined, table=table)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
