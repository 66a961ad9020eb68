"""Runs of detection as a user meets them: what they leave, which fields act, resume, mistakes."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import pipelines
from fap.checkpoint import Checkpoints
from fap.cli import export as export_cli
from fap.evaluate.load import load_model
from fap.nets.retinanet import SPECS, RetinaNet
from fap.run.epoch import plan_spec
from fap.tasks.detection import Detection
from pipelines.boxes import plan_boxes
from tests.run.detections import DETECTION
from tests.run.runs import assert_same, final_state, kill_and_resume, run, without_metrics
from tests.run.wiring import OF_DETECTION, Seen, observe, value_of

STEPS = 8  # of an undisturbed run: four epochs of two


Observed = Callable[..., Seen]


@pytest.fixture
def train(boxes: dict[str, Path], tmp_path: Path) -> Observed:
    """A run on those data in the test's folder."""

    def run(*words: str, runs: str = "runs") -> Seen:
        return observe([*DETECTION, *words], boxes, tmp_path / runs)

    return run


@pytest.fixture(scope="module")
def whole(boxes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Seen]:
    """Runs that nothing happened to, each made once."""
    made: dict[tuple[str, ...], Seen] = {}

    def run(*words: str) -> Seen:
        if words not in made:
            runs = tmp_path_factory.mktemp("whole") / "runs"
            made[words] = observe([*DETECTION, *words], boxes, runs)
            assert made[words].error == ""
        return made[words]

    return run


# ---------------------------------------------------------------------- what a run leaves


def test_what_is_said_before_the_first_step(train: Observed) -> None:
    said = train("data.most_boxes=2", "data.size=[64,96]", "run.max_steps=1").said
    store = pipelines.open_store(train("run.max_steps=1", runs="again").config.data.train or "")
    assert store.annotations is not None
    cut = (store.annotations.trained_per_image() - 2).clip(0)
    for part in (
        "retinanet_tiny, 3 classes, 64 x 96 px",
        "24 images, 62 boxes and 1 crowd boxes, 3 class(es) disc to plate",
        "2 images without boxes, at most 4 boxes on one image",
        f"not trained: {cut.sum()} boxes of {(cut > 0).sum()} images, beyond data.most_boxes = 2",
    ):
        assert part in said


def test_nothing_is_said_of_what_is_not_beyond(whole: Observed) -> None:
    assert "not trained" not in whole().said


def test_a_run_leaves_its_metrics_and_its_result(whole: Observed) -> None:
    seen = whole()
    assert seen.run is not None
    steps = [record for record in seen.records if "lr" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        for kind in ("clean", "noise", "adv"):
            assert record[f"loss_{kind}"] > 0
            assert 0 <= record[f"acc_{kind}"] <= 1
    (last,) = [record for record in seen.records if "val_map" in record]
    found = {name: last[f"val_{name}"] for name in ("map", "map50", "map75", "map_small")}
    assert found == seen.result["last"]
    assert set(seen.result["best"]) == {"map", "epoch"}
    assert json.loads((seen.run.folder / "result.json").read_text()) == seen.result
    assert "epoch 4: AP 0.00%, AP50 " in seen.said
    board = EventAccumulator(str(seen.run.folder / "tensorboard"))
    tags = board.Reload().Tags()["scalars"]
    assert {"steps/loss_adv", "epochs/val_map", "epochs/val_map50"} <= set(tags)


@pytest.mark.slow
def test_a_run_learns_to_detect(train: Observed) -> None:
    """On the images that it trains on, whose boxes have a colour for each class."""
    words = ("budget.epochs=40", "budget.milestones=[32]", "optim.lr=1", "optim.clip_norm=5")
    seen = train("method.name=vanilla", "method.p_adv=null", "run.eval_every=40", *words)
    assert seen.error == ""
    assert seen.result["last"]["map50"] > 0.2
    losses = [record["loss_clean"] for record in seen.records if "lr" in record]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    hits = [record["acc_clean"] for record in seen.records if "lr" in record]
    assert sum(hits[-10:]) > 1.3 * sum(hits[:10])


@pytest.mark.parametrize("understood", ["clean", "adv"])
def test_the_leak_monitor_looks_at_the_hits(
    train: Observed, monkeypatch: pytest.MonkeyPatch, understood: str
) -> None:
    # The blocks of each step, in the order of its two passes.
    kinds = itertools.cycle(("clean", "noise", "clean", "adv"))
    losses_and_hits = Detection.losses_and_hits

    def with_made_up_hits(task: Detection, outputs: Tensor, targets: Tensor) -> Any:
        losses, hits = losses_and_hits(task, outputs, targets)
        return losses, torch.full_like(hits, next(kinds) == understood)

    monkeypatch.setattr(Detection, "losses_and_hits", with_made_up_hits)
    said = train("run.max_steps=2").said
    warned = "accuracy of adversarial rows (100.0%) is above that of clean rows (0.0%)" in said
    assert warned == (understood == "adv")


# ---------------------------------------------------------------------- its fields

SEPARATE = ("method.name=decoupled", "method.eps_255=8", "method.targeted=false")
ATTACK = ("adversarial", "weights")
# Change, what it changes, and the words of the run without it.
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "data.jitter": (
        "data.jitter=[0.5,1.5]",
        ("plan.window", "plan.place", "input.images", "input.targets", "weights"),
        (),
    ),
    "data.most_boxes": ("data.most_boxes=2", ("input.targets", "weights"), ()),
    "method.attack_loss": ("method.attack_loss=cls", ATTACK, SEPARATE),
    "data.size": (
        "data.size=[64,96]",
        ("loaders", "plan.place", "input.images", "input.targets", "evaluated"),
        (),
    ),
    "optim.clip_norm": ("optim.clip_norm=0.01", ("weights",), ()),
}


