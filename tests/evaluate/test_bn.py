"""`--bn`: through the main norms, the auxiliary ones, or in fap-eval both side by side."""

import csv
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from fap import checkpoint
from fap.cli import eval as cli
from fap.cli.export import main as export
from fap.cli.predict import main as predict
from fap.evaluate.load import load_model
from fap.nets.build import build
from fap.nets.dual import evaluate_with
from fap.nets.norm import Bn
from tests.evaluate.world import CHECKPOINT, WNIDS, counted, refused, run, tiny_config
from tests.hostile_meta import valid_meta

DUAL = "dual.safetensors"
PLAIN = "plain.safetensors"


@pytest.fixture(scope="module")
def at(world: Path) -> Path:
    """Beside the world's checkpoint one whose norms differ, and one without auxiliary norms."""
    for name, aux in ((DUAL, True), (PLAIN, False)):
        torch.manual_seed(2)
        model = build("cifar_resnet8", 6, aux=aux, size=32)
        state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        for key, tensor in state.items():
            if key.endswith("aux.weight"):
                tensor.uniform_(0.5, 2)
        checkpoint.save(world / name, state, valid_meta(tiny_config(), WNIDS))
    return world


def both(at: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[list[Any], str]:
    """The reports of several checkpoints through both norms, and the table."""
    words = ["--data", str(at / "val"), "--device", "cpu", "--batch", "4", "--bn", "both"]
    assert cli.main([*(str(at / name) for name in names), *words, "--out", str(at / "both")]) == 0
    text = (at / "both" / "report.md").read_text()
    return json.loads((at / "both" / "report.json").read_text()), text


def test_both_are_columns_of_their_own(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, _ = run(at, model=DUAL, out="main")
    aux, text = run(at, "--bn", "aux", model=DUAL, out="aux")
    assert "aux BN; percent." in text
    plain, _ = run(at, model=PLAIN, out="plain")
    found, text = both(at, monkeypatch, DUAL, PLAIN)
    assert [one["results"] for one in found] == [one["results"] for one in (main, aux, plain)]
    assert [one["settings"]["bn"] for one in found] == ["main", "aux", "main"]
    assert main["results"]["clean"]["loss"] != aux["results"]["clean"]["loss"]
    assert "main and aux BN; percent." in text
    column = "tiny, seed 0, step 5"
    heads = [f"{column}, main BN [1]", f"{column}, aux BN", f"{column}, main BN [2]"]
    assert f"| | {' | '.join(heads)} |" in text
    assert "- aux BN: through the auxiliary norms" in text


def test_each_is_found_again(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(at / "both", ignore_errors=True)
    calls = counted(monkeypatch)
    both(at, monkeypatch, CHECKPOINT)
    assert [call["bn"] for call in calls] == ["main", "aux"]
    both(at, monkeypatch, CHECKPOINT)
    assert len(calls) == 2


def test_predictions_come_through_the_norms_asked_for(at: Path) -> None:
    trained = load_model(at / DUAL)
    mean = torch.tensor(trained.config.data.mean).view(3, 1, 1) * 255
    std = torch.tensor(trained.config.data.std).view(3, 1, 1) * 255
    with closing(pipelines.open_store(at / "val")) as store:
        plan = pipelines.eval_plan(store.heights, store.widths, size=32, resize=36, batch=18)
        (batch,) = pipelines.open_loader("reference", store, size=32).load(plan)
    found = {}
    norms: tuple[Bn, ...] = ("main", "aux")
    for bn in norms:
        out = at / f"{bn}.csv"
        words = [str(at / DUAL), str(at / "val"), "--out", str(out), "--bn", bn]
        assert predict([*words, "--device", "cpu", "--pipeline", "reference"]) == 0
        lines = [*csv.DictReader(out.read_text().splitlines())]
        found[bn] = [float(line["probability"]) for line in lines]
        with torch.no_grad(), evaluate_with(trained.model, bn):
            expected = trained.model((batch.images - mean) / std).softmax(1).amax(1)
        assert found[bn] == pytest.approx(expected.tolist(), abs=2e-6)
    assert found["main"] != pytest.approx(found["aux"], abs=1e-3)


def test_a_model_of_main_norms_has_no_others(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, at, "--bn", "aux", model=PLAIN, out="none")
    assert "was trained without auxiliary norms" in line
    out = at / "none.csv"
    for command, words in (
        (predict, [str(at / PLAIN), str(at / "val"), "--out", str(out)]),
        (export, [str(at / PLAIN), str(at / "none.pth")]),
    ):
        assert command([*words, "--bn", "aux"]) == 1
        assert "was trained without auxiliary norms" in capsys.readouterr().err
    assert not out.exists()
    assert not (at / "none.pth").exists()
