"""Decoded planes: from image files to planes, and what the loaders show of them."""

from __future__ import annotations

import random
from importlib.util import find_spec
from io import BytesIO

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

from pipelines import EpochPlan, PlanSpec, Store, draw_epoch, eval_plan, open_loader, open_store
from pipelines.images import decode
from pipelines.loaders import colours, reference
from pipelines.planes import BAND, encode_planes, split_planes
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import PLANES, planes_bytes
from tests.conftest import photo, write_beton
from tests.pipelines.samples import encoded, exif_of, picture

needs_ffcv = pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")
FAST = [pytest.param("ffcv", marks=needs_ffcv), "turbojpeg"]
SEED = random.SystemRandom().randrange(2**31)


def random_jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    """4:2:0, of smooth colours or of noise that leaves the range of RGB."""
    image = photo(rng, height, width)
    if rng.random() < 0.5:
        image = rng.integers(0, 256, image.shape, np.uint8)
    out = BytesIO()
    quality = int(rng.integers(20, 99))
    progressive = bool(rng.integers(2))
    Image.fromarray(image).save(out, "JPEG", quality=quality, progressive=progressive)
    return out.getvalue()


def shown_by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def shown_by_kernel(sample: bytes, height: int, width: int) -> np.ndarray:
    image = np.empty((height, width, 3), np.uint8)
    planes = split_planes(np.frombuffer(sample, np.uint8), height, width)
    colours.planes_as_rgb(*planes, 0, 0, image)
    return image


def shown_by_twin(sample: bytes, height: int, width: int) -> np.ndarray:
    planes = split_planes(np.frombuffer(sample, np.uint8), height, width)
    return reference.planes_as_rgb(*planes)


# ------------------------------------------------------------------ from files to planes


def test_planes_of_a_jpeg_show_its_pixels_bit_for_bit() -> None:
    rng = np.random.default_rng(SEED)
    small = [(2, 2), (2, 3), (3, 2), (4, 5), (5, 4), (6, 6), (7, 16), (16, 17)]
    for height, width in small + rng.integers(2, 90, (40, 2)).tolist():
        data = random_jpeg(rng, height, width)
        sample, *sides = encode_planes(data)
        assert sides == [height, width]
        assert len(sample) == planes_bytes(np.array([height]), np.array([width]))[0]
        wanted = shown_by_pillow(data)
        assert_array_equal(shown_by_kernel(sample, height, width), wanted, str(SEED))
        assert_array_equal(shown_by_twin(sample, height, width), wanted, str(SEED))


@pytest.mark.parametrize("max_side", [None, 40])
@pytest.mark.parametrize(
    "kind", ["4:4:4", "4:2:2", "grey", "PNG", "tall", "turned", "one column", "CMYK"]
)
def test_other_images_are_converted(kind: str, max_side: int | None) -> None:
    """They show what `decode` gives, but for colours at half the sides."""
    image = picture(SEED, 61, 83)
    match kind:
        case "4:4:4" | "4:2:2":
            data = encoded(image, "JPEG", quality=95, subsampling=kind)
        case "grey" | "CMYK":
            data = encoded(image.convert(kind.replace("grey", "L")), "JPEG", quality=95)
        case "PNG":
            data = encoded(image, "PNG")
        case "tall":
            data = encoded(picture(SEED, 2 * BAND + 33, 41), "PNG")
        case "turned":
            data = encoded(image, "JPEG", quality=95, exif=exif_of(6))
        case "one column":
            data = encoded(image.resize((1, 50)), "JPEG", quality=95)
    assert_as_good_as_the_best_jpeg(data, max_side)


def test_a_4_2_0_jpeg_is_shrunk_as_any_image() -> None:
    data = encoded(picture(SEED, 61, 83), "JPEG", quality=95)
    assert encode_planes(data, 40)[1:] == (29, 40)
    assert_as_good_as_the_best_jpeg(data, 40)


def assert_as_good_as_the_best_jpeg(data: bytes, max_side: int | None) -> None:
    """Planes show the picture as well as a 4:2:0 JPEG of quality 100 would."""
    wanted = decode(data, max_side)
    sample, height, width = encode_planes(data, max_side)
    assert (width, height) == wanted.size
    ours = np.abs(shown_by_kernel(sample, height, width) - np.asarray(wanted).astype(int))
    best = shown_by_pillow(encoded(wanted, "JPEG", quality=100, subsampling="4:2:0"))
    theirs = np.abs(best - np.asarray(wanted).astype(int))
    assert ours.mean() <= theirs.mean() + 0.1, SEED
    assert np.quantile(ours, 0.99) <= np.quantile(theirs, 0.99) + 2, SEED


def test_an_rgb_jpeg_is_not_taken_for_planes_of_other_colours() -> None:
    """Three components at 2x2, 1x1, 1x1 that are R, G and B: an Adobe marker says so."""
    data = bytearray(encoded(picture(SEED), "JPEG", quality=95))
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # transform 0
    jfif_end = 4 + int.from_bytes(data[4:6])
    data[2:jfif_end] = adobe
    sample, height, width = encode_planes(bytes(data))
    wanted = shown_by_pillow(bytes(data)).astype(int)
    assert np.abs(shown_by_kernel(sample, height, width) - wanted).mean() < 12, SEED


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="not an image"):
        encode_planes(b"nothing like an image")


