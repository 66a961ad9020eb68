"""Models with dual norms: conversion changes nothing, export gives the plain model back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.layers import EvoNorm2dB0, InplaceAbn
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fap.config import Config
from fap.evaluate.exact import evaluate
from fap.nets.dual import (
    convert,
    evaluate_with,
    export,
    has_aux,
    norm_state,
    norms,
    set_groups,
    undivided,
)
from fap.nets.norm import DualBatchNorm2d, Group, NormState
from fap.nets.pretrained import load_plain
from fap.step.step import Step
from fap.tasks.classification import Accuracy
from tests.nets.conftest import randomise_norms


def fresh(name: str) -> nn.Module:
    """The model as its own library makes it; names with a slash are timm's."""
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"), num_classes=10)
    return torchvision.models.get_model(name, num_classes=10)


def small_model() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    return nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), inner)


SLOW = ("resnet50", "densenet121", "efficientnet_b0", "timm/resnet50d", "timm/efficientnet_b0")
NAMED = ["resnet18", "mobilenet_v3_large", "timm/regnety_002"]
NAMED += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_conversion_and_export(name: str) -> None:
    """Outputs in evaluation are equal before and after; the export loads strictly."""
    before = fresh(name).eval()
    randomise_norms(before)
    model = convert(copy.deepcopy(before))
    bns = [m for m in before.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms(model)) == len(bns) > 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = before(x)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        with evaluate_with(model, "aux"):  # a copy so far
            torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        for norm in norms(model):
            assert norm.aux is not None
            randomise_norms(norm.aux)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        with evaluate_with(model, "aux"):
            aux_out = model(x)
            assert (aux_out - want).abs().max() > 1e-3

    randomise_norms(model)
    other = fresh(name).eval()
    other.load_state_dict(export(model.state_dict(), steps=3), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        other.load_state_dict(export(model.state_dict(), steps=3, bn="aux"), strict=True)
        with evaluate_with(model, "aux"):
            torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        # `load_plain` is the way back: both branches of every norm get the plain values.
        again = convert(fresh(name)).eval()
        load_plain(again, other.state_dict())
        torch.testing.assert_close(again(x), other(x), rtol=0, atol=0)
        with evaluate_with(again, "aux"):
            torch.testing.assert_close(again(x), other(x), rtol=0, atol=0)


def without_dropout(model: nn.Module) -> nn.Module:
    """`train()` does not switch it on again."""
    classes = (
        nn.Dropout, nn.Dropout2d, torchvision.ops.StochasticDepth, timm.layers.DropPath
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, classes):
            module.eval()
            module.train = lambda mode=True, m=module: m  # type: ignore[method-assign,misc]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_training_forward_in_groups(name: str) -> None:
    """Every group's logits are those of the plain model on that group alone, in train mode."""
    before = without_dropout(fresh(name).double())
    model = convert(copy.deepcopy(before)).double()
    plain = before.state_dict()
    model.load_state_dict({k: plain[k.replace(".aux.", ".")] for k in model.state_dict()})
    x = torch.randn(10, 3, 64, 64).double()
    groups = [Group("main", 4, 0, 1), Group("aux", 3, 0, 2), Group("aux", 3, 1, 2)]
    with torch.no_grad():
        set_groups(model, groups)
        out = model(x)
        want = torch.cat([copy.deepcopy(before).train()(part) for part in x.split([4, 3, 3])])
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-8)


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


def test_conversion_keeps_the_mode_and_timm_activation() -> None:
    model = small_model().eval()
    x = torch.randn(2, 3, 6, 6)
    want = model(x)
    assert torch.equal(convert(model)(x), want)
    assert all(not n.training and n.aux is not None and not n.aux.training for n in norms(model))
    set_groups(model.train(), [Group("main", 1, 0, 1), Group("aux", 1, 0, 1)])
    model(x)
    first = norms(model)[0]
    assert not torch.equal(first.running_mean, first.aux.running_mean)  # type: ignore[union-attr,arg-type]


def test_without_auxiliary_norms() -> None:
    model = convert(small_model(), aux=False)
    assert not any(".aux." in k for k in model.state_dict())
    set_groups(model, [Group("main", 2, i, 2) for i in range(2)])
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="aux"), evaluate_with(model, "aux"):
        pass


# ---------------------------------------------------------------------- export


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
    assert counters(out) == [7, 7]
    small_model().load_state_dict(out, strict=True)


def counters(state: dict[str, Tensor]) -> list[float]:
    return [v.item() for k, v in state.items() if k.endswith("num_batches_tracked")]


def test_export_without_steps_keeps_what_was_counted() -> None:
    model = convert(small_model())
    for _ in range(3):
        model(torch.randn(2, 3, 6, 6))
    assert counters(export(model.state_dict())) == [3, 3]
    set_groups(model, [Group("main", 2, 0, 1)])
    model(torch.randn(2, 3, 6, 6))  # in groups nothing is counted
    assert counters(export(model.state_dict())) == [3, 3]


