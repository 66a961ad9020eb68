"""Does every norm see the rows of a batch one after the other? Proved on two images.

The groups of a pass are runs of rows. In many models the first dimension of a norm's input is a
multiple of the batch: tokens or windows are folded into it. If those of one image lie together, in
the order of the images, every group just has more rows. If they do not, rows would go through norms
that are not theirs, without any error. That cannot be seen from a shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fap.nets import stem
from fap.nets.dual import norms
from fap.nets.norm import DualBatchNorm, DualBatchNorm2d, DualNorm
from pipelines.sizes import Size, sides_of

N_IMAGES = 2
SEED = 20
# In single precision two ways to compute the same differ by about 1e-7 of the largest value, and a
# deep network enlarges that. What belongs to another image differs by as much as two images do.
ROUNDING = 1e-5
SHARE = 0.1  # of the difference between the two images


@contextlib.contextmanager
def lengths_seen(model: nn.Module) -> Iterator[set[int]]:
    """Within the block: the first dimensions of what reaches the model's batch norms."""
    lengths: set[int] = set()

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        lengths.add(len(args[0]))

    batch_norms = [norm for norm in norms(model) if isinstance(norm, DualBatchNorm)]
    hooks = [norm.register_forward_pre_hook(look) for norm in batch_norms]
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()


def divided(model: nn.Module) -> list[DualNorm]:
    """The norms that divide a batch, so that the order of its rows matters to them."""
    return [n for n in norms(model) if isinstance(n, DualBatchNorm) or n.aux is not None]


def needs_proof(
    model: nn.Module,
    lengths: set[int],  # first dimensions that its batch norms saw while the stem was installed
) -> bool:
    """A batch norm of (B, C, H, W) whose first dimension is the batch has the rows in order."""
    only_images = all(isinstance(norm, DualBatchNorm2d) for norm in divided(model))
    return not (only_images and lengths <= {stem.N_IMAGES})


@torch.no_grad()
def out_of_order(model: nn.Module, size: Size) -> list[DualNorm]:
    """The norms whose input does not hold the rows of a batch one after the other.

    Two images are forwarded, then the same two in the other order. The first half of a norm's input
    must become the second half, and the other way round. Both forwards are in evaluation mode,
    where no row depends on another. They cost the forwards of four images, without gradients.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(N_IMAGES, 3, *sides_of(size), generator=generator).to(parameter)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # what follows must draw as if this never happened
            ways = _inputs(model, images), _inputs(model, images.flip(0))
    finally:
        model.train(was_training)
    wrong = []
    for norm in divided(model):
        calls = zip(ways[0][norm], ways[1][norm], strict=True)
        if not all(_changed_places(one, other) for one, other in calls):
            wrong.append(norm)
    return wrong


def _inputs(model: nn.Module, images: Tensor) -> dict[DualNorm, list[Tensor]]:
    """What each norm that divides the batch was given, call after call."""
    seen: dict[DualNorm, list[Tensor]] = {norm: [] for norm in divided(model)}

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, DualNorm)
        seen[norm].append(args[0].clone())

    hooks = [norm.register_forward_pre_hook(look) for norm in seen]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _changed_places(one: Tensor, other: Tensor) -> bool:
    """Are they the rows of two images, (a, b) and (b, a)?"""
    if one.shape != other.shape or len(one) % N_IMAGES:
        return False
    # An untrained network may overflow; what did is the same in both.
    a, b = one.nan_to_num().chunk(N_IMAGES)
    second_b, second_a = other.nan_to_num().chunk(N_IMAGES)
    between_images = (a - b).abs().max()
    allowed = SHARE * between_images + ROUNDING * one.nan_to_num().abs().max()
    moved = torch.maximum((a - second_a).abs().max(), (b - second_b).abs().max())
    return bool(moved <= allowed)


def names_of(wrong: Sequence[DualNorm]) -> str:
    """As in a message: the first few, and how many more."""
    few = 3
    names = ", ".join(f"{norm.path} ({norm.plain_name})" for norm in wrong[:few])
    if len(wrong) > few:
        names += f" and {len(wrong) - few} more"
    return names
