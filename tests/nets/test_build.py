"""Models by name: what `build` makes of them, and which names are refused."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from fap.evaluate.load import _WithoutStorage
from fap.nets.build import build, plain
from fap.nets.cifar import CifarResNet
from fap.nets.drop_path import rates_of
from fap.nets.dual import export
from fap.nets.pretrained import load_plain
from fap.nets.stem import stem_of


@pytest.mark.parametrize(
    "name", ["resnet18", "timm/regnety_002", "cifar_resnet8", "cifar_resnet18"]
)
def test_build(name: str) -> None:
    model = build(name, 7, size=32)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert stem_of(model) is not None
    filters = [p for p in model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    # A reader of the checkpoint sees the plain names, whatever class the stem has.
    plain(name, 7).load_state_dict(export(model.state_dict()), strict=True)


def test_build_without_auxiliary_norms() -> None:
    model = build("cifar_resnet8", 7, aux=False, size=16)
    assert set(model.state_dict()) == set(CifarResNet(8, 7).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("aux", [True, False])
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_large", "timm/regnety_002", "cifar_resnet8"]
)
def test_without_groups_a_built_model_trains_like_the_plain_one(name: str, aux: bool) -> None:
    """Bit for bit, in ordinary training code.

    Outputs, gradients, weights, running statistics and their counter.
    """
    before = plain(name, 10).to(memory_format=torch.channels_last)
    model = build(name, 10, aux=aux, size=32)
    load_plain(model, before.state_dict())
    models = (before, model)
    own = dict(model.named_parameters())
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in models]
    for rows in (5, 3):  # any batch
        x = torch.randn(rows, 3, 32, 32).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (rows,))
        dropout = random.randrange(2**31)
        outs = []
        for m, optimiser in zip(models, optimisers, strict=True):
            torch.manual_seed(dropout)
            outs.append(m.train()(x))
            optimiser.zero_grad()
            nn.functional.cross_entropy(outs[-1], labels).backward()
        assert torch.equal(*outs)
        for k, p in before.named_parameters():
            assert torch.equal(own[k].grad, p.grad), k  # type: ignore[arg-type]
        for optimiser in optimisers:
            optimiser.step()
    trained = before.state_dict()
    ours = export(model.state_dict())
    assert trained.keys() == ours.keys()
    assert [k for k, v in trained.items() if not torch.equal(v, ours[k])] == []
    assert all(v == 2 for k, v in ours.items() if k.endswith("num_batches_tracked"))
    assert torch.equal(before.eval()(x), model.eval()(x))


def test_an_image_size_that_the_model_refuses() -> None:
    with pytest.raises(ValueError, match=r"data.size = 8"):
        build("inception_v3", 10, size=8)


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet51", "did you mean resnet5"),
        ("ResNet50", "did you mean resnet50"),
        ("timm/ResNet50", "did you mean timm/resnet50"),
        ("torchvision/vit_b_16", "did you mean vit_b_16"),
        ("cifar_resnet_18", "did you mean cifar_resnet18"),
        ("convnext-tiny", "convnext_tiny"),
        ("no such model at all", "cifar_resnet18 or cifar_resnetD"),
        ("cifar_resnet9", "6n"),
        ("cifar_resnet\N{SUPERSCRIPT TWO}", "cifar_resnet18 or cifar_resnetD"),
        ("cifar_resnet1000000000004", "cifar_resnet18 or cifar_resnetD"),
        ("cifar_resnet" + "2" * 10**6, "cifar_resnet18 or cifar_resnetD"),
        ("inception_v33", "did you mean inception_v3"),
        ("x" * 10**6, "1,000,002 characters"),
        ("", "neither torchvision nor timm"),
        ("timm/", "neither torchvision nor timm"),
    ],
)
def test_names_that_nobody_knows(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.name = ") as error:
        plain(name, 10)
    assert says in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "write", "init"),
    [
        ("resnet18.a1_in1k", "timm/resnet18", "timm:resnet18.a1_in1k"),
        ("timm/resnet50.tv2_in1k", "timm/resnet50", "timm:resnet50.tv2_in1k"),
        ("timm:resnet50.tv2_in1k", "timm/resnet50", "timm:resnet50.tv2_in1k"),
        ("resnet50.IMAGENET1K_V2", "resnet50", "torchvision:resnet50.IMAGENET1K_V2"),
        ("torchvision:resnet50.DEFAULT", "resnet50", "torchvision:resnet50.DEFAULT"),
        ("vit_b_16.IMAGENET1K_V1", "vit_b_16", "torchvision:vit_b_16.IMAGENET1K_V1"),
        ("vit_b_16.x", "vit_b_16", "torchvision:vit_b_16"),
        ("timm/resnet18.", "timm/resnet18", "timm:resnet18"),
        ("tf_efficientnet_b0_ns", "timm/tf_efficientnet_b0", "timm:tf_efficientnet_b0.ns_jft_in1k"),
        ("timm/convnext_tiny_in22k", "timm/convnext_tiny", "timm:convnext_tiny.fb_in22k"),
        ("resnet18." + "x" * 10**6, "timm/resnet18", "timm:resnet18.xxx"),
    ],
)
def test_a_tag_of_pretrained_weights_is_no_random_initialisation(
    name: str, write: str, init: str
) -> None:
    with pytest.raises(ValueError, match="pretrained") as error:
        plain(name, 10)
    assert f"model.name={write}, and model.init={init}" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_prefix_says_whose_model_it_is() -> None:
    for name in ("timm/resnet18", "timm:resnet18"):
        assert type(plain(name, 3)).__module__.startswith("timm")
    assert type(plain("torchvision:resnet18", 3)).__module__.startswith("torchvision")
    with pytest.raises(ValueError, match="neither torchvision nor timm"):
        plain("torchvision:convnext_atto", 3)


def test_a_model_of_one_size_is_made_for_the_size_of_the_images() -> None:
    images = torch.zeros(1, 3, 64, 64)
    for name in ("timm/test_vit", "vit_b_32"):
        with _WithoutStorage():
            model = plain(name, 3, 64)
        assert model.eval()(images.to("meta")).shape == (1, 3)
    with pytest.raises(ValueError, match=r"data\.size = 65: the model cannot be made for images"):
        plain("vit_b_16", 3, 65)


# ------------------------------------------------------------------ stochastic depth


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet", "efficientnet_v2_s"])
def test_drop_path_is_the_rate_of_the_last_block(name: str) -> None:
    """torchvision's own grow with depth, as timm's do; it names a model's largest rate."""
    rates = rates_of(plain(name, 5, None, 0.5))
    assert rates == sorted(rates)
    steps = len(set(rates))
    assert rates[-1] == pytest.approx(0.5, rel=1 / steps)  # torchvision's last one lies below
    assert not any(rates_of(plain(name, 5, None, 0.0)))


def test_rows_skip_branches_in_training_only() -> None:
    torch.manual_seed(0)
    model = plain("timm/test_vit", 5, None, 0.9)
    images = torch.randn(1, 3, *model.patch_embed.img_size).expand(64, -1, -1, -1)
    assert len(model.train()(images).unique(dim=0)) > 8
    outputs = model.eval()(images)
    torch.testing.assert_close(outputs, outputs[:1].expand_as(outputs))


@pytest.mark.parametrize(
    "name", ["cifar_resnet8", "resnet18", "timm/vgg11", "timm/efficientvit_m0"]
)
def test_a_model_without_stochastic_depth_refuses_a_rate(name: str) -> None:
    for size in (None, 224):  # which timm's efficientvit_m0 is told
        with pytest.raises(ValueError, match=f"model.drop_path = 0.1: '{name}' has no stochastic"):
            plain(name, 5, size, 0.1)
        plain(name, 5, size, 0.0)
