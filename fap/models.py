"""Models by name from torchvision and timm, with dual batch norms and a stem that can differentiate few rows."""

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fap.config import Config
from fap.norm import DualBatchNorm2d, convert, norms
from pipelines.files import read_regular, shown

TIMM = "timm/"  # forces a name of timm where torchvision has the same
MOST_HEADER = 64 << 20  # bytes of names and metadata in a file of weights


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
    """An unconverted, randomly initialised model.

    Raises ValueError for a name that nobody knows, and for one that asks for pretrained weights.
    """
    if name == "cifar_resnet18":  # ResNet-18 with a 3x3 stem and no pooling: the field's CIFAR variant
        model = torchvision.models.resnet18(num_classes=num_classes)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model
    if name.startswith("cifar_resnet") and name.removeprefix("cifar_resnet").isdigit():
        return CifarResNet(int(name.removeprefix("cifar_resnet")), num_classes)
    if name in _torchvision_names():
        kwargs: dict[str, Any] = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, num_classes=num_classes, **kwargs)
    # An old name of timm's may stand for a tag (tf_efficientnet_b0_ns), or for a model that was removed (None).
    asked = name.removeprefix(TIMM)
    current = timm.models.get_deprecated_models().get(asked, asked) or ""
    architecture, dot, tag = current.partition(".")
    of_timm, of_torchvision = timm.is_model(architecture), architecture in _torchvision_names()
    if dot and (of_timm or of_torchvision):
        known = TIMM + architecture if of_timm else architecture
        raise ValueError(
            f"model.name = {shown(name)}: {shown(tag)} names pretrained weights, but a name alone gives random weights; "
            f"write model.name={known}, and model.init=FILE.safetensors to start from weights"
        )
    if of_timm:
        return timm.create_model(architecture, num_classes=num_classes)
    near = near_names(name)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    nobody = "neither torchvision nor timm has it, nor is it cifar_resnet18 or cifar_resnetD"
    raise ValueError(f"model.name = {shown(name)}: {nobody}{hint}")


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def near_names(name: str) -> list[str]:
    """At most three known names that look like `name` without its case and the tag of its weights, best first."""
    prefix = TIMM if name.startswith(TIMM) else ""
    known = {*timm.list_models()}
    if not prefix:
        known |= {*_torchvision_names(), "cifar_resnet18", "cifar_resnet20", "cifar_resnet56"}
    wanted = name.rpartition("/")[2].partition(".")[0].lower()
    return [prefix + near for near in difflib.get_close_matches(wanted, sorted(known), n=3, cutoff=0.7)]


def build(name: str, num_classes: int, *, aux: bool = True, size: int = 224) -> nn.Module:
    """A converted, channels_last model whose logits are (B, num_classes) for (B, 3, size, size) images."""
    model = convert(plain(name, num_classes), aux)
    _fuse_blocks(model)
    _install_stem(model, size)
    return model.to(memory_format=torch.channels_last)


def load_plain(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a plain state dict into a converted model; the auxiliary norms become copies of the main ones.

    Raises ValueError, before anything is copied, if a name or a shape differs.
    """
    own, copies = model.state_dict(), _auxiliary_names(model)
    missing = [k for k in own if k not in copies and k not in state]
    unexpected = [k for k in state if k not in own or k in copies]
    other: list[str] = []
    for k in own.keys() & state.keys() - copies.keys():
        if state[k].shape != own[k].shape:
            other.append(f"{k}: {(*state[k].shape,)} instead of {(*own[k].shape,)}")
        elif state[k].is_floating_point() != own[k].is_floating_point():
            other.append(f"{k}: {state[k].dtype} instead of {own[k].dtype}")
    wrong = {"missing": missing, "unknown to the model": unexpected, "of another shape or type": sorted(other)}
    if any(wrong.values()):
        found = [f"{len(names)} {what} ({_few(names)})" for what, names in wrong.items() if names]
        raise ValueError(f"the weights do not fit the model: tensors: {'; '.join(found)}")
    model.load_state_dict({**state, **{k: state[source] for k, source in copies.items()}})


def _auxiliary_names(model: nn.Module) -> dict[str, str]:
    """Names of the auxiliary norms' tensors -> those of the main norms' that they begin as."""
    names: dict[str, str] = {}
    dual = set(norms(model))
    for path, module in model.named_modules():
        if module in dual and module.aux is not None:
            prefix = f"{path}." if path else ""
            names |= {f"{prefix}aux.{k}": f"{prefix}{k}" for k in module.aux.state_dict()}
    return names


def _few(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown(name, 100) for name in names[:most]) + rest


def load_init(model: nn.Module, path: str, config: Config, say: Callable[[str], object]) -> None:
    """Start a converted `model` from the plain weights in the .safetensors file `path` (`model.init`).

    `say` is told where the file's header, as fap-export writes it, states other inputs or another model
    than `config`. Raises ValueError, before anything is copied, for what is no such file or does not fit.
    """
    where = f"model.init = {shown(path)}"
    held = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    try:
        # Weights in float64 are twice as large as ours.
        state, header = _read_weights(Path(os.path.expanduser(path)), 2 * held + MOST_HEADER)
        load_plain(model, state)
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file") from None
    except OSError as e:
        raise ValueError(f"{where}: {e.strerror or e}") from None
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    for field, ours in (("mean", config.data.mean), ("std", config.data.std)):
        stated = _number_or_text(header.get(field, "null"))
        if stated not in (None, list(ours)):
            say(
                f"warning: {where} was trained with {field} = {shown(stated)}, but data.{field} = {list(ours)}: "
                "it knows its inputs on another scale"
            )
    stated = header.get("model", config.model.name)
    if stated != config.model.name:
        say(f"warning: {where} holds weights of {shown(stated)}, but model.name = {shown(config.model.name)}")


def _read_weights(
    file: Path,
    most: int,  # bytes
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file of plain weights. Raises OSError; ValueError for any other file."""
    from fap import checkpoint  # not at the top: that module builds models

    content = read_regular(file, most)
    try:
        state = safetensors.torch.load(content)
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as e:
        # Not by its suffix: whatever it is called, a pickle is never loaded.
        raise ValueError(f"no safetensors file ({shown(str(e))}); {_how_to_convert(file)}") from None
    if any(name.startswith("momentum.") for name in state):
        raise ValueError("a run's checkpoint; fap-export makes plain weights of it")
    if "crc32" in header:  # of fap-export
        try:
            checkpoint.load(file)
        except checkpoint.DamagedCheckpoint as e:
            raise ValueError(str(e)) from None
    return state, header


def _how_to_convert(file: Path) -> str:
    load = f"torch.load({file.name!r}, map_location='cpu', weights_only=True)"
    save = f"save_file({{k: v.clone() for k, v in {load}.items()}}, {file.with_suffix('.safetensors').name!r})"
    code = f"import torch; from safetensors.torch import save_file; {save}"
    return f'a file of torch.save (.pth, .pt, .bin) is converted, in its folder, by: python -c "{code}"'


def _number_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


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
