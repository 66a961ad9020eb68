"""The stem: the layers that read the image, which can give the gradient of a few of its rows.

Only the rows to be attacked need an input gradient. Autograd alone would compute that of the whole
batch.

Usually one convolution reads the image, and nothing else does: then the stem is *direct*. Else the
image may be padded, resized or cut into patches on its way, as long as no parameter is involved;
several layers may read it; and it may go past them. Then autograd follows it on all ways, and only
the layers that read it leave rows out.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same_arg
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_pre_hook

from fap.nets.strided import StridedConv2d, corrupts_the_heap, pixels_read
from pipelines.files import shown
from pipelines.sizes import Size, sides_of, size_in_words

N_IMAGES = 2  # by which `install_stem` looks: enough to see whether rows are mixed


class Stem:
    """What the layers of one model that read the image share."""

    direct: bool

    def __init__(self, *, direct: bool) -> None:
        self.direct = direct  # they read the very image, and nothing else does
        self.full_precision = False
        """Under autocast: compute in the input's type, round only the result.

        For a perturbation of one grey level that would not survive the cast of the input.
        """
        self.rows: slice | None = None  # whose gradient is wanted in this pass
        self._probe: Tensor | None = None

    @contextlib.contextmanager
    def probing(
        self,
        x: Tensor,  # (B, 3, H, W)
        rows: slice,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The input to call the model with, and the leaf that gets the gradient of `rows`."""
        probe = x[rows].detach().requires_grad_()
        self.rows = rows
        if self.direct:
            self._probe = probe
        else:
            x = _Tied.apply(x, probe, rows)
        try:
            yield x, probe
        finally:
            self.rows = None
            self._probe = None

    def split(
        self,
        x: Tensor,  # (B, ...): what a layer reads
    ) -> tuple[Tensor, Tensor]:
        """All rows, which need no gradient, and those of them that do."""
        assert self.rows is not None
        if self._probe is not None:
            return x, self._probe
        return x.detach(), _Rows.apply(x, self.rows)


class _Tied(torch.autograd.Function):
    """The batch, tied to a leaf: the gradient of some of its rows is the leaf's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, rows: slice) -> Tensor:
        ctx.rows = rows
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, ...]:
        # Whatever the operators on the way have made of it: all images are channels_last.
        return None, gx[ctx.rows].contiguous(memory_format=torch.channels_last), None


class _Rows(torch.autograd.Function):
    """Some rows. Unlike autograd's own slice, its backward keeps the memory format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: slice) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rows = rows
        return x[rows]

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gx = torch.zeros_like(x)
        gx[ctx.rows] = gy
        return gx, None