def test_every_field_of_detection_has_a_case() -> None:
    assert set(CASES) >= OF_DETECTION


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_changing_a_field_changes_what_it_is_about(
    name: str, whole: Observed, train: Observed
) -> None:
    change, aspects, words = CASES[name]
    short = ("run.max_steps=3", *words)
    base = whole(*short)
    changed = train(*short, change)
    assert changed.error == ""
    assert value_of(changed.config, name) != value_of(base.config, name)
    before = base.aspects()
    after = changed.aspects()
    for aspect in aspects:
        assert before[aspect] != after[aspect], f"{change} left {aspect} as it was"


@pytest.mark.slow
def test_every_attack_loss_makes_other_images(whole: Observed) -> None:
    of = ("total", "cls", "box", "max")
    runs = [whole("run.max_steps=3", *SEPARATE, f"method.attack_loss={part}") for part in of]
    made = {seen.aspects()["adversarial"] for seen in runs}
    assert len(made) == len(of)
    said = [seen.said for seen in runs]
    assert "loss" not in said[0].partition("attack ")[2].partition("\n")[0]
    for text, words in zip(
        said[1:],
        ("of the classes alone", "of the boxes alone", "each part of the loss"),
        strict=True,
    ):
        assert words in text
    # Two images of which one is chosen, by two forwards: 2 K + 1 passes in place of K.
    assert "at 1.33333 image passes per image" in said[0]
    assert "at 2 image passes per image" in said[3]


def test_max_takes_each_row_from_the_attack_that_is_worse(whole: Observed) -> None:
    """At the first step, where all three begin alike."""
    found = {}
    for part in ("cls", "box", "max"):
        seen = whole("run.max_steps=3", *SEPARATE, f"method.attack_loss={part}")
        found[part] = seen.adversarial[0]
    assert not torch.equal(found["cls"], found["box"])
    for row, image in enumerate(found["max"]):
        assert any(torch.equal(image, found[part][row]) for part in ("cls", "box"))


# ---------------------------------------------------------------------- few classes, few boxes


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vanilla", "fast_advprop", "noise", "advprop"])
def test_a_single_class_is_trained_where_nothing_aims_at_another(
    train: Observed, method: str
) -> None:
    words = ["data.train={single}", "data.val={single}", "run.max_steps=2", f"method.name={method}"]
    if method in ("vanilla", "advprop"):
        words.append("method.p_adv=null")
    if method == "advprop":
        words.append("method.targeted=false")
    seen = train(*words)
    assert seen.error == ""
    assert "1 class(es) disc" in seen.said
    assert seen.result["last"].keys() >= {"map", "map50"}


def test_images_without_boxes_are_trained(whole: Observed) -> None:
    seen = whole()
    without = sum(int((fed["targets"][:, :, 0] < 0).all(1).sum()) for fed in seen.inputs)
    assert without > 0
    assert all(record["skipped"] == 0 for record in seen.records if "lr" in record)


# ---------------------------------------------------------------------- what is fed


