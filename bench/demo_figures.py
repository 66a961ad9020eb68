"""The demo's figures, drawn without a display: bars of accuracy, and images with their
perturbations.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.demo_measure import Example
from bench.study import bars

AMPLIFIED = 20  # times the perturbation, around middle grey


def accuracy(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],  # by arm, a run per seed
    labels: Mapping[str, str],  # of the arms
    measures: Mapping[str, str],  # {measure: its label}: the upper panel
    value: Callable[[Mapping[str, Any], str], float],
    file: Path,
) -> None:
    """Above the measures, below every corruption."""
    corruptions = {
        name: name.replace("_", " ") for name in next(iter(rows.values()))[0]["corruptions"]
    }
    figure = Figure((11, 8), layout="constrained")
    for axes, of in zip(figure.subplots(2, 1), (measures, corruptions), strict=True):
        groups = {
            label: {
                labels[arm]: [value(run, measure) for run in runs] for arm, runs in rows.items()
            }
            for measure, label in of.items()
        }
        bars(axes, groups)
    upper, lower = figure.axes
    upper.set_title("Accuracy after training: bars are means, dots are single seeds")
    upper.legend(loc="upper right")
    lower.tick_params("x", rotation=60)
    figure.savefig(file, dpi=120)


def triplets(examples: Sequence[Example], eps_255: float, file: Path) -> None:
    """A line per image: clean, noisy, adversarial, and what was added, amplified around middle
    grey.
    """
    figure = Figure((10, 0.8 + 2.1 * len(examples)), layout="constrained")
    figure.suptitle(
        f"The three kinds of training rows, eps = {eps_255:g} of 255 grey levels, and what the"
        " network of seed 0 calls them.\nThe two columns on the right show what was added,"
        f" {AMPLIFIED} times as strong."
    )
    heads = ("clean", "with random noise", "adversarial", "the noise", "the adversarial part")
    for i, (line, example) in enumerate(
        zip(figure.subplots(len(examples), 5, squeeze=False), examples, strict=True)
    ):
        clean = example.images_255[0]
        added = [128 + AMPLIFIED * (image - clean) for image in example.images_255[1:]]
        for j, (axes, image) in enumerate(zip(line, (*example.images_255, *added), strict=True)):
            axes.imshow(image.clip(0, 255).astype(np.uint8))
            axes.set_axis_off()
            title = heads[j] if i == 0 else ""
            if j < 3:
                called = example.called[j]
                title += f"\n{'right' if called == example.label else 'wrong'}: {called}"
            axes.set_title(title, fontsize=9)
    figure.savefig(file, dpi=120)
