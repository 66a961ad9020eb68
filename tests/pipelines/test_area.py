"""The area resize of the loaders on CPU cores, window by window."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numba import njit
from numpy.testing import assert_allclose, assert_array_equal

from pipelines.loaders.area import area_resize
from pipelines.loaders.pixel_sums import pixel_sums
from pipelines.loaders.reference import area_matrix

SEED = random.SystemRandom().randrange(2**31)
CANVAS = (40, 48)


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Neighbouring pixels that have nothing in common: a wrong weight shows."""
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def shown(
    image: np.ndarray, window: tuple[int, ...], flip: bool, place: tuple[int, ...]
) -> np.ndarray:
    """By the kernel, on a canvas that was full of something else."""
    canvas = np.full((*CANVAS, 3), 77, np.uint8)
    area_resize(image, tuple(float(side) for side in window), flip, canvas, place)
    return canvas


def exact(
    image: np.ndarray, window: tuple[int, ...], flip: bool, place: tuple[int, ...]
) -> np.ndarray:
    """By the twin's matrices, float64 and not rounded: exact halves round either way."""
    canvas = np.zeros((*CANVAS, 3))
    top, left, height, width = window
    rows = np.arange(top, top + height)
    columns = np.arange(left, left + width)
    inside = np.ix_((rows >= 0) & (rows < len(image)), (columns >= 0) & (columns < image.shape[1]))
    seen = np.zeros((height, width, 3))
    seen[inside] = image[rows.clip(0, len(image) - 1)][:, columns.clip(0, image.shape[1] - 1)][
        inside
    ]
    top, left, out_height, out_width = place
    down = area_matrix(height, out_height)
    across = area_matrix(width, out_width)
    resized = np.einsum("yh,hwc,xw->yxc", down, seen, across, optimize=True)
    if flip:
        resized = resized[:, ::-1]
    canvas[top : top + out_height, left : left + out_width] = resized
    return canvas


def assert_same(ours: np.ndarray, twin: np.ndarray, case: object) -> None:
    """Rounded to nearest, up to the rounding of float32."""
    assert np.abs(ours - twin).max() <= 0.501, (case, SEED)


# From a place of the window's size (one tap has all the weight) to twelve pixels per output.
@pytest.mark.parametrize("shrink", [0.3, 1.0, 1.7, 2.0, 3.4, 11.5])
def test_windows_in_places_equal_the_twins(shrink: float) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(12):
        place_sides = rng.integers(1, np.array(CANVAS) + 1)
        window_sides = np.maximum(1, (place_sides * shrink).round().astype(int))
        room = rng.integers(0, 9, 2)
        image = noise(rng, *(window_sides + room))
        window = (*rng.integers(0, room + 1).tolist(), *window_sides.tolist())
        corner = rng.integers(0, np.array(CANVAS) - place_sides + 1)
        place = (*corner.tolist(), *place_sides.tolist())
        case = (image.shape, window, place)
        for flip in (False, True):
            assert_same(shown(image, window, flip, place), exact(image, window, flip, place), case)


def test_what_lies_outside_the_image_is_zero() -> None:
    rng = np.random.default_rng(SEED)
    place = (0, 0, *CANVAS)
    for _ in range(30):
        sides = rng.integers(1, 60, 2)
        image = noise(rng, *sides)
        window = (*rng.integers(-70, 70, 2).tolist(), *rng.integers(1, 90, 2).tolist())
        for flip in (False, True):
            ours = shown(image, window, flip, place)
            assert_same(ours, exact(image, window, flip, place), (image.shape, window))
    far_away = shown(noise(rng, 9, 9), (500, -800, 40, 48), True, place)
    assert not far_away.any()


def test_windows_of_the_places_sides_are_copied() -> None:
    image = noise(np.random.default_rng(SEED), 70, 80)
    canvas = shown(image, (3, 5, *CANVAS), True, (0, 0, *CANVAS))
    assert_array_equal(canvas, image[3 : 3 + CANVAS[0], 5 : 5 + CANVAS[1]][:, ::-1])


@pytest.mark.parametrize("kind", ["floats", "integers"])
@pytest.mark.parametrize("taps", [1, 2, 3, 5])
def test_pixel_sums_are_those_of_plain_python(taps: int, kind: str) -> None:
    rng = np.random.default_rng(SEED)

    @njit
    def any_number(line, at, weights, bias, sums):  # type: ignore[no-untyped-def]
        pixel_sums(line, at, weights, weights.shape[1], bias, sums)

    n_values = 3 * 20 + 1
    at = 3 * rng.integers(0, 20 - taps + 1, 11)
    line: np.ndarray
    weights: np.ndarray
    if kind == "floats":
        line = rng.normal(size=n_values).astype(np.float32)
        weights = rng.normal(size=(11, taps)).astype(np.float32)
        bias = np.float32(0.25)
    else:
        line = rng.integers(0, 256, n_values, np.uint32)
        weights = rng.integers(0, 1 << 22, (11, taps), np.uint32)
        bias = np.uint32(1 << 21)  # type: ignore[assignment]
    sums = np.zeros(3 * 11 + 1, weights.dtype)
    any_number(line, at, weights, bias, sums)
    for x in range(11):
        for c in range(3):
            values = line[at[x] + c : at[x] + c + 3 * taps : 3]
            total = sum(v * w for v, w in zip(values.tolist(), weights[x].tolist(), strict=True))
            assert_allclose(sums[3 * x + c], bias + total, rtol=1e-5, atol=1e-5)
            assert kind == "floats" or sums[3 * x + c] == int(bias) + total
