"""Pillow's bilinear and bicubic resize for the loaders on CPU cores, bit for bit, by numba.

`reference.crop_resize` is its slow twin, which is Pillow. The arithmetic is that of Pillow's
src/libImaging/Resample.c: a horizontal pass, then a vertical one, each with weights of 22 bits
after the point and with a result of 8 bits. Unlike Pillow it makes only what lies on the canvas.
"""

import numpy as np
from numba import njit, types

from pipelines.loaders.area import compiled
from pipelines.loaders.pixel_sums import CHANNELS, unrolled_sums

PRECISION_BITS = np.uint32(32 - 8 - 2)  # of a weight behind the point: 8 a value, 2 for the sum
HALF = np.uint32(1 << 21)  # rounds to nearest
MOST = np.int32(255)
KEYS_A = -0.5  # Pillow's, of the family of cubics in Keys (1981)


@njit(nogil=True)
def _kernel(distance, cubic):  # type: ignore[no-untyped-def]
    """The filter at a distance >= 0 from its centre: a triangle, or Keys' cubic."""
    if not cubic:
        return 1.0 - distance if distance < 1.0 else 0.0
    if distance < 1.0:
        return ((KEYS_A + 2.0) * distance - (KEYS_A + 3.0)) * distance * distance + 1
    if distance < 2.0:
        return (((distance - 5) * distance + 8) * distance - 4) * KEYS_A
    return 0.0


@njit(nogil=True)
def _taps(extent, n_out, begin, end, flip, cubic):  # type: ignore[no-untyped-def]
    """The filter over `extent` source pixels, for the pixels [begin, end) of n_out.

    Returns the first source pixel of each, int64 (end - begin,), and the weights of that pixel and
    those after it, uint32 (taps, end - begin): `precompute_coeffs` and `normalize_coeffs_8bpc` of
    Resample.c, in their order. A weight below zero is 2^32 less it, so that sums are right modulo
    2^32. `flip` numbers the output pixels from the other end.
    """
    scale = extent / n_out
    widening = max(scale, 1.0)
    support = 2.0 if cubic else 1.0
    reach = support * widening  # of the filter, to both sides of its centre
    inverse = 1.0 / widening
    n = end - begin
    firsts = np.empty(n, np.int64)
    exact = np.zeros((int(np.ceil(reach)) * 2 + 1, n))
    n_taps = 1
    for i in range(n):
        place = begin + i
        if flip:
            place = n_out - 1 - place
        centre = (place + 0.5) * scale
        first = max(int(centre - reach + 0.5), 0)
        last = min(int(centre + reach + 0.5), extent)
        total = 0.0
        for k in range(last - first):
            weight = _kernel(abs((k + first - centre + 0.5) * inverse), cubic)
            if weight != 0.0:
                exact[k, i] = weight
                total += weight
                n_taps = max(n_taps, k + 1)
        if total != 0.0:
            for k in range(last - first):
                exact[k, i] /= total
        firsts[i] = first
    weights = np.empty((n_taps, n), np.uint32)
    for k in range(n_taps):
        for i in range(n):
            half = -0.5 if exact[k, i] < 0.0 else 0.5
            rounded = np.int64(half + exact[k, i] * 2.0**PRECISION_BITS)  # towards zero
            weights[k, i] = np.uint32(rounded)
    return firsts, weights


@njit(nogil=True)
def _round(sums, result):  # type: ignore[no-untyped-def]
    """Sums of weighted values, uint32, HALF included -> the values, of any type.

    A cubic's sums may lie below zero, and above what a value can be.
    """
    for j in range(len(result)):
        value = np.int32(sums[j]) >> PRECISION_BITS
        result[j] = max(min(value, MOST), np.int32(0))


@njit(nogil=True)
def _add(values, weight, sums):  # type: ignore[no-untyped-def]
    """One tap of the vertical pass: a row of values, uint8."""
    for j in range(len(sums)):
        sums[j] += weight * np.uint32(values[j])


@njit(nogil=True)
def _copy(values, line):  # type: ignore[no-untyped-def]
    """A row of values, uint8, at the start of `line`. Numba makes no vectors of `[:] =`."""
    for j in range(len(line)):
        line[j] = values[j]


@njit(nogil=True)
def _across(line, at, weights, sums, result):  # type: ignore[no-untyped-def]
    """The horizontal pass of one row: `line`, uint32, as wide as the sums -> `result`, uint8.

    `weights` are uint32 (pixels of the result, taps).
    """
    unrolled_sums(line, at, weights, HALF, sums)
    _round(sums, result)


