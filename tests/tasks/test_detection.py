"""Detection against slow plain twins, on fresh random input; its parts have tests of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fap.config import Config, make_config
from fap.nets.retinanet import SPECS, anchors, anchors_per_level
from fap.sections import MethodConfig
from fap.tasks.dense import box_losses, class_losses, match, understood
from fap.tasks.detection import Detection
from pipelines import PlanSpec, draw_epoch, eval_plan
from pipelines.boxes import Annotations, plan_boxes, source_boxes
from tests.pipelines.random_boxes import random_annotations
from tests.step.test_static import NoHostSync

CPU = torch.device("cpu")
NAME = "retinanet_tiny"
N_CLASSES = 5
MOST_BOXES = 6
SIDES = (64, 96)
ANCHORS = anchors(SPECS[NAME], SIDES)

pytestmark = pytest.mark.usefixtures("seed")


def config(n_classes: int | None = N_CLASSES, name: str = NAME, **data: Any) -> Config:
    data = {"size": SIDES, "crop": "letterbox", "flip": 0.5, "most_boxes": MOST_BOXES} | data
    return make_config({
        "name": "tiny",
        "task": "detection",
        "model": {"name": name, "num_classes": n_classes},
        "data": data,
    })  # fmt: skip


@dataclass
class Annotated:
    """All that a detector looks at of a store."""

    heights: np.ndarray
    widths: np.ndarray
    annotations: Annotations | None
    path: str = "boxes.beton"

    def __len__(self) -> int:
        return len(self.heights)


@pytest.fixture
def store(seed: int) -> Annotated:
    rng = np.random.default_rng(seed)
    heights = rng.integers(20, 200, 30)
    widths = rng.integers(20, 200, 30)
    return Annotated(heights, widths, random_annotations(rng, heights, widths, N_CLASSES))


def drawn(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Outputs, and targets of which some rows have no boxes."""
    outputs = torch.randn(rows, len(ANCHORS) * (N_CLASSES + 4), dtype=dtype)
    corner = torch.rand(rows, MOST_BOXES, 2) * 40
    boxes = torch.cat([corner, corner + 4 + 20 * torch.rand(rows, MOST_BOXES, 2)], 2)
    classes = torch.randint(-1, N_CLASSES, (rows, MOST_BOXES, 1))
    classes[::4] = -1
    boxes[(classes < 0).expand(-1, -1, 4)] = 0
    return outputs.requires_grad_(), torch.cat([classes, boxes], 2)


# ---------------------------------------------------------------------- the data's side


def test_targets_are_the_plans_boxes(store: Annotated, seed: int) -> None:
    spec = PlanSpec(seed, SIDES, 8, 4, 8, 4, crop="letterbox", jitter=(0.8, 1.2))
    plan = draw_epoch(spec, store.heights, store.widths, epoch=0)
    found = Detection(config()).targets(store, plan)
    wanted = plan_boxes(plan, store.annotations, MOST_BOXES)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), wanted)
    assert found.shape == (len(plan), 12, MOST_BOXES, 5)
    assert (found[..., 0] >= 0).any()


def test_references_say_where_every_image_lies(store: Annotated) -> None:
    plan = eval_plan(store.heights, store.widths, size=SIDES, resize=64, batch=8, crop="letterbox")
    found = Detection(config()).references(store, plan)
    assert found.shape == (4, 8, 9)
    assert found.dtype == torch.int64
    rows = found.view(-1, 9)
    assert rows[:30, 0].tolist() == [*range(30)]
    assert rows[30:, 0].tolist() == [-1, -1]
    for number, top, left, height, width, *place in rows[:30].tolist():
        assert [top, left, height, width] == [0, 0, store.heights[number], store.widths[number]]
        whole = np.array([[place[1], place[0], place[1] + place[3], place[0] + place[2]]])
        shown = source_boxes(whole, np.array([top, left, height, width]), np.array(place))
        assert shown[0].tolist() == pytest.approx([0, 0, width, height])


def test_empty_targets_are_valid_ones_of_the_same_type() -> None:
    task = Detection(config())
    empty = task.empty_targets(5, CPU)
    outputs, targets = drawn(5)
    assert empty.shape == targets.shape
    assert empty.dtype == targets.dtype
    assert (empty[..., 0] == -1).all()
    losses, hits = task.losses_and_hits(outputs, empty)
    (gradient,) = torch.autograd.grad(losses.sum(), outputs)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert hits.shape == (5,)


def test_labels_are_the_classes_of_the_boxes(store: Annotated) -> None:
    assert store.annotations is not None
    classes = store.annotations.classes
    assert Detection.labels(store) == (classes.min(), classes.max())


