"""ResNets for 32 px images."""

from itertools import pairwise

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class CifarResNet(nn.Module):
    """ResNet for 32 px images: 3 stages of (depth - 2) / 6 basic blocks, widths 16, 32, 64 (He et
    al., 2016, section 4.2).
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"model.name = 'cifar_resnet{depth}': the depth must be 6n + 2: 8, 14, 20, 32, 44,"
                " 56 ..."
            )
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        blocks: list[nn.Module] = []
        each = (depth - 2) // 6
        for inputs, width in pairwise([16] + [16] * each + [32] * each + [64] * each):
            shortcut = None
            if inputs != width:
                shortcut = nn.Sequential(
                    nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width)
                )
            blocks.append(BasicBlock(inputs, width, width // inputs, shortcut))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
