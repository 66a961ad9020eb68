"""Rows as they lie in memory.

channels_last images are contiguous as (n, H, W, C), so putting rows together copies straight.
"""

from torch import Tensor

IMAGE_DIMENSIONS = 4  # what has fewer or more, labels and boxes for example, stays as it is


def memory_order(
    rows: Tensor,  # images (n, C, H, W), channels_last, or anything with rows first
) -> Tensor:  # (n, H, W, C), or as it was
    """A contiguous view: `cat`, `flatten` and collectives of it transpose nothing."""
    if rows.dim() != IMAGE_DIMENSIONS:
        return rows
    return rows.permute(0, 2, 3, 1)


def image_order(
    rows: Tensor,  # (n, H, W, C), or anything with rows first
) -> Tensor:  # (n, C, H, W), channels_last, or as it was
    """The inverse of `memory_order`."""
    if rows.dim() != IMAGE_DIMENSIONS:
        return rows
    return rows.permute(0, 3, 1, 2)
