"""Letterboxes: whole images on a canvas of any two sides, in the plan and by every loader."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from pipelines import (
    EpochPlan,
    PlanSpec,
    Size,
    Store,
    draw_epoch,
    eval_plan,
    open_loader,
    open_store,
)
from pipelines.loaders.base import was_drawn_for
from pipelines.loaders.reference import crop_resize
from pipelines.plan import PADDING, WINDOW
from pipelines.store import JPG
from tests.conftest import as_jpeg, write_beton
from tests.pipelines.samples import decoded

needs_ffcv = pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")
needs_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs DALI")
LOADERS = [
    ("reference", "area"),
    ("reference", "bilinear"),
    pytest.param("ffcv", "area", marks=needs_ffcv),
    pytest.param("ffcv", "bilinear", marks=needs_ffcv),
    ("turbojpeg", "area"),
    ("turbojpeg", "bilinear"),
    pytest.param("dali", "bilinear", marks=needs_dali),
]
SEED = random.SystemRandom().randrange(2**31)  # plans are fresh at every run
CANVAS = (48, 80)
# Wide, tall, tiny, a single row, a single pixel; enlarged a little, as large as the canvas, shrunk
# a little and a lot, so that the decoder halves it.
SIDES = [(40, 300), (300, 40), (3, 2), (1, 30), (1, 1), (30, 24), CANVAS, (90, 70), (301, 419)]


# ------------------------------------------------------------------ the plan


def drawn(sides: np.ndarray, *, epoch: int = 0, **change: object) -> EpochPlan:
    """A training plan for images of these sides, int (n, 2), in steps of three rows."""
    rows = {"clean_rows": 2, "adv_rows": 1, "clean_group_rows": 2, "adv_group_rows": 1}
    spec = {"size": CANVAS, "crop": "letterbox"} | rows | change
    return draw_epoch(PlanSpec(SEED, **spec), *sides.T, epoch)  # type: ignore[arg-type]


def slow_letterbox(
    image: tuple[int, int],
    canvas: tuple[int, int],
    factor: float,  # of the jitter
    chance: tuple[float, float],  # in [0, 1): where the window begins, down and across
) -> tuple[list[int], list[int]]:
    """Window and place of one image, one side at a time."""
    factor *= min(canvas[0] / image[0], canvas[1] / image[1])
    corner, part, shown = [], [], []
    for stored, room, u in zip(image, canvas, chance, strict=True):
        fitted = max(1, round(stored * factor))
        if fitted <= room:
            part.append(stored)
            shown.append(fitted)
        else:
            part.append(min(max(1, round(room / factor)), stored))
            shown.append(room)
        corner.append(int(u * (stored - part[-1] + 1)))
    return [*corner, *part], [0, 0, *shown]


@pytest.mark.parametrize("jitter", [(1.0, 1.0), (0.1, 2.0), (3.0, 50.0)])
def test_windows_and_places_are_those_of_plain_python(jitter: tuple[float, float]) -> None:
    rng = np.random.default_rng(SEED)
    sides = np.exp(rng.uniform(0, 7, (300, 2))).astype(np.int32)
    for epoch in range(3):
        canvas = tuple(rng.integers(1, 200, 2).tolist())
        plan = drawn(sides, size=canvas, jitter=jitter, epoch=epoch)
        n = plan.index.size
        # The plan's own stream: all factors, then where the windows begin.
        stream = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([SEED, epoch, WINDOW]))
        )
        factors = stream.uniform(*jitter, n)
        chances = stream.random((n, 2))
        rows = zip(plan.index.ravel(), factors.tolist(), chances.tolist(), strict=True)
        for row, (index, factor, chance) in enumerate(rows):
            image = tuple(sides[index].tolist())
            window, place = slow_letterbox(image, canvas, factor, chance)  # type: ignore[arg-type]
            assert plan.window.reshape(-1, 4)[row].tolist() == window, (image, canvas, SEED)
            assert plan.place.reshape(-1, 4)[row].tolist() == place, (image, canvas, SEED)


def test_without_jitter_all_of_an_image_just_fits() -> None:
    sides = np.exp(np.random.default_rng(SEED).uniform(2, 7, (300, 2))).astype(np.int32)
    plan = drawn(sides)
    image = sides[plan.index.ravel()]
    _, _, height, width = plan.place.reshape(-1, 4).T
    assert_array_equal(plan.window.reshape(-1, 4), np.pad(image, ((0, 0), (2, 0))))
    assert ((height == 48) | (width == 80)).all()
    assert (plan.place[..., :2] == 0).all()
    # The aspect ratio is kept, but for the rounding of the shorter side.
    exact = image * np.minimum(48 / image[:, 0], 80 / image[:, 1])[:, None]
    assert (np.abs(np.stack([height, width], 1) - exact.clip(1)) <= 0.5 + 1e-9).all()


def test_jitter_spreads_sizes_and_windows_over_their_range() -> None:
    plan = drawn(np.tile([[96, 160]], (3000, 1)), jitter=(0.5, 2.0))
    window = plan.window.reshape(-1, 4).astype(int)
    place = plan.place.reshape(-1, 4).astype(int)
    small = place[:, 3] < 80
    assert 0.28 < small.mean() < 0.39  # a third of [0.5, 2] is below 1
    assert place[small, 2].min() == 24
    assert (window[small] == [0, 0, 96, 160]).all()
    large = ~small
    assert (place[large] == [0, 0, 48, 80]).all()
    assert window[large, 2].min() <= 50
    # Where it can, a window begins anywhere.
    room = 96 - window[large, 2]
    share = window[large, 0][room > 20] / room[room > 20]
    assert share.min() < 0.05
    assert share.max() > 0.95
    assert abs(share.mean() - 0.5) < 0.03


def test_evaluation_shows_all_of_every_image_and_draws_nothing() -> None:
    sides = np.array(SIDES, np.int32)
    plan = eval_plan(*sides.T, size=CANVAS, resize=1, batch=4, crop="letterbox")
    assert plan.index.shape == (3, 4)
    for row, image in enumerate(SIDES):
        window, place = slow_letterbox(image, CANVAS, 1, (0, 0))
        assert plan.window.reshape(-1, 4)[row].tolist() == window
        assert plan.place.reshape(-1, 4)[row].tolist() == place
    empty = plan.index == PADDING
    assert empty.sum() == 3
    assert not plan.window[empty].any()
    assert not plan.place[empty].any()
    assert not plan.flip.any()


def test_other_crops_cover_the_canvas() -> None:
    sides = np.tile([[60, 70]], (12, 1))
    for crop in ("random_resized", "pad"):
        assert (drawn(sides, size=32, crop=crop).place == [0, 0, 32, 32]).all()
    plan = eval_plan(*sides.T, size=32, resize=40, batch=8)
    # The whole image as torchvision resizes it, and its centre on the canvas.
    assert (plan.place.reshape(-1, 4)[:12] == [-4, -7, 40, 46]).all()
    assert not plan.place.reshape(-1, 4)[12:].any()


def test_a_pair_of_equal_sides_is_a_square() -> None:
    sides = np.tile([[60, 70]], (12, 1))
    one = drawn(sides, size=32, crop="random_resized", mix="cutmix")
    two = drawn(sides, size=(32, 32), crop="random_resized", mix="cutmix")
    for name in ("window", "place", "mix_box", "mix_lam"):
        assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (0, 80)}, r"size = \(0, 80\): must be at least 1"),
        ({"size": (48, 40_000)}, r"size = \(48, 40000\): must be .* at most 32767"),
        ({"jitter": (0.0, 1.0)}, r"jitter = \(0.0, 1.0\): must be 0 < low <= high"),
        ({"jitter": (1.2, 0.8)}, "jitter = "),
        ({"mix": "mixup"}, r"size = \(48, 80\): mix = 'mixup' takes squares only"),
        ({"crop": "pad"}, r"size = \(48, 80\): crop = 'pad' takes squares only"),
        ({"crop": "pad", "size": 32, "jitter": (0.5, 1)}, "only with crop = 'letterbox'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(np.tile([[60, 70]], (12, 1)), **change)


def test_evaluation_in_the_centre_takes_squares_only() -> None:
    with pytest.raises(ValueError, match="takes squares only"):
        eval_plan(*np.array(SIDES).T, size=CANVAS, resize=100, batch=4)


# ------------------------------------------------------------------ the loaders


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colours of at least 60 grey levels, so that no pixel looks like an empty canvas.

    The filters differ most where an image is much enlarged, so what is small is smoother.
    """
    coarse = rng.integers(70, 250, (3, 3, 3)).astype(np.float64)
    if min(height, width) < 20:
        coarse = 150 + (coarse - 150) / 10
    smooth = Image.fromarray(coarse.astype(np.uint8))
    texture = rng.normal(0, 1, (height, width, 3))
    resized = np.asarray(smooth.resize((width, height), Image.Resampling.BILINEAR))
    return (resized + texture).clip(60, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    rng = np.random.default_rng(SEED)
    pictures = [picture(rng, *sides) for sides in 2 * SIDES]
    samples = pictures
    if request.param == "jpeg":
        samples = [as_jpeg(image, 95) for image in pictures]  # type: ignore[misc]
    path = tmp_path_factory.mktemp("letterbox") / f"{request.param}.beton"
    return open_store(write_beton(path, samples, range(len(samples))))


def plans(store: Store, filter_: str) -> Iterator[EpochPlan]:
    """Training without and with jitter, places anywhere, and evaluation with PADDING rows."""
    sides = np.stack([store.heights, store.widths], 1)
    yield drawn(sides, filter=filter_)
    yield drawn(sides, jitter=(0.3, 3.0), filter=filter_)
    yield drawn(sides, jitter=(0.3, 3.0), size=64, filter=filter_)
    shifted = drawn(sides, jitter=(0.3, 0.8), filter=filter_)
    room = np.array(CANVAS) - shifted.place[..., 2:]
    place = shifted.place.copy()
    place[..., :2] = np.random.default_rng(SEED).integers(0, room + 1)
    assert place[..., :2].any()
    yield replace(shifted, place=place)
    yield eval_plan(*sides.T, size=CANVAS, resize=1, batch=4, crop="letterbox")


def images(
    name: str, store: Store, plan: EpochPlan, start_step: int = 0, **options: int
) -> list[np.ndarray]:
    """The images of each step, uint8 (B, H, W, 3)."""
    loader = open_loader(name, store, size=plan.spec.size, **options)
    try:
        batches = loader.load(plan, start_step)
        return [batch.images.permute(0, 2, 3, 1).numpy().copy() for batch in batches]
    finally:
        loader.close()


def expected(store: Store, plan: EpochPlan, step: int) -> np.ndarray:
    """What a step should show, uint8 (B, H, W, 3), pixel by pixel of its place."""
    shown = np.zeros((plan.index.shape[1], *plan.spec.sides, 3), np.uint8)
    for row, index in enumerate(plan.index[step].tolist()):
        if index == PADDING:
            continue
        top, left, height, width = plan.place[step, row].tolist()
        window = plan.window[step, row]
        resized = crop_resize(decoded(store, index), window, (height, width), plan.spec.filter)
        for x in range(width):
            column = x
            if plan.flip[step, row]:
                column = width - 1 - x
            shown[row, top : top + height, left + x] = resized[:, column]
    return shown


def assert_show(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    """The images of a plan: the same zeros exactly, where they are not zero nearly the same.

    Every pixel of a picture is above 30, whatever the filter and the JPEG do to it.
    """
    ours = np.concatenate(got)
    theirs = np.concatenate(want)
    empty = theirs.max(-1) == 0
    assert not ours[empty].any(), SEED
    assert (ours[~empty].max(-1) > 30).all(), SEED
    # The tolerance between back ends, where there is something to see.
    difference = np.abs(ours.astype(int) - theirs)[~empty]
    assert difference.mean() <= 2, SEED
    assert np.quantile(difference, 0.99) <= 12, SEED


@pytest.mark.parametrize(("name", "filter_"), LOADERS)
def test_every_loader_shows_the_window_in_its_place(name: str, filter_: str, store: Store) -> None:
    flips = set()
    for plan in plans(store, filter_):
        assert was_drawn_for(plan, store)
        got = images(name, store, plan)
        want = [expected(store, plan, step) for step in range(len(plan))]
        assert_show(got, want)
        exact = plan.spec.filter == "bilinear" and name != "dali"
        if name == "reference" or exact:
            assert_array_equal(got, want, str(SEED))
        flips |= set(plan.flip.ravel().tolist())
    assert flips == {False, True}


@pytest.mark.parametrize(("name", "filter_"), LOADERS)
def test_a_flip_mirrors_inside_the_place(name: str, filter_: str, store: Store) -> None:
    """To the pixel: the same filter, the other way round."""
    for plan in plans(store, filter_):
        plain = images(name, store, replace(plan, flip=np.zeros_like(plan.flip)))
        mirrored = images(name, store, replace(plan, flip=np.ones_like(plan.flip)))
        for step, row in np.ndindex(plan.index.shape):
            _, left, _, width = plan.place[step, row].tolist()
            part = slice(left, left + width)
            back = mirrored[step][row].copy()
            back[:, part] = back[:, part][:, ::-1]
            # The sums of a filter run the other way round, and may round otherwise.
            difference = np.abs(back.astype(int) - plain[step][row])
            assert difference.max(initial=0) <= 1, SEED


@pytest.mark.parametrize(("name", "filter_"), LOADERS)
def test_starting_at_step_k_is_the_tail_of_the_run(name: str, filter_: str, store: Store) -> None:
    sides = np.stack([store.heights, store.widths], 1)
    plan = drawn(sides, jitter=(0.3, 3.0), filter=filter_)
    whole = images(name, store, plan)
    for start in (1, 4, len(plan)):
        assert_array_equal(images(name, store, plan, start), whole[start:])


@needs_ffcv
def test_what_a_buffer_held_before_is_gone(store: Store) -> None:
    """Of the slots of `ffcv`, two in turn, each has shown another place in another step."""
    sides = np.stack([store.heights, store.widths], 1)
    evaluation = eval_plan(*sides.T, size=CANVAS, resize=1, batch=4, crop="letterbox")
    for plan in (drawn(sides, jitter=(0.3, 2.0)), evaluation):
        shown = images("ffcv", store, plan, prefetch=1, threads=1)
        places = plan.place.astype(int)
        smaller = places[2:, :, 2:] < places[:-2, :, 2:]
        assert smaller.any(), "nothing is left over: the test would prove nothing"
        for step, got in enumerate(shown):
            assert not got[expected(store, plan, step).max(-1) == 0].any()


@needs_ffcv
def test_area_resize_leaves_nothing_on_the_canvas() -> None:
    from pipelines.loaders.area import area_resize

    rng = np.random.default_rng(SEED)
    for _ in range(200):
        image = rng.integers(0, 256, (*rng.integers(1, 40, 2), 3), dtype=np.uint8)
        canvas = rng.integers(0, 256, (*rng.integers(1, 40, 2), 3), dtype=np.uint8)
        place = [0, 0, 0, 0]
        window = [0, 0, 0, 0]
        for box, sides in ((place, canvas.shape), (window, image.shape)):
            for axis in (0, 1):
                box[2 + axis] = int(rng.integers(1, sides[axis] + 1))
                box[axis] = int(rng.integers(0, sides[axis] - box[2 + axis] + 1))
        top, left, height, width = place
        flip = bool(rng.integers(2))
        want = np.zeros_like(canvas)
        shown = crop_resize(image, np.array(window), (height, width))
        if flip:
            shown = shown[:, ::-1]
        want[top : top + height, left : left + width] = shown
        area_resize(image, tuple(map(float, window)), flip, canvas, tuple(place))
        # float32 against float64 at a half.
        assert np.abs(canvas.astype(int) - want).max() <= 1, (place, window, SEED)
        assert not canvas[:top].any()
        assert not canvas[top + height :].any()
        assert not canvas[:, :left].any()
        assert not canvas[:, left + width :].any()


@needs_ffcv
@pytest.mark.parametrize(
    ("window", "place", "divisor"),
    [
        ((96, 160), (48, 80), 2),
        ((95, 160), (48, 80), 1),
        ((96, 159), (48, 80), 1),
        ((191, 320), (48, 80), 2),
        ((192, 320), (48, 80), 4),
        # Each against its own side: on a square canvas of 80 px neither would be twice as large.
        ((120, 20), (60, 10), 2),
        ((20, 120), (10, 60), 2),
    ],
)
def test_the_decoder_shrinks_what_is_twice_or_four_times_as_large_as_its_place(
    window: tuple[int, int],
    place: tuple[int, int],
    divisor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipelines.loaders.ffcv import FfcvLoader

    sample = as_jpeg(picture(np.random.default_rng(SEED), *window))
    store = open_store(write_beton(tmp_path / "one.beton", [sample], [0]))
    assert store.modes[0] == JPG
    asked = []
    decode = FfcvLoader._decoded

    def watched(
        loader: FfcvLoader, index: int, divisor: int, bottom: int, *, exact: bool
    ) -> np.ndarray:
        asked.append((divisor, exact))
        return decode(loader, index, divisor, bottom, exact=exact)

    monkeypatch.setattr(FfcvLoader, "_decoded", watched)
    for filter_ in ("area", "bilinear"):
        spec = PlanSpec(SEED, 80, 1, clean_group_rows=1, crop="letterbox", filter=filter_)
        plan = draw_epoch(spec, store.heights, store.widths, 0)
        plan = replace(plan, place=np.array([[[0, 0, *place]]], np.int32))
        images("ffcv", store, plan)
    assert asked == [(divisor, False), (1, True)]


def test_places_that_reach_outside_the_canvas_are_refused(store: Store) -> None:
    """A back end writes where the place says."""
    sides = np.stack([store.heights, store.widths], 1)
    plan = drawn(sides)
    for place in ((-1, 0, 9, 9), (0, -1, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0), (0, 0, 49, 9),
                  (0, 1, 9, 80), (40, 0, 9, 9)):  # fmt: skip
        changed = plan.place.copy()
        changed[0, 0] = place
        wrong = replace(plan, place=changed)
        assert not was_drawn_for(wrong, store), place
        with pytest.raises(ValueError, match="not drawn for the images of"):
            open_loader("reference", store, size=CANVAS).load(wrong)
    changed = plan.window.copy()
    changed[0, 0, 2] += 1
    assert not was_drawn_for(replace(plan, window=changed), store)
    # Of the other crops the place is all of the canvas.
    square = drawn(sides, size=32, crop="random_resized")
    assert was_drawn_for(square, store)
    changed = square.place.copy()
    changed[1, 1] = 0, 0, 31, 32
    assert not was_drawn_for(replace(square, place=changed), store)
    # Of an evaluation it covers the canvas, and the window is the whole image.
    whole = eval_plan(*sides.T, size=32, resize=40, batch=3)
    assert was_drawn_for(whole, store)
    top, left, height, width = whole.place[0, 0].tolist()
    for place in ((1, left, height, width), (top, 1, height, width), (top, left, 31 - top, width),
                  (top, left, height, 31 - left), (top, left, -height, width)):  # fmt: skip
        changed = whole.place.copy()
        changed[0, 0] = place
        assert not was_drawn_for(replace(whole, place=changed), store), place
    changed = whole.window.copy()
    changed[0, 0, 3] -= 1
    assert not was_drawn_for(replace(whole, window=changed), store)
    # What is no sample has no place.
    index = np.full_like(plan.index, PADDING)
    assert was_drawn_for(replace(plan, index=index, place=np.zeros_like(plan.place)), store)


def test_the_canvas_of_loader_and_plan_must_agree(store: Store) -> None:
    sides = np.stack([store.heights, store.widths], 1)
    size: Size
    for size in (80, (80, 48)):
        with pytest.raises(ValueError, match=r"plan of size \(48, 80\): the loader was opened for"):
            open_loader("reference", store, size=size).load(drawn(sides))
    open_loader("reference", store, size=(64, 64)).load(drawn(sides, size=64))
