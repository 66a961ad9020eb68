"""`DualBatchNorm2d` against one plain `nn.BatchNorm2d` per group."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fap.nets.norm import Bn, DualBatchNorm2d, Group, NormState, momentum_of, running_weights

CHANNELS = 5
EPS = 1e-3
MOMENTUM = 0.3


def random_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS, eps=EPS, momentum=MOMENTUM).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    nn.init.uniform_(norm.running_mean, -1, 1)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    return norm


def dual() -> tuple[DualBatchNorm2d, dict[Bn, nn.BatchNorm2d]]:
    """A dual norm with different main and auxiliary sets, and plain copies of both."""
    plain: dict[Bn, nn.BatchNorm2d] = {"main": random_norm(), "aux": random_norm()}
    norm = DualBatchNorm2d(plain["main"], NormState(), aux=True).double()
    norm.load_state_dict(plain["main"].state_dict(), strict=False)  # in float64
    assert norm.aux is not None
    norm.aux.load_state_dict(plain["aux"].state_dict())
    return norm, plain


def per_channel(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (C, B * H * W)."""
    return x.transpose(0, 1).flatten(1)


# ---------------------------------------------------------------------- groups

# Passes of one step: (bn, rows of each group) per block. Groups of one norm over all passes are one
# sequence.
Blocks = list[tuple[Bn, list[int]]]
STEPS: dict[str, list[Blocks]] = {
    "one group": [[("main", [4])]],
    "vanilla": [[("main", [4, 4, 4])]],
    "sequential": [[("main", [6, 6])], [("aux", [3, 3])]],
    "fused": [[("main", [6, 6]), ("aux", [3, 3, 3, 3])], [("main", [6, 6])]],
    "joint": [[("main", [5] * 7), ("aux", [2] * 7)]],
    "uneven": [[("main", [3, 2]), ("aux", [7])], [("main", [4]), ("aux", [2, 5])]],
}
BRANCHES: tuple[Bn, ...] = ("main", "aux")


class Alone(NamedTuple):
    """A group's rows through the plain norm, as if they were alone."""

    x: Tensor
    y: Tensor
    gy: Tensor
    gx: Tensor
    gweight: Tensor
    gbias: Tensor


def alone(rows: int, plain: nn.BatchNorm2d) -> Alone:
    x = (torch.randn(rows, CHANNELS, 4, 3).double() * 3 + 2).requires_grad_()
    y = nn.functional.batch_norm(x, None, None, plain.weight, plain.bias, True, eps=EPS)
    gy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, plain.weight, plain.bias), gy)
    return Alone(x.detach(), y.detach(), gy, *gradients)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("passes", STEPS.values(), ids=STEPS)
def test_groups_equal_plain_norms(passes: list[Blocks], channels_last: bool) -> None:
    norm, plain = dual()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    calls = dict.fromkeys(BRANCHES, 0)
    for blocks in passes:
        for bn, rows in blocks:
            calls[bn] += len(rows)
    seen: dict[Bn, list[Alone]] = {"main": [], "aux": []}
    for blocks in passes:
        groups = []
        parts = []
        for bn, rows in blocks:
            for n in rows:
                groups.append(Group(bn, n, len(seen[bn]), calls[bn]))
                parts.append(alone(n, plain[bn]))
                seen[bn].append(parts[-1])
        norm.shared.groups = tuple(groups)
        x = torch.cat([part.x for part in parts])
        x = x.to(memory_format=memory_format, copy=True).requires_grad_()
        out = norm(x)
        assert out.is_contiguous(memory_format=memory_format)
        out.backward(torch.cat([part.gy for part in parts]))
        want = torch.cat([part.y for part in parts])
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
        gx = torch.cat([part.gx for part in parts])
        torch.testing.assert_close(x.grad, gx, rtol=1e-10, atol=1e-12)
    for bn, groups_of_bn in seen.items():
        check_branch(norm.branch(bn), plain[bn], groups_of_bn)


