"""The area resize of the loaders on CPU cores, compiled by numba.

`reference.crop_resize` is its slow twin. Sides below are in source pixels, and may be fractions:
the decoder may have halved the image.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from pipelines.loaders.pixel_sums import CHANNELS, unrolled_sums

# Added before the fraction is cut off: rounds to nearest. A plain 0.5 is a double, and would make
# doubles of the sums.
HALF = np.float32(0.5)


def compiled(
    signature: Any, *, fastmath: bool
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit` whose machine code is kept beside this file or in the user's cache.

    It is then compiled once, not once per run. Where it cannot be kept, or what was kept is
    damaged, it is compiled for this process alone. Numba's errors for that are of many types: no
    folder to write (RuntimeError), a full disk (OSError), half a pickle. `fastmath` holds for the
    functions that it calls too.
    """

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, nogil=True, fastmath=fastmath, cache=True)(function)
        except Exception:
            # Raises again what the cache did not cause.
            return njit(signature, nogil=True, fastmath=fastmath)(function)

    return compile_


@njit(nogil=True, fastmath=True)
def _taps(start, extent, limit, n_out, flip):  # type: ignore[no-untyped-def]
    """The box filter over [start, start + extent) along one axis, for n_out output pixels.

    Returns the first source pixel of each output pixel, int64 (n_out,), and the weights of that
    pixel and those after it, float32 (taps, n_out). Weights of pixels outside [0, limit) are 0.
    `flip` numbers the output pixels from the other end.
    """
    step = extent / n_out  # the side of an output pixel's box
    place = np.arange(n_out)
    low = start + step * (n_out - 1 - place if flip else place)
    first = np.floor(low).astype(np.int64)
    # A box of this side touches at most so many pixels: one more than it is wide.
    pixel = first + np.arange(int(np.ceil(step)) + 1).reshape(-1, 1)
    # What the box [low, low + step) and the pixel [pixel, pixel + 1) have in common.
    share = np.minimum(low + step, pixel + 1.0) - np.maximum(low, pixel.astype(np.float64))
    share = np.maximum(share, 0.0) * (pixel >= 0) * (pixel < limit)
    return first, (share / step).astype(np.float32)


@njit(nogil=True, fastmath=True)
def _blend(rows, first, weights, line):  # type: ignore[no-untyped-def]
    """line = the sum over k of weights[k] * rows[first + k], each source row read once.

    Rows of weight 0 may lie outside the source, and are not touched: they come first or last.
    """
    begin = 0
    end = len(weights)
    while begin < end and weights[begin] == 0:
        begin += 1
    while begin < end and weights[end - 1] == 0:
        end -= 1
    if begin == end:
        line[:] = 0
        return

    # Two at a time, because the sums then go to memory and back half as often. Numba makes one
    # vector loop of each of these.
    w0 = weights[begin]
    row0 = rows[first + begin]
    if end == begin + 1:
        for i in range(len(line)):
            line[i] = w0 * np.float32(row0[i])
        return
    w1 = weights[begin + 1]
    row1 = rows[first + begin + 1]
    for i in range(len(line)):
        line[i] = w0 * np.float32(row0[i]) + w1 * np.float32(row1[i])
    for k in range(begin + 2, end):
        w = weights[k]
        row = rows[first + k]
        for i in range(len(line)):
            line[i] += w * np.float32(row[i])


@compiled(
    types.void(
        types.Array(types.uint8, 3, "C", readonly=True),  # source
        types.UniTuple(types.float64, 4),  # window: top, left, height, width
        types.boolean,  # flip
        types.uint8[:, :, ::1],  # canvas
        types.UniTuple(types.int64, 4),  # place: top, left, height, width
    ),
    fastmath=True,
)
def area_resize(source, window, flip, canvas, place):  # type: ignore[no-untyped-def]
    """Show a window of source (H, W, 3) in its place on the canvas, mirrored there by `flip`.

    Each pixel is the mean of the box of source pixels that it covers, rounded to nearest. Around
    the source lie zeros, and around the place too.
    """
    top, left, height, width = window
    out_top, out_left, out_height, out_width = place
    stride = CHANNELS * source.shape[1]
    n = CHANNELS * out_width  # values of a row of the place
    ys, wy = _taps(top, height, source.shape[0], out_height, False)
    xs, wx_by_tap = _taps(left, width, source.shape[1], out_width, flip)
    wx = wx_by_tap.T.copy()  # (n_out, taps), C order
    taps = wx.shape[1]

    # The window's part of a source row, in values: all that the horizontal pass reads. With a flip
    # the leftmost pixel comes last. It may reach outside [0, stride).
    begin = CHANNELS * min(xs[0], xs[-1])
    end = CHANNELS * (max(xs[0], xs[-1]) + taps)
    at = CHANNELS * xs - begin

    # `line` is one output row before the horizontal pass. Only `inside` of it, which lies over the
    # source, is ever written. The rest stays zero: what lies around the source.
    low = max(begin, 0)
    high = min(end, stride)
    line = np.zeros(end - begin + 1, np.float32)
    inside = line[low - begin : high - begin]
    values = np.empty(n + 1, np.float32)

    rows = source.reshape(-1, stride)
    lines = canvas.reshape(-1, CHANNELS * canvas.shape[1])
    begin_out = CHANNELS * out_left
    end_out = begin_out + n
    lines[:out_top] = 0
    lines[out_top + out_height :] = 0
    for y in range(out_height):
        # Vertically first: source rows are contiguous.
        _blend(rows[:, low:high], ys[y], wy[:, y], inside)
        # Then horizontally.
        unrolled_sums(line, at, wx, HALF, values)

        # Over int32, because a float has no vector instruction that converts it to uint8.
        result = lines[out_top + y]
        result[:begin_out] = 0
        shown = result[begin_out:end_out]
        for j in range(n):
            shown[j] = np.uint8(np.int32(values[j]))
        result[end_out:] = 0
