"""A number of a report: its unit, which of two is the better one, where it belongs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fap.evaluate.compare import Better

Unit = Literal["percent", "plain", "count", "seconds"]
# Of the table: accuracy on a set; another metric; what sums up a corruption benchmark; one
# corruption; what the training cost.
Part = Literal["accuracy", "metric", "mean", "corruption", "cost"]


class Number(NamedTuple):
    """Percent, but for what its unit says is none, such as a loss."""

    ours: float
    paper: float | None = None
    unit: Unit = "percent"
    better: Better | None = "more"  # None: neither
    part: Part = "accuracy"
    headline: bool = False  # one of the few that the words at the top are about
