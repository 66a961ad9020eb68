"""COCO's mean average precision, and what sums it up on a corruption benchmark.

Scored by `faster-coco-eval`; a test holds it against pycocotools.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from fap.tasks.base import CorruptionMean, Result, plain_number
from fap.tasks.boxes_out import detections
from fap.tasks.labels import SAME_CLASSES, Matching
from fap.tasks.mce import ALEXNET_ERRORS
from pipelines.boxes import Annotations, source_boxes
from pipelines.extras import needs

METRICS = {
    "map": "AP",
    "map50": "AP50",
    "map75": "AP75",
    "map_small": "AP small",
    "map_medium": "AP medium",
    "map_large": "AP large",
}
"""By name, with the words for them. Those of sizes are absent where no object has the size."""
SIZES = ("map_small", "map_medium", "map_large")
IOU_50, IOU_75 = 0, 5  # places of these thresholds among COCO's ten


class MeanAveragePrecision:
    """A `fap.tasks.base.Evaluator`; what it gathers does not depend on batches and ranks.

    Unlike others it waits for the device: how many detections there are depends on values.

    Raises:
        ImportError: the scorer is missing.
    """

    def __init__(
        self,
        device: torch.device,
        annotations: Annotations,
        anchors: Tensor,  # (A, 4), on the device
        per_level: Sequence[int],  # anchors of each level
        n_classes: int,  # of the model
        matching: Matching = SAME_CLASSES,
    ) -> None:
        _scorer()  # what is missing is noticed now, not after all images
        self.device = device
        self.annotations = annotations
        self.anchors = anchors
        self.per_level = per_level
        self.n_classes = n_classes
        self.truth_classes = annotations.classes
        self.columns: Tensor | None = None  # the only classes that count; None: all
        if matching.label_map is not None and matching.restrict:
            # Column k is the class of the data's label k, so labels need no mapping.
            self.columns = matching.label_map.to(device)
        elif matching.label_map is not None:
            self.truth_classes = matching.label_map.cpu().numpy()[annotations.classes]
        self.numbers: list[int] = []
        # Per image float64 (n, 7): image number, class, score, box in pixels of the stored image.
        self.found: list[np.ndarray] = [np.zeros((0, 7))]

    def update(
        self,
        outputs: Tensor,  # (B, A * (n_classes + 4))
        references: Tensor,  # int64 (B, 9): image number (-1 for padding), window, place
    ) -> None:
        n_anchors = len(self.anchors)
        logits, regressions = outputs.float().split([n_anchors * self.n_classes, n_anchors * 4], 1)
        logits = logits.view(-1, n_anchors, self.n_classes)
        if self.columns is not None:
            logits = logits[:, :, self.columns]
        regressions = regressions.view(-1, n_anchors, 4)
        for row, (number, *window_and_place) in enumerate(references.tolist()):
            if number < 0:
                continue
            window = np.array(window_and_place[:4])
            place = np.array(window_and_place[4:])
            boxes, scores, classes = detections(
                logits[row], regressions[row], self.anchors, self.per_level, place.tolist()
            )
            shown = source_boxes(boxes.cpu().numpy().astype(np.float64), window, place)
            sort = torch.stack([classes.double(), scores.double()], 1).cpu().numpy()
            image = np.full((len(sort), 1), number)
            self.numbers.append(number)
            self.found.append(np.concatenate([image, sort, shown], 1))

    def result(self) -> Result:
        numbers = self._of_all_ranks(np.array(self.numbers, np.float64)[:, None])[:, 0]
        if not len(numbers):
            raise ValueError("evaluation: the data hold no images")
        found = self._of_all_ranks(np.concatenate(self.found))
        found = found[np.argsort(found[:, 0], kind="stable")]  # the best of an image stays first
        images = np.sort(numbers).astype(np.int64)
        assert (np.diff(images) > 0).all(), "an image was evaluated twice"
        result = average_precisions(self.annotations, self.truth_classes, images, found)
        return result | {"count": len(images)}

    def _of_all_ranks(
        self,
        rows: np.ndarray,  # float64 (n, c); n may differ between ranks
    ) -> np.ndarray:
        if not distributed.is_initialized():
            return rows
        world = distributed.get_world_size()
        mine = torch.from_numpy(rows).to(self.device)
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(world)]
        distributed.all_gather(counts, torch.tensor([len(mine)], device=self.device))
        most = max(int(count) for count in counts)
        padded = mine.new_zeros(most, mine.shape[1])
        padded[: len(mine)] = mine
        everyones = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(everyones, padded)
        parts = [rows[: int(n)] for rows, n in zip(everyones, counts, strict=True)]
        return torch.cat(parts).cpu().numpy()


def average_precisions(
    annotations: Annotations,
    classes: np.ndarray,  # (K,): those of the annotations' boxes, as the detections number them
    images: np.ndarray,  # int64 (n,), ascending: those that were looked at
    found: np.ndarray,  # float64 (m, 7): image, class, score, box; by image
) -> Result:
    """The metrics of COCO's official scorer, without those of which nothing is there to be found.

    Raises ValueError if that is so of all.
    """
    COCO, COCOeval_faster = _scorer()
    truth = COCO(_in_cocos_layout(annotations, classes, images, found))
    # As loadRes reads them: image, left, top, width, height, score, class.
    columns = [found[:, :1], _width_and_height(found[:, 3:]), found[:, [2, 1]]]
    scorer = COCOeval_faster(truth, truth.loadRes(np.concatenate(columns, 1)), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    # (thresholds, recalls, classes, sizes, limits of detections); -1 where nothing is to be found.
    precision = scorer.eval["precision"][..., -1]
    of_any_size = precision[:, :, :, 0]
    means = {
        "map": _mean(of_any_size),
        "map50": _mean(of_any_size[IOU_50]),
        "map75": _mean(of_any_size[IOU_75]),
    }
    if math.isnan(means["map"]):
        raise ValueError("evaluation: the images hold no objects to find")
    for i, name in enumerate(SIZES):
        means[name] = _mean(precision[:, :, :, i + 1])
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def _scorer() -> tuple[Any, Any]:
    """The classes of `faster-coco-eval`. ImportError if it is missing."""
    with needs("detection", "the score of a detector"):
        from faster_coco_eval import COCO, COCOeval_faster
    return COCO, COCOeval_faster


def _in_cocos_layout(
    annotations: Annotations,
    classes: np.ndarray,  # (K,)
    images: np.ndarray,  # int64 (n,)
    found: np.ndarray,  # float64 (m, 7)
) -> dict[str, list[dict[str, object]]]:
    """The annotations of some images, and all classes that are there or were found."""
    boxes = _width_and_height(annotations.boxes.astype(np.float64))
    objects: list[dict[str, object]] = []
    for image in images.tolist():
        for i in range(annotations.first[image], annotations.first[image + 1]):
            objects.append({
                "id": len(objects) + 1,  # 0 would mean: not matched
                "image_id": image,
                "category_id": int(classes[i]),
                "bbox": boxes[i].tolist(),
                "area": float(annotations.area[i]),
                "iscrowd": int(annotations.crowd[i]),
            })  # fmt: skip
    n_classes = 1 + int(max(classes.max(initial=0), found[:, 1].max(initial=0)))
    return {
        "images": [{"id": image} for image in images.tolist()],
        "categories": [{"id": i, "name": str(i)} for i in range(n_classes)],
        "annotations": objects,
    }


def _width_and_height(
    boxes: np.ndarray,  # (n, 4) left, top, right, bottom
) -> np.ndarray:  # (n, 4) left, top, width, height
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _mean(precision: np.ndarray) -> float:
    """Over all that is measured; NaN where nothing is."""
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else math.nan


def checked(found: Mapping[str, object]) -> Result:
    """Metrics out of a file. Raises as `fap.tasks.base.Task.check_metrics`."""
    needed = METRICS.keys() - set(SIZES)
    if not needed <= found.keys() <= METRICS.keys():
        raise ValueError("it has other metrics")
    result = {}
    for name in METRICS:
        if name not in found:
            continue
        value = plain_number(found, name)
        if not 0 <= value <= 1:
            raise ValueError(f"its {name} is no average precision")
        result[name] = float(value)
    return result


# ---------------------------------------------------------------------- under corruption


def performance(
    precisions: Mapping[str, float],  # corruption: AP, a fraction
    clean: float,  # AP
) -> float:
    """mPC, the mean performance under corruption (Michaelis et al., 2019): AP in percent."""
    return 100 * fmean(precisions.values())


def relative_performance(
    precisions: Mapping[str, float],  # corruption: AP, a fraction
    clean: float,  # AP
) -> float:
    """rPC: mPC in percent of the clean AP. NaN where that is 0."""
    if not clean:
        return math.nan
    return performance(precisions, clean) / clean


# Those of `imagecorruptions`, with which COCO-C is made, against `pipelines.corruptions`.
OTHER_THAN_COCO_C = (
    "elastic_transform is COCO-C's, the others are ImageNet-C's: COCO-C's own generator draws "
    "motion_blur, snow and frost in another way, as strong"
)
MEANS = (
    CorruptionMean(
        "mPC (AP under 15 corruptions)",
        tuple(ALEXNET_ERRORS),
        performance,
        paper="coco_c",
        note=OTHER_THAN_COCO_C,
    ),
    CorruptionMean(
        "rPC (mPC in % of clean AP)", tuple(ALEXNET_ERRORS), relative_performance, of_clean=True
    ),
)
