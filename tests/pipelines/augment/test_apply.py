"""Loaders show what the plan does to pixels: as torchvision one by one, and all back ends alike."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from pipelines import EpochPlan, PlanSpec, Store, draw_epoch, open_loader, open_store
from pipelines.augment.apply import augment
from pipelines.augment.policies import Op
from pipelines.augment.spec import NO_AUGMENT, AugmentSpec
from tests.pipelines.augment.twin import SEED, by_torchvision
from tests.step.test_static import NoHostSync

JITTER = (0.4, 0.4, 0.4, 0.1)
SPECS = {
    "randaugment": AugmentSpec("randaugment", n_ops=3, magnitude=12),
    "trivialaugment": AugmentSpec("trivialaugment"),
    "augmix": AugmentSpec("augmix", magnitude=3),
    "autoaugment": AugmentSpec("autoaugment"),
    "colours": AugmentSpec(color_jitter=JITTER),
    "erase": AugmentSpec(erase=0.7),
    "all": AugmentSpec("trivialaugment", color_jitter=JITTER, erase=0.5),
}
ALL = SPECS["all"]
needs_ffcv = pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")
needs_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs DALI")
# Raw samples that are not resized: what a back end shows of them is exact.
EXACT = [
    pytest.param("ffcv", marks=needs_ffcv),
    "turbojpeg",
    pytest.param("dali", marks=needs_dali),
]


@pytest.fixture
def store(tiny_beton: Path) -> Store:
    return open_store(tiny_beton)


def draw(store: Store, spec: AugmentSpec, **change: object) -> EpochPlan:
    rows = {"clean_rows": 8, "adv_rows": 4, "clean_group_rows": 4, "adv_group_rows": 2}
    shown = {"size": 32, "crop": "pad", "filter": "bilinear"}
    made = PlanSpec(SEED, augment=spec, **rows | shown | change)  # type: ignore[arg-type]
    return draw_epoch(made, store.heights, store.widths, 0)


def images(name: str, store: Store, plan: EpochPlan, start_step: int = 0) -> np.ndarray:
    """(steps, B, 3, S, S)."""
    loader = open_loader(name, store, size=plan.spec.size)
    try:
        return np.stack([b.images.numpy().copy() for b in loader.load(plan, start_step)])
    finally:
        loader.close()


def plain(plan: EpochPlan) -> EpochPlan:
    """Without the augmentation."""
    return replace(plan, spec=replace(plan.spec, augment=NO_AUGMENT))


@pytest.mark.parametrize("name", SPECS)
def test_a_row_shows_what_torchvision_makes_of_it(name: str, store: Store) -> None:
    spec = SPECS[name]
    plan = draw(store, spec)
    before = images("reference", store, plain(plan))
    after = images("reference", store, plan)
    for step in range(len(plan)):
        for row in range(12):
            image = torch.from_numpy(before[step, row])
            wanted = by_torchvision(image, spec, plan.augment, step, row).numpy()
            difference = np.abs(after[step, row].astype(int) - wanted)
            # By rounding alone: see test_pixels. The next operation may make more of one grey
            # level: a threshold, or the bins of a histogram. In 2,304 rows it was 0.6% of the
            # values at most, and 5.5% had that one grey level.
            assert (difference > 1).mean() < 0.03, (step, row, SEED)
            assert (difference > 0).mean() < 0.15, (step, row, SEED)
    changed = (before != after).any((2, 3, 4))
    if spec.policy or spec.color_jitter:
        assert changed.mean() > 0.5, SEED
    else:
        top, left, bottom, right = np.moveaxis(plan.augment.erase_box, 2, 0)
        assert_array_equal(changed, (bottom > top) & (right > left))


@pytest.mark.parametrize("name", EXACT)
def test_all_back_ends_show_the_same(name: str, store: Store) -> None:
    plan = draw(store, ALL)
    assert_array_equal(images(name, store, plan), images("reference", store, plan))


@needs_ffcv
@pytest.mark.parametrize("name", SPECS)
def test_starting_at_step_k_is_the_tail(name: str, store: Store) -> None:
    plan = draw(store, SPECS[name])
    whole = images("ffcv", store, plan)
    assert len(whole) > 4
    assert_array_equal(images("ffcv", store, plan, 3), whole[3:])


@pytest.mark.parametrize("name", SPECS)
def test_ranks_see_the_pixels_of_one_process(name: str, store: Store) -> None:
    """Though an operation is done to other rows at once."""
    plan = draw(store, SPECS[name])
    whole = images("reference", store, plan)
    for rank in range(2):
        part = images("reference", store, plan.for_rank(rank, 2))
        assert_array_equal(part[:, :4], whole[:, 4 * rank : 4 * rank + 4])
        assert_array_equal(part[:, 4:], whole[:, 8 + 2 * rank : 10 + 2 * rank])


@pytest.mark.parametrize("n_rows", [1, 5])
def test_how_many_rows_go_at_once_changes_nothing(
    n_rows: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in SPECS.values():
        plan = draw(store, spec)
        whole = images("reference", store, plan)
        with monkeypatch.context() as patch:
            patch.setattr("pipelines.augment.apply.PIXELS_AT_A_TIME", n_rows * 32 * 32)
            assert_array_equal(images("reference", store, plan), whole)


@pytest.mark.parametrize("on", ["clean", "adv"])
def test_only_the_chosen_partition_changes(on: str, store: Store) -> None:
    for spec in SPECS.values():
        both = draw(store, spec)
        part = draw(store, replace(spec, on=on))
        before = images("reference", store, plain(both))
        after = images("reference", store, part)
        wanted = images("reference", store, both)
        clean = slice(8), slice(8, 12)
        kept, left = clean if on == "clean" else clean[::-1]
        assert_array_equal(after[:, kept], wanted[:, kept])
        assert_array_equal(after[:, left], before[:, left])
        assert (after[:, kept] != before[:, kept]).any()


def test_copies_are_those_of_the_augmented_rows(store: Store) -> None:
    """AdvProp's: only clean rows are loaded, and drawn for."""
    plan = draw(store, ALL, adv_rows=8, adv_group_rows=4, adv_are_copies=True)
    assert plan.augment.op.shape[1] == 8
    assert plan.for_rank(1, 2).augment.op.shape[1] == 4
    assert images("reference", store, plan).shape[1] == 8


