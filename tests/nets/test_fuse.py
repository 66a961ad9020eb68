"""Fused residual blocks against the blocks of torchvision that they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fap.nets.build import plain
from fap.nets.dual import convert, norms
from fap.nets.fuse import fuse_blocks
from tests.nets.conftest import randomise_norms

BLOCKS = [BasicBlock, Bottleneck]


def block_and_twin(block: type[BasicBlock | Bottleneck], shortcut: bool) -> list[nn.Module]:
    """A fused block and torchvision's, with equal values; both take 16 channels."""
    width = 16 // block.expansion
    downsample = None
    if shortcut:
        downsample = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    twin = block(16, width, 1, downsample)
    randomise_norms(twin)
    fused = convert(nn.Sequential(copy.deepcopy(twin)))
    fuse_blocks(fused)
    assert type(fused[0]) is not block
    return [fused, twin]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_fused_block_equals_torchvisions(
    block: type[BasicBlock | Bottleneck], shortcut: bool
) -> None:
    """Bit for bit: outputs and gradients in training, outputs in evaluation."""
    modules = block_and_twin(block, shortcut)
    x = torch.randn(4, 16, 6, 5)
    gy = torch.randn_like(x)
    outs = []
    gradients = []
    for module in modules:
        image = x.clone().requires_grad_()
        outs.append(module(image))
        parameters = [p for name, p in module.named_parameters() if ".aux." not in name]
        gradients.append(torch.autograd.grad(outs[-1], [image, *parameters], gy))
    assert torch.equal(*outs)
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    fused, twin = (module.eval() for module in modules)
    assert torch.equal(fused(x), twin(x))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_norm_of_a_shortcut_has_no_relu(block: type[BasicBlock | Bottleneck]) -> None:
    fused, _ = block_and_twin(block, shortcut=True)
    assert [norm.relu for norm in norms(fused)].count(False) == 1
    assert not fused[0].downsample[1].relu  # type: ignore[index,union-attr]


class OtherBlock(BasicBlock):
    """A subclass, whose forward may be another one."""


def test_blocks_of_other_classes_stay_as_they_are() -> None:
    model = convert(nn.Sequential(OtherBlock(16, 16), plain("mobilenet_v3_large", 10)))
    classes = [type(m) for m in model.modules()]
    fuse_blocks(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any(norm.relu for norm in norms(model))
