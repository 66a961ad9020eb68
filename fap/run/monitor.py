"""What a run watches in its metrics: steps that were not finite, and labels that leak."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fap.config import Config
from fap.methods import KINDS
from fap.step.metrics import rates

STANDARD_ERRORS = 2  # by which a difference of two accuracies must exceed chance


class NonFinite(RuntimeError):  # noqa: N818
    """Too many steps in a row had a non-finite loss or gradient."""


def skipped_steps(metrics: Mapping[str, float], step: int) -> str:
    """A warning about steps without effect; "" where there were none."""
    if not metrics["skipped"]:
        return ""
    return (
        f"step {step}: {metrics['skipped']:.0f} of the last {metrics['steps']:.0f} steps "
        "were not finite and were skipped"
    )


def check_finite(metrics: Mapping[str, float], step: int, most: int, last_good: str) -> None:
    """Raise NonFinite after `most` skipped steps in a row; `last_good` says what has been saved."""
    in_a_row = metrics["skipped_in_a_row"]
    if in_a_row < most:
        return
    bad = ", ".join(kind for kind in KINDS if metrics[f"nonfinite_{kind}"]) or "no"
    raise NonFinite(
        f"{in_a_row:.0f} non-finite steps in a row up to step {step} "
        f"(loss of the {bad} rows; else gradients only); {last_good}"
    )


def leak(
    metrics: Mapping[str, float],  # sums over an epoch
    config: Config,
    epoch: int,
    *,
    statistics: bool,  # do rows of a group share any: see `fap.nets.dual.divides_statistics`
) -> str:
    """A warning if an epoch's adversarial rows were easier than its clean ones (section 4.3).

    Then the network tells labels by the statistics that rows of one group share. "" if not, if it
    may be chance, and where clean rows are harder for another reason: they are mixed, and scored on
    the first of two labels, or they alone are augmented.
    """
    if not statistics or config.data.mix is not None or config.data.augment_on == "clean":
        return ""
    n_clean = metrics["rows_clean"]
    n_adv = metrics["rows_adv"]
    if not (n_clean and n_adv):
        return ""
    accuracies = rates(metrics)
    clean = accuracies["acc_clean"]
    adv = accuracies["acc_adv"]
    mean = (metrics["correct_clean"] + metrics["correct_adv"]) / (n_clean + n_adv)
    standard_error = math.sqrt(mean * (1 - mean) * (1 / n_clean + 1 / n_adv))
    if not adv - clean > STANDARD_ERRORS * standard_error:
        return ""
    warning = (
        f"warning: epoch {epoch}: training accuracy of adversarial rows ({adv:.1%}) "
        f"is above that of clean rows ({clean:.1%}): statistics leak labels (section 4.3)"
    )
    if config.method.shuffle is not None:
        warning += "; see method.shuffle"
    return warning
