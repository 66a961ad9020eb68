"""ResNets for 32 px images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fap.nets.cifar import CifarResNet


@pytest.mark.parametrize("depth", [8, 14, 20, 56])
def test_the_depth_counts_the_layers_with_weights(depth: int) -> None:
    """Convolutions and the linear layer; the shortcuts' 1x1 convolutions do not count."""
    model = CifarResNet(depth, 10)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    layers += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) == depth
    assert {m.out_channels for m in layers if isinstance(m, nn.Conv2d)} == {16, 32, 64}


def test_each_stage_halves_height_and_width() -> None:
    model = CifarResNet(14, 10).eval()
    x = torch.randn(2, 16, 32, 32)
    sides = []
    for block in model.blocks:
        x = block(x)
        sides.append(x.shape[-1])
    assert sides == [32, 32, 16, 16, 8, 8]


@pytest.mark.parametrize("depth", [0, 2, 6, 9, 18])
def test_a_depth_that_does_not_divide_into_stages(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^model\.name = 'cifar_resnet{depth}': .*6n \+ 2"):
        CifarResNet(depth, 10)
