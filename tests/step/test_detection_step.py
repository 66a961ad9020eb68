"""Steps of detection against the slow twin, in float64: every method and schedule.

The twin's loss is torchvision's own, image by image; its padding is masked pixel by pixel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from fap.config import Config, make_config
from fap.draws import uniform
from fap.nets.retinanet import SPECS, RetinaNet, anchors
from fap.step.attack import DIRECTION, picture_mask
from fap.step.step import Step
from fap.tasks import make_task
from tests.step.reference_step import Draws, Twin
from tests.step.twin_checks import close, compare_step, converted_from, randomise_norms, rules_of

SIDES = (64, 96)  # height, width
CLASSES = 3
GROUP = 8  # rows of a clean group
MOST_BOXES = 4
SPEC = SPECS["retinanet_tiny"]
ANCHORS = anchors(SPEC, SIDES).double()

pytestmark = pytest.mark.usefixtures("seed")

METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {"name": "vanilla"},
    "sequential": {"name": "fast_advprop", "schedule": "sequential"},
    "fused": {"name": "fast_advprop", "schedule": "fused"},
    "pipelined": {"name": "fast_advprop", "schedule": "pipelined"},
    "parallel": {"name": "fast_advprop", "schedule": "parallel"},
    "fgsm": {"name": "fast_advprop", "random_start": False, "eps_255": 3.0},
    "noise": {"name": "noise"},
    "decoupled": {"name": "decoupled", "attack_bn": "batch"},
    "decoupled, cls": {"name": "decoupled", "attack_loss": "cls", "targeted": False},
    "decoupled, box": {"name": "decoupled", "attack_loss": "box", "targeted": False},
    "decoupled, max": {"name": "decoupled", "attack_loss": "max", "targeted": False},
    "advprop": {"name": "advprop", "attack_steps": 2, "eps_255": 2.0},
    "advprop, max": {"name": "advprop", "attack_steps": 2, "attack_loss": "max"},
    "adversarial_training": {"name": "adversarial_training", "attack_steps": 2},
}


def config_of(method: dict[str, Any], **optim: Any) -> Config:
    if method["name"] not in ("vanilla", "advprop", "adversarial_training"):
        method = {"p_adv": "1/3"} | method
    return make_config(
        {
            "task": "detection",
            "model": {"name": "retinanet_tiny", "num_classes": CLASSES},
            "method": {"group_rows": GROUP} | method,
            "data": {"size": SIDES, "crop": "letterbox", "most_boxes": MOST_BOXES},
            "optim": {"clean_batch": 2 * GROUP} | optim,
        }
    )


def models() -> tuple[nn.Module, nn.Module]:
    """(converted, plain): equal random weights, with norms that no longer begin at 1 and 0."""
    plain = RetinaNet(SPEC, CLASSES).double()
    randomise_norms(plain)
    for parameter in plain.parameters():
        if not parameter.any():  # biases: from zero on, an update of theirs is rounding alone
            nn.init.uniform_(parameter, -0.1, 0.1)
    # The heads begin so near to zero that no box would be wrong enough to matter.
    for head in (plain.head.classification_head.cls_logits, plain.head.regression_head.bbox_reg):
        nn.init.normal_(head.weight, std=0.2)
    return converted_from(plain, SIDES), plain


# ---------------------------------------------------------------------- the twin's loss

_BODY = nn.Identity()
_BODY.out_channels = 8  # type: ignore[assignment]
_TORCHVISION = TorchvisionRetinaNet(_BODY, CLASSES, head=RetinaNetHead(8, 9, CLASSES))


def torchvisions(outputs: Tensor, targets: Tensor, part: str) -> Tensor:
    """Torchvision's loss of each row alone, (rows,)."""
    losses = []
    n = len(ANCHORS)
    for row, boxes in zip(outputs, targets, strict=True):
        kept = boxes[boxes[:, 0] >= 0].double()
        truth = [{"boxes": kept[:, 1:], "labels": kept[:, 0].long()}]
        found = {
            "cls_logits": row[: n * CLASSES].view(1, n, CLASSES),
            "bbox_regression": row[n * CLASSES :].view(1, n, 4),
        }
        of_row = _TORCHVISION.compute_loss(truth, found, [ANCHORS])
        match part:
            case "cls":
                losses.append(of_row["classification"])
            case "box":
                losses.append(of_row["bbox_regression"])
            case _:
                losses.append(of_row["classification"] + of_row["bbox_regression"])
    return torch.stack(losses)


# ---------------------------------------------------------------------- random input


def draw_places(n: int) -> Tensor:  # int64 (n, 4): top, left, height, width
    """Pictures that fill the canvas along one side, at its corner or not."""
    places = torch.tensor([[0, 0, *SIDES]]).repeat(n, 1)
    for row in range(n):
        side = row % 3
        if side < 2:
            least = SIDES[side] // 2
            places[row, 2 + side] = torch.randint(least, SIDES[side], ())
            places[row, side] = torch.randint(0, SIDES[side] - int(places[row, 2 + side]) + 1, ())
    return places


