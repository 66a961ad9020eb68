"""What each plot shows, read back from matplotlib's figure, and which are not drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fap.evaluate import plots, report
from fap.evaluate.groups import groups_of
from fap.evaluate.work import Report
from tests.evaluate.reports import plausible, report_of, result
from tests.evaluate.test_groups import config

SEVERAL = [(seed, *way) for way in (("vanilla", 0.0), ("fast_advprop", 0.1)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Two groups of two seeds, on everything."""
    return [
        report_of(
            plausible(np.random.default_rng([7, seed, len(method)]), gain),
            name=method.replace("_", ""),
            seed=seed,
            config=config(method=method),
        )
        for seed, method, gain in SEVERAL
    ]


def drawn(name: str, reports: list[Report]) -> Figure:
    figure = plots.PLOTS[name](groups_of(reports))
    assert figure is not None
    return figure


def colours_of(figure: Figure) -> list[str]:
    """Those of the legend's groups."""
    (legend,) = figure.legends
    return [to_hex(patch.get_facecolor()) for patch in legend.get_patches()][:2]


def top1s(reports: list[Report], key: str) -> tuple[float, float]:
    """Mean and standard deviation of two seeds, percent."""
    values = [100 * one.results[key]["top1"] for one in reports]
    return float(np.mean(values)), float(np.std(values, ddof=1))


def test_accuracies_are_bars(reports: list[Report]) -> None:
    figure = drawn("report.png", reports)
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:2] == ["top-1 accuracy", "ImageNet-R top-1"]
    assert labels[-1] == "accuracy under PGD-10, eps 4 / 255"
    assert not any("error" in label or "top-5" in label for label in labels)
    first, second = (c for c in axes.containers if hasattr(c, "patches"))
    assert [bar.get_width() for bar in second][1] == pytest.approx(
        top1s(reports[2:], "imagenet_r")[0]
    )
    assert first.errorbar is not None
    assert [to_hex(bar[0].get_facecolor()) for bar in (first, second)] == colours_of(figure)


def test_errors_are_a_plot_of_their_own(reports: list[Report]) -> None:
    figure = drawn("corruptions.png", reports)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "error, percent"
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert (labels[0], labels[1], len(labels)) == ("mean", "gaussian noise", 20)
    first, _ = (c for c in axes.containers if hasattr(c, "patches"))
    fog = [100 - top1s(reports[:2], f"imagenet_c/fog/{severity}")[0] for severity in range(1, 6)]
    assert first[labels.index("fog")].get_height() == pytest.approx(np.mean(fog))
    heights = [bar.get_height() for bar in first]
    assert heights[0] == pytest.approx(np.mean(heights[1:]))


def test_severities_are_lines_with_bands(reports: list[Report]) -> None:
    figure = drawn("severity.png", reports)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["mean of 19", "noise (4)", "blur (5)", "weather (5)", "digital (5)"]
    blur = figure.axes[2]
    names = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur")
    by_seed = [
        100 - 100 * np.mean([one.results[f"imagenet_c/{name}/4"]["top1"] for name in names])
        for one in reports[2:]
    ]
    line = blur.get_lines()[1]
    assert line.get_ydata()[3] == pytest.approx(np.mean(by_seed))
    assert len(blur.collections) == 2
    edges = blur.collections[1].get_paths()[0].vertices
    at_4 = edges[np.isclose(edges[:, 0], 4), 1]
    assert at_4.max() - at_4.min() == pytest.approx(2 * np.std(by_seed, ddof=1))
    assert [line.get_color().lower() for line in blur.get_lines()] == colours_of(figure)


