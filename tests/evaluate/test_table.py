"""Means appear where every part of them was measured, and the notes say what they lack."""

from statistics import fmean

import numpy as np
import pytest

from fap.evaluate.corrupted import lacking
from fap.evaluate.published import SEVERITIES
from fap.evaluate.table import table_of
from fap.tasks.base import CorruptionMean, Result
from fap.tasks.classification import Classification
from fap.tasks.mce import ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS, EXTRA
from pipelines.corrupt import NAMES
from tests.evaluate.reports import complete, report_of, result
from tests.evaluate.world import tiny_config


def errors(by_name: dict[str, dict[int, float]]) -> dict[str, Result]:
    """ImageNet-C's results for errors by corruption and severity."""
    return {"clean": result()} | {
        f"imagenet_c/{name}/{severity}": result(1 - error)
        for name, by in by_name.items()
        for severity, error in by.items()
    }


def means(by_name: dict[str, dict[int, float]]) -> dict[str, float]:
    """The rows of the means, without what they have in common."""
    rows = table_of(report_of(errors(by_name))).rows
    kept = {}
    for title, number in rows.items():
        if "relative" in title:
            continue
        if title.startswith("error, ") and ("corruptions" in title or "mCE" in title):
            kept[title.removeprefix("error, ").removesuffix(" (ImageNet-C)")] = number.ours
    return kept


def test_summaries_appear_when_they_are_complete() -> None:
    by_name = {name: dict.fromkeys(SEVERITIES, 0.5) for name in ALEXNET_ERRORS}
    by_name["fog"] = {severity: severity / 10 for severity in SEVERITIES}
    fifteen = means(by_name)
    assert fifteen.keys() == {"15 corruptions", "mCE, AlexNet = 100"}
    assert fifteen["15 corruptions"] == pytest.approx((14 * 50 + 30) / 15)
    relative = [0.5 / e for name, e in ALEXNET_ERRORS.items() if name != "fog"]
    expected = 100 * fmean([*relative, 0.3 / ALEXNET_ERRORS["fog"]])
    assert fifteen["mCE, AlexNet = 100"] == pytest.approx(expected)

    full = means(by_name | {name: dict.fromkeys(SEVERITIES, 1.0) for name in EXTRA})
    assert full.keys() == {"15 corruptions", "19 corruptions", "mCE, AlexNet = 100"}
    assert full["19 corruptions"] == pytest.approx((14 * 50 + 30 + 4 * 100) / 19)
    assert full["15 corruptions"] == fifteen["15 corruptions"]
    assert full["mCE, AlexNet = 100"] == fifteen["mCE, AlexNet = 100"]

    some = by_name | {"fog": {3: 0.1}}
    assert means(some) == {}
    every = table_of(report_of(errors(some))).rows["error, all 71 sets (ImageNet-C)"]
    assert every.ours == pytest.approx((70 * 50 + 10) / 71)


def test_what_a_mean_lacks_is_said() -> None:
    fifteen = list(ALEXNET_ERRORS)
    full = {name: dict.fromkeys(SEVERITIES, 0.5) for name in ALEXNET_ERRORS}
    assert lacking(full, fifteen) == ""
    without_one = full | {"snow": dict.fromkeys((1, 2, 3, 5), 0.5)}
    assert lacking(without_one, fifteen) == "snow lacks severity 4"
    without_some = full | {"fog": {1: 0.5, 3: 0.5}}
    assert lacking(without_some, fifteen) == "fog lacks severities 2, 4, 5"
    without = {name: by for name, by in full.items() if name not in ("snow", "fog")}
    assert lacking(without, fifteen) == "no snow, fog"
    assert lacking({}, fifteen) == "no gaussian_noise, shot_noise, impulse_noise and 12 more"
    assert lacking(full, EXTRA) == "no speckle_noise, gaussian_blur, spatter and 1 more"
    some = {name: {3: 0.5} for name in ALEXNET_ERRORS}
    said = lacking(some, fifteen)
    assert said.endswith("; 12 more lack some")
    assert len(said) < 250


def test_mce_needs_every_severity_of_as_many_images() -> None:
    table = table_of(report_of(complete()))
    assert table.rows["error, 15 corruptions (ImageNet-C)"].ours == 50
    assert table.rows["error, 19 corruptions (ImageNet-C)"].ours == 50
    assert "error, mCE, AlexNet = 100 (ImageNet-C)" in table.rows
    assert table.notes == ["labels of all sets: by name"]

    lacks = complete()
    del lacks["imagenet_c/snow/4"]
    table = table_of(report_of(lacks))
    assert not any("corruptions" in row or "mCE" in row for row in table.rows)
    assert "mCE, AlexNet = 100 (ImageNet-C): not computed: snow lacks severity 4" in table.notes
    lacks = complete()
    del lacks["imagenet_c/saturate/1"]  # one of the extra four
    table = table_of(report_of(lacks))
    assert "error, mCE, AlexNet = 100 (ImageNet-C)" in table.rows
    assert "error, 19 corruptions (ImageNet-C)" not in table.rows
    assert "19 corruptions (ImageNet-C): not computed: saturate lacks severity 1" in table.notes

    short = complete()
    short["imagenet_c/fog/3"] = result(count=10)
    table = table_of(report_of(short))
    assert not any("corruptions" in row or "mCE" in row for row in table.rows)
    why = "fog at severity 3 has 10 images, but most sets have 50"
    assert f"mCE, AlexNet = 100 (ImageNet-C): not computed: {why}" in table.notes


