"""`fap-eval RUN` evaluates what the run validated on, if it is there and the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fap.cli import eval as cli
from fap.evaluate import report
from tests.conftest import noise_beton
from tests.evaluate.world import no_plot
from tests.run.runs import records, run

PART = ("data.val=null", "data.val_share=0.25", "budget.epochs=2", "budget.milestones=[1]")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data, and the folders of a run with a part held out and of one with data.val."""
    at = tmp_path_factory.mktemp("validated")
    data = noise_beton(at / "train.beton", seed=1, count=96)
    own = noise_beton(at / "val.beton", seed=2, count=40)
    held, _ = run(data, at / "held", *PART)
    given, _ = run(data, at / "given", f"data.val={own}", *PART[2:])
    return {"at": at, "data": data, "own": own, "held": held, "given": given}


def evaluated(out: Path, *words: str | Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_plot", no_plot)
        patch.setattr(report, "_confusion_plot", no_plot)
        fixed = ["--device", "cpu", "--pipeline", "reference", "--out", str(out)]
        assert cli.main([*map(str, words), *fixed]) == 0
    return json.loads((out / "report.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert cli.main([*map(str, words), "--device", "cpu"]) == 1
    return capsys.readouterr().err


def last(folder: Path) -> dict[str, Any]:
    return [record for record in records(folder) if "val_top1" in record][-1]


@pytest.mark.parametrize(("name", "count"), [("held", 26), ("given", 40)])
def test_without_data_a_runs_own_are_evaluated(
    trained: dict[str, Path], tmp_path: Path, name: str, count: int
) -> None:
    (found,) = evaluated(tmp_path / "out", trained[name])
    clean = found["results"]["clean"]
    assert clean["count"] == count
    assert clean["top1"] == last(trained[name])["val_top1"]
    part = ", the part held out of training" if name == "held" else ""
    assert found["settings"]["data"].endswith(f".beton{part}")
    assert part in (tmp_path / "out" / "report.md").read_text()


def test_the_part_can_be_named(trained: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = trained["held"] / "checkpoints" / "best.safetensors"
    words = ["--data", trained["data"], "--val-share", "0.25"]
    (found,) = evaluated(tmp_path / "out", checkpoint, *words)
    assert found["results"]["clean"]["count"] == 26
    (whole,) = evaluated(tmp_path / "whole", checkpoint, *words[:2])
    assert whole["results"]["clean"]["count"] == 96


def test_what_is_gone_or_another_is_refused(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, given = trained["held"], trained["given"]
    said = refused(capsys, held / "checkpoints" / "best.safetensors")
    assert "only a run's folder" in said
    assert "validated on other images (40) than there are in" in refused(capsys, held, given)
    moved = shutil.copytree(held, tmp_path / "moved")
    config = (moved / "config.yaml").read_text()
    other = noise_beton(tmp_path / "other.beton", seed=3, count=96)
    (moved / "config.yaml").write_text(config.replace(str(trained["data"]), str(other)))
    assert "validated on other images (26)" in refused(capsys, moved)
    (moved / "config.yaml").write_text(config.replace("train.beton", "nowhere.beton"))
    assert "give --data (" in refused(capsys, moved)
    for share in ("0", "0.5", "nan"):
        said = refused(capsys, held, "--data", trained["data"], "--val-share", share)
        assert f"--val-share {share}: must be above 0" in said
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(held), "--val-share", "0.2"])
