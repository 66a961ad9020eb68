"""Batch norm over row groups as Triton kernels with the group as a grid dimension; residual add and ReLU included.

A channels_last batch is a matrix of pixels x channels in which a group is a range of pixels. Three launches normalise
all groups and three differentiate them, however many there are: partial sums per (group, part, channel), from these
the statistics or coefficients per (group, channel), then the elementwise map. There are no atomics, so the same input
gives the same bits. Statistics are float32, taken about the group's first pixel so that nothing cancels.
Twin: `split` + `F.batch_norm` + `cat` + add + ReLU in `fap.norm`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# An integer that is 1 or a multiple of 16 would be compiled for anew; only `channels` gains by it, as wider loads.
kernel = triton.jit(do_not_specialize=["pixels", "main_groups", "groups", "parts"])
TILE = 4096  # elements that a program of 128 threads holds at a time
PROGRAMS_PER_CORE = 4
SLIVER = 16  # channels of a program that puts sums together


@triton.jit
def _share(starts, pixels, BLOCK_P: tl.constexpr):
    """(first, begin, stop): the first pixel of this program's group, and the range of pixels that is the program's."""
    part, parts, group = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    first, end = tl.load(starts + group) * pixels, tl.load(starts + group + 1) * pixels
    share = tl.cdiv(tl.cdiv(end - first, parts), BLOCK_P) * BLOCK_P
    return first, first + part * share, tl.minimum(first + (part + 1) * share, end)


@triton.jit
def _elements(at, stop, c, channels, BLOCK_P: tl.constexpr):
    """Offsets and mask of the tile that begins at pixel `at`, (BLOCK_P, BLOCK_C)."""
    p = at + tl.arange(0, BLOCK_P)
    return p[:, None].to(tl.int64) * channels + c[None, :], (p < stop)[:, None] & (c < channels)[None, :]


@triton.jit
def _per_channel(table, k, group, groups, c, channels):
    return tl.load(table + (k * groups + group) * channels + c, mask=c < channels, other=0)


@triton.jit
def _affine(stats, c, channels):
    """Mean, weight / std and bias of this program's group."""
    group, groups = tl.program_id(2), tl.num_programs(2)
    mean, scale = _per_channel(stats, 0, group, groups, c, channels), _per_channel(stats, 2, group, groups, c, channels)
    return mean, scale, _per_channel(stats, 3, group, groups, c, channels)


@triton.jit
def _totals(sums, group, parts, c, channels, BLOCK_C: tl.constexpr):
    """The two sums of a group over all its parts, 128 parts at a time."""
    a = tl.zeros((128, BLOCK_C), tl.float32)
    b = tl.zeros((128, BLOCK_C), tl.float32)
    for at in range(0, parts, 128):
        part = at + tl.arange(0, 128)
        where = ((group * parts + part) * 2)[:, None] * channels + c[None, :]
        mask = (part < parts)[:, None] & (c < channels)[None, :]
        a += tl.load(sums + where, mask=mask, other=0)
        b += tl.load(sums + where + channels, mask=mask, other=0)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _store_sums(sums, a, b, c, channels):
    row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(sums + row * channels + c, tl.sum(a, 0), mask=c < channels)
    tl.store(sums + (row + 1) * channels + c, tl.sum(b, 0), mask=c < channels)


