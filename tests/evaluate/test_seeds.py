"""Two ways of training, two seeds of each, through the command."""

import json
from pathlib import Path

import pytest

from fap import checkpoint
from fap.cli import eval as cli
from fap.config import Config, make_config
from fap.evaluate import report
from tests.evaluate.world import CHECKPOINT, WNIDS, no_plot, tiny_config, write_checkpoint
from tests.hostile_meta import valid_meta

WORDS = ("--corrupt", "gaussian_noise", "--severity", "5")


def config(method: str, seed: int) -> Config:
    tree = tiny_config().model_dump()
    tree |= {"name": method, "seed": seed, "method": {"name": method}}
    tree["optim"]["clean_batch"] = 32
    tree["method"]["group_rows"] = 32
    return make_config(tree)


def write_run(folder: Path, method: str, seed: int) -> Path:
    """A run's folder with one checkpoint, as its seed's random weights have it."""
    (folder / "checkpoints").mkdir(parents=True)
    file = folder / "checkpoints" / CHECKPOINT
    write_checkpoint(file, WNIDS, seed=10 * seed + len(method))
    tensors, _ = checkpoint.load(file)
    checkpoint.save(file, tensors, valid_meta(config(method, seed), WNIDS))
    return folder


def test_a_journey_of_two_groups(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [
        write_run(tmp_path / method / f"seed{seed}", method, seed)
        for method in ("vanilla", "advprop")
        for seed in (0, 1)
    ]
    monkeypatch.setattr(report, "_plot", no_plot)
    monkeypatch.setattr(report, "_confusion_plot", no_plot)
    out = tmp_path / "out"
    fixed = ["--data", str(world / "val"), "--device", "cpu", "--batch", "8", "--out", str(out)]
    assert cli.main([*map(str, folders), *fixed, *WORDS]) == 0

    trees = json.loads((out / "report.json").read_text())
    assert [(tree["name"], tree["seed"], tree["group"]) for tree in trees] == [
        *(("vanilla", 0, 1), ("vanilla", 1, 1), ("advprop", 0, 2), ("advprop", 1, 2))
    ]
    page = (out / "report.md").read_text()
    assert page.startswith("- Compared: vanilla, 2 seeds (0, 1), step 5 (cifar_resnet8); advprop,")
    assert "## Differences" in page and "## Every seed" in page
    top1s = [100 * tree["results"]["clean"]["top1"] for tree in trees]
    mean = (top1s[0] + top1s[1]) / 2
    std = abs(top1s[0] - top1s[1]) / 2**0.5
    assert f"| top-1 accuracy | {mean:.2f} ± {std:.2f} |" in page.replace(" (paper 76.5)", "")
    # 40 images: a batch of 32 in each of 5 steps, which AdvProp's attack and copies see 7 times.
    assert "| image passes | 160 | 1,120 |" in page

    base, other = json.loads((out / "groups.json").read_text())
    assert base["seeds"] == other["seeds"] == [0, 1]
    gap = other["minus_first_group"]["top-1 accuracy"]
    assert gap["mean"] == pytest.approx((top1s[2] + top1s[3] - top1s[0] - top1s[1]) / 2)
    n_lines = len((out / "report.csv").read_text().splitlines())
    n_metrics = sum(len(r) - 1 for tree in trees for r in tree["results"].values())
    assert n_lines == 1 + n_metrics
    assert (out / "report.tex").read_text().count(r"\begin{tabular}") == 2