@pytest.mark.parametrize("aux", [True, False])
def test_export_keeps_names_that_only_look_auxiliary(aux: bool) -> None:
    """A model may have a module of its own that is called aux, and it may be a norm."""
    own = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for called_aux in (own, nn.BatchNorm2d(4), nn.ModuleDict({"aux": nn.BatchNorm2d(4)})):
        model = nn.ModuleDict({"aux": called_aux, "fc": nn.Linear(4, 2)})
        names = set(model.state_dict())
        assert set(export(convert(model, aux).state_dict())) == names


def test_a_root_that_is_a_norm_exports() -> None:
    norm = DualBatchNorm2d(nn.BatchNorm2d(5), NormState(), aux=True)
    assert set(export(norm.state_dict())) == set(nn.BatchNorm2d(5).state_dict())
    assert set(export(norm.state_dict(), bn="aux")) == set(nn.BatchNorm2d(5).state_dict())


def test_auxiliary_norms_that_are_not_there_are_not_exported() -> None:
    with pytest.raises(ValueError, match="no auxiliary norms"):
        export(convert(small_model(), aux=False).state_dict(), bn="aux")


# ---------------------------------------------------------------------- what is refused


class OtherBatchNorm(nn.BatchNorm2d):
    pass


class NamedBatchNorm(nn.Module):
    """Of a library: it inherits nothing of torch's."""


OTHERS = [
    OtherBatchNorm(4),
    NamedBatchNorm(),
    nn.SyncBatchNorm(4),
    nn.InstanceNorm2d(4, track_running_stats=True),
    nn.LazyBatchNorm2d(),
    EvoNorm2dB0(4),
    InplaceAbn(4),
    FrozenBatchNorm2d(4),
]


@pytest.mark.parametrize("norm", OTHERS, ids=lambda n: type(n).__name__)
def test_unknown_batch_norms_are_refused(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), norm)
    with pytest.raises(ValueError, match=rf"3 is a .*{type(norm).__name__}"):
        convert(model)


def test_vanilla_training_leaves_norms_that_it_does_not_know() -> None:
    """And finds what has statistics of a batch among them; SyncBatchNorm is still a mistake."""
    others = [norm for norm in OTHERS if not isinstance(norm, nn.SyncBatchNorm)]
    odd = [nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=None)]
    plain = nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4), *others, *odd)
    before = [*plain]
    model = convert(plain, aux=False, any_norm=True)
    assert [a is b for a, b in zip(before, model, strict=True)] == [
        False,
        *[True] * (len(plain) - 1),
    ]
    assert [type(norm).__name__ for norm in norms(model)] == ["DualBatchNorm2d", "DualLayerNorm"]
    assert undivided(model) == [type(norm).__name__ for norm in (*others, *odd)]
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        convert(nn.Sequential(nn.SyncBatchNorm(4)), aux=False, any_norm=True)


@pytest.mark.parametrize(
    "kwargs", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_norms_without_what_the_method_needs_are_refused(kwargs: dict[str, bool | None]) -> None:
    with pytest.raises(ValueError, match="affine"):
        convert(nn.Sequential(nn.BatchNorm2d(4, **kwargs)))  # type: ignore[arg-type]


def test_a_model_without_norms_is_converted_but_has_no_auxiliary_ones() -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(6, elementwise_affine=False)))
    assert norms(model) == []
    assert not has_aux(model)
    set_groups(model, [Group("main", 1), Group("aux", 1)])
    assert copy.deepcopy(model)(torch.randn(2, 3, 6, 6)).shape == (2, 4, 6, 6)
    assert norm_state(nn.Sequential(model)).groups == (Group("main", 1), Group("aux", 1))
    with evaluate_with(model, "main"):
        pass
    with pytest.raises(ValueError, match="aux"), evaluate_with(model, "aux"):
        pass


def test_a_norm_that_lies_in_two_places_stays_one() -> None:
    for norm in (nn.BatchNorm2d(3), nn.GroupNorm(1, 3)):
        inner = nn.ModuleDict({"again": norm, "more": norm})
        model = convert(nn.ModuleDict({"first": norm, "inner": inner}))
        (dual,) = norms(model)
        assert dual is model["first"] is inner["again"] is inner["more"]


@pytest.mark.parametrize(
    "use", [norm_state, lambda model: set_groups(model, ())], ids=["norm_state", "set_groups"]
)
def test_a_plain_model_has_no_groups(use: Callable[[nn.Module], object]) -> None:
    says = r"Sequential has no dual norms; fap\.nets\.dual\.convert"
    with pytest.raises(ValueError, match=says):
        use(small_model())


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
    "evaluate": lambda model: evaluate(
        model, [], Accuracy(torch.device("cpu"), None, False), mean=(0.5,) * 3, std=(0.5,) * 3
    ),
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
    says = r"SyncBatchNorm(.|\n)*after `convert`(.|\n)*method\.group_rows"
    with pytest.raises(ValueError, match=says):
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
