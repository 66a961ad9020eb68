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

from pipelines.ahead import run_ahead
from pipelines.loaders.area import area_resize
from pipelines.loaders.base import ThreadedLoader
from pipelines.plan import PADDING, EpochPlan
from pipelines.store import JPG, DamagedData

# At most: enough that starting a task costs little beside it.
ROWS_PER_TASK = 8

_this_thread = threading.local()  # `scratch`, where a thread decodes; it grows to the largest image


class CpuLoader(ThreadedLoader):
    """See `Loader`. A subclass brings the decoder of JPEGs, `_decode_jpeg`.

    The images of a step are decoded into a slot, a buffer of its own. There are `prefetch` + 1 of
    them, used in turn: one belongs to the consumer, the others to the threads that fill them.
    """

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
                    self._show(index, window, place, flip, canvas)

        return fill

    def _show(
        self, index: int, window: list[int], place: list[int], flip: bool, canvas: np.ndarray
    ) -> None:
        """Fill a canvas with a window of a sample in its place, and zeros around it."""
        top, left, height, width = window
        # Where the window is at least twice as large as its place, the decoder halves the image,
        # for less work than decoding it whole. The box filter does the rest.
        divisor = 1
        twice_as_large = height >= 2 * place[2] and width >= 2 * place[3]
        if twice_as_large and self.store.modes[index] == JPG:
            divisor = 2
        image = self._decoded(index, divisor)
        scaled = (top / divisor, left / divisor, height / divisor, width / divisor)
        area_resize(image, scaled, flip, canvas, tuple(place))

    def _decoded(self, index: int, divisor: int) -> np.ndarray:
        """One sample, uint8 (ceil(H / divisor), ceil(W / divisor), 3).

        A JPEG lies in this thread's scratch memory: it is valid until the thread decodes its next.
        """
        encoded = self.store.read(index)
        height = int(self.store.heights[index])
        width = int(self.store.widths[index])
        if self.store.modes[index] != JPG:
            return encoded.reshape(height, width, 3)

        shape = (_ceil_div(height, divisor), _ceil_div(width, divisor), 3)
        n_bytes = shape[0] * shape[1] * shape[2]
        scratch = getattr(_this_thread, "scratch", None)
        if scratch is None or scratch.size < n_bytes:
            scratch = np.empty(n_bytes, np.uint8)
            _this_thread.scratch = scratch

        image = scratch[:n_bytes].reshape(shape)
        if not self._decode_jpeg(encoded, (height, width), divisor, image):
            raise DamagedData(f"{self.store.name_of(index)}: the JPEG does not decode cleanly")
        return image

    @abstractmethod
    def _decode_jpeg(
        self,
        encoded: np.ndarray,  # uint8 (n,)
        sides: tuple[int, int],  # height and width, as the JPEG's header says
        divisor: int,  # 1, or 2: at half the sides
        image: np.ndarray,  # uint8 (ceil(height / divisor), ceil(width / divisor), 3): to fill
    ) -> bool:
        """Decode a JPEG; False for any error or warning of the decoder. Called in many threads."""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
