"""The epoch is data: order, windows, flips, shuffles and mixes of a whole epoch, drawn before it
starts.

Every field has its own counter-based stream keyed by (seed, epoch, field), so a plan depends on
nothing else: not on threads, ranks or the step at which a run resumes. A loader only executes a
plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

PADDING = 2**32 - 1  # index of an evaluation row that holds no sample: a zero image with label -1
ORDER, WINDOW, FLIP, SHUFFLE, NOISE, MIX = range(6)  # the streams of one epoch; never renumber


@dataclass(frozen=True)
class PlanSpec:
    """What stays fixed for a run. Rows are global (all ranks together), sides are in pixels.

    `random_resized` is torchvision's RandomResizedCrop; `pad` its RandomCrop(size, padding=pad),
    zeros outside; `center` belongs to `eval_plan`.
    """

    seed: int
    size: int
    clean_rows: int
    adv_rows: int = 0
    clean_group_rows: int = 64
    adv_group_rows: int = 16
    crop: Literal["random_resized", "pad", "center"] = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4
    flip: float = 0.5
    mix: Literal["mixup", "cutmix"] | None = None
    mix_alpha: float = 1.0
    shuffle_groups: int = 0
    adv_are_copies: bool = False
    """The adversarial rows are made from the clean ones (AdvProp): they are drawn for, but not
    loaded.
    """

    @property
    def loaded_rows(self) -> int:
        return self.clean_rows + (0 if self.adv_are_copies else self.adv_rows)

    def __post_init__(self) -> None:
        for name, least in (
            ("seed", 0),
            ("size", 1),
            ("clean_rows", 1),
            ("adv_rows", 0),
            ("pad", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        for part in ("clean", "adv"):
            rows, group = getattr(self, f"{part}_rows"), getattr(self, f"{part}_group_rows")
            if group < 1 or rows % group:
                raise ValueError(
                    f"{part}_rows = {rows}: must be a multiple of {part}_group_rows = {group}"
                )
        if self.crop not in ("random_resized", "pad", "center") or self.mix not in (
            None,
            "mixup",
            "cutmix",
        ):
            raise ValueError(f"crop = {self.crop!r}, mix = {self.mix!r}: unknown")
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise ValueError(
                f"scale = {self.scale}, ratio = {self.ratio}: must be 0 < low <= high, scale at"
                " most 1"
            )


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch as arrays. Row order within a step: clean groups, then adversarial groups."""

    spec: PlanSpec
    epoch: int
    index: np.ndarray  # uint32 (steps, B), sample numbers
    window: (
        np.ndarray
    )  # int16 (steps, B, 4): top, left, height, width in source pixels; may reach outside
    flip: np.ndarray  # bool (steps, B)
    shuffle: (
        np.ndarray
    )  # int64 (steps, n_adv): new_adv_rows = adv_rows[shuffle]; global rows on every rank
    noise_key: (
        np.ndarray
    )  # int32 (steps, n_adv_groups), >= 0: seeds the attack's random start of one group
    mix_lam: np.ndarray  # float32 (steps,): share of the row's own image (1 without mix)
    mix_box: (
        np.ndarray
    )  # int32 (steps, 4): top, left, bottom, right in output pixels (empty unless cutmix)
    mix_partner: np.ndarray  # int64 (steps, n_clean): row of this plan, inside the same clean group

    def __len__(self) -> int:
        return len(self.index)

    @property
    def n_adv(self) -> int:
        return self.noise_key.shape[1] * self.spec.adv_group_rows

    @property
    def n_clean(self) -> int:
        return self.mix_partner.shape[1]

    def look_up(self, values: np.ndarray, padding: float) -> np.ndarray:
        """(steps, B, ...): what `values` (N, ...) hold for each row's sample; `padding` for no sample."""
        empty = self.index == PADDING
        found = values[np.where(empty, 0, self.index)]
        found[empty] = padding
        return found

    def for_rank(self, rank: int, world: int) -> EpochPlan:
        """The clean groups and the adversarial groups of one rank; only `shuffle` stays in global
        numbers.
        """
        clean_groups, adv_groups = (
            self.n_clean // self.spec.clean_group_rows,
            self.noise_key.shape[1],
        )
        if not 0 <= rank < world or clean_groups % world or adv_groups % world:
            groups = f"{clean_groups} clean and {adv_groups} adversarial groups"
            raise ValueError(f"rank {rank} of {world}: {groups} must divide evenly")
        n, m, g = self.n_clean // world, self.n_adv // world, adv_groups // world
        rows = np.r_[
            rank * n : (rank + 1) * n, self.n_clean + rank * m : self.n_clean + (rank + 1) * m
        ]
        rows = rows[:n] if self.spec.adv_are_copies else rows
        own = {name: getattr(self, name)[:, rows] for name in ("index", "window", "flip")}
        partner = self.mix_partner[:, rank * n : (rank + 1) * n] - rank * n
        return replace(
            self, **own, noise_key=self.noise_key[:, rank * g : (rank + 1) * g], mix_partner=partner
        )


