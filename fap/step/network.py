"""The model as a step runs it: in half precision, in groups, with a probe at its stem."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fap.config import Config
from fap.nets.dual import norm_state
from fap.nets.norm import Group
from fap.nets.stem import stem_of
from fap.step.flat import Flat
from fap.step.half import HALF, Amp, HalfWeights, castable, grey_level_survives_bf16
from fap.step.parameters import settings_of


class Network:
    """`model` must be prepared (`fap.nets.build.prepare`) and on its device.

    Its parameters, gradients and running statistics become views of `flat`'s buffers.
    """

    def __init__(self, model: nn.Module, config: Config, amp: Amp) -> None:
        """Raises ValueError for a model that is not prepared, or that `optim` does not suit."""
        self.norm_state = norm_state(model)  # first of all: no other model can be trained
        self.model = model.train()
        self.forward: Callable[[Tensor], Tensor] = model
        """What is called: the model, or what a compiler made of it."""
        self.amp = amp
        self.stem = stem_of(model)
        if self.stem is not None:
            survives = grey_level_survives_bf16(config.data.mean, config.data.std)
            self.stem.full_precision = amp == "bf16" and not survives
        # After the stem's precision is known: its weights are cast only if it runs in half.
        cast = castable(model)
        self.flat = Flat(model, settings_of(model, config.optim), first=cast)
        self.mean_255 = self._per_channel(config.data.mean).mul_(255)
        self.std_255 = self._per_channel(config.data.std).mul_(255)
        self.half_dtype = HALF.get(amp)
        self.half: HalfWeights | None = None
        if self.half_dtype is not None:
            self.half = HalfWeights(model, self.flat, cast, self.half_dtype)

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        like = self.flat.param
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)

    def normalise(
        self,
        images_255: Tensor,  # (B, 3, H, W) grey levels
        out: Tensor,  # as images_255
    ) -> None:
        torch.sub(images_255, self.mean_255, out=out)
        out.div_(self.std_255)

    @property
    def leaves(self) -> list[Tensor]:
        """What a pass differentiates, in the order of `flat.trained`."""
        if self.half is not None:
            return self.half.leaves
        return [self.flat.parameters[name] for name in self.flat.trained]

    def refresh(self) -> None:
        """Once per step: the half-precision weights follow the parameters."""
        if self.half is not None:
            self.half.refresh()

    def __call__(
        self,
        x: Tensor,  # (B, 3, H, W), normalised
        groups: Sequence[Group],
    ) -> Tensor:  # (B, ...)
        """Outputs in full precision, in training mode, with the batch norms in `groups`."""
        self.norm_state.groups = tuple(groups)
        if self.amp == "off":
            return self.forward(x)
        copies = contextlib.nullcontext() if self.half is None else self.half.in_model()
        # Entered inside the captured region: the weight cache must not outlive the step.
        with torch.autocast(x.device.type, HALF[self.amp]), copies:
            return self.forward(x).float()

    @contextlib.contextmanager
    def probing(self, x: Tensor, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """The input to call with, and the leaf that gets the input gradient.

        The leaf has the gradient of `rows` alone where the model has a stem, else of all of `x`.
        """
        if self.stem is None:
            leaf = x.detach().requires_grad_()
            # A model's hooks on its input work on no leaf under autograd.grad.
            yield leaf.view_as(leaf), leaf
            return
        with self.stem.probing(x, rows) as input_and_leaf:
            yield input_and_leaf
