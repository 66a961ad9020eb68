"""ResNets for 32 px images."""

from itertools import pairwise

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

WIDTHS = (16, 32, 64)  # channels of the stages of He et al.'s CIFAR ResNets


def cifar_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 with a 3x3 stem and without pooling: the field's variant for CIFAR."""
    model = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class CifarResNet(nn.Module):
    """ResNet of 3 stages of (depth - 2) / 6 basic blocks (He et al., 2016, section 4.2).

    Raises ValueError for a depth that is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"model.name = 'cifar_resnet{depth}': the depth must be 6n + 2: "
                "8, 14, 20, 32, 44, 56 ..."
            )
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        blocks_per_stage = (depth - 2) // 6
        block_widths = [width for width in WIDTHS for _ in range(blocks_per_stage)]
        self.blocks = nn.Sequential(
            *(_block(inputs, width) for inputs, width in pairwise([WIDTHS[0], *block_widths]))
        )
        self.fc = nn.Linear(WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W)
    ) -> Tensor:  # logits (B, num_classes)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.blocks(x).mean((2, 3))
        return self.fc(x)


def _block(inputs: int, width: int) -> BasicBlock:
    """A basic block; where the stage, and so the width, changes, it halves height and width."""
    if inputs == width:
        return BasicBlock(width, width)
    stride = width // inputs  # a stage has twice the width of the one before: 2
    shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(inputs, width, stride, shortcut)
