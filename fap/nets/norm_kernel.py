"""Batch norm over row groups as Triton kernels, the group being a grid dimension.

Residual add and ReLU are part of it. A channels_last batch is a matrix of pixels x channels in
which a group is a range of pixels. Three launches normalise all groups and three differentiate
them, however many there are:

1. sums per (group, part, channel): `_forward_sums`, `_backward_sums`;
2. from these, statistics or sums per (group, channel): `_statistics`, `_group_gradients`;
3. the elementwise map: `_normalise`, `_gradient`. A few of its programs also sum over groups.

Running statistics and the gradients of weight and bias are sums over groups, and need step 2 of
every group. Programs of one launch cannot wait for each other, so these sums are made in step 3,
by one program per side and channel block.

What waits for what: a pass is three dependent launches each way. In step 2 a program reads the
parts of its group PARTS_AT_ONCE at a time, each round waiting for the one before. On an H100 that
is one round where groups x channel blocks are 5 or more, and at most 5 (a single group of up to 64
channels). In step 3 the sums over groups add one round for every GROUPS_AT_ONCE groups of a side.
So up to 16 groups a side, more groups are not more rounds.

There are no atomics and every sum has a fixed order, so the same input gives the same bits.
Statistics are float32, taken about the group's first pixel so that nothing cancels.
Twin: `split` + `F.batch_norm` + `cat` + add + ReLU in `fap.nets.norm`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# An integer that is 1 or a multiple of 16 would be compiled for anew; only `channels` gains by it,
# as wider loads.
kernel = triton.jit(do_not_specialize=["pixels", "main_groups", "parts"])
TILE = 4096  # elements that a program of 128 threads holds at a time
PROGRAMS_PER_CORE = 4
SLIVER = 16  # channels of a program that puts a group's parts together
MOST_MAP_PARTS = 1 << 14  # a grid's second dimension has at most 65,535 programs

# What follows are the only constants of this module that a compiled kernel may use.
PARTS_AT_ONCE = tl.constexpr(128)  # x SLIVER channels in registers
# x up to 64 channels in registers. The same for any groups, so nothing is compiled anew for others.
GROUPS_AT_ONCE = tl.constexpr(16)

# Rows of `stats`, float32 (5, groups, channels).
MEAN = tl.constexpr(0)
INVSTD = tl.constexpr(1)  # 1 / sqrt(biased variance + eps)
SCALE = tl.constexpr(2)  # weight * invstd
BIAS = tl.constexpr(3)
UNBIASED_VAR = tl.constexpr(4)  # what moves the running variance

# Rows of `shares`, float32 (2, groups, channels): what each group adds to its side's gradients.
WEIGHT_SHARE = tl.constexpr(0)
BIAS_SHARE = tl.constexpr(1)


@triton.jit
def _extent(starts, group, pixels):
    """(first, end): the group's first pixel, and the one after its last."""
    return tl.load(starts + group) * pixels, tl.load(starts + group + 1) * pixels


@triton.jit
def _share(first, end, BLOCK_P: tl.constexpr):
    """(begin, stop): this program's range of the group's pixels [first, end), in whole tiles."""
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    share = tl.cdiv(tl.cdiv(end - first, parts), BLOCK_P) * BLOCK_P
    return first + part * share, tl.minimum(first + (part + 1) * share, end)


@triton.jit
def _elements(at, stop, c, channels, BLOCK_P: tl.constexpr):
    """Offsets and mask of the tile that begins at pixel `at`, (BLOCK_P, BLOCK_C)."""
    p = at + tl.arange(0, BLOCK_P)
    where = p[:, None].to(tl.int64) * channels + c[None, :]
    return where, (p < stop)[:, None] & (c < channels)[None, :]


@triton.jit
def _side(group, main_groups, groups):
    """(side, low, high): a group's norm, 0 main or 1 auxiliary, and its groups [low, high)."""
    if group < main_groups:
        side = 0
        low = 0
        high = main_groups
    else:
        side = 1
        low = main_groups
        high = groups
    return side, low, high


