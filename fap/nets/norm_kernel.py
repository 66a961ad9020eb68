"""Batch norm over groups of rows as Triton kernels, the group being a dimension of the grid.

Residual add and ReLU are part of it. A channels_last batch is a matrix of pixels x channels in
which a group is a range of pixels. Three launches normalise all groups and three differentiate
them, however many there are (`fap.nets.grouped_norm` launches them):

1. sums per (group, part, channel): `forward_sums`, `backward_sums`;
2. from these, statistics or sums per (group, channel): `statistics`, `group_gradients`;
3. the elementwise map: `normalise`, `gradient`. A few of its programs also sum over groups.

Running statistics and the gradients of weight and bias are sums over groups, and need step 2 of
every group. Programs of one launch cannot wait for each other, so these sums are made in step 3,
by one program per branch and channel block.

What waits for what: a pass is three dependent launches each way. In step 2 a program reads the
parts of its group PARTS_AT_ONCE at a time, each round waiting for the one before. On an H100 that
is one round where groups x channel blocks are 5 or more, and at most 5 (a single group of up to 64
channels). In step 3 the sums over groups add one round for every GROUPS_AT_ONCE groups of a branch.
So up to 16 groups a branch, more groups are not more rounds.

There are no atomics and every sum has a fixed order, so the same input gives the same bits.
Statistics are float32, taken about the group's first pixel so that nothing cancels.
Twin: `split` + `F.batch_norm` + `cat` + add + ReLU in `fap.nets.norm`.

Words
    pixel         a row of the matrix: all channels of one image at one place
    image_pixels  pixels of one image, H * W
    part          the share of a group's pixels that one program works through
    tile          what a program holds at a time, (BLOCK_P pixels, BLOCK_C channels)
    branch        0 main, 1 auxiliary: which parameters and running statistics a group has.
                  The groups of the main branch come first.
    c             the channels of a program, (BLOCK_C,). The last block may reach beyond n_channels,
                  hence the mask of every load and store.

Tables, contiguous, float32 but for `starts`
    starts           int32 (n_groups + 1,)  first row of each group, and the end of the last
    running_weights  (n_groups,)            see `running_weights` in `fap.nets.norm`
    sums             (n_groups, n_parts, 2, n_channels)  steps 1 -> 2, two sums of a part
    stats            (5, n_groups, n_channels)  forward steps 2 -> 3, and the whole backward
    shares           (2, n_groups, n_channels)  backward steps 2 -> 3
    affine           (2 branches, 2, n_channels)  gradients of weight and bias
"""

import triton
import triton.language as tl

# Triton compiles anew for an integer argument that is 1 or a multiple of 16. Only `n_channels`
# gains by it: loads of 16 bytes.
kernel = triton.jit(do_not_specialize=["image_pixels", "n_main", "n_parts"])

# A compiled kernel may use no other global of a module than a `tl.constexpr`.
PARTS_AT_ONCE = tl.constexpr(128)  # x the channels of a program of step 2, in registers
# x up to 64 channels in registers. The same for any groups, so nothing is compiled anew for others.
GROUPS_AT_ONCE = tl.constexpr(16)

# Rows of `stats`.
MEAN = tl.constexpr(0)
INVSTD = tl.constexpr(1)  # 1 / sqrt(biased variance + eps)
SCALE = tl.constexpr(2)  # weight * invstd
BIAS = tl.constexpr(3)
UNBIASED_VAR = tl.constexpr(4)  # what moves the running variance

# Rows of `shares`: what each group adds to the gradients of its branch.
WEIGHT_SHARE = tl.constexpr(0)
BIAS_SHARE = tl.constexpr(1)


# ---------------------------------------------------------------------- where things lie


@triton.jit
def _extent(starts, group, image_pixels):
    """(first, end): the group's first pixel, and the one after its last."""
    return tl.load(starts + group) * image_pixels, tl.load(starts + group + 1) * image_pixels