@kernel
def _forward_sums(x, starts, sums, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of x - k and (x - k)^2, k being the group's first pixel. Grid (channel blocks, parts, groups)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, begin, stop = _share(starts, pixels, BLOCK_P)
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
    x, sums, starts, momenta, weight, bias, mean, var, aux_weight, aux_bias, aux_mean, aux_var, stats,
    pixels, channels, main_groups, groups, parts, eps, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """stats (4, groups, channels): mean, 1 / std, weight / std, bias; moves the running statistics.

    Grid (channel blocks, sides): side 0 is the main norm, whose groups come first, side 1 the auxiliary one.
    """
    c, side = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1)
    if side == 1:
        weight, bias, mean, var = aux_weight, aux_bias, aux_mean, aux_var
    low, high = side * main_groups, main_groups + side * (groups - main_groups)
    mask = (c < channels) & (low < high)  # a norm without groups is left alone: another stream may be updating it
    w, b = tl.load(weight + c, mask=mask), tl.load(bias + c, mask=mask)
    running_mean, running_var = tl.load(mean + c, mask=mask), tl.load(var + c, mask=mask)
    for g in range(low, high):
        first = tl.load(starts + g) * pixels
        n = (tl.load(starts + g + 1) * pixels - first).to(tl.float32)
        total, squares = _totals(sums, g, parts, c, channels, BLOCK_C)
        offset = total / n
        m = tl.load(x + first.to(tl.int64) * channels + c, mask=mask, other=0).to(tl.float32) + offset
        v = tl.maximum(squares / n - offset * offset, 0)
        invstd = 1 / tl.sqrt(v + eps)
        out = stats + g * channels + c
        tl.store(out, m, mask=mask)
        tl.store(out + groups * channels, invstd, mask=mask)
        tl.store(out + 2 * groups * channels, w * invstd, mask=mask)
        tl.store(out + 3 * groups * channels, b, mask=mask)
        momentum = tl.load(momenta + g)  # 0: not even a NaN gets in
        running_mean = tl.where(momentum > 0, running_mean + momentum * (m - running_mean), running_mean)
        running_var = tl.where(momentum > 0, running_var + momentum * (v * n / (n - 1) - running_var), running_var)
    tl.store(mean + c, running_mean, mask=mask)
    tl.store(var + c, running_var, mask=mask)


@kernel
def _normalise(
    x, residual, y, starts, stats, pixels, channels,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = ReLU((x - mean) * weight / std + bias + residual). Grid (channel blocks, parts, groups)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, bias = _affine(stats, c, channels)
    _, begin, stop = _share(starts, pixels, BLOCK_P)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, channels, BLOCK_P)
        value = (tl.load(x + where, mask=mask, other=0).to(tl.float32) - mean) * scale + bias
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
    """Sums of g and g (x - mean), g being the gradient before the ReLU. Grid (channel blocks, parts, groups)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, bias = _affine(stats, c, channels)
    _, begin, stop = _share(starts, pixels, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    moment = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, channels, BLOCK_P)
        g, d = _incoming(gy, x, y, where, mask, mean, scale, bias, RESIDUAL, RELU)
        total += g
        moment += g * d
    _store_sums(sums, total, moment, c, channels)


@kernel
def _coefficients(
    sums, starts, stats, coefficients, affine, pixels, channels, main_groups, groups, parts, BLOCK_C: tl.constexpr
):  # fmt: skip
    """coefficients (2, groups, channels): means of g and of g (x - mean) / var; affine (sides, 2, channels): gradients
    of weight and bias. Grid (channel blocks, sides)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask, side = c < channels, tl.program_id(1)
    weight = tl.zeros((BLOCK_C,), tl.float32)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    for g in range(side * main_groups, main_groups + side * (groups - main_groups)):
        n = ((tl.load(starts + g + 1) - tl.load(starts + g)) * pixels).to(tl.float32)
        total, moment = _totals(sums, g, parts, c, channels, BLOCK_C)
        invstd = _per_channel(stats, 1, g, groups, c, channels)
        tl.store(coefficients + g * channels + c, total / n, mask=mask)
        tl.store(coefficients + (groups + g) * channels + c, moment * invstd * invstd / n, mask=mask)
        weight += moment * invstd
        bias += total
    tl.store(affine + 2 * side * channels + c, weight, mask=mask)
    tl.store(affine + (2 * side + 1) * channels + c, bias, mask=mask)


@kernel
def _gradient(
    gy, x, y, gx, gresidual, starts, stats, coefficients, pixels, channels,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gx = weight / std (g - mean(g) - (x - mean) mean(g (x - mean)) / var). Grid (channel blocks, parts, groups)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, bias = _affine(stats, c, channels)
    average = _per_channel(coefficients, 0, tl.program_id(2), tl.num_programs(2), c, channels)
    slope = _per_channel(coefficients, 1, tl.program_id(2), tl.num_programs(2), c, channels)
    _, begin, stop = _share(starts, pixels, BLOCK_P)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, channels, BLOCK_P)
        g, d = _incoming(gy, x, y, where, mask, mean, scale, bias, RESIDUAL, RELU)
        tl.store(gx + where, (scale * (g - average - d * slope)).to(gx.dtype.element_ty), mask=mask)
        if RESIDUAL:
            tl.store(gresidual + where, g.to(gresidual.dtype.element_ty), mask=mask)


