"""One half-precision copy of the weights per step, which all passes read.

Under autocast every pass casts every weight anew, and casts its gradient back: two small kernels
per weight and pass. Here one kernel casts the weights of a whole step, and
`fap.step.flat.GradientSum` brings a pass's gradients back. The numbers are the same bit for bit.
Twin: autocast's own casts.
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fap.nets.stem import StemConv2d
from fap.nets.strided import StridedConv2d
from fap.step.flat import Flat

Amp = Literal["off", "fp16", "bf16"]
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
BF16_BITS = 8  # significant ones

# Layers that hand weight and bias as they are to an operator which autocast runs in half precision.
# It is the forward that counts: a subclass with one of its own may do anything with its weight.
PLAIN = (
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    nn.Conv3d.forward,
    nn.Linear.forward,
    StemConv2d.forward,
    StridedConv2d.forward,
)


def castable(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that autocast would cast in every pass.

    One that anything reads in full precision, a tied embedding for example, is none of them.
    """
    cast: set[nn.Parameter] = set()
    read_otherwise: set[nn.Parameter] = set()
    for module in model.modules():
        full_precision = isinstance(module, StemConv2d) and module.stem.full_precision
        for name, parameter in module.named_parameters(recurse=False):
            if type(module).forward in PLAIN and name in ("weight", "bias") and not full_precision:
                cast.add(parameter)
            else:
                read_otherwise.add(parameter)
    return cast - read_otherwise


class _Place(NamedTuple):
    """Where the model reads a parameter that has a copy; a shared one has several."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    copy: nn.Parameter


class HalfWeights:
    """Copies of some parameters that stand in for them while a pass runs."""

    def __init__(
        self,
        model: nn.Module,
        flat: Flat,
        parameters: Collection[nn.Parameter],  # all of them in flat.first
        dtype: torch.dtype,
    ) -> None:
        self.source = flat.param.data[flat.first]
        self.values = torch.zeros_like(self.source, dtype=dtype)
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for name, parameter in flat.parameters.items():
            if parameter in parameters:
                values = self.values[flat.slices[name]]
                view = values.as_strided(parameter.shape, parameter.stride())
                copies[parameter] = nn.Parameter(view, requires_grad=parameter.requires_grad)
        trained = [flat.parameters[name] for name in flat.trained]
        self.leaves: list[Tensor] = [copies.get(p, p) for p in trained]
        """What a pass differentiates, in the order of `flat.trained`.

        That is the copy, or the parameter itself where it has none.
        """
        self.places = [
            _Place(module, name, parameter, copies[parameter])
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter in copies
        ]

    def refresh(self) -> None:
        """Copy the weights as they are now."""
        self.values.copy_(self.source)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block the model computes with the copies."""
        # `setattr` would check and register anew, for every weight in every pass.
        for place in self.places:
            place.module._parameters[place.name] = place.copy
        try:
            yield
        finally:
            for place in self.places:
                place.module._parameters[place.name] = place.parameter


def grey_level_survives_bf16(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Is one grey level at least 2 ulp of bfloat16 at the largest normalised input?"""
    for channel_mean, channel_std in zip(mean, std, strict=True):
        grey_level = 1 / (255 * channel_std)
        largest = max(channel_mean, 1 - channel_mean) / channel_std
        ulp = 2.0 ** (math.ceil(math.log2(largest)) - BF16_BITS)
        if grey_level < 2 * ulp:
            return False
    return True