@triton.jit
def _part_extent(first, end, BLOCK_P: tl.constexpr):
    """(begin, stop): this program's part of the group's pixels [first, end), in whole tiles.

    The grid has as many parts as the largest group needs. In a smaller group the last parts may be
    empty: then `begin` is not below `stop`.
    """
    part = tl.program_id(1)
    n_parts = tl.num_programs(1)
    part_pixels = tl.cdiv(tl.cdiv(end - first, n_parts), BLOCK_P) * BLOCK_P
    return first + part * part_pixels, tl.minimum(first + (part + 1) * part_pixels, end)


@triton.jit
def _elements(at, stop, c, n_channels, BLOCK_P: tl.constexpr):
    """Offsets and mask of the tile that begins at pixel `at`, (BLOCK_P, BLOCK_C).

    A pixel's number fits 32 bits, an element's may not: a batch can have more than 2^31.
    """
    p = at + tl.arange(0, BLOCK_P)
    where = p[:, None].to(tl.int64) * n_channels + c[None, :]
    return where, (p < stop)[:, None] & (c < n_channels)[None, :]


@triton.jit
def _branch_of(group, n_main, n_groups):
    """(branch, low, high): a group's branch, and the groups [low, high) of that branch."""
    if group < n_main:
        branch = 0
        low = 0
        high = n_main
    else:
        branch = 1
        low = n_main
        high = n_groups
    return branch, low, high


# ---------------------------------------------------------------------- tables


@triton.jit
def _of_group(table, row, group, n_groups, c, n_channels):
    """One group's values in a row of a table (rows, n_groups, n_channels), (BLOCK_C,)."""
    return tl.load(table + (n_groups * row + group) * n_channels + c, mask=c < n_channels, other=0)


@triton.jit
def _of_groups(table, row, group, high, n_groups, c, n_channels):
    """As `_of_group` for a vector of groups, (len(group), BLOCK_C); 0 for groups from `high` on."""
    where = (n_groups * row + group)[:, None] * n_channels + c[None, :]
    return tl.load(table + where, mask=(group < high)[:, None] & (c < n_channels)[None, :], other=0)


@triton.jit
def _affine_map(stats, c, n_channels):
    """Mean, weight / std and bias of this program's group, (BLOCK_C,) each."""
    group = tl.program_id(2)
    n_groups = tl.num_programs(2)
    mean = _of_group(stats, MEAN, group, n_groups, c, n_channels)
    scale = _of_group(stats, SCALE, group, n_groups, c, n_channels)
    bias = _of_group(stats, BIAS, group, n_groups, c, n_channels)
    return mean, scale, bias


@triton.jit
def _store_sums(sums, a, b, c, n_channels):
    """Put the sums of `a` and `b` over this program's pixels into its row of `sums`.

    Each program writes a row of its own, so nothing has to be zeroed before and nothing is added
    by atomics. A program with an empty part writes zeros.
    """
    row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(sums + row * n_channels + c, tl.sum(a, 0), mask=c < n_channels)
    tl.store(sums + (row + 1) * n_channels + c, tl.sum(b, 0), mask=c < n_channels)


@triton.jit
def _totals(sums, group, n_parts, c, n_channels, BLOCK_C: tl.constexpr):
    """The two sums of a group over its parts, (BLOCK_C,) each."""
    # PARTS_AT_ONCE partial sums side by side, each over every PARTS_AT_ONCE-th part: the loads of
    # a round do not wait for each other.
    a = tl.zeros((PARTS_AT_ONCE, BLOCK_C), tl.float32)
    b = tl.zeros((PARTS_AT_ONCE, BLOCK_C), tl.float32)
    for at in range(0, n_parts, PARTS_AT_ONCE):
        part = at + tl.arange(0, PARTS_AT_ONCE)
        where = ((group * n_parts + part) * 2)[:, None] * n_channels + c[None, :]
        mask = (part < n_parts)[:, None] & (c < n_channels)[None, :]
        a += tl.load(sums + where, mask=mask, other=0)
        b += tl.load(sums + where + n_channels, mask=mask, other=0)  # the second of the two
    return tl.sum(a, 0), tl.sum(b, 0)


