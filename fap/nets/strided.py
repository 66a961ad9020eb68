"""1x1 convolutions with a stride over few channels, for which torch corrupts the heap on a CPU.

The gradient of such a weight writes beyond its memory in torch 2.14.1, if the images are
channels_last, float32 and more than one: with fewer than 8 channels at every size tried, with 8
and more at none. The first block of timm's repvgg_a0 has one.
"""

from torch import Tensor, nn

FEWEST_CHANNELS = 8  # that are safe


class StridedConv2d(nn.Conv2d):
    """A convolution of kind 1x1 with a stride, computed without one on the pixels that it reads.

    Twin: `nn.Conv2d`.
    """

    def forward(
        self,
        x: Tensor,  # (B, C, H, W)
    ) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return nn.functional.conv2d(pixels_read(self, x), self.weight, self.bias)


def mend_strided(model: nn.Module) -> None:
    """Turn every plain convolution of `model` that may corrupt the heap into a `StridedConv2d`."""
    for module in model.modules():
        if type(module) is nn.Conv2d and corrupts_the_heap(module):
            module.__class__ = StridedConv2d


def corrupts_the_heap(conv: nn.Conv2d) -> bool:
    """May the gradient of its weight write beyond its memory on a CPU?"""
    is_1x1 = conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid", "same")
    has_stride = conv.stride != (1, 1)
    return is_1x1 and has_stride and conv.groups == 1 and conv.in_channels < FEWEST_CHANNELS


def pixels_read(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Every stride-th pixel of `x`: all that a 1x1 convolution reads."""
    down, right = conv.stride
    return x[..., ::down, ::right]
