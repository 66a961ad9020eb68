"""A file's own pixels, without its border, by every back end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipelines
from fap.cli.convert import main as convert
from pipelines.images import decode
from pipelines.pixel_store import PixelStore
from pipelines.store import JPG, RAW, DamagedData
from pipelines.subset import RelabelledStore, SubsetStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PNGs of noise, which no JPEG keeps, and a JPEG."""
    rng = np.random.default_rng(1)
    for number, name in enumerate(["a", "b", "c"]):
        (tmp_path / "data" / name).mkdir(parents=True)
        image = Image.fromarray(rng.integers(0, 256, (20 + number, 31, 3), dtype=np.uint8))
        image.save(tmp_path / "data" / name / "x.png")
    image.save(tmp_path / "data" / "c" / "y.jpg", quality=90)
    return tmp_path / "data"


def seen(file: Path, border: int) -> np.ndarray:
    image = Image.open(file)
    return np.asarray(image.crop((border, border, image.width - border, image.height - border)))


@pytest.mark.parametrize("border", [0, 2])
def test_pixels_are_those_of_the_file(folder: Path, border: int) -> None:
    """A JPEG without a border to cut off stays one."""
    store = PixelStore(pipelines.open_store(folder), border)
    assert store.modes.tolist() == [RAW, RAW, RAW, RAW if border else JPG]
    for index in range(4 if border else 3):
        expected = seen(store.file(index), border)
        assert (store.heights[index], store.widths[index]) == expected.shape[:2]
        assert store.sizes[index] == expected.size
        assert store.read(index).tobytes() == expected.tobytes()
    assert [store.name_of(i) for i in range(4)] == [store.whole.name_of(i) for i in range(4)]
    assert store.files() == store.whole.files()


@pytest.mark.parametrize("back_end", ["reference", "turbojpeg"])
def test_loaders_show_them(folder: Path, back_end: str) -> None:
    store = PixelStore(pipelines.open_store(folder), 2)
    plan = pipelines.eval_plan(store.heights, store.widths, size=16, resize=16, batch=4)
    (batch,) = pipelines.open_loader(back_end, store, size=16).load(plan)
    for shown, index in zip(batch.images, plan.index[0].astype(int), strict=True):
        image = Image.fromarray(seen(store.file(index), 2))
        scale = 16 / min(image.size)
        sides = (int(image.width * scale), int(image.height * scale))
        left, top = round((sides[0] - 16) / 2), round((sides[1] - 16) / 2)
        resized = image.resize(sides, Image.Resampling.BILINEAR)
        expected = np.asarray(resized.crop((left, top, left + 16, top + 16)))
        assert np.array_equal(shown.permute(1, 2, 0).numpy(), expected)


def test_stored_pixels_lose_their_border_too(folder: Path, tmp_path: Path) -> None:
    assert convert([str(folder), str(tmp_path / "raw.beton"), "--raw"]) == 0
    store = PixelStore(pipelines.open_store(tmp_path / "raw.beton"), 2)
    assert store.read(1).tobytes() == seen(folder / "b" / "x.png", 2).tobytes()


def test_what_it_is_depends_on_the_border(folder: Path) -> None:
    whole = pipelines.open_store(folder)
    identities = [PixelStore(whole, border).identity() for border in (0, 1, 2)]
    assert len({str(identity) for identity in [whole.identity(), *identities]}) == 4
    assert PixelStore(pipelines.open_store(folder), 1).identity() == identities[1]


def test_nothing_but_border_and_planes_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a/x\.png.*20 x 31 pixels are nothing but its"):
        PixelStore(pipelines.open_store(folder), 10)
    assert convert([str(folder), str(tmp_path / "p.beton"), "--decoded", "yuv420"]) == 0
    with pytest.raises(ValueError, match=r"p\.beton: decoded planes hold no pixels of the file"):
        PixelStore(pipelines.open_store(tmp_path / "p.beton"))


def test_a_file_that_changed_is_named(folder: Path) -> None:
    store = PixelStore(pipelines.open_store(folder))
    Image.new("RGB", (9, 9)).save(folder / "a" / "x.png")
    with pytest.raises(DamagedData, match=r"a/x\.png.*\(9, 9\) pixels, \(20, 31\) when"):
        store.read(0)
    (folder / "b" / "x.png").write_bytes(b"nothing")
    with pytest.raises(DamagedData, match=r"b/x\.png.*not an image"):
        store.read(1)


def test_of_some_images_under_other_labels(folder: Path) -> None:
    """As ObjectNet's images are shown."""
    whole = pipelines.open_store(folder)
    numbers = np.array([3, 1])
    some = RelabelledStore(whole, numbers, np.array([1, 0]), ("b", "c"), ["left out"])
    assert some.classes == ("b", "c")
    assert some.labels.tolist() == [1, 0]
    assert some.notes == ("left out",)
    store = PixelStore(some)
    assert store.read(1).tobytes() == seen(folder / "b" / "x.png", 0).tobytes()
    assert (store.labels.tolist(), store.notes) == ([1, 0], ("left out",))
    other = RelabelledStore(whole, numbers, np.array([0, 1]), ("b", "c"))
    assert other.identity()["content"] != some.identity()["content"]
    assert SubsetStore(whole, numbers).content(1) == (folder / "b" / "x.png").read_bytes()


def test_a_folder_shows_the_pixels_of_what_is_no_jpeg(tmp_path: Path) -> None:
    """As a benchmark's files are meant; a JPEG is a JPEG, whatever its content had to become."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 9, 14, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    for image, name in zip(pixels, ("1.png", "2.JPEG", "3.PNG"), strict=True):
        Image.fromarray(image).save(tmp_path / "a" / name)
    grey = Image.fromarray(pixels[0, ..., 0])
    grey.save(tmp_path / "a" / "4.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[1]).save(tmp_path / "a" / "5.png", exif=turned)
    plain = pipelines.open_store(tmp_path)
    exact = PixelStore(plain)
    assert exact.modes.tolist() == [RAW, JPG, RAW, RAW, RAW]
    assert exact.labels.tolist() == plain.labels.tolist()
    assert exact.identity() != plain.identity()
    for number, store_file in enumerate(sorted((tmp_path / "a").iterdir())):
        height, width = int(exact.heights[number]), int(exact.widths[number])
        assert (height, width) == ((14, 9) if number == 4 else (9, 14))
        if number == 1:
            assert exact.read(1).tobytes() == store_file.read_bytes() == plain.read(1).tobytes()
            continue
        shown = exact.read(number)
        assert len(shown) == exact.sizes[number]
        want = np.asarray(decode(store_file.read_bytes()))
        assert np.array_equal(shown.reshape(height, width, 3), want)
        as_jpeg = np.asarray(decode(plain.read(number).tobytes()))
        assert not np.array_equal(as_jpeg, want), "a JPEG loses something"
    assert np.array_equal(exact.read(0).reshape(9, 14, 3), pixels[0])
    assert np.array_equal(exact.read(4).reshape(14, 9, 3), np.rot90(pixels[1], -1))
    (tmp_path / "a" / "3.PNG").write_bytes((tmp_path / "a" / "5.png").read_bytes()[:-60])
    with pytest.raises(DamagedData, match=r"3\.PNG"):
        exact.read(2)
    Image.fromarray(pixels[0, :5]).save(tmp_path / "a" / "4.png")
    with pytest.raises(DamagedData, match="when it was scanned"):
        exact.read(3)
