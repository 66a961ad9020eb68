"""Which checkpoints are one way of training, and what the page says of them."""

import sys
from dataclasses import replace

import pytest

from fap.config import Config, make_config
from fap.evaluate import report
from fap.evaluate.groups import groups_of
from fap.evaluate.work import Report
from tests.evaluate.reports import report_of, result
from tests.evaluate.world import tiny_config


def config(**changes: object) -> Config:
    """The tiny config with other fields, `section__field=value`."""
    tree = tiny_config().model_dump()
    tree["method"] = {"name": changes.pop("method", "fast_advprop")}
    for field, value in changes.items():
        section, _, name = field.partition("__")
        tree[section][name] = value
    return make_config(tree)


def seeds(name: str, top1s: dict[int, float], **changes: object) -> list[Report]:
    """A report of a clean and a corrupted set for each seed."""
    return [
        report_of(
            {"clean": result(top1), "computed/fog/3": result(top1 / 2)},
            name=name,
            seed=seed,
            config=config(**changes),
        )
        for seed, top1 in top1s.items()
    ]


def names(reports: list[Report]) -> list[str]:
    return [group.name for group in groups_of(reports)]


def test_seeds_of_one_way_are_a_group_by_content() -> None:
    """Not by name, and wherever the data lie."""
    a = seeds("a", {0: 0.5}, data__train="x")
    b = seeds("b", {1: 0.5}, data__train="y", data__threads=7, run__log_every=3)
    assert names(a + b) == ["a, b, 2 seeds (0, 1), step 5"]
    c = seeds("c_seed0", {0: 0.5}) + seeds("c_seed1", {1: 0.5})
    assert names(c) == ["c, 2 seeds (0, 1), step 5"]
    other = seeds("a", {1: 0.5}, optim__lr=0.3)
    assert names(a + other) == ["a, seed 0, step 5", "a, seed 1, step 5"]
    (trained,) = seeds("a", {1: 0.5})
    assert trained.training is not None
    elsewhere = replace(trained, training=replace(trained.training, data="40-ffffffff"))
    assert len(groups_of([*a, elsewhere])) == 2
    assert len(groups_of([*a, replace(trained, weights="ema")])) == 2
    assert len(groups_of([*a, replace(trained, settings={"data": "x", "bn": "aux"})])) == 2


def test_groups_keep_the_order_of_their_first_checkpoints() -> None:
    a, b = seeds("a", {0: 0.5, 1: 0.5}), seeds("b", {0: 0.5, 1: 0.5}, optim__lr=0.3)
    groups = groups_of([b[0], a[0], b[1], a[1]])
    assert [group.short for group in groups] == ["b", "a"]
    assert [group.seeds for group in groups] == [[0, 1], [0, 1]]


def test_a_seed_that_is_there_twice_makes_no_group() -> None:
    one, two = seeds("a", {0: 0.5, 1: 0.5})
    later = [replace(one, step=9), replace(two, step=9)]
    assert names([one, two, *later]) == ["a, 2 seeds (0, 1), step 5", "a, 2 seeds (0, 1), step 9"]
    assert names([one, one]) == ["a, seed 0, step 5 [1]", "a, seed 0, step 5 [2]"]
    # The best epochs of two seeds may be of different steps.
    assert names([one, replace(two, step=9)]) == ["a, 2 seeds (0, 1), steps 5 to 9"]


def test_weights_that_no_run_made_stand_alone() -> None:
    plain = report_of({"clean": result()}, name="resnet50", trained=False)
    assert names([plain, replace(plain, name="other")]) == ["resnet50", "other"]
    text = report.markdown([plain, *seeds("a", {0: 0.5})])
    assert "| optimiser steps | not known | 5 |" in text
    assert "Cost of training: resnet50: not known; a: 1,920 image passes" in text
    assert "Cost of training: not known." in report.markdown([plain])


def test_two_kinds_of_norms_are_told_apart() -> None:
    (main,) = seeds("a", {0: 0.5})
    aux = replace(main, settings={"data": "x", "bn": "aux"})
    text = report.markdown([main, aux])
    assert "| | a, seed 0, step 5, main BN | a, seed 0, step 5, aux BN |" in text
    assert "50 images of x, main and aux BN; percent." in text


BASE = {0: 0.50, 1: 0.52, 2: 0.54}


