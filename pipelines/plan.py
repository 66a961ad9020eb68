"""The epoch is data: order, windows, flips, shuffles and mixes, all drawn before it starts.

Every field has its own counter-based stream keyed by (seed, epoch, field), so a plan depends on
nothing else: not on threads, ranks or the step at which a run resumes. A loader only executes a
plan.

Words: N images; B rows of a step, n_clean of them clean and n_adv adversarial. Rows and groups are
those of all ranks together until `EpochPlan.for_rank` takes a rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

PADDING = 2**32 - 1  # index of an evaluation row that holds no sample: its image is all zeros

# The streams of one epoch. Never renumber: every number drawn so far would change.
ORDER, WINDOW, FLIP, SHUFFLE, NOISE, MIX = range(6)

NOISE_KEYS = 2**31  # keys are int32 and not negative
CROP_TRIES = 10  # as torchvision's RandomResizedCrop
MAX_WINDOW = np.iinfo(np.int16).max  # pixels


@dataclass(frozen=True)
class PlanSpec:
    """What stays fixed for a run. Rows are global (all ranks together), sides are in pixels.

    `random_resized` is torchvision's RandomResizedCrop; `pad` its RandomCrop(size, padding=pad),
    zeros outside; `center` belongs to `eval_plan`.

    Raises:
        ValueError: a field out of range, or rows that are no whole groups.
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
    """Scope of the shuffle: so many adjacent adversarial groups exchange rows; below 2 none do.

    All groups: rows move between ranks. The groups of one rank: they stay on it.
    """
    adv_are_copies: bool = False
    """The adversarial rows are made from the clean ones (AdvProp): drawn for, but not loaded."""

    @property
    def clean_groups(self) -> int:
        return self.clean_rows // self.clean_group_rows

    @property
    def adv_groups(self) -> int:
        return self.adv_rows // self.adv_group_rows

    @property
    def loaded_rows(self) -> int:
        """B, the rows of a step that a loader gives."""
        if self.adv_are_copies:
            return self.clean_rows
        return self.clean_rows + self.adv_rows

    def shuffles_within_ranks(self, world: int) -> bool:
        """Whether no scope of the shuffle spans two of `world` ranks."""
        if world == 1 or self.shuffle_groups < 2:
            return True
        groups_of_a_rank = self.adv_groups // world
        return groups_of_a_rank % self.shuffle_groups == 0

    def __post_init__(self) -> None:
        minima = {"seed": 0, "size": 1, "clean_rows": 1, "adv_rows": 0, "pad": 0}
        for name, least in minima.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")
        for part in ("clean", "adv"):
            rows = getattr(self, f"{part}_rows")
            group_rows = getattr(self, f"{part}_group_rows")
            if group_rows < 1 or rows % group_rows:
                raise ValueError(
                    f"{part}_rows = {rows}: must be a multiple of {part}_group_rows = {group_rows}"
                )
        known_crop = self.crop in ("random_resized", "pad", "center")
        known_mix = self.mix in (None, "mixup", "cutmix")
        if not (known_crop and known_mix):
            raise ValueError(f"crop = {self.crop!r}, mix = {self.mix!r}: unknown")
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise ValueError(
                f"scale = {self.scale}, ratio = {self.ratio}: "
                "must be 0 < low <= high, scale at most 1"
            )


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch as arrays. Row order within a step: clean groups, then adversarial groups."""

    spec: PlanSpec
    epoch: int

    # uint32 (steps, B): sample numbers.
    index: np.ndarray
    # int16 (steps, B, 4): top, left, height, width in source pixels; may reach outside.
    window: np.ndarray
    # bool (steps, B): mirrored left to right.
    flip: np.ndarray
    # int64 (steps, n_adv): new_adv_rows = adv_rows[shuffle]; numbers as `for_rank` says.
    shuffle: np.ndarray
    # int32 (steps, n_adv_groups), >= 0: seeds the attack's random start of one group.
    noise_key: np.ndarray
    # float32 (steps,): share of the row's own image; 1 without mix.
    mix_lam: np.ndarray
    # int32 (steps, 4): top, left, bottom, right in output pixels; empty unless cutmix.
    mix_box: np.ndarray
    # int64 (steps, n_clean): row of this plan, inside the same clean group.
    mix_partner: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def n_adv(self) -> int:
        return self.noise_key.shape[1] * self.spec.adv_group_rows

    @property
    def n_clean(self) -> int:
        return self.mix_partner.shape[1]

    def look_up(self, values: np.ndarray, padding: float) -> np.ndarray:
        """(steps, B, ...): what `values` (N, ...) hold for each row's sample.

        Rows without a sample get `padding`.
        """
        empty = self.index == PADDING
        found = values[np.where(empty, 0, self.index)]
        found[empty] = padding
        return found

    def for_rank(self, rank: int, world: int) -> EpochPlan:
        """What one of `world` ranks needs: its clean groups, its adversarial groups, their draws.

        All row numbers are the rank's own, with one exception: where the shuffle moves rows between
        ranks, `shuffle` numbers the adversarial rows of all ranks, as they lie in the tensor that
        is gathered over the ranks.

        Raises:
            ValueError: there is no such rank, or the groups do not divide evenly.
        """
        n_clean_groups = self.n_clean // self.spec.clean_group_rows
        n_adv_groups = self.noise_key.shape[1]
        if not 0 <= rank < world or n_clean_groups % world or n_adv_groups % world:
            raise ValueError(
                f"rank {rank} of {world}: {n_clean_groups} clean and {n_adv_groups} adversarial "
                "groups must divide evenly"
            )
        clean = _share(self.n_clean, rank, world)
        adv = _share(self.n_adv, rank, world)

        # Among the loaded rows the adversarial ones of all ranks follow the clean ones of all
        # ranks. Copies are not loaded.
        rows = np.arange(clean.start, clean.stop)
        if not self.spec.adv_are_copies:
            rows = np.concatenate([rows, self.n_clean + np.arange(adv.start, adv.stop)])

        shuffle = self.shuffle[:, adv]
        if self.spec.shuffles_within_ranks(world):
            shuffle = shuffle - adv.start
        return replace(
            self,
            index=self.index[:, rows],
            window=self.window[:, rows],
            flip=self.flip[:, rows],
            shuffle=shuffle,
            noise_key=self.noise_key[:, _share(n_adv_groups, rank, world)],
            mix_partner=self.mix_partner[:, clean] - clean.start,
        )


def draw_epoch(
    spec: PlanSpec,
    heights: np.ndarray,  # (N,) pixels
    widths: np.ndarray,  # (N,) pixels
    epoch: int,
) -> EpochPlan:
    """Draw a training epoch; a partial last batch is dropped.

    Raises:
        ValueError: fewer images than one batch, or an image too large (side > 32767) or too small
            to crop.
    """
    rows = spec.loaded_rows
    steps = len(heights) // rows
    if not steps:
        raise ValueError(
            f"clean_rows + adv_rows = {rows}: the data hold only {len(heights)} images"
        )
    order = _stream(spec, epoch, ORDER).permutation(np.arange(len(heights), dtype=np.uint32))
    index = order[: steps * rows]
    windows = _stream(spec, epoch, WINDOW)
    match spec.crop:
        case "random_resized":
            window = _random_resized(windows, heights[index], widths[index], spec)
        case "pad":
            window = _pad(windows, heights[index], widths[index], spec)
        case "center":
            raise ValueError("crop = 'center': training plans take 'random_resized' or 'pad'")
    return _complete(spec, epoch, index.reshape(steps, rows), window)


def eval_plan(
    heights: np.ndarray,  # (N,) pixels
    widths: np.ndarray,  # (N,) pixels
    *,
    size: int,
    resize: int,
    batch: int,
) -> EpochPlan:
    """Every image once, in order: its centre square of side size / resize * min(height, width).

    The last step is filled with PADDING rows (empty window). Any `world` that divides `batch` may
    slice it.
    """
    if not 0 < size <= resize:
        raise ValueError(f"resize = {resize}: must be at least size = {size}")
    missing = -len(heights) % batch
    index = np.pad(np.arange(len(heights), dtype=np.uint32), (0, missing), constant_values=PADDING)
    shorter = np.minimum(heights, widths).astype(np.int64)
    side = np.maximum(shorter * size // resize, 1)
    window = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)
    # Groups of one row: then a batch of any size consists of whole groups.
    spec = PlanSpec(0, size, batch, clean_group_rows=1, crop="center", flip=0.0)
    return _complete(spec, 0, index.reshape(-1, batch), np.pad(window, ((0, missing), (0, 0))))


def _share(n: int, rank: int, world: int) -> slice:
    """The part of one rank where n things in a row are divided among `world` ranks."""
    each = n // world
    return slice(rank * each, (rank + 1) * each)


def _stream(spec: PlanSpec, epoch: int, field: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([spec.seed, epoch, field])))


def _complete(
    spec: PlanSpec,
    epoch: int,
    index: np.ndarray,  # (steps, B)
    window: np.ndarray,  # (steps * B, 4)
) -> EpochPlan:
    """Add the fields that do not depend on the images' sizes."""
    steps = len(index)
    if window.max(initial=0) > MAX_WINDOW:
        raise ValueError(
            f"images with a side above {MAX_WINDOW} pixels: shrink them (fap-convert --max-side)"
        )
    noise_shape = (steps, spec.adv_groups)
    mix_lam, mix_box, mix_partner = _mix(_stream(spec, epoch, MIX), steps, spec)
    return EpochPlan(
        spec=spec,
        epoch=epoch,
        index=index,
        window=window.astype(np.int16).reshape(*index.shape, 4),
        flip=_stream(spec, epoch, FLIP).random(index.shape, dtype=np.float32) < spec.flip,
        shuffle=_shuffle(_stream(spec, epoch, SHUFFLE), steps, spec),
        noise_key=_stream(spec, epoch, NOISE).integers(0, NOISE_KEYS, noise_shape, dtype=np.int32),
        mix_lam=mix_lam,
        mix_box=mix_box,
        mix_partner=mix_partner,
    )


