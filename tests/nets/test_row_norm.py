"""Dual norms without batch statistics, and batch norms of (B * N, C): against plain norms."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import timm.layers
import torch
from timm.layers import evo_norm, filter_response_norm, norm_act
from torch import Tensor, nn

from fap.nets.dual import convert, evaluate_with, export, norm_state, norms, set_groups
from fap.nets.norm import DualBatchNorm, Group
from fap.nets.pretrained import load_plain
from fap.nets.row_norm import RowNorm
from tests.nets.conftest import randomise_norms

IMAGES = (6, 8, 4, 3)  # of 6 rows
TOKENS = (6, 5, 8)


class WithActivation(nn.LayerNorm):
    """A library's own, which does more than its base."""

    def __init__(self) -> None:
        super().__init__(8)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


ROW_NORMS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "LayerNorm": (nn.LayerNorm(8), TOKENS),
    "LayerNorm without bias": (nn.LayerNorm(8, bias=False), TOKENS),
    "GroupNorm": (nn.GroupNorm(2, 8), IMAGES),
    "RMSNorm": (nn.RMSNorm(8), TOKENS),
    "InstanceNorm1d": (nn.InstanceNorm1d(5, affine=True), TOKENS),
    "InstanceNorm2d": (nn.InstanceNorm2d(8, affine=True), IMAGES),
    "timm LayerNorm": (timm.layers.LayerNorm(8), TOKENS),
    "timm LayerNorm2d": (timm.layers.LayerNorm2d(8), IMAGES),
    "timm GroupNorm1": (timm.layers.GroupNorm1(8), IMAGES),
    "timm RmsNorm": (timm.layers.RmsNorm(8), TOKENS),
    "timm RmsNorm2d": (timm.layers.RmsNorm2d(8), IMAGES),
    "timm SimpleNorm": (timm.layers.SimpleNorm(8), TOKENS),
    "GroupNormAct": (norm_act.GroupNormAct(8, 2), IMAGES),
    "LayerNormAct": (norm_act.LayerNormAct(8, act_layer=nn.GELU), TOKENS),
    "LayerNormAct2d": (norm_act.LayerNormAct2d(8), IMAGES),
    "EvoNorm2dS0": (evo_norm.EvoNorm2dS0(8, group_size=4), IMAGES),
    "FilterResponseNormTlu2d": (filter_response_norm.FilterResponseNormTlu2d(8), IMAGES),
    "a subclass": (WithActivation(), TOKENS),
}
every_norm = pytest.mark.parametrize("name", ROW_NORMS)
GROUPS = [Group("main", 2, 0, 1), Group("aux", 1, 0, 2), Group("aux", 1, 1, 2), Group("main", 2)]


def dual_and_plain(name: str) -> tuple[nn.Module, RowNorm, list[nn.Module], Tensor]:
    """A model of one norm, the norm, plain ones with main and auxiliary values, an input."""
    norm, shape = ROW_NORMS[name]
    plain = [copy.deepcopy(norm).double() for _ in range(2)]
    for one in plain:
        randomise_norms(nn.Sequential(one))
    model = convert(nn.Sequential(copy.deepcopy(norm))).double()
    (dual,) = norms(model)
    assert isinstance(dual, RowNorm)
    assert isinstance(dual, type(norm)), "code that asks for the class finds it"
    load_plain(model, {f"0.{k}": v for k, v in plain[0].state_dict().items()})
    assert dual.aux is not None
    assert type(dual.aux) is type(norm)
    assert all(torch.equal(v, plain[0].state_dict()[k]) for k, v in dual.aux.state_dict().items())
    dual.aux.load_state_dict(plain[1].state_dict())
    return model, dual, plain, torch.randn(shape).double()


@every_norm
@pytest.mark.parametrize("times", [1, 3])
def test_groups_equal_plain_norms_in_values_and_gradients(name: str, times: int) -> None:
    """`times`: so many rows of the input, one after the other, are of one image."""
    model, dual, (main, aux), x = dual_and_plain(name)
    x = x.repeat_interleave(times, 0) + torch.randn(6 * times, *x.shape[1:]).double()
    set_groups(model.train(), GROUPS)
    norm_state(model).multiples = True
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ours = model(inputs[0])
    n = 2 * times
    parts = inputs[1].split([n, n, n])
    theirs = torch.cat([main(parts[0]), aux(parts[1]), main(parts[2])])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gy = torch.randn_like(ours)
    ours.backward(gy)
    theirs.backward(gy)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    for part, plain in ((dual, main), (dual.aux, aux)):
        assert part is not None
        own = dict(part.named_parameters())
        for key, parameter in plain.named_parameters():
            torch.testing.assert_close(own[key].grad, parameter.grad, rtol=1e-12, atol=1e-12)
    assert len(dual.main_parameters()) == len([*main.parameters()])


