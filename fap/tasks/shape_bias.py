"""Shape or texture: what a classifier decides on images whose two cues conflict.

Geirhos et al. (2019), "ImageNet-trained CNNs are biased towards texture", ICLR. The decision is the
authors' (`probabilities_to_decision.py` of rgeirhos/texture-vs-shape): the category whose classes
have the highest mean probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from fap.tasks.base import Result, plain_number
from fap.tasks.labels import PADDING_LABEL, SAME_CLASSES, Matching
from pipelines import Store

N_CATEGORIES = 16
METRICS = ("shape_bias", "top1", "texture")
ROUNDING = 1e-9


def pair(shape: int, texture: int) -> int:
    """The reference of an image with these categories, numbers below N_CATEGORIES."""
    return N_CATEGORIES * shape + texture


class ShapeOrTexture:
    """A `fap.tasks.base.Judge` of such images, whose references are `pair`s."""

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes  # of the model

    def evaluator(
        self, device: torch.device, matching: Matching = SAME_CLASSES, store: Store | None = None
    ) -> ShapeBias:
        assert matching.groups is not None, "the classes of each category"
        return ShapeBias(device, matching.groups, self.n_classes)

    def check_metrics(self, found: Mapping[str, object]) -> Result:
        if found.keys() != set(METRICS):
            raise ValueError("it has other metrics")
        bias, shape, texture = (float(plain_number(found, name)) for name in METRICS)
        if min(shape, texture) < 0 or shape + texture > 1 + ROUNDING:  # an image is one at most
            raise ValueError("it has no shares of decisions")
        if not math.isnan(bias) and not 0 <= bias <= 1:
            raise ValueError("it has no shape bias")
        return {"shape_bias": bias, "top1": shape, "texture": texture}


class ShapeBias:
    """How often the decision is the shape, and how often the texture: an `Evaluator`."""

    def __init__(
        self,
        device: torch.device,
        groups: Tensor,  # int64 (N_CATEGORIES, n), as in `fap.tasks.labels.Matching`
        n_classes: int,
    ) -> None:
        belongs = torch.zeros(len(groups), n_classes, dtype=torch.float64)
        belongs.scatter_(1, groups.cpu(), 1)  # a class that is repeated still counts once
        self.shares = (belongs / belongs.sum(1, keepdim=True)).to(device)
        # Decided for the shape, for the texture, images: of all batches, on the device.
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(
        self,
        outputs: Tensor,  # (B, classes)
        references: Tensor,  # int64 (B,): `pair`, -1 for padding
    ) -> None:
        probabilities = outputs.double().softmax(1)
        decisions = (probabilities @ self.shares.T).argmax(1)
        counted = references != PADDING_LABEL
        is_shape = (decisions == references // N_CATEGORIES) & counted
        is_texture = (decisions == references % N_CATEGORIES) & counted
        self.sums += torch.stack([is_shape.sum(), is_texture.sum(), counted.sum()])

    def result(self) -> Result:
        """Fractions of the images, and of the decisions for either cue those for the shape.

        `top1` is the share of images decided for the shape, the category of their folder; NaN
        stands for a bias of no decision at all.
        """
        sums = self.sums.clone()
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        shape, texture, count = sums.tolist()
        if not count:
            raise ValueError("evaluation: the data hold no images")
        bias = shape / (shape + texture) if shape + texture else math.nan
        return {
            "shape_bias": bias,
            "top1": shape / count,
            "texture": texture / count,
            "count": int(count),
        }
