"""What a classifier did class by class: tables for a spreadsheet, and the classes it finds hardest.

Class names come out of files: what UTF-8 cannot say is escaped.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fap.tasks.class_counts import ClassCounts
from pipelines.files import readable

MOST_DRAWN = 100  # classes of a picture
MOST_TOLD = 5  # classes, or pairs of classes
LONGEST_NAME = 60


def names_of(counts: ClassCounts, names: Sequence[str] | None) -> Sequence[str]:
    """Those of the classes, or their numbers."""
    return names or [str(number) for number in range(len(counts.n_images))]


def is_drawn(counts: ClassCounts) -> bool:
    return counts.confusion is not None and len(counts.n_images) <= MOST_DRAWN


def per_class_csv(counts: ClassCounts, names: Sequence[str] | None) -> bytes:
    """A line for each class: images, those that were right, and what it was most often taken for.

    A class without images has no accuracy, and one that is never mistaken no rival.
    """
    header = ["class", "images", "right", "accuracy_percent"]
    if counts.confusion is not None:
        header += ["most_often_taken_for", "times"]
    shown = names_of(counts, names)
    rows: list[list[object]] = []
    for number, (n_images, n_right) in enumerate(
        zip(counts.n_images.tolist(), counts.n_right.tolist(), strict=True)
    ):
        accuracy = f"{100 * n_right / n_images:.2f}" if n_images else ""
        row = [shown[number], n_images, n_right, accuracy]
        if counts.confusion is not None:
            wrong = counts.confusion[number].copy()
            wrong[number] = 0
            rival = int(wrong.argmax())
            row += [shown[rival], int(wrong[rival])] if wrong[rival] else ["", 0]
        rows.append(row)
    return csv_of([header, *rows])


def confusion_csv(
    confusion: np.ndarray,  # int64 (K, K)
    names: Sequence[str] | None,
) -> bytes:
    """The counts: a line for each class, a column for each class that it was taken for."""
    shown = names or [str(number) for number in range(len(confusion))]
    rows = ([name, *row] for name, row in zip(shown, confusion.tolist(), strict=True))
    return csv_of([["class / taken for", *shown], *rows])


def csv_of(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def file_name(name: str, number: int | None) -> str:
    """NAME, or of one of several checkpoints `NAME_2`, before the suffix."""
    file = Path(name)
    return name if number is None else file.with_stem(f"{file.stem}_{number}").name


def hardest(
    counts: ClassCounts, names: Sequence[str] | None, number: int | None = None
) -> list[tuple[str, str]]:
    """(title, what): the classes with the least accuracy, and the pairs that are mixed up most.

    `number`: of the checkpoint, among several.
    """
    shown = [readable(name, LONGEST_NAME) for name in names_of(counts, names)]
    found = []
    worst = _worst(counts)
    if worst:
        told = [
            f"{shown[n]} {100 * counts.n_right[n] / counts.n_images[n]:.1f}% "
            f"of {counts.n_images[n]:,}"
            for n in worst
        ]
        found.append((f"worst classes ({file_name('per_class.csv', number)})", ", ".join(told)))
    pairs = _pairs(counts)
    if pairs:
        told = [
            f"{shown[true]} taken for {shown[guess]} {times:,} of {counts.n_images[true]:,}"
            for true, guess, times in pairs
        ]
        found.append(
            (f"most often mixed up ({file_name('confusion.csv', number)})", ", ".join(told))
        )
    return found


def _worst(counts: ClassCounts) -> list[int]:
    """Numbers of classes that are not always right, the least accurate first."""
    (mistaken,) = np.nonzero(counts.n_right < counts.n_images)
    accuracy = counts.n_right[mistaken] / counts.n_images[mistaken]
    return mistaken[np.argsort(accuracy, kind="stable")][:MOST_TOLD].tolist()


def _pairs(counts: ClassCounts) -> list[tuple[int, int, int]]:
    """(class, what it was taken for, times), the most frequent first."""
    if counts.confusion is None:
        return []
    wrong = counts.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_TOLD]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    found = [(int(true), int(guess), int(wrong[true, guess])) for true, guess in pairs]
    return [pair for pair in found if pair[2]]