def test_targets_are_the_plans_boxes(whole: Observed) -> None:
    seen = whole()
    store = pipelines.open_store(seen.config.data.train or "")
    assert store.annotations is not None
    spec = plan_spec(seen.config)
    assert {len(fed["images"]) for fed in seen.inputs} == {spec.clean_rows + spec.adv_rows}
    for number, fed in enumerate(seen.inputs):
        plan = seen.plans[number // 2]
        wanted = plan_boxes(plan, store.annotations, seen.config.data.most_boxes)[number % 2]
        assert torch.equal(fed["targets"], torch.from_numpy(wanted))


# ---------------------------------------------------------------------- resume


def state(seen: Seen) -> dict[str, Tensor]:
    assert seen.run is not None
    newest = Checkpoints(seen.run.folder / "checkpoints").newest()
    assert newest is not None
    _, tensors, meta = newest
    assert meta["step"] == seen.result["steps"]
    return without_metrics(tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("method.name=vanilla", "method.p_adv=null"),
        ("method.schedule=fused",),
        ("method.schedule=pipelined",),
        ("method.name=decoupled", "method.attack_loss=max"),
    ],
    ids=["vanilla", "fused", "pipelined", "max"],
)
def test_stopped_and_resumed_is_never_stopped(
    words: Sequence[str], whole: Observed, train: Observed
) -> None:
    """After every odd step: in the middle of an epoch."""
    words = (*words, "data.jitter=[0.5,1.5]", "optim.clip_norm=5")
    expected = whole(*words)
    for stop in (1, 3):
        train(*words, f"run.max_steps={stop}", "resume=auto")
    rest = train(*words, "resume=auto")
    assert rest.error == ""
    assert len(rest.inputs) == len(expected.inputs) - 3
    assert_same(state(rest), state(expected))
    assert rest.result["last"] == expected.result["last"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_weights(
    boxes: dict[str, Path], tmp_path: Path
) -> None:
    """Twice, by SIGKILL; 20 steps as runs.py has them, of 8 + 2 rows."""
    more = (*DETECTION, "optim.clean_batch=8", "budget.epochs=12", "run.eval_every=5")
    folder, _ = run(boxes["data"], tmp_path / "whole", *more)
    kill_and_resume(
        boxes["data"],
        tmp_path / "killed",
        2,
        final_state(folder),
        secrets.randbelow(1 << 30),
        *more,
    )


def test_other_boxes_of_the_same_images_are_other_data(
    train: Observed, boxes: dict[str, Path]
) -> None:
    assert boxes["moved"].read_bytes() == boxes["data"].read_bytes()
    train("run.max_steps=1")
    for field in ("train", "val"):
        refused = train(f"data.{field}={{moved}}", "resume=auto")
        assert f"was trained with other data than data.{field} is now" in refused.error
        assert refused.inputs == []


# ---------------------------------------------------------------------- weights in and out


@pytest.mark.slow
def test_the_first_weights_may_be_a_classifiers(train: Observed, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torchvision.models.resnet18().state_dict()
    safetensors.torch.save_file(state, tmp_path / "classifier.safetensors")
    init = f"model.init={tmp_path / 'classifier.safetensors'}"
    seen = train("model.name=retinanet_resnet18_fpn", init, "run.max_steps=1")
    assert seen.error == ""
    assert "classifier.safetensors': a classifier's weights; pyramid and heads begin" in seen.said
    assert seen.run is not None
    first = seen.run.step.network.flat.named(seen.weights[0])
    body = "backbone.body."
    n = 0
    for name, value in first.items():
        plain = name.replace(".aux.", ".").removeprefix(body)
        if name.startswith(body):
            assert torch.equal(value, state[plain]), name
            n += 1
    assert n > 60


@pytest.mark.slow
def test_an_exported_run_loads_into_torchvisions_parts(
    train: Observed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = train("model.name=retinanet_resnet18_fpn", "run.max_steps=1")
    assert seen.run is not None
    checkpoint = seen.run.saving.checkpoints.paths()[-1]
    out = tmp_path / "plain.safetensors"
    assert export_cli.main([str(checkpoint), str(out)]) == 0
    assert "retinanet_resnet18_fpn, 3 classes" in capsys.readouterr().out
    weights = safetensors.torch.load_file(out)
    model = torchvisions_resnet18(3)
    model.load_state_dict(weights, strict=True)
    ours = RetinaNet(SPECS["retinanet_resnet18_fpn"], 3)
    ours.load_state_dict(weights, strict=True)
    image = torch.rand(3, 64, 64)
    with torch.inference_mode():
        model.eval()
        features = list(model.backbone(image[None]).values())
        heads = model.head(features)
        found = ours.eval()(image[None])
    expected = torch.cat([heads["cls_logits"].flatten(1), heads["bbox_regression"].flatten(1)], 1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    converted = load_model(checkpoint).model
    with torch.inference_mode():
        assert torch.allclose(converted(image[None]), found, rtol=1e-4, atol=1e-4)


def torchvisions_resnet18(n_classes: int) -> Any:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=torch.nn.BatchNorm2d,
        returned_layers=[2, 3, 4],
        trainable_layers=5,
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return TorchvisionRetinaNet(backbone, n_classes, anchor_generator=_default_anchorgen())
