"""Mean average precision against pycocotools, whatever the batches and ranks."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fap.nets.retinanet import SPECS, anchors, anchors_per_level
from fap.tasks.base import Result
from fap.tasks.boxes_out import detections
from fap.tasks.coco import (
    MEANS,
    METRICS,
    MeanAveragePrecision,
    average_precisions,
    checked,
    performance,
    relative_performance,
)
from fap.tasks.labels import SAME_CLASSES, Matching
from pipelines.boxes import Annotations, source_boxes

CPU = torch.device("cpu")
N_IMAGES = 40
N_CLASSES = 6
SPEC = SPECS["retinanet_tiny"]
SIDES = (64, 96)  # of the canvas
ANCHORS = anchors(SPEC, SIDES)
PER_LEVEL = anchors_per_level(SPEC, SIDES)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------------- random data


def drawn_annotations(rng: np.random.Generator, largest: float = 300) -> Annotations:
    """Boxes of every size, some of them crowds; images without any; a class that is nowhere."""
    n_boxes = rng.integers(0, 8, N_IMAGES) * (rng.random(N_IMAGES) < 0.8)
    n = int(n_boxes.sum())
    corner = 300 * rng.random((n, 2))
    sides = 4 + largest * rng.random((n, 2)) ** 2
    boxes = np.concatenate([corner, corner + sides], 1).astype(np.float32)
    return Annotations(
        first=np.concatenate([[0], n_boxes.cumsum()]).astype(np.int64),
        boxes=boxes,
        classes=rng.integers(0, N_CLASSES - 1, n).astype(np.int32),
        crowd=rng.random(n) < 0.15,
        # That of the outline, as in COCO: less than that of the box.
        area=(sides.prod(1) * rng.uniform(0.4, 1, n)).astype(np.float32),
    )


def drawn_detections(rng: np.random.Generator, annotations: Annotations) -> np.ndarray:
    """float64 (m, 7): objects found well and badly, twice, as another class, or not; and others."""
    image = np.repeat(np.arange(N_IMAGES), np.diff(annotations.first))
    tries = rng.integers(0, 4, len(image))
    at = np.repeat(np.arange(len(image)), tries)
    boxes = annotations.boxes[at].astype(np.float64)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes += sides * rng.normal(0, 0.12, boxes.shape)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    classes = annotations.classes[at]
    classes = np.where(rng.random(len(at)) < 0.1, rng.integers(0, N_CLASSES, len(at)), classes)
    scores = rng.random(len(at)).round(2)  # some alike
    real = np.column_stack([image[at], classes, scores, boxes])
    n_false = 150
    corner = 300 * rng.random((n_false, 2))
    false = np.column_stack([
        rng.integers(0, N_IMAGES, n_false),
        rng.integers(0, N_CLASSES, n_false),
        rng.random(n_false),
        corner,
        corner + 80 * rng.random((n_false, 2)),
    ])  # fmt: skip
    found = np.concatenate([real, false])
    return found[np.argsort(found[:, 0], kind="stable")]


# ---------------------------------------------------------------------- the scorer's twin


def pycocotools_says(
    annotations: Annotations, images: np.ndarray, found: np.ndarray
) -> dict[str, float]:
    """The metrics of the reference implementation; -1 where there is nothing of the size."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    objects = []
    for i in range(len(annotations.classes)):
        image = int(np.searchsorted(annotations.first, i, side="right")) - 1
        left, top, right, bottom = annotations.boxes[i].astype(float).tolist()
        if image in images:
            objects.append({
                "id": i + 1,
                "image_id": image,
                "category_id": int(annotations.classes[i]),
                "bbox": [left, top, right - left, bottom - top],
                "area": float(annotations.area[i]),
                "iscrowd": int(annotations.crowd[i]),
            })  # fmt: skip
    truth.dataset = {
        "info": {},
        "images": [{"id": int(image)} for image in images],
        "categories": [{"id": k} for k in range(N_CLASSES)],
        "annotations": objects,
    }
    results = [
        {
            "image_id": int(image),
            "category_id": int(k),
            "score": score,
            "bbox": [left, top, right - left, bottom - top],
        }
        for image, k, score, left, top, right, bottom in found.tolist()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats[:6].tolist(), strict=True))


