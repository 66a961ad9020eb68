"""Pixels that are moved one after the other, compiled by numba: glass blur's."""

import numpy as np
from numba import types

from pipelines.loaders.area import compiled


@compiled(types.void(types.int64[::1], types.int64[::1], types.int64[::1]), fastmath=False)
def copy_neighbours(
    pixel: np.ndarray,  # int64 (n,): place -> the pixel that lies there; changed
    here: np.ndarray,  # int64 (moves,): places, each of which gets
    there: np.ndarray,  # int64 (moves,): what lies here by then
) -> None:
    """pixel[here] = pixel[there], move by move. Nothing is checked."""
    for k in range(len(here)):
        pixel[here[k]] = pixel[there[k]]
