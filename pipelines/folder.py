"""An image folder in ImageNet's layout as a store: no conversion, headers scanned once into a cached index.

Classes and files are ordered as torchvision's ImageFolder orders them; EXIF orientation is ignored, as it does.
"""

import contextlib
import hashlib
import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .store import JPG, MAX_SIDE, PIXELS_PER_BYTE, DamagedData, Store, jpeg_sides

# multiprocessing's ThreadPool would need semaphores, and so /dev/shm.
THREADS, CHUNK = 16, 256  # threads that wait for the disk, files of one task
HEAD = 65536  # bytes that nearly always hold a JPEG's frame header
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises


def list_images(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Classes, and path and label of every image, in torchvision's order.

    Raises:
        ValueError: no class folders, a class without images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = tuple(sorted(e.name for e in os.scandir(root) if e.is_dir() and e.name[0] != "."))
    with ThreadPoolExecutor(THREADS) as pool:
        found = [*pool.map(lambda name: make_dataset(root, {name: 0}, IMG_EXTENSIONS, allow_empty=True), classes)]
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty or not classes:
        raise ValueError(f"{root}: no images under {', '.join(empty[:5]) or 'CLASS/IMAGE.JPEG'}")
    return classes, [(path, label) for label, files in enumerate(found) for path, _ in files]


class FolderStore(Store):
    """`path`/CLASS/**/IMAGE. JPEG files, grey or colour, are served byte for byte; what else PIL reads (a PNG named
    .JPEG, CMYK) becomes an RGB JPEG of quality 95 each time it is read.

    Raises:
        ValueError: no class folders, a class without images, files that are no images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.classes, files = list_images(self.path)
        self._names = [os.path.relpath(file, path) for file, _ in files]
        self.labels = np.array([label for _, label in files], np.int64)
        self.sizes, _, heights, widths = self._scan().T.copy()
        self.heights, self.widths = heights.astype(np.int32), widths.astype(np.int32)
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

    def _content_crc32(self) -> int:
        # Neither where the folder lies nor when its files were written: a copy is the same data.
        names = "\0".join(self._names).encode(errors="surrogateescape")
        tables = np.stack([self.labels, self.sizes, self.heights, self.widths]).tobytes()
        return self._crc32_of_some(zlib.crc32(tables, zlib.crc32(names)), lambda index: self.file(index).read_bytes())

    def _scan(self) -> np.ndarray:
        """Bytes, mtime in ns, height and width of every file: the cached index saves reading headers again."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fap"  # if the folder is read-only
        places = self.path / ".fap-index.npz", cache / f"{hashlib.sha256(bytes(self.path.resolve())).hexdigest()}.npz"
        known: dict[tuple[str, int, int], tuple[int, int]] = {}  # name, bytes, mtime: sides
        for place in places:
            with contextlib.suppress(Exception), np.load(place) as index:  # bad or missing: it is made again
                found = zip(index["names"].tolist(), index["table"].tolist(), strict=True)
                known |= {(name, size, mtime): (h, w) for name, (size, mtime, h, w) in found}
        n_known = len(known)

        def row(name: str) -> tuple[int, int, int, int]:
            stat = os.stat(path := os.path.join(self.path, name))
            key = name, stat.st_size, stat.st_mtime_ns
            if key not in known:
                known[key] = self._sides(path)
            return *key[1:], *known[key]

        def rows(names: list[str]) -> list[tuple[int, int, int, int]]:
            return [row(name) for name in names]

        found_rows: list[tuple[int, int, int, int]] = []
        parts = [self._names[i : i + CHUNK] for i in range(0, len(self._names), CHUNK)]
        with ThreadPoolExecutor(THREADS) as pool, tqdm(desc="image headers", total=len(self._names), delay=1) as progress:
            for part in pool.map(rows, parts):
                found_rows += part
                progress.update(len(part))
        table = np.array(found_rows)
        if len(bad := np.flatnonzero((table[:, 2:] < 1).any(1) | (table[:, 2:] > MAX_SIDE).any(1))):
            what = f"no images, such as {', '.join(self._names[i] for i in bad[:5])}, or have a side above {MAX_SIDE} pixels"
            raise ValueError(f"{self.path}: {len(bad)} files are {what}: remove them")
        for place in places if len(known) > n_known else ():
            temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp.npz")
            with contextlib.suppress(OSError):  # read-only: the next place, else it is scanned again
                place.parent.mkdir(parents=True, exist_ok=True)
                np.savez(temporary, names=np.array(self._names), table=table)
                os.replace(temporary, place)
                break
        return table

    def _sides(self, path: str) -> tuple[int, int]:
        """From the file's header; (0, 0) where there is no image."""
        with contextlib.suppress(*UNREADABLE), open(path, "rb") as f:
            return jpeg_sides(f.read(HEAD)) or Image.open(path).size[::-1]
        return 0, 0