def draw_epoch(spec: PlanSpec, heights: np.ndarray, widths: np.ndarray, epoch: int) -> EpochPlan:
    """Draw a training epoch for images of `heights` x `widths` (N,) pixels; a partial last batch is
    dropped.

    Raises:
        ValueError: fewer images than one batch, an image too large (side > 32767) or too small to
        crop.
    """
    batch = spec.loaded_rows
    if not (steps := len(heights) // batch):
        raise ValueError(
            f"clean_rows + adv_rows = {batch}: the data hold only {len(heights)} images"
        )
    if spec.crop == "center":
        raise ValueError("crop = 'center': training plans take 'random_resized' or 'pad'")
    index = _stream(spec, epoch, ORDER).permutation(np.arange(len(heights), dtype=np.uint32))[
        : steps * batch
    ]
    draw = _random_resized if spec.crop == "random_resized" else _pad
    window = draw(_stream(spec, epoch, WINDOW), heights[index], widths[index], spec)
    return _complete(spec, epoch, index.reshape(steps, batch), window)


def eval_plan(
    heights: np.ndarray, widths: np.ndarray, *, size: int, resize: int, batch: int
) -> EpochPlan:
    """Every image once, in order; the window is the centre square of side size / resize * min(h,
    w).

    The last step is filled with PADDING rows (empty window). Any `world` that divides `batch` may
    slice it.
    """
    if not 0 < size <= resize:
        raise ValueError(f"resize = {resize}: must be at least size = {size}")
    missing = -len(heights) % batch
    index = np.pad(np.arange(len(heights), dtype=np.uint32), (0, missing), constant_values=PADDING)
    side = np.maximum(np.minimum(heights, widths).astype(np.int64) * size // resize, 1)
    window = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)
    spec = PlanSpec(0, size, batch, clean_group_rows=1, crop="center", flip=0.0)
    return _complete(spec, 0, index.reshape(-1, batch), np.pad(window, ((0, missing), (0, 0))))


def _stream(spec: PlanSpec, epoch: int, field: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([spec.seed, epoch, field])))


