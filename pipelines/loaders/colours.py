"""RGB pixels of the planes of a 4:2:0 JPEG, compiled by numba: those of libjpeg-turbo, bit for bit.

So planes show what the JPEG that they were decoded from would show. `reference.planes_as_rgb` is
the slow twin.
"""

import numpy as np
from numba import njit, types

from pipelines.loaders.area import compiled

# Numba computes with 64 bits wherever two smaller integers meet. Each result is made small again,
# or vectors would hold a quarter as many numbers.
I16 = np.int16
U64 = np.uint64  # of indices: numba lets signed ones count from the end, and would test each
F32 = np.float32

# JFIF's conversion, in libjpeg's sixteenths of a bit. All the numbers below are exact in float32,
# whose vectors multiply faster than those of integers.
SCALE = 1.0 / 65536
RED_OF_CR = F32(91881 * SCALE)
GREEN_OF_CB = F32(22554 * SCALE)
GREEN_OF_CR = F32(46802 * SCALE)
BLUE_OF_CB = F32(116130 * SCALE)
GREY = F32(128)  # of Cb and Cr: no colour
HALF = F32(0.5)
HIGHEST = np.int32(255)
ZERO = np.int32(0)

FEWEST_BLENDED = 3  # columns of a plane, below which libjpeg repeats values instead of blending


@njit(nogil=True)
def _clamped(value):  # type: ignore[no-untyped-def]
    return np.uint8(min(max(np.int32(value), ZERO), HIGHEST))


@njit(nogil=True)
def _stretched(plane, row, begin, end, blended, stretched):  # type: ignore[no-untyped-def]
    """A row of the image's height, of columns [begin, end) of a plane, at the image's width.

    A pixel's colour is 3/4 of its own chroma value and 1/4 of the nearest other one, along both
    axes (libjpeg's "fancy upsampling", h2v2_fancy_upsample in jdsample.c). What would lie outside
    the plane is its border.

    `blended`, int16 (end - begin + 2,), is for use here. `stretched` is int16 (2 (end - begin),).
    """
    n_rows, n_columns = plane.shape
    n = end - begin
    near = row // 2
    if n_columns < FEWEST_BLENDED:
        for i in range(n):
            stretched[2 * i] = plane[near, begin + i]
            stretched[2 * i + 1] = plane[near, begin + i]
        return
    far = near - 1 + 2 * (row % 2)
    far = min(max(far, 0), n_rows - 1)

    # Down: the columns, and one on each side.
    low = max(begin - 1, 0)
    high = min(end + 1, n_columns)
    near_row = plane[near, low:high]
    far_row = plane[far, low:high]
    inside = blended[low - begin + 1 :]
    for i in range(high - low):
        inside[i] = I16(I16(3) * I16(near_row[i]) + I16(far_row[i]))
    if low == begin:
        blended[0] = blended[1]
    if high == end:
        blended[n + 1] = blended[n]

    # Across, in sixteenths now. Halves are rounded up and down in turn, as libjpeg does it.
    before = blended[:n]
    middle = blended[1 : n + 1]
    behind = blended[2 : n + 2]
    for i in range(U64(n)):
        three = I16(I16(3) * middle[i])
        stretched[U64(2) * i] = I16(I16(three + before[i] + I16(8)) >> I16(4))
        stretched[U64(2) * i + U64(1)] = I16(I16(three + behind[i] + I16(7)) >> I16(4))


_PLANE = types.Array(types.uint8, 2, "C", readonly=True)


@compiled(
    types.void(
        _PLANE,  # Y, of the image's sides
        _PLANE,  # Cb, of half the sides, rounded up
        _PLANE,  # Cr
        types.int64,  # top of the region, in pixels of the image
        types.int64,  # left
        types.uint8[:, :, ::1],  # region (height, width, 3): to fill
    ),
    fastmath=False,
)
def planes_as_rgb(y, cb, cr, top, left, region):  # type: ignore[no-untyped-def]
    """Fill `region`, which lies inside the image, with its RGB pixels."""
    height = region.shape[0]
    width = region.shape[1]
    lines = region.reshape(height, 3 * width)
    begin = left // 2
    end = (left + width + 1) // 2
    blended = np.empty(end - begin + 2, np.int16)
    cb_line = np.empty(2 * (end - begin), np.int16)
    cr_line = np.empty(2 * (end - begin), np.int16)
    skipped = left - 2 * begin
    blue = cb_line[skipped:]
    red = cr_line[skipped:]
    for i in range(height):
        row = top + i
        _stretched(cb, row, begin, end, blended, cb_line)
        _stretched(cr, row, begin, end, blended, cr_line)
        grey = y[row, left : left + width]
        line = lines[i]
        for x in range(U64(width)):
            # Exact: products and sums that matter fit in a float's 24 bits.
            light = F32(grey[x]) + HALF
            b = F32(blue[x]) - GREY
            r = F32(red[x]) - GREY
            line[U64(3) * x] = _clamped(light + RED_OF_CR * r)
            line[U64(3) * x + U64(1)] = _clamped(light - (GREEN_OF_CB * b + GREEN_OF_CR * r))
            line[U64(3) * x + U64(2)] = _clamped(light + BLUE_OF_CB * b)
