"""The run as a user meets it: start, stop, resume, and what it says of mistakes."""

import json
import os
import random
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

import pipelines
from fap import checkpoint
from fap.config import load_config
from fap.run.monitor import NonFinite
from fap.run.train import Run
from tests.run.detections import write_boxes
from tests.run.runs import STEPS, assert_same, final_state, records, run, steps_recorded


@pytest.mark.slow
def test_a_run_leaves_everything_that_is_needed_to_understand_it(
    tiny_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = run(tiny_beton, tmp_path)
    said = capsys.readouterr().out
    for part in (
        "fused",
        "2 passes",
        "0.00784",
        "main of 8 rows",
        "image passes",
        "aux BN",
        "change places among 2 groups",
    ):
        assert part in said
    assert folder == tmp_path / "fast_advprop" / "seed0"
    assert load_config(folder / "config.yaml").optim.clean_batch == 16
    assert json.loads((folder / "versions.json").read_text())["torch"]
    assert list(folder.glob("tensorboard/*"))
    steps = steps_recorded(folder)
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert all({"loss_clean", "acc_noise", "loss_adv", "zero_signs"} <= r.keys() for r in steps)
    assert [r["epoch"] for r in records(folder) if "val_top1" in r] == [1, 2, 3, 4, 5]
    assert result == json.loads((folder / "result.json").read_text())
    assert result["image_passes"] == STEPS * (16 + 4 + 4)
    assert 0 < result["last"]["top1"] <= result["best"]["top1"]
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="never overwritten"):
        run(tiny_beton, tmp_path)
    assert (folder / "metrics.jsonl").read_bytes() == before


COSINE = ("budget.milestones=null", "budget.lr_schedule=cosine", "budget.warmup_epochs=1.5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [("method.schedule=fused",), ("method.schedule=pipelined",), COSINE],
    ids=["fused", "pipelined", "cosine"],
)
def test_stopping_anywhere_and_resuming_gives_the_same_weights(
    tiny_beton: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    whole, _ = run(tiny_beton, tmp_path / "whole", *more)
    for stop in sorted(random.sample(range(1, STEPS), 3)):
        run(tiny_beton, tmp_path / "parts", *more, f"run.max_steps={stop}", "resume=auto")
    parts, _ = run(tiny_beton, tmp_path / "parts", *more, "resume=auto")
    assert_same(final_state(whole), final_state(parts))
    losses = [[r["loss_adv"] for r in steps_recorded(folder)] for folder in (whole, parts)]
    assert losses[0] == losses[1]


def test_a_run_that_diverges_stops_and_says_where(tiny_beton: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"non-finite steps in a row.*last good checkpoint"):
        run(tiny_beton, tmp_path, "optim.lr=1e30", "run.max_skipped=4")


def test_what_fails_later_does_not_hide_why_a_run_stopped(
    tiny_beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("cannot be closed")

    monkeypatch.setattr(pipelines.Loader, "close", broken)
    monkeypatch.setattr(SummaryWriter, "close", broken)
    with pytest.raises(NonFinite):
        run(tiny_beton, tmp_path, "optim.lr=1e30", "run.max_skipped=4")
    said = capsys.readouterr().out
    assert "warning: the loader was not closed properly: cannot be closed" in said
    assert "warning: TensorBoard is off from here on: cannot be closed" in said
    _, result = run(tiny_beton, tmp_path / "good", "run.max_steps=2")
    assert result["steps"] == 2


NO_GPU_KERNEL = "run.norm_kernel = 'triton': it needs a GPU; use 'auto' or 'framework'"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train=null", "data.train is not set"),
        ("seed=9999999999999999999", "seed = 9999999999999999999"),
        ("data.train=/nowhere/x.beton", "/nowhere/x.beton"),
        ("model.num_classes=5", "labels 0 to 9"),
        ("optim.clean_batch=512", "fewer than one batch"),
        ("model.name=resnet1000", "neither torchvision nor timm"),
        ("model.name=timm/test_nfnet method.aux=norms", "has no norm that can have an auxiliary"),
        ("model.name=inception_v3", "does not accept images of 32 px"),
        ("run.graph=on", "need a GPU"),
        ("run.norm_kernel=triton", NO_GPU_KERNEL),
        ("model.init=/nowhere.safetensors", "no such file"),
    ],
)
def test_mistakes_are_one_clear_error(
    tiny_beton: Path, tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        run(tiny_beton, tmp_path, *override.split())


def test_a_single_rank_computes_no_checksum_that_nobody_compares(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fap.run.train.checksum_of", None)  # nobody may call it
    _, result = run(tiny_beton, tmp_path, "run.max_steps=1")
    assert result["steps"] == 1


@pytest.mark.slow
def test_a_frozen_run_keeps_its_losses(tiny_beton: Path, tmp_path: Path) -> None:
    """100 losses of a seeded run against the recorded ones.

    2% covers other CPUs and torch versions at step 100.
    """
    file = Path(__file__).parents[1] / "assets" / "frozen_losses.json"
    folder, _ = run(
        tiny_beton,
        tmp_path,
        "budget.epochs=30",
        "optim.lr=0.05",
        "run.eval_every=100",
        "run.torch_threads=1",
    )
    losses = [record["loss_clean"] for record in steps_recorded(folder)][:100]
    if os.environ.get("FREEZE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([round(x, 6) for x in losses]) + "\n")
    frozen = json.loads(file.read_text())
    assert len(frozen) == len(losses) == 100
    assert losses[:10] == pytest.approx(frozen[:10], rel=1e-4)
    assert losses == pytest.approx(frozen, rel=0.02)


CONFIGS = sorted(Path("configs").rglob("*.yaml"))
DETECTORS = [file for file in CONFIGS if file.parent.name == "coco"]
CLASSIFIERS = [file for file in CONFIGS if file not in DETECTORS]


@pytest.mark.slow
@pytest.mark.parametrize("file", CLASSIFIERS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_config_runs_two_steps(
    tiny_beton: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overridden: data, image size, rows of batches and groups, steps. Not the model or method."""
    # Half a gigabyte for a ResNet-152; saved in other tests.
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    side = 32 if "convnext" in file.stem else 16  # which divides its images by 32
    machine = [
        f"data.train={tiny_beton}", f"data.val={tiny_beton}", "data.pipeline=reference",
        "data.threads=1", f"data.size={side}", f"data.resize={side}", "data.sizes=null",
        "optim.clean_batch=32", "method.group_rows=32",
        "run.max_steps=2", f"run.dir={tmp_path}", "run.device=cpu",
    ]  # fmt: skip
    result = Run(load_config(file, machine)).train()
    assert result["steps"] == 2
    assert result["last"]["loss"] == result["last"]["loss"]  # not NaN


@pytest.mark.slow
@pytest.mark.parametrize("file", DETECTORS, ids=lambda f: f.stem)
def test_every_config_of_a_detector_runs_two_steps(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overridden: data, canvas, rows of a batch, steps. Not the model or method."""
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    data = write_boxes(tmp_path / "boxes.beton", 0, tuple(f"class {i}" for i in range(80)))
    machine = [
        f"data.train={data}", f"data.val={data}", "data.pipeline=reference", "data.size=64",
        "optim.clean_batch=8", "run.max_steps=2", f"run.dir={tmp_path}", "run.device=cpu",
    ]  # fmt: skip
    result = Run(load_config(file, machine)).train()
    assert result["steps"] == 2
    assert 0 <= result["last"]["map"] <= 1
