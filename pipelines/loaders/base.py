"""What every loader yields, and what all loaders share."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.apply import augment
from pipelines.back_ends import FILTERS, Filter
from pipelines.files import readable
from pipelines.machine import usable_cores
from pipelines.plan import PADDING, EpochPlan
from pipelines.plan_spec import PlanSpec
from pipelines.sizes import Size, sides_of
from pipelines.store import PLANES, Store

ROWS_AT_A_TIME = 1 << 17  # of a plan that is checked


@dataclass(frozen=True)
class Batch:
    """One step's images: rows [0, n_clean) clean, the rest adversarial.

    Valid until the next one is asked for. What the rows should come to is looked up by the plan.
    """

    # uint8 (B, 3, H, W), channels_last, on the training device; one shape of a loader.
    images: Tensor
    step: int  # row of the plan


class Loader(ABC):
    """Executes plans of one size, the canvas, and draws nothing at random.

    A back end shows the windows; what the plan has drawn for the pixels on the canvas
    (`EpochPlan.augment`) is done here, on the device, so that it is the same for all of them.

    A new back end is one file, with a subclass that has an `_images`, and one line in
    `pipelines.back_ends.BACK_ENDS`. If it has options, it takes them as keyword arguments of its
    `__init__`, each written out: `open_loader` takes these and no others. A user sets option `x` by
    the config's field `data.x`.

    `_images` is a generator, one tensor per step of the plan:

    - Content: row b of step s shows the window `plan.window[s, b]` of sample `plan.index[s, b]` in
      its place `plan.place[s, b]` on the canvas, resized to the place's sides by the filter
      `plan.spec.filter`, and mirrored left to right, inside the place, where `plan.flip[s, b]` says
      so. The filter sees nothing outside the window (`reference.crop_resize`). What of the window
      lies outside the image is zero; so is the canvas around the place, and the whole row where the
      index is PADDING. What of the place lies outside the canvas is not shown. Decoders and filters
      may differ by a few grey levels: on average 2, and 12 on 99% of the values. In evaluation (the
      crop `center`) by one level, on 99.9% of the values: published weights are to reach what they
      reach elsewhere.
    - Filters: a back end that lacks one of them says in `filters` which it has.
    - Threads: it runs in the consumer's thread, where it only waits. Work ahead of the consumer
      happens in threads of its own (`pipelines.ahead.run_ahead`), which may call `store.read` and
      nothing of torch that depends on a current stream.
    - Buffers: the tensor belongs to the loader. It is valid until the generator is resumed, so the
      loader may then fill it again, and must not before. On a GPU, "valid" is in the order of the
      stream that is current in the consumer's thread: what the consumer queued there before it
      resumed the generator may still have to run, and must find the old content. It is written to
      as well: the augmentation changes it in place.
    - Ends: the consumer may close the generator at any `yield`, or drop it. Threads and buffers
      then go with it (`try`/`finally`, `closing`).
    - Errors: `DamagedData` that names the file and the sample for what cannot be decoded.
    """

    filters: tuple[Filter, ...] = FILTERS
    """Those that it can show; the registry says the same (`BackEnd.filters`)."""
    shows_planes = False  # whether `_images` can show samples of mode PLANES

    def __init__(self, store: Store, *, size: Size, device: torch.device | str = "cpu") -> None:
        refusal = self.refusal(store)
        if refusal:
            raise ValueError(f"{readable(store.path)}: {refusal}")
        self.store = store
        self.size = size
        self.sides = sides_of(size)  # height and width of the canvas
        # Of an empty tensor, because it has the index that "cuda" lacks.
        self.device = torch.empty(0, device=device).device

    @classmethod
    def refusal(cls, store: Store) -> str:
        """Why it cannot show these data, and what to do; nothing if it can."""
        if not cls.shows_planes and (store.modes == PLANES).any():
            return (
                "holds decoded planes, which this data.pipeline cannot show: choose another, or"
                " convert the images again without --decoded"
            )
        return ""

    def load(self, plan: EpochPlan, start_step: int = 0) -> Generator[Batch, None, None]:
        """`len(plan) - start_step` batches; the same images whatever the threads and the start.

        Raises:
            ValueError: the plan was not drawn for this store or size, or names a filter that this
                loader lacks.
            DamagedData: a sample cannot be read or decoded; the message names file and index.
        """
        if plan.spec.sides != self.sides:
            raise ValueError(
                f"plan of size {plan.spec.size}: the loader was opened for size = {self.size}"
            )
        if plan.spec.filter not in self.filters:
            raise ValueError(
                f"plan with filter = {plan.spec.filter!r}: {type(self).__name__} shows only"
                f" {', '.join(self.filters)}"
            )
        if not was_drawn_for(plan, self.store):
            raise ValueError(f"plan: it was not drawn for the images of {self.store.path}")
        return self._batches(plan, start_step)

    def close(self) -> None:  # noqa: B027
        """Nothing outlives the iterators of `load`."""

    def _batches(self, plan: EpochPlan, start_step: int) -> Generator[Batch, None, None]:
        # Leaving the loop early closes the back end's generator, and with it its threads.
        with closing(self._images(plan, start_step)) as steps:
            for step, images in enumerate(steps, start_step):
                if plan.spec.augment.changes:
                    self._augment(images, plan, step)
                yield Batch(images.permute(0, 3, 1, 2), step)

    @staticmethod
    def _augment(images: Tensor, plan: EpochPlan, step: int) -> None:
        place = None
        if plan.spec.crop == "letterbox":
            place = plan.place[step]
        augment(images, plan.spec.augment, plan.augment, step, place)

    @abstractmethod
    def _images(self, plan: EpochPlan, start_step: int) -> Generator[Tensor, None, None]:
        """Steps `start_step`, `start_step` + 1, ...: uint8 (B, *sides, 3) on the device.

        See the class for what they show, and for how long they are valid.
        """


class ThreadedLoader(Loader):
    """A loader that decodes in threads, some batches ahead of the one in use.

    Raises:
        ValueError: an option below 1.
    """

    def __init__(
        self,
        store: Store,
        *,
        size: Size,
        device: torch.device | str = "cpu",
        threads: int | None = None,  # None: all cores this process may use, a CPU quota included
        prefetch: int = 3,  # batches in the making while one is used
    ) -> None:
        super().__init__(store, size=size, device=device)
        for name, value in (("threads", threads), ("prefetch", prefetch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        self.threads = threads or usable_cores()
        self.prefetch = prefetch


def was_drawn_for(plan: EpochPlan, store: Store) -> bool:
    """Whether every sample of a plan is one of the store's, and its window one that it may have.

    A back end reads what the window says, and writes where the place says, without another look at
    the image's sides. So no window of another store's plan may reach outside an image here, and no
    place may reach outside the canvas, but in evaluation: there it has to cover it.
    """
    # Some steps at a time: of a plan for millions of images a copy is large.
    steps_at_a_time = max(1, ROWS_AT_A_TIME // max(1, plan.index.shape[1]))
    for start in range(0, len(plan), steps_at_a_time):
        steps = slice(start, start + steps_at_a_time)
        real = plan.index[steps] != PADDING
        index = plan.index[steps][real]
        window = plan.window[steps][real].astype(np.int64)
        place = plan.place[steps][real].astype(np.int64)
        if not _are_possible(index, window, place, plan.spec, store):
            return False
    return True


def _are_possible(
    index: np.ndarray,  # (n,)
    window: np.ndarray,  # (n, 4)
    place: np.ndarray,  # (n, 4)
    spec: PlanSpec,
    store: Store,
) -> bool:
    """`was_drawn_for` of rows with a sample."""
    if index.max(initial=0) >= len(store):
        return False
    canvas = np.array(spec.sides)
    image = np.stack([store.heights[index], store.widths[index]], 1)
    match spec.crop:
        case "center":
            whole = np.concatenate([np.zeros_like(image), image], 1)
            return bool((window == whole).all()) and _cover(place, canvas)
        case "letterbox":
            return _lie_inside(window, image) and _lie_inside(place, canvas)
    if (place != [0, 0, *canvas]).any():
        return False
    if spec.crop == "pad":
        # Such a window may reach outside the image, where it is zero, but it is never resized.
        return bool((window[:, 2:] == canvas).all())
    return _lie_inside(window, image)


def _cover(
    boxes: np.ndarray,  # (n, 4) top, left, height, width
    sides: np.ndarray,  # (2,) height, width
) -> bool:
    """Whether each holds all of a canvas."""
    corner = boxes[:, :2]
    extent = boxes[:, 2:]
    return bool(((corner <= 0) & (corner + extent >= sides)).all())


def _lie_inside(
    boxes: np.ndarray,  # (n, 4) top, left, height, width
    sides: np.ndarray,  # (n, 2) or (2,) height, width
) -> bool:
    """Whether each holds at least a pixel, and none that is outside."""
    corner = boxes[:, :2]
    extent = boxes[:, 2:]
    return bool(((corner >= 0) & (extent > 0) & (corner + extent <= sides)).all())