def _complete(spec: PlanSpec, epoch: int, index: np.ndarray, window: np.ndarray) -> EpochPlan:
    """Add the fields that do not depend on the images' sizes."""
    steps = len(index)
    if window.max(initial=0) > np.iinfo(np.int16).max:
        raise ValueError(
            "images with a side above 32767 pixels: shrink them (fap-convert --max-side)"
        )
    flip = _stream(spec, epoch, FLIP).random(index.shape, dtype=np.float32) < spec.flip
    shuffle = _shuffle(_stream(spec, epoch, SHUFFLE), steps, spec)
    noise = _stream(spec, epoch, NOISE).integers(
        0, 2**31, (steps, spec.adv_rows // spec.adv_group_rows), dtype=np.int32
    )
    window = window.astype(np.int16).reshape(*index.shape, 4)
    return EpochPlan(
        spec,
        epoch,
        index,
        window,
        flip,
        shuffle,
        noise,
        *_mix(_stream(spec, epoch, MIX), steps, spec),
    )


def _random_resized(
    rng: np.random.Generator, h: np.ndarray, w: np.ndarray, spec: PlanSpec
) -> np.ndarray:
    """Windows (n, 4) as torchvision's RandomResizedCrop.get_params draws them: ten tries, then the
    centre.
    """
    window = np.empty((len(h), 4), np.int32)
    low, high = 0.5 * np.log(spec.ratio)
    todo = np.arange(len(h))
    for _ in range(10):
        H, W, n = h[todo], w[todo], len(todo)
        side, root = np.sqrt(rng.uniform(*spec.scale, n) * H * W), np.exp(rng.uniform(low, high, n))
        width, height = np.rint(side * root), np.rint(side / root)
        top, left = rng.random(n) * (H - height + 1), rng.random(n) * (W - width + 1)
        # rows that failed hold nonsense until a later try or the fallback overwrites them
        window[todo] = np.stack([np.floor(top), np.floor(left), height, width], 1)
        todo = todo[(width < 1) | (width > W) | (height < 1) | (height > H)]
    H, W = h[todo], w[todo]
    height, width = (
        np.minimum(H, np.rint(W / spec.ratio[0])),
        np.minimum(W, np.rint(H * spec.ratio[1])),
    )
    window[todo] = np.stack([(H - height) // 2, (W - width) // 2, height, width], 1)
    return window


def _pad(rng: np.random.Generator, h: np.ndarray, w: np.ndarray, spec: PlanSpec) -> np.ndarray:
    room = np.stack([h, w], 1) + 2 * spec.pad - spec.size + 1  # (n, 2) places for the window
    if room.min() < 1:
        at = np.argmin(room.min(1))
        raise ValueError(
            f"size = {spec.size}: an image of {h[at]}x{w[at]} plus pad {spec.pad} is smaller"
        )
    corner = np.floor(rng.random(room.shape) * room) - spec.pad
    return np.concatenate([corner, np.full_like(corner, spec.size)], 1)


def _permute(rng: np.random.Generator, steps: int, groups: int, rows: int) -> np.ndarray:
    """(steps, groups * rows): the rows of every group permuted inside it."""
    inside = rng.random((steps, groups, rows), dtype=np.float32).argsort(-1, kind="stable")
    return (inside + np.arange(groups)[:, None] * rows).reshape(steps, groups * rows)


def _shuffle(rng: np.random.Generator, steps: int, spec: PlanSpec) -> np.ndarray:
    """Permute inside each group, then deal: row j of group g of G goes to (g + 1 + j mod (G-1)) mod
    G.

    Every row leaves its BN group. Two groups exchange every other row: moving all would shuffle
    nothing.
    """
    groups, rows = spec.adv_rows // spec.adv_group_rows, spec.adv_group_rows
    take = np.arange(spec.adv_rows)  # place -> row, before the permutations inside the groups
    if spec.shuffle_groups < 2:
        return np.broadcast_to(take, (steps, spec.adv_rows))
    for first in range(0, groups, spec.shuffle_groups):
        G = min(spec.shuffle_groups, groups - first)
        g, j = np.divmod(np.arange(G * rows), rows)
        target = (g + 1 + j % (G - 1)) % G if G >= 3 else (g + j % G) % G
        take[first * rows : (first + G) * rows] = first * rows + np.argsort(target, kind="stable")
    return _permute(rng, steps, groups, rows)[:, take]


def _mix(
    rng: np.random.Generator, steps: int, spec: PlanSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mix_lam, mix_box, mix_partner; arXiv 1710.09412 (Mixup) and 1905.04899 (CutMix), one draw per
    step.
    """
    box = np.zeros((steps, 4), np.int32)
    if spec.mix is None:  # every row is its own partner: mixing changes nothing
        return (
            np.ones(steps, np.float32),
            box,
            np.broadcast_to(np.arange(spec.clean_rows), (steps, spec.clean_rows)),
        )
    lam = rng.beta(spec.mix_alpha, spec.mix_alpha, steps)
    if spec.mix == "cutmix":
        half = (0.5 * np.sqrt(1 - lam) * spec.size).astype(np.int64)[:, None]
        centre = rng.integers(0, spec.size, (steps, 2))
        box = np.concatenate([centre - half, centre + half], 1).clip(0, spec.size).astype(np.int32)
        lam = 1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / spec.size**2
    return (
        lam.astype(np.float32),
        box,
        _permute(rng, steps, spec.clean_rows // spec.clean_group_rows, spec.clean_group_rows),
    )
