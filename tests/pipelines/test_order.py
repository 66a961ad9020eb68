"""Which images an epoch shows: plain loops, DeiT's sampler, counts and distributions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from pipelines import order
from pipelines.plan import ORDER, EpochPlan, draw_epoch
from pipelines.plan_spec import PlanSpec

SPEC = PlanSpec(seed=3, size=8, clean_rows=24, clean_group_rows=6, adv_rows=12, adv_group_rows=3)
# Of the rows of SPEC: four clean groups of 6, four adversarial ones of 3.
GROUPS = np.concatenate([np.arange(24) // 6, 4 + np.arange(12) // 3])


def drawn(spec: PlanSpec, n: int, epoch: int = 0, labels: np.ndarray | None = None) -> EpochPlan:
    sides = np.full(n, 10, np.int32)
    return draw_epoch(spec, sides, sides, epoch, labels)


def stream(epoch: int) -> np.random.Generator:
    """That of the order."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([3, epoch, ORDER])))


def test_an_epoch_shows_every_image_once_in_the_order_of_its_stream() -> None:
    """Frozen: runs of before there were other orders go on as they began."""
    plan = drawn(SPEC, 100, epoch=4)
    wanted = stream(4).permutation(np.arange(100, dtype=np.uint32))[:72]
    assert plan.index.dtype == np.uint32
    np.testing.assert_array_equal(plan.index.ravel(), wanted)
    np.testing.assert_array_equal(plan.index.ravel()[:4], [67, 31, 25, 72])


# ---------------------------------------------------------------------- balanced


def long_tailed(n: int, seed: int = 0) -> np.ndarray:
    """Labels of which some are rare, and 2 does not occur at all."""
    rng = np.random.default_rng(seed)
    return rng.permutation(
        np.concatenate([[0, 1, 1, 3, 3, 3], rng.choice([4, 5], n - 6, p=[0.8, 0.2])])
    )


@pytest.mark.parametrize("n", [40, 108, 500])
def test_every_class_is_shown_equally_often_and_evenly_inside(n: int) -> None:
    labels = long_tailed(n)
    spec = replace(SPEC, sampling="balanced")
    plan = drawn(spec, n, labels=labels)
    assert len(plan) == n // 36
    shown = plan.index.ravel()
    of_class = np.bincount(labels[shown], minlength=6)
    assert of_class[2] == 0
    there = of_class[[0, 1, 3, 4, 5]]
    assert there.max() - there.min() <= 1
    times = np.bincount(shown, minlength=n)
    for label in (0, 1, 3, 4, 5):
        of_image = times[labels == label]
        assert of_image.max() - of_image.min() <= 1, "none again before all of its class"


def test_balanced_epochs_differ_and_are_functions_of_seed_and_epoch() -> None:
    labels = long_tailed(200)
    spec = replace(SPEC, sampling="balanced")
    one = drawn(spec, 200, 1, labels).index
    np.testing.assert_array_equal(one, drawn(spec, 200, 1, labels).index)
    for other in (drawn(spec, 200, 2, labels), drawn(replace(spec, seed=4), 200, 1, labels)):
        assert not np.array_equal(one, other.index)


def test_images_of_a_large_class_and_the_odd_places_are_drawn_evenly() -> None:
    """Over many draws: which class gets one more, which images are shown, and where."""
    labels = np.array([0] * 30 + [1] * 2 + [2] * 3)
    rng = np.random.default_rng(0)
    draws = np.stack([order.balanced(rng, labels, 31) for _ in range(3000)])  # 31 = 3 * 10 + 1
    more = (labels[draws] == np.arange(3)[:, None, None]).sum(2) == 11
    assert (more.sum(0) == 1).all()
    assert chisquare(more.sum(1)).pvalue > 1e-6
    assert chisquare(np.bincount(draws.ravel(), minlength=35)[:30]).pvalue > 1e-6
    assert chisquare(np.bincount(np.where(labels[draws] == 1)[1], minlength=31)).pvalue > 1e-6


def test_balanced_needs_labels() -> None:
    with pytest.raises(ValueError, match="sampling = 'balanced': takes the labels"):
        drawn(replace(SPEC, sampling="balanced"), 40)


# ---------------------------------------------------------------------- repeats


def deits(order: list[int], repeats: int, world: int) -> list[list[int]]:
    """What each rank is shown by the RASampler of DeiT (samplers.py), to the order's end."""
    repeated = [image for image in order for _ in range(repeats)]
    return [repeated[rank::world] for rank in range(world)]


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_groups_are_shown_what_deits_ranks_are(repeats: int) -> None:
    """Where the rows of a step divide by the repeats; DeiT's go on into the next step if not."""
    spec = PlanSpec(seed=3, size=8, clean_rows=24, clean_group_rows=6, repeats=repeats)
    n = 150
    plan = drawn(spec, n)
    assert len(plan) == n // 24, "as many steps as without"
    images = stream(0).permutation(n).tolist()
    for group, theirs in enumerate(deits(images, repeats, world=4)):
        ours = plan.index[:, 6 * group : 6 * (group + 1)].ravel().tolist()
        assert ours == theirs[: len(ours)]


@pytest.mark.parametrize("sampling", ["shuffle", "balanced"])
@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_repeats_meet_in_a_step_and_in_no_group(repeats: int, sampling: Any) -> None:
    n = 4 * 36 + 5
    labels = np.arange(n) % 5
    plan = drawn(replace(SPEC, repeats=repeats, sampling=sampling), n, labels=labels)
    assert plan.index.shape == (4, 36)
    times = np.bincount(plan.index.ravel(), minlength=n)
    assert (times > 0).sum() == -(-4 * 36 // repeats)
    assert sorted(set(times.tolist())) == [0, repeats]
    for rows in plan.index:
        for image in set(rows.tolist()):
            own = GROUPS[rows == image]
            assert len(own) == repeats, "36 divides by them: none is divided between two steps"
            assert len(set(own.tolist())) == repeats
    # Each time with a window and a flip of its own.
    places = np.argsort(plan.index[0], kind="stable").reshape(-1, repeats)
    windows = plan.window[0][places]
    assert (windows != windows[:, :1]).any((1, 2)).mean() > 0.5


def test_the_last_image_is_repeated_less_often_where_rows_do_not_divide() -> None:
    """One in every step: 36 rows show 7 images five times, and one once."""
    plan = drawn(replace(SPEC, repeats=5), 36 * 3)
    for rows in plan.index:
        times = np.bincount(rows, minlength=108)
        assert sorted(times[times > 0].tolist()) == [1] + [5] * 7
    shown = [set(rows.tolist()) for rows in plan.index]
    assert len(set.union(*shown)) == 3 * 8, "no image is in two steps"


def test_ranks_get_slices_of_it() -> None:
    plan = drawn(replace(SPEC, repeats=3, sampling="balanced"), 80, labels=np.arange(80) % 4)
    parts = [plan.for_rank(rank, 2).index for rank in range(2)]
    clean = np.concatenate([part[:, :12] for part in parts], 1)
    adv = np.concatenate([part[:, 12:] for part in parts], 1)
    np.testing.assert_array_equal(np.concatenate([clean, adv], 1), plan.index)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"repeats": 0}, "repeats = 0: must be at least 1"),
        ({"repeats": 37}, "repeats = 37: a step has only 36 rows"),
        ({"sampling": "random"}, "sampling = 'random': must be 'shuffle' or 'balanced'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(SPEC, **change)