def draw_targets(places: Tensor) -> Tensor:  # float32 (n, MOST_BOXES, 5)
    """0 to MOST_BOXES boxes inside each picture."""
    targets = torch.zeros(len(places), MOST_BOXES, 5)
    targets[:, :, 0] = -1
    for row, (top, left, height, width) in enumerate(places.tolist()):
        for i in range(row % (MOST_BOXES + 1)):
            sides = torch.rand(2) * torch.tensor([width - 8, height - 8]) + 6
            corner = torch.rand(2) * (torch.tensor([width, height]) - sides)
            corner += torch.tensor([left, top])
            class_ = float(torch.randint(CLASSES, ()))
            targets[row, i] = torch.tensor([class_, *corner, *(corner + sides)])
    return targets


def draw(config: Config) -> tuple[dict[str, Any], Draws]:
    """One step's random input, as `Step.feed` and as the twin take it."""
    method = config.method
    n_clean = config.optim.clean_batch
    n_groups = n_clean // GROUP
    n_adv = n_groups * method.adv_group_rows
    n_loaded = n_clean + config.loader_adv_rows
    images = torch.randint(0, 256, (n_loaded, 3, *SIDES), dtype=torch.uint8)
    places = draw_places(n_loaded)
    images *= picture_mask(places, SIDES)
    targets = draw_targets(places)
    feed: dict[str, Any] = {"images": images, "targets": targets, "place": places}
    twin: dict[str, Any] = {"images": images, "labels": targets}
    if n_adv:
        first = 0 if method.entry.attacked == "copies" else n_clean
        key = torch.randint(-(2**31), 2**31, (n_groups,)).int()
        order = torch.randperm(n_adv)
        feed |= {"noise_key": key, "shuffle": order}
        shape = (n_adv, 3, *SIDES)
        twin["delta0"] = torch.zeros(shape)
        if method.random_start:
            twin["delta0"] = uniform(key, shape, torch.float64) * method.eps_255
        twin["direction"] = uniform(key ^ DIRECTION, shape)
        twin["pictures"] = pictures_of(places[first:])
        if method.shuffle not in (None, "off"):
            twin["shuffle"] = order
        if method.targeted:
            twin["target"] = make_task(config).wrong_targets(key, targets[first:])
    return feed, Draws(**twin)


def pictures_of(places: Tensor) -> Tensor:  # bool (n, 1, H, W)
    mask = torch.zeros(len(places), 1, *SIDES, dtype=torch.bool)
    for row, (top, left, height, width) in enumerate(places.tolist()):
        mask[row, :, top : top + height, left : left + width] = True
    return mask


# ---------------------------------------------------------------------- tests


def check(config: Config, clip_norm: float | None = None, steps: int = 2) -> None:
    converted, plain = models()
    step = Step(converted, config)
    rules = replace(rules_of(config), losses=torchvisions, clip_norm=clip_norm)
    twin = Twin(plain, rules)
    for i in range(steps):
        feed, draws = draw(config)
        lr = 0.01 / (i + 1)
        step.feed(lr=lr, **feed)
        step()
        result = twin.step(draws)
        if clip_norm is None:
            pipelined = config.method.schedule == "pipelined"
            compare_step(step, twin, result, None if pipelined else draws.shuffle)
        twin.optimise(lr)
        weights = dict(converted.named_parameters())
        for name, value in plain.named_parameters():
            close(weights[name].data, value.data, f"{name} after step {i}")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_the_twins(name: str) -> None:
    check(config_of(METHODS[name]))


@pytest.mark.slow
def test_clipped_gradients_are_the_twins() -> None:
    check(config_of(METHODS["fused"], clip_norm=0.3), clip_norm=0.3)


def test_the_mask_is_the_picture() -> None:
    places = draw_places(9)
    assert torch.equal(picture_mask(places, SIDES), pictures_of(places))


@pytest.mark.parametrize("name", ["fused", "pipelined", "decoupled, max", "noise"])
def test_padding_is_never_attacked(name: str) -> None:
    config = config_of(METHODS[name] | {"eps_255": 8.0, "step_255": 8.0, "shuffle": "off"})
    converted, _ = models()
    step = Step(converted, config)
    feed, draws = draw(config)
    step.feed(lr=0.0, **feed)
    step()
    assert draws.pictures is not None
    clean = feed["images"][config.optim.clean_batch :].double()
    changed = step.adv.rows.images_255 != clean
    assert not (changed & ~draws.pictures).any()
    assert (changed & draws.pictures).sum() > 0.5 * 3 * draws.pictures.sum()
