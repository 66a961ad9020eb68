"""What is measured of finished runs: `fap-eval`'s report, and what the runs themselves wrote.

A library of `bench.evidence`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.commands import fap
from bench.demo_common import cpu_seconds, last_epoch
from bench.evidence.arms import THROUGH_BOTH
from bench.evidence.runs import Runs
from bench.evidence.studies import Run, Study

Row = dict[str, Any]
"""One run. Its `numbers`, by name, are percentages: `clean`, on all test images; `train/KIND`, of
the last epoch's rows; and of the images that are corrupted and attacked, through the norms
`main` or `aux`, NORMS/clean, /ece, /corrupted, /CORRUPTION and /ATTACK/EPS."""

KINDS = ("clean", "noise", "adv")  # of training rows
ATTACK = "pgd10"
EPS_255 = (1, 2, 4)


@dataclass(frozen=True)
class Measure:
    """How the runs of a study are measured; what was measured before is not measured again."""

    runs: Runs
    study: Study
    test: Path  # the images that are corrupted and attacked
    out: Path

    def rows(self, runs: Sequence[Run]) -> list[Row]:
        """Of finished runs, in their order."""
        words = ["--corrupt", *self.study.corrupt, "--keep", str(self.out / "corrupted")]
        eps = [str(radius) for radius in EPS_255]
        words += ["--attack", ATTACK, "--eps", *eps]
        words += ["--attack-images", str(self.study.attacked)]
        both = [run for run in runs if run.arm in THROUGH_BOTH]
        main = [run for run in runs if run.arm not in THROUGH_BOTH]
        reports = self._evaluated(both, ["--bn", "both", *words], self.out / "both")
        reports += self._evaluated(main, ["--bn", "main", *words], self.out / "main")

        strongly = [run for run in runs if self.study.is_strongly_attacked(run)]
        words = ["--bn", "both", "--attack", "autoattack", "--eps", *eps]
        words += ["--attack-images", str(self.study.strongly_attacked)]
        reports += self._evaluated(strongly, words, self.out / "autoattack")
        return [self._row(run, reports) for run in runs]

    def _evaluated(
        self, runs: Sequence[Run], words: Sequence[str], out: Path
    ) -> list[dict[str, Any]]:
        """fap-eval's reports: one for each run and each of its sets of norms."""
        if not runs:
            return []
        checkpoints = [str(self.runs.checkpoint(run)) for run in runs]
        what = ["--data", str(self.test), *words, "--out", str(out)]
        fap("eval", *checkpoints, *what, log=out / "fap-eval.log")
        return json.loads((out / "report.json").read_text())

    def _row(self, run: Run, reports: Sequence[dict[str, Any]]) -> Row:
        row = self._written(run)
        for report in reports:
            if report["checkpoint"] == str(self.runs.checkpoint(run)):
                norms = report["settings"]["bn"]
                for name, number in percentages(report["results"]).items():
                    row["numbers"][f"{norms}/{name}"] = number
        return row

    def _written(self, run: Run) -> Row:
        """What a run wrote: what it did, and how it ended."""
        folder = self.runs.folder_of(run)
        results = self.runs.results(run)
        result = results[-1]
        numbers = {"clean": 100 * result["last"]["top1"]}
        last = last_epoch(folder)
        for kind in KINDS:
            if f"epoch_acc_{kind}" in last:
                numbers[f"train/{kind}"] = 100 * last[f"epoch_acc_{kind}"]
        if "epoch_zero_signs" in last:
            numbers["zero_signs"] = 100 * last["epoch_zero_signs"]
        return {
            "run": run.name,
            "regime": run.regime.name,
            "arm": run.arm,
            "seed": run.seed,
            "steps": sum(stage["steps"] for stage in results),
            "epochs": sum(stage["epochs"] for stage in results),
            "image_passes": sum(stage["image_passes"] for stage in results),
            "cpu_seconds": cpu_seconds(folder),
            "commit": result["versions"]["commit"],
            "numbers": numbers,
        }


def percentages(results: dict[str, Any]) -> dict[str, float]:
    """Of fap-eval's results through one set of norms; a corruption's is its severities' mean."""
    ece = results["clean"]["ece"]  # None of a model that diverged: JSON has no NaN
    found = {"clean": 100 * results["clean"]["top1"], "ece": math.nan if ece is None else 100 * ece}
    corruptions: dict[str, list[float]] = {}
    for key, result in results.items():
        accuracy = 100 * result["top1"]
        match key.split("/"):
            case ["computed", name, _severity]:
                corruptions.setdefault(name, []).append(accuracy)
            case ["attack", method, eps]:
                found[f"{method}/{eps}"] = accuracy
    if corruptions:
        found |= {name: fmean(severities) for name, severities in corruptions.items()}
        found["corrupted"] = fmean(found[name] for name in corruptions)
    return found
