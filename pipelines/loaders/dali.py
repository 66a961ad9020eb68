"""DALI executes an epoch plan: nvJPEG and the hardware decoder on a GPU, its own decoder on a CPU.

The plan's windows go to the decoder as regions, so that no pixel outside them is transformed.
Pixels: exact inverse DCT and smooth chroma upsampling (libjpeg's defaults), EXIF orientation
ignored, a triangle filter when shrinking ("antialias"), bilinear when enlarging.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIInterpType
from torch import Tensor

from pipelines.ahead import run_ahead
from pipelines.loaders.base import ThreadedLoader
from pipelines.plan import PADDING, EpochPlan
from pipelines.sizes import Size
from pipelines.store import RAW, DamagedData, Store

READERS = 2  # threads that fetch encoded bytes, 0.05 ms per image
READ_AHEAD = READERS + 1  # batches of bytes fetched before DALI asks for them
# Of these DALI holds the bytes too: the batch that it decodes, and the one that it asks for.
BESIDE_THE_QUEUE = 2

Fields = list[list[np.ndarray] | np.ndarray]  # what one batch feeds to the graph


class DaliLoader(ThreadedLoader):
    """See `Loader`; on a `.beton` or an image folder.

    Raises:
        ValueError: an option out of range, or a store that mixes raw and JPEG samples (a graph
            decodes one or the other).
    """

    def __init__(
        self,
        store: Store,
        *,
        size: Size,
        device: torch.device | str = "cpu",
        threads: int | None = None,  # None: all cores this process may use, a CPU quota included
        prefetch: int = 3,  # batches in the making while one is used
        hw_decoder_load: float = 0.65,  # share of the JPEGs for the GPU's hardware decoder
    ) -> None:
        super().__init__(store, size=size, device=device, threads=threads, prefetch=prefetch)
        if not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load = {hw_decoder_load}: must be in [0, 1]")
        self.hw_decoder_load = hw_decoder_load
        n_raw = int((store.modes == RAW).sum())
        if 0 < n_raw < len(store):
            raise ValueError(
                f"{store.path}: pipeline = 'dali' takes no file that mixes raw samples ({n_raw}) "
                f"with JPEG ones ({len(store) - n_raw}): convert it again with "
                "`fap-convert SRC DST.beton` (all JPEG) or `fap-convert --raw SRC DST.beton`, "
                "or take pipeline = 'ffcv'"
            )
        self.raw = n_raw > 0
        # What is fed for a PADDING row, which has no sample.
        self.black: np.ndarray = np.zeros((1, 1, 3), np.uint8)
        if not self.raw:
            self.black = cv2.imencode(".jpg", self.black)[1].ravel()

    def _images(self, plan: EpochPlan, start_step: int) -> Generator[Tensor, None, None]:
        with closing(self._decoded(plan, start_step)) as decoded:
            for step in range(start_step, len(plan)):
                try:
                    images = next(decoded)
                except DamagedData:  # the store's errors name their sample
                    raise
                except RuntimeError as error:
                    self._blame_a_sample(plan, step, error)
                    raise
                yield images

    def _decoded(self, plan: EpochPlan, start_step: int) -> Generator[Tensor, None, None]:
        """As `_images`, but a sample that does not decode is a RuntimeError that names none."""
        # The graph is told not to copy what it is fed (`no_copy`): DALI reads the bytes where they
        # lie, so they have to live until it is done with their batch.
        in_use: deque[Fields] = deque(maxlen=self.prefetch + BESIDE_THE_QUEUE)

        def readings() -> Iterator[Callable[[], Fields]]:
            for step in range(start_step, len(plan)):
                yield self._reading(plan, step)

        with closing(run_ahead(readings(), READERS, READ_AHEAD)) as read:

            def source() -> Fields:
                fields = next(read)  # its StopIteration tells DALI that the data end
                in_use.append(fields)
                return fields

            pipeline = self._build(plan, source)
            for _ in range(start_step, len(plan)):
                (images,) = self._run(pipeline)
                # Without a copy: the tensor is DALI's memory, and holds it as long as it lives.
                yield torch.from_dlpack(images.as_tensor())

    def _blame_a_sample(self, plan: EpochPlan, step: int, error: RuntimeError) -> None:
        """Decode the rows of a step again, one at a time; DamagedData for the first that fails.

        If all of them decode, no sample is to blame.
        """
        one_by_one = replace(
            plan,
            index=plan.index[step][:, None],
            window=plan.window[step][:, None],
            place=plan.place[step][:, None],
            flip=plan.flip[step][:, None],
        )
        with closing(self._decoded(one_by_one, 0)) as decoded:
            for (index,) in one_by_one.index.tolist():
                try:
                    next(decoded)
                except DamagedData:
                    raise
                except RuntimeError:
                    raise DamagedData(
                        f"{self.store.name_of(index)}: DALI cannot decode it"
                    ) from error

    def _run(self, pipeline: Pipeline) -> Any:
        """The next outputs. On a GPU they belong to the stream that reads them, torch's current.

        DALI then orders its own work before that stream's, and the reuse of the memory, once the
        tensor is gone, behind it.
        """
        # Training runs on the default stream, whose handle is 0. DALI 2.4 takes that for the legacy
        # default stream and not for "no stream": `types._raw_cuda_stream_ptr` makes a `c_void_p(0)`
        # of it, the binding asks only if that is None, its CUDA calls are not built for streams
        # per thread, and torch asks `__dlpack__` for stream 1, another name of the same. But a 0
        # does not say of which device: DALI takes the current one.
        if self.device.type != "cuda":
            return pipeline.run(None)
        with torch.cuda.device(self.device):
            return pipeline.run(torch.cuda.current_stream())

    def _build(self, plan: EpochPlan, source: Callable[[], Fields]) -> Pipeline:
        """The graph: encoded bytes -> region -> zeros outside the image -> resize and flip -> zeros
        outside the place.

        Its output is uint8 (B, *sides, 3); its inputs are the fields of `_read`.
        """
        # exec_dynamic: outputs stay ours for as long as a tensor holds them.
        pipeline = Pipeline(
            plan.index.shape[1],
            self.threads,
            self.device.index,
            prefetch_queue_depth=self.prefetch,
            exec_dynamic=True,
        )
        layout = ["", "", "", ""]  # images, sides, start, shape
        if self.raw:
            layout[0] = "HWC"
        if self._slices_twice(plan):
            layout += ["", ""]  # start and shape of the second slice
        if _has_places(plan):
            layout += [""]  # start of the slice that is the canvas
        with pipeline:
            images, sides, start, shape, *more = fn.external_source(
                source=source, num_outputs=len(layout), layout=layout, no_copy=True
            )
            if self.raw:
                images = _slice(images, start, shape)
            else:
                images = self._decode(images, start, shape)
            if self._slices_twice(plan):
                images = _slice(images, *more)
            if self.raw and self.device.type == "cuda":
                images = images.gpu()
            images = _resize(images, sides)
            if _has_places(plan):
                (canvas_start,) = more
                images = _slice(images, canvas_start, self.sides)
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _decode(self, encoded: DataNode, start: DataNode, shape: DataNode) -> Any:
        """The node that decodes regions, with the pixels of libjpeg's defaults."""
        return fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axis_names="HW",
            device="mixed" if self.device.type == "cuda" else "cpu",
            hw_decoder_load=self.hw_decoder_load,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            use_fast_idct=False,
        )

    def _slices_twice(self, plan: EpochPlan) -> bool:
        """Whether windows may reach outside an image that the decoder cuts them from.

        Of a JPEG only what lies inside the image can be decoded; the zeros around it take a second
        slice. Raw pixels are cut with their zeros at once.
        """
        return plan.spec.crop == "pad" and not self.raw

    def _reading(self, plan: EpochPlan, step: int) -> Callable[[], Fields]:
        """A call that reads the fields of a step."""

        def read() -> Fields:
            return self._read(plan, step)

        return read

    def _read(self, plan: EpochPlan, step: int) -> Fields:
        """Per row: bytes, sides of its place, start and shape of the slice.

        Then start and shape of the second slice, or where the canvas begins as seen from the place.
        A negative width flips.
        """
        index = plan.index[step]
        window = plan.window[step].astype(np.int32)
        real = index != PADDING
        window[~real] = 0, 0, 1, 1  # all of the black image
        place = plan.place[step].astype(np.int32, order="C")
        place[~real] = 0, 0, *self.sides  # black, as everything is around a place
        corner = window[:, :2].copy()
        shape = window[:, 2:].copy()
        sides = place[:, 2:].astype(np.float32)
        sides[plan.flip[step], 1] *= -1

        stored = np.ones_like(corner)  # (B, 2) sides of the image; those of the black one are 1
        stored[real, 0] = self.store.heights[index[real]]
        stored[real, 1] = self.store.widths[index[real]]
        encoded = iter(self.store.read_many(index[real].tolist()))
        data = [next(encoded) if is_real else self.black for is_real in real.tolist()]
        if self.raw:
            data = [
                pixels.reshape(height, width, 3)
                for pixels, (height, width) in zip(data, stored.tolist(), strict=True)
            ]
        if _has_places(plan):
            return [data, sides, corner, shape, -place[:, :2]]
        if not self._slices_twice(plan):
            return [data, sides, corner, shape]

        # What of the window lies inside the image: at least a pixel, even where nothing does. From
        # its first pixel the second slice counts.
        start = corner.clip(0, stored - 1)
        end = np.minimum(corner + shape, stored).clip(start + 1)
        return [data, sides, start, end - start, corner - start, shape]


def _has_places(plan: EpochPlan) -> bool:
    """Whether rows show less than the whole canvas."""
    return plan.spec.crop == "letterbox"


def _resize(images: DataNode, sides: DataNode) -> Any:
    """The node that resizes to sides of each sample's own; a negative width flips."""
    linear = DALIInterpType.INTERP_LINEAR
    return fn.resize(images, size=sides, interp_type=linear, antialias=True)


def _slice(images: DataNode, start: DataNode, shape: DataNode | tuple[int, int]) -> Any:
    """The node that cuts regions from pixels; zeros outside the image."""
    return fn.slice(
        images, start=start, shape=shape, axis_names="HW", out_of_bounds_policy="pad", fill_values=0
    )