@compiled(
    types.void(
        types.Array(types.uint8, 3, "C", readonly=True),  # source
        types.UniTuple(types.int64, 4),  # window: top, left, height, width
        types.boolean,  # flip
        types.uint8[:, :, ::1],  # canvas
        types.UniTuple(types.int64, 4),  # place: top, left, height, width
        types.boolean,  # cubic
    ),
    # Weights are to be Pillow's to the last bit.
    fastmath=False,
)
def antialiased_resize(source, window, flip, canvas, place, cubic):  # type: ignore[no-untyped-def]
    """Show a window of source (H, W, 3) in its place on the canvas, mirrored there by `flip`.

    The filter sees nothing outside the window. What of the window lies outside the source is zero,
    and so is the canvas around the place. What of the place lies outside the canvas is not made.
    """
    top, left, height, width = window
    out_top, out_left, out_height, out_width = place
    # The part of the place that lies on the canvas, counted from the place's corner.
    y_begin = max(0, -out_top)
    y_end = min(out_height, canvas.shape[0] - out_top)
    x_begin = max(0, -out_left)
    x_end = min(out_width, canvas.shape[1] - out_left)
    if y_begin >= y_end or x_begin >= x_end:
        canvas[:] = 0
        return
    ys, wy = _taps(height, out_height, y_begin, y_end, False, cubic)
    xs, wx_by_tap = _taps(width, out_width, x_begin, x_end, flip, cubic)

    n = CHANNELS * (x_end - x_begin)  # values of a row that is shown
    wx = wx_by_tap.T.copy()  # (pixels, taps), C order
    begin = xs.min()  # in pixels of the window, as `end`
    end = xs.max() + wx.shape[1]
    at = CHANNELS * (xs - begin)

    # `line` is what the horizontal pass reads of a row. Only `inside` of it, which lies over the
    # window and over the source, is ever written. The rest stays zero.
    line = np.zeros(CHANNELS * (end - begin) + 1, np.uint32)
    low = max(begin, -left)
    high = max(low, min(end, width, source.shape[1] - left))
    inside = line[CHANNELS * (low - begin) : CHANNELS * (high - begin)]
    rows = source.reshape(-1, CHANNELS * source.shape[1])
    read = slice(CHANNELS * (left + low), CHANNELS * (left + high))
    sums = np.empty(n + 1, np.uint32)
    of_columns = sums[:n]  # in the vertical pass

    lines = canvas.reshape(-1, CHANNELS * canvas.shape[1])
    begin_out = CHANNELS * (out_left + x_begin)
    end_out = begin_out + n
    lines[: out_top + y_begin] = 0
    lines[out_top + y_end :] = 0
    lines[:, :begin_out] = 0
    lines[:, end_out:] = 0
    shown = lines[out_top + y_begin : out_top + y_end, begin_out:end_out]

    # Which pass is the first decides what is rounded. This is Pillow's rule since version 13;
    # earlier versions begin across.
    if height - out_height > max(0, 2 * (width - out_width)):
        wide_sums = np.empty(len(inside), np.uint32)
        for y in range(len(shown)):
            wide_sums[:] = HALF
            for k in range(len(wy)):
                row = top + ys[y] + k
                if wy[k, y] != 0 and 0 <= row < source.shape[0]:
                    _add(rows[row, read], wy[k, y], wide_sums)
            _round(wide_sums, inside)
            _across(line, at, wx, sums, shown[y])
        return

    # The rows that the vertical pass needs next, in turn: as many as it has taps.
    ring = np.zeros((len(wy), n), np.uint8)
    done = -1  # the last row of the window that has been through the horizontal pass
    for y in range(len(shown)):
        last = min(ys[y] + len(wy), height) - 1
        for k in range(max(ys[y], done + 1), last + 1):
            row = top + k
            slot = ring[k % len(ring)]
            if 0 <= row < source.shape[0]:
                _copy(rows[row, read], inside)
                _across(line, at, wx, sums, slot)
            else:
                slot[:] = 0
        done = last
        of_columns[:] = HALF
        for k in range(last + 1 - ys[y]):
            if wy[k, y] != 0:
                _add(ring[(ys[y] + k) % len(ring)], wy[k, y], of_columns)
        _round(of_columns, shown[y])
