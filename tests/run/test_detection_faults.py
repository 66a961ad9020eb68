"""Mistakes in a run of detection: each is one clear error before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fap.cli import train as train_cli
from pipelines.sources.sidecar import sidecar_path
from tests.run.detections import DETECTION
from tests.run.wiring import BASE

FAULTS = {
    "recycled": (
        ("method.attack_loss=cls",),
        "method.attack_loss = 'cls' has no meaning for method.name = 'fast_advprop'; leave it out",
    ),
    "single class": (
        ("data.train={single}", "data.val={single}", "method.name=decoupled"),
        "method.targeted = true with model.num_classes = 1: there is no wrong class to aim at",
    ),
    "groups of one": (
        ("method.group_rows=2",),
        "method.p_adv = 1/3 gives 1.000 adversarial rows per 2 clean ones",
    ),
    "class weights": (
        ("optim.class_weights=balanced",),
        "optim.class_weights = 'balanced': an image has boxes of several classes",
    ),
    "label smoothing": (("optim.label_smoothing=0.1",), "optim.label_smoothing = 0.1: the focal"),
    "odd sides": (("data.size=[64,65]",), "data.size = [64, 65]: both sides must be multiples"),
    "square crop": (
        ("data.crop=pad", "data.resize=64"),
        "data.crop = 'pad' with task = 'detection': must be 'letterbox'",
    ),
    "classifier": (("model.name=resnet18",), "model.name = 'resnet18': no detector"),
    "no boxes": (("data.train={classes}",), "holds no boxes: fap-convert writes them"),
    "no boxes in val": (("data.val={classes}",), "data.val = {classes} holds no boxes"),
    "crowds": (("data.train={crowds}",), "data.train = {crowds} holds no boxes, or crowd boxes"),
    "crowds in val": (("data.val={crowds}",), "data.val = {crowds} holds no boxes, or crowd boxes"),
    "classification": (
        (
            "task=classification", "model.name=cifar_resnet8", "data.crop=pad", "data.size=8",
            "data.train={data}",
        ),
        "data.train = {data} holds boxes and no class labels: write task=detection",
    ),
    "other classes": (
        ("data.val={strange}",),
        "data.val = {strange} does not fit data.train = {data}: 1 of the 3 classes are none of the "
        "model's 3 classes, the first being 'wheel'",
    ),
    "too many classes": (
        ("model.num_classes=4",),
        "model.num_classes = 4, but data.train = {data} names 3 classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(
    name: str,
    boxes: dict[str, Path],
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, says = FAULTS[name]
    known = boxes | {"classes": files["data"], "runs": tmp_path / "runs"}
    argv = [word.format(**known) for word in (*BASE, *DETECTION, *words)]
    with pytest.raises(SystemExit) as ended:
        train_cli.main(argv)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fap-train: ")
    assert says.format(**known) in line
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "lost box"])
def test_a_damaged_sidecar_is_refused(
    boxes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    data = tmp_path / "data.beton"
    data.write_bytes(boxes["data"].read_bytes())
    sidecar = sidecar_path(boxes["data"])
    text = sidecar.read_text()
    match damage:
        case "flip":
            at = text.index('"boxes":') + 30
            text = text[:at] + ("B" if text[at] != "B" else "C") + text[at + 1 :]
        case "cut":
            text = text[: len(text) // 2]
        case _:
            content = json.loads(text)
            content["annotations"]["crowd"] = ""
            text = json.dumps(content)
    (tmp_path / sidecar.name).write_text(text)
    argv = [word.format(data=data, runs=tmp_path / "runs") for word in (*BASE, *DETECTION)]
    with pytest.raises(SystemExit) as ended:
        train_cli.main(argv)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / sidecar.name) in line or str(data) in line
    assert not (tmp_path / "runs").exists()
