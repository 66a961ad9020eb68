"""Runs on a canvas of two sides: a stand-in takes detection's name, and classifies letterboxes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pipelines
from fap.cli import eval as eval_cli
from fap.tasks import TASKS
from pipelines.plan import eval_plan
from pipelines.plan_spec import PlanSpec
from tests.run.wiring import Seen, observe

SIDES = (8, 12)
LETTERBOX = ("task=detection", "data.crop=letterbox", "data.size=[8,12]")
JITTER = "data.jitter=[0.5,1.5]"


@pytest.fixture(scope="module", autouse=True)
def stand_in() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "detection", "tests.run.wiring:Doubled")
        yield


@pytest.fixture(scope="module")
def seen(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, stand_in: None) -> Seen:
    return observe((*LETTERBOX, JITTER), files, tmp_path_factory.mktemp("canvas") / "runs")


def test_the_canvas_reaches_plan_loader_and_step(seen: Seen) -> None:
    assert seen.error == ""
    spec = PlanSpec(
        seed=0,
        size=SIDES,
        crop="letterbox",
        jitter=(0.5, 1.5),
        clean_rows=8,
        clean_group_rows=4,
        adv_rows=4,
        adv_group_rows=2,
        shuffle_groups=2,
    )
    assert [plan.spec for plan in seen.plans] == [spec] * len(seen.plans)
    assert {options["size"] for _, _, options in seen.loaders} == {SIDES}
    assert "cifar_resnet8, 4 classes, 8 x 12 px" in seen.said
    assert len(seen.inputs) == 8
    for number, fed in enumerate(seen.inputs):
        assert fed["images"].shape == (12, 3, *SIDES)
        plan = seen.plans[number // 2]
        for image, (top, left, height, width) in zip(
            fed["images"], plan.place[number % 2].tolist(), strict=True
        ):
            around = image.clone()
            around[:, top : top + height, left : left + width] = 0
            assert not around.any()
    assert not torch.equal(seen.weights[0], seen.weights[-1])


def test_evaluation_sees_whole_images_on_the_canvas(seen: Seen) -> None:
    store = pipelines.open_store(seen.config.data.val or "")
    want = eval_plan(store.heights, store.widths, size=SIDES, resize=1, batch=256, crop="letterbox")
    assert (seen.eval_plans[0].place == want.place).all()
    with_reference = pipelines.open_loader("reference", store, size=SIDES)
    (batch,) = with_reference.load(want)
    assert torch.equal(seen.evaluated[0], batch.images)


@pytest.mark.slow
def test_jitter_acts_and_what_belongs_to_other_crops_does_not(
    seen: Seen, files: dict[str, Path], tmp_path: Path
) -> None:
    before = seen.aspects()
    plain = observe(LETTERBOX, files, tmp_path / "plain").aspects()
    for aspect in ("plan.window", "plan.place", "input.images", "weights"):
        assert plain[aspect] != before[aspect]
    assert plain["eval.place"] == before["eval.place"]
    others = ("data.resize=4", "data.scale=[0.5,1]", "data.ratio=[1,1]", "data.pad=1")
    after = observe((*LETTERBOX, JITTER, *others), files, tmp_path / "runs").aspects()
    assert after == before


def test_a_run_is_resumed_bit_by_bit(seen: Seen, files: dict[str, Path], tmp_path: Path) -> None:
    half = observe((*LETTERBOX, JITTER, "run.max_steps=3"), files, tmp_path / "runs")
    assert len(half.inputs) == 3
    refused = observe((*LETTERBOX, "resume=auto"), files, tmp_path / "runs")
    assert "trained with other settings" in refused.error
    # What has no meaning with a letterbox may be another.
    words = (*LETTERBOX, JITTER, "resume=auto", "data.resize=4", "data.scale=[0.5,1]")
    rest = observe(words, files, tmp_path / "runs")
    assert rest.error == ""
    assert len(rest.inputs) == 5
    assert torch.equal(rest.weights[-1], seen.weights[-1])


def test_the_command_evaluates_as_the_run_did(
    seen: Seen, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert seen.run is not None
    newest = seen.run.saving.checkpoints.paths()[-1]
    out = tmp_path / "eval"
    to = ["--device", "cpu", "--pipeline", "reference", "--out", str(out)]
    eval_cli.main([str(newest), "--data", str(files["data"]), *to])
    capsys.readouterr()
    (report,) = json.loads((out / "report.json").read_text())
    (result,) = report["results"].values()
    assert result["top1"] == seen.result["last"]["top1"]
