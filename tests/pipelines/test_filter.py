"""The filter of a plan: Pillow's bilinear and bicubic, and evaluation as torchvision shows it."""

from __future__ import annotations

import io
import random
import zipfile
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from torchvision.transforms import v2

from bench import jpegs
from pipelines import EpochPlan, PlanSpec, Store, draw_epoch, eval_plan, open_loader, open_store
from pipelines.back_ends import BACK_ENDS, EvalFilter
from pipelines.loaders.antialiased import antialiased_resize
from pipelines.loaders.reference import crop_resize, put, visible_part
from pipelines.loaders.regions import shares_inside, show_borders
from tests.conftest import write_beton
from tests.pipelines.samples import decoded

needs_ffcv = pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")
needs_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs DALI")
LOADERS = [
    "reference",
    pytest.param("ffcv", marks=needs_ffcv),
    "turbojpeg",
    pytest.param("dali", marks=needs_dali),
]
FILTERS = ["bilinear", "bicubic"]
SEED = random.SystemRandom().randrange(2**31)  # images and plans are fresh at every run


# ------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("filter_", FILTERS)
def test_the_kernel_is_pillow_bit_for_bit(filter_: EvalFilter) -> None:
    """On noise, which shows every weight: windows, flips, and places that leave the canvas."""
    rng = np.random.default_rng(SEED)
    down_first = 0
    for _ in range(400):
        image = rng.integers(0, 256, (*np.exp(rng.uniform(0, 6, 2)).astype(int), 3), np.uint8)
        canvas = rng.integers(0, 256, (*rng.integers(1, 120, 2), 3), np.uint8)
        window = [0, 0, 0, 0]
        place = [0, 0, 0, 0]
        for axis in (0, 1):
            window[2 + axis] = int(rng.integers(1, image.shape[axis] + 1))
            window[axis] = int(rng.integers(0, image.shape[axis] - window[2 + axis] + 1))
            place[2 + axis] = int(np.exp(rng.uniform(0, 6)))
            place[axis] = int(rng.integers(1 - place[2 + axis], canvas.shape[axis]))
        if rng.random() < 0.2:
            window[int(rng.integers(2))] += int(rng.integers(-5, 6))  # zeros lie there
        flip = bool(rng.integers(2))
        shown = crop_resize(image, np.array(window), (place[2], place[3]), filter_)
        if flip:
            shown = shown[:, ::-1]
        want = np.zeros_like(canvas)
        put(shown, place[0], place[1], want)
        antialiased_resize(image, tuple(window), flip, canvas, tuple(place), filter_ == "bicubic")
        assert_array_equal(canvas, want, str((SEED, image.shape, window, place, flip)))
        down_first += window[2] - place[2] > max(0, 2 * (window[3] - place[3]))
    assert 40 < down_first < 360, "both orders of the passes"


def test_a_place_beside_the_canvas_leaves_it_black() -> None:
    canvas = np.full((8, 9, 3), 7, np.uint8)
    for place in ((8, 0, 5, 5), (0, 9, 5, 5), (-5, 0, 5, 5), (0, -5, 5, 5)):
        canvas[:] = 7
        antialiased_resize(
            np.full((3, 3, 3), 9, np.uint8), (0, 0, 3, 3), False, canvas, place, True
        )
        assert not canvas.any()


@pytest.mark.parametrize("cubic", [False, True])
def test_windows_of_the_size_of_their_place_are_copied(cubic: bool) -> None:
    image = np.random.default_rng(SEED).integers(0, 256, (50, 60, 3), np.uint8)
    canvas = np.empty((32, 32, 3), np.uint8)
    antialiased_resize(image, (7, 11, 32, 32), False, canvas, (0, 0, 32, 32), cubic)
    assert_array_equal(canvas, image[7:39, 11:43])


# ------------------------------------------------------------------ the loaders