def check_branch(own: nn.BatchNorm2d, plain: nn.BatchNorm2d, groups: list[Alone]) -> None:
    """Gradients are sums over a branch's groups; running statistics moved once by their mean."""
    if not groups:
        assert own.weight.grad is None
        assert own.bias.grad is None
        assert torch.equal(own.running_mean, plain.running_mean)  # type: ignore[arg-type]
        assert torch.equal(own.running_var, plain.running_var)  # type: ignore[arg-type]
        return
    gweight = torch.stack([g.gweight for g in groups]).sum(0)
    gbias = torch.stack([g.gbias for g in groups]).sum(0)
    torch.testing.assert_close(own.weight.grad, gweight)
    torch.testing.assert_close(own.bias.grad, gbias)
    mean = torch.stack([per_channel(g.x).mean(1) for g in groups]).mean(0)
    var = torch.stack([per_channel(g.x).var(1, unbiased=True) for g in groups]).mean(0)
    assert plain.running_mean is not None
    assert plain.running_var is not None
    want_mean = (1 - MOMENTUM) * plain.running_mean + MOMENTUM * mean
    want_var = (1 - MOMENTUM) * plain.running_var + MOMENTUM * var
    torch.testing.assert_close(own.running_mean, want_mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(own.running_var, want_var, rtol=1e-13, atol=1e-14)


def test_rows_that_do_not_fill_the_groups_are_an_error() -> None:
    norm, _ = dual()
    norm.shared.groups = (Group("main", 4, 0, 1), Group("aux", 2, 0, 1))
    with pytest.raises(ValueError, match=r"7 rows(.|\n)*rows=4(.|\n)*set_groups"):
        norm(torch.randn(7, CHANNELS, 3, 3).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_groups_a_training_norm_is_the_plain_one(dtype: torch.dtype) -> None:
    norm, plain = dual()
    norm = norm.to(dtype)
    main = plain["main"].to(dtype)
    for rows in (1, 4, 9):  # whatever the batch
        x = torch.randn(rows, CHANNELS, 3, 2).to(dtype).requires_grad_()
        gy = torch.randn_like(x)
        want = torch.autograd.grad(main(x), (x, main.weight, main.bias), gy)
        got = torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), gy)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(norm(x), main(x))
    state = norm.state_dict()
    assert all(torch.equal(state[k], v) for k, v in main.state_dict().items())
    assert main.num_batches_tracked == 4
    assert norm.aux is not None
    aux = norm.aux.state_dict()
    assert all(torch.equal(aux[k], v.to(aux[k])) for k, v in plain["aux"].state_dict().items())