def test_data_without_boxes_are_refused(store: Annotated) -> None:
    nothing = np.zeros(0, np.float32)
    none = Annotations(
        np.zeros(31, np.int64),
        nothing.reshape(0, 4),
        nothing.astype(np.int32),
        nothing.astype(bool),
        nothing,
    )
    store.annotations = none
    with pytest.raises(ValueError, match=r"boxes\.beton holds no boxes"):
        Detection.labels(store)
    store.annotations = None
    plan = eval_plan(store.heights, store.widths, size=SIDES, resize=64, batch=8, crop="letterbox")
    task = Detection(config())
    for of in (Detection.labels, lambda s: task.targets(s, plan), lambda s: task.evaluator(CPU)):
        with pytest.raises(ValueError, match=r"holds no boxes|no store"):
            of(store)
    with pytest.raises(ValueError, match=r"boxes\.beton holds no boxes"):
        task.evaluator(CPU, store=store)


# ---------------------------------------------------------------------- what the step calls


def parts(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits (rows, A, classes) and regressions (rows, A, 4), level after level."""
    split = len(ANCHORS) * N_CLASSES
    logits = outputs[:, :split].reshape(len(outputs), len(ANCHORS), N_CLASSES)
    return logits, outputs[:, split:].reshape(len(outputs), len(ANCHORS), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_of_classes_and_of_boxes(dtype: torch.dtype) -> None:
    task = Detection(config())
    outputs, targets = drawn(9, dtype)
    logits, regressions = parts(outputs)
    matches = match(ANCHORS, targets)
    of_classes = class_losses(logits, targets, matches)
    of_boxes = box_losses(regressions, ANCHORS, targets, matches)
    losses, hits = task.losses_and_hits(outputs, targets)
    assert losses.dtype == dtype
    assert torch.equal(losses, of_classes + of_boxes)
    assert torch.equal(hits, understood(logits, targets, matches))
    assert torch.equal(task.losses(outputs, targets), losses)
    assert torch.equal(task.hits(outputs, targets), hits)
    assert torch.equal(task.attack_losses(outputs, targets, "total"), losses)
    assert torch.equal(task.attack_losses(outputs, targets, "cls"), of_classes)
    assert torch.equal(task.attack_losses(outputs, targets, "box"), of_boxes)
    assert of_boxes[0] == 0  # without boxes
    assert (of_boxes[1:4] > 0).any()


def test_outputs_are_matched_with_anchors_of_their_own_place() -> None:
    """A model that says nothing but one anchor's box is right about that box alone."""
    task = Detection(config())
    at = int(torch.randint(len(ANCHORS), ()))
    logits = torch.full((len(ANCHORS), N_CLASSES), -20.0)
    logits[at, 3] = 20
    outputs = torch.cat([logits.flatten(), torch.zeros(len(ANCHORS) * 4)])[None]
    targets = task.empty_targets(1, CPU)
    targets[0, 2] = torch.tensor([3.0, *ANCHORS[at]])
    _, hits = task.losses_and_hits(outputs, targets)
    foreground = match(ANCHORS, targets).foreground[0]
    assert foreground[at]
    # Where no class stands out, the first counts as the highest.
    assert hits.item() == pytest.approx(1 / foreground.sum().item())


def test_the_step_never_asks_the_device_for_a_value() -> None:
    task = Detection(config())
    outputs, targets = drawn(4)
    with NoHostSync():
        losses, _ = task.losses_and_hits(outputs, targets)
        torch.autograd.grad(losses.sum(), outputs)
        for part in ("total", *task.loss_parts):
            torch.autograd.grad(task.attack_losses(outputs, targets, part).sum(), outputs)
        task.wrong_targets(torch.tensor([1, 2], dtype=torch.int32), targets)


def test_anchors_are_copied_to_a_device_once() -> None:
    """Within a capture nothing may come from the host; `empty_targets` comes before it."""
    task = Detection(config())
    targets = task.empty_targets(2, torch.device("meta"))
    first = task._anchors_on(targets.device)
    assert first.device.type == "meta"
    assert task._anchors_on(targets.device) is first


# ---------------------------------------------------------------------- wrong targets


def keys(n: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (n,)).int()


def test_wrong_targets_are_wrong_classes_evenly() -> None:
    n_rows = 4 * 1000
    _, targets = drawn(n_rows)
    found = Detection(config()).wrong_targets(keys(4), targets)
    assert found.dtype == targets.dtype
    assert torch.equal(found[..., 1:], targets[..., 1:])
    is_box = targets[..., 0] >= 0
    assert torch.equal(found[~is_box], targets[~is_box])
    before = targets[..., 0][is_box].long()
    after = found[..., 0][is_box].long()
    assert (before != after).all()
    assert after.min() == 0
    assert after.max() == N_CLASSES - 1
    counts = torch.bincount((after - before) % N_CLASSES, minlength=N_CLASSES)[1:]
    assert (counts / (len(after) / (N_CLASSES - 1)) - 1).abs().max() < 0.15


def test_boxes_of_a_row_are_wrong_independently() -> None:
    targets = Detection(config()).empty_targets(2000, CPU)
    targets[..., 0] = 1
    found = Detection(config()).wrong_targets(keys(2), targets)[..., 0]
    alike = (found[:, 0] == found[:, 1]).float().mean().item()
    assert alike == pytest.approx(1 / (N_CLASSES - 1), abs=0.08)


def test_wrong_targets_are_a_function_of_their_key() -> None:
    task = Detection(config())
    _, targets = drawn(4 * 6)
    k = keys(4)
    found = task.wrong_targets(k, targets)
    assert torch.equal(task.wrong_targets(k[2:3], targets[12:18]), found[12:18])
    assert not torch.equal(task.wrong_targets(keys(4), targets), found)


def test_a_single_class_has_no_wrong_one() -> None:
    method = {"name": "decoupled", "targeted": True}
    targeted = config(1).model_copy(update={"method": MethodConfig.model_validate(method)})
    with pytest.raises(ValueError, match="num_classes = 1: there is no wrong class"):
        Detection(targeted)
    Detection(config(1))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("size", [[64, 100], 33, [32, 16]])
def test_sides_are_multiples_of_32(size: object) -> None:
    with pytest.raises(ValueError, match=r"^data\.size = .*multiples of 32, .* RetinaNet pads"):
        Detection(config(size=size))


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.name = 'resnet50': no detector"):
        Detection(config(name="resnet50"))


@pytest.mark.parametrize("n_classes", [None])
def test_a_detector_needs_a_class(n_classes: int | None) -> None:
    with pytest.raises(ValueError, match=f"num_classes = {n_classes}: .*at least 1"):
        Detection(config(n_classes))


# ---------------------------------------------------------------------- model and metrics


def test_the_plain_model_is_the_configs() -> None:
    task = Detection(config())
    model = task.plain_model().eval()
    outputs = model(torch.zeros(2, 3, *SIDES))
    assert outputs.shape == (2, len(ANCHORS) * (N_CLASSES + 4))
    assert task.per_level == anchors_per_level(SPECS[NAME], SIDES)
    last = model.state_dict()["head.classification_head.cls_logits.weight"]
    assert len(last) == task.output_rows == SPECS[NAME].anchors_per_place * N_CLASSES


def boxes_far_apart(heights: np.ndarray, widths: np.ndarray) -> Annotations:
    """Two boxes of different classes in every image, so that none suppresses the other."""
    n = len(heights)
    sides = np.stack([widths, heights], 1).repeat(2, 0)
    low = sides * np.random.default_rng(torch.initial_seed()).uniform(0, 0.5, (2 * n, 2))
    high = low + 0.4 * sides
    return Annotations(
        first=2 * np.arange(n + 1),
        boxes=np.concatenate([low, high], 1).astype(np.float32),
        classes=np.tile(np.array([1, 3], np.int32), n),
        crowd=np.zeros(2 * n, bool),
        area=(high - low).prod(1).astype(np.float32),
    )


def test_a_detector_that_says_its_targets_scores_1(store: Annotated) -> None:
    """From the store's boxes through plan, canvas, anchors and outputs back to the store's pixels.

    Any anchor may say any box.
    """
    store.annotations = boxes_far_apart(store.heights, store.widths)
    task = Detection(config())
    plan = eval_plan(store.heights, store.widths, size=SIDES, resize=64, batch=32, crop="letterbox")
    (targets,) = task.targets(store, plan)
    (references,) = task.references(store, plan)
    logits = torch.full((32, len(ANCHORS), N_CLASSES), -20.0)
    regressions = torch.zeros(32, len(ANCHORS), 4)
    for row, boxes in enumerate(targets):
        for box, a in zip(boxes, torch.randperm(len(ANCHORS)).tolist(), strict=False):
            if box[0] < 0:
                continue
            left, top, right, bottom = ANCHORS[a].tolist()
            size = torch.tensor([right - left, bottom - top])
            centre = torch.tensor([left, top]) + size / 2
            extent = box[3:] - box[1:3]
            regressions[row, a, :2] = (box[1:3] + extent / 2 - centre) / size
            regressions[row, a, 2:] = torch.log(extent / size)
            logits[row, a, int(box[0])] = 3
    evaluator = task.evaluator(CPU, store=store)
    evaluator.update(torch.cat([logits.flatten(1), regressions.flatten(1)], 1), references)
    result = evaluator.result()
    assert result.pop("count") == 30
    assert result["map"] == 1
    assert task.measured(result) == 1
    assert task.check_metrics(result) == result
