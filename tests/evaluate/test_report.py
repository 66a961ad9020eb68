"""What is printed and written, for checkpoints with numbers made by hand."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fap.evaluate import report
from tests.evaluate.reports import complete, report_of, result


@pytest.mark.slow
def test_several_checkpoints_of_one_report(tmp_path: Path) -> None:
    lacks = complete(0.25)
    del lacks["imagenet_c/snow/4"]
    one = report_of(complete())
    other = report_of(lacks, name="a|b\n# c", step=6)
    text = report.markdown([one, other])
    assert r"| | tiny, seed 0, step 5 | a\|b\n# c, seed 0, step 6 |" in text
    assert "| error, snow (ImageNet-C) | 50.00 |  |" in text
    assert "| error, snow (ImageNet-C), over severities 1, 2, 3, 5 only |  | 75.00 |" in text
    # A plot that must not grow beyond what matplotlib draws.
    report.write_report([one] * 30, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        *("corruptions.png", "groups.json"),
        *("report.csv", "report.json", "report.md", "report.png", "report.tex", "severity.png"),
    ]


def test_the_table_is_the_words_that_readers_know() -> None:
    results = {
        "clean": result(0.5),
        "imagenet_r": result(0.25),
        "computed/fog/3": result(0.125),
        "computed/snow/3": result(0.375),
    }
    found = report_of(results, paper={"top1": 76.5})
    found.labels["imagenet_r"] = "by name (2 of 6 classes)"
    lack = "no gaussian_noise, shot_noise, impulse_noise and"
    few = "fog lacks severities 1, 2, 4, 5"
    fewer = "snow lacks severities 1, 2, 4, 5"
    here = "computed here, not the published files"
    assert report.markdown([replace(found, unused=["x/README"])]) == (
        "- Evaluated: tiny, seed 0, step 5 (cifar_resnet8).\n"
        f"- Images: 50 clean, 50 ImageNet-R, 2 corrupted sets ({here}); clean ones are x.\n"
        "- Cost of training: 1,920 image passes in 5 steps.\n"
        "\n"
        "50 images of x, main BN; percent.\n"
        "\n"
        "| | tiny, seed 0, step 5 |\n"
        "|---|--:|\n"
        "| top-1 accuracy | 50.00 (paper 76.5) |\n"
        "| ImageNet-R top-1 | 25.00 |\n"
        "| top-5 accuracy | 100.00 |\n"
        "| loss | 1.00 |\n"
        "| calibration error (ECE) | 10.00 |\n"
        "| image passes | 1,920 |\n"
        "| optimiser steps | 5 |\n"
        "| epochs | 1 |\n"
        "| seconds of the run, by its own clock | 100 |\n"
        f"| error, all 2 sets ({here}) | 75.00 |\n"
        f"| error above clean, all 2 sets ({here}) | 25.00 |\n"
        f"| calibration error (ECE), all 2 sets ({here}) | 10.00 |\n"
        f"| error, fog ({here}), over severity 3 only | 87.50 |\n"
        f"| error, snow ({here}), over severity 3 only | 62.50 |\n"
        "\n"
        "- labels of clean, computed: by name\n"
        "- labels of imagenet_r: by name (2 of 6 classes)\n"
        f"- 15 corruptions ({here}): not computed: {lack} 10 more; {fewer}; {few}\n"
        f"- 19 corruptions ({here}): not computed: {lack} 14 more; {fewer}; {few}\n"
        f"- mCE, AlexNet = 100 ({here}): not computed: {lack} 10 more; {fewer}; {few}\n"
        f"- relative mCE, AlexNet = 100 ({here}): not computed: {lack} 10 more; {fewer}; {few}\n"
        "- not used: x/README\n"
        "- tiny, seed 0, step 5: from the middle of its run, which was set to 348 steps; "
        "its cost is that up to the checkpoint\n"
    )


def test_the_json_holds_results_summary_and_notes(tmp_path: Path) -> None:
    report.write_report([report_of({"clean": result()})], tmp_path)
    (tree,) = json.loads((tmp_path / "report.json").read_text())
    assert [*tree] == [
        "checkpoint",
        "name",
        "seed",
        "step",
        "paper",
        "small",
        "settings",
        "labels",
        "unused",
        "results",
        "weights",
        "content",
        "training",
        "group",
        "summary",
        "notes",
    ]
    assert tree["results"] == {"clean": result()}
    assert tree["summary"].items() >= {"top-1 accuracy": 50, "top-5 accuracy": 100}.items()
    assert tree["training"]["image_passes"] == tree["summary"]["image passes"] == 1920
    assert tree["notes"] == ["labels of all sets: by name"]
