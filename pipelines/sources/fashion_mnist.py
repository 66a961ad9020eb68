"""Fashion-MNIST as arrays: a copy under `data/fashion_mnist`, else from a source.

Sources are an installed Debian package, by torchvision the authors' own site, and the Debian
package unpacked, which needs no root.
"""

import gzip
import hashlib
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from pipelines.files import one_line, write_whole
from pipelines.images import reason
from pipelines.sources.fetching import little_patience, verified

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SIDE = 28  # pixels
PACKAGE = "dataset-fashion-mnist"  # Debian's; MIT licence
INSTALLED = Path("usr/share/datasets/fashion-mnist")  # where the package has its files
MOST_BYTES = 100 << 20  # of one file; the largest has 47 MB

# Images and labels, as the IDX files that the archives hold.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
IMAGES_HEADER_BYTES = 16
LABELS_HEADER_BYTES = 8

MOST_SHOWN = 200  # characters of an error


def load(
    split: Literal["train", "test"], root: str | Path = "data/fashion_mnist"
) -> tuple[np.ndarray, np.ndarray]:
    """One split in its published order: uint8 (N, 28, 28) and int64 (N,), N = 60,000 or 10,000.

    Raises:
        OSError: no copy under `root` and no source can be reached.
        ValueError: unknown split, or the copy under `root` is damaged.
    """
    if split not in FILES:
        raise ValueError(f"split = {split!r}: must be train or test")
    root = Path(root)
    if not all((root / name).exists() for name in SHA256):
        _fetch(root)
    images_file, labels_file = FILES[split]
    content = {name: verified(root / name, SHA256[name], most=MOST_BYTES) for name in FILES[split]}
    images = np.frombuffer(content[images_file], np.uint8, offset=IMAGES_HEADER_BYTES)
    labels = np.frombuffer(content[labels_file], np.uint8, offset=LABELS_HEADER_BYTES)
    return images.reshape(-1, SIDE, SIDE), labels.astype(np.int64)


# ------------------------------------------------------------------ where it comes from


def _fetch(root: Path) -> None:
    """The four files, from the first source that has them. Each gets its name when it is whole.

    Raises OSError, with what each source said, if none has them.
    """
    root.mkdir(parents=True, exist_ok=True)
    failures = []
    for source, unpack in SOURCES.items():
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as folder:
            try:
                files = _unzipped(unpack(Path(folder)))
            except Exception as error:
                # Whatever a network, a disk or an archive raises: there is another source.
                failures.append(f"{source}: {one_line(error, MOST_SHOWN)}")
                tqdm.write(f"Fashion-MNIST: not from {failures[-1]}")
                continue
        for name, content in files.items():
            write_whole(root / name, [content])
        return
    raise OSError(
        f"Fashion-MNIST: no source could be reached ({'; '.join(failures)})."
        f" Put {', '.join(SHA256)} into {root}, or apt-get install {PACKAGE}"
    )


def _unzipped(folder: Path) -> Mapping[str, bytes]:
    """What the archives in a folder hold. Raises ValueError for other content."""
    files = {}
    for name, sha256 in SHA256.items():
        archive = folder / f"{name}.gz"
        try:
            with gzip.open(archive) as file:
                content = file.read(MOST_BYTES)  # of a bomb, no more
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{archive.name}: {reason(error)}") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{archive.name}: not the content that is expected (wrong sha256)")
        files[name] = content
    return files


def _installed(_: Path) -> Path:
    """The Debian package's files, where somebody has installed it."""
    folder = Path("/") / INSTALLED
    if not folder.exists():
        raise FileNotFoundError("not installed")
    return folder


def _published(folder: Path) -> Path:
    """The authors' own archives."""
    from torchvision.datasets import FashionMNIST

    with little_patience():
        return Path(FashionMNIST(str(folder), download=True).raw_folder)


def _from_debian(folder: Path) -> Path:
    """The Debian package, unpacked into `folder`."""
    tqdm.write(f"Fashion-MNIST: apt-get download {PACKAGE}: 31 MB")
    _run(["apt-get", "download", "-q", PACKAGE], folder)
    (package,) = folder.glob(f"{PACKAGE}_*.deb")
    _run(["dpkg-deb", "-x", package.name, "."], folder)
    return folder / INSTALLED


def _run(command: list[str], folder: Path) -> None:
    """Raises OSError with the last line that a failing command says."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(f"{' '.join(command[:2])}: {said[-1]}")


SOURCES: dict[str, Callable[[Path], Path]] = {
    "an installed package": _installed,
    "the authors' site": _published,
    "Debian": _from_debian,
}
