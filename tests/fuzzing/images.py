"""Target: odd image files, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import pipelines
from pipelines import convert
from pipelines.convert_images import convert_images
from tests.fuzzing.damage import mutate
from tests.pipelines.image_files import random_file

COUNT = 6
CLASSES = "ab"


def fuzz_images(rng: np.random.Generator, folder: Path) -> str:
    """Formats, modes and orientations, some damaged.

    A folder and its `.beton` agree on every image, or both refuse the same files.
    """
    source = folder / "source"
    made = []
    for i in range(COUNT):
        what, data = random_file(rng)
        if rng.random() < 0.2:
            data, how = mutate(rng, data)
            what += how
        made.append(what)
        file = source / CLASSES[i % 2] / f"{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    dst = folder / "out.beton"
    try:
        convert_images(source, dst, threads=1)
    except convert.BadImages as error:
        for bad in {path for path, _ in error.bad}:
            Path(bad).unlink()
        if not all(any(source.glob(f"{name}/*")) for name in CLASSES):
            return f"all refused: {made}"
        convert_images(source, dst, threads=1)
    files = pipelines.open_store(source)
    beton = pipelines.open_store(dst)
    for i in range(len(beton)):
        assert files.read(i).tobytes() == beton.read(i).tobytes(), files.file(i)
    return f"{len(beton)} of {made}"