@pytest.mark.parametrize("bn", BRANCHES)
def test_eval_is_the_plain_norm_whatever_the_groups(bn: Bn) -> None:
    norm, plain = dual()
    norm.shared.groups = (Group("main", 4, 0, 1), Group("aux", 2, 0, 1))
    norm.shared.eval_bn = bn
    norm.eval()
    x = torch.randn(7, CHANNELS, 3, 3).double()
    assert torch.equal(norm(x), plain[bn].eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_float32_statistics(dtype: torch.dtype) -> None:
    plain = random_norm().float()
    norm = DualBatchNorm2d(plain, NormState(), aux=True)
    norm.shared.groups = (Group("main", 8, 0, 1), Group("aux", 4, 0, 2), Group("aux", 4, 1, 2))
    x = (torch.randn(16, CHANNELS, 6, 6) * 2 + 3).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype):
        out = norm(x)
    weight = plain.weight.double()
    bias = plain.bias.double()
    want = torch.cat([
        nn.functional.batch_norm(part, None, None, weight, bias, True, eps=plain.eps)
        for part in exact.split([8, 4, 4])
    ])  # fmt: skip
    assert out.dtype == dtype
    gy = torch.randn(out.shape).to(dtype)
    out.backward(gy)
    want.backward(gy.double())
    unit = torch.finfo(dtype).eps
    assert x.grad is not None
    assert exact.grad is not None
    assert (out.double() - want).abs().max() <= 2 * unit * want.abs().max()
    assert (x.grad.double() - exact.grad).abs().max() <= 4 * unit * exact.grad.abs().max()
    for own in (norm, norm.aux):
        assert own is not None
        assert own.running_mean is not None
        assert own.running_mean.dtype == own.weight.dtype == torch.float32
        assert own.weight.grad is not None
        assert own.weight.grad.isfinite().all()
    assert norm.running_mean is not None
    assert plain.running_mean is not None
    first_mean = per_channel(exact.detach()[:8]).mean(1)
    want_mean = (1 - MOMENTUM) * plain.running_mean.double() + MOMENTUM * first_mean
    torch.testing.assert_close(norm.running_mean.double(), want_mean, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- running statistics


@settings(max_examples=25, deadline=None)
@given(
    passes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    sequences=st.integers(1, 3),
    s=st.integers(0, 2**31),
)
def test_any_number_of_groups_over_any_passes_is_one_average_per_sequence(
    passes: list[int], sequences: int, s: int
) -> None:
    """However G groups are cut into forwards, they move the statistics once, by their mean."""
    torch.manual_seed(s)
    norm, plain = dual()
    mean = plain["aux"].running_mean
    var = plain["aux"].running_var
    total = sum(passes)
    for _ in range(sequences):
        call = 0
        statistics = []
        for count in passes:
            x = torch.randn(count * 3, CHANNELS, 2, 2).double()
            norm.shared.groups = tuple(Group("aux", 3, call + i, total) for i in range(count))
            norm(x)
            call += count
            statistics += [per_channel(part) for part in x.split(3)]
        assert mean is not None
        assert var is not None
        new_mean = torch.stack([part.mean(1) for part in statistics]).mean(0)
        new_var = torch.stack([part.var(1) for part in statistics]).mean(0)
        mean = (1 - MOMENTUM) * mean + MOMENTUM * new_mean
        var = (1 - MOMENTUM) * var + MOMENTUM * new_var
    assert norm.aux is not None
    torch.testing.assert_close(norm.aux.running_mean, mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(norm.aux.running_var, var, rtol=1e-12, atol=1e-13)
    assert torch.equal(norm.running_mean, plain["main"].running_mean)  # type: ignore[arg-type]


@given(
    momenta=st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), max_size=12),
    s=st.integers(0, 2**31),
)
def test_running_weights_equal_the_chain_of_momenta(momenta: list[float], s: int) -> None:
    """Against the chain in exact fractions; the weights are float64."""
    before, *statistics = np.random.default_rng(s).integers(-1000, 1000, len(momenta) + 1).tolist()
    want = Fraction(before)
    for momentum, statistic in zip(momenta, statistics, strict=True):
        want += Fraction(momentum) * (statistic - want)
    weights = running_weights(momenta)
    got = Fraction(before)
    for weight, statistic in zip(weights, statistics, strict=True):
        got += Fraction(weight) * (statistic - before)
    # A weight has at most 2 len(momenta) rounded factors, a statistic is at most 2,000 away, and
    # the weights sum to at most 1. The smallest weights may be subnormal.
    assert abs(got - want) <= 2000 * (2 * len(momenta) * 2**-53 + 1e-300)
    assert all(w == 0 for w, momentum in zip(weights, momenta, strict=True) if momentum == 0)


def test_the_groups_of_one_average_weigh_the_same() -> None:
    momenta = [momentum_of(MOMENTUM, Group("aux", 1, i, 7)) for i in range(7)]
    assert running_weights(momenta) == pytest.approx([MOMENTUM / 7] * 7, rel=1e-14)


@pytest.mark.parametrize("running", [False, True])
def test_groups_of_an_attack_leave_the_statistics_alone(running: bool) -> None:
    norm, plain = dual()
    norm.shared.groups = (Group("aux", 4, running=running),) * 2
    x = torch.randn(8, CHANNELS, 3, 3).double()
    out = norm(x)
    plain["aux"].train(not running)
    before = {k: v.clone() for k, v in plain["aux"].state_dict().items()}
    torch.testing.assert_close(out, torch.cat([plain["aux"](part) for part in x.split(4)]))
    own = norm.branch("aux").state_dict()
    assert all(torch.equal(own[k], v) for k, v in before.items())