def smooth(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Colours, edges and texture: what a JPEG is made for."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
    resized = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    texture = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((resized + texture).clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, **save: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", **save)
    return out.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """JPEGs of odd sides and of the canvas' size, of all kinds."""
    rng = np.random.default_rng(SEED)
    sides = [(64, 64), (72, 72), (73, 64), (1, 9), (9, 1), (300, 47), (47, 301)]
    sides += [tuple(pair) for pair in rng.integers(30, 400, (17, 2)).tolist()]
    samples = [
        jpeg(
            smooth(rng, *pair),
            quality=int(rng.integers(60, 100)),
            subsampling=("4:4:4", "4:2:2", "4:2:0")[i % 3],
            progressive=bool(i // 3 % 2),
        )
        for i, pair in enumerate(sides)
    ]
    path = tmp_path_factory.mktemp("filter") / "jpegs.beton"
    return open_store(write_beton(path, samples, range(len(samples))))


def shown(name: str, store: Store, plan: EpochPlan) -> np.ndarray:
    """All images of a plan, uint8 (steps * B, H, W, 3)."""
    loader = open_loader(name, store, size=plan.spec.size)
    batches = loader.load(plan)
    return np.concatenate([b.images.permute(0, 2, 3, 1).numpy().copy() for b in batches])


def assert_same(name: str, got: np.ndarray, want: np.ndarray) -> None:
    """DALI may round to the next grey level; the others are equal."""
    if name != "dali":
        assert_array_equal(got, want, str(SEED))
    difference = np.abs(got.astype(int) - want)
    assert (difference <= 1).mean() >= 0.999, SEED
    assert difference.mean() < 0.1, SEED


def torchvisions(
    store: Store, size: int, resize: int, filter_: EvalFilter = "bilinear"
) -> np.ndarray:
    """Every image of a store as its evaluation shows it, uint8 (N, size, size, 3)."""
    mode = v2.InterpolationMode(filter_)
    transform = v2.Compose([v2.Resize(resize, mode), v2.CenterCrop(size)])
    pictures = [Image.fromarray(decoded(store, i)) for i in range(len(store))]
    return np.stack([np.asarray(transform(picture)) for picture in pictures])


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(("size", "resize"), [(64, 72), (64, 64), (224, 256)])
@pytest.mark.parametrize("filter_", FILTERS)
def test_evaluation_shows_what_torchvision_shows(
    name: str, size: int, resize: int, filter_: EvalFilter, store: Store
) -> None:
    plan = eval_plan(
        store.heights, store.widths, size=size, resize=resize, batch=len(store), filter=filter_
    )
    assert_same(name, shown(name, store, plan), torchvisions(store, size, resize, filter_))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("filter_", FILTERS)
def test_evaluation_shows_real_photographs_as_torchvision_does(
    name: str, filter_: EvalFilter, tmp_path: Path
) -> None:
    samples = []
    for wheel in jpegs.wheels():
        with zipfile.ZipFile(wheel) as archive:
            names = [file for file in jpegs.members(archive) if file.endswith("jpg")]
            samples += [archive.read(file) for file in names]
    assert len(samples) >= 20
    store = open_store(write_beton(tmp_path / "photos.beton", samples, range(len(samples))))
    plan = eval_plan(
        store.heights, store.widths, size=224, resize=256, batch=len(store), filter=filter_
    )
    assert_same(name, shown(name, store, plan), torchvisions(store, 224, 256, filter_))


@pytest.mark.parametrize("name", ["reference", pytest.param("ffcv", marks=needs_ffcv)])
@pytest.mark.parametrize("filter_", FILTERS)
def test_training_shows_what_torchvisions_resized_crop_shows(
    name: str, filter_: EvalFilter, store: Store
) -> None:
    """Cut out first, then resized: the filter sees nothing outside the window."""
    mode = v2.InterpolationMode(filter_)
    spec = PlanSpec(SEED, 64, 12, clean_group_rows=12, filter=filter_)
    plan = draw_epoch(spec, store.heights, store.widths, 0)
    got = shown(name, store, plan)
    rows = zip(plan.index.ravel(), plan.window.reshape(-1, 4), plan.flip.ravel(), strict=True)
    for row, (index, window, flip) in enumerate(rows):
        picture = Image.fromarray(decoded(store, index))
        want = v2.functional.resized_crop(picture, *window.tolist(), [64, 64], mode)
        if flip:
            want = v2.functional.horizontal_flip(want)
        assert_array_equal(got[row], np.asarray(want), str((SEED, row)))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("filter_", FILTERS)
def test_images_as_large_as_asked_are_shown_as_they_are(
    name: str, filter_: EvalFilter, tmp_path: Path
) -> None:
    rng = np.random.default_rng(SEED)
    for kind in ("raw", "jpeg"):
        pictures = [smooth(rng, 32, 32) for _ in range(6)]
        samples = [np.asarray(picture) for picture in pictures]
        if kind == "jpeg":
            samples = [jpeg(picture) for picture in pictures]  # type: ignore[misc]
        store = open_store(write_beton(tmp_path / f"{kind}.beton", samples, range(6)))
        plan = eval_plan(store.heights, store.widths, size=32, resize=32, batch=6, filter=filter_)
        assert_array_equal(shown(name, store, plan), [decoded(store, i) for i in range(6)])


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("filter_", FILTERS)
def test_extreme_images_take_no_memory_for_what_nobody_sees(
    name: str, filter_: EvalFilter, tmp_path: Path
) -> None:
    """One pixel high: as a whole it would be resized to 72 x 1,440,000, 300 MB of pixels."""
    rng = np.random.default_rng(SEED)
    samples = [smooth(rng, 1, 20_000), smooth(rng, 20_000, 1)]
    path = write_beton(tmp_path / "thin.beton", [jpeg(sample) for sample in samples], range(2))
    store = open_store(path)
    plan = eval_plan(store.heights, store.widths, size=64, resize=72, batch=2, filter=filter_)
    want = np.zeros((2, 64, 64, 3), np.uint8)
    for i in range(2):
        place = tuple(plan.place[0, i].tolist())
        whole = (0, 0, *samples[i].size[::-1])
        cubic = filter_ == "bicubic"
        antialiased_resize(decoded(store, i), whole, False, want[i], place, cubic)
    difference = np.abs(shown(name, store, plan).astype(int) - want)
    assert difference.max() <= 1


@pytest.mark.parametrize("filter_", FILTERS)
def test_the_visible_part_is_that_of_the_whole(filter_: EvalFilter) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(50):
        # Of middle greys: where a cubic's first pass leaves 0..255, what is cut off depends on
        # which pass is the first.
        image = rng.integers(80, 176, (*rng.integers(1, 200, 2), 3), np.uint8)
        plan = eval_plan(*np.array(image.shape[:2])[:, None], size=40, resize=50, batch=1)
        top, left, height, width = plan.place[0, 0].tolist()
        want = np.zeros((40, 40, 3), np.uint8)
        put(crop_resize(image, plan.window[0, 0], (height, width), filter_), top, left, want)
        got = visible_part(image, (top, left, height, width), (40, 40), filter_)
        assert np.abs(got.astype(int) - want).max() <= 2, SEED  # the passes may change places


# ------------------------------------------------------------------ what DALI is told


def kernel(x: float, filter_: EvalFilter) -> float:
    """A filter at a place; the cubic as Wikipedia writes it, with a = -1/2."""
    x = abs(x)
    if filter_ == "bilinear":
        return max(0.0, 1 - x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    if x < 2:
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return 0.0


@pytest.mark.parametrize("filter_", FILTERS)
def test_the_share_of_a_filter_inside_the_image_is_that_of_plain_python(
    filter_: EvalFilter,
) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(30):
        side, resized = rng.integers(1, 200, 2).tolist()
        n_out = int(rng.integers(1, resized + 1))
        begin = -int(rng.integers(0, resized - n_out + 1))
        (got,) = shares_inside(
            np.array([side]), np.array([begin]), np.array([resized]), n_out, filter_
        )
        scale = side / resized
        reach = max(scale, 1)
        for i in range(n_out):
            centre = (i - begin + 0.5) * scale
            weights = {x: kernel((x + 0.5 - centre) / reach, filter_) for x in range(-450, 650)}
            inside = sum(weight for x, weight in weights.items() if 0 <= x < side)
            assert got[i] == pytest.approx(inside / sum(weights.values()), rel=1e-5)


def test_borders_show_where_an_image_shrinks_to_its_crop() -> None:
    image = np.array([[300, 400]])
    for resize, shows in ((64, True), (67, True), (72, False)):
        plan = eval_plan(*image.T, size=64, resize=resize, batch=1)
        assert show_borders(image, plan.place[0], (64, 64)) == shows
    plan = eval_plan(*(image // 10).T, size=64, resize=64, batch=1)
    assert not show_borders(image // 10, plan.place[0], (64, 64)), "it is enlarged"
    assert show_borders(image // 10, plan.place[0], (64, 64), "bicubic"), "a cubic reaches further"


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "name", ["reference", pytest.param("ffcv", marks=needs_ffcv), "turbojpeg", "dali"]
)
def test_registry_and_loader_name_the_same_filters(name: str) -> None:
    back_end = BACK_ENDS[name]
    loader = getattr(import_module(back_end.module), back_end.loader)
    assert set(loader.filters) == set(back_end.filters)


def test_a_loader_refuses_a_filter_that_it_lacks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader("reference", store, size=64)
    monkeypatch.setattr(loader, "filters", ("bilinear",))
    spec = PlanSpec(SEED, 64, 12, clean_group_rows=12)
    plan = draw_epoch(spec, store.heights, store.widths, 0)
    with pytest.raises(ValueError, match="filter = 'area': ReferenceLoader shows only bilinear"):
        loader.load(plan)
    assert len(list(loader.load(replace(plan, spec=replace(spec, filter="bilinear"))))) == 2
