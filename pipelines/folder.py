"""An image folder in ImageNet's layout as a store: no conversion, headers scanned once into a cached index.

Classes and files are ordered as torchvision's ImageFolder orders them; EXIF orientation is ignored, as it does.
"""

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

from .store import JPG, MAX_SIDE, PIXELS_PER_BYTE, DamagedData, Store, jpeg_sides

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
THREADS, CHUNK = 16, 256  # threads that wait for the disk, files of one task
HEAD = 65536  # bytes that nearly always hold a JPEG's frame header
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises

File = tuple[str, int, int]  # path below the folder, bytes, mtime in ns
Sides = tuple[int, int]  # height, width in pixels


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
            if found and found[0] * found[1] > PIXELS_PER_BYTE * len(data):
                raise ValueError(f"too few bytes for a JPEG of {found} pixels")
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

    def _list(self, name: str) -> list[File]:
        """Every image of a class."""
        files = []
        for root, _, names in sorted(os.walk(self.path / name, followlinks=True)):
            for path in (os.path.join(root, n) for n in sorted(names) if n.lower().endswith(EXTENSIONS)):
                stat = os.stat(path)
                files.append((os.path.relpath(path, self.path), stat.st_size, stat.st_mtime_ns))
        return files

    def _scan(self, pool: ThreadPoolExecutor, files: list[File]) -> list[Sides]:
        """Sides from the cached index; only the headers of new and changed files are read."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fap"  # if the folder is read-only
        places = self.path / ".fap-index.npz", cache / f"{hashlib.sha256(bytes(self.path.resolve())).hexdigest()}.npz"
        known: dict[File, Sides] = {}
        for place in places:
            with contextlib.suppress(Exception), np.load(place) as index:  # bad or missing: it is made again
                rows = zip(index["names"].tolist(), index["table"].tolist(), strict=True)
                known |= {(name, size, mtime): (h, w) for name, (size, mtime, h, w) in rows}
        new = [file for file in files if file not in known]
        parts = [new[i : i + CHUNK] for i in range(0, len(new), CHUNK)]
        for found in tqdm(pool.map(self._sides, parts), "image headers", len(parts), unit_scale=CHUNK, disable=not new):
            known |= found
        if bad := [file[0] for file in files if not 0 < min(known[file]) <= max(known[file]) <= MAX_SIDE]:
            what = f"no images, such as {', '.join(bad[:5])}, or have a side above {MAX_SIDE} pixels"
            raise ValueError(f"{self.path}: {len(bad)} files are {what}: remove them")
        table = np.array([(*file[1:], *known[file]) for file in files], np.int64)
        for place in places if new else ():
            temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp.npz")
            with contextlib.suppress(OSError):  # read-only: the next place, else it is scanned again
                place.parent.mkdir(parents=True, exist_ok=True)
                np.savez(temporary, names=np.array([file[0] for file in files]), table=table)
                os.replace(temporary, place)
                break
        return [known[file] for file in files]

    def _sides(self, files: list[File]) -> dict[File, Sides]:
        """Sides from the files' headers; (0, 0) where there is no image."""
        sides = dict.fromkeys(files, (0, 0))
        for file in files:
            with contextlib.suppress(*UNREADABLE), open(self.path / file[0], "rb") as f:
                sides[file] = jpeg_sides(f.read(HEAD)) or Image.open(f.name).size[::-1]
        return sides
