"""Random image folders, with all that lies in the way, and a slow twin of their listing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipelines.archives.listing import SUFFIXES

# Folders that are no part of the data.
TRAPS = [
    "@eaDir",
    ".ipynb_checkpoints",
    "__MACOSX",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    ".git",
]
FOLDERS = ["deep", "a", "a b", "a-b", "a.b", "z.JPEG", *TRAPS]
FILES = [
    *["1.JPEG", "2.jpg", "a.PNG", "b.Jpeg", "c.webp", "d.tif", "\u00e9.jpeg", "a b.bmp"],
    *[".hidden.jpg", "._1.JPEG", "Thumbs.db", "x.txt", "y.jfif", "z.gif", "e.jpg.bak"],
    *["no suffix", "jpg"],
]


def put(path: Path) -> None:
    """An empty file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def is_trap(name: str) -> bool:
    return name.startswith(".") or name.lower() in {trap.lower() for trap in TRAPS}


def random_tree(rng: np.random.Generator, root: Path) -> None:
    """Three classes with folders, traps and all sorts of names.

    There are links to folders up, down and beside.
    """
    every = [root]
    for name in ("c1", "c10", "c 2"):
        put(root / name / "0.JPEG")
        inside = [root / name]
        for _ in range(int(rng.integers(6))):
            folder = inside[rng.integers(len(inside))] / str(rng.choice(FOLDERS))
            folder.mkdir(exist_ok=True)
            inside.append(folder)
        for _ in range(int(rng.integers(12))):
            put(inside[rng.integers(len(inside))] / str(rng.choice(FILES)))
        every += inside
    for i in range(int(rng.integers(6))):
        link = every[rng.integers(1, len(every))] / f"link{i}"
        link.symlink_to(every[rng.integers(len(every))], target_is_directory=True)


def listed_slowly(root: Path) -> list[str]:
    """A twin of `list_images`.

    It lists real folders first, then links, in the order of their paths, to what has not been
    listed yet.
    """
    found: list[str] = []
    for name in sorted(os.listdir(root)):
        found += _below(root / name, {root.resolve(), *root.resolve().parents})
    return found


def _below(top: Path, seen: set[Path]) -> list[str]:
    pairs = []  # folder, name
    waiting = [str(top)]
    while waiting:
        next_top = waiting.pop(0)
        if Path(next_top).resolve() in seen:
            continue
        for folder, inner, files in os.walk(next_top):
            seen.add(Path(folder).resolve())
            inner[:] = [name for name in inner if not is_trap(name)]
            paths = [os.path.join(folder, name) for name in inner]
            waiting += [path for path in paths if os.path.islink(path)]
            for name in files:
                if name[0] != "." and Path(name).suffix.lower() in SUFFIXES:
                    pairs.append((folder, name))
        waiting.sort()
    return [os.path.join(*pair) for pair in sorted(pairs)]
