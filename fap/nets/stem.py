"""The first convolution, which can differentiate few rows: only attacked rows need an input
gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class StemConv2d(nn.Conv2d):
    """The first convolution. With a `probe` it also gives the gradient of some input rows, and of
    no others.

    The probe is a leaf that aliases the rows [first, first + len(probe)) of the input.
    """

    probe: Tensor | None = None
    first = 0
    full_precision = False

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        out = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        inside = (
            x.dtype if self.full_precision else out
        )  # one grey level would not survive the cast
        weight, bias = self.weight.to(inside), None if self.bias is None else self.bias.to(inside)
        with torch.autocast(device, enabled=False):
            if self.probe is None or not self.training:
                return self._conv_forward(x.to(inside), weight, bias).to(out)
            return _StemConv.apply(x.to(inside), self.probe, weight, bias, self).to(out)


class _StemConv(torch.autograd.Function):
    """Weight gradient over all rows, data gradient over the probe's rows. Twin: autograd on the
    whole batch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probe: Tensor, weight: Tensor, bias: Tensor | None, conv: StemConv2d
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.conv = slice(conv.first, conv.first + len(probe)), conv
        return conv._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        c, rows, has_bias = ctx.conv, ctx.rows, ctx.needs_input_grad[3]
        geometry = (c.stride, c.padding, c.dilation, False, [0, 0], c.groups)
        _, gw, gb = torch.ops.aten.convolution_backward(
            gy, x, weight, [len(weight)], *geometry, [False, True, has_bias]
        )
        gx, _, _ = torch.ops.aten.convolution_backward(
            gy[rows], x[rows], weight, None, *geometry, [True, False, False]
        )
        return None, gx, gw, gb, None


def install_stem(model: nn.Module, size: int) -> None:
    """Turn the first convolution into a `StemConv2d`, if the image reaches the logits through it
    alone.
    """
    image = torch.zeros(1, 3, size, size, requires_grad=True)
    seen: list[nn.Module] = []

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Note who reads the image; cut it off there, so that any other way to the logits still
        needs its gradient.
        """
        if list(module.children()) or not any(a is image for a in args):
            return None
        seen.append(module)
        return tuple(a.detach() if a is image else a for a in args)

    try:
        with register_module_forward_pre_hook(cut):  # type: ignore[arg-type]  # torch's stub: no new arguments
            logits = model.eval()(image)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ValueError(
            f"data.size = {size}: the model does not accept images of {size} px: {e}"
        ) from None
    finally:
        model.train()
    bypassed = torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is not None
    stem = seen[0] if len(seen) == 1 and not bypassed else None
    if (
        type(stem) is nn.Conv2d
        and stem.padding_mode == "zeros"
        and not isinstance(stem.padding, str)
    ):
        stem.__class__ = StemConv2d


def stem_of(model: nn.Module) -> StemConv2d | None:
    """The stem, or None if the model's first layer is no plain convolution."""
    return next((m for m in model.modules() if isinstance(m, StemConv2d)), None)
