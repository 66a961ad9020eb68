"""Which images of a collection go into which file: all, a shard, or a part for validation."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.intake.collection import Collection


@dataclass(frozen=True)
class Part:
    """A file to write."""

    dst: Path
    numbers: np.ndarray  # int64 (n,), of its images, in ascending order
    made_as: dict[str, Any] = field(default_factory=dict)  # which part it is, for its sidecar


@dataclass(frozen=True)
class Shard:
    """One of several jobs that convert a collection together, from 1 to `count`.

    Raises:
        ValueError: there is no such shard.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"shard = {self.number}/{self.count}: must be 1/N to N/N")

    @classmethod
    def parsed(cls, text: str) -> "Shard":
        """Of "3/16". ValueError for other texts."""
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            raise ValueError(f"shard = {text!r}: must be like 3/16, from 1/16 to 16/16")
        return cls(int(number), int(count))

    def path(self, dst: Path) -> Path:
        """train.beton -> train-03-of-16.beton: names that sort in the order of the shards."""
        digits = len(str(self.count))
        name = f"{dst.stem}-{self.number:0{digits}}-of-{self.count}{dst.suffix}"
        return dst.with_name(name)

    def numbers(self, n: int) -> np.ndarray:
        """Its images of n: consecutive ones, so that all shards together have them in order."""
        first = (self.number - 1) * n // self.count
        end = self.number * n // self.count
        return np.arange(first, end)


def validation_numbers(
    labels: np.ndarray,  # int64 (N,)
    fraction: float,
    seed: int,
) -> np.ndarray:
    """Numbers of the images for validation: `fraction` of every class, to the nearest image.

    A class with several images has at least one in either part, a class with one is trained. The
    draw depends on labels, fraction and seed alone.

    Raises:
        ValueError: the fraction is not between 0 and 1, or no image would be left for a part.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_split = {fraction}: must be between 0 and 1, such as 0.1")
    rng = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    chosen = []
    for members in np.split(order, np.cumsum(counts)[:-1]):
        nearest = int(np.floor(fraction * len(members) + 0.5))
        wanted = min(max(nearest, 1), len(members) - 1)
        chosen.append(rng.permutation(members)[:wanted])
    numbers = np.sort(np.concatenate(chosen))
    if not len(numbers):
        raise ValueError(f"val_split = {fraction}: no class has two images, so none can be spared")
    return numbers


def val_path(dst: Path) -> Path:
    """Where the images for validation go: train.beton -> train.val.beton."""
    return dst.with_name(f"{dst.stem}.val{dst.suffix}")


def parts_of(
    collection: Collection,
    dst: Path,
    *,
    shard: Shard | None = None,
    val_split: float | None = None,
    seed: int = 0,
) -> list[Part]:
    """The files to write: `dst`, a shard of it, or `dst` and the one for validation beside it.

    Raises:
        ValueError: more shards than images, or as `validation_numbers`.
    """
    everything = np.arange(len(collection))
    if shard is not None:
        numbers = shard.numbers(len(collection))
        if not len(numbers):
            raise ValueError(
                f"shard = {shard.number}/{shard.count}: there are only {len(collection):,} images"
            )
        return [Part(shard.path(dst), numbers, {"shard": [shard.number, shard.count]})]
    if val_split is not None:
        chosen = validation_numbers(collection.labels, val_split, seed)
        made_as = {"val_split": val_split, "seed": seed}
        rest = np.setdiff1d(everything, chosen)
        return [
            Part(dst, rest, made_as | {"part": "train"}),
            Part(val_path(dst), chosen, made_as | {"part": "val"}),
        ]
    return [Part(dst, everything)]
