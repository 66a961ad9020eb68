"""An image folder in ImageNet's layout as a store: no conversion, headers scanned once into a cached index.

Classes and files are ordered as torchvision's ImageFolder orders them; EXIF orientation is ignored, as it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .store import JPG, DamagedData, Store, jpeg_sides

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
THREADS = 16  # they wait for the disk, not for a core
CHUNK = 256  # files
HEAD = 65536  # bytes that nearly always hold a JPEG's frame header
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises


class FolderStore(Store):
    """`path`/CLASS/**/IMAGE. JPEG files, grey or colour, are served byte for byte; what else PIL reads (a PNG named
    .JPEG, CMYK) becomes an RGB JPEG of quality 95 each time it is read.

    Raises:
        ValueError: no class folders, a class without images, files that are no images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.classes = tuple(sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != "."))
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(self._list, self.classes))
            empty = [name for name, files in zip(self.classes, found, strict=True) if not files]
            if empty or not found:
                raise ValueError(f"{path}: no images under {', '.join(empty[:5]) or 'CLASS/IMAGE.JPEG'}")
            files = [file for of_class in found for file in of_class]
            sides = self._scan(pool, files)
        self._names = [name for name, _, _ in files]
        self.labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(of_class) for of_class in found])
        self.sizes = np.array([size for _, size, _ in files], np.int64)
        self.heights, self.widths = np.array(sides, np.int32).T.copy()
        self.modes = np.full(len(files), JPG, np.uint8)

    def file(self, index: int) -> Path:
        """Where sample `index` lies."""
        return self.path / self._names[index]

    def read(self, index: int) -> np.ndarray:
        """A JPEG, uint8 (n,); n differs from `sizes[index]` if the file had to be re-encoded. See `Store.read`."""
        sides = int(self.heights[index]), int(self.widths[index])
        try:
            data = self.file(index).read_bytes()
            found = jpeg_sides(data)
            # precision, sides and component count stand together in the frame header; four components are CMYK
            if found is None or struct.pack(">BHHB", 8, *found, 4) in data:
                with Image.open(io.BytesIO(data)) as image:
                    found, rgb, out = image.size[::-1], image.convert("RGB"), io.BytesIO()
                rgb.save(out, "JPEG", quality=95, subsampling=0)
                data = out.getvalue()
        except UNREADABLE as error:
            raise DamagedData(f"{self.file(index)}: sample {index}: {error}") from error
        if found != sides:
            raise DamagedData(f"{self.file(index)}: sample {index}: {found} pixels, {sides} when it was scanned")
        return np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """No file stays open."""

    def _list(self, name: str) -> list[tuple[str, int, int]]:
        """(path below the folder, bytes, mtime in ns) of every image of a class."""
        files = []
        for root, _, names in sorted(os.walk(self.path / name, followlinks=True)):
            for path in (os.path.join(root, n) for n in sorted(names) if n.lower().endswith(EXTENSIONS)):
                stat = os.stat(path)
                files.append((os.path.relpath(path, self.path), stat.st_size, stat.st_mtime_ns))
        return files

    def _scan(self, pool: ThreadPoolExecutor, files: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
        """(height, width) from the cached index; only the headers of new and changed files are read."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fap"
        key = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:16]
        places = self.path / ".fap-index.npz", cache / f"{key}.npz"  # the second if the folder is read-only
        known: dict[tuple[str, int, int], tuple[int, int]] = {}
        for place in places:
            try:
                with np.load(place, allow_pickle=False) as index:
                    names, table = os.fsdecode(index["names"].tobytes()).split("\0"), index["table"].tolist()
                known |= {(n, size, mtime): (h, w) for n, (size, mtime, h, w) in zip(names, table, strict=True)}
            except Exception:  # missing, cut short, foreign: an index can always be made again
                continue
        new = [file for file in files if file not in known]
        with tqdm(total=len(new), desc="image headers", unit=" files", disable=not new) as progress:
            for part in pool.map(self._sides, (new[i : i + CHUNK] for i in range(0, len(new), CHUNK))):
                known |= part
                progress.update(len(part))
        if bad := [file[0] for file in files if 0 in known[file]]:
            raise ValueError(f"{self.path}: {len(bad)} files are no images, such as {', '.join(bad[:5])}: remove them")
        if new:
            names = np.frombuffer(os.fsencode("\0".join(name for name, _, _ in files)), np.uint8)
            table = np.array([(*file[1:], *known[file]) for file in files], np.int64)
            for place in places:
                temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
                with contextlib.suppress(OSError):  # read-only: the next place, or scan again next time
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with open(temporary, "wb") as f:
                        np.savez(f, names=names, table=table)
                    os.replace(temporary, place)
                    break
        return [known[file] for file in files]

    def _sides(self, files: list[tuple[str, int, int]]) -> dict[tuple[str, int, int], tuple[int, int]]:
        """(height, width) from the files' headers; (0, 0) where there is no image."""
        sides = {}
        for file in files:
            try:
                with open(self.path / file[0], "rb") as f:
                    found = jpeg_sides(f.read(HEAD))
                if found is None:
                    with Image.open(self.path / file[0]) as image:
                        found = image.height, image.width
                sides[file] = found
            except UNREADABLE:
                sides[file] = 0, 0
        return sides
