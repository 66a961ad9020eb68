"""1x1 convolutions with a stride: equal to the plain ones, and no heap is corrupted."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fap.nets.strided import StridedConv2d, corrupts_the_heap, mend_strided

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("stride", [2, 3, (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_equal_to_the_plain_convolution(stride: int, bias: bool, channels: int) -> None:
    twin = nn.Conv2d(channels, 5, 1, stride, bias=bias).double()
    model = nn.Sequential(copy.deepcopy(twin))
    mend_strided(model)
    assert type(model[0]) is StridedConv2d
    model.to(memory_format=torch.channels_last)
    x = torch.randn(4, channels, 9, 12, dtype=torch.float64)
    leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
    whole = x.clone().requires_grad_()
    want = twin(whole)
    gy = torch.randn_like(want)
    want.backward(gy)
    out = model(leaf)
    out.backward(gy)
    gradients = [p.grad for p in (leaf, *model.parameters())]
    expected = [p.grad for p in (whole, *twin.parameters())]
    for fast, slow in zip([out, *gradients], [want, *expected], strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 4, 1, stride=2),  # a ResNet's shortcuts have 64 channels and more
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(3, 4, 1, stride=2, padding=1),
        nn.Conv2d(6, 4, 1, stride=2, groups=2),
    ],
    ids=str,
)
def test_other_convolutions_stay_as_they_are(conv: nn.Conv2d) -> None:
    assert not corrupts_the_heap(conv)
    mend_strided(nn.Sequential(conv))
    assert type(conv) is nn.Conv2d


# A corrupt heap ends the process when somebody frees or asks for memory later: many do here.
TRAIN = """
import torch
from fap.nets.build import plain, prepare
from fap.nets.strided import corrupts_the_heap

class Shortcut(torch.nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.channels = channels
        self.bn = torch.nn.BatchNorm2d(channels)
        self.conv = torch.nn.Conv2d(channels, 48, 1, stride=stride)
    def forward(self, x):
        return self.conv(self.bn(x[:, :1].expand(-1, self.channels, -1, -1)))

torch.set_num_threads(1)
for what, size in {cases}:
    print(what, flush=True)
    plain_model = plain(what, 5) if isinstance(what, str) else Shortcut(*what)
    model = prepare(plain_model, size=size)
    convolutions = [m for m in model.modules() if type(m) is torch.nn.Conv2d]
    assert not any(corrupts_the_heap(conv) for conv in convolutions), "left as it was"
    for _ in range(3):
        x = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last)
        model(x).square().mean().backward()
        pieces = [torch.randn(1000 + 17 * i) for i in range(200)]
        del pieces
print("trained all")
"""
FAMILIES = [(name, 96) for name in ("timm/repvgg_a0", "timm/mobileone_s0", "timm/fastvit_t8")]
# Channels and stride: also where such a convolution does not read the image.
SHORTCUTS = [(shortcut, 32) for shortcut in ((1, 2), (2, 3), (5, 2), (7, (1, 2)), (8, 2))]


@pytest.mark.slow
def test_no_such_convolution_corrupts_the_heap() -> None:
    """One process trains one after the other; where it dies, the last line says of what.

    glibc looks at its heap more often than it does by itself. Not every CPU's convolution writes
    beyond its memory: so it is asked for, too, whether one that may is left.
    """
    debug = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(cases=[*FAMILIES, *SHORTCUTS])],
        cwd=ROOT,
        env=os.environ | debug | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("trained all\n")
