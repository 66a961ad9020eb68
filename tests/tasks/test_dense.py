"""The loss of dense detectors against torchvision's RetinaNet, on fresh random boxes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from fap.nets import retinanet
from fap.tasks.dense import (
    Matches,
    box_losses,
    class_losses,
    encoded,
    intersection_over_union,
    match,
    understood,
)
from tests.step.test_static import NoHostSync

SIDES = (96, 128)  # height, width
SPEC = retinanet.SPECS["retinanet_tiny"]
ANCHORS = retinanet.anchors(SPEC, SIDES)
N_CLASSES = 4
MOST = 12  # boxes of a row, padding included

pytestmark = pytest.mark.usefixtures("seed")


# ---------------------------------------------------------------------- boxes


def boxes_of_any_size(n: int) -> Tensor:
    """float32 (n, 4) inside the canvas, 1 px a side or more."""
    height, width = SIDES
    size = 1 + torch.rand(n, 2) * torch.tensor([width - 2, height - 2])
    corner = torch.rand(n, 2) * (torch.tensor([width, height]) - size)
    return torch.cat([corner, corner + size], 1)


def whole_boxes(n: int) -> Tensor:
    """On whole pixels, so that anchors lie equally well around them: ties."""
    return boxes_of_any_size(n).round() + torch.tensor([0.0, 0, 1, 1])


def tiny_boxes(n: int) -> Tensor:
    """1 to 3 px: no anchor overlaps them much."""
    boxes = boxes_of_any_size(n)
    return torch.cat([boxes[:, :2], boxes[:, :2] + 1 + 2 * torch.rand(n, 2)], 1)


def equal_boxes(n: int) -> Tensor:
    return boxes_of_any_size(1).expand(n, 4).clone()


def touching_boxes(n: int) -> Tensor:
    """A row of equal squares, side by side."""
    left = torch.arange(n) * 10.0
    return torch.stack([left, torch.full((n,), 40.0), left + 10, torch.full((n,), 50.0)], 1)


def anchors_as_boxes(n: int) -> Tensor:
    """What fits exactly, and so is shared by no other."""
    return ANCHORS[torch.randint(len(ANCHORS), (n,))]


def nowhere(n: int) -> Tensor:
    """Outside the canvas, where no anchor is: torchvision then gives the box every anchor."""
    return boxes_of_any_size(n) + 10_000


KINDS = [
    boxes_of_any_size,
    whole_boxes,
    tiny_boxes,
    equal_boxes,
    touching_boxes,
    anchors_as_boxes,
    nowhere,
]


@pytest.mark.parametrize("kind", KINDS)
def test_overlaps_are_torchvision_s_to_the_bit(kind: Callable[[int], Tensor]) -> None:
    boxes = torch.cat([kind(MOST), torch.zeros(2, 4)])  # padding, too
    assert torch.equal(intersection_over_union(boxes, ANCHORS.T), box_iou(boxes, ANCHORS))


def row_of(boxes: Tensor) -> Tensor:  # (MOST, 5)
    """With random classes; padding on random rows, garbage in it."""
    row = torch.cat([torch.full((MOST, 1), -1.0), boxes_of_any_size(MOST)], 1)
    row[: MOST // 4] = torch.tensor([-1.0, 0, 0, 0, 0])
    row = row[torch.randperm(MOST)]
    places = torch.randperm(MOST)[: len(boxes)].sort().values
    row[places, 0] = torch.randint(N_CLASSES, (len(boxes),)).float()
    row[places, 1:] = boxes
    return row


def drawn_targets() -> Tensor:  # (rows, MOST, 5)
    """A row of every kind, few and many boxes, a row without any."""
    rows = [row_of(kind(n)) for kind in KINDS for n in (1, 5, MOST)]
    rows += [row_of(torch.zeros(0, 4)), row_of(torch.cat([tiny_boxes(3), boxes_of_any_size(4)]))]
    return torch.stack(rows)


def drawn_outputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = 4 * torch.randn(rows, len(ANCHORS), N_CLASSES, dtype=dtype)
    return logits.requires_grad_(), torch.randn(
        rows, len(ANCHORS), 4, dtype=dtype, requires_grad=True
    )


# ---------------------------------------------------------------------- the twin


def boxes_of(row: Tensor) -> dict[str, Tensor]:
    """A row without its padding, as torchvision takes it."""
    kept = row[row[:, 0] >= 0]
    return {"boxes": kept[:, 1:], "labels": kept[:, 0].long()}


class Seen(RetinaNetHead):
    """Notes what torchvision's RetinaNet matched."""

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):  # type: ignore[no-untyped-def]
        (self.matched,) = matched_idxs
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)