# ---------------------------------------------------------------------- sums over groups


@triton.jit
def _move_running_statistics(
    stats, running_weights, mean, var, low, high, n_groups, c, n_channels, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Move the running mean and variance of a branch by the statistics of its groups [low, high).

    r <- r + sum of w_i (s_i - r), the groups' averages one after another: see `running_weights` in
    `fap.nets.norm`. The groups are loaded at once, not one after another, so that this program does
    not end long after the others of its launch.
    """
    old_mean = tl.load(mean + c, mask=c < n_channels, other=0)
    old_var = tl.load(var + c, mask=c < n_channels, other=0)
    mean_step = tl.zeros((GROUPS_AT_ONCE, BLOCK_C), tl.float32)
    var_step = tl.zeros((GROUPS_AT_ONCE, BLOCK_C), tl.float32)
    weight_sum = tl.zeros((GROUPS_AT_ONCE,), tl.float32)
    for at in range(low, high, GROUPS_AT_ONCE):
        group = at + tl.arange(0, GROUPS_AT_ONCE)
        weight = tl.load(running_weights + group, mask=group < high, other=0)
        new_mean = _of_groups(stats, MEAN, group, high, n_groups, c, n_channels)
        new_var = _of_groups(stats, UNBIASED_VAR, group, high, n_groups, c, n_channels)
        w = weight[:, None]
        # Of a group with weight 0 not even a NaN gets in.
        mean_step += tl.where(w > 0, w * (new_mean - old_mean[None, :]), 0)
        var_step += tl.where(w > 0, w * (new_var - old_var[None, :]), 0)
        weight_sum += weight
    # Nothing is written where no group counts: another stream may be moving the same statistics.
    if tl.sum(weight_sum, 0) > 0:
        tl.store(mean + c, old_mean + tl.sum(mean_step, 0), mask=c < n_channels)
        tl.store(var + c, old_var + tl.sum(var_step, 0), mask=c < n_channels)


@triton.jit
def _sum_affine_gradients(
    shares, affine, branch, low, high, n_groups, c, n_channels, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Put the gradients of weight and bias of a branch into its two rows of `affine`.

    They are the sums of what its groups [low, high) add to them. The groups are loaded at once, as
    in `_move_running_statistics`.
    """
    weight = tl.zeros((GROUPS_AT_ONCE, BLOCK_C), tl.float32)
    bias = tl.zeros((GROUPS_AT_ONCE, BLOCK_C), tl.float32)
    for at in range(low, high, GROUPS_AT_ONCE):
        group = at + tl.arange(0, GROUPS_AT_ONCE)
        weight += _of_groups(shares, WEIGHT_SHARE, group, high, n_groups, c, n_channels)
        bias += _of_groups(shares, BIAS_SHARE, group, high, n_groups, c, n_channels)
    tl.store(affine + 2 * branch * n_channels + c, tl.sum(weight, 0), mask=c < n_channels)
    tl.store(affine + (2 * branch + 1) * n_channels + c, tl.sum(bias, 0), mask=c < n_channels)


# ---------------------------------------------------------------------- forward


@kernel
def forward_sums(
    x, starts, sums, image_pixels, n_channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Step 1: sums of x - k and (x - k)^2, k being the group's first pixel.

    Grid (channel blocks, parts, groups).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, end = _extent(starts, tl.program_id(2), image_pixels)
    begin, stop = _part_extent(first, end, BLOCK_P)
    # About any value of the channel the squares stay of the size of the variance. About 0 the
    # variance would be a small difference of large sums where the mean is large.
    k = tl.load(x + first.to(tl.int64) * n_channels + c, mask=c < n_channels, other=0)
    k = k.to(tl.float32)
    # Sums of whole tiles, reduced only once at the end.
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, n_channels, BLOCK_P)
        d = tl.where(mask, tl.load(x + where, mask=mask, other=0).to(tl.float32) - k, 0)
        total += d
        squares += d * d
    _store_sums(sums, total, squares, c, n_channels)


@kernel
def statistics(
    x, sums, starts, weight, bias, aux_weight, aux_bias, stats,
    image_pixels, n_channels, n_main, n_parts, eps, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Step 2: mean, 1 / std, weight / std, bias and unbiased variance of each group, into `stats`.

    Grid (channel blocks, groups).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < n_channels
    group = tl.program_id(1)
    n_groups = tl.num_programs(1)
    if group >= n_main:
        weight = aux_weight
        bias = aux_bias
    first, end = _extent(starts, group, image_pixels)
    n = (end - first).to(tl.float32)

    total, squares = _totals(sums, group, n_parts, c, n_channels, BLOCK_C)
    offset = total / n  # from the group's first pixel to the mean
    pixel = tl.load(x + first.to(tl.int64) * n_channels + c, mask=mask, other=0).to(tl.float32)
    mean = pixel + offset
    var = tl.maximum(squares / n - offset * offset, 0)  # rounding may take it below 0
    invstd = 1 / tl.sqrt(var + eps)
    w = tl.load(weight + c, mask=mask)
    b = tl.load(bias + c, mask=mask)

    # Weight and bias go along, so that step 3 finds all that a group needs in one table, whatever
    # its branch.
    tl.store(stats + (n_groups * MEAN + group) * n_channels + c, mean, mask=mask)
    tl.store(stats + (n_groups * INVSTD + group) * n_channels + c, invstd, mask=mask)
    tl.store(stats + (n_groups * SCALE + group) * n_channels + c, w * invstd, mask=mask)
    tl.store(stats + (n_groups * BIAS + group) * n_channels + c, b, mask=mask)
    tl.store(
        stats + (n_groups * UNBIASED_VAR + group) * n_channels + c, var * n / (n - 1), mask=mask
    )


@kernel
def normalise(
    x, residual, y, starts, stats, running_weights, mean, var, aux_mean, aux_var,
    image_pixels, n_channels, n_main,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Step 3: y = ReLU((x - mean) * weight / std + bias + residual); moves the running statistics.

    Grid (channel blocks, parts, groups). Without RESIDUAL, `residual` is not read.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2)
    n_groups = tl.num_programs(2)
    branch, low, high = _branch_of(group, n_main, n_groups)
    # One program per branch and channel block: the first part of the branch's first group, which
    # starts before the group's other parts. A branch without groups has none: its statistics stay
    # untouched.
    if (tl.program_id(1) == 0) & (group == low):
        if branch == 1:
            mean = aux_mean
            var = aux_var
        _move_running_statistics(
            stats, running_weights, mean, var, low, high, n_groups, c, n_channels, BLOCK_C
        )  # fmt: skip

    center, scale, bias = _affine_map(stats, c, n_channels)
    first, end = _extent(starts, group, image_pixels)
    begin, stop = _part_extent(first, end, BLOCK_P)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, n_channels, BLOCK_P)
        value = (tl.load(x + where, mask=mask, other=0).to(tl.float32) - center) * scale + bias
        if RESIDUAL:
            value += tl.load(residual + where, mask=mask, other=0).to(tl.float32)
        if RELU:
            value = tl.where(value < 0, 0, value)  # a NaN stays one
        tl.store(y + where, value.to(y.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------- backward


@triton.jit
def _incoming(gy, x, y, where, mask, mean, scale, bias, RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    """(gradient before the ReLU, x - mean) of one tile, both 0 outside it.

    Whether a value passed the ReLU is computed from x again, which is loaded anyway. With a
    residual that is not enough, so then the forward's output is read.
    """
    g = tl.load(gy + where, mask=mask, other=0).to(tl.float32)
    d = tl.where(mask, tl.load(x + where, mask=mask, other=0).to(tl.float32) - mean, 0)
    if RELU:
        passed = d * scale + bias
        if RESIDUAL:
            passed = tl.load(y + where, mask=mask, other=0).to(tl.float32)
        g = tl.where(passed <= 0, 0, g)
    return g, d


@kernel
def backward_sums(
    gy, x, y, starts, stats, sums, image_pixels, n_channels,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Step 1: sums of g and g (x - mean), g being the gradient before the ReLU.

    Grid (channel blocks, parts, groups). Without RESIDUAL, `y` is not read.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, bias = _affine_map(stats, c, n_channels)
    first, end = _extent(starts, tl.program_id(2), image_pixels)
    begin, stop = _part_extent(first, end, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    moment = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, n_channels, BLOCK_P)
        g, d = _incoming(gy, x, y, where, mask, mean, scale, bias, RESIDUAL, RELU)
        total += g
        moment += g * d
    _store_sums(sums, total, moment, c, n_channels)


@kernel
def group_gradients(sums, stats, shares, n_channels, n_parts, BLOCK_C: tl.constexpr):
    """Step 2: what each group adds to the gradients of weight and bias, into `shares`.

    Sum of g (x - mean) / std, sum of g. Grid (channel blocks, groups).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(1)
    n_groups = tl.num_programs(1)
    total, moment = _totals(sums, group, n_parts, c, n_channels, BLOCK_C)
    invstd = _of_group(stats, INVSTD, group, n_groups, c, n_channels)
    mask = c < n_channels
    tl.store(
        shares + (n_groups * WEIGHT_SHARE + group) * n_channels + c, moment * invstd, mask=mask
    )
    tl.store(shares + (n_groups * BIAS_SHARE + group) * n_channels + c, total, mask=mask)


@kernel
def gradient(
    gy, x, y, gx, gresidual, starts, stats, shares, affine, image_pixels, n_channels, n_main,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Step 3: gx = weight / std (g - mean(g) - (x - mean) mean(g (x - mean)) / var); `affine`.

    Grid (channel blocks, parts, groups). The rows of `affine` of a branch without groups are not
    written; without RESIDUAL, neither is `gresidual`, and `y` is not read.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(2)
    n_groups = tl.num_programs(2)
    branch, low, high = _branch_of(group, n_main, n_groups)
    if (tl.program_id(1) == 0) & (group == low):  # as in `normalise`
        _sum_affine_gradients(shares, affine, branch, low, high, n_groups, c, n_channels, BLOCK_C)

    mean, scale, bias = _affine_map(stats, c, n_channels)
    first, end = _extent(starts, group, image_pixels)
    n = (end - first).to(tl.float32)
    # The two means of the formula are the group's shares of the affine gradients over n. 1 / var
    # is 1 / std twice: once it is in the share already.
    average = _of_group(shares, BIAS_SHARE, group, n_groups, c, n_channels) / n
    invstd = _of_group(stats, INVSTD, group, n_groups, c, n_channels)
    slope = _of_group(shares, WEIGHT_SHARE, group, n_groups, c, n_channels) * invstd / n
    begin, stop = _part_extent(first, end, BLOCK_P)
    for at in range(begin, stop, BLOCK_P):
        where, mask = _elements(at, stop, c, n_channels, BLOCK_P)
        g, d = _incoming(gy, x, y, where, mask, mean, scale, bias, RESIDUAL, RELU)
        tl.store(gx + where, (scale * (g - average - d * slope)).to(gx.dtype.element_ty), mask=mask)
        if RESIDUAL:
            # The residual was added behind the affine map: its gradient is that before the ReLU.
            tl.store(gresidual + where, g.to(gresidual.dtype.element_ty), mask=mask)
