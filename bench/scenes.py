"""Scenes to detect objects in, which a tiny network learns within minutes on a CPU.

Objects of five classes of Fashion-MNIST lie on a photograph of CIFAR-10, enlarged to 128 pixels.
The scenes of train and test share neither an object nor a photograph. A scene is a function of
(split, seed, its number): a longer set begins with a shorter one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from pipelines.boxes import Annotations
from pipelines.sources import cifar10, fashion_mnist
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import RAW

SIDE = 128  # pixels, of a scene
CLASSES = ("T-shirt", "trouser", "sneaker", "bag", "ankle boot")
SPLITS = ("train", "test")

MOST_OBJECTS = 4
LONGER_SIDE = (28, 72)  # pixels, of an object's box; log-uniform between them
MOST_OVERLAP = 0.1  # of two boxes: the intersection's share of the smaller one
TRIES = 20  # to find a place for an object; then the scene goes without it

OPAQUE_FROM = 12  # grey level: a garment's faint edge and what is brighter
DARKEST = (0, 90)  # grey levels, of each channel of an object's darkest pixels
BRIGHTEST = (110, 255)  # of its brightest

# Grey levels: standard deviation of the grain of a scene, as a camera makes it. An enlarged
# photograph has none, and a network that never saw any is blind from the faintest noise on.
GRAIN = (0, 8)


@dataclass(frozen=True, eq=False)
class Sources:
    """What scenes are made of."""

    objects: np.ndarray  # uint8 (N, 28, 28), on black
    labels: np.ndarray  # int64 (N,), places in CLASSES
    photos: np.ndarray  # uint8 (M, 32, 32, 3)


class Scenes(NamedTuple):
    """N scenes and their K objects."""

    images: np.ndarray  # uint8 (N, SIDE, SIDE, 3)
    annotations: Annotations  # K boxes; an area is the number of pixels that the object covers
    objects: np.ndarray  # int64 (K,), rows of Sources.objects


def sources(split: Literal["train", "test"]) -> Sources:
    """Fetched once. Raises OSError if a source cannot be reached, ValueError for a bad copy."""
    images, labels = fashion_mnist.load(split)
    photos, _ = cifar10.load(split)
    wanted = [fashion_mnist.CLASSES.index(name) for name in CLASSES]
    kept = np.isin(labels, wanted)
    places = np.zeros(len(fashion_mnist.CLASSES), np.int64)
    places[wanted] = np.arange(len(wanted))
    return Sources(images[kept], places[labels[kept]], photos)


def make_scenes(
    split: Literal["train", "test"], count: int, seed: int, made_of: Sources | None = None
) -> Scenes:
    """`count` scenes of 1 to MOST_OBJECTS objects each, of the split's own sources by default."""
    if made_of is None:
        made_of = sources(split)
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    first = np.zeros(count + 1, np.int64)
    placed: list[_Placed] = []
    for i in range(count):
        rng = np.random.default_rng((seed, SPLITS.index(split), i))
        scene, objects = _scene(made_of, rng)
        images[i] = _grainy(scene, rng)
        placed += objects
        first[i + 1] = len(placed)
    rows = np.array([one.row for one in placed], np.int64)
    annotations = Annotations(
        first,
        boxes=np.array([one.box for one in placed], np.float32).reshape(-1, 4),
        classes=made_of.labels[rows].astype(np.int32),
        crowd=np.zeros(len(rows), bool),
        area=np.array([one.area for one in placed], np.float32),
    )
    return Scenes(images, annotations, rows)


def write_scenes(dst: str | Path, split: Literal["train", "test"], count: int, seed: int) -> None:
    """Scenes as a `.beton` for detection, of raw samples. Raises as `sources`, and if DST exists.

    With the same arguments it is the same file.
    """
    with BetonWriter(dst, count) as writer:
        made = make_scenes(split, count, seed)
        for i, image in enumerate(made.images):
            writer.add(Sample(image.tobytes(), RAW, SIDE, SIDE), i)
        encoding = {"source": f"scenes {split}", "seed": seed, "raw": True, "count": count}
        writer.commit(CLASSES, encoding, annotations=made.annotations)


class _Placed(NamedTuple):
    """An object in a scene."""

    row: int  # of Sources.objects
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels
    area: int  # pixels that it covers


def _scene(made_of: Sources, rng: np.random.Generator) -> tuple[np.ndarray, list[_Placed]]:
    """uint8 (SIDE, SIDE, 3) and its objects."""
    photo = Image.fromarray(made_of.photos[rng.integers(len(made_of.photos))])
    scene = np.array(photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    objects: list[_Placed] = []
    for _ in range(rng.integers(1, MOST_OBJECTS + 1)):
        row = int(rng.integers(len(made_of.objects)))
        grey, opaque = _resized(made_of.objects[row], rng)
        box = _free_place(opaque.shape, [one.box for one in objects], rng)
        if box is None:
            continue
        left, top, right, bottom = box
        window = scene[top:bottom, left:right]
        window[opaque] = _coloured(grey, rng)[opaque]
        objects.append(_Placed(row, box, int(opaque.sum())))
    return scene, objects


def _resized(
    image: np.ndarray,  # uint8 (28, 28)
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """An object of random size, maybe mirrored: grey levels in [0, 1] and where it is opaque.

    Both are (height, width) of its tight box: every side of it has an opaque pixel.
    """
    rows, columns = np.nonzero(image >= OPAQUE_FROM)
    tight = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    if rng.random() < 0.5:
        tight = tight[:, ::-1]
    longer_side = np.exp(rng.uniform(*np.log(LONGER_SIDE)))
    scale = longer_side / max(tight.shape)
    height, width = (max(1, round(side * scale)) for side in tight.shape)

    def resized(pixels: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(pixels, np.float32))
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))

    opaque = resized(tight >= OPAQUE_FROM) >= 0.5
    rows, columns = np.nonzero(opaque)
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    return resized(tight)[box] / 255, opaque[box]


def _free_place(
    shape: tuple[int, ...],  # height, width
    taken: list[tuple[int, int, int, int]],
    rng: np.random.Generator,
) -> tuple[int, int, int, int] | None:
    """A box of that shape within the scene that hides little of the others; None if none is found.

    The same for the others: they hide little of it.
    """
    height, width = shape
    for _ in range(TRIES):
        left = int(rng.integers(SIDE - width + 1))
        top = int(rng.integers(SIDE - height + 1))
        box = (left, top, left + width, top + height)
        if all(overlap(box, other) <= MOST_OVERLAP for other in taken):
            return box
    return None


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The intersection's share of the smaller of two boxes: left, top, right, bottom."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller


def _coloured(
    grey: np.ndarray,  # (height, width) in [0, 1]
    rng: np.random.Generator,
) -> np.ndarray:
    """uint8 (height, width, 3): grey levels between two random colours."""
    darkest = rng.uniform(*DARKEST, size=3)
    brightest = rng.uniform(*BRIGHTEST, size=3)
    colours = darkest + grey[..., None] * (brightest - darkest)
    return colours.round().astype(np.uint8)


def _grainy(
    scene: np.ndarray,  # uint8 (SIDE, SIDE, 3)
    rng: np.random.Generator,
) -> np.ndarray:
    grain = rng.normal(0, rng.uniform(*GRAIN), scene.shape)
    return (scene + grain).round().clip(0, 255).astype(np.uint8)
