"""What each pipeline gives a run of detection, and a run on real photographs with real boxes."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from fap.config import load_config
from fap.run.train import Run
from fap.step.step import Step
from pipelines.convert import Encoding
from pipelines.convert_boxes import convert_boxes
from tests.pipelines.test_real_boxes import photographs
from tests.run.detections import DETECTION
from tests.run.runs import steps_recorded
from tests.run.wiring import BASE

pytestmark = pytest.mark.slow
PIPELINES = ("reference", "ffcv", "turbojpeg", "dali")
STEPS = 10
__all__ = ["photographs"]  # a fixture


def run(data: Path, runs: Path, *more: str) -> tuple[Path, list[dict[str, Tensor]]]:
    """A run through the pipeline that its words name: its folder, and what its steps were fed."""
    fed: list[dict[str, Tensor]] = []
    feed = Step.feed

    def fed_with(step: Step, images: Tensor, targets: Tensor, lr: float, **draws: Tensor) -> None:
        inputs = {"images": images, "targets": targets, **draws}
        fed.append({name: value.clone() for name, value in inputs.items()})
        feed(step, images, targets, lr, **draws)

    words = [word.format(data=data, runs=runs) for word in (*BASE, *DETECTION)]
    training = Run(load_config(None, [*words, *more]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "feed", fed_with)
        training.train()
    return training.folder, fed


def assert_alike(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    """Bit-equal but for the images, whose resize may be another one, and images nearly so."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"images"}:
            assert torch.equal(ours[name], theirs[name]), name
        difference = (ours["images"].float() - theirs["images"].float()).abs()
        assert difference.mean() < 2.5  # grey levels


@pytest.mark.usefixtures("one_thread")
def test_every_pipeline_gives_a_run_the_same(boxes: dict[str, Path], tmp_path: Path) -> None:
    words = ("data.jitter=[0.7,1.3]", "data.size=[64,96]", "run.max_steps=3")
    made = {}
    for pipeline in PIPELINES:
        _, made[pipeline] = run(
            boxes["data"], tmp_path / pipeline, f"data.pipeline={pipeline}", *words
        )
    assert (made["reference"][0]["targets"][:, :, 0] >= 0).any()
    for pipeline in PIPELINES[1:]:
        assert_alike(made[pipeline], made["reference"])


# ---------------------------------------------------------------------- real photographs


@pytest.fixture(scope="module")
def trees(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four aerial photographs with 951 trees, as `fap-convert coco` writes them."""
    path = tmp_path_factory.mktemp("trees") / "trees.beton"
    convert_boxes(photographs, photographs, path, Encoding(max_side=400))
    return path


@pytest.mark.usefixtures("one_thread")
def test_real_photographs_train_through_every_pipeline(trees: Path, tmp_path: Path) -> None:
    """One step an epoch of two clean and two adversarial images, always the same four."""
    words = (
        *("data.size=256", "data.most_boxes=300", "optim.clean_batch=2", "method.group_rows=2"),
        *("method.p_adv=1/2", "budget.epochs=15", "budget.milestones=[]", "run.eval_every=99"),
        *("optim.lr=1.28", "optim.clip_norm=5", "run.checkpoint_every=99", "run.eval_batch=2"),
    )
    made: dict[str, Any] = {}
    for pipeline in PIPELINES:
        folder, fed = run(trees, tmp_path / pipeline, f"data.pipeline={pipeline}", *words)
        made[pipeline] = fed
        records = steps_recorded(folder)
        assert len(records) == STEPS
        assert all(record["skipped"] == 0 for record in records)
        losses = [fmean(r[f"loss_{kind}"] for kind in ("clean", "adv")) for r in records]
        assert fmean(losses[-3:]) < fmean(losses[:3])
    boxes_shown = (made["reference"][0]["targets"][:, :, 0] >= 0).sum(1)
    assert boxes_shown.min() > 20
    for pipeline in PIPELINES[1:]:
        assert_alike(made[pipeline], made["reference"])
