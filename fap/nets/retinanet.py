"""RetinaNet (Lin et al., 2017) of torchvision's parts: one tensor comes out, batch norms are live.

State dicts have torchvision's names, so those of `retinanet_resnet50_fpn` load and export. Unlike
torchvision's own model this one knows neither targets nor images of other sizes than its canvas;
what is made of its outputs is the task's (`fap.tasks.detection`).
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from pipelines.files import shown

RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors of one size
RESNETS = {18: 512, 34: 512, 50: 2048, 101: 2048, 152: 2048}  # depth: channels of the last stage


def _three_sizes(side: int) -> tuple[int, int, int]:
    """Anchors of one level: thirds of an octave (section 4 of the paper), whole as torchvision's"""
    return side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))


@dataclass(frozen=True)
class Spec:
    """The shape of a detector. Pixels are those of the canvas."""

    body: Callable[[], nn.Module]
    """Makes the backbone: an image goes through its children in turn, up to the last of `stages`.
    Every batch norm of the model is in here."""
    stages: Mapping[str, int]
    """Children of the body that the pyramid looks at, with their channels."""
    channels: int = 256
    """Of the pyramid and the heads."""
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Pixels per place of each level: as many as `stages`, or two more (P6 and P7)."""
    anchor_sides: tuple[tuple[int, ...], ...] = tuple(map(_three_sizes, (32, 64, 128, 256, 512)))
    """Pixels: the sides of the square anchors of each level. The other `RATIOS` have their area."""
    head_convolutions: int = 4
    """Before the last one, in each of the two heads; at most 4."""

    @property
    def anchors_per_place(self) -> int:
        return len(self.anchor_sides[0]) * len(RATIOS)


def _resnet(depth: int) -> Spec:
    """Torchvision's `retinanet_resnet50_fpn`, with a ResNet of any depth."""

    def body() -> nn.Module:
        return torchvision.models.get_model(f"resnet{depth}")

    last = RESNETS[depth]
    return Spec(body, {"layer2": last // 4, "layer3": last // 2, "layer4": last})


def _tiny_body() -> nn.Module:
    """Strides 2, 4, 8, 16."""
    body = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(inplace=True),
            layer1=_halving_block(16, 24),
            layer2=_halving_block(24, 48),
            layer3=_halving_block(48, 96),
        )
    )
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def _halving_block(inputs: int, width: int) -> BasicBlock:
    """A basic block that halves height and width."""
    shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(inputs, width, 2, shortcut)


SPECS = {f"retinanet_resnet{depth}_fpn": _resnet(depth) for depth in RESNETS}
# For demos and tests: canvases of 128 px.
SPECS["retinanet_tiny"] = Spec(
    _tiny_body,
    {"layer2": 48, "layer3": 96},
    channels=48,
    strides=(8, 16),
    anchor_sides=((20, 30), (42, 60)),
    head_convolutions=1,
)


def spec_of(name: str) -> Spec:
    """The shape of a detector by its name (`model.name`). Raises ValueError for any other name."""
    if name in SPECS:
        return SPECS[name]
    near = difflib.get_close_matches(name[:100].lower(), SPECS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(SPECS)}"
    raise ValueError(f"model.name = {shown(name)}: no detector; {hint}")


class RetinaNet(nn.Module):
    """Class logits and box regressions of all anchors, as one tensor with one row per image."""

    def __init__(self, spec: Spec, num_classes: int) -> None:
        super().__init__()
        returned = {name: str(i) for i, name in enumerate(spec.stages)}
        widths = [*spec.stages.values()]
        extra: ExtraFPNBlock = _NoMoreLevels()
        if len(spec.strides) > len(spec.stages):
            extra = LastLevelP6P7(spec.channels, spec.channels)
        self.backbone = BackboneWithFPN(
            spec.body(), returned, widths, spec.channels, extra_blocks=extra
        )
        self.head = RetinaNetHead(spec.channels, spec.anchors_per_place, num_classes)
        for head in (self.head.classification_head, self.head.regression_head):
            head.conv = head.conv[: spec.head_convolutions]

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W); sides that are multiples of 32
    ) -> Tensor:  # (B, A * (num_classes + 4))
        """The class logits of every anchor, then the box regression of every anchor.

        Anchors are in the order of `anchors`.
        """
        levels = self.backbone(x).values()
        classes = self.head.classification_head
        boxes = self.head.regression_head
        logits = [_flat(classes.cls_logits(classes.conv(level))) for level in levels]
        regressions = [_flat(boxes.bbox_reg(boxes.conv(level))) for level in levels]
        return torch.cat([*logits, *regressions], dim=1)


def _flat(
    x: Tensor,  # (B, anchors per place * n, h, w)
) -> Tensor:  # (B, h * w * anchors per place * n): place after place, anchor after anchor
    # No copy in channels_last.
    return x.permute(0, 2, 3, 1).flatten(1)


class _NoMoreLevels(ExtraFPNBlock):
    """The pyramid has the levels of the stages and no others."""

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        return results, names


def anchors_per_level(
    spec: Spec,
    sides: tuple[int, int],  # of the canvas: height, width
) -> tuple[int, ...]:
    return tuple(h * w * spec.anchors_per_place for h, w in _grids(spec, sides))


def anchors(
    spec: Spec,
    sides: tuple[int, int],  # of the canvas: height, width
) -> Tensor:  # float32 (A, 4): left, top, right, bottom
    """Torchvision's anchors, level after level; on the CPU, in pixels of the canvas."""
    generator = AnchorGenerator(spec.anchor_sides, (RATIOS,) * len(spec.strides))
    # It looks at shapes alone; `expand` takes no memory.
    canvas = torch.zeros(()).expand(1, 3, *sides)
    levels = [torch.zeros(()).expand(1, 1, *grid) for grid in _grids(spec, sides)]
    (found,) = generator(ImageList(canvas, [sides]), levels)
    return found


def _grids(spec: Spec, sides: tuple[int, int]) -> list[tuple[int, int]]:
    """Places (h, w) of each level. A convolution of stride 2 rounds up."""
    height, width = sides
    return [(-(-height // stride), -(-width // stride)) for stride in spec.strides]
