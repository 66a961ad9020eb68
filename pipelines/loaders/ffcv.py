"""Execute an epoch plan on CPU cores: FFCV's C++ JPEG decoder, our own area resize, a pool of
threads.

A thread reads, decodes and resizes row by row: the decoded image stays in its cache, and only the
window is resized.
"""

import importlib.util
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from ctypes import CDLL, c_bool, c_uint32, c_uint64, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit, types

from pipelines.ahead import run_ahead
from pipelines.loaders.base import Loader
from pipelines.plan import PADDING, EpochPlan
from pipelines.store import JPG, DamagedData

ROWS_PER_TASK = 8


def _load_decoder() -> Any:
    """libffcv's `imdecode`: 0, or -1 on any error or warning of TurboJPEG.

    Loaded without `import ffcv`, which takes seconds and sets torch's threads to 1.
    """
    spec = importlib.util.find_spec("ffcv")
    library = (
        next(Path(spec.origin).parent.glob("_libffcv*.so"), None) if spec and spec.origin else None
    )
    if library is None:
        raise ImportError("no module named 'ffcv' with its native library")
    function = CDLL(str(library)).imdecode
    # source, bytes, height, width; target, crop height, width, x, y, scale numerator, denominator,
    # crop?, flip?
    function.argtypes = [
        c_void_p,
        c_uint64,
        c_uint32,
        c_uint32,
        c_void_p,
        *[c_uint32] * 6,
        c_bool,
        c_bool,
    ]
    return function


_imdecode, _this_thread = _load_decoder(), threading.local()


