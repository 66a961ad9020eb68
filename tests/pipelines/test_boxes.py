"""Boxes: what annotations may be, and where a plan puts them, against a loop over single boxes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.boxes import Annotations, canvas_boxes, plan_boxes, source_boxes
from pipelines.plan import PADDING
from tests.pipelines.random_boxes import RandomPlan, random_annotations, random_plan

CANVAS = (90, 140)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_sides(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(1, 300, n).astype(np.int32), rng.integers(1, 300, n).astype(np.int32)


# ------------------------------------------------------------------ the slow twin

Box = tuple[float, float, float, float]


def on_canvas(box: list[float], window: list[int], place: list[int], flip: bool) -> Box:
    """One box, side by side, as one would do it by hand."""
    left, top, right, bottom = box
    window_top, window_left, window_height, window_width = window
    place_top, place_left, place_height, place_width = place
    # As shares of the window.
    x0 = (left - window_left) / window_width
    x1 = (right - window_left) / window_width
    y0 = (top - window_top) / window_height
    y1 = (bottom - window_top) / window_height
    if flip:
        x0, x1 = 1 - x1, 1 - x0
    x0, x1, y0, y1 = (min(max(share, 0.0), 1.0) for share in (x0, x1, y0, y1))
    return (
        place_left + x0 * place_width,
        place_top + y0 * place_height,
        place_left + x1 * place_width,
        place_top + y1 * place_height,
    )


def left_in_window(box: list[float], window: list[int]) -> float:
    """Pixels that the window shows of the box along its shorter side."""
    left, top, right, bottom = box
    first_row, first_column, height, width = window
    return min(
        min(right, first_column + width) - max(left, first_column),
        min(bottom, first_row + height) - max(top, first_row),
    )


def plan_boxes_slowly(plan: RandomPlan, annotations: Annotations, most_boxes: int) -> np.ndarray:
    """A twin of `plan_boxes`: one box after the other."""
    steps, rows = plan.index.shape
    targets = np.zeros((steps, rows, most_boxes, 5))
    targets[..., 0] = -1
    for step in range(steps):
        for row in range(rows):
            image = int(plan.index[step, row])
            if image == PADDING:
                continue
            window = plan.window[step, row].tolist()
            place = plan.place[step, row].tolist()
            n = 0
            for k in range(annotations.first[image], annotations.first[image + 1]):
                box = annotations.boxes[k].tolist()
                if annotations.crowd[k] or left_in_window(box, window) < 1 or n == most_boxes:
                    continue
                found = on_canvas(box, window, place, bool(plan.flip[step, row]))
                targets[step, row, n] = annotations.classes[k], *found
                n += 1
    return targets


# ------------------------------------------------------------------ the plan's boxes


def test_boxes_of_an_epoch_are_those_of_a_loop(rng: np.random.Generator) -> None:
    """Windows, places, flips, images without boxes, crowds, padding rows, more boxes than fit."""
    n_found = []
    for most_boxes in (1, 4, 9, 20):
        heights, widths = random_sides(rng, 30)
        annotations = random_annotations(rng, heights, widths)
        annotations.check(heights, widths, 5)
        plan = random_plan(rng, heights, widths, CANVAS, steps=12, rows=10)
        found = plan_boxes(plan, annotations, most_boxes)
        expected = plan_boxes_slowly(plan, annotations, most_boxes)
        assert found.dtype == np.float32
        assert found.shape == (12, 10, most_boxes, 5)
        np.testing.assert_array_equal(found[..., 0], expected[..., 0])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        n_found.append(int((found[..., 0] >= 0).sum()))
        trained = found[found[..., 0] >= 0]
        assert (trained[:, 3:] > trained[:, 1:3]).all()
        assert not found[found[..., 0] < 0][:, 1:].any()
    assert min(n_found) > 0  # the twins were not compared on nothing


def test_numbers_by_hand() -> None:
    """The right half of an image of 200 x 100 on the left half of a canvas, and mirrored."""
    annotations = Annotations(
        first=np.array([0, 0, 3]),
        boxes=np.array([[110, 10, 150, 50], [0, 0, 99, 100], [99.5, 0, 101, 100]], np.float32),
        classes=np.array([3, 4, 5], np.int32),
        crowd=np.zeros(3, bool),
        area=np.ones(3, np.float32),
    )
    plan = RandomPlan(
        index=np.array([[1, 1, 0, PADDING]], np.uint32),
        window=np.array([[[0, 100, 100, 100]] * 3 + [[0] * 4]], np.int16),
        place=np.array([[[0, 0, 50, 50]] * 3 + [[0] * 4]], np.int16),
        flip=np.array([[False, True, True, True]]),
    )
    # Of the third box exactly one pixel is left, of the second none.
    found = plan_boxes(plan, annotations, 2)
    none = [-1, 0, 0, 0, 0]
    assert found[0, 0].tolist() == [[3, 5, 5, 25, 25], [5, 0, 0, 0.5, 50]]
    assert found[0, 1].tolist() == [[3, 25, 5, 45, 25], [5, 49.5, 0, 50, 50]]
    assert found[0, 2].tolist() == [none, none]
    assert found[0, 3].tolist() == [none, none]
    assert plan_boxes(plan, annotations, 1)[0, 0].tolist() == [[3, 5, 5, 25, 25]]


def test_a_flip_mirrors_the_window_inside_its_place(rng: np.random.Generator) -> None:
    heights, widths = random_sides(rng, 20)
    annotations = random_annotations(rng, heights, widths)
    plan = random_plan(rng, heights, widths, CANVAS, steps=5, rows=8)
    plain = plan_boxes(replace(plan, flip=np.zeros_like(plan.flip)), annotations, 9)
    flipped = plan_boxes(replace(plan, flip=np.ones_like(plan.flip)), annotations, 9)
    _, place_left, _, place_width = np.moveaxis(plan.place.astype(float)[:, :, None], -1, 0)
    both_edges = 2 * place_left + place_width
    is_box = plain[..., 0] >= 0
    mirrored = plain.copy()
    mirrored[..., 1] = both_edges - plain[..., 3]
    mirrored[..., 3] = both_edges - plain[..., 1]
    np.testing.assert_allclose(flipped[is_box], mirrored[is_box], atol=1e-3)
    assert is_box.any()


def test_canvas_and_back(rng: np.random.Generator) -> None:
    """What the window shows of a box returns to where it was; the rest is cut off at its edge."""
    n = 200
    heights, widths = random_sides(rng, n)
    plan = random_plan(rng, heights, widths, CANVAS, steps=1, rows=n)
    window = plan.window[0].astype(float)
    place = plan.place[0]
    low = rng.random((n, 2)) * 300 - 20
    boxes = np.concatenate([low, low + rng.random((n, 2)) * 200], 1)
    there = canvas_boxes(boxes, plan.window[0], place, np.zeros(n, bool))
    back = source_boxes(there, plan.window[0], place)
    top, left, height, width = window.T
    lowest = np.stack([left, top, left, top], 1)
    highest = lowest + np.stack([width, height, width, height], 1)
    np.testing.assert_allclose(back, np.clip(boxes, lowest, highest), atol=1e-6)
    # One window for all, as an evaluator has it.
    one = source_boxes(there[:5], plan.window[0, 0], place[0])
    again = source_boxes(there[:5], plan.window[0, [0] * 5], place[[0] * 5])
    np.testing.assert_array_equal(one, again)
    assert source_boxes(np.zeros((0, 4)), plan.window[0, 0], place[0]).shape == (0, 4)


def test_boxes_beyond_the_canvas_return_inside_the_window() -> None:
    window = np.array([10, 20, 30, 40])
    place = np.array([0, 0, 60, 80])
    found = source_boxes(np.array([[-5.0, -5, 200, 200], [20, 20, 40, 40]]), window, place)
    assert found.tolist() == [[20, 10, 60, 40], [30, 20, 40, 30]]


def test_int16_windows_do_not_overflow() -> None:
    side = 32767
    window = np.array([[side - 1, side - 1, side, side]], np.int16)
    found = canvas_boxes(
        np.array([[0, 0, side, side]], np.float32),
        window,
        np.array([[0, 0, side, side]], np.int16),
        np.array([False]),
    )
    assert found.tolist() == [[0, 0, 1, 1]]


def test_a_plan_for_other_images_is_refused(rng: np.random.Generator) -> None:
    heights, widths = random_sides(rng, 20)
    annotations = random_annotations(rng, heights[:10], widths[:10])
    plan = random_plan(rng, heights, widths, CANVAS, steps=9, rows=9)
    with pytest.raises(ValueError, match="more than the 10 images"):
        plan_boxes(plan, annotations, 5)
    with pytest.raises(ValueError, match="most_boxes = 0"):
        plan_boxes(plan, annotations, 0)


# ------------------------------------------------------------------ annotations


def test_counts_are_those_of_a_loop(rng: np.random.Generator) -> None:
    heights, widths = random_sides(rng, 50)
    annotations = random_annotations(rng, heights, widths)
    counts = []
    for image in range(50):
        rows = range(annotations.first[image], annotations.first[image + 1])
        counts.append(sum(not annotations.crowd[k] for k in rows))
        assert all(annotations.image[k] == image for k in rows)
    assert annotations.trained_per_image().tolist() == counts
    for most in (0, 3, 7, 100):
        cut = [max(n - most, 0) for n in counts]
        assert annotations.beyond(most) == (sum(cut), sum(n > 0 for n in cut))


def valid() -> dict[str, Any]:
    """Three boxes of three images, the second of which has none."""
    return {
        "first": np.array([0, 2, 2, 3]),
        "boxes": np.array([[0, 0, 10, 10], [2, 3, 20, 30], [1, 1, 5, 9]], np.float32),
        "classes": np.array([0, 1, 2], np.int32),
        "crowd": np.array([False, True, False]),
        "area": np.array([100, 400, 30], np.float32),
    }


SIDES = (np.array([30, 30, 9]), np.array([20, 20, 5]))  # heights, widths


def test_no_boxes_at_all_are_annotations() -> None:
    annotations = Annotations(
        first=np.zeros(4, np.int64),
        boxes=np.zeros((0, 4), np.float32),
        classes=np.zeros(0, np.int32),
        crowd=np.zeros(0, bool),
        area=np.zeros(0, np.float32),
    )
    annotations.check(*SIDES, 3)
    plan = random_plan(np.random.default_rng(), *SIDES, CANVAS, steps=2, rows=3)
    assert (plan_boxes(plan, annotations, 4)[..., 0] == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": np.array([0, 2, 2, 4])}, "ascend from 0 to the number of boxes, 3"),
        ({"first": np.array([1, 2, 2, 3])}, "ascend from 0"),
        ({"first": np.array([0, 3, 2, 3])}, "ascend from 0"),
        ({"first": np.array([0, 2, 2, 3], np.int32)}, r"first: must be int64 \(N \+ 1,\)"),
        ({"first": np.zeros(0, np.int64)}, "first: must be int64"),
        ({"boxes": np.zeros((3, 5), np.float32)}, r"boxes: float32 \(3, 5\), must be"),
        ({"boxes": np.zeros((3, 4))}, "boxes: float64"),
        ({"classes": np.zeros(2, np.int32)}, r"must be float32 \(2, 4\)"),
        ({"crowd": np.zeros(3, np.uint8)}, "crowd: uint8"),
        ({"area": np.array([1, -1, 1], np.float32)}, "image 0, box 1: .* an area that is none"),
        ({"area": np.array([1, 1, np.inf], np.float32)}, "image 2, box 0: .* an area that is none"),
    ],
)
def test_arrays_that_are_no_annotations(change: dict[str, Any], message: str) -> None:
    Annotations(**valid()).check(*SIDES, 3)
    with pytest.raises(ValueError, match=message):
        Annotations(**valid() | change)


@pytest.mark.parametrize(
    "box",
    [
        [np.nan, 0, 1, 1],
        [0, 0, np.inf, 1],
        [0, 0, 1, np.nan],
        [-1, 0, 1, 1],
        [0, -0.5, 1, 1],
        [3, 0, 3, 1],
        [0, 4, 1, 2],
    ],
)
def test_a_box_that_is_none_is_named(box: list[float]) -> None:
    fields = valid()
    fields["boxes"][2] = box
    with pytest.raises(ValueError, match=r"image 2, box 0: \[.*\] is no box"):
        Annotations(**fields)


def test_boxes_are_held_against_the_images() -> None:
    annotations = Annotations(**valid())
    with pytest.raises(ValueError, match="boxes of 3 images, and there are 2"):
        annotations.check(SIDES[0][:2], SIDES[1][:2], 3)
    with pytest.raises(ValueError, match=r"image 2, box 0: .* is of none of the 2 classes"):
        annotations.check(*SIDES, 2)
    with pytest.raises(ValueError, match=r"image 2, box 0: .* reaches outside its image"):
        annotations.check(np.array([30, 30, 8]), SIDES[1], 3)
    with pytest.raises(ValueError, match=r"image 0, box 1: .* reaches outside its image"):
        annotations.check(SIDES[0], np.array([19, 20, 5]), 3)
    fields = valid()
    fields["classes"][0] = -1
    with pytest.raises(ValueError, match=r"image 0, box 0: .* none of the 3 classes"):
        Annotations(**fields).check(*SIDES, 3)


def test_the_checksum_covers_every_field() -> None:
    seen = {Annotations(**valid()).crc32()}
    changes = {
        "first": np.array([0, 1, 2, 3]),
        "boxes": valid()["boxes"] + np.float32(0.25),
        "classes": np.array([0, 2, 2], np.int32),
        "crowd": np.array([False, False, False]),
        "area": np.array([100, 400, 31], np.float32),
    }
    assert changes.keys() == valid().keys()
    for name, values in changes.items():
        seen.add(Annotations(**valid() | {name: values}).crc32())
    assert len(seen) == 1 + len(changes)
    assert Annotations(**valid()).crc32(5) not in seen