BODY = torch.nn.Identity()
BODY.out_channels = 8  # type: ignore[assignment]
TWIN = TorchvisionRetinaNet(BODY, N_CLASSES, head=Seen(8, 9, N_CLASSES))


def torchvisions(logits: Tensor, regressions: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class loss and box loss of one image, and what each anchor was matched with."""
    outputs = {"cls_logits": logits[None], "bbox_regression": regressions[None]}
    losses = TWIN.compute_loss([boxes_of(row)], outputs, [ANCHORS.to(row.dtype)])
    return losses["classification"], losses["bbox_regression"], TWIN.head.matched


# ---------------------------------------------------------------------- tests


def test_matches_are_torchvisions() -> None:
    targets = drawn_targets()
    found = match(ANCHORS, targets)
    between = 0
    for i, row in enumerate(targets):
        *_, matched = torchvisions(*(x[0] for x in drawn_outputs(1)), row)
        assert torch.equal(found.foreground[i], matched >= 0)
        assert torch.equal(found.between[i], matched == -2)
        foreground = matched >= 0
        kept = row[row[:, 0] >= 0]
        ours = row[found.box[i][foreground]]
        assert torch.equal(ours, kept[matched[foreground]])
        between += int(found.between[i].sum())
    assert between > 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"]
)
def test_losses_and_gradients_are_torchvisions(dtype: torch.dtype, tolerance: float) -> None:
    targets = drawn_targets().to(dtype)
    logits, regressions = drawn_outputs(len(targets), dtype)
    matches = match(ANCHORS, targets)
    of_classes = class_losses(logits, targets, matches)
    of_boxes = box_losses(regressions, ANCHORS, targets, matches)
    weights = torch.rand(len(targets), 2, dtype=dtype)
    total = (of_classes * weights[:, 0] + of_boxes * weights[:, 1]).sum()
    found = torch.autograd.grad(total, (logits, regressions))
    for i, row in enumerate(targets):
        mine = logits[i].detach().requires_grad_(), regressions[i].detach().requires_grad_()
        cls, box, _ = torchvisions(*mine, row)
        assert of_classes[i].item() == pytest.approx(cls.item(), rel=tolerance)
        assert of_boxes[i].item() == pytest.approx(box.item(), rel=tolerance)
        wanted = torch.autograd.grad(cls * weights[i, 0] + box * weights[i, 1], mine)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours[i] - theirs).norm() <= tolerance * theirs.norm()


def test_the_focal_loss_has_the_derivative_that_it_says() -> None:
    logits = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[[2.0, 0, 0, 9, 9]], [[-1.0, 0, 0, 0, 0]]])
    foreground = torch.tensor([[True, False, True, False, False], [False] * 5])
    between = torch.tensor([[False, True, False, False, False], [False] * 5])
    matches = Matches(torch.zeros(2, 5, dtype=torch.int64), foreground, between)
    assert torch.autograd.gradcheck(lambda x: class_losses(x, targets, matches), logits)


def test_extreme_logits_give_no_nan() -> None:
    targets = drawn_targets()
    logits = torch.full((len(targets), len(ANCHORS), N_CLASSES), 1e4).requires_grad_()
    regressions = torch.full((len(targets), len(ANCHORS), 4), -1e4).requires_grad_()
    for sign in (1, -1):
        matches = match(ANCHORS, targets)
        losses = class_losses(sign * logits, targets, matches)
        losses = losses + box_losses(sign * regressions, ANCHORS, targets, matches)
        gradients = torch.autograd.grad(losses.sum(), (logits, regressions))
        assert all(x.isfinite().all() for x in (losses, *gradients))


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan"), float("inf")])
def test_padding_boxes_have_no_effect(garbage: float) -> None:
    boxes = row_of(boxes_of_any_size(5))
    clean = boxes[boxes[:, 0] >= 0][None]
    padding = torch.full((MOST - 5, 5), garbage)
    padding[:, 0] = -1
    padded = torch.cat([clean[0, :2], padding, clean[0, 2:]])[None]
    results = []
    for targets in (clean, padded):
        torch.manual_seed(0)
        logits, regressions = drawn_outputs(1)
        matches = match(ANCHORS, targets)
        of_classes = class_losses(logits, targets, matches)
        of_boxes = box_losses(regressions, ANCHORS, targets, matches)
        gradients = torch.autograd.grad(of_classes + of_boxes, (logits, regressions))
        results.append([of_classes, of_boxes, understood(logits, targets, matches), *gradients])
    for without, with_padding in zip(*results, strict=True):
        assert torch.equal(without, with_padding)


def test_rows_do_not_know_each_other() -> None:
    targets = drawn_targets()
    outputs = drawn_outputs(len(targets))

    def of(rows: slice | list[int]) -> list[Tensor]:
        some = targets[rows]
        matches = match(ANCHORS, some)
        logits, regressions = (x[rows] for x in outputs)
        of_boxes = box_losses(regressions, ANCHORS, some, matches)
        return [class_losses(logits, some, matches), of_boxes, understood(logits, some, matches)]

    together = of(slice(None))
    backwards = of([*reversed(range(len(targets)))])
    for all_rows, turned in zip(together, backwards, strict=True):
        assert torch.equal(all_rows, turned.flip(0))
    for all_rows, one in zip(together, of([4]), strict=True):
        assert torch.equal(all_rows[4:5], one)


def test_nothing_waits_for_the_device() -> None:
    targets = drawn_targets()
    logits, regressions = drawn_outputs(len(targets))
    with NoHostSync():
        matches = match(ANCHORS, targets)
        losses = class_losses(logits, targets, matches)
        losses = losses + box_losses(regressions, ANCHORS, targets, matches)
        torch.autograd.grad(losses.sum(), (logits, regressions))
        understood(logits, targets, matches)


def test_no_shape_depends_on_a_value() -> None:
    """A tensor without storage has shapes alone."""
    meta = torch.device("meta")
    targets = torch.empty(3, MOST, 5, device=meta)
    logits = torch.empty(3, len(ANCHORS), N_CLASSES, device=meta, requires_grad=True)
    regressions = torch.empty(3, len(ANCHORS), 4, device=meta, requires_grad=True)
    anchors = ANCHORS.to(meta)
    matches = match(anchors, targets)
    losses = class_losses(logits, targets, matches)
    losses = losses + box_losses(regressions, anchors, targets, matches)
    assert losses.shape == understood(logits, targets, matches).shape == (3,)
    gradients = torch.autograd.grad(losses.sum(), (logits, regressions))
    assert [x.shape for x in gradients] == [logits.shape, regressions.shape]


def test_encoded_boxes_are_torchvisions() -> None:
    boxes = boxes_of_any_size(len(ANCHORS)).double()
    wanted = TWIN.box_coder.encode_single(boxes, ANCHORS.double())
    assert torch.allclose(encoded(boxes, ANCHORS), wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- the leak monitor


def by_loops(logits: Tensor, row: Tensor) -> float:
    """`understood` of one row, anchor after anchor."""
    *_, matched = torchvisions(logits, torch.zeros(len(ANCHORS), 4), row)
    labels = boxes_of(row)["labels"]
    if not len(labels):
        return float(all(probability < 0.5 for probability in logits.sigmoid().flatten()))
    hits = [
        int(logits[a].argmax()) == int(labels[matched[a]])
        for a in range(len(ANCHORS))
        if matched[a] >= 0
    ]
    return sum(hits) / len(hits)


def test_hits_are_the_share_of_anchors_that_know_the_class() -> None:
    targets = drawn_targets()
    logits, _ = drawn_outputs(len(targets))
    found = understood(logits, targets, match(ANCHORS, targets))
    wanted = [by_loops(*both) for both in zip(logits.detach(), targets, strict=True)]
    assert found.tolist() == pytest.approx(wanted)
    assert 0 < found.mean() < 1


@pytest.mark.parametrize(("change", "wanted"), [(lambda x: -x.abs(), 1), (lambda x: x, 0)])
def test_an_empty_image_is_understood_by_silence(
    change: Callable[[Tensor], Tensor], wanted: int
) -> None:
    targets = row_of(torch.zeros(0, 4))[None]
    logits = change(torch.randn(1, len(ANCHORS), N_CLASSES) - 0.1)
    assert understood(logits, targets, match(ANCHORS, targets)).tolist() == [wanted]
