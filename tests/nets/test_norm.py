"""`DualBatchNorm2d` against one plain `nn.BatchNorm2d` per group."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from fap.config import Config
from fap.evaluate.exact import evaluate
from fap.nets.norm import (
    DualBatchNorm2d,
    Group,
    NormState,
    convert,
    evaluate_with,
    export,
    momentum_of,
    norm_state,
    norms,
    running_weights,
    set_groups,
)
from fap.nets.pretrained import load_plain
from fap.step.step import Step

CHANNELS = 5


pytestmark = pytest.mark.usefixtures("seed")


def random_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3).double()
    for value, low, high in (
        (norm.weight, 0.5, 2),
        (norm.bias, -1, 1),
        (norm.running_mean, -1, 1),
        (norm.running_var, 0.5, 2),
    ):
        nn.init.uniform_(value, low, high)
    return norm


def dual() -> tuple[DualBatchNorm2d, dict[str, nn.BatchNorm2d]]:
    """A dual norm with different main and auxiliary sets, and plain copies of both."""
    plain = {"main": random_norm(), "aux": random_norm()}
    norm = DualBatchNorm2d(plain["main"], NormState(), aux=True).double()
    norm.load_state_dict(plain["main"].state_dict(), strict=False)  # in float64
    assert norm.aux is not None
    norm.aux.load_state_dict(plain["aux"].state_dict())
    return norm, plain


def side(norm: DualBatchNorm2d, bn: str) -> nn.BatchNorm2d:
    return norm.branch("main" if bn == "main" else "aux")


# Passes of one step: (bn, rows of each group) per block. Groups of one norm over all passes are one
# sequence.
STEPS = {
    "one group": [[("main", [4])]],
    "vanilla": [[("main", [4, 4, 4])]],
    "sequential": [[("main", [6, 6])], [("aux", [3, 3])]],
    "fused": [[("main", [6, 6]), ("aux", [3, 3, 3, 3])], [("main", [6, 6])]],
    "joint": [[("main", [5] * 7), ("aux", [2] * 7)]],
    "uneven": [[("main", [3, 2]), ("aux", [7])], [("main", [4]), ("aux", [2, 5])]],
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("passes", STEPS.values(), ids=STEPS)
def test_groups_equal_plain_norms(
    passes: list[list[tuple[str, list[int]]]], channels_last: bool
) -> None:
    norm, plain = dual()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    calls = {
        bn: sum(len(rows) for blocks in passes for which, rows in blocks if which == bn)
        for bn in ("main", "aux")
    }
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"main": [], "aux": []}
    want_grad = {bn: [torch.zeros(CHANNELS).double() for _ in range(2)] for bn in ("main", "aux")}
    for blocks in passes:
        groups, parts = [], []
        for bn, rows in blocks:
            for n in rows:
                x = (torch.randn(n, CHANNELS, 4, 3).double() * 3 + 2).requires_grad_()
                y = nn.functional.batch_norm(
                    x, None, None, plain[bn].weight, plain[bn].bias, True, eps=1e-3
                )
                gy = torch.randn_like(y)
                gx, gw, gb = torch.autograd.grad(y, (x, plain[bn].weight, plain[bn].bias), gy)
                want_grad[bn][0] += gw
                want_grad[bn][1] += gb
                parts.append((x.detach(), y.detach(), gy, gx))
                groups.append(Group("main" if bn == "main" else "aux", n, len(seen[bn]), calls[bn]))
                flat = x.detach().transpose(0, 1).flatten(1)
                seen[bn].append((flat.mean(1), flat.var(1, unbiased=True)))
        norm.shared.groups = tuple(groups)
        x, y, gy, gx = (torch.cat(p) for p in zip(*parts, strict=True))
        x = x.to(memory_format=memory_format, copy=True).requires_grad_()
        out = norm(x)
        assert out.is_contiguous(memory_format=memory_format)
        out.backward(gy)
        assert x.grad is not None
        torch.testing.assert_close(out, y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(x.grad, gx, rtol=1e-10, atol=1e-12)
    for bn, statistics in seen.items():
        own = side(norm, bn)
        for i, value in enumerate((own.weight, own.bias)):
            torch.testing.assert_close(
                torch.zeros_like(value) if value.grad is None else value.grad, want_grad[bn][i]
            )
        for i, name in enumerate(("running_mean", "running_var")):
            before = getattr(plain[bn], name)
            want = (
                0.7 * before + 0.3 * torch.stack([s[i] for s in statistics]).mean(0)
                if statistics
                else before
            )
            torch.testing.assert_close(getattr(own, name), want, rtol=1e-13, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 2**31)
)
def test_any_number_of_groups_over_any_passes_is_one_average_per_sequence(
    passes: list[int], sequences: int, s: int
) -> None:
    """A sequence of G groups, however it is cut into forwards, moves the statistics once by their
    mean.
    """
    torch.manual_seed(s)
    norm, plain = dual()
    mean, var, total = plain["aux"].running_mean, plain["aux"].running_var, sum(passes)
    for _ in range(sequences):
        call, statistics = 0, []
        for count in passes:
            x = torch.randn(count * 3, CHANNELS, 2, 2).double()
            norm.shared.groups = tuple(Group("aux", 3, call + i, total) for i in range(count))
            norm(x)
            call += count
            statistics += [g.transpose(0, 1).flatten(1) for g in x.split(3)]
        assert mean is not None
        assert var is not None
        mean = 0.7 * mean + 0.3 * torch.stack([g.mean(1) for g in statistics]).mean(0)
        var = 0.7 * var + 0.3 * torch.stack([g.var(1) for g in statistics]).mean(0)
    assert norm.aux is not None
    torch.testing.assert_close(norm.aux.running_mean, mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(norm.aux.running_var, var, rtol=1e-12, atol=1e-13)
    assert torch.equal(norm.running_mean, plain["main"].running_mean)  # type: ignore[arg-type]


@given(
    st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), max_size=12), st.integers(0, 2**31)
)  # fmt: skip
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
    momenta = [momentum_of(0.3, Group("aux", 1, i, 7)) for i in range(7)]
    assert running_weights(momenta) == pytest.approx([0.3 / 7] * 7, rel=1e-14)


@pytest.mark.parametrize("running", [False, True])
def test_groups_of_an_attack_leave_the_statistics_alone(running: bool) -> None:
    norm, plain = dual()
    norm.shared.groups = (Group("aux", 4, running=running),) * 2
    x = torch.randn(8, CHANNELS, 3, 3).double()
    out = norm(x)
    plain["aux"].train(not running)
    before = {k: v.clone() for k, v in plain["aux"].state_dict().items()}
    torch.testing.assert_close(out, torch.cat([plain["aux"](part) for part in x.split(4)]))
    own = side(norm, "aux").state_dict()
    assert all(torch.equal(own[k], v) for k, v in before.items())


@pytest.mark.parametrize("bn", ["main", "aux"])
def test_eval_is_the_plain_norm_whatever_the_groups(bn: str) -> None:
    norm, plain = dual()
    norm.shared.groups = (Group("main", 4, 0, 1), Group("aux", 2, 0, 1))
    norm.shared.eval_bn = "main" if bn == "main" else "aux"
    norm.eval()
    x = torch.randn(7, CHANNELS, 3, 3).double()
    assert torch.equal(norm(x), plain[bn].eval()(x))


def test_rows_that_do_not_fill_the_groups_are_an_error() -> None:
    norm, _ = dual()
    norm.shared.groups = (Group("main", 4, 0, 1), Group("aux", 2, 0, 1))
    with pytest.raises(ValueError, match=r"7 rows(.|\n)*rows=4(.|\n)*set_groups"):
        norm(torch.randn(7, CHANNELS, 3, 3).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_float32_statistics(dtype: torch.dtype) -> None:
    plain = random_norm().float()
    norm = DualBatchNorm2d(plain, NormState(), aux=True)
    norm.shared.groups = (Group("main", 8, 0, 1), Group("aux", 4, 0, 2), Group("aux", 4, 1, 2))
    x = (torch.randn(16, CHANNELS, 6, 6) * 2 + 3).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype):
        out = norm(x)
    want = torch.cat([
        nn.functional.batch_norm(part, None, None, plain.weight.double(), plain.bias.double(), True, eps=plain.eps)
        for part in exact.split([8, 4, 4])
    ])  # fmt: skip
    assert out.dtype == dtype
    gy = torch.randn(out.shape).to(dtype)
    out.backward(gy)
    want.backward(gy.double())
    step = torch.finfo(dtype).eps
    assert x.grad is not None
    assert exact.grad is not None
    assert (out.double() - want).abs().max() <= 2 * step * want.abs().max()
    assert (x.grad.double() - exact.grad).abs().max() <= 4 * step * exact.grad.abs().max()
    for own in (norm, norm.aux):
        assert own is not None
        assert own.running_mean is not None
        assert own.running_mean.dtype == own.weight.dtype == torch.float32
        assert own.weight.grad is not None
        assert own.weight.grad.isfinite().all()
    first = exact.detach()[:8].transpose(0, 1).flatten(1)
    assert plain.running_mean is not None
    torch.testing.assert_close(
        norm.running_mean.double(),
        0.7 * plain.running_mean.double() + 0.3 * first.mean(1),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_groups_a_training_norm_is_the_plain_one(dtype: torch.dtype) -> None:
    norm, plain = dual()
    norm, main = norm.to(dtype), plain["main"].to(dtype)
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
    assert all(
        torch.equal(norm.aux.state_dict()[k], v.to(norm.aux.state_dict()[k]))
        for k, v in plain["aux"].state_dict().items()
    )


def test_no_groups_is_also_what_set_groups_of_nothing_goes_back_to() -> None:
    model = convert(small_model())
    set_groups(model, [Group("main", 2, 0, 1)])
    x = torch.randn(5, 3, 6, 6)
    with pytest.raises(ValueError, match="5 rows"):
        model(x)
    assert all(n.num_batches_tracked == 0 for n in norms(model))
    set_groups(model, ())
    model(x)
    assert all(n.num_batches_tracked == 1 for n in norms(model))


def small_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    )


def test_convert_keeps_names_and_export_undoes_it() -> None:
    plain = small_model()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    model = convert(plain)
    converted = model.state_dict()
    assert set(state) == {k for k in converted if ".aux." not in k}
    assert all(torch.equal(converted[k.replace(".aux.", ".")], v) for k, v in converted.items())
    assert len(norms(model)) == 2
    assert all(n.shared is norm_state(model) for n in norms(model))
    out = export(converted, steps=7)
    assert out.keys() == state.keys()
    assert all(v == 7 for k, v in out.items() if k.endswith("num_batches_tracked"))
    small_model().load_state_dict(out, strict=True)


def test_export_without_steps_keeps_what_was_counted() -> None:
    model = convert(small_model())
    for _ in range(3):
        model(torch.randn(2, 3, 6, 6))
    assert [
        v.item() for k, v in export(model.state_dict()).items() if k.endswith("num_batches_tracked")
    ] == [3, 3]
    set_groups(model, [Group("main", 2, 0, 1)])
    model(torch.randn(2, 3, 6, 6))  # in groups nothing is counted
    assert [
        v.item() for k, v in export(model.state_dict()).items() if k.endswith("num_batches_tracked")
    ] == [3, 3]


def test_export_keeps_names_that_only_look_auxiliary() -> None:
    """A model may have a module of its own that is called aux."""
    model = nn.ModuleDict(
        {"aux": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "fc": nn.Linear(4, 2)}
    )
    names = set(model.state_dict())
    assert set(export(convert(model).state_dict())) == names


def test_a_root_that_is_a_norm_exports() -> None:
    norm, _ = dual()
    assert set(export(norm.state_dict())) == set(random_norm().state_dict())


def test_conversion_keeps_the_mode_and_timm_activation() -> None:
    model = small_model().eval()
    x = torch.randn(2, 3, 6, 6)
    want = model(x)
    assert torch.equal(convert(model)(x), want)
    assert all(not n.training and n.aux is not None and not n.aux.training for n in norms(model))
    set_groups(model.train(), [Group("main", 1, 0, 1), Group("aux", 1, 0, 1)])
    model(x)
    assert not torch.equal(norms(model)[0].running_mean, norms(model)[0].aux.running_mean)  # type: ignore[union-attr,arg-type]


def test_without_auxiliary_norms() -> None:
    model = convert(small_model(), aux=False)
    assert not any(".aux." in k for k in model.state_dict())
    set_groups(model, [Group("main", 2, i, 2) for i in range(2)])
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="aux"), evaluate_with(model, "aux"):
        pass


class OtherBatchNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "norm", [OtherBatchNorm(4), nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4), nn.LazyBatchNorm2d()],
    ids=lambda n: type(n).__name__,
)  # fmt: skip
def test_unknown_batch_norms_are_refused(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), norm)
    with pytest.raises(ValueError, match=type(norm).__name__):
        convert(model)


SYNCHRONISERS = {
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm": timm.layers.convert_sync_batchnorm,
}
USES: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda model: model(torch.randn(2, 3, 6, 6)),
    "forward in evaluation": lambda model: model.eval()(torch.randn(2, 3, 6, 6)),
    "set_groups": lambda model: set_groups(model, [Group("main", 2, 0, 1)]),
    "norm_state": norm_state,
    "evaluate_with": lambda model: evaluate_with(model, "main").__enter__(),
    "evaluate": lambda model: evaluate(model, [], mean=(0.5,) * 3, std=(0.5,) * 3),
    "Step": lambda model: Step(model, Config()),
    "load_plain": lambda model: load_plain(model, small_model().state_dict()),
}


@pytest.mark.parametrize("aux", [True, False])
@pytest.mark.parametrize("synchronise", SYNCHRONISERS.values(), ids=SYNCHRONISERS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_converted_model_whose_norms_became_synchronised_is_refused(
    use: Callable[[nn.Module], object], synchronise: Callable[[nn.Module], nn.Module], aux: bool
) -> None:
    model = synchronise(convert(small_model(), aux=aux))
    with pytest.raises(
        ValueError, match=r"SyncBatchNorm(.|\n)*after `convert`(.|\n)*method\.group"
    ):
        use(model)


@pytest.mark.parametrize("synchronise", SYNCHRONISERS.values(), ids=SYNCHRONISERS)
def test_synchronised_norms_are_refused_before_the_conversion(
    synchronise: Callable[[nn.Module], nn.Module],
) -> None:
    with pytest.raises(ValueError, match=r"SyncBatchNorm(.|\n)*convert_sync_batchnorm out"):
        convert(synchronise(small_model()))


def test_a_plain_model_with_synchronised_norms_is_nobodys_mistake() -> None:
    for synchronise in SYNCHRONISERS.values():
        assert norms(synchronise(small_model())) == []


@pytest.mark.parametrize(
    "use", [norm_state, lambda model: set_groups(model, ())], ids=["norm_state", "set_groups"]
)
def test_a_plain_model_has_no_groups(use: Callable[[nn.Module], object]) -> None:
    with pytest.raises(
        ValueError, match=r"Sequential has no dual batch norms; fap\.nets\.norm\.convert"
    ):
        use(small_model())


@pytest.mark.parametrize(
    "kwargs", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_norms_without_what_the_method_needs_are_refused(kwargs: dict[str, bool | None]) -> None:
    with pytest.raises(ValueError, match="affine"):
        convert(nn.Sequential(nn.BatchNorm2d(4, **kwargs)))  # type: ignore[arg-type]


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch norm"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)))
