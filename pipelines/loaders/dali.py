"""DALI executes an epoch plan: nvJPEG and the hardware decoder on a GPU, DALI's own decoder on a
CPU.

The plan's windows go to the decoder as regions, so that no pixel outside them is transformed.
Pixels: exact inverse DCT and smooth chroma upsampling (libjpeg's defaults), EXIF orientation
ignored, a triangle filter when shrinking ("antialias"), bilinear when enlarging.
"""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIInterpType

from pipelines.ahead import run_ahead
from pipelines.loaders.base import Loader
from pipelines.plan import PADDING, EpochPlan
from pipelines.store import RAW, DamagedData, Store

# threads that fetch encoded bytes, 0.05 ms per image, and batches fetched before DALI asks for them
READERS = 2
LIKE_LIBJPEG = {"adjust_orientation": False, "jpeg_fancy_upsampling": True, "use_fast_idct": False}

Fields = list[list[np.ndarray] | np.ndarray]  # what one batch feeds to the graph


class DaliLoader(Loader):
    """See `Loader`; on a `.beton` or an image folder.

    Raises:
        ValueError: a store that mixes raw and JPEG samples (a graph decodes one kind).
    """

    def __init__(self, store: Store, **options: Any) -> None:
        super().__init__(store, **options)
        raw = int((store.modes == RAW).sum())
        if 0 < raw < len(store):
            mixed = (
                f"pipeline = 'dali' takes no file that mixes raw samples ({raw}) with JPEG ones"
                f" ({len(store) - raw})"
            )
            ways = (
                "`fap-convert SRC DST.beton` (all JPEG) or `fap-convert --raw SRC DST.beton`, or"
                " take pipeline = 'ffcv'"
            )
            raise ValueError(f"{store.path}: {mixed}: convert it again with {ways}")
        self.raw, black = raw > 0, np.zeros((1, 1, 3), np.uint8)
        self.black = black if self.raw else cv2.imencode(".jpg", black)[1].ravel()

    def _images(self, plan: EpochPlan, start_step: int) -> Generator[torch.Tensor, None, None]:
        alive: deque[Fields] = deque(
            maxlen=self.prefetch + 2
        )  # no_copy: DALI reads the bytes where they lie
        calls = (partial(self._fields, plan, step) for step in range(start_step, len(plan)))
        with closing(run_ahead(calls, READERS, READERS + 1)) as read:

            def source() -> Fields:
                alive.append(next(read))
                return alive[-1]

            pipeline = self._build(plan, source)
            for step in range(start_step, len(plan)):
                try:
                    (images,) = self._run(pipeline)
                except DamagedData:  # the store's errors name their sample
                    raise
                except RuntimeError as error:
                    index, window, flip = (
                        a[step][:, None] for a in (plan.index, plan.window, plan.flip)
                    )
                    if len(index) == 1:
                        i = index.item()
                        raise DamagedData(
                            f"{self.store.file(i)}: sample {i}: DALI cannot decode it"
                        ) from error
                    # row by row; if all of them decode no sample is to blame
                    deque(
                        self._images(replace(plan, index=index, window=window, flip=flip), 0),
                        maxlen=0,
                    )
                    raise
                yield torch.from_dlpack(images.as_tensor())  # in DALI's memory

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
        """The graph: encoded bytes -> region -> zeros outside the image -> resize and flip; uint8
        NHWC.
        """
        gpu, rows, gpu_id = self.device.type == "cuda", plan.index.shape[1], self.device.index
        # exec_dynamic: outputs stay ours for as long as a tensor holds them
        pipeline = Pipeline(
            rows, self.threads, gpu_id, prefetch_queue_depth=self.prefetch, exec_dynamic=True
        )
        layout = ["HWC" if self.raw else ""] + [""] * (5 if self._reaches_outside(plan) else 3)
        crop = partial(fn.slice, axis_names="HW", out_of_bounds_policy="pad", fill_values=0)
        options = LIKE_LIBJPEG | {
            "device": "mixed" if gpu else "cpu",
            "hw_decoder_load": self.hw_decoder_load,
        }
        decode = partial(fn.decoders.image_slice, axis_names="HW", **options)
        with pipeline:
            fields = fn.external_source(
                source=source, num_outputs=len(layout), layout=layout, no_copy=True
            )
            images, out, start, shape, *beyond = fields
            images = (crop if self.raw else decode)(images, start=start, shape=shape)
            if beyond:
                images = crop(images, start=beyond[0], shape=beyond[1])
            if self.raw and gpu:
                images = images.gpu()
            pipeline.set_outputs(
                fn.resize(
                    images, size=out, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
                )
            )
        pipeline.build()
        return pipeline

    def _reaches_outside(self, plan: EpochPlan) -> bool:
        """Of a JPEG only what lies inside the image can be decoded; zeros around it take a second
        slice.
        """
        return plan.spec.crop == "pad" and not self.raw

    def _fields(self, plan: EpochPlan, step: int) -> Fields:
        """Rows, output sides (a negative width flips), start and shape of the slice (and of the
        second slice).
        """
        index, window = plan.index[step], plan.window[step].astype(np.int32)
        real = index != PADDING
        window[~real] = 0, 0, 1, 1  # all of the black image
        corner, shape = window[:, :2].copy(), window[:, 2:].copy()
        out = np.full((len(index), 2), self.size, np.float32)
        out[plan.flip[step], 1] *= -1
        sides = np.ones_like(corner)
        sides[real] = np.stack([self.store.heights[index[real]], self.store.widths[index[real]]], 1)
        data = [self.black if i == PADDING else self.store.read(i) for i in index.tolist()]
        if self.raw:
            data = [
                pixels.reshape(*side, 3) for pixels, side in zip(data, sides.tolist(), strict=True)
            ]
        if not self._reaches_outside(plan):
            return [data, out, corner, shape]
        start = corner.clip(0, sides - 1)
        return [
            data,
            out,
            start,
            np.minimum(corner + shape, sides).clip(start + 1) - start,
            corner - start,
            shape,
        ]
