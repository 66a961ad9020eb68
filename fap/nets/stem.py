"""The stem: a first convolution that can give the gradient of a few input rows.

Only the rows to be attacked need an input gradient. Autograd alone would compute that of the whole
batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipelines.files import shown
from pipelines.sizes import Size, sides_of, size_in_words


class StemConv2d(nn.Conv2d):
    """The first convolution. With a `probe` it also gives the gradient of some of its input rows.

    The probe is a leaf that aliases the rows [first, first + len(probe)) of the input. No other
    row's gradient is computed.
    """

    probe: Tensor | None = None
    first = 0
    full_precision = False  # under autocast: convolve in the input's type, round only the result

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W)
    ) -> Tensor:
        device = x.device.type
        result = x.dtype
        if torch.is_autocast_enabled(device):
            result = torch.get_autocast_dtype(device)
        # A perturbation of one grey level would not survive the cast of the input.
        inside = x.dtype if self.full_precision else result
        weight = self.weight.to(inside)
        bias = None if self.bias is None else self.bias.to(inside)
        with torch.autocast(device, enabled=False):
            if self.probe is None or not self.training:
                return self._conv_forward(x.to(inside), weight, bias).to(result)
            return _StemConv.apply(x.to(inside), self.probe, weight, bias, self).to(result)


class _StemConv(torch.autograd.Function):
    """Weight gradient over all rows, data gradient over the probe's rows.

    Twin: autograd on the whole batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, 3, H, W); its own gradient is never asked for
        probe: Tensor,  # (n, 3, H, W); an argument only so that autograd gives it a gradient
        weight: Tensor,
        bias: Tensor | None,
        conv: StemConv2d,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = slice(conv.first, conv.first + len(probe))
        ctx.conv = conv
        return conv._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = ctx.rows
        conv = ctx.conv
        has_bias = ctx.needs_input_grad[3]
        transposed = False
        output_padding = [0, 0]
        geometry = (
            conv.stride, conv.padding, conv.dilation, transposed, output_padding, conv.groups,
        )  # fmt: skip
        # The last argument says which gradients are wanted: of the input, the weight, the bias.
        _, gw, gb = torch.ops.aten.convolution_backward(
            gy, x, weight, [len(weight)], *geometry, [False, True, has_bias]
        )
        gx, _, _ = torch.ops.aten.convolution_backward(
            gy[rows], x[rows], weight, None, *geometry, [True, False, False]
        )
        return None, gx, gw, gb, None


def install_stem(model: nn.Module, size: Size) -> None:
    """Turn the first convolution into a `StemConv2d`, in place.

    Nothing is changed unless the image reaches the logits through that convolution alone: else
    its data gradient would be only a part of the image's. Raises ValueError if the model does not
    accept images of this size.
    """
    stem = _only_reader(model, size)
    if type(stem) is not nn.Conv2d:
        return
    # `convolution_backward` knows padding by numbers, with zeros, and no other.
    if stem.padding_mode == "zeros" and not isinstance(stem.padding, str):
        stem.__class__ = StemConv2d


def _only_reader(model: nn.Module, size: Size) -> nn.Module | None:
    """The module through which alone an image reaches the logits; None if there is another way."""
    image = torch.zeros(1, 3, *sides_of(size), requires_grad=True)
    readers: list[nn.Module] = []

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Note who reads the image, and give it a detached one.

        So the logits still depend on the image if it reaches them in any other way.
        """
        is_leaf = not list(module.children())
        if not is_leaf or not any(a is image for a in args):
            return None
        readers.append(module)
        return tuple(a.detach() if a is image else a for a in args)

    try:
        with register_module_forward_pre_hook(cut):  # type: ignore[arg-type]  # torch's stub: no new arguments
            logits = model.eval()(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"data.size = {shown(size)}: "
            f"the model does not accept images of {size_in_words(size)} px: {error}"
        ) from None
    finally:
        model.train()
    (gradient,) = torch.autograd.grad(logits.sum(), image, allow_unused=True)
    if gradient is not None or len(readers) != 1:
        return None
    return readers[0]


def stem_of(model: nn.Module) -> StemConv2d | None:
    """The stem, or None if the model has none (see `install_stem`)."""
    for module in model.modules():
        if isinstance(module, StemConv2d):
            return module
    return None