# ------------------------------------------------------------------ the kernel


def test_the_kernel_equals_the_twin_on_any_part_of_any_planes() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(60):
        height, width = rng.integers(1, 40, 2)
        n_bytes = int(planes_bytes(height, width))
        sample = rng.integers(0, 256, n_bytes, np.uint8)
        planes = split_planes(sample, height, width)
        whole = reference.planes_as_rgb(*planes)
        for _ in range(4):
            top, left = int(rng.integers(height)), int(rng.integers(width))
            bottom = int(rng.integers(top, height)) + 1
            right = int(rng.integers(left, width)) + 1
            part = np.empty((bottom - top, right - left, 3), np.uint8)
            colours.planes_as_rgb(*planes, top, left, part)
            assert_array_equal(part, whole[top:bottom, left:right], str(SEED))


def test_all_colours_are_converted_as_by_the_integers_of_libjpeg() -> None:
    """Float32 is exact: every Cb with every Cr, and a quarter of all Y with each."""
    pairs = np.arange(1 << 16).reshape(-1, 2)  # in two columns, which are not blended
    cb = (pairs >> 8).astype(np.uint8)
    cr = (pairs & 255).astype(np.uint8)
    y = np.empty((2 * len(pairs), 4), np.uint8)
    shown = np.empty((*y.shape, 3), np.uint8)
    for brightness in np.random.default_rng(SEED).permutation(256).reshape(-1, 4)[:16]:
        y[0::2, 0::2], y[0::2, 1::2], y[1::2, 0::2], y[1::2, 1::2] = brightness
        colours.planes_as_rgb(y, cb, cr, 0, 0, shown)
        assert_array_equal(shown, reference.planes_as_rgb(y, cb, cr), str(SEED))


# ------------------------------------------------------------------ the loaders


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """The same JPEGs as they are, and as planes."""
    rng = np.random.default_rng(SEED)
    root = tmp_path_factory.mktemp("planes")
    jpegs = [random_jpeg(rng, *sides) for sides in rng.integers(20, 170, (24, 2)).tolist()]
    as_jpegs = write_beton(root / "jpegs.beton", jpegs, range(len(jpegs)))
    with BetonWriter(root / "planes.beton", len(jpegs), planes=True) as writer:
        for label, data in enumerate(jpegs):
            sample, height, width = encode_planes(data)
            writer.add(Sample(sample, PLANES, height, width), label)
        writer.commit(None, {})
    return open_store(as_jpegs), open_store(root / "planes.beton")


def plans(store: Store, training_filter: str) -> list[EpochPlan]:
    """Windows inside, around and outside the images; whole images on canvases; PADDING rows."""
    sides = (store.heights, store.widths)
    found = []
    changes: tuple[dict[str, object], ...] = (
        {"size": 64},
        {"size": 24, "scale": (0.5, 1.0)},  # most windows at least twice as large
        {"size": 64, "crop": "pad", "pad": 100},
        {"size": (48, 80), "crop": "letterbox", "jitter": (0.3, 3.0)},
    )
    for change in changes:
        rows = {"clean_rows": 8, "clean_group_rows": 4, "filter": training_filter}
        found.append(draw_epoch(PlanSpec(seed=SEED, **rows | change), *sides, 0))  # type: ignore[arg-type]
    found.append(eval_plan(*sides, size=56, resize=64, batch=16))
    return found


def images(name: str, store: Store, plan: EpochPlan) -> np.ndarray:
    loader = open_loader(name, store, size=plan.spec.size)
    try:
        return np.stack([batch.images.numpy().copy() for batch in loader.load(plan)])
    finally:
        loader.close()


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_planes_are_shown_as_their_jpegs_are(name: str, stores: tuple[Store, Store]) -> None:
    """Against Pillow's decoder: equal with the bilinear filter, within a grey level with area."""
    jpegs, planes = stores
    for plan in plans(jpegs, "bilinear"):
        assert_array_equal(images(name, planes, plan), images("reference", jpegs, plan), str(SEED))
    for plan in plans(jpegs, "area"):
        ours = images(name, planes, plan).astype(int)
        wanted = images("reference", jpegs, plan)
        assert np.abs(ours - wanted).max() <= 1, (plan.spec, SEED)
        # Exact halves: many in a window of twice the sides. Truncation would be half of all.
        assert (ours != wanted).mean() < 0.1, (plan.spec, SEED)
    assert wanted.any()


def test_planes_of_a_mirrored_image_are_those_of_the_upright_one() -> None:
    image = picture(SEED, 60, 80)
    turned = encoded(image, "PNG", exif=exif_of(2))
    upright = encoded(ImageOps.mirror(image), "PNG")
    assert encode_planes(turned) == encode_planes(upright)