def test_colours_leave_the_canvas_around_a_picture_black(jpeg_beton: Path) -> None:
    store = open_store(jpeg_beton)
    letterbox = {"crop": "letterbox", "size": (64, 96), "jitter": (0.5, 1.5)}
    plan = draw(store, AugmentSpec(color_jitter=JITTER), **letterbox)
    before = images("reference", store, plain(plan))
    after = images("reference", store, plan)
    for step in range(len(plan)):
        for row, (top, left, height, width) in enumerate(plan.place[step].tolist()):
            outside = np.ones((64, 96), bool)
            outside[top : top + height, left : left + width] = False
            assert not after[step, row][:, outside].any()
            picture = before[step, row, :, top : top + height, left : left + width]
            own = by_torchvision(
                torch.from_numpy(picture), plan.spec.augment, plan.augment, step, row
            )
            found = after[step, row, :, top : top + height, left : left + width]
            difference = np.abs(found.astype(int) - own.numpy())
            assert difference.mean() < 0.5, SEED
    assert (before != after).mean() > 0.3


def test_erased_boxes_hold_noise(store: Store) -> None:
    plan = draw(store, AugmentSpec(erase=1.0))
    after = images("reference", store, plan)
    values = []
    for step in range(len(plan)):
        for row, (top, left, bottom, right) in enumerate(plan.augment.erase_box[step].tolist()):
            values.append(after[step, row, :, top:bottom, left:right].ravel())
    noise = np.concatenate(values)
    counts = np.bincount(noise, minlength=256)
    # Each value has 1/256 of them, give or take six standard deviations.
    expected = len(noise) / 256
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected), SEED
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 6 / np.sqrt(len(noise))


def test_rows_without_an_operation_stay_as_they_are() -> None:
    """Such as the padding rows of a plan."""
    spec = replace(ALL, on="adv")
    made = PlanSpec(SEED, 32, 6, 6, 6, 6, augment=spec)
    sides = np.full(12, 40)
    draws = draw_epoch(made, sides, sides, 0).augment
    assert not draws.op[:, :6].any() and (draws.op[:, 6:] != Op.IDENTITY).any()
    batch = torch.zeros(12, 32, 32, 3, dtype=torch.uint8)
    augment(batch, spec, draws, 0)
    assert not batch[:6].any()
    assert batch[6:].any()


@pytest.mark.parametrize("name", SPECS)
def test_the_device_is_asked_for_nothing(name: str, store: Store) -> None:
    """No value, and no shape that depends on one: the host goes ahead."""
    plan = draw(store, SPECS[name])
    for step in range(len(plan)):
        batch = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8)
        before = batch.clone()
        with NoHostSync():
            augment(batch, plan.spec.augment, plan.augment, step)
        assert not torch.equal(batch, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SPECS)
def test_a_gpu_makes_the_pixels_of_the_cpu(name: str, store: Store) -> None:
    """But for positions half way between two pixels, which its grid may round otherwise."""
    plan = draw(store, SPECS[name])
    for step in range(len(plan)):
        batch = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8)
        on_gpu = batch.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            augment(on_gpu, plan.spec.augment, plan.augment, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        augment(batch, plan.spec.augment, plan.augment, step)
        assert (on_gpu.cpu() != batch).float().mean() < 0.01