class StemConv2d(nn.Conv2d):
    """A convolution that reads the image. While its stem probes, the gradient of its input is that
    of the probed rows.

    It is made of a convolution that exists, by `install_stem`.
    """

    stem: Stem
    pads_as_tensorflow = False  # Conv2dSame: as much as the image's sides need

    def forward(
        self,
        x: Tensor,  # (B, C, H, W)
    ) -> Tensor:
        device = x.device.type
        result = x.dtype
        if torch.is_autocast_enabled(device):
            result = torch.get_autocast_dtype(device)
        inside = x.dtype if self.stem.full_precision else result
        weight = self.weight.to(inside)
        bias = None if self.bias is None else self.bias.to(inside)
        with torch.autocast(device, enabled=False):
            if self.stem.rows is None or not self.training:
                x = self.entering(x.to(inside))
                stride, padding = self.geometry(x)
                y = nn.functional.conv2d(
                    x, weight, bias, stride, padding, self.dilation, self.groups
                )
                return y.to(result)
            whole, probe = self.stem.split(x)
            return _StemConv.apply(whole.to(inside), probe, weight, bias, self).to(result)

    def entering(self, x: Tensor) -> Tensor:
        """What is left of `x` for the operator to do by stride and padding in `geometry`."""
        if self._is_mended(x):
            return pixels_read(self, x)
        uneven = self._uneven_padding(x.shape)
        return nn.functional.pad(x, uneven) if any(uneven) else x

    def leaving(self, gx: Tensor, shape: torch.Size) -> Tensor:
        """The adjoint of `entering`: the gradient of an image of that shape."""
        if self._is_mended(gx):
            whole = torch.empty(
                shape, dtype=gx.dtype, device=gx.device, memory_format=torch.channels_last
            )
            pixels_read(self, whole.zero_()).copy_(gx)
            return whole
        uneven = self._uneven_padding(shape)
        return nn.functional.pad(gx, [-side for side in uneven]) if any(uneven) else gx

    def geometry(self, entered: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Stride, and padding by numbers, for what has entered."""
        if self._is_mended(entered):
            return (1, 1), (0, 0)
        if isinstance(self.padding, str):
            return self.stride, (0, 0)
        return self.stride, self.padding

    def _is_mended(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and corrupts_the_heap(self)

    def _uneven_padding(self, shape: torch.Size) -> list[int]:
        """Left, right, top, bottom, of which the operator knows nothing; empty if it pads."""
        if self.pads_as_tensorflow:
            return pad_same_arg(
                list(shape[-2:]), list(self.kernel_size), list(self.stride), list(self.dilation)
            )
        if self.padding == "same":
            return self._reversed_padding_repeated_twice
        return []


class _StemConv(torch.autograd.Function):
    """Weight gradient over all rows, data gradient over the probe's rows.

    Twin: autograd on the whole batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, C, H, W); its own gradient is never asked for
        probe: Tensor,  # (n, C, H, W); an argument only so that autograd gives it a gradient
        weight: Tensor,
        bias: Tensor | None,
        conv: StemConv2d,
    ) -> Tensor:
        ctx.conv = conv
        ctx.rows = conv.stem.rows
        ctx.probed = probe.shape
        entered = conv.entering(x)
        ctx.save_for_backward(entered, weight)
        stride, padding = conv.geometry(entered)
        return nn.functional.conv2d(
            entered, weight, bias, stride, padding, conv.dilation, conv.groups
        )

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = ctx.rows
        conv = ctx.conv
        has_bias = ctx.needs_input_grad[3]
        transposed = False
        output_padding = [0, 0]
        stride, padding = conv.geometry(x)
        geometry = (
            stride, padding, conv.dilation, transposed, output_padding, conv.groups,
        )  # fmt: skip
        # The last argument says which gradients are wanted: of the input, the weight, the bias.
        _, gw, gb = torch.ops.aten.convolution_backward(
            gy, x, weight, [len(weight)], *geometry, [False, True, has_bias]
        )
        gx, _, _ = torch.ops.aten.convolution_backward(
            gy[rows], x[rows], weight, None, *geometry, [True, False, False]
        )
        return None, conv.leaving(gx, ctx.probed), gw, gb, None


class StemLayer(nn.Module):
    """Any other layer that reads the image: it computes the probed rows by themselves.

    Autograd then leaves out the gradients of the others. It costs a copy of the output. The class
    of a layer is a subclass of this one and of the layer's own (`_as_stem`).
    """

    stem: Stem

    def forward(
        self,
        x: Tensor,  # (B, ...)
    ) -> Tensor:
        device = x.device.type
        if not (torch.is_autocast_enabled(device) and self.stem.full_precision):
            return self._by_parts(x)
        result = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return self._by_parts(x).to(result)

    def _by_parts(self, x: Tensor) -> Tensor:
        rows = self.stem.rows
        if rows is None or not self.training:
            return super().forward(x)
        whole, probe = self.stem.split(x)
        parts = [whole[: rows.start], probe, whole[rows.stop :]]
        return torch.cat([super(StemLayer, self).forward(part) for part in parts if len(part)])


@functools.cache
def _as_stem(layer: type[nn.Module]) -> type[nn.Module]:
    """One class for each, so that equal layers stay of one class."""
    return type(f"Stem{layer.__name__}", (StemLayer, layer), {})


# ------------------------------------------------------------------ which layers