def test_the_page_of_several_seeds() -> None:
    base = seeds("base", BASE, method="vanilla")
    better = seeds("ours", {0: 0.61, 1: 0.62, 2: 0.63})
    text = report.markdown([*base, *better])
    assert text.startswith(
        "- Compared: base, 3 seeds (0, 1, 2), step 5 (cifar_resnet8); "
        "ours, 3 seeds (0, 1, 2), step 5 (cifar_resnet8). The first is the baseline.\n"
        "- Images: 50 clean, 1 corrupted set (computed here, not the published files); "
        "clean ones are x.\n"
        "- Cost of training: base: 1,280 image passes in 5 steps; "
        "ours: 1,920 image passes in 5 steps (1.50 times the baseline's).\n"
        "- ours, against the baseline (3 seeds, paired, 95% intervals): better on "
        "top-1 accuracy +10.00 [+7.52, +12.48]; "
        "error, 1 set (computed here, not the published files) -5.00 [-6.24, -3.76].\n"
        "- Each of these 2 intervals stands alone: where nothing differs, one in twenty excludes 0 "
        "by chance.\n"
    )
    assert "| top-1 accuracy | 52.00 ± 2.00 | 62.00 ± 1.00 |" in text
    assert "percent; mean ± standard deviation (n - 1) over the seeds." in text
    # Differences 11, 10, 9 points: mean 10, standard deviation 1.
    assert "| | ours (paired) |" in text
    assert "| top-1 accuracy | +10.00 [+7.52, +12.48] better; d_z 10.00, p 0.003 |" in text
    assert "| image passes | 1,280 | 1,920 |" in text
    assert "| image passes | 1.50 times |" in text
    assert "| loss | +0.00 (no interval: every seed has the same difference) |" in text
    assert "## Every seed" in text
    assert "| top-1 accuracy | 50.00 | 52.00 | 54.00 | 61.00 | 62.00 | 63.00 |" in text
    assert "ours is trained with other settings (method.name = fast_advprop, not vanilla)" in text
    assert "nan" not in text


def test_worse_and_undecided_are_said() -> None:
    base = seeds("base", BASE, method="vanilla")
    worse = seeds("ours", {0: 0.40, 1: 0.415, 2: 0.43})
    assert "): worse on top-1 accuracy -10.50 [" in report.markdown([*base, *worse])
    open_ = seeds("ours", {0: 0.40, 1: 0.6, 2: 0.5})
    assert "): undecided on top-1 accuracy; error, 1 set" in report.markdown([*base, *open_])
    (one,) = seeds("ours", {0: 0.9})
    text = report.markdown([base[0], one])
    assert "- ours, against the baseline: undecided, there is no interval (one seed).\n" in text
    assert "| top-1 accuracy | +40.00 |" in text
    assert "One seed has no interval and decides nothing." in text
    assert "## Every seed" not in text
    assert "excludes 0 by chance" not in text


def test_other_seeds_are_compared_unpaired_and_named_so() -> None:
    base = seeds("base", BASE, method="vanilla")
    other = seeds("ours", {5: 0.61, 6: 0.63})
    text = report.markdown([*base, *other])
    assert "ours, against the baseline (2 and 3 seeds, unpaired, 95% intervals" in text
    assert "| | ours (unpaired) |" in text
    assert "else Welch's, unpaired (d: Cohen's)" in text
    # Of seeds that both have only these are compared, as pairs.
    some = seeds("ours", {2: 0.63, 7: 0.9, 0: 0.61})
    text = report.markdown([*base, *some])
    assert "ours, against the baseline (2 common seeds, paired, 95% intervals" in text
    assert "| top-1 accuracy | +10.00 [" in text
    # In another order the same seeds are pairs.
    turned = seeds("ours", {2: 0.63, 0: 0.61, 1: 0.62})
    assert "[+7.52, +12.48] better; d_z 10.00" in report.markdown([*base, *turned])


def test_without_scipy_there_are_differences_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    text = report.markdown([
        *seeds("base", BASE, method="vanilla"),
        *seeds("ours", {0: 0.61, 1: 0.62, 2: 0.63}),
    ])  # fmt: skip
    assert "+10.00 (no interval: the interval of a difference needs a package" in text
    assert "undecided, there is no interval (the interval" in text


def test_an_undefined_number_is_called_so() -> None:
    results = {"clean": {**result(), "ece": float("nan")}}
    both = [
        report_of(results, name="a", seed=0),
        report_of(results, name="b", seed=0, config=config(optim__lr=0.3)),
    ]
    text = report.markdown(both)
    assert "| calibration error (ECE) | undefined | undefined |" in text
    assert "nan" not in text


def test_the_words_name_what_cannot_be_seen_in_a_name() -> None:
    """Checkpoints of different steps, and from the middle of a run."""
    one, two = seeds("a", {0: 0.5, 1: 0.5})
    text = report.markdown([one, replace(two, step=9)])
    assert "- a: its checkpoints are of different steps" in text
    assert "a, seed 0, step 5: from the middle of its run, which was set to" in text
