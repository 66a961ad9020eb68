"""Residual blocks whose norms do what follows them: the residual add and the ReLU are part of the
norm's call.
"""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fap.nets.cifar import CifarResNet
from fap.nets.norm import DualBatchNorm2d


class _BasicBlock(BasicBlock):
    """Torchvision's block; its norms do the residual add and the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)


class _Bottleneck(Bottleneck):
    """Torchvision's block; its norms do the residual add and the ReLUs."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))))), identity)


def fuse_blocks(model: nn.Module) -> None:
    """In torchvision's ResNets and ours: what follows a norm becomes part of its call, and on a GPU
    of its kernel.
    """
    fused = {
        BasicBlock: _BasicBlock,
        Bottleneck: _Bottleneck,
        ResNet: ResNet,
        CifarResNet: CifarResNet,
    }
    for m in model.modules():
        if type(m) in fused:
            m.__class__ = fused[type(m)]
            m.relu = nn.Identity()
            for norm in m.children():
                if isinstance(norm, DualBatchNorm2d):
                    norm.relu = True