@pytest.mark.parametrize("largest", [300, 25])
def test_metrics_are_pycocotools(rng: np.random.Generator, largest: float) -> None:
    annotations = drawn_annotations(rng, largest)
    found = drawn_detections(rng, annotations)
    images = np.sort(rng.permutation(N_IMAGES)[: N_IMAGES - 5])  # not all of the data
    found = found[np.isin(found[:, 0], images)]
    wanted = pycocotools_says(annotations, images, found)
    result = average_precisions(annotations, annotations.classes, images, found)
    assert result == pytest.approx({k: v for k, v in wanted.items() if v >= 0}, abs=1e-9)
    assert 0.05 < result["map"] < 0.95
    assert ("map_large" in result) == (largest == 300)


def test_nothing_found_is_zero_and_nothing_to_find_an_error(rng: np.random.Generator) -> None:
    annotations = drawn_annotations(rng)
    nothing = np.zeros((0, 7))
    images = np.arange(N_IMAGES)
    result = average_precisions(annotations, annotations.classes, images, nothing)
    assert set(result.values()) == {0.0}
    without = images[np.diff(annotations.first) == 0]
    with pytest.raises(ValueError, match="no objects"):
        average_precisions(annotations, annotations.classes, without, nothing)


# ---------------------------------------------------------------------- the evaluator


def drawn_outputs(n: int, n_classes: int = N_CLASSES) -> tuple[Tensor, Tensor]:
    """Of n images in any order: outputs with some detections, and references.

    Every image lies in a place of its own, and shows another window.
    """
    logits = 2 * torch.randn(n, len(ANCHORS) * n_classes) - 5
    outputs = torch.cat([logits, 0.3 * torch.randn(n, len(ANCHORS) * 4)], 1)
    number = torch.randperm(N_IMAGES)[:n]
    window = torch.stack([torch.randint(50, (n,)) for _ in range(2)], 1)
    window = torch.cat([window, torch.randint(100, 400, (n, 2))], 1)
    extent = torch.stack([torch.randint(20, SIDES[0], (n,)), torch.randint(20, SIDES[1], (n,))], 1)
    room = torch.tensor(SIDES) - extent
    corner = (torch.rand(n, 2) * room).long()
    return outputs, torch.cat([number[:, None], window, corner, extent], 1)


def evaluator_of(
    annotations: Annotations, matching: Matching = SAME_CLASSES, n_classes: int = N_CLASSES
) -> MeanAveragePrecision:
    return MeanAveragePrecision(CPU, annotations, ANCHORS, PER_LEVEL, n_classes, matching)


def evaluated(
    annotations: Annotations, outputs: Tensor, references: Tensor, batch: int, **options: Any
) -> Result:
    """In batches, the last of which is filled with padding rows."""
    evaluator = evaluator_of(annotations, **options)
    short = -len(outputs) % batch
    outputs = torch.cat([outputs, torch.full((short, outputs.shape[1]), 9.0)])
    padding = torch.tensor([-1] + [0] * 8).expand(short, 9)
    references = torch.cat([references, padding])
    for both in zip(outputs.split(batch), references.split(batch), strict=True):
        evaluator.update(*both)
    return evaluator.result()


def one_image(outputs: Tensor, reference: Tensor, n_classes: int) -> np.ndarray:  # (m, 7)
    number, top, left, height, width, *place = reference.tolist()
    logits, regressions = outputs.split([len(ANCHORS) * n_classes, len(ANCHORS) * 4])
    boxes, scores, classes = detections(
        logits.view(-1, n_classes), regressions.view(-1, 4), ANCHORS, PER_LEVEL, place
    )
    rows = []
    for box, score, k in zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True):
        (shown,) = source_boxes(np.array([box]), np.array([top, left, height, width]), place)
        rows.append([number, k, score, *shown])
    return np.array(rows).reshape(-1, 7)


