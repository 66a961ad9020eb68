"""Cue conflict images: the shape of one category, the texture of another, both in the file name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import pipelines
from fap.class_maps import sixteen_categories
from fap.evaluate.images import StoredImages, look_at
from fap.evaluate.sets import EvalSet
from fap.tasks.base import Judge, Result, Task
from fap.tasks.labels import PADDING_LABEL, ClassMap
from fap.tasks.shape_bias import ShapeOrTexture, pair
from pipelines import Store
from pipelines.files import listed, readable
from pipelines.pixel_store import PixelStore
from pipelines.subset import SubsetStore

CATEGORIES = tuple(sixteen_categories())
# cat7-elephant1.png; lab experiments put more in front, which ends with an underscore.
NAME = re.compile(rf"(?:.*_)?({'|'.join(CATEGORIES)})\d+-({'|'.join(CATEGORIES)})\d+\.\w+")

CLASS_MAP = ClassMap(
    title="cue conflict",
    how="by the published map",
    meanings=sixteen_categories(),
    counted="the mean probability of each category's decides",
)


@dataclass(frozen=True)
class CueConflictSet(EvalSet):
    """The folder at `source`, CATEGORY/SHAPE7-TEXTURE1.png; CATEGORY is the shape's."""

    @contextmanager
    def open(self) -> Iterator[StoredImages]:
        with closing(pipelines.open_store(self.source)) as store:
            cues, unused = cues_of(store)
            seen = PixelStore(SubsetStore(store, np.array(list(cues)), store.notes))
            images = StoredImages(self.reading, look_at(seen))
            references = np.array([pair(*both) for both in cues.values()])
            images.references = torch.from_numpy(images.plan.look_up(references, PADDING_LABEL))
            images.unused = (*store.notes, *unused)
            yield images

    def judge(self, task: Task) -> Judge:
        return ShapeOrTexture(task.n_classes)

    def in_words(self, task: Task, result: Result) -> str:
        return f"shape bias {result['shape_bias']:.2%} of {result['count']:,} images"


def cues_of(store: Store) -> tuple[dict[int, tuple[int, int]], list[str]]:
    """Shape and texture of each image whose cues conflict, by its number; what is left out.

    Both are places in CATEGORIES. Raises ValueError where no image is left, or for a folder that is
    called otherwise than the shape of one of its images.
    """
    cues = {}
    nameless = []
    n_alike = 0
    for index in range(len(store)):
        file = store.file(index)
        name = NAME.fullmatch(file.name)
        if name is None:
            nameless.append(readable(file))
            continue
        shape, texture = name.groups()
        folder = store.classes[store.labels[index]] if store.classes else shape
        if folder != shape:
            raise ValueError(f"{readable(file)}: its name says {shape}, its folder {folder}")
        if shape == texture:
            n_alike += 1
        else:
            cues[index] = (CATEGORIES.index(shape), CATEGORIES.index(texture))
    if not cues:
        raise ValueError(
            f"{readable(store.path)}: holds no image with a name such as cat/cat7-elephant1.png; "
            f"the 16 folders are {', '.join(CATEGORIES)}"
        )
    unused = []
    if n_alike:
        unused.append(
            f"{n_alike:,} images of {readable(store.path)} whose shape and texture are the same"
        )
    if nameless:
        unused.append(f"{len(nameless):,} files without the names of two cues: {listed(nameless)}")
    return cues, unused
