"""Detection: RetinaNet's losses on boxes of fixed number; COCO's mean average precision.

Targets are boxes, float32 (rows, most_boxes, 5): class, left, top, right, bottom in pixels of the
canvas; class -1 is padding. Outputs are (rows, A * (n_classes + 4)): the class logits of all
anchors, then their box regressions (`fap.nets.retinanet`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor, nn

from fap.config import Config
from fap.draws import random_bits
from fap.nets import retinanet
from fap.nets.retinanet import RetinaNet, anchors_per_level, spec_of
from fap.tasks import coco
from fap.tasks.base import Result, Task
from fap.tasks.boxes_out import detections
from fap.tasks.coco import MeanAveragePrecision
from fap.tasks.dense import box_losses, class_losses, match, understood
from fap.tasks.draw_boxes import Found, drawn
from fap.tasks.labels import SAME_CLASSES, Matching
from pipelines import EpochPlan, Store
from pipelines.boxes import Annotations, canvas_boxes, plan_boxes, source_boxes
from pipelines.files import readable, shown

SIDE_UNIT = 32  # pixels; torchvision's RetinaNet pads its canvas to multiples
PADDING = -1  # class of a box that is none, number of an image that is none
WRONG_CLASSES = 0x510E527F  # sets these draws apart from others under the same keys
ALL_BUT_THE_SIGN = 0x7FFFFFFF  # of an int32
LEAST_DRAWN = 0.4  # score of a detection that is drawn into a picture
LONGEST_NAME = 20  # characters of a class in a picture


class Detection(Task):
    """Every row has up to `data.most_boxes` boxes; see `fap.tasks.base.Task` for the rest."""

    primary = "map"
    percents: Mapping[str, str] = coco.METRICS
    rows: Mapping[str, str] = coco.METRICS
    measure = "mAP"
    measure_better = "more"
    means = coco.MEANS
    loss_parts: Sequence[str] = ("cls", "box")
    fewest_classes = 1
    eval_batch = 16  # at 800 x 1344 the outputs of an image are 68 MB

    def __init__(self, config: Config) -> None:
        """Raises ValueError for no classes, another model, odd sides of the canvas, and fields
        without a meaning here.
        """
        n_classes = config.model.num_classes
        if n_classes is None or n_classes < 1:
            raise ValueError(f"model.num_classes = {n_classes}: a detector needs at least 1 class")
        if n_classes < 2 and config.method.targeted:
            raise ValueError(
                "method.targeted = true with model.num_classes = 1: "
                "there is no wrong class to aim at; write method.targeted=false"
            )
        if config.optim.label_smoothing:
            raise ValueError(
                f"optim.label_smoothing = {config.optim.label_smoothing}: "
                "the focal loss of a detector has none, so only 0"
            )
        if config.optim.class_weights is not None:
            raise ValueError(
                f"optim.class_weights = {shown(config.optim.class_weights)}: "
                "an image has boxes of several classes; leave it out"
            )
        if config.model.drop_path is not None:
            raise ValueError(
                f"model.drop_path = {config.model.drop_path:g}: a RetinaNet has no stochastic depth"
                "; leave it out"
            )
        self.n_classes = n_classes
        self.spec = spec_of(config.model.name)
        self.sides = config.data.sides
        self.most_boxes = config.data.most_boxes
        if any(side % SIDE_UNIT for side in self.sides):
            raise ValueError(
                f"data.size = {list(self.sides)}: both sides must be multiples of "
                f"{SIDE_UNIT}, to which torchvision's RetinaNet pads"
            )
        self.output_rows = self.spec.anchors_per_place * n_classes
        self.per_level = anchors_per_level(self.spec, self.sides)
        # Copied once per device: within a capture nothing may come from the host.
        self._anchors = {torch.device("cpu"): retinanet.anchors(self.spec, self.sides)}

    def plain_model(self) -> nn.Module:
        return RetinaNet(self.spec, self.n_classes)

    # ------------------------------------------------------------------ the data's side

    @staticmethod
    def labels(store: Store) -> tuple[int, int]:
        annotations = _annotations(store)
        if annotations.crowd.all():  # no boxes at all are all crowds, too
            raise ValueError(
                f"{readable(store.path)} holds no boxes, or crowd boxes alone: "
                "there is nothing to learn and nothing to find"
            )
        return int(annotations.classes.min()), int(annotations.classes.max())

    @staticmethod
    def notes(store: Store, config: Config) -> list[str]:
        n_boxes, n_images = _annotations(store).beyond(config.data.most_boxes)
        if not n_boxes:
            return []
        return [
            f"not trained: {n_boxes:,} boxes of {n_images:,} images, beyond data.most_boxes = "
            f"{config.data.most_boxes}"
        ]

    def targets(self, store: Store, plan: EpochPlan) -> Tensor:  # float32 (steps, B, N, 5)
        return torch.from_numpy(plan_boxes(plan, _annotations(store), self.most_boxes))

    def references(self, store: Store, plan: EpochPlan) -> Tensor:  # int64 (steps, B, 9)
        """Image number (-1 for padding rows), window in the image, place on the canvas."""
        numbers = plan.look_up(np.arange(len(store)), padding=PADDING)
        place = plan.place
        parts = [numbers[:, :, None], plan.window, place]
        return torch.from_numpy(np.concatenate(parts, axis=2).astype(np.int64))

    def empty_targets(self, rows: int, device: torch.device) -> Tensor:  # float32 (rows, N, 5)
        targets = torch.zeros(rows, self.most_boxes, 5, device=device)
        targets[:, :, 0] = PADDING
        self._anchors_on(targets.device)
        return targets

    # ------------------------------------------------------------------ what the step calls

    def losses(
        self,
        outputs: Tensor,  # (rows, A * (n_classes + 4))
        targets: Tensor,  # (rows, N, 5)
    ) -> Tensor:  # (rows,)
        losses, _ = self.losses_and_hits(outputs, targets)
        return losses

    def hits(
        self,
        outputs: Tensor,  # (rows, A * (n_classes + 4))
        targets: Tensor,  # (rows, N, 5)
    ) -> Tensor:  # float32 (rows,)
        _, hits = self.losses_and_hits(outputs, targets)
        return hits

    def losses_and_hits(
        self,
        outputs: Tensor,  # (rows, A * (n_classes + 4))
        targets: Tensor,  # (rows, N, 5)
    ) -> tuple[Tensor, Tensor]:  # (rows,) each
        anchors = self._anchors_on(targets.device)
        matches = match(anchors, targets)
        logits, regressions = self._parts(outputs)
        losses = class_losses(logits, targets, matches)
        losses = losses + box_losses(regressions, anchors, targets, matches)
        return losses, understood(logits, targets, matches)

    def attack_losses(
        self,
        outputs: Tensor,  # (rows, A * (n_classes + 4))
        targets: Tensor,  # (rows, N, 5)
        part: str,
    ) -> Tensor:  # (rows,)
        anchors = self._anchors_on(targets.device)
        matches = match(anchors, targets)
        logits, regressions = self._parts(outputs)
        if part == "box":
            return box_losses(regressions, anchors, targets, matches)
        of_classes = class_losses(logits, targets, matches)
        if part == "cls":
            return of_classes
        assert part == "total", part
        return of_classes + box_losses(regressions, anchors, targets, matches)

    def wrong_targets(
        self,
        keys: Tensor,  # int32 (G,)
        targets: Tensor,  # (G * a, N, 5)
    ) -> Tensor:  # as `targets`
        """A wrong class for every box, each equally likely; boxes and padding stay."""
        rows, n_boxes, _ = targets.shape
        bits = random_bits(keys ^ WRONG_CLASSES, rows // len(keys) * n_boxes)
        # 1 to n_classes - 1 places further round the circle of classes: never the class itself.
        distance = 1 + (bits.view(rows, n_boxes).long() & ALL_BUT_THE_SIGN) % (self.n_classes - 1)
        classes = targets[:, :, 0]
        wrong = ((classes.long() + distance) % self.n_classes).to(targets.dtype)
        wrong = torch.where(classes >= 0, wrong, classes)
        return torch.cat([wrong[:, :, None], targets[:, :, 1:]], 2)

    def _parts(
        self,
        outputs: Tensor,  # (rows, A * (n_classes + 4))
    ) -> tuple[Tensor, Tensor]:  # (rows, A, n_classes), (rows, A, 4)
        n_anchors = sum(self.per_level)
        logits, regressions = outputs.split([n_anchors * self.n_classes, n_anchors * 4], 1)
        return logits.view(-1, n_anchors, self.n_classes), regressions.view(-1, n_anchors, 4)

    def _anchors_on(self, device: torch.device) -> Tensor:
        if device not in self._anchors:
            self._anchors[device] = self._anchors[torch.device("cpu")].to(device)
        return self._anchors[device]

    # ------------------------------------------------------------------ the metrics

    def evaluator(
        self, device: torch.device, matching: Matching = SAME_CLASSES, store: Store | None = None
    ) -> MeanAveragePrecision:
        return MeanAveragePrecision(
            device,
            _annotations(store),
            self._anchors_on(device),
            self.per_level,
            self.n_classes,
            matching,
        )

    def pictures(
        self,
        images: Tensor,  # uint8 (B, 3, H, W)
        outputs: Tensor,  # (B, A * (n_classes + 4))
        references: Tensor,  # int64 (B, 9)
        store: Store,
        names: Sequence[str] | None,
    ) -> list[Image]:
        """The canvases, with the boxes that are there and those that a user would believe."""
        annotations = _annotations(store)
        logits, regressions = self._parts(outputs)
        anchors = self._anchors_on(outputs.device)
        drawings = []
        for row, (number, *numbers) in enumerate(references.tolist()):
            if number < 0:
                continue
            place = numbers[4:]
            found = detections(logits[row], regressions[row], anchors, self.per_level, place)
            believed = [
                Found(box.tolist(), f"{_name(int(class_), names)} {float(score):.2f}")
                for box, score, class_ in zip(*found, strict=True)
                if score >= LEAST_DRAWN
            ]
            boxes = annotations.boxes[annotations.first[number] : annotations.first[number + 1]]
            n = len(boxes)
            windows = np.tile(numbers[:4], (n, 1))
            places = np.tile(place, (n, 1))
            true = canvas_boxes(boxes, windows, places, np.zeros(n, bool))
            picture = fromarray(images[row].permute(1, 2, 0).numpy())
            drawings.append(drawn(picture, true.tolist(), believed))
        return drawings

    def prediction_columns(self, top: int | None) -> list[str]:
        if top is not None:
            raise ValueError(f"top = {top}: a detector gives every box one class; leave it out")
        return ["class", "score", "left", "top", "right", "bottom"]

    def predictions(
        self,
        outputs: Tensor,  # (B, A * (n_classes + 4))
        windows: np.ndarray,  # int (B, 4)
        places: np.ndarray,  # int (B, 4)
        names: Sequence[str] | None,
        top: int | None,
    ) -> list[list[list[str]]]:
        """A line for each box that was found, best first, in pixels of the stored image."""
        logits, regressions = self._parts(outputs.float())
        anchors = self._anchors_on(outputs.device)
        lines = []
        for row, (window, place) in enumerate(zip(windows, places, strict=True)):
            boxes, scores, classes = detections(
                logits[row], regressions[row], anchors, self.per_level, place.tolist()
            )
            shown = source_boxes(boxes.cpu().numpy(), window, place)
            lines.append([
                [
                    names[number] if names else str(number),
                    f"{score:.6g}",
                    *(f"{edge:.2f}" for edge in box),
                ]
                for box, score, number in zip(
                    shown.tolist(), scores.tolist(), classes.tolist(), strict=True
                )
            ])  # fmt: skip
        return lines

    def check_metrics(self, found: Mapping[str, object]) -> Result:
        return coco.checked(found)

    def measured(self, result: Result) -> float:
        return result["map"]


def _name(class_: int, names: Sequence[str] | None) -> str:
    if names is None:
        return str(class_)
    return readable(names[class_], LONGEST_NAME)


def _annotations(store: Store | None) -> Annotations:
    if store is None:
        raise ValueError("detection: these images are in no store that could hold boxes")
    if store.annotations is None:
        raise ValueError(
            f"{readable(store.path)} holds no boxes: fap-convert writes them beside the images"
        )
    return store.annotations
