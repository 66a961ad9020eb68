"""Mixup and CutMix in a plan: which rows are mixed, with whom, and by how much.

Mixup is arXiv 1710.09412, CutMix arXiv 1905.04899.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pipelines import exchanges

if TYPE_CHECKING:
    from pipelines.plan_spec import PlanSpec

Mix = Literal["mixup", "cutmix", "either"]
"""`either`: one of the two, each drawn with p = 1/2."""


class Mixes(NamedTuple):
    """The fields of an `EpochPlan` that begin with `mix_`."""

    lam: np.ndarray
    box: np.ndarray
    partner: np.ndarray


def unmixed(
    steps: int,
    n_rows: int,  # B, the rows that are loaded
) -> Mixes:
    """Every row is its own partner."""
    own = np.broadcast_to(np.arange(n_rows), (steps, n_rows))
    return Mixes(np.ones(steps, np.float32), np.zeros((steps, 4), np.int32), own)


def mixed(
    spec: PlanSpec,
    steps: int,
    rng: np.random.Generator,
    adv_rng: np.random.Generator,  # what only adversarial rows need
) -> Mixes:
    """Partners are drawn inside each group. The clean rows' draws are the same with `both`."""
    lam, box, partner = unmixed(steps, spec.loaded_rows)
    if spec.mix is None:
        return Mixes(lam, box, partner)
    per_row = spec.mix_per == "row"
    if per_row:
        lam = np.ones((steps, spec.loaded_rows), np.float32)
        box = np.zeros((steps, spec.loaded_rows, 4), np.int32)
    else:
        lam, box = _shares(spec, rng, (steps,))
    partner = partner.copy()
    if spec.mix_on != "adv":
        rows = slice(0, spec.clean_rows)
        if per_row:
            lam[:, rows], box[:, rows] = _shares(spec, rng, (steps, spec.clean_rows))
        partner[:, rows] = exchanges.permuted(rng, steps, spec.clean_groups, spec.clean_group_rows)
    if spec.mix_on != "clean" and not spec.adv_are_copies:
        rows = slice(spec.clean_rows, spec.loaded_rows)
        if per_row:
            lam[:, rows], box[:, rows] = _shares(spec, adv_rng, (steps, spec.adv_rows))
        own = exchanges.permuted(adv_rng, steps, spec.adv_groups, spec.adv_group_rows)
        partner[:, rows] = spec.clean_rows + own
    return Mixes(lam, box, partner)


def _shares(
    spec: PlanSpec,
    rng: np.random.Generator,
    shape: tuple[int, ...],  # of as many lambdas and boxes
) -> tuple[np.ndarray, np.ndarray]:
    """lambda float32 `shape`, box int32 (*shape, 4)."""
    size, _ = spec.sides  # a square
    match spec.mix:
        case "mixup":
            lam, box = _mixup(rng, shape, spec.mix_alpha)
        case "cutmix":
            lam, box = _cutmix(rng, shape, spec.mix_alpha, size)
        case _:
            lam, box = _mixup(rng, shape, spec.mix_alpha)
            cut_lam, cut_box = _cutmix(rng, shape, spec.cutmix_alpha, size)
            cuts = rng.random(shape) < 0.5
            lam = np.where(cuts, cut_lam, lam)
            box = np.where(cuts[..., None], cut_box, box)
    return lam.astype(np.float32), box.astype(np.int32)


def _mixup(
    rng: np.random.Generator, shape: tuple[int, ...], alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    return rng.beta(alpha, alpha, shape), np.zeros((*shape, 4), np.int32)


def _cutmix(
    rng: np.random.Generator, shape: tuple[int, ...], alpha: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A box of 1 - lambda of the image's area around a random centre, cut at the image's edge.

    lambda is then what is left of the own image.
    """
    lam = rng.beta(alpha, alpha, shape)
    half = (0.5 * np.sqrt(1 - lam) * size).astype(np.int64)[..., None]
    centre = rng.integers(0, size, (*shape, 2))
    box = np.concatenate([centre - half, centre + half], -1).clip(0, size)
    top, left, bottom, right = np.moveaxis(box, -1, 0)
    return 1 - (bottom - top) * (right - left) / size**2, box
