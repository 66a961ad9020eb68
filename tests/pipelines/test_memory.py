"""The loader that holds all images on the device: the pixels of `reference`, or a refusal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from fap import checkpoint
from pipelines import PlanSpec, Store, draw_epoch, eval_plan, open_loader, open_store
from pipelines.augment.spec import AugmentSpec
from pipelines.convert import convert_arrays
from pipelines.plan import EpochPlan
from tests.run import runs


def raw_store(file: Path, height: int, width: int, count: int = 24) -> Store:
    rng = np.random.default_rng()
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    convert_arrays(file, images, np.arange(count) % 3, ("a", "b", "c"), "noise")
    return open_store(file)


def shown(name: str, store: Store, plan: EpochPlan, start: int = 0) -> list[np.ndarray]:
    loader = open_loader(name, store, size=plan.spec.size)
    return [batch.images.numpy().copy() for batch in loader.load(plan, start)]


def drawn(store: Store, size: int = 16, **more: Any) -> EpochPlan:
    spec = PlanSpec(3, size, clean_rows=8, clean_group_rows=8, crop="pad", **more)
    return draw_epoch(spec, store.heights, store.widths, 1)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 17)])
@pytest.mark.parametrize("augment", [AugmentSpec(), AugmentSpec(policy="trivialaugment")])
def test_a_training_epoch_has_the_reference_s_pixels(
    tmp_path: Path, height: int, width: int, augment: AugmentSpec
) -> None:
    store = raw_store(tmp_path / "raw.beton", height, width)
    plan = drawn(store, pad=5, augment=augment)
    assert plan.flip.any() and not plan.flip.all()
    assert_array_equal(shown("memory", store, plan), shown("reference", store, plan))
    assert_array_equal(shown("memory", store, plan, 2), shown("reference", store, plan, 2))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 21)])
def test_an_evaluation_has_the_reference_s_pixels(tmp_path: Path, height: int, width: int) -> None:
    """Every image once, and rows without a sample are zero."""
    store = raw_store(tmp_path / "raw.beton", height, width, count=11)
    plan = eval_plan(store.heights, store.widths, size=12, resize=16, batch=4)
    found = shown("memory", store, plan)
    assert_array_equal(found, shown("reference", store, plan))
    assert not found[-1][3:].any()


def test_what_it_yields_may_be_written_to(tmp_path: Path) -> None:
    store = raw_store(tmp_path / "raw.beton", 16, 16)
    plan = drawn(store, pad=2)
    loader = open_loader("memory", store, size=16)
    wanted = [batch.images.clone() for batch in loader.load(plan)]
    for batch in loader.load(plan):
        batch.images.zero_()
    again = [batch.images.clone() for batch in loader.load(plan)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_what_it_cannot_show_is_refused(tmp_path: Path, jpeg_beton: Path, raw_beton: Path) -> None:
    with pytest.raises(ValueError, match="holds JPEGs or decoded planes"):
        open_loader("memory", open_store(jpeg_beton), size=16)
    with pytest.raises(ValueError, match="images of several sizes"):
        open_loader("memory", open_store(raw_beton), size=16)
    store = raw_store(tmp_path / "raw.beton", 16, 16)
    spec = PlanSpec(0, 16, clean_rows=8, clean_group_rows=8, crop="random_resized")
    resized = draw_epoch(spec, store.heights, store.widths, 0)
    with pytest.raises(ValueError, match="does not resize images"):
        open_loader("memory", store, size=16).load(resized)
    larger = eval_plan(store.heights, store.widths, size=16, resize=18, batch=4)
    with pytest.raises(ValueError, match="does not resize images"):
        open_loader("memory", store, size=16).load(larger)


def test_a_run_from_memory_trains_as_one_from_the_reference(
    tiny_beton: Path, tmp_path: Path
) -> None:
    """Weights after the last step, and what was validated, bit for bit."""
    found = []
    for name in ("reference", "memory"):
        words = (f"data.pipeline={name}", "budget.epochs=2", "budget.milestones=[1]")
        folder, result = runs.run(tiny_beton, tmp_path / name, *words)
        tensors, _ = checkpoint.load(sorted((folder / "checkpoints").glob("step_*"))[-1])
        found.append((tensors, result["last"]))
    assert found[0][1] == found[1][1]
    for name, tensor in found[0][0].items():
        assert torch.equal(tensor, found[1][0][name]), name
