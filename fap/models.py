"""Models by name from torchvision and timm, with dual batch norms and a stem that can differentiate few rows."""

from itertools import pairwise
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fap.norm import DualBatchNorm2d, convert


class CifarResNet(nn.Module):
    """ResNet for 32 px images: 3 stages of (depth - 2) / 6 basic blocks, widths 16, 32, 64 (He et al., 2016, section 4.2)."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"model.name = 'cifar_resnet{depth}': the depth must be 6n + 2: 8, 14, 20, 32, 44, 56 ...")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        blocks: list[nn.Module] = []
        each = (depth - 2) // 6
        for inputs, width in pairwise([16] + [16] * each + [32] * each + [64] * each):
            shortcut = None
            if inputs != width:
                shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            blocks.append(BasicBlock(inputs, width, width // inputs, shortcut))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def plain(name: str, num_classes: int) -> nn.Module:
    """An unconverted, randomly initialised model. Raises ValueError for a name that nobody knows."""
    if name == "cifar_resnet18":  # ResNet-18 with a 3x3 stem and no pooling: the field's CIFAR variant
        model = torchvision.models.resnet18(num_classes=num_classes)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model
    if name.startswith("cifar_resnet") and name.removeprefix("cifar_resnet").isdigit():
        return CifarResNet(int(name.removeprefix("cifar_resnet")), num_classes)
    if name in torchvision.models.list_models(module=torchvision.models):
        kwargs: dict[str, Any] = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, num_classes=num_classes, **kwargs)
    if timm.is_model(name.removeprefix("timm/")):
        return timm.create_model(name.removeprefix("timm/"), num_classes=num_classes)
    raise ValueError(f"model.name = {name!r}: neither torchvision nor timm has it, nor is it cifar_resnet18 or cifar_resnetD")


def build(name: str, num_classes: int, *, aux: bool = True, size: int = 224) -> nn.Module:
    """A converted, channels_last model whose logits are (B, num_classes) for (B, 3, size, size) images."""
    model = convert(plain(name, num_classes), aux)
    _fuse_blocks(model)
    _install_stem(model, size)
    return model.to(memory_format=torch.channels_last)


def load_plain(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a plain state dict into a converted model; the auxiliary norms become copies of the main ones."""
    copies = {k: k.replace(".aux.", ".").removeprefix("aux.") for k in model.state_dict() if k not in state}
    try:
        model.load_state_dict(state | {k: state[source] for k, source in copies.items() if source in state})
    except RuntimeError as e:
        raise ValueError(f"model.init does not fit the model: {e}") from None


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


def _fuse_blocks(model: nn.Module) -> None:
    """In torchvision's ResNets and ours: what follows a norm becomes part of its call, and on a GPU of its kernel."""
    fused = {BasicBlock: _BasicBlock, Bottleneck: _Bottleneck, ResNet: ResNet, CifarResNet: CifarResNet}
    for m in model.modules():
        if type(m) in fused:
            m.__class__ = fused[type(m)]
            m.relu = nn.Identity()
            for norm in m.children():
                if isinstance(norm, DualBatchNorm2d):
                    norm.relu = True


class StemConv2d(nn.Conv2d):
    """The first convolution. With a `probe` it also gives the gradient of some input rows, and of no others.

    The probe is a leaf that aliases the rows [first, first + len(probe)) of the input.
    """

    probe: Tensor | None = None
    first = 0
    full_precision = False

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        out = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        inside = x.dtype if self.full_precision else out  # one grey level would not survive the cast
        weight, bias = self.weight.to(inside), None if self.bias is None else self.bias.to(inside)
        with torch.autocast(device, enabled=False):
            if self.probe is None or not self.training:
                return self._conv_forward(x.to(inside), weight, bias).to(out)
            return _StemConv.apply(x.to(inside), self.probe, weight, bias, self).to(out)


class _StemConv(torch.autograd.Function):
    """Weight gradient over all rows, data gradient over the probe's rows. Twin: autograd on the whole batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, weight: Tensor, bias: Tensor | None, conv: StemConv2d) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.conv = slice(conv.first, conv.first + len(probe)), conv
        return conv._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        c, rows, has_bias = ctx.conv, ctx.rows, ctx.needs_input_grad[3]
        geometry = (c.stride, c.padding, c.dilation, False, [0, 0], c.groups)
        _, gw, gb = torch.ops.aten.convolution_backward(gy, x, weight, [len(weight)], *geometry, [False, True, has_bias])
        gx, _, _ = torch.ops.aten.convolution_backward(gy[rows], x[rows], weight, None, *geometry, [True, False, False])
        return None, gx, gw, gb, None


def _install_stem(model: nn.Module, size: int) -> None:
    """Turn the first convolution into a `StemConv2d`, if the image reaches the logits through it alone."""
    image = torch.zeros(1, 3, size, size, requires_grad=True)
    seen: list[nn.Module] = []

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Note who reads the image; cut it off there, so that any other way to the logits still needs its gradient."""
        if list(module.children()) or not any(a is image for a in args):
            return None
        seen.append(module)
        return tuple(a.detach() if a is image else a for a in args)

    try:
        with register_module_forward_pre_hook(cut):  # type: ignore[arg-type]  # torch's stub: no new arguments
            logits = model.eval()(image)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ValueError(f"data.size = {size}: the model does not accept images of {size} px: {e}") from None
    finally:
        model.train()
    bypassed = torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is not None
    stem = seen[0] if len(seen) == 1 and not bypassed else None
    if type(stem) is nn.Conv2d and stem.padding_mode == "zeros" and not isinstance(stem.padding, str):
        stem.__class__ = StemConv2d


def stem_of(model: nn.Module) -> StemConv2d | None:
    """The stem, or None if the model's first layer is no plain convolution."""
    return next((m for m in model.modules() if isinstance(m, StemConv2d)), None)
