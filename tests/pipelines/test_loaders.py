"""Loaders execute plans: `ffcv` against its twin, whatever the threads and the start; errors."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from pipelines import (
    Batch,
    DamagedData,
    EpochPlan,
    PlanSpec,
    Store,
    draw_epoch,
    eval_plan,
    loader_options,
    open_loader,
    open_store,
)
from pipelines.back_ends import BACK_ENDS, BackEnd
from pipelines.loaders.base import was_drawn_for
from pipelines.loaders.reference import ReferenceLoader, crop_resize, put
from pipelines.plan import PADDING
from pipelines.sources.beton import BetonStore
from pipelines.turbojpeg import decode_top
from tests.conftest import as_jpeg, photo, write_beton
from tests.pipelines.samples import add_sidecar

needs_ffcv = pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")
ON_A_CPU = [pytest.param("ffcv", marks=needs_ffcv), "turbojpeg", "reference"]
SEED = random.SystemRandom().randrange(2**31)  # plans are fresh at every run


def draw(store: Store, epoch: int = 0, **change: object) -> EpochPlan:
    rows = {"clean_rows": 8, "adv_rows": 4, "clean_group_rows": 4, "adv_group_rows": 2}
    spec = {"size": 64} | rows | change
    return draw_epoch(PlanSpec(seed=SEED, **spec), store.heights, store.widths, epoch)  # type: ignore[arg-type]


def nhwc(batch: Batch) -> np.ndarray:
    return batch.images.permute(0, 2, 3, 1).cpu().numpy()


def images(
    name: str, store: Store, plan: EpochPlan, start_step: int = 0, **options: int
) -> np.ndarray:
    """All images of a plan, uint8 (steps * B, S, S, 3)."""
    loader = open_loader(name, store, size=plan.spec.size, **options)
    try:
        batches = loader.load(plan, start_step)
        return np.concatenate([nhwc(batch).copy() for batch in batches])
    finally:
        loader.close()


def shown_by(plan: EpochPlan, step: int, store: Store) -> np.ndarray:
    """What the rows of a step should show, sample by sample, uint8 (B, S, S, 3)."""
    size = plan.spec.size
    out = np.zeros((plan.index.shape[1], size, size, 3), np.uint8)
    for row, index in enumerate(plan.index[step].tolist()):
        if index == PADDING:
            continue
        top, left, height, width = plan.place[step, row].tolist()
        window = plan.window[step, row]
        shown = crop_resize(decoded(store, index), window, (height, width), plan.spec.filter)
        if plan.flip[step, row]:
            shown = shown[:, ::-1]
        put(shown, top, left, out[row])
    return out


def decoded(store: Store, index: int) -> np.ndarray:
    """A JPEG of the store, by OpenCV."""
    return cv2.imdecode(store.read(index), cv2.IMREAD_COLOR)[..., ::-1]


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    """The tolerance between back ends on JPEGs, in grey levels: 2 on average, 12 for 99%."""
    difference = np.abs(a.astype(int) - b)
    assert difference.mean() <= 2, SEED
    assert np.quantile(difference, 0.99) <= 12, SEED


@pytest.mark.parametrize("name", ON_A_CPU)
def test_the_contract(name: str, jpeg_beton: Path) -> None:
    store = open_store(jpeg_beton)
    plan = draw(store)
    loader = open_loader(name, store, size=64)
    steps = []
    for batch in loader.load(plan):
        assert batch.images.shape == (12, 3, 64, 64)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        # Each row is the image that the plan names: any other is far off.
        assert_close(nhwc(batch), shown_by(plan, batch.step, store))
        steps.append(batch.step)
    assert steps == list(range(len(plan)))
    loader.close()


@needs_ffcv
@pytest.mark.parametrize("crop", ["random_resized", "pad"])
@pytest.mark.parametrize("size", [32, 96])
def test_ffcv_equals_the_twin_on_jpeg(crop: str, size: int, jpeg_store: BetonStore) -> None:
    """48-160 pixels a side to 32 (the decoder halves large ones) and to 96 (mostly enlarged)."""
    plan = draw(jpeg_store, size=size, crop=crop, pad=64)
    assert_close(images("ffcv", jpeg_store, plan), images("reference", jpeg_store, plan))


@needs_ffcv
@pytest.mark.parametrize(("divisor", "size"), [(2, 150), (4, 64)])
def test_the_shrinking_decoder_stays_within_the_tolerance(
    divisor: int, size: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(SEED)
    samples = [as_jpeg(photo(rng, *rng.integers(400, 700, 2))) for _ in range(12)]
    store = open_store(write_beton(tmp_path / "large.beton", samples, range(12)))
    plan = draw(store, size=size, scale=(0.8, 1.0))
    least = plan.window[..., 2:].min(-1)
    assert (least >= divisor * size).all(), "every window is decoded at this size"
    assert (least < 2 * divisor * size).any()
    assert_close(images("ffcv", store, plan), images("reference", store, plan))


@needs_ffcv
@pytest.mark.parametrize("proven", [False, True])
@pytest.mark.parametrize("filter_", ["area", "bilinear"])
def test_turbojpeg_shows_the_pixels_of_ffcv(
    filter_: str, proven: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and halved, odd sides, 4:2:0 and 4:4:4, progressive: the same libjpeg-turbo.

    Also where rows below the window are not decoded, because a checksum says that they are sound.
    """
    rng = np.random.default_rng(SEED)
    samples = []
    for height, width in rng.integers(20, 400, (24, 2)).tolist():
        out = BytesIO()
        subsampling = str(rng.choice(["4:2:0", "4:2:2", "4:4:4"]))
        progressive = bool(rng.integers(2))
        image = Image.fromarray(photo(rng, height, width))
        image.save(out, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
        samples.append(out.getvalue())
    path = write_beton(tmp_path / "all.beton", samples, range(24))
    plan = draw(open_store(path), filter=filter_)
    large = (plan.window[..., 2:] >= 128).all(-1)
    assert large.any() and not large.all(), "some windows are decoded at one half"
    wanted = images("ffcv", open_store(path), plan)
    if proven:
        add_sidecar(path, classes=tuple(f"class {i}" for i in range(24)))
    n_stopped = 0

    def counted(*args: object, **how: object) -> None:
        nonlocal n_stopped
        n_stopped += 1
        decode_top(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr("pipelines.turbojpeg.decode_top", counted)
    assert_array_equal(images("turbojpeg", open_store(path), plan), wanted)
    assert (n_stopped > 0) == proven


def test_outside_windows_of_proven_images_are_zero(tmp_path: Path) -> None:
    """Windows above, below and beside the image, of which few rows or none are decoded."""
    rng = np.random.default_rng(SEED)
    path = write_beton(tmp_path / "all.beton", [as_jpeg(photo(rng, 60, 70))] * 6, range(6))
    plan = draw(open_store(path), crop="pad", pad=100, clean_rows=4, adv_rows=0)
    wanted = images("turbojpeg", open_store(path), plan)
    add_sidecar(path)
    assert_array_equal(images("turbojpeg", open_store(path), plan), wanted)


@needs_ffcv
def test_ffcv_equals_the_twin_on_raw(raw_beton: Path, mixed_beton: Path) -> None:
    store = open_store(raw_beton)
    plan = draw(store)
    difference = np.abs(images("ffcv", store, plan).astype(int) - images("reference", store, plan))
    assert difference.max() <= 1, SEED  # float32 against float64 at a half
    # Few values lie there, but up to 2% of an image whose window has a side of 2 x 64 pixels: at
    # most 0.07% of a plan, in 1,500 plans. Truncation instead of rounding would be half of all.
    assert (difference > 0).mean() < 1e-2, SEED
    mixed = open_store(mixed_beton)
    assert_close(images("ffcv", mixed, plan), images("reference", mixed, plan))


@needs_ffcv
def test_same_size_windows_are_copied_exactly(tiny_beton: Path) -> None:
    store = open_store(tiny_beton)
    plan = draw(store, size=32, crop="pad")
    ours = images("ffcv", store, plan)
    assert_array_equal(ours, images("reference", store, plan))
    flat = plan.index.ravel(), plan.window.reshape(-1, 4), plan.flip.ravel()
    for image, index, (top, left, _, _), flip in zip(ours, *flat, strict=True):
        padded = np.pad(store.read(index).reshape(32, 32, 3), ((4, 4), (4, 4), (0, 0)))
        crop = padded[top + 4 : top + 36, left + 4 : left + 36]
        assert_array_equal(image, crop[:, ::-1] if flip else crop)


def test_the_twins_resize_is_opencvs_area_filter() -> None:
    rng = np.random.default_rng(SEED)
    for height, width in rng.integers(64, 300, (10, 2)).tolist():
        image = photo(rng, height, width)
        ours = crop_resize(image, np.array([0, 0, height, width]), 64)
        theirs = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(ours.astype(int) - theirs).max() <= 1, (height, width, SEED)


@needs_ffcv
def test_threads_and_prefetch_change_nothing(mixed_beton: Path) -> None:
    store = open_store(mixed_beton)
    plan = draw(store)
    one = images("ffcv", store, plan, threads=1, prefetch=1)
    for options in ({"threads": 2}, {"threads": 7, "prefetch": 5}):
        assert_array_equal(images("ffcv", store, plan, **options), one)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_starting_at_step_k_is_the_tail_of_the_run(name: str, jpeg_store: BetonStore) -> None:
    plan = draw(jpeg_store)
    assert len(plan) == 3
    assert_array_equal(images(name, jpeg_store, plan, 2), images(name, jpeg_store, plan)[2 * 12 :])


@needs_ffcv
def test_ranks_see_the_images_of_one_process(jpeg_store: BetonStore) -> None:
    plan = draw(jpeg_store)
    whole = images("ffcv", jpeg_store, plan).reshape(3, 12, 64, 64, 3)
    for rank in range(2):
        part = images("ffcv", jpeg_store, plan.for_rank(rank, 2)).reshape(3, 6, 64, 64, 3)
        assert_array_equal(part[:, :4], whole[:, 4 * rank : 4 * rank + 4])
        assert_array_equal(part[:, 4:], whole[:, 8 + 2 * rank : 10 + 2 * rank])


@pytest.mark.parametrize("name", ON_A_CPU)
def test_evaluation_pads_the_last_step(name: str, jpeg_store: BetonStore) -> None:
    plan = eval_plan(jpeg_store.heights, jpeg_store.widths, size=56, resize=64, batch=16)
    targets = plan.look_up(jpeg_store.labels, padding=-1)
    assert_array_equal(targets.ravel(), [*jpeg_store.labels, *[-1] * 8])
    loader = open_loader(name, jpeg_store, size=56)
    for batch in loader.load(plan):
        assert_close(nhwc(batch), shown_by(plan, batch.step, jpeg_store))
    assert batch.step == len(plan) - 1
    assert (batch.images[8:] == 0).all()
    assert (batch.images[:8].flatten(1).float().std(1) > 1).all()


@needs_ffcv
def test_leaving_early_leaks_neither_threads_nor_buffers(jpeg_store: BetonStore) -> None:
    plan = draw(jpeg_store)
    before = threading.active_count()
    loader = open_loader("ffcv", jpeg_store, size=64, threads=2)
    buffers = []
    for _ in range(20):
        for batch in loader.load(plan):
            buffers.append(weakref.ref(batch.images))
            break
        del batch
    gc.collect()
    assert threading.active_count() <= before + 2
    assert not [b for b in buffers if b() is not None]
    loader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_damaged_jpeg_is_an_error_that_names_it(
    name: str, tmp_path: Path, photos: list[np.ndarray]
) -> None:
    samples = [as_jpeg(image) for image in photos[:12]]
    samples[7] = samples[7][: len(samples[7]) // 2]
    store = open_store(write_beton(tmp_path / "bad.beton", samples, range(12)))
    loader = open_loader(name, store, size=64)
    with pytest.raises(DamagedData, match=r"bad\.beton: sample 7: "):
        list(loader.load(draw(store)))
    loader.close()


@needs_ffcv
@pytest.mark.parametrize("filter_", ["area", "bilinear"])
def test_random_damage_is_an_error_or_the_samples_own_pixels(
    filter_: str, tmp_path: Path, photos: list[np.ndarray]
) -> None:
    """Without a sidecar: what still decodes never shows the image that the buffer held before."""
    rng = np.random.default_rng(SEED)
    before = photo(rng, 64, 64)
    good = as_jpeg(photo(rng, 64, 64))
    path = write_beton(tmp_path / "bad.beton", [*[as_jpeg(before)] * 11, good], range(12))
    whole = path.read_bytes()
    caught = 0
    for _ in range(40):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] = rng.integers(256)
        if rng.random() < 0.3:
            start = rng.integers(len(bad))
            bad[start:] = bytes(len(bad) - start)
        path.write_bytes(whole.replace(good, bytes(bad)))
        store = open_store(path)
        spec = PlanSpec(SEED, 64, 12, clean_group_rows=12, crop="pad", pad=0, filter=filter_)
        plan = draw_epoch(spec, store.heights, store.widths, 0)
        # Each decoder of `ffcv` has a filter, and all images are shown as they are, in order.
        plan = replace(plan, index=np.arange(12, dtype=np.uint32)[None], flip=plan.flip & False)
        try:
            last = images("ffcv", store, plan, threads=1)[11].astype(int)
        except DamagedData as error:
            caught += "sample 11" in str(error)
            continue
        same_rows = np.abs(last - before).mean((1, 2)) < 4
        assert not same_rows.any(), SEED
    assert caught  # of about ten; how much of the damage a JPEG betrays is chance


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_plan_for_other_images_is_refused(
    name: str, jpeg_store: BetonStore, tiny_beton: Path, tmp_path: Path
) -> None:
    loader = open_loader(name, open_store(tiny_beton), size=64)
    with pytest.raises(ValueError, match="not drawn for the images of"):
        next(iter(loader.load(draw(jpeg_store))))
    with pytest.raises(ValueError, match="plan of size 32: the loader was opened for size = 64"):
        next(iter(loader.load(draw(jpeg_store, size=32))))
    loader.close()


def test_samples_and_windows_of_another_store_are_seen(jpeg_store: BetonStore) -> None:
    """One row of a plan at a time is made one that the store cannot have."""
    plan = draw(jpeg_store)
    assert was_drawn_for(plan, jpeg_store)
    height = jpeg_store.heights[plan.index[0, 0]]
    width = jpeg_store.widths[plan.index[0, 0]]
    for window in ((-1, 0, 9, 9), (0, -1, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0), (0, 0, height + 1, 9),
                   (0, 1, 9, width), (height - 8, 0, 9, 9)):  # fmt: skip
        changed = plan.window.copy()
        changed[0, 0] = window
        assert not was_drawn_for(replace(plan, window=changed), jpeg_store), window
    index = plan.index.copy()
    index[2, 5] = len(jpeg_store)
    assert not was_drawn_for(replace(plan, index=index), jpeg_store)
    # Padded windows may lie anywhere, but they are not resized.
    padded = draw(jpeg_store, crop="pad", pad=64)
    assert was_drawn_for(padded, jpeg_store)
    changed = padded.window.copy()
    changed[1, 1, 2] = 63
    assert not was_drawn_for(replace(padded, window=changed), jpeg_store)
    # What is no sample has no window.
    index[:] = PADDING
    assert was_drawn_for(replace(plan, index=index), jpeg_store)


def test_a_back_end_takes_its_own_options_and_no_others(jpeg_store: BetonStore) -> None:
    assert loader_options("reference") == set()
    for option in ("threads", "prefetch", "hw_decoder_load"):
        with pytest.raises(TypeError, match=option):
            open_loader("reference", jpeg_store, size=64, **{option: 1})


@needs_ffcv
def test_the_options_of_ffcv(jpeg_store: BetonStore) -> None:
    assert loader_options("ffcv") == {"threads", "prefetch"}
    with pytest.raises(TypeError, match="hw_decoder_load"):
        open_loader("ffcv", jpeg_store, size=64, hw_decoder_load=0.5)


def test_a_back_end_is_a_file_and_a_line_of_the_registry(
    jpeg_store: BetonStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NewLoader(ReferenceLoader):
        def __init__(self, store: Store, *, size: int, device: str = "cpu", cache: int = 0):
            super().__init__(store, size=size, device=device)
            self.cache = cache

    module = SimpleNamespace(NewLoader=NewLoader)
    monkeypatch.setitem(sys.modules, "pipelines.loaders.new", module)
    monkeypatch.setitem(BACK_ENDS, "new", BackEnd("pipelines.loaders.new", "NewLoader", "pip"))
    assert loader_options("new") == {"cache"}
    assert open_loader("new", jpeg_store, size=64, cache=3).cache == 3  # type: ignore[attr-defined]


def test_mistakes_are_named(jpeg_store: BetonStore) -> None:
    known = "ffcv, dali, turbojpeg, memory, reference"
    with pytest.raises(ValueError, match=f"pipeline = 'fcv': must be one of {known}"):
        open_loader("fcv", jpeg_store, size=64)


@needs_ffcv
def test_no_option_out_of_range(jpeg_store: BetonStore) -> None:
    with pytest.raises(ValueError, match="threads = 0"):
        open_loader("ffcv", jpeg_store, size=64, threads=0)


@needs_ffcv
@pytest.mark.slow
def test_the_ffcv_loader_leaves_torchs_threads_alone() -> None:
    script = (
        "import torch; torch.set_num_threads(3); "
        "import pipelines.loaders.ffcv; print(torch.get_num_threads())"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == "3"


@pytest.mark.gpu
@needs_ffcv
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_images_of_the_cpu(jpeg_store: BetonStore) -> None:
    """With work queued on every batch before the next is asked for.

    No buffer is overwritten too early.
    """
    plan = draw(jpeg_store)
    expected = images("ffcv", jpeg_store, plan).reshape(3, 12, 64, 64, 3)
    loader = open_loader("ffcv", jpeg_store, size=64, device="cuda")
    kept = []
    for batch in loader.load(plan):
        torch.cuda._sleep(20_000_000)
        kept.append(batch.images.clone())
    for got, want in zip(kept, expected, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_array_equal(got.permute(0, 2, 3, 1).cpu(), want)
    loader.close()
