"""Batch norm over groups of rows as one autograd function: launches `fap.nets.norm_kernel`."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fap.nets.norm_kernel import (
    backward_sums,
    forward_sums,
    gradient,
    group_gradients,
    normalise,
    statistics,
)

TILE_ELEMENTS = 4096  # that a program of 128 threads holds at a time
MOST_BLOCK_CHANNELS = 64  # of a tile; in half precision they are 128 bytes, one cache line
SLIVER_CHANNELS = 16  # of a program that puts a group's parts together
PROGRAMS_PER_CORE = 4
MOST_MAP_PARTS = 1 << 14  # a grid's second dimension has at most 65,535 programs
N_STATS = 5  # rows of the tables, see `norm_kernel`
N_SHARES = 2
N_SUMS = 2
N_BRANCHES = 2


class Launch(NamedTuple):
    """How the kernels are launched for one shape of batch and groups."""

    tile: dict[str, int]  # the constants BLOCK_P and BLOCK_C
    n_parts: int  # of a group in the sums
    sums_grid: tuple[int, int, int]  # channel blocks, parts, groups
    group_grid: tuple[int, int]  # channel slivers, groups
    map_grid: tuple[int, int, int]  # channel blocks, parts, groups


@functools.cache
def _launch(
    n_channels: int, image_pixels: int, n_groups: int, most_rows: int, device: torch.device
) -> Launch:
    block_channels = min(MOST_BLOCK_CHANNELS, triton.next_power_of_2(n_channels))
    block_pixels = TILE_ELEMENTS // block_channels
    n_blocks = triton.cdiv(n_channels, block_channels)
    n_tiles = triton.cdiv(most_rows * image_pixels, block_pixels)
    # The sums have just enough programs to fill the device, each with many tiles, so that few
    # partial sums are left to put together.
    n_programs = PROGRAMS_PER_CORE * _n_cores(device)
    n_parts = min(n_tiles, triton.cdiv(n_programs, n_blocks * n_groups))
    # The map has nothing to put together: a program per tile.
    n_map_parts = min(n_tiles, MOST_MAP_PARTS)
    return Launch(
        tile={"BLOCK_P": block_pixels, "BLOCK_C": block_channels},
        n_parts=n_parts,
        sums_grid=(n_blocks, n_parts, n_groups),
        group_grid=(triton.cdiv(n_channels, SLIVER_CHANNELS), n_groups),
        map_grid=(n_blocks, n_map_parts, n_groups),
    )


def _n_cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


class GroupedBatchNorm(torch.autograd.Function):
    """Training-mode batch norm of every group, plus `residual` and ReLU where asked for.

    See `fap.nets.norm.DualBatchNorm2d`, whose forward it is on a GPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, C, H, W), channels_last; float16, bfloat16 or float32
        residual: Tensor | None,  # as x; only with relu
        # float32 (C,), as the next three; the auxiliary ones are the main ones where there are none
        weight: Tensor,
        bias: Tensor,
        aux_weight: Tensor,
        aux_bias: Tensor,
        running: tuple[Tensor, ...],  # mean, var, auxiliary mean, auxiliary var, updated in place
        starts: Tensor,  # int32 (n_groups + 1,): first row of each group, and B
        running_weights: Tensor,  # float32 (n_groups,); 0 leaves the running statistics alone
        n_main: int,  # main groups, which come first
        most_rows: int,  # of the largest group
        eps: float,
        relu: bool,
    ) -> Tensor:
        assert residual is None or relu
        _, n_channels, height, width = x.shape
        image_pixels = height * width
        n_groups = len(running_weights)
        launch = _launch(n_channels, image_pixels, n_groups, most_rows, x.device)
        n_parts = launch.n_parts
        shape = (image_pixels, n_channels, n_main)
        flags = launch.tile | {"RESIDUAL": residual is not None, "RELU": relu}

        # `sums` dies with this call: the allocator hands its memory only to later work of the same
        # stream. `stats` lives until the backward.
        y = torch.empty_like(x, memory_format=torch.channels_last)
        stats = torch.empty((N_STATS, n_groups, n_channels), dtype=torch.float32, device=x.device)
        sums = stats.new_empty(n_groups, n_parts, N_SUMS, n_channels)

        forward_sums[launch.sums_grid](x, starts, sums, image_pixels, n_channels, **launch.tile)
        statistics[launch.group_grid](
            x, sums, starts, weight, bias, aux_weight, aux_bias, stats,
            *shape, n_parts, eps, BLOCK_C=SLIVER_CHANNELS,
        )  # fmt: skip
        # A kernel wants a tensor for every pointer; without a residual it does not read this one.
        normalise[launch.map_grid](
            x, x if residual is None else residual, y, starts, stats, running_weights, *running,
            *shape, **flags,
        )  # fmt: skip

        ctx.launch = launch
        ctx.shape = shape
        ctx.flags = flags
        # Only with a residual does the backward need the output: so a norm without one keeps no
        # second image-sized tensor alive.
        ctx.save_for_backward(x, x if residual is None else y, starts, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, starts, stats = ctx.saved_tensors
        image_pixels, n_channels, n_main = ctx.shape
        launch = ctx.launch
        n_parts = launch.n_parts
        n_groups = stats.shape[1]

        gy = gy.contiguous(memory_format=torch.channels_last)
        sums = stats.new_empty(n_groups, n_parts, N_SUMS, n_channels)
        shares = stats.new_empty(N_SHARES, n_groups, n_channels)
        affine = stats.new_empty(N_BRANCHES, 2, n_channels)
        gx = torch.empty_like(x, memory_format=torch.channels_last)
        gresidual = torch.empty_like(gx) if ctx.flags["RESIDUAL"] else None

        backward_sums[launch.sums_grid](
            gy, x, y, starts, stats, sums, image_pixels, n_channels, **ctx.flags
        )
        group_gradients[launch.group_grid](
            sums, stats, shares, n_channels, n_parts, BLOCK_C=SLIVER_CHANNELS
        )
        gradient[launch.map_grid](
            gy, x, y, gx, gx if gresidual is None else gresidual, starts, stats, shares, affine,
            *ctx.shape, **ctx.flags,
        )  # fmt: skip

        # A branch without groups gets no gradient: its rows of `affine` were not written.
        main = affine[0] if n_main else (None, None)
        aux = affine[1] if n_main < n_groups else (None, None)
        no_gradient = (None,) * 7  # of `running` to `relu`
        return gx, gresidual, *main, *aux, *no_gradient
