"""Some of the clean images, each to be attacked before it is counted."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fap.draws import random_bits
from fap.evaluate.attacks import LinfAttack
from fap.evaluate.images import Reading, Seen, StoredImages
from fap.evaluate.sets import EvalSet
from pipelines import Store
from pipelines.subset import SubsetStore

CHOICE = 0x50494354  # the key of the draw of images


@dataclass(frozen=True)
class AttackedSet(EvalSet):
    """`most` of the clean images under one attack."""

    data: Seen  # a store that somebody else opened, and closes
    attack: LinfAttack
    most: int

    @contextmanager
    def open(self) -> Iterator[AttackedImages]:
        yield AttackedImages(self.reading, self.data, self.attack, self.most)


class AttackedImages(StoredImages):
    """They are read as clean; who evaluates them attacks them."""

    def __init__(self, reading: Reading, seen: Seen, attack: LinfAttack, most: int) -> None:
        numbers = chosen(len(seen.store), most)
        super().__init__(reading, seen._replace(store=_part(seen.store, numbers)))
        self.numbers = numbers
        self.identity["attacked"] = {
            "images": [len(numbers), zlib.crc32(numbers.tobytes())],
            **attack.origin(),
        }

    def numbered(self) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
        """Each batch's images, targets, and the images' numbers in the data: int32 (B,)."""
        numbers = torch.from_numpy(self.plan.look_up(self.numbers, padding=0)).int()
        for (images, references), of_batch in zip(self.batches(), numbers, strict=True):
            yield images, references, of_batch


def chosen(
    count: int,  # images
    most: int,
) -> np.ndarray:  # int64 (n,), ascending
    """Which images are attacked: always the same for as many images, of `most` more all of those.

    Drawn, as the first images of a folder are those of its first classes.
    """
    bits = random_bits(torch.tensor([CHOICE], dtype=torch.int32), count)[0]
    return bits.argsort(stable=True)[:most].sort().values.numpy()


def _part(store: Store, numbers: np.ndarray) -> Store:
    return store if len(numbers) == len(store) else SubsetStore(store, numbers)
