"""Rows as they lie in memory: channels_last images are contiguous as (n, H, W, C), so putting rows
together copies straight.
"""

from torch import Tensor


def memory_order(
    rows: Tensor,  # images (n, C, H, W), channels_last, or anything with rows first
) -> Tensor:  # (n, H, W, C), or as it was
    """A view that is contiguous: `cat`, `flatten` and collectives of it transpose nothing."""
    return rows.permute(0, 2, 3, 1) if rows.dim() == 4 else rows


def image_order(
    rows: Tensor,  # (n, H, W, C), or anything with rows first
) -> Tensor:  # (n, C, H, W), channels_last, or as it was
    """The inverse of `memory_order`."""
    return rows.permute(0, 3, 1, 2) if rows.dim() == 4 else rows
