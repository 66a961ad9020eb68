"""RetinaNet as torchvision's, its anchors, and first weights of a detector (`model.init`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from fap import checkpoint
from fap.nets.build import prepare
from fap.nets.dual import export, norms
from fap.nets.fuse import FusedBasicBlock, FusedBottleneck
from fap.nets.pretrained import load_init
from fap.nets.retinanet import SPECS, RetinaNet, Spec, anchors, anchors_per_level, spec_of
from fap.nets.stem import stem_of
from fap.nets.weights.find import find_weights
from fap.tasks.boxes_out import detections
from tests.nets.conftest import randomise_norms

N_CLASSES = 5
MEAN = (0.4, 0.5, 0.6)
STD = (0.2, 0.25, 0.3)
TINY = SPECS["retinanet_tiny"]
RESNET50 = SPECS["retinanet_resnet50_fpn"]


def torchvisions(**options: Any) -> nn.Module:
    return retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=N_CLASSES, **options
    )


# ---------------------------------------------------------------------- the network


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_outputs_are_those_of_all_anchors(name: str) -> None:
    spec = spec_of(name)
    model = RetinaNet(spec, N_CLASSES).eval()
    sides = (96, 160)  # 160 / 64 is no whole number
    with torch.inference_mode():
        outputs = model(torch.rand(2, 3, *sides))
    n = len(anchors(spec, sides))
    assert sum(anchors_per_level(spec, sides)) == n
    assert outputs.shape == (2, n * (N_CLASSES + 4))
    assert all(p.requires_grad for p in model.parameters())
    live = [k for k, module in model.named_modules() if type(module) is nn.BatchNorm2d]
    assert live
    assert all(k.startswith("backbone.body.") for k in live)


def test_names_are_torchvisions() -> None:
    ours = RetinaNet(RESNET50, N_CLASSES).state_dict()
    theirs = torchvisions().state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize("name", SPECS)
def test_first_weights_are_drawn_as_torchvisions(name: str) -> None:
    """Every class has probability 1% at first, and each sort of weight has its own spread."""
    state = RetinaNet(spec_of(name), N_CLASSES).state_dict()
    assert state["head.classification_head.cls_logits.bias"].sigmoid().allclose(torch.tensor(0.01))
    for layer in ("classification_head.cls_logits", "regression_head.bbox_reg"):
        assert state[f"head.{layer}.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert state["head.regression_head.conv.0.0.weight"].std().item() == pytest.approx(
        0.01, rel=0.1
    )
    lateral = state["backbone.fpn.inner_blocks.0.0.weight"]
    limit = (3 / lateral.shape[1]) ** 0.5  # uniform: He et al.'s, with slope 1
    assert lateral.abs().max().item() == pytest.approx(limit, rel=0.02)
    assert state["backbone.fpn.inner_blocks.0.0.bias"].abs().max() == 0


def test_a_prepared_detector_has_a_stem_and_fused_blocks() -> None:
    for spec, block in ((TINY, FusedBasicBlock), (RESNET50, FusedBottleneck)):
        plain = RetinaNet(spec, N_CLASSES)
        randomise_norms(plain)
        model = prepare(copy.deepcopy(plain), size=64)
        stem = stem_of(model)
        assert stem is model.backbone.body["conv1"].stem
        assert stem is not None
        assert stem.direct
        n_blocks = sum(type(m) is block.__mro__[1] for m in plain.modules())
        assert sum(isinstance(m, block) for m in model.modules()) == n_blocks >= 3
        assert all(norm.relu for k, norm in model.named_modules() if k.endswith("body.bn1"))
        assert type(model.backbone.body["relu"]) is nn.Identity
        x = torch.rand(2, 3, 64, 96)
        with torch.inference_mode():
            assert torch.allclose(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


def test_without_groups_a_prepared_detector_trains_like_the_plain_one() -> None:
    plain = RetinaNet(TINY, N_CLASSES).to(memory_format=torch.channels_last)
    model = prepare(copy.deepcopy(plain), size=64)
    x = torch.rand(3, 3, 64, 64).to(memory_format=torch.channels_last)
    for net in (plain, model):
        net.train()(x).square().sum().backward()
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        # What a stage gives goes two ways, and the fused block adds their gradients otherwise.
        assert parameter.grad is not None
        difference = own[name].grad - parameter.grad  # type: ignore[operator]
        assert difference.norm() <= 1e-4 * parameter.grad.norm(), name
    ours = export(model.state_dict())
    assert all(torch.equal(v, ours[k]) for k, v in plain.state_dict().items())


def test_no_output_is_copied_in_channels_last() -> None:
    """What comes out of a head's last convolution is laid out as the tensor that is made of it."""
    model = prepare(RetinaNet(TINY, N_CLASSES), size=64)
    seen: list[Tensor] = []
    for head in (model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg):
        head.register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert len(seen) == 2 * len(TINY.strides)
    for output in seen:
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert output.permute(0, 2, 3, 1).flatten(1).data_ptr() == output.data_ptr()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("retinanet_resnet51_fpn", "did you mean retinanet_resnet50_fpn"),
        ("RetinaNet_ResNet50_FPN", "did you mean retinanet_resnet50_fpn"),
        ("retinanet_resnet50_fpn_v2", "did you mean retinanet_resnet50_fpn"),
        ("resnet50", "no detector"),
        ("", "there are retinanet_resnet18_fpn, "),
        ("x" * 10**6, "1,000,002 characters"),
    ],
)
def test_names_that_are_no_detector(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.name = ") as error:
        spec_of(name)
    assert says in str(error.value)
    assert len(str(error.value)) < 500


# ---------------------------------------------------------------------- anchors


@pytest.mark.parametrize("sides", [(64, 64), (96, 128), (800, 1344), (480, 640)])
def test_anchors_are_torchvisions(sides: tuple[int, int]) -> None:
    canvas = torch.zeros(1).expand(1, 3, *sides)
    # Three strides of 2 by pooling; each further level is a convolution of stride 2 on the last.
    levels = [nn.functional.max_pool2d(canvas[:, :1], 8)]
    for _ in range(4):
        levels.append(nn.functional.conv2d(levels[-1], torch.ones(1, 1, 3, 3), None, 2, 1))
    (wanted,) = _default_anchorgen()(ImageList(canvas, [sides]), levels)
    found = anchors(RESNET50, sides)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    per_level = [9 * level.shape[2] * level.shape[3] for level in levels]
    assert anchors_per_level(RESNET50, sides) == tuple(per_level)


# ---------------------------------------------------------------------- export


def detector_that_finds_boxes(
    spec: Spec,
    images: Tensor,  # (B, 3, H, W)
) -> RetinaNet:
    """Some are sure, some are doubtful; they have every size."""
    model = RetinaNet(spec, N_CLASSES).eval()
    randomise_norms(model)
    for name, parameter in model.head.named_parameters():
        if "conv." in name and name.endswith("weight"):
            nn.init.kaiming_normal_(parameter)
    classes = model.head.classification_head.cls_logits
    boxes = model.head.regression_head.bbox_reg
    nn.init.zeros_(classes.bias)
    with torch.inference_mode():
        n_logits = len(anchors(spec, images.shape[2:])) * N_CLASSES
        outputs = model(images)
    with torch.no_grad():
        classes.weight.mul_(1.5 / outputs[:, :n_logits].std())
        boxes.weight.mul_(0.3 / outputs[:, n_logits:].std())
    nn.init.constant_(classes.bias, -4)
    return model


@pytest.mark.slow
def test_an_exported_detector_finds_the_same_in_torchvision() -> None:
    sides = (96, 160)
    # In float64 no order of scores and no overlap hangs on the last bits.
    images = torch.rand(2, 3, *sides, dtype=torch.float64)
    mean, std = images.new_tensor([MEAN, STD]).view(2, 3, 1, 1)
    x = (images - mean) / std
    model = prepare(detector_that_finds_boxes(RESNET50, x.float()), size=64)
    # A min_size and a max_size that leave the image as it is; mean and std on pixels in 0..1.
    theirs = torchvisions(
        min_size=min(sides),
        max_size=max(sides),
        image_mean=MEAN,
        image_std=STD,
        detections_per_img=100,
    )
    theirs.load_state_dict(export(model.state_dict()), strict=True)
    model.double().eval()
    theirs.double().eval()
    grid = anchors(RESNET50, sides).double()
    with torch.inference_mode():
        wanted = theirs([*images])
        outputs = model(x)
        logits, regressions = outputs.split([len(grid) * N_CLASSES, len(grid) * 4], 1)
        for row, expected in enumerate(wanted):
            found = detections(
                logits[row].view(-1, N_CLASSES),
                regressions[row].view(-1, 4),
                grid,
                anchors_per_level(RESNET50, sides),
                (0, 0, *sides),
            )
            assert 10 < len(found.scores) <= 100
            assert torch.equal(found.classes, expected["labels"])
            assert torch.allclose(found.scores, expected["scores"], rtol=1e-9)
            assert torch.allclose(found.boxes, expected["boxes"], rtol=0, atol=1e-6)
            assert 0.05 < found.scores.min() < found.scores.max() < 1
            widths = found.boxes[:, 2] - found.boxes[:, 0]
            assert 2 * widths.min() < widths.max()


# ---------------------------------------------------------------------- model.init


def start(path: Path, name: str = "retinanet_resnet18_fpn") -> tuple[nn.Module, list[str]]:
    """A model that starts from the file, and what was said."""
    model = prepare(RetinaNet(spec_of(name), N_CLASSES), size=64)
    said: list[str] = []
    load_init(model, "ours", find_weights(str(path)), N_CLASSES, said.append)
    return model, said


def classifier() -> dict[str, Tensor]:
    model = torchvision.models.resnet18()
    randomise_norms(model)
    return model.state_dict()


def test_init_from_a_classifier_of_the_same_backbone(tmp_path: Path) -> None:
    state = classifier()
    header = {"model": "resnet18", "mean": "[0.1, 0.5, 0.5]"}
    checkpoint.save(tmp_path / "x", state, {}, **header)
    torch.manual_seed(0)
    untouched = RetinaNet(SPECS["retinanet_resnet18_fpn"], N_CLASSES).state_dict()
    torch.manual_seed(0)
    model, said = start(tmp_path / "x")
    (line,) = said
    assert line.startswith(f"model.init = '{tmp_path / 'x'}': a classifier's weights")
    found = model.state_dict()
    for name, value in found.items():
        plain = name.replace(".aux.", ".")
        body = plain.removeprefix("backbone.body.")
        wanted = untouched[plain] if body == plain else state[body]
        assert torch.equal(value, wanted), name
    assert len(norms(model)) == 20


@pytest.mark.parametrize("origin", ["ours", "torchvision's"])
def test_init_from_weights_of_the_whole_detector(tmp_path: Path, origin: str) -> None:
    """Torchvision's published ones: frozen norms that count nothing, and the old heads' names."""
    source = RetinaNet(SPECS["retinanet_resnet18_fpn"], N_CLASSES)
    randomise_norms(source)
    state = source.state_dict()
    written = dict(state)
    if origin == "torchvision's":
        written = {
            old_name(k): v for k, v in state.items() if not k.endswith("num_batches_tracked")
        }
        assert "head.regression_head.conv.6.bias" in written
    safetensors.torch.save_file(written, tmp_path / "x")
    model, said = start(tmp_path / "x")
    assert said == [f"model.init = '{tmp_path / 'x'}': weights of the whole detector"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name.replace(".aux.", ".")]), name


