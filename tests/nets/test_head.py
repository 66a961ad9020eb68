"""Which parameters are the head of a model."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from fap.evaluate.load import _WithoutStorage
from fap.nets.build import build, plain
from fap.nets.dual import convert
from fap.nets.head import head_parameters
from fap.nets.retinanet import RetinaNet, spec_of

ONE = {"weight", "bias"}


def named(prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name in ONE}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cifar_resnet8", "fc"),
        ("cifar_resnet18", "fc"),
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("squeezenet1_1", "classifier.1"),  # a convolution
        ("timm/regnety_002", "head.fc"),
        ("timm/mobilenetv3_small_050", "classifier"),
        ("timm/test_vit", "head"),
    ],
)
def test_the_head_is_the_layer_that_gives_the_logits(name: str, layer: str) -> None:
    assert head_parameters(plain(name, 5)) == named(layer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet"),
        *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "resnext50_32x4d"),
        *("shufflenet_v2_x0_5", "swin_t", "vgg11", "vit_b_16"),
    ],
)
def test_of_torchvisions_classifiers_it_alone_has_the_class_count(name: str) -> None:
    """Whatever the class count changes is the head."""
    with _WithoutStorage():
        few, many = (plain(name, n) for n in (3, 4))
    own = few.state_dict()
    differ = {k for k, v in many.state_dict().items() if v.shape != own[k].shape}
    assert head_parameters(few) == differ


@pytest.mark.slow
def test_of_a_timm_model_of_each_kind_it_is_what_the_class_count_changes() -> None:
    for name in (
        *("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet"),
        *("test_resnet", "test_vit", "test_vit2", "resnetv2_50", "coat_tiny", "pvt_v2_b0"),
        *("swin_tiny_patch4_window7_224", "mixer_s32_224", "deit_tiny_distilled_patch16_224"),
        *("levit_128s", "crossvit_tiny_240", "vovnet39a", "tresnet_m", "rexnet_100"),
    ):
        with _WithoutStorage():
            few, many = (timm.create_model(name, num_classes=n) for n in (3, 4))
        own = few.state_dict()
        differ = {k for k, v in many.state_dict().items() if v.shape != own[k].shape}
        assert differ
        assert differ <= head_parameters(few), name
        weights = sum(v.numel() for k, v in own.items() if k in head_parameters(few))
        assert weights < 0.5 * sum(v.numel() for v in own.values()), name


def test_it_is_the_same_of_a_converted_model() -> None:
    before = head_parameters(plain("resnet18", 5))
    assert head_parameters(build("resnet18", 5, size=32)) == before
    assert head_parameters(convert(plain("timm/regnety_002", 5))) == named("head.fc")


def test_of_a_detector_it_is_both_heads() -> None:
    names = head_parameters(RetinaNet(spec_of("retinanet_tiny"), 3))
    for part in ("classification_head.cls_logits", "regression_head.bbox_reg"):
        assert {f"head.{part}.weight", f"head.{part}.bias"} <= names
    assert all(name.startswith("head.") for name in names)


def test_a_model_without_classes_has_none() -> None:
    assert head_parameters(timm.create_model("test_resnet", num_classes=0)) == set()
    assert head_parameters(nn.ReLU()) == set()