@pytest.mark.parametrize(("benchmark", "small", "told"), [
    ("imagenet_c", False, True),
    ("imagenet_c", True, False),  # copies of small images, as fap-corrupt makes them
    ("computed", False, True),
    ("computed", True, False),
    ("cifar10_c", False, False),
])  # fmt: skip
def test_mce_is_told_of_imagenets_images_only(benchmark: str, small: bool, told: bool) -> None:
    results = {key.replace("imagenet_c", benchmark): one for key, one in complete().items()}
    table = table_of(report_of(results, small=small))
    assert any("mCE" in row for row in table.rows) == told
    assert any("AlexNet's errors are those of ImageNet-C" in note for note in table.notes) != told
    assert any("19 corruptions" in row for row in table.rows)


def test_the_papers_numbers_stand_beside_ours() -> None:
    paper = {"top1": 76.5, "imagenet_c": 56.4, "imagenet_r": 38.2, "stylized": 8.3}
    results = complete() | {"imagenet_r": result(0.25), "stylized": result(0.125)}
    rows = table_of(report_of(results, paper=paper)).rows
    assert [*rows][:11] == [
        "top-1 accuracy",
        "ImageNet-R top-1",
        "Stylized-ImageNet top-1",
        "top-5 accuracy",
        "loss",
        "calibration error (ECE)",
        "image passes",
        "optimiser steps",
        "epochs",
        "seconds of the run, by its own clock",
        "error, all 95 sets (ImageNet-C)",
    ]
    assert {title: number[:2] for title, number in rows.items() if number.paper is not None} == {
        "top-1 accuracy": (50, 76.5),
        "ImageNet-R top-1": (25, 38.2),
        "Stylized-ImageNet top-1": (12.5, 8.3),
        "error, 19 corruptions (ImageNet-C)": (50, 56.4),
    }
    of_cifar = {key.replace("imagenet_c", "cifar10_c"): one for key, one in complete().items()}
    rows = table_of(report_of(of_cifar, paper=paper)).rows
    assert rows["error, 19 corruptions (CIFAR-10-C)"][:2] == (50, None)


def relative(scores: dict[str, float], clean: float) -> float:
    return 100 * fmean(scores.values()) / clean


def plain(scores: dict[str, float], clean: float) -> float:
    return 100 * fmean(scores.values())


class Detection(Classification):
    """Another primary metric, for which more is better under corruptions too."""

    primary = "map"
    percents = {"map": "mAP", "ap50": "AP50"}  # noqa: RUF012
    rows = {"map": "box mAP", "ap50": "box AP50"}  # noqa: RUF012
    measure = "mAP"
    measure_better = "more"
    means = (
        CorruptionMean("15 corruptions: mPC", tuple(ALEXNET_ERRORS), plain),
        CorruptionMean("relative to clean images: rPC", tuple(ALEXNET_ERRORS), relative),
    )

    def measured(self, result: Result) -> float:
        return result["map"]


def test_another_tasks_metrics_need_no_change_here() -> None:
    rng = np.random.default_rng()
    results = {"clean": {"map": 0.4, "ap50": 0.6, "count": 50}}
    for name in NAMES:
        for severity in SEVERITIES:
            results[f"computed/{name}/{severity}"] = {
                "map": rng.uniform(0, 0.4),
                "ap50": 0.5,
                "count": 50,
            }
    table = table_of(report_of(results, task=Detection(tiny_config()), trained=False))
    scores = [
        results[f"computed/{name}/{severity}"]["map"]
        for name in ALEXNET_ERRORS
        for severity in SEVERITIES
    ]
    words = "(computed here, not the published files)"
    assert [*table.rows][:3] == ["box mAP", "box AP50", f"mAP, all 95 sets {words}"]
    assert table.rows["box mAP"][:2] == (40, None)
    mpc = table.rows[f"mAP, 15 corruptions: mPC {words}"].ours
    assert mpc == pytest.approx(100 * np.mean(scores))
    rpc = table.rows[f"mAP, relative to clean images: rPC {words}"].ours
    assert rpc == pytest.approx(mpc / 0.4)
    assert not any("top-1" in row or "error" in row for row in table.rows)