class _Way(NamedTuple):
    """How an image reaches the logits of a model."""

    readers: list[nn.Module]
    direct: bool


def install_stem(model: nn.Module, size: Size) -> None:
    """Turn the layers that read the image into a stem, in place.

    Nothing is changed where no such layer is a convolution or linear, or where rows are mixed
    before it: then the input gradient is that of the whole batch. Raises ValueError if the model
    does not accept images of this size.
    """
    way = _way_of_the_image(model, size)
    if not way.readers:
        return
    stem = Stem(direct=way.direct)
    for reader in way.readers:
        is_conv = type(reader) in (nn.Conv2d, StridedConv2d, Conv2dSame)
        if is_conv and reader.padding_mode == "zeros":
            pads_as_tensorflow = type(reader) is Conv2dSame
            reader.__class__ = StemConv2d
            assert isinstance(reader, StemConv2d)
            reader.pads_as_tensorflow = pads_as_tensorflow
        else:
            reader.__class__ = _as_stem(type(reader))  # type: ignore[arg-type]  # a class has a hash
            assert isinstance(reader, StemLayer)
        reader.stem = stem


def _way_of_the_image(model: nn.Module, size: Size) -> _Way:
    """The convolutions and linear layers that read the image, before any other parameter does.

    None of them if one cannot be part of a stem.
    """
    image = torch.zeros(N_IMAGES, 3, *sides_of(size), requires_grad=True)
    read: dict[nn.Module, list[Tensor]] = {}
    calls: Counter[nn.Module] = Counter()

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Note who reads the image, and give it a detached one.

        So the logits still depend on the image if it reaches them in any other way.
        """
        if list(module.children()):
            return None
        calls[module] += 1
        if len(args) != 1 or not _is_made_of(args[0], image):
            return None
        if not isinstance(module, _ConvNd | nn.Linear) and not _mixes_rows(module):
            return None
        read.setdefault(module, []).append(args[0])
        return (args[0].detach(),)

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
    for module, inputs in read.items():
        # Called elsewhere too, it would leave out rows of what parameters have made.
        if calls[module] > len(inputs) or _mixes_rows(module):
            return _Way([], direct=False)
        if not all(_keeps_rows_apart(x, image) for x in inputs):
            return _Way([], direct=False)
    very_image = all(x is image for inputs in read.values() for x in inputs)
    return _Way([*read], direct=very_image and not _depends_on(logits, image))


def _mixes_rows(module: nn.Module) -> bool:
    """Does it normalise by statistics of the batch, in training?"""
    return module._buffers.get("running_mean") is not None


def _is_made_of(x: Any, image: Tensor) -> bool:
    """Does a tensor depend on the image and on no parameter?"""
    if x is image:
        return True
    if not isinstance(x, Tensor) or x.grad_fn is None:
        return False
    found = False
    seen = set()
    waiting = [x.grad_fn]
    while waiting:
        made_by = waiting.pop()
        if made_by in seen:
            continue
        seen.add(made_by)
        leaf = getattr(made_by, "variable", None)
        if leaf is image:
            found = True
        elif leaf is not None:
            return False
        waiting += [function for function, _ in made_by.next_functions if function is not None]
    return found


def _depends_on(logits: Tensor, image: Tensor) -> bool:
    if not logits.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(logits.sum(), image, allow_unused=True)
    return gradient is not None


def _keeps_rows_apart(
    x: Tensor,  # made of the image
    image: Tensor,  # (N_IMAGES, 3, H, W)
) -> bool:
    """Is each row of `x` made of the same row of the image alone?"""
    if len(x) != len(image):
        return False
    if x is image:
        return True
    first = x[0].flatten()
    weights = torch.linspace(1, 2, len(first))  # no two pixels cancel out
    (gradient,) = torch.autograd.grad(first @ weights, image, retain_graph=True)
    return not gradient[1:].any()


def stem_of(model: nn.Module) -> Stem | None:
    """The stem, or None if the model has none (see `install_stem`)."""
    for module in model.modules():
        if isinstance(module, StemConv2d | StemLayer):
            return module.stem
    return None