@triton.jit
def _of_group(table, row, group, groups, c, channels):
    """One group's values in a row of a table (rows, groups, channels), (BLOCK_C,)."""
    return tl.load(table + (groups * row + group) * channels + c, mask=c < channels, other=0)


@triton.jit
def _of_groups(table, row, group, high, groups, c, channels):
    """As `_of_group` for a vector of groups, (len(group), BLOCK_C); 0 for groups from `high` on."""
    where = (groups * row + group)[:, None] * channels + c[None, :]
    return tl.load(table + where, mask=(group < high)[:, None] & (c < channels)[None, :], other=0)


@triton.jit
def _affine(stats, c, channels):
    """Mean, weight / std and bias of this program's group, (BLOCK_C,) each."""
    group = tl.program_id(2)
    groups = tl.num_programs(2)
    mean = _of_group(stats, MEAN, group, groups, c, channels)
    scale = _of_group(stats, SCALE, group, groups, c, channels)
    bias = _of_group(stats, BIAS, group, groups, c, channels)
    return mean, scale, bias


@triton.jit
def _totals(sums, group, parts, c, channels, BLOCK_C: tl.constexpr):
    """The two sums of a group over its parts, (BLOCK_C,) each, PARTS_AT_ONCE parts at a time."""
    a = tl.zeros((PARTS_AT_ONCE, BLOCK_C), tl.float32)
    b = tl.zeros((PARTS_AT_ONCE, BLOCK_C), tl.float32)
    for at in range(0, parts, PARTS_AT_ONCE):
        part = at + tl.arange(0, PARTS_AT_ONCE)
        # sums is (groups, parts, 2, channels)
        where = ((group * parts + part) * 2)[:, None] * channels + c[None, :]
        mask = (part < parts)[:, None] & (c < channels)[None, :]
        a += tl.load(sums + where, mask=mask, other=0)
        b += tl.load(sums + where + channels, mask=mask, other=0)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _move_running_statistics(
    stats, running_weights, mean, var, low, high, groups, c, channels, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Moves the running mean and variance of one side by the statistics of its groups [low, high).

    r <- r + sum of w_i (s_i - r), the groups' averages one after another: see `running_weights` in
    `fap.nets.norm`. The groups are loaded at once, not one after another, so that this program does
    not end long after the others of its launch.
    """
    old_mean = tl.load(mean + c, mask=c < channels, other=0)
    old_var = tl.load(var + c, mask=c < channels, other=0)
    mean_step = tl.zeros((GROUPS_AT_ONCE, BLOCK_C), tl.float32)
    var_step = tl.zeros((GROUPS_AT_ONCE, BLOCK_C), tl.float32)
    weight_sum = tl.zeros((GROUPS_AT_ONCE,), tl.float32)
    for at in range(low, high, GROUPS_AT_ONCE):
        group = at + tl.arange(0, GROUPS_AT_ONCE)
        weight = tl.load(running_weights + group, mask=group < high, other=0)
        new_mean = _of_groups(stats, MEAN, group, high, groups, c, channels)
        new_var = _of_groups(stats, UNBIASED_VAR, group, high, groups, c, channels)
        w = weight[:, None]
        # Of a group with weight 0 not even a NaN gets in.
        mean_step += tl.where(w > 0, w * (new_mean - old_mean[None, :]), 0)
        var_step += tl.where(w > 0, w * (new_var - old_var[None, :]), 0)
        weight_sum += weight
    # Nothing is written where no group counts: another stream may be moving the same statistics.
    if tl.sum(weight_sum, 0) > 0:
        tl.store(mean + c, old_mean + tl.sum(mean_step, 0), mask=c < channels)
        tl.store(var + c, old_var + tl.sum(var_step, 0), mask=c < channels)


@triton.jit
def _sum_affine_gradients(
    shares, affine, side, low, high, groups, c, channels, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias of one side: the sum of what its groups [low, high) add to them.

    affine is (sides, 2, channels): weight, bias. The groups are loaded at once, as above.
    """
    weight = tl.zeros((GROUPS_AT_ONCE, BLOCK_C), tl.float32)
    bias = tl.zeros((GROUPS_AT_ONCE, BLOCK_C), tl.float32)
    for at in range(low, high, GROUPS_AT_ONCE):
        group = at + tl.arange(0, GROUPS_AT_ONCE)
        weight += _of_groups(shares, WEIGHT_SHARE, group, high, groups, c, channels)
        bias += _of_groups(shares, BIAS_SHARE, group, high, groups, c, channels)
    tl.store(affine + 2 * side * channels + c, tl.sum(weight, 0), mask=c < channels)
    tl.store(affine + (2 * side + 1) * channels + c, tl.sum(bias, 0), mask=c < channels)


@triton.jit
def _store_sums(sums, a, b, c, channels):
    """This program's two sums over its pixels into sums (groups, parts, 2, channels)."""
    row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(sums + row * channels + c, tl.sum(a, 0), mask=c < channels)
    tl.store(sums + (row + 1) * channels + c, tl.sum(b, 0), mask=c < channels)


@kernel
def _forward_sums(x, starts, sums, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of x - k and (x - k)^2, k being the group's first pixel.

    Grid (channel blocks, parts, groups).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, end = _extent(starts, tl.program_id(2), pixels)
    begin, stop = _share(first, end, BLOCK_P)
    k = tl.load(x + first.to(tl.int64) * channels + c, mask=c < channels, other=0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, channels, BLOCK_P)
        d = tl.where(mask, tl.load(x + where, mask=mask, other=0).to(tl.float32) - k, 0)
        total += d
        squares += d * d
    _store_sums(sums, total, squares, c, channels)


@kernel
def _statistics(
    x, sums, starts, weight, bias, aux_weight, aux_bias, stats,
    pixels, channels, main_groups, parts, eps, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """stats (5, groups, channels): mean, 1 / std, weight / std, bias, unbiased variance.

    Grid (channel blocks, groups). Groups of the main norm come first.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    if group >= main_groups:
        weight = aux_weight
        bias = aux_bias
    first, end = _extent(starts, group, pixels)
    n = (end - first).to(tl.float32)

    total, squares = _totals(sums, group, parts, c, channels, BLOCK_C)
    offset = total / n  # from the group's first pixel to the mean
    pixel = tl.load(x + first.to(tl.int64) * channels + c, mask=mask, other=0).to(tl.float32)
    mean = pixel + offset
    var = tl.maximum(squares / n - offset * offset, 0)
    invstd = 1 / tl.sqrt(var + eps)
    w = tl.load(weight + c, mask=mask)
    b = tl.load(bias + c, mask=mask)

    tl.store(stats + (groups * MEAN + group) * channels + c, mean, mask=mask)
    tl.store(stats + (groups * INVSTD + group) * channels + c, invstd, mask=mask)
    tl.store(stats + (groups * SCALE + group) * channels + c, w * invstd, mask=mask)
    tl.store(stats + (groups * BIAS + group) * channels + c, b, mask=mask)
    tl.store(stats + (groups * UNBIASED_VAR + group) * channels + c, var * n / (n - 1), mask=mask)


@kernel
def _normalise(
    x, residual, y, starts, stats, running_weights, mean, var, aux_mean, aux_var,
    pixels, channels, main_groups,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = ReLU((x - mean) * weight / std + bias + residual); moves the running statistics.

    Grid (channel blocks, parts, groups).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2)
    groups = tl.num_programs(2)
    side, low, high = _side(group, main_groups, groups)
    # One program per side and channel block: the first part of the side's first group, which starts
    # before the group's other parts. A side without groups has none: its statistics stay untouched.
    if (tl.program_id(1) == 0) & (group == low):
        if side == 1:
            mean = aux_mean
            var = aux_var
        _move_running_statistics(
            stats, running_weights, mean, var, low, high, groups, c, channels, BLOCK_C
        )  # fmt: skip

    center, scale, bias = _affine(stats, c, channels)
    first, end = _extent(starts, group, pixels)
    begin, stop = _share(first, end, BLOCK_P)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, channels, BLOCK_P)
        value = (tl.load(x + where, mask=mask, other=0).to(tl.float32) - center) * scale + bias
        if RESIDUAL:
            value += tl.load(residual + where, mask=mask, other=0).to(tl.float32)
        if RELU:
            value = tl.where(value < 0, 0, value)  # a NaN stays one
        tl.store(y + where, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _incoming(gy, x, y, where, mask, mean, scale, bias, RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    """(gradient before the ReLU, x - mean) of one tile, both 0 outside it."""
    g = tl.load(gy + where, mask=mask, other=0).to(tl.float32)
    d = tl.where(mask, tl.load(x + where, mask=mask, other=0).to(tl.float32) - mean, 0)
    if RELU:
        passed = d * scale + bias
        if RESIDUAL:
            passed = tl.load(y + where, mask=mask, other=0).to(tl.float32)
        g = tl.where(passed <= 0, 0, g)
    return g, d


@kernel
def _backward_sums(
    gy, x, y, starts, stats, sums, pixels, channels,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g and g (x - mean), g being the gradient before the ReLU. Grid (channel blocks,
    parts, groups).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, bias = _affine(stats, c, channels)
    first, end = _extent(starts, tl.program_id(2), pixels)
    begin, stop = _share(first, end, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    moment = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, channels, BLOCK_P)
        g, d = _incoming(gy, x, y, where, mask, mean, scale, bias, RESIDUAL, RELU)
        total += g
        moment += g * d
    _store_sums(sums, total, moment, c, channels)


@kernel
def _group_gradients(sums, stats, shares, channels, parts, BLOCK_C: tl.constexpr):
    """shares (2, groups, channels): what each group adds to the gradients of weight and bias.

    Sum of g (x - mean) / std, sum of g. Grid (channel blocks, groups).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    total, moment = _totals(sums, group, parts, c, channels, BLOCK_C)
    invstd = _of_group(stats, INVSTD, group, groups, c, channels)
    mask = c < channels
    tl.store(shares + (groups * WEIGHT_SHARE + group) * channels + c, moment * invstd, mask=mask)
    tl.store(shares + (groups * BIAS_SHARE + group) * channels + c, total, mask=mask)


@kernel
def _gradient(
    gy, x, y, gx, gresidual, starts, stats, shares, affine, pixels, channels, main_groups,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gx = weight / std (g - mean(g) - (x - mean) mean(g (x - mean)) / var); affine.

    affine (sides, 2, channels): gradients of weight and bias; a side without groups is not written.
    Grid (channel blocks, parts, groups).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2)
    groups = tl.num_programs(2)
    side, low, high = _side(group, main_groups, groups)
    if (tl.program_id(1) == 0) & (group == low):  # as in `_normalise`
        _sum_affine_gradients(shares, affine, side, low, high, groups, c, channels, BLOCK_C)

    mean, scale, bias = _affine(stats, c, channels)
    first, end = _extent(starts, group, pixels)
    n = (end - first).to(tl.float32)
    average = _of_group(shares, BIAS_SHARE, group, groups, c, channels) / n
    invstd = _of_group(stats, INVSTD, group, groups, c, channels)
    slope = _of_group(shares, WEIGHT_SHARE, group, groups, c, channels) * invstd / n
    begin, stop = _share(first, end, BLOCK_P)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, channels, BLOCK_P)
        g, d = _incoming(gy, x, y, where, mask, mean, scale, bias, RESIDUAL, RELU)
        tl.store(gx + where, (scale * (g - average - d * slope)).to(gx.dtype.element_ty), mask=mask)
        if RESIDUAL:
            tl.store(gresidual + where, g.to(gresidual.dtype.element_ty), mask=mask)


@functools.cache
def _cores(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


class GroupedBatchNorm(torch.autograd.Function):
    """Training-mode batch norm of every group, plus `residual` and ReLU where asked for; see
    `fap.nets.norm.DualBatchNorm2d`.
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
        starts: Tensor,  # int32 (groups + 1,): first row of each group, and B
        running_weights: Tensor,  # float32 (groups,); 0 leaves the running statistics alone
        main_groups: int,  # they come first
        rows: int,  # of the largest group
        eps: float,
        relu: bool,
    ) -> Tensor:
        assert residual is None or relu
        groups = len(running_weights)
        channels = x.shape[1]
        pixels = x.shape[2] * x.shape[3]
        # 64 channels in half precision are 128 bytes, one cache line.
        block_c = min(64, triton.next_power_of_2(channels))
        block_p = TILE // block_c
        blocks = triton.cdiv(channels, block_c)
        # The sums have just enough programs to fill the device, each with many tiles, so that few
        # partial sums are left to put together. The map has a program per tile.
        tiles = triton.cdiv(rows * pixels, block_p)
        parts = min(tiles, triton.cdiv(PROGRAMS_PER_CORE * _cores(x.device), blocks * groups))
        ctx.shape = pixels, channels, main_groups
        ctx.parts = parts
        ctx.sums_grid = blocks, parts, groups
        ctx.group_grid = triton.cdiv(channels, SLIVER), groups
        ctx.map_grid = blocks, min(tiles, MOST_MAP_PARTS), groups
        tile = {"BLOCK_P": block_p, "BLOCK_C": block_c}
        ctx.flags = tile | {"RESIDUAL": residual is not None, "RELU": relu}

        y = torch.empty_like(x, memory_format=torch.channels_last)
        stats = torch.empty((5, groups, channels), dtype=torch.float32, device=x.device)
        sums = torch.empty((groups, parts, 2, channels), dtype=torch.float32, device=x.device)
        _forward_sums[ctx.sums_grid](x, starts, sums, pixels, channels, **tile)
        _statistics[ctx.group_grid](
            x, sums, starts, weight, bias, aux_weight, aux_bias, stats,
            *ctx.shape, parts, eps, BLOCK_C=SLIVER,
        )  # fmt: skip
        _normalise[ctx.map_grid](
            x, x if residual is None else residual, y, starts, stats, running_weights, *running,
            *ctx.shape, **ctx.flags,
        )  # fmt: skip
        ctx.save_for_backward(x, x if residual is None else y, starts, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, starts, stats = ctx.saved_tensors
        pixels, channels, main_groups = ctx.shape
        groups = stats.shape[1]
        gy = gy.contiguous(memory_format=torch.channels_last)
        sums = stats.new_empty(groups, ctx.parts, 2, channels)
        shares = stats.new_empty(2, groups, channels)
        affine = stats.new_empty(2, 2, channels)
        gx = torch.empty_like(x, memory_format=torch.channels_last)
        gresidual = torch.empty_like(gx) if ctx.flags["RESIDUAL"] else None
        _backward_sums[ctx.sums_grid](gy, x, y, starts, stats, sums, pixels, channels, **ctx.flags)
        _group_gradients[ctx.group_grid](sums, stats, shares, channels, ctx.parts, BLOCK_C=SLIVER)
        _gradient[ctx.map_grid](
            gy, x, y, gx, gx if gresidual is None else gresidual, starts, stats, shares, affine,
            *ctx.shape, **ctx.flags,
        )  # fmt: skip
        # A side without groups gets no gradient: its row of `affine` was not written.
        main = affine[0] if main_groups else (None, None)
        aux = affine[1] if main_groups < groups else (None, None)
        return gx, gresidual, *main, *aux, *(None,) * 7