def nearly_found(rng: np.random.Generator, outputs: Tensor, references: Tensor) -> Annotations:
    """Objects near a few of the best detections of most images: well found, badly, or not."""
    of_image: list[np.ndarray] = [np.zeros((0, 7))] * N_IMAGES
    for row, reference in zip(outputs, references, strict=True):
        found = one_image(row, reference, N_CLASSES)
        of_image[int(reference[0])] = rng.permutation(found[:8])[: rng.integers(0, 6)]
    near = np.concatenate(of_image)
    sides = np.maximum(near[:, 5:] - near[:, 3:5], 1)
    corner = near[:, 3:5] + sides * rng.uniform(0, 0.2, sides.shape)
    return Annotations(
        first=np.concatenate([[0], np.cumsum([*map(len, of_image)])]).astype(np.int64),
        boxes=np.concatenate([corner, corner + sides], 1).astype(np.float32),
        classes=near[:, 1].astype(np.int32),
        crowd=rng.random(len(near)) < 0.1,
        area=sides.prod(1).astype(np.float32),
    )


@pytest.mark.parametrize("batch", [1, 5, 23, 64])
def test_every_image_once_whatever_the_batch(rng: np.random.Generator, batch: int) -> None:
    outputs, references = drawn_outputs(23)
    annotations = nearly_found(rng, outputs, references)
    found = evaluated(annotations, outputs, references, batch)
    images = references[:, 0].sort()
    rows = [one_image(outputs[i], references[i], N_CLASSES) for i in images.indices]
    wanted = average_precisions(
        annotations, annotations.classes, images.values.numpy(), np.concatenate(rows)
    )
    assert found == wanted | {"count": 23}
    assert 0.01 < found["map"] < 0.95


