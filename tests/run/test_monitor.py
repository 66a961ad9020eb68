"""What a run watches: steps that were not finite, and adversarial rows that are too easy."""

from __future__ import annotations

from pathlib import Path

import pytest

from fap.config import load_config
from fap.distributed import Ranks
from fap.run import train
from fap.run.monitor import NonFinite, check_finite, leak, skipped_steps
from fap.step.metrics import METRICS, Metrics
from tests.run.runs import records, run
from tests.run.wiring import observe, written


def metrics(**changed: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, 0.0) | {"steps": 50.0} | changed


def test_skipped_steps_are_told() -> None:
    assert skipped_steps(metrics(), 100) == ""
    said = "step 100: 3 of the last 50 steps were not finite and were skipped"
    assert skipped_steps(metrics(skipped=3.0), 100) == said


def test_the_rows_that_were_not_finite_are_named() -> None:
    check_finite(metrics(skipped=4.0, skipped_in_a_row=4.0), 100, 5, "nothing is saved")
    bad = metrics(skipped=5.0, skipped_in_a_row=5.0, nonfinite_clean=2.0, nonfinite_adv=1.0)
    says = r"5 non-finite steps in a row up to step 100 \(loss of the clean, adv rows; .*; saved 7$"
    with pytest.raises(NonFinite, match=says):
        check_finite(bad, 100, 5, "saved 7")
    with pytest.raises(NonFinite, match="loss of the no rows; else gradients only"):
        check_finite(metrics(skipped_in_a_row=5.0), 100, 5, "")


def counted(clean: float, n_clean: int, adv: float, n_adv: int) -> dict[str, float]:
    """Metrics of an epoch with these accuracies."""
    return metrics(
        rows_clean=n_clean, correct_clean=clean * n_clean, rows_adv=n_adv, correct_adv=adv * n_adv
    )


def leaks(clean: float, n_clean: int, adv: float, n_adv: int, *words: str) -> str:
    config = load_config(None, words)
    return leak(counted(clean, n_clean, adv, n_adv), config, 3, statistics=True)


def test_a_leak_is_a_higher_accuracy_of_adversarial_rows() -> None:
    assert leaks(0.5, 800, 0.5, 200) == ""
    assert leaks(0.75, 800, 0.5, 200) == ""
    assert leaks(0.5, 800, 0, 0) == ""  # vanilla training
    assert leaks(0, 0, 0, 0) == ""  # an epoch that was resumed at its end
    warning = leaks(0.5, 800, 0.75, 200)
    assert warning.startswith("warning: epoch 3: training accuracy of adversarial rows (75.0%)")


def test_what_chance_explains_is_no_leak() -> None:
    """One row of eight, in epochs of a few steps; of two accuracies of 1,000 rows two percent."""
    assert leaks(7 / 64, 64, 1 / 8, 8) == ""
    assert leaks(0.5, 1_000, 0.52, 1_000) == ""
    assert leaks(0.5, 1_000, 0.56, 1_000)
    assert leaks(0.5, 100_000, 0.52, 100_000)
    assert leaks(1.0, 64, 1.0, 16) == ""


def test_clean_rows_that_alone_are_augmented_are_harder() -> None:
    augment = ("data.augment=trivialaugment",)
    assert leaks(0.5, 800, 0.75, 200, *augment, "data.augment_on=clean") == ""
    assert leaks(0.5, 800, 0.75, 200, *augment)


def leaking(progress: train.Progress, _: object) -> None:
    progress.totals = counted(0.5, 800, 0.9, 200)


def test_the_leak_is_reported(
    tiny_beton: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train.Progress, "add", leaking)
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=4")
    assert "leak labels" in capsys.readouterr().out
    assert any("leak" in record for record in records(folder))


def test_without_statistics_of_groups_nothing_leaks(
    tiny_beton: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train.Progress, "add", leaking)
    run(tiny_beton, tmp_path, "run.max_steps=4", "model.name=timm/test_vit", "data.size=32")
    assert "leak labels" not in capsys.readouterr().out


@pytest.mark.parametrize("mix", [None, "mixup", "cutmix"])
@pytest.mark.parametrize("leaks", [True, False])
def test_the_leak_monitor_does_not_judge_mixed_rows(
    mix: str | None,
    leaks: bool,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mixed clean rows are scored on one of two labels: adversarial rows above are no alarm."""
    take = Metrics.take
    adv_share = 0.0
    if leaks:
        adv_share = 1.0

    def made_up(step_metrics: Metrics, ranks: Ranks) -> dict[str, float]:
        taken = take(step_metrics, ranks)
        taken["correct_clean"] = 0.5 * taken["rows_clean"]
        taken["correct_adv"] = adv_share * taken["rows_adv"]
        return taken

    monkeypatch.setattr(Metrics, "take", made_up)
    seen = observe([f"data.mix={written(mix)}", "run.max_steps=2"], files, tmp_path / "runs")
    assert seen.error == ""
    closed = [record for record in seen.records if "epoch_acc_adv" in record]
    assert [record["epoch_acc_adv"] > record["epoch_acc_clean"] for record in closed] == [leaks]
    warned = leaks and mix is None
    assert ("leak labels" in seen.said) == warned
    if warned:
        assert [record["leak"] for record in closed] == [1.0]
    else:
        assert all("leak" not in record for record in closed)
