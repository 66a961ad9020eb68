"""What annotation files say of images, in one form whatever their format, before any image is read.

Nothing in such a file is trusted: not its numbers, and not the paths of its images.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.archives.listing import FOREIGN, SUFFIXES
from pipelines.boxes import Annotations
from pipelines.files import readable, shown

# What there may be besides plain boxes; each is counted.
CROWD = "crowd boxes: never trained, and never counted against a detector"
NO_AREA = "boxes without area: dropped"
OUTSIDE = "boxes outside their image: dropped"
CLIPPED = "boxes partly outside their image: clipped at its edge"
LEFT_OUT = "boxes of images that were left out: dropped"
NO_BOXES = "images without boxes: kept"
NOT_NAMED = "image files that the annotations do not name: passed over"


class ImageEntry(NamedTuple):
    """One image as the annotations have it."""

    name: str  # path of its file below the image folder
    sides: tuple[int, int] | None  # height, width; None where nothing is said of them
    fault: str = ""  # why there is no file for it


@dataclass
class Annotated:
    """All that annotation files say: images in their order, boxes in any order."""

    classes: tuple[str, ...]
    images: list[ImageEntry]

    # One per box.
    image: list[int] = field(default_factory=list)  # place in `images`
    boxes: list[tuple[float, ...]] = field(default_factory=list)  # left, top, right, bottom
    labels: list[int] = field(default_factory=list)  # place in `classes`
    crowd: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)  # square pixels; NaN: that of the box

    notes: dict[str, int] = field(default_factory=dict)  # what was counted while reading them

    def add(
        self, image: int, box: tuple[float, ...], label: int, *, crowd: bool, area: float = math.nan
    ) -> None:
        self.image.append(image)
        self.boxes.append(box)
        self.labels.append(label)
        self.crowd.append(crowd)
        self.area.append(area)

    def for_images(
        self,
        kept: np.ndarray,  # int64 (n,), ascending: places in `images`
        sides: np.ndarray,  # int (n, 2): height, width of the files
        stored: np.ndarray,  # int (n, 2): height, width as they are stored
    ) -> tuple[Annotations, dict[str, int]]:
        """The boxes of those images in pixels as stored, and what was dropped and changed.

        Of an image's boxes the order is that in which they were added.
        """
        # The place of every image among those kept, -1 for the others.
        place = np.full(len(self.images), -1)
        place[kept] = np.arange(len(kept))
        image = place[np.array(self.image, np.int64)]
        order = np.argsort(image, kind="stable")
        order = order[image[order] >= 0]
        image = image[order]
        counts = {LEFT_OUT: len(self.image) - len(order)}

        boxes = np.array(self.boxes, np.float64).reshape(-1, 4)[order]
        height, width = sides[image].T
        edges = np.stack([width, height, width, height], 1)
        clipped = np.clip(boxes, 0, edges)
        scale = (stored / sides)[image]  # (n boxes, 2): of height and width
        found = (clipped * scale[:, [1, 0, 1, 0]]).astype(np.float32)

        has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        overlaps = (clipped[:, 2:] > clipped[:, :2]).all(1)
        # Rounding may leave nothing of a very narrow one.
        keep = has_area & overlaps & (found[:, 2:] > found[:, :2]).all(1)
        was_clipped = (clipped != boxes).any(1) & keep
        crowd = np.array(self.crowd, bool)[order][keep]
        area = np.array(self.area, np.float64)[order] * scale.prod(1)
        area = np.where(np.isnan(area), (found[:, 2:] - found[:, :2]).prod(1), area)
        labels = np.array(self.labels, np.int32)[order]
        n = np.bincount(image[keep], minlength=len(kept))
        annotations = Annotations(
            first=np.concatenate([[0], np.cumsum(n)]).astype(np.int64),
            boxes=found[keep],
            classes=labels[keep],
            crowd=crowd,
            area=area[keep].astype(np.float32),
        )
        n_outside = int((has_area & ~overlaps).sum())
        counts |= {
            CROWD: int(crowd.sum()),
            NO_AREA: len(keep) - int(keep.sum()) - n_outside,
            OUTSIDE: n_outside,
            CLIPPED: int(was_clipped.sum()),
            NO_BOXES: int((n == 0).sum()),
        }
        return annotations, counts


# ------------------------------------------------------------------ checks of what a file says


def finite(value: Any) -> float | None:
    """A number of JSON as a float, None for what is no finite number."""
    if type(value) not in (int, float):  # `type`, since True is an instance of int
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def inside_folder(name: str) -> str:
    """The path of an image below the image folder, in its shortest form.

    Raises:
        ValueError: no path, or one that leads out of the folder.
    """
    parts = name.split("/")
    if not name or "\0" in name or name.startswith("/") or ".." in parts:
        raise ValueError(f"{shown(name)} must be a path that stays inside the image folder")
    return os.path.normpath(name)


def refuse_doubles(path: Path, names: Iterable[str]) -> None:
    """ValueError for an image file that stands there twice: it would be trained twice."""
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise ValueError(f"{readable(path)}: the image {shown(name)} stands {times} times")


# ------------------------------------------------------------------ the image folder


def image_files(folder: Path) -> Iterator[str]:
    """Paths of the image files below `folder`, relative to it; not through links to folders.

    Without hidden files and folders, and those of no data set, as in listing.py.
    """
    for top, inner, files in os.walk(folder):
        inner[:] = [
            name for name in inner if not name.startswith(".") and name.lower() not in FOREIGN
        ]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(top, name), folder)
