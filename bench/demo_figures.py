"""The demo's figures: bars of accuracy, and images with their perturbations.

A library of `bench.demo`, drawn without a display.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.demo_measure import Example

AMPLIFIED = 20  # times the perturbation, around middle grey
MIDDLE_GREY = 128
HEADS = ("clean", "with random noise", "adversarial", "the noise", "the adversarial part")


def accuracy(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],  # by arm, a run per seed
    labels: Mapping[str, str],  # of the arms
    measures: Mapping[str, str],  # {measure: its label}: the upper panel
    value: Callable[[Mapping[str, Any], str], float],
    file: Path,
) -> None:
    """Above the measures, below every corruption."""
    some_run = next(iter(rows.values()))[0]
    corruptions = {name: name.replace("_", " ") for name in some_run["corruptions"]}

    def values_by_arm(measure: str) -> dict[str, list[float]]:
        return {labels[arm]: [value(run, measure) for run in runs] for arm, runs in rows.items()}

    figure = Figure((11, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    for axes, shown in ((upper, measures), (lower, corruptions)):
        bars(axes, {label: values_by_arm(measure) for measure, label in shown.items()})
    upper.set_title("Accuracy after training: bars are means, dots are single seeds")
    upper.legend(loc="upper right")
    lower.tick_params("x", rotation=60)
    figure.savefig(file, dpi=120)


def triplets(examples: Sequence[Example], eps_255: float, file: Path) -> None:
    """A line per image: clean, noisy, adversarial, and what was added, amplified."""
    figure = Figure((10, 0.8 + 2.1 * len(examples)), layout="constrained")
    figure.suptitle(
        f"The three kinds of training rows, eps = {eps_255:g} of 255 grey levels, "
        "and what the network of seed 0 calls them.\n"
        f"The two columns on the right show what was added, {AMPLIFIED} times as strong."
    )
    lines = figure.subplots(len(examples), len(HEADS), squeeze=False)
    for line, example in zip(lines, examples, strict=True):
        clean, noisy, adversarial = example.images_255
        added = [MIDDLE_GREY + AMPLIFIED * (image - clean) for image in (noisy, adversarial)]
        images = (clean, noisy, adversarial, *added)
        # What was added is not shown to the network.
        answers = [_answer(example, called) for called in example.called] + ["", ""]
        for axes, image, answer in zip(line, images, answers, strict=True):
            axes.imshow(image.clip(0, 255).astype(np.uint8))
            axes.set_axis_off()
            axes.set_title(answer, fontsize=9)
    for axes, head in zip(lines[0], HEADS, strict=True):
        axes.set_title(head + axes.get_title(), fontsize=9)
    figure.savefig(file, dpi=120)


def _answer(example: Example, called: str) -> str:
    """What the network calls an image, on a line of its own."""
    judged = "right" if called == example.label else "wrong"
    return f"\n{judged}: {called}"


def bars(axes: Any, groups: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw `groups`: by label, by arm, one value per seed. A bar is their mean, a dot one seed."""
    arms = list(next(iter(groups.values())))
    width = 0.8 / len(arms)
    left = np.arange(len(groups))
    for i, arm in enumerate(arms):
        at = left + (i + 0.5) * width
        values = np.array([group[arm] for group in groups.values()])  # (groups, seeds)
        axes.bar(at, values.mean(1), width, label=arm, color=f"C{i}", alpha=0.6)
        axes.plot(at, values, ".", color="black", markersize=4)
    axes.set_xticks(left + 0.4, list(groups))
    axes.set_ylabel("percent right")
    axes.set_ylim(bottom=0)