@pytest.mark.parametrize("name", ["severity.png", "attacks.png"])
def test_no_line_leaves_its_panel(name: str) -> None:
    """Panels share an axis, and the later ones may reach further than the first."""
    results = {"clean": result(0.9), "attack/fgsm/1": result(0.1), "attack/fgsm/2": result(0.05)}
    results |= {"attack/pgd10/1": result(0.8), "attack/pgd10/2": result(0.7)}
    for severity in range(1, 6):
        results[f"imagenet_c/gaussian_noise/{severity}"] = result(0.9 - severity / 50)
        results[f"imagenet_c/fog/{severity}"] = result(0.5 - severity / 10)
    for axes in drawn(name, [report_of(results)]).axes:
        low, high = axes.get_ylim()
        for line in axes.get_lines():
            heights = np.asarray(line.get_ydata(), dtype=float)
            assert ((heights >= low) & (heights <= high)).all(), axes.get_title()


def test_attacks_are_lines_over_eps(reports: list[Report]) -> None:
    figure = drawn("attacks.png", reports)
    assert [axes.get_title() for axes in figure.axes] == ["FGSM", "PGD-10"]
    line, *_ = figure.axes[1].get_lines()
    # Of 1,000 images, while the clean ones are 50,000: they are no point of this line.
    assert [*line.get_xdata()] == [0.5, 1, 2, 4]
    assert line.get_ydata()[1] == pytest.approx(top1s(reports[:2], "attack/pgd10/1")[0])


def test_clean_images_begin_the_line_where_all_are_attacked() -> None:
    results = {"clean": result(0.75), "attack/fgsm/x": result(0.1)}
    results |= {"attack/fgsm/1": result(0.5), "attack/fgsm/2": result(0.25)}
    (axes,) = drawn("attacks.png", [report_of(results)]).axes
    (line,) = [one for one in axes.get_lines() if len(one.get_xdata()) > 0][:1]
    assert [*line.get_xdata()] == [0, 1, 2]
    assert [*line.get_ydata()] == pytest.approx([75, 50, 25])


def test_nothing_is_drawn_of_nothing() -> None:
    groups = groups_of([report_of({"clean": result(), "computed/fog/3": result()})])
    assert plots.severities(groups) is None  # one severity makes no line
    assert plots.attacks(groups) is None
    one_strength = groups_of([report_of({"clean": result(), "attack/fgsm/1": result()})])
    assert plots.attacks(one_strength) is None
    assert plots.corruptions(groups) is not None
    assert plots.corruptions(groups_of([report_of({"clean": result()})])) is None


def test_lines_are_of_what_everybody_measured() -> None:
    """One lacks a corruption, another a severity."""
    results = {"clean": result()}
    for name in ("fog", "snow", "sparkles"):
        results |= {f"computed/{name}/{severity}": result(0.25) for severity in (1, 2, 3)}
    lacks = {key: one for key, one in results.items() if key != "computed/fog/3"}
    lacks = {key: one for key, one in lacks.items() if "snow" not in key}
    both = [report_of(results, name="a"), report_of(lacks, name="b", config=config(optim__lr=1.0))]
    figure = drawn("severity.png", both)
    assert [axes.get_title() for axes in figure.axes] == [
        *("mean of 2", "weather (1)", "others (1)")
    ]
    assert [*figure.axes[0].get_lines()[0].get_xdata()] == [1, 2]
    drawn("corruptions.png", both)


def test_more_groups_than_colours_are_said(reports: list[Report]) -> None:
    many = [
        report_of({"clean": result()}, name=f"m{i}", config=config(optim__lr=0.1 + i / 100))
        for i in range(10)
    ]
    figure = drawn("report.png", many)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == 9
    assert texts[-1] == "2 more in the tables"
    (axes,) = figure.axes
    assert len({to_hex(bar[0].get_facecolor()) for bar in axes.containers}) == 8


@pytest.mark.slow
def test_the_files_are_pictures_and_former_ones_go(reports: list[Report], tmp_path: Path) -> None:
    assert report.write_report(reports, tmp_path) == ""
    for name in plots.PLOTS:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    odd: Any = report_of({"clean": result()}, name="_a$b$ \\frac{")
    assert report.write_report([odd], tmp_path) == ""
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {f"report.{kind}" for kind in ("csv", "json", "md", "png", "tex")}