def test_a_perfect_detector_scores_1_wherever_its_image_lies_on_the_canvas() -> None:
    """Anchors that say what they are; the annotations are these boxes in the stored image."""
    anchor = [9 * 12 * 3 + 9 * 5, 9 * 12 * 4 + 9 * 7 + 1]  # two of 16 px, inside the place
    window = np.array([10, 20, 200, 300])
    place = np.array([8, 16, 50, 75])  # a quarter of the window
    boxes = source_boxes(ANCHORS[anchor].numpy(), window, place).astype(np.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    annotations = Annotations(
        np.array([0, 0, 2]),
        boxes,
        np.array([1, 2], np.int32),
        np.zeros(2, bool),
        sides.prod(1).astype(np.float32),
    )
    logits = torch.full((len(ANCHORS), 3), -9.0)
    logits[anchor, [1, 2]] = 3
    outputs = torch.cat([logits.flatten(), torch.zeros(len(ANCHORS) * 4)])[None]
    references = torch.tensor([[1, *window, *place]])
    result = evaluated(annotations, outputs, references, 1, n_classes=3)
    assert result == {"map": 1, "map50": 1, "map75": 1, "map_medium": 1, "count": 1}


def test_classes_are_matched_by_name(rng: np.random.Generator) -> None:
    """The data's class k is the model's label_map[k]; restricted, no other of the model's counts.

    So a model with its classes in another order, and more of them, scores the same.
    """
    outputs, references = drawn_outputs(20)
    annotations = nearly_found(rng, outputs, references)
    wanted = evaluated(annotations, outputs, references, 8)
    n_more = N_CLASSES + 3
    label_map = torch.randperm(n_more)[:N_CLASSES]
    own, boxes = outputs.split([len(ANCHORS) * N_CLASSES, len(ANCHORS) * 4], 1)
    for restrict, others in ((False, -20.0), (True, 20.0)):
        logits = torch.full((20, len(ANCHORS), n_more), others)
        logits[:, :, label_map] = own.view(20, -1, N_CLASSES)
        more = torch.cat([logits.flatten(1), boxes], 1)
        matching = Matching("by name", label_map, restrict)
        found = evaluated(annotations, more, references, 8, matching=matching, n_classes=n_more)
        assert found == pytest.approx(wanted, abs=1e-12)


def test_an_evaluation_of_padding_alone_is_refused(rng: np.random.Generator) -> None:
    evaluator = evaluator_of(drawn_annotations(rng))
    with pytest.raises(ValueError, match="no images"):
        evaluator.result()
    outputs, references = drawn_outputs(2)
    references[:, 0] = -1
    evaluator.update(outputs, references)
    with pytest.raises(ValueError, match="no images"):
        evaluator.result()


def test_outputs_that_are_not_finite_find_nothing(rng: np.random.Generator) -> None:
    outputs, references = drawn_outputs(20)
    result = evaluated(drawn_annotations(rng), torch.full_like(outputs, math.nan), references, 8)
    assert result["map"] == 0


def _rank(
    rank: int,
    meeting: str,  # a file
    annotations: Annotations,
    outputs: Tensor,
    references: Tensor,
    out: Any,  # a queue
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mine = slice(0, 15) if rank else slice(15, None)  # unevenly
    out.put(evaluated(annotations, outputs[mine], references[mine], 8))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("n", [22, 15])  # rank 0 has 7 images, or none
def test_two_ranks_score_as_one(rng: np.random.Generator, tmp_path: Path, n: int) -> None:
    outputs, references = drawn_outputs(n)
    annotations = nearly_found(rng, outputs, references)
    one = evaluated(annotations, outputs, references, 8)
    context = torch.multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    args = (str(tmp_path / "meet"), annotations, outputs, references, out)
    torch.set_num_threads(1)
    ranks = [context.Process(target=_rank, args=(rank, *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = [out.get() for _ in ranks]
    for process in ranks:
        process.join()
    assert results == [one, one]


# ---------------------------------------------------------------------- detections


def test_a_box_is_cut_at_the_border_of_its_image() -> None:
    """And before the suppression: what hangs out of the image overlaps nothing."""
    logits = 2 * torch.randn(len(ANCHORS), N_CLASSES) - 3
    place = (8, 16, 40, 60)
    found = detections(logits, torch.randn(len(ANCHORS), 4), ANCHORS, PER_LEVEL, place)
    assert 0 < len(found.scores) <= 100
    left, top, right, bottom = found.boxes.T
    assert left.min() >= 16
    assert top.min() >= 8
    assert right.max() <= 76
    assert bottom.max() <= 48
    assert (found.scores.diff() <= 0).all()
    assert found.scores.min() > 0.05


# ---------------------------------------------------------------------- results out of files

RESULT = {"map": 0.25, "map50": 0.5, "map75": 0, "map_small": 0.1, "map_large": 1}


def test_metrics_out_of_a_file_are_floats_in_their_order() -> None:
    found = checked(dict(reversed(RESULT.items())))
    assert [*found.items()] == [*RESULT.items()]
    assert all(type(value) is float for value in found.values())
    assert set(checked({"map": 0, "map50": 0, "map75": 0})) == {"map", "map50", "map75"}


@pytest.mark.parametrize(("change", "message"), [
    ({"map": 1.5}, "map is no average precision"),
    ({"map_small": -1}, "map_small is no average precision"),
    ({"map50": math.nan}, "map50 is no average precision"),
    ({"map75": True}, "map75 is no number"),
    ({"map75": "0.5"}, "map75 is no number"),
    ({"map75": 10**400}, "map75 is no average precision"),
    ({"top1": 0.5}, "other metrics"),
    ({"count": 40}, "other metrics"),
])  # fmt: skip
def test_other_metrics_out_of_a_file_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        checked(RESULT | change)


@pytest.mark.parametrize("missing", ["map", "map50", "map75"])
def test_missing_metrics_are_refused(missing: str) -> None:
    with pytest.raises(ValueError, match="other metrics"):
        checked({name: value for name, value in RESULT.items() if name != missing})


def test_a_kept_result_is_what_an_evaluator_gives(rng: np.random.Generator) -> None:
    outputs, references = drawn_outputs(30)
    result = evaluated(nearly_found(rng, outputs, references), outputs, references, 8)
    count = result.pop("count")
    assert type(count) is int
    assert checked(result) == result


# ---------------------------------------------------------------------- under corruption


def test_means_under_corruption() -> None:
    precisions = {"fog": 0.1, "snow": 0.2, "frost": 0.3}
    assert performance(precisions, 0.4) == pytest.approx(20)
    assert relative_performance(precisions, 0.4) == pytest.approx(50)
    assert math.isnan(relative_performance(precisions, 0.0))
    assert [len(mean.corruptions) for mean in MEANS] == [15, 15]
