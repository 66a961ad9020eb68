"""Batches of corrupted images, and their form on the disk, a `.beton`."""

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.ahead import run_ahead
from pipelines.corrupt import corrupt
from pipelines.loaders.base import Batch
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import RAW

BATCHES_AHEAD = 3  # one is with the model, the work of two is under way
IMAGES_PER_CALL = 16  # sent to a process at once


def corrupted(
    batches: Iterable[Batch],
    index: np.ndarray,  # (steps, B), the plan's: the number of each row's image
    *,
    name: str,
    severity: int,
    pool: Executor,
    seed: int = 0,
) -> Generator[Batch, None, None]:
    """The batches with their images corrupted, in order and on their device; they may be kept.

    Raises:
        ValueError: an unknown name or severity, as `corrupt`.
    """

    def working(batch: Batch) -> Callable[[], Batch]:
        # Copied now: the loader fills its buffer again when it is asked for the next batch.
        images = _nhwc(batch.images).copy()

        def work() -> Batch:
            rows = pool.map(
                corrupt,
                images,
                repeat(name),
                repeat(severity),
                repeat(seed),
                index[batch.step],
                chunksize=IMAGES_PER_CALL,
            )
            made = torch.from_numpy(np.stack(list(rows))).permute(0, 3, 1, 2)
            return replace(batch, images=made.to(batch.images.device))

        return work

    # The threads only wait for the pool.
    calls = (working(batch) for batch in batches)
    with closing(run_ahead(calls, threads=BATCHES_AHEAD, ahead=BATCHES_AHEAD)) as done:
        yield from done


def build(
    batches: Iterable[tuple[Tensor, Tensor]],  # images, and labels with -1 for padding
    dst: Path,
    *,
    capacity: int,
    classes: Sequence[str] | None,
    encoding: dict[str, Any],  # says what the samples are
) -> None:
    """Write the rows with a label, at most `capacity`, into a `.beton` of raw samples."""
    with BetonWriter(dst, capacity) as writer:
        for images, labels in batches:
            for image, label in zip(_nhwc(images), labels.tolist(), strict=True):
                if label >= 0:
                    height, width = image.shape[:2]
                    writer.add(Sample(image.tobytes(), RAW, height, width), label)
        writer.commit(classes, encoding)


def _nhwc(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) -> (B, H, W, 3) on the CPU; a view where it is there already."""
    return images.permute(0, 2, 3, 1).cpu().numpy()
