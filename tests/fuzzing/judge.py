"""What a run sees of a damaged source, and whether it may see that."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

import pipelines
from fap import checkpoint
from pipelines import DamagedData, EpochPlan, PlanSpec, Store
from pipelines.back_ends import Filter
from tests.fuzzing.intact import make_beton, make_folder

# What commands print as a message.
ALLOWED = (ValueError, OSError, DamagedData, checkpoint.DamagedCheckpoint)

# Grey levels between rows that show the same; the samples' own rows are twice as far apart.
SAME_ROW = 6
SHARE_OF_DALI = 0.08  # of the inputs, since it builds a graph for every one


class Delivered(NamedTuple):
    """What a loader gives for one sample: its label and image, or an error."""

    index: int
    label: int | None
    image: np.ndarray | None  # uint8 (size, size, 3)
    error: Exception | None = None


@dataclass
class Damage:
    """What was done to a source."""

    touched: set[int]
    """Samples whose bytes are damaged."""
    tables: bool = False
    """The tables are damaged: any sample may be another one, or none."""
    checksums: bool = False
    """There are checksums, so every damage is noticed."""
    moved: bool = False
    """Bytes were moved inside the file: some of another's pixels may lie in a sample's place."""


def assert_says_where(error: BaseException, path: Path, index: int | None = None) -> None:
    """The error is of a type that commands print, and names the file and the sample."""
    if not isinstance(error, ALLOWED):
        raise AssertionError(f"a {type(error).__name__}: {error}") from error
    assert str(path) in str(error), f"{path} is not named: {error!r}"
    if index is not None:
        assert f"sample {index}:" in str(error), f"sample {index} is not named: {error!r}"


def pick_loaders(rng: np.random.Generator, source: str) -> list[str]:
    """Those that are installed: one of the fast ones, and DALI for a share of the inputs."""
    fast = ["turbojpeg"]
    if find_spec("ffcv"):
        fast.append("ffcv")
    loaders = [str(rng.choice(fast)), "reference"]
    # DALI takes no file of raw and JPEG samples, and no planes.
    if (
        source not in ("mixed", "planes")
        and rng.random() < SHARE_OF_DALI
        and find_spec("nvidia.dali")
    ):
        loaders.append("dali")
    return loaders


def squares(store: Store, size: int, filter_: Filter) -> EpochPlan:
    """The square in the middle of every image, in order, on all of the canvas: one row a step.

    As training shows images: by the filter for which a back end has a decoder of its own.
    """
    plan = pipelines.eval_plan(store.heights, store.widths, size=size, resize=size, batch=1)
    sides = np.stack([store.heights, store.widths], 1)
    shorter = sides.min(1, keepdims=True)
    window = np.concatenate([(sides - shorter) // 2, shorter, shorter], 1)
    place = np.broadcast_to([0, 0, size, size], window.shape)
    return replace(
        plan,
        spec=PlanSpec(0, size, 1, clean_group_rows=1, filter=filter_),
        window=window[:, None].astype(plan.window.dtype),
        place=place[:, None].astype(plan.place.dtype),
    )


def deliver(name: str, store: Store, size: int) -> Iterator[Delivered]:
    """Every sample through a loader, in order."""
    plan = squares(store, size, pipelines.BACK_ENDS[name].filters[0])
    labels = plan.look_up(store.labels, padding=-1)[:, 0]
    options = {} if name == "reference" else {"threads": 1, "prefetch": 1}
    try:
        loader = pipelines.open_loader(name, store, size=size, **options)
    except ValueError as error:
        # DALI takes no file of raw and JPEG samples, which one damaged byte makes of a raw one.
        yield Delivered(0, None, None, error)
        return
    step = 0
    try:
        while step < len(plan):
            try:
                for batch in loader.load(plan, step):
                    image = batch.images[0].permute(1, 2, 0).numpy().copy()
                    yield Delivered(step, int(labels[step]), image)
                    step += 1
            except ALLOWED as error:
                yield Delivered(step, None, None, error)
                step += 1
                # It reads ahead: which step the error meets is open, and a graph is slow to build.
                if name == "dali":
                    break
    finally:
        loader.close()


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows of two images that show the same: bool (H,)."""
    return np.abs(a.astype(int) - b).mean((1, 2)) < SAME_ROW


@cache
def twins(source: str, name: str, size: int) -> list[np.ndarray]:
    """What the loader makes of the intact source."""
    with tempfile.TemporaryDirectory() as folder:
        if source == "folder":
            store = pipelines.open_store(make_folder(Path(folder)))
        else:
            store = pipelines.open_store(make_beton(Path(folder), source))
        found = []
        for delivered in deliver(name, store, size):
            assert delivered.image is not None, delivered.error
            found.append(delivered.image)
        store.close()
    for i, a in enumerate(found):
        assert not any(alike(a, b).any() for b in found[:i]), "the fixtures are too similar"
    return found


def judge(
    store: Store,
    loaders: list[str],
    size: int,
    source: str,  # a key of RAW_SAMPLES, or "folder"
    labels: list[int],
    damage: Damage,
) -> set[int]:
    """Deliver everything; returns the samples that the first loader refused."""
    refused = set()
    for name in loaders:
        expected = twins(source, name, size)
        for delivered in deliver(name, store, size):
            if delivered.error is not None:
                _judge_error(delivered.error, delivered.index, name, store, damage)
                if name == loaders[0]:
                    refused.add(delivered.index)
            else:
                _judge_image(delivered, name, expected, labels, damage)
    return refused


def _judge_error(error: Exception, index: int, name: str, store: Store, damage: Damage) -> None:
    """An error names the sample, which is damaged. DALI reads ahead: it names the file only."""
    if name == "dali":
        assert_says_where(error, store.path)
        suspect = damage.tables or damage.touched
    else:
        assert_says_where(error, store.file(index), index)
        suspect = damage.tables or index in damage.touched
    assert suspect, f"{name}: intact sample {index}: {error!r}"


def _judge_image(
    delivered: Delivered, name: str, expected: list[np.ndarray], labels: list[int], damage: Damage
) -> None:
    """An intact sample is as ever, and a damaged one does not show another one's pixels."""
    i, label, image, _ = delivered
    assert image is not None
    if i in damage.touched:
        assert not damage.checksums, f"{name}: damage of sample {i} was not noticed"
    as_ever = np.array_equal(image, expected[i])
    if i not in damage.touched and not damage.tables:
        assert label == labels[i] and as_ever, f"{name}: intact sample {i} changed"
    if as_ever:
        return
    for j, other in enumerate(expected):
        rows = alike(image, other)
        shown = rows.all() if damage.moved else rows.any()
        assert j == i or not shown, f"{name}: sample {i} shows sample {j}"