def test_errors_relative_to_clean_images() -> None:
    """A model that is only more accurate has as much error above clean as before."""
    by_name = {name: dict.fromkeys(SEVERITIES, 0.75) for name in ALEXNET_ERRORS}
    rows = table_of(report_of(errors(by_name))).rows  # half of the clean images are right
    assert rows["error above clean, all 75 sets (ImageNet-C)"].ours == pytest.approx(25)
    above = [0.25 / (error - ALEXNET_CLEAN_ERROR) for error in ALEXNET_ERRORS.values()]
    relative = "error, relative mCE, AlexNet = 100 (ImageNet-C)"
    assert rows[relative].ours == pytest.approx(100 * fmean(above))
    other = errors(by_name)
    other["clean"] = result(count=51)
    table = table_of(report_of(other))
    assert not any("relative" in row or "above clean" in row for row in table.rows)
    why = "clean images are 51, those of the sets 50"
    assert f"relative mCE, AlexNet = 100 (ImageNet-C): not computed: {why}" in table.notes


def test_every_key_has_a_row() -> None:
    """Those that are known by their titles, others by their own names."""
    results = {
        "clean": {**result(), "ece": 0.125},
        "imagenet_a": result(0.25),
        "imagenet_a_1000way": result(0.125),
        "imagenet_sketch": result(0.25),
        "imagenet_v2": result(0.25),
        "objectnet": result(0.25),
        "cue_conflict": {"shape_bias": 0.25, "top1": 0.5, "sharpness": 7.0, "count": 9},
        "folder/mine": result(0.25),
        "folder/a/b": result(0.25),
        "never_heard_of": result(0.75),
        "attack/pgd10/0.5": result(0.25, count=7),
        "attack/fgsm/4": result(0.25, count=7),
        "attack/autoattack/4": result(0.25, count=7),
        "cifar100_c/fog/1": {**result(0.25), "ece": 0.5},
        "imagenet_c_bar/sparkles/1": result(0.25),
        "other_c/fog/1": result(0.25),
        "other_c/fog/9": result(0.125),  # no severity
    }
    table = table_of(report_of(results, trained=False))
    assert {title: number.ours for title, number in table.rows.items()} == {
        "top-1 accuracy": 50,
        "ImageNet-A top-1": 25,
        "ImageNet-A, 1000-way, top-1": 12.5,
        "ImageNet-Sketch top-1": 25,
        "ImageNet-V2 top-1": 25,
        "ObjectNet, 1000-way, top-1": 25,
        "cue conflict top-1": 50,
        "cue conflict: shape bias": 25,
        "cue conflict: sharpness": 7,
        "folder mine top-1": 25,
        "folder a/b top-1": 25,
        "never_heard_of top-1": 75,
        "accuracy under PGD-10, eps 0.5 / 255": 25,
        "accuracy under FGSM, eps 4 / 255": 25,
        "accuracy under AutoAttack, eps 4 / 255": 25,
        "other_c/fog/9 top-1": 12.5,
        "top-5 accuracy": 100,
        "loss": 1,
        "calibration error (ECE)": 12.5,
        "error, 1 set (CIFAR-100-C)": 75,
        "error above clean, 1 set (CIFAR-100-C)": 25,
        "calibration error (ECE), 1 set (CIFAR-100-C)": 50,
        "error, fog (CIFAR-100-C), over severity 1 only": 75,
        "error, 1 set (ImageNet-C-bar)": 75,
        "error above clean, 1 set (ImageNet-C-bar)": 25,
        "calibration error (ECE), 1 set (ImageNet-C-bar)": 10,
        "error, sparkles (ImageNet-C-bar), over severity 1 only": 75,
        "error, 1 set (other_c)": 75,
        "error above clean, 1 set (other_c)": 25,
        "calibration error (ECE), 1 set (other_c)": 10,
        "error, fog (other_c), over severity 1 only": 75,
    }
    (note,) = [note for note in table.notes if note.startswith("attacks: ")]
    assert "on 7 of the clean images" in note
    assert all(f"{method}: not known" in note for method in ("pgd10", "fgsm", "autoattack"))
    assert not any("ImageNet-C-bar" in note for note in table.notes)  # 15 others make those means
    better = {title: number.better for title, number in table.rows.items()}
    assert better["loss"] == better["calibration error (ECE)"] == "less"
    assert better["error, 1 set (other_c)"] == "less"
    assert better["cue conflict: shape bias"] is None
    assert better["folder mine top-1"] == "more"


def test_the_cost_stands_beside_robustness() -> None:
    rows = table_of(report_of({"clean": result()}, seed=3, step=10)).rows
    # 256 clean rows of every batch, an extra pass over 64 of them in both directions.
    assert rows["image passes"][:3] == (10 * 384, None, "count")
    assert rows["optimiser steps"].ours == 10
    assert rows["seconds of the run, by its own clock"][:3] == (103, None, "seconds")
    unknown = table_of(report_of({"clean": result()}, trained=False)).rows.values()
    assert not any(number.part == "cost" for number in unknown)
