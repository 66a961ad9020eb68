"""From a dense detector's outputs to detections: as torchvision's RetinaNet, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, clip_boxes_to_image

LEAST_SCORE = 0.05  # exclusive
MOST_PER_LEVEL = 1000  # candidates of one pyramid level
MOST_OVERLAP = 0.5  # IoU; the lower scored of two boxes of one class goes beyond
MOST_DETECTIONS = 100  # of one image, as COCO counts them

_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))


class Detections(NamedTuple):
    """Those of one image, best first."""

    boxes: Tensor
    """float (n, 4): left, top, right, bottom in pixels of the canvas."""
    scores: Tensor
    """float (n,): probabilities."""
    classes: Tensor
    """int64 (n,)."""


def detections(
    logits: Tensor,  # (A, K)
    regressions: Tensor,  # (A, 4)
    anchors: Tensor,  # (A, 4)
    per_level: Sequence[int],  # anchors of each level
    place: Sequence[int],  # top, left, height, width on the canvas: where the image lies
) -> Detections:
    """The boxes of one image, cut at its border, at most 100. Waits for the device."""
    top, left, height, width = place
    n_classes = logits.shape[1]
    found = []
    for level_logits, level_regressions, level_anchors in zip(
        logits.split(list(per_level)),
        regressions.split(list(per_level)),
        anchors.split(list(per_level)),
        strict=True,
    ):
        scores = level_logits.sigmoid().flatten()
        (candidates,) = torch.where(scores > LEAST_SCORE)
        scores, order = scores[candidates].topk(min(MOST_PER_LEVEL, len(candidates)))
        candidates = candidates[order]
        anchor = candidates // n_classes
        boxes = _coder.decode_single(level_regressions[anchor], level_anchors[anchor])
        found.append(Detections(boxes, scores, candidates % n_classes))
    boxes, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    # Before the suppression, as torchvision: a box counts by what it covers of the image.
    corner = boxes.new_tensor([left, top, left, top])
    boxes = clip_boxes_to_image(boxes - corner, (height, width)) + corner
    keep = batched_nms(boxes, scores, classes, MOST_OVERLAP)[:MOST_DETECTIONS]
    return Detections(boxes[keep], scores[keep], classes[keep])
