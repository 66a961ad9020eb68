"""DALI executes an epoch plan: nvJPEG and the hardware decoder on a GPU, DALI's own decoder on a CPU.

The plan's windows go to the decoder as regions, so that no pixel outside them is transformed. Pixels: exact inverse DCT
and smooth chroma upsampling (libjpeg's defaults), EXIF orientation ignored, a triangle filter when shrinking
("antialias"), bilinear when enlarging.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from PIL import Image

from .batch import Batch, check_plan, labels_of
from .folder import FolderStore
from .plan import PADDING, EpochPlan
from .store import RAW, DamagedData, Store

READERS = 2  # threads that fetch encoded bytes, 0.05 ms per image
READ_AHEAD = 2  # batches fetched before DALI asks for them

Fields = list[list[np.ndarray] | np.ndarray]  # what one batch feeds to the graph


class DaliLoader:
    """Executes plans of `size` x `size` pixels on a `.beton` or an image folder.

    Raises:
        ValueError: an option out of range, or a store that mixes raw and JPEG samples (a graph decodes one kind).
    """

    def __init__(
        self,
        store: Store,
        *,
        size: int,
        device: torch.device | str = "cpu",
        threads: int | None = None,  # None: all cores this process may use
        prefetch: int = 3,  # batches
        hw_decoder_load: float = 0.65,  # share of the JPEGs for the GPU's hardware decoder
    ) -> None:
        for name, value, ok in (
            ("threads", threads, threads is None or threads > 0),
            ("prefetch", prefetch, prefetch > 0),
            ("hw_decoder_load", hw_decoder_load, 0 <= hw_decoder_load <= 1),
        ):
            if not ok:
                raise ValueError(f"{name} = {value}: must be {'in [0, 1]' if name[0] == 'h' else 'at least 1'}")
        raw = int((store.modes == RAW).sum())
        if 0 < raw < len(store):
            raise ValueError(
                f"{store.path}: pipeline = 'dali' takes no file that mixes raw samples ({raw}) with JPEG ones"
                f" ({len(store) - raw}): convert it again with `fap-convert SRC DST.beton` (all JPEG) or"
                " `fap-convert --raw SRC DST.beton`, or take pipeline = 'ffcv'"
            )
        self.store, self.size, self.prefetch, self.hw_decoder_load = store, size, prefetch, hw_decoder_load
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.threads = threads or len(os.sched_getaffinity(0))

    def load(self, plan: EpochPlan, start_step: int = 0) -> Iterator[Batch]:
        """`len(plan) - start_step` batches on the device's current stream; see `batch.Loader`."""
        check_plan(plan, self.store, self.size)
        return self._load(plan, start_step)

    def _load(self, plan: EpochPlan, start_step: int) -> Iterator[Batch]:
        rows = _Rows(self.store, plan, start_step)
        labels = np.stack([labels_of(plan, step, self.store) for step in range(len(plan))])
        all_labels = torch.from_numpy(labels).to(self.device)  # once, so that no step waits for a copy
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="fap-dali-read")
        pipeline = None
        try:
            pipeline = self._build(_ReadAhead(rows, pool, keep=self.prefetch + 2), rows, self.prefetch)
            for step in range(start_step, len(plan)):
                # bound to the stream that reads them: DALI orders its own work against it, and the reuse of the
                # memory once the tensor is gone
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
                try:
                    (images,) = pipeline.run(stream)
                except RuntimeError as error:
                    if not isinstance(error, DamagedData):  # those of the store name their sample
                        self._name_damaged(plan, step)
                    raise
                nhwc = torch.from_dlpack(images.as_tensor())  # (B, size, size, 3) in DALI's memory
                yield Batch(nhwc.permute(0, 3, 1, 2), all_labels[step], step)
        finally:
            pool.shutdown(cancel_futures=True)
            del pipeline  # joins DALI's threads and frees its buffers

    def close(self) -> None:
        """Nothing outlives the iterators of `load`."""

    def _build(self, source: _Rows | _ReadAhead, rows: _Rows, prefetch: int) -> Pipeline:
        """The graph: encoded bytes -> region -> zeros outside the image -> resize and flip; uint8 NHWC."""
        gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=rows.plan.index.shape[1],
            num_threads=self.threads,
            device_id=self.device.index if gpu else None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,  # outputs stay ours for as long as a tensor holds them
        )
        numbers = 5 if rows.outside else 3
        with pipeline:
            data, out, start, shape, *beyond = fn.external_source(
                source=source,
                num_outputs=1 + numbers,
                no_copy=True,
                dtype=[DALIDataType.UINT8, DALIDataType.FLOAT] + [DALIDataType.INT32] * (numbers - 1),
                ndim=[3 if rows.raw else 1] + [1] * numbers,
                layout=["HWC" if rows.raw else ""] + [""] * numbers,
            )
            if rows.raw:
                images = _slice(data, start, shape)
            else:
                images = fn.decoders.image_slice(
                    data,
                    start=start,
                    shape=shape,
                    axis_names="HW",
                    device="mixed" if gpu else "cpu",
                    hw_decoder_load=self.hw_decoder_load,
                    output_type=DALIImageType.RGB,
                    adjust_orientation=False,
                    jpeg_fancy_upsampling=True,
                    use_fast_idct=False,
                )
            if beyond:
                images = _slice(images, *beyond)
            if rows.raw and gpu:
                images = images.gpu()
            resized = fn.resize(images, size=out, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(resized)
        pipeline.build()
        return pipeline

    def _name_damaged(self, plan: EpochPlan, step: int) -> None:
        """Decode the rows of a failed step one by one; return if all of them decode: then no sample is to blame."""
        index, window, flip = (a[step][:, None] for a in (plan.index, plan.window, plan.flip))
        rows = _Rows(self.store, replace(plan, index=index, window=window, flip=flip), 0)  # B steps of one row
        pipeline = self._build(rows, rows, prefetch=1)
        for index in plan.index[step].tolist():
            try:
                pipeline.run()
            except RuntimeError as cause:
                file = self.store.file(index) if isinstance(self.store, FolderStore) else self.store.path
                raise DamagedData(f"{file}: sample {index}: DALI cannot decode it") from cause


def _slice(images, start, shape):  # type: ignore[no-untyped-def]  # three DataNodes, which DALI does not type
    return fn.slice(images, start=start, shape=shape, axis_names="HW", out_of_bounds_policy="pad", fill_values=0)


class _Rows:
    """Source of `fn.external_source`: batch i as a function of i alone, so that any step may come first."""

    def __init__(self, store: Store, plan: EpochPlan, first: int) -> None:
        self.store, self.plan, self.first = store, plan, first  # first: the step of batch 0
        self.raw = bool(store.modes[0] == RAW)
        # of a JPEG only what lies inside the image can be decoded; zeros around it take a second slice
        self.outside = plan.spec.crop == "pad" and not self.raw
        black = io.BytesIO()
        Image.new("RGB", (1, 1)).save(black, "JPEG")
        self.padding = np.zeros((1, 1, 3), np.uint8) if self.raw else np.frombuffer(black.getvalue(), np.uint8)

    def __len__(self) -> int:
        return len(self.plan) - self.first

    def __call__(self, i: int) -> Fields:
        """Rows, output sides (a negative width flips), start and shape of the slice (and of the second slice)."""
        if i >= len(self):
            raise StopIteration
        step = self.first + i
        index, window = self.plan.index[step], self.plan.window[step].astype(np.int32)
        empty = index == PADDING
        window[empty] = 0, 0, 1, 1  # all of the black image
        corner, shape = np.ascontiguousarray(window[:, :2]), np.ascontiguousarray(window[:, 2:])
        out = np.full((len(index), 2), self.plan.spec.size, np.float32)
        out[self.plan.flip[step], 1] *= -1
        data = [self._read(k) for k in index.tolist()]
        if not self.outside:
            return [data, out, corner, shape]
        some = np.where(empty, 0, index)
        sides = np.stack([self.store.heights[some], self.store.widths[some]], 1)
        start = corner.clip(0, sides - 1)
        end = np.minimum(corner + shape, sides).clip(start + 1)
        return [data, out, start, end - start, corner - start, shape]

    def _read(self, index: int) -> np.ndarray:
        if index == PADDING:
            return self.padding
        data = self.store.read(index)
        return data.reshape(self.store.heights[index], self.store.widths[index], 3) if self.raw else data


class _ReadAhead:
    """The same source, its batches fetched on threads before DALI asks for them."""

    def __init__(self, rows: _Rows, pool: ThreadPoolExecutor, keep: int) -> None:
        self.rows, self.pool = rows, pool
        self.pending: dict[int, Future[Fields]] = {}
        self.alive: deque[Fields] = deque(maxlen=keep)  # no_copy: DALI reads the bytes where they lie

    def __call__(self, i: int) -> Fields:
        if i >= len(self.rows):
            raise StopIteration
        for ahead in range(i, min(i + READ_AHEAD + 1, len(self.rows))):
            if ahead not in self.pending:
                self.pending[ahead] = self.pool.submit(self.rows, ahead)
        self.alive.append(self.pending.pop(i).result())
        return self.alive[-1]