@every_norm
def test_evaluation_and_training_without_groups(name: str) -> None:
    model, _, (main, aux), x = dual_and_plain(name)
    assert torch.equal(model.train()(x), main(x))
    set_groups(model, GROUPS)
    assert torch.equal(model.eval()(x), main.eval()(x)), "groups are those of training"
    with evaluate_with(model, "aux"):
        assert torch.equal(model(x), aux.eval()(x))
    set_groups(model.train(), [Group("main", 2, 0, 2), Group("main", 4, 1, 2)])
    assert torch.equal(model(x), main.train()(x)), "neighbours of one kind are not divided"


@every_norm
def test_names_copies_and_export(name: str) -> None:
    model, _, plain, x = dual_and_plain(name)
    set_groups(model.train(), GROUPS)
    out = model(x)
    own = {f"0.{k}": v for k, v in plain[0].state_dict().items()}
    exported = export(model.state_dict(), steps=3)
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[k], v) for k, v in own.items())
    exported = export(model.state_dict(), steps=3, bn="aux")
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[f"0.{k}"], v) for k, v in plain[1].state_dict().items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), out)
        assert norms(other)[0].shared is norm_state(other) is not norm_state(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again: Any = torch.load(file, weights_only=True)
    assert again.keys() == model.state_dict().keys()


def test_norms_without_parameters_have_nothing_to_duplicate() -> None:
    plain = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.InstanceNorm2d(8))
    assert norms(convert(plain)) == []
    assert [*plain.state_dict()] == []


def test_without_an_auxiliary_part_an_input_may_have_any_length() -> None:
    model = convert(nn.Sequential(nn.LayerNorm(8)), aux=False)
    set_groups(model.train(), [Group("main", 6)])
    x = torch.randn(7, 8)
    torch.testing.assert_close(model(x), nn.LayerNorm(8)(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.BatchNorm1d(8)], ids=lambda n: str(type(n)))
def test_a_length_that_is_not_the_rows_names_the_norm(norm: nn.Module) -> None:
    model = convert(nn.ModuleDict({"head": nn.Sequential(nn.Identity(), copy.deepcopy(norm))}))
    set_groups(model.train(), [Group("main", 4, 0, 1), Group("aux", 2, 0, 1)])
    head: Any = model["head"]
    with pytest.raises(ValueError, match=r"head\.1: a batch of 7 rows, but the groups"):
        head(torch.randn(7, 8))
    with pytest.raises(ValueError, match=r"head\.1: a batch of 3 rows, but the groups"):
        head(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"head\.1: a batch of 12 rows, 2 for each of the 6 rows"):
        head(torch.randn(12, 8))
    norm_state(model).multiples = True
    assert head(torch.randn(12, 8)).shape == (12, 8)


# ---------------------------------------------------------------------- batch norms

BATCH_NORMS: dict[str, tuple[type[Any], tuple[int, ...]]] = {
    "(B, C)": (nn.BatchNorm1d, (12, 4)),
    "(B, C, L)": (nn.BatchNorm1d, (12, 4, 5)),
    "(B * 3, C)": (nn.BatchNorm1d, (36, 4)),
    "(B * 3, C, H, W)": (nn.BatchNorm2d, (36, 4, 2, 3)),
    "(B, C, D, H, W)": (nn.BatchNorm3d, (12, 4, 2, 3, 2)),
}


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norms_of_every_shape(name: str) -> None:
    """Each group as if alone; one average of running statistics for each kind."""
    cls, shape = BATCH_NORMS[name]
    plain = [cls(4).double() for _ in range(2)]
    for norm in plain:
        randomise_norms(nn.Sequential(norm))
    model = convert(nn.Sequential(copy.deepcopy(plain[0]))).double()
    (dual,) = norms(model)
    assert isinstance(dual, DualBatchNorm)
    assert dual.aux is not None
    dual.aux.load_state_dict(plain[1].state_dict())
    groups = [Group("main", 4, 0, 1), Group("aux", 3, 0, 2), Group("aux", 5, 1, 2)]
    norm_state(model).multiples = True
    set_groups(model.train(), groups)
    x = torch.randn(shape).double()
    times = len(x) // 12
    out = model(x)
    seen: list[list[tuple[Tensor, Tensor]]] = [[], []]
    start = 0
    for group in groups:
        which = int(group.bn == "aux")
        rows = slice(start, start + group.rows * times)
        start = rows.stop
        want = nn.functional.batch_norm(
            x[rows], None, None, plain[which].weight, plain[which].bias, True, eps=1e-5
        )
        torch.testing.assert_close(out[rows], want, rtol=1e-12, atol=1e-12)
        values = x[rows].transpose(0, 1).flatten(1)
        seen[which].append((values.mean(1), values.var(1)))
    for norm, before, found in zip((dual, dual.aux), plain, seen, strict=True):
        for i, statistic in enumerate(("running_mean", "running_var")):
            mean = torch.stack([both[i] for both in found]).mean(0)
            want = 0.9 * getattr(before, statistic) + 0.1 * mean
            torch.testing.assert_close(getattr(norm, statistic), want, rtol=1e-12, atol=1e-12)