def _random_resized(
    rng: np.random.Generator,
    heights: np.ndarray,  # (n,) pixels
    widths: np.ndarray,  # (n,) pixels
    spec: PlanSpec,
) -> np.ndarray:
    """Windows (n, 4) as torchvision's RandomResizedCrop.get_params draws them.

    Area and aspect ratio are drawn until the window lies inside the image, ten times at most; then
    the centre is taken.
    """
    window = np.empty((len(heights), 4), np.int32)
    # The ratio is uniform in its logarithm. Its root suffices: width = side * root and
    # height = side / root have the ratio root^2.
    log_root_low, log_root_high = 0.5 * np.log(spec.ratio)

    # Each try draws for all rows that are still without a window at once.
    todo = np.arange(len(heights))
    for _ in range(CROP_TRIES):
        n = len(todo)
        H, W = heights[todo], widths[todo]
        side = np.sqrt(rng.uniform(*spec.scale, n) * H * W)
        root = np.exp(rng.uniform(log_root_low, log_root_high, n))
        width = np.rint(side * root)
        height = np.rint(side / root)
        top = np.floor(rng.random(n) * (H - height + 1))
        left = np.floor(rng.random(n) * (W - width + 1))
        # Rows that failed hold nonsense until a later try or the fallback overwrites them.
        window[todo] = np.stack([top, left, height, width], 1)
        todo = todo[(width < 1) | (width > W) | (height < 1) | (height > H)]

    # The largest centred window whose ratio is allowed.
    H, W = heights[todo], widths[todo]
    height = np.minimum(H, np.rint(W / spec.ratio[0]))
    width = np.minimum(W, np.rint(H * spec.ratio[1]))
    window[todo] = np.stack([(H - height) // 2, (W - width) // 2, height, width], 1)
    return window


def _pad(
    rng: np.random.Generator,
    heights: np.ndarray,  # (n,) pixels
    widths: np.ndarray,  # (n,) pixels
    spec: PlanSpec,
) -> np.ndarray:
    """Windows (n, 4) of the output's size, anywhere in the image with `pad` pixels around it."""
    room = np.stack([heights, widths], 1) + 2 * spec.pad - spec.size + 1  # (n, 2) places
    if room.min() < 1:
        at = np.argmin(room.min(1))
        raise ValueError(
            f"size = {spec.size}: an image of {heights[at]}x{widths[at]} plus pad {spec.pad} "
            "is smaller"
        )
    corner = np.floor(rng.random(room.shape) * room) - spec.pad
    return np.concatenate([corner, np.full_like(corner, spec.size)], 1)


def _permute(rng: np.random.Generator, steps: int, n_groups: int, group_rows: int) -> np.ndarray:
    """(steps, n_groups * group_rows): the rows of every group permuted inside it."""
    keys = rng.random((steps, n_groups, group_rows), dtype=np.float32)
    inside = keys.argsort(-1, kind="stable")
    first_row = np.arange(n_groups)[:, None] * group_rows
    return (inside + first_row).reshape(steps, n_groups * group_rows)


def _shuffle(rng: np.random.Generator, steps: int, spec: PlanSpec) -> np.ndarray:
    """(steps, adv_rows): the row that comes to each place (shuffling BN, section 3.2.2).

    A step permutes the rows inside each group at random. Then they are dealt to the groups of their
    scope, always in the same way: the random part decides which rows share a group.
    """
    n_rows = spec.adv_rows
    group_rows = spec.adv_group_rows
    dealt = np.arange(n_rows)  # place -> place before the dealing
    if spec.shuffle_groups < 2:
        return np.broadcast_to(dealt, (steps, n_rows))
    for first_group in range(0, spec.adv_groups, spec.shuffle_groups):
        # The last scope is short where the groups do not divide into whole scopes.
        n_groups = min(spec.shuffle_groups, spec.adv_groups - first_group)
        first_row = first_group * group_rows
        end_row = first_row + n_groups * group_rows
        dealt[first_row:end_row] = first_row + _deal(n_groups, group_rows)
    return _permute(rng, steps, spec.adv_groups, group_rows)[:, dealt]


def _deal(n_groups: int, group_rows: int) -> np.ndarray:
    """(n_groups * group_rows,): which row comes to each place of a scope, without chance."""
    group, row = np.divmod(np.arange(n_groups * group_rows), group_rows)
    if n_groups >= 3:
        # To the other groups in turn: every row leaves its group.
        target = (group + 1 + row % (n_groups - 1)) % n_groups
    else:
        # Two groups exchange every other row: moving all would shuffle nothing.
        target = (group + row % n_groups) % n_groups
    # Sorted by target, the first `group_rows` entries are what the first group receives, and so on.
    return np.argsort(target, kind="stable")


def _mix(
    rng: np.random.Generator, steps: int, spec: PlanSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mix_lam, mix_box and mix_partner; one lambda and one box per step.

    Mixup is arXiv 1710.09412, CutMix arXiv 1905.04899.
    """
    box = np.zeros((steps, 4), np.int32)
    if spec.mix is None:
        # Every row is its own partner: mixing changes nothing.
        own = np.broadcast_to(np.arange(spec.clean_rows), (steps, spec.clean_rows))
        return np.ones(steps, np.float32), box, own
    lam = rng.beta(spec.mix_alpha, spec.mix_alpha, steps)
    if spec.mix == "cutmix":
        # A box of 1 - lambda of the image's area around a random centre, cut at the image's edge;
        # lambda is then what is left of the own image.
        half = (0.5 * np.sqrt(1 - lam) * spec.size).astype(np.int64)[:, None]
        centre = rng.integers(0, spec.size, (steps, 2))
        box = np.concatenate([centre - half, centre + half], 1).clip(0, spec.size).astype(np.int32)
        top, left, bottom, right = box.T
        lam = 1 - (bottom - top) * (right - left) / spec.size**2
    partner = _permute(rng, steps, spec.clean_groups, spec.clean_group_rows)
    return lam.astype(np.float32), box, partner