def _compiled(signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit` whose machine code is kept beside this file or in the user's cache: compiled
    once, not once per run.

    Where it cannot be kept, or what was kept is damaged, it is compiled for this process alone.
    Numba's errors for that are of many types: no folder to write (RuntimeError), a full disk
    (OSError), half a pickle.
    """

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, nogil=True, fastmath=True, cache=True)(function)
        except Exception:
            return njit(signature, nogil=True, fastmath=True)(
                function
            )  # raises again what the cache did not cause

    return compile_


@njit(nogil=True, fastmath=True)
def _taps(start, extent, limit, n_out, flip):  # type: ignore[no-untyped-def]
    """Box filter over [start, start + extent): first source pixel (n_out,) and weights (taps,
    n_out), 0 outside the image.
    """
    step, place = extent / n_out, np.arange(n_out)
    low = start + step * (n_out - 1 - place if flip else place)
    first = np.floor(low).astype(np.int64)
    pixel = first + np.arange(int(np.ceil(step)) + 1).reshape(-1, 1)
    share = np.minimum(low + step, pixel + 1.0) - np.maximum(low, pixel.astype(np.float64))
    share = np.maximum(share, 0.0) * (pixel >= 0) * (pixel < limit)
    return first, (share / step).astype(np.float32)


@_compiled(
    types.void(
        types.Array(types.uint8, 3, "C", readonly=True),
        *[types.float64] * 4,
        types.boolean,
        types.uint8[:, :, ::1],
    )
)
def _area(source, top, left, height, width, flip, out):  # type: ignore[no-untyped-def]
    """Each pixel of out (O, O, 3) is the mean of the box of source (H, W, 3) that it covers,
    rounded; zeros lie around it.
    """
    stride, n = 3 * source.shape[1], 3 * out.shape[1]
    ys, wy = _taps(top, height, source.shape[0], out.shape[0], False)
    xs, wx_pixel = _taps(left, width, source.shape[1], out.shape[1], flip)
    begin, end = 3 * min(xs[0], xs[-1]), 3 * (max(xs[0], xs[-1]) + len(wx_pixel))
    # one entry per channel value: the inner loops then run over contiguous memory and vectorise
    at = (3 * xs.reshape(-1, 1) + np.arange(3) - begin).ravel().astype(np.uint32)
    wx = (wx_pixel.reshape(-1, len(xs), 1) * np.ones(3, np.float32)).reshape(-1, n)
    low, high = max(begin, 0), min(end, stride)
    line, values = np.zeros(end - begin, np.float32), np.empty(n, np.float32)
    inside = line[low - begin : high - begin]  # the rest stays zero
    rows, result = source.reshape(-1, stride), out.reshape(-1, n)
    for y in range(out.shape[0]):
        inside[:] = 0
        for k in range(len(wy)):
            w = wy[k, y]
            if w > 0:
                row = rows[ys[y] + k, low:high]
                for i in range(high - low):
                    inside[i] += w * np.float32(row[i])
        for j in range(n):
            values[j] = np.float32(0.5) + wx[0, j] * line[at[j]]
        for k in range(1, len(wx)):
            shift = np.uint32(3 * k)
            for j in range(n):
                values[j] += wx[k, j] * line[at[j] + shift]
        for j in range(n):
            result[y, j] = np.uint8(np.int32(values[j]))


class FfcvLoader(Loader):
    """See `Loader`."""

    def _images(self, plan: EpochPlan, start_step: int) -> Generator[torch.Tensor, None, None]:
        rows, steps, cuda = (
            plan.index.shape[1],
            range(start_step, len(plan)),
            self.device.type == "cuda",
        )
        # one slot is in use, `prefetch` are being filled
        slots = torch.empty(
            (self.prefetch + 1, rows, self.size, self.size, 3), dtype=torch.uint8, pin_memory=cuda
        )
        out, side = slots.numpy(), torch.cuda.Stream(self.device) if cuda else None
        parts = [slice(i, i + ROWS_PER_TASK) for i in range(0, rows, ROWS_PER_TASK)]
        calls = (
            partial(self._rows, plan, (step, part), out[step % len(out), part])
            for step in steps
            for part in parts
        )
        with closing(run_ahead(calls, self.threads, self.prefetch * len(parts))) as done:
            for step in steps:
                for _ in parts:
                    next(done)
                with torch.cuda.stream(
                    side
                ):  # beside the work that the consumer queued; on a CPU nothing is copied
                    images = slots[step % len(slots)].to(self.device)
                if cuda:
                    images.record_stream(
                        torch.cuda.current_stream(self.device)
                    )  # its memory waits for the consumer
                yield images

    def _rows(self, plan: EpochPlan, at: tuple[int, slice], out: np.ndarray) -> None:
        rows = (array[at].tolist() for array in (plan.index, plan.window, plan.flip))
        for i, (top, left, height, width), flip, target in zip(*rows, out, strict=True):
            if i == PADDING:
                target.fill(0)
            else:  # the decoder halves the image for less work, the box filter does the rest
                by = 2 if min(height, width) >= 2 * self.size and self.store.modes[i] == JPG else 1
                _area(
                    self._image(i, by), top / by, left / by, height / by, width / by, flip, target
                )

    def _image(self, index: int, divisor: int) -> np.ndarray:
        """One decoded sample, uint8 (ceil(H / divisor), ceil(W / divisor), 3); valid until this
        thread's next.
        """
        encoded = self.store.read(index)
        height, width = int(self.store.heights[index]), int(self.store.widths[index])
        if self.store.modes[index] != JPG:
            return encoded.reshape(height, width, 3)
        shape = (-(-height // divisor), -(-width // divisor), 3)
        n = shape[0] * shape[1] * 3
        scratch = getattr(_this_thread, "scratch", np.empty(0, np.uint8))
        if scratch.size < n:
            scratch = _this_thread.scratch = np.empty(n, np.uint8)
        source, target = (
            (encoded.ctypes.data, encoded.size, height, width),
            (scratch.ctypes.data, height, width),
        )
        if _imdecode(*source, *target, 0, 0, 1, divisor, False, False):
            raise DamagedData(
                f"{self.store.file(index)}: sample {index}: the JPEG does not decode cleanly"
            )
        return scratch[:n].reshape(shape)