@functools.cache
def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class GroupedBatchNorm(torch.autograd.Function):
    """Training-mode batch norm of every group, plus `residual` and ReLU where asked for; see `fap.norm.DualBatchNorm2d`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, C, H, W), channels_last; float16, bfloat16 or float32
        residual: Tensor | None,  # as x; only with relu
        weight: Tensor,  # float32 (C,), as the next three; the auxiliary ones are the main ones where there are none
        bias: Tensor,
        aux_weight: Tensor,
        aux_bias: Tensor,
        running: tuple[Tensor, ...],  # mean, var, auxiliary mean, auxiliary var, updated in place
        starts: Tensor,  # int32 (groups + 1,): first row of each group, and B
        momenta: Tensor,  # float32 (groups,); 0 leaves the running statistics alone
        main_groups: int,  # they come first
        rows: int,  # of the largest group
        eps: float,
        relu: bool,
    ) -> Tensor:
        assert residual is None or relu
        groups, channels, pixels = len(momenta), x.shape[1], x.shape[2] * x.shape[3]
        block_c = min(64, triton.next_power_of_2(channels))
        blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(rows * pixels, TILE // block_c)
        parts = min(tiles, triton.cdiv(PROGRAMS_PER_CORE * _cores(x.device), blocks * groups))
        ctx.shape = pixels, channels, main_groups, groups, parts
        ctx.sides = triton.cdiv(channels, SLIVER), 1 if main_groups == groups else 2
        ctx.sums, ctx.map = (blocks, parts, groups), (blocks, min(tiles, 1 << 14), groups)
        tile = {"BLOCK_P": TILE // block_c, "BLOCK_C": block_c}
        ctx.flags = tile | {"RESIDUAL": residual is not None, "RELU": relu}

        y = torch.empty_like(x, memory_format=torch.channels_last)
        stats = torch.empty((4, groups, channels), dtype=torch.float32, device=x.device)
        sums = torch.empty((groups, parts, 2, channels), dtype=torch.float32, device=x.device)
        _forward_sums[ctx.sums](x, starts, sums, pixels, channels, **tile)
        mean, var, aux_mean, aux_var = running
        _statistics[ctx.sides](
            x, sums, starts, momenta, weight, bias, mean, var, aux_weight, aux_bias, aux_mean, aux_var, stats,
            *ctx.shape, eps, BLOCK_C=SLIVER,
        )  # fmt: skip
        _normalise[ctx.map](x, x if residual is None else residual, y, starts, stats, pixels, channels, **ctx.flags)
        ctx.save_for_backward(x, x if residual is None else y, starts, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, starts, stats = ctx.saved_tensors
        pixels, channels, main_groups, groups, parts = ctx.shape
        gy = gy.contiguous(memory_format=torch.channels_last)
        sums, coefficients = stats.new_empty(groups, parts, 2, channels), torch.empty_like(stats[:2])
        affine = stats.new_empty(2, 2, channels)
        gx = torch.empty_like(x, memory_format=torch.channels_last)
        gresidual = torch.empty_like(gx) if ctx.flags["RESIDUAL"] else None
        _backward_sums[ctx.sums](gy, x, y, starts, stats, sums, pixels, channels, **ctx.flags)
        _coefficients[ctx.sides](sums, starts, stats, coefficients, affine, *ctx.shape, BLOCK_C=SLIVER)
        _gradient[ctx.map](
            gy, x, y, gx, gx if gresidual is None else gresidual, starts, stats, coefficients, pixels, channels, **ctx.flags
        )
        main = affine[0] if main_groups else (None, None)
        aux = affine[1] if main_groups < groups else (None, None)
        return gx, gresidual, *main, *aux, *(None,) * 7
