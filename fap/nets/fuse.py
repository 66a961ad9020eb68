"""Residual blocks whose norms do what follows them: residual add and ReLU are part of the call."""

from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fap.nets.cifar import CifarResNet
from fap.nets.norm import DualBatchNorm2d


class FusedBasicBlock(BasicBlock):
    """Torchvision's block; its norms do the residual add and the ReLUs."""

    def forward(
        self,
        x: Tensor,  # (B, C, H, W)
    ) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(out), identity)


class FusedBottleneck(Bottleneck):
    """Torchvision's block; its norms do the residual add and the ReLUs."""

    def forward(
        self,
        x: Tensor,  # (B, C, H, W)
    ) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return self.bn3(self.conv3(out), identity)


# What a module becomes. The networks themselves keep their class: after their first norm comes
# their `relu`, so to replace that is enough.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: ResNet,
    CifarResNet: CifarResNet,
    IntermediateLayerGetter: IntermediateLayerGetter,  # a detector's ResNet
}


def fuse_blocks(model: nn.Module) -> None:
    """Make what follows a norm part of its call, and so on a GPU part of its kernel.

    Changes a converted model in place: torchvision's ResNets and ours, also those of
    detectors; any other stays as it is.
    """
    for module in model.modules():
        # Not a subclass: its forward may be another one.
        if type(module) not in FUSED or not _norms_do_more(module):
            continue
        module.__class__ = FUSED[type(module)]
        module.relu = nn.Identity()
        # Only the module's own norms: no ReLU follows the one inside `downsample`.
        for norm in module.children():
            if isinstance(norm, DualBatchNorm2d):
                norm.relu = True


def _norms_do_more(module: nn.Module) -> bool:
    """Are its norms of the class that can do what follows them? A user's model may have others."""
    own = [child for name, child in module.named_children() if name.startswith("bn")]
    return all(isinstance(norm, DualBatchNorm2d) for norm in own)