def old_name(name: str) -> str:
    """conv.1.0.weight was conv.2.weight when every second child was a ReLU."""
    for i in range(4):
        name = name.replace(f"_head.conv.{i}.0.", f"_head.conv.{2 * i}.")
    return name


@pytest.mark.parametrize("of_classifier", [True, False])
def test_init_of_another_detector_changes_nothing(tmp_path: Path, of_classifier: bool) -> None:
    if of_classifier:
        state = torchvision.models.resnet34().state_dict()
        says = r"96 unknown to the model \('backbone\.body\.layer"
    else:
        state = RetinaNet(SPECS["retinanet_resnet18_fpn"], 7).state_dict()
        state["head.regression_head.bbox_reg.bias"] = torch.zeros(5)
        says = r"'head\.regression_head\.bbox_reg\.bias: \(5,"
    safetensors.torch.save_file(state, tmp_path / "x")
    model = prepare(RetinaNet(SPECS["retinanet_resnet18_fpn"], N_CLASSES), size=64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        load_init(model, "ours", find_weights(str(tmp_path / "x")), N_CLASSES, pytest.fail)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_init_of_a_detector_of_other_classes_keeps_its_boxes(tmp_path: Path) -> None:
    state = RetinaNet(SPECS["retinanet_resnet18_fpn"], 7).state_dict()
    safetensors.torch.save_file(state, tmp_path / "x")
    torch.manual_seed(0)
    untouched = RetinaNet(SPECS["retinanet_resnet18_fpn"], N_CLASSES).state_dict()
    torch.manual_seed(0)
    model, said = start(tmp_path / "x")
    assert said[1].endswith(f"head of 7 classes replaced by one of {N_CLASSES}")
    for name, value in export(model.state_dict()).items():
        wanted = untouched if "cls_logits" in name else state
        assert torch.equal(value, wanted[name]), name
