"""What the loaders that decode on CPU cores share: many threads, each of which shows whole rows.

A thread reads, decodes and resizes row by row: the decoded image stays in its cache, and only the
window is resized.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from pipelines import turbojpeg
from pipelines.ahead import run_ahead
from pipelines.back_ends import Filter
from pipelines.loaders.antialiased import antialiased_resize
from pipelines.loaders.area import area_resize
from pipelines.loaders.base import ThreadedLoader
from pipelines.loaders.colours import planes_as_rgb
from pipelines.plan import PADDING, EpochPlan
from pipelines.planes import split_planes
from pipelines.store import JPG, PLANES, RAW, DamagedData

# At most: enough that starting a task costs little beside it.
ROWS_PER_TASK = 8
# Largest first. What libjpeg-turbo has vector instructions for; by 8 it would show its DC alone.
DIVISORS = (4, 2)

_this_thread = threading.local()  # `scratch`, where a thread decodes; it grows to the largest image


class CpuLoader(ThreadedLoader):
    """See `Loader`. A subclass brings the decoder of JPEGs for the filter `area`, `_decode_jpeg`.

    For the other filters JPEGs are decoded as Pillow does it, since these are Pillow's too: then
    the pixels are the same. Planes have the colours that Pillow shows, whatever the filter.

    The images of a step are decoded into a slot, a buffer of its own. There are `prefetch` + 1 of
    them, used in turn: one belongs to the consumer, the others to the threads that fill them.
    """

    shows_planes = True
    stops_early = False  # whether `_decode_jpeg` can decode the uppermost rows alone

    def _images(self, plan: EpochPlan, start_step: int) -> Generator[Tensor, None, None]:
        on_gpu = self.device.type == "cuda"
        n_rows = plan.index.shape[1]
        steps = range(start_step, len(plan))
        # Small batches are divided more finely, or there would be fewer tasks than threads.
        n_each = min(ROWS_PER_TASK, max(1, n_rows * self.prefetch // self.threads))
        parts = [slice(row, row + n_each) for row in range(0, n_rows, n_each)]

        # Pinned, so that the GPU copies from them by itself.
        slots = torch.empty(
            (self.prefetch + 1, n_rows, *self.sides, 3), dtype=torch.uint8, pin_memory=on_gpu
        )
        # Copies to the GPU go beside the work that the consumer has queued there, not behind it.
        copies = None
        if on_gpu:
            copies = torch.cuda.Stream(self.device)

        def fillings() -> Iterator[Callable[[], None]]:
            for step in steps:
                slot = slots[step % len(slots)].numpy()
                for part in parts:
                    yield self._filling(plan, step, part, slot[part])

        # `prefetch` steps of tasks are ahead of the consumer, and no more: a task of step s, which
        # writes into the slot of step s - prefetch - 1, is only started when the consumer has asked
        # for the step after that one.
        n_ahead = self.prefetch * len(parts)
        with closing(run_ahead(fillings(), self.threads, n_ahead)) as filled:
            for step in steps:
                for _ in parts:
                    next(filled)
                # On a CPU nothing is copied: the consumer reads the slot itself. To a GPU the host
                # waits for the copy, so the slot is free before anyone asks for the next step.
                with torch.cuda.stream(copies):
                    images = slots[step % len(slots)].to(self.device)
                if on_gpu:
                    # Its memory was allocated on the copies' stream, but the consumer's reads it:
                    # once the tensor is gone it must not be given away before they are done.
                    images.record_stream(torch.cuda.current_stream(self.device))
                yield images

    def _filling(
        self,
        plan: EpochPlan,
        step: int,
        part: slice,
        target: np.ndarray,  # uint8 (rows of the part, *sides, 3)
    ) -> Callable[[], None]:
        """A task: decode some rows of a step into `target`."""

        def fill() -> None:
            # As Python numbers: each is read once, and numpy's own take longer to make.
            indices = plan.index[step, part].tolist()
            windows = plan.window[step, part].tolist()
            places = plan.place[step, part].tolist()
            flips = plan.flip[step, part].tolist()
            rows = zip(indices, windows, places, flips, target, strict=True)
            for index, window, place, flip, canvas in rows:
                if index == PADDING:
                    canvas.fill(0)
                else:
                    self._show(index, window, place, flip, canvas, plan.spec.filter)

        return fill

    def _show(
        self,
        index: int,
        window: list[int],
        place: list[int],
        flip: bool,
        canvas: np.ndarray,
        filter_: Filter,
    ) -> None:
        """Fill a canvas with a window of a sample in its place, and zeros around it."""
        top, left, height, width = window
        corner = (top, left)  # of the window, in the pixels at hand
        divisor = 1
        mode = self.store.modes[index]
        if mode == PLANES:
            image, corner = self._of_planes(index, window)
        else:
            if mode == JPG:
                divisor = _divisor(window, place, filter_)
            image = self._decoded(index, divisor, top + height, exact=filter_ != "area")
        if filter_ == "area":
            scaled = [side / divisor for side in (*corner, height, width)]
            area_resize(image, tuple(scaled), flip, canvas, tuple(place))
        else:
            shown = (*corner, height, width)
            cubic = filter_ == "bicubic"
            antialiased_resize(image, shown, flip, canvas, tuple(place), cubic)

    def _sides(self, index: int) -> tuple[int, int]:
        """Height and width of a sample."""
        return int(self.store.heights[index]), int(self.store.widths[index])

    def _decoded(
        self,
        index: int,
        divisor: int,
        bottom: int,  # rows of the image that matter
        *,
        exact: bool,  # as Pillow shows it
    ) -> np.ndarray:
        """One sample, uint8 (ceil(H / divisor), ceil(W / divisor), 3), or the rows that matter.

        A JPEG lies in this thread's scratch memory: it is valid until the thread asks for the next.
        """
        encoded = self.store.read(index)
        height, width = self._sides(index)
        if self.store.modes[index] == RAW:
            return encoded.reshape(height, width, 3)
        rows = height
        if (exact or self.stops_early) and self.store.is_proven(index):
            needed = max(bottom, 1) + turbojpeg.CONTEXT_ROWS
            rows = min(height, _ceil_div(needed, divisor) * divisor)
        image = _scratch(_ceil_div(rows, divisor), _ceil_div(width, divisor))
        try:
            if exact and rows < height:
                turbojpeg.decode_top(encoded, image)
            elif exact:
                turbojpeg.decode(encoded, image)
            else:
                self._decode_jpeg(encoded, (height, width), divisor, image)
        except ValueError as error:
            raise DamagedData(
                f"{self.store.name_of(index)}: the JPEG does not decode cleanly: {error}"
            ) from error
        return image

    def _of_planes(self, index: int, window: list[int]) -> tuple[np.ndarray, tuple[int, int]]:
        """What of a window lies inside an image of planes, and where in that the window begins.

        Scratch memory, as in `_decoded`.
        """
        sample = self.store.read(index)
        height, width = self._sides(index)
        # At least a pixel, even where nothing lies inside.
        top = min(max(window[0], 0), height - 1)
        left = min(max(window[1], 0), width - 1)
        bottom = min(max(window[0] + window[2], top + 1), height)
        right = min(max(window[1] + window[3], left + 1), width)
        image = _scratch(bottom - top, right - left)
        planes_as_rgb(*split_planes(sample, height, width), top, left, image)
        return image, (window[0] - top, window[1] - left)

    @abstractmethod
    def _decode_jpeg(
        self,
        encoded: np.ndarray,  # uint8 (n,)
        sides: tuple[int, int],  # height and width, as the JPEG's header says
        divisor: int,  # of the sides: one of DIVISORS, or 1
        image: np.ndarray,  # uint8 (ceil(height / divisor), ceil(width / divisor), 3): to fill
    ) -> None:
        """Decode a JPEG, or with `stops_early` as many rows as `image` has. Called in many threads.

        Raises ValueError for any error or warning of the decoder.
        """


def _divisor(window: list[int], place: list[int], filter_: Filter) -> int:
    """How many times smaller the decoder makes a JPEG's sides: one of DIVISORS, or 1.

    Where the window is at least so many times as large as its place: it is less work than decoding
    all. The box filter does the rest.
    """
    for divisor in DIVISORS:
        enough = window[2] >= divisor * place[2] and window[3] >= divisor * place[3]
        if filter_ == "area" and enough:
            return divisor
    return 1


def _scratch(height: int, width: int) -> np.ndarray:
    """Memory of this thread for an image, uint8 (height, width, 3): the same at each call."""
    n_bytes = height * width * 3
    scratch = getattr(_this_thread, "scratch", None)
    if scratch is None or scratch.size < n_bytes:
        scratch = np.empty(n_bytes, np.uint8)
        _this_thread.scratch = scratch
    return scratch[:n_bytes].reshape(height, width, 3)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
