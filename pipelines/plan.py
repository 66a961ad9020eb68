"""The epoch is data: order, windows, flips, operations on pixels, shuffles, mixes, drawn up front.

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

from pipelines import exchanges, mixing, order, windows
from pipelines.augment import draws
from pipelines.back_ends import EvalFilter
from pipelines.plan_spec import MAX_WINDOW, PlanSpec
from pipelines.sizes import Size

PADDING = 2**32 - 1  # index of an evaluation row that holds no sample: its image is all zeros

# The streams of one epoch. Never renumber: every number drawn so far would change.
ORDER, WINDOW, FLIP, SHUFFLE, NOISE, MIX, MIX_ADV = range(7)
OPERATIONS, COLOURS, ERASING = range(16, 19)  # of the augmentation; between lie those to come

NOISE_KEYS = 2**31  # keys are int32 and not negative
MAX_PLACE = np.iinfo(np.int32).max  # pixels


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch as arrays. Row order within a step: clean groups, then adversarial groups."""

    spec: PlanSpec
    epoch: int

    # uint32 (steps, B): sample numbers.
    index: np.ndarray
    # int16 (steps, B, 4): top, left, height, width in source pixels; may reach outside.
    window: np.ndarray
    # int32 (steps, B, 4): top, left, height, width on the canvas, where the window lands. Around it
    # lie zeros. In training without `letterbox` it is all of the canvas, and a view of one row in
    # memory; with `center` it reaches outside the canvas (`windows.centred`). Of PADDING rows it is
    # empty.
    place: np.ndarray
    # bool (steps, B): the window mirrored left to right, in its place.
    flip: np.ndarray
    # What is done to the pixels of a row that is on the canvas; of the loaded rows.
    augment: draws.AugmentDraws
    # int64 (steps, n_adv): new_adv_rows = adv_rows[shuffle]; numbers as `for_rank` says.
    shuffle: np.ndarray
    # int32 (steps, n_adv_groups), >= 0: seeds the attack's random start of one group.
    noise_key: np.ndarray
    # float32 (steps,), with `mix_per: row` (steps, B): share of the row's own image; 1 without mix.
    mix_lam: np.ndarray
    # int32 (steps, 4), or (steps, B, 4): top, left, bottom, right in output pixels; empty unless
    # cutmix.
    mix_box: np.ndarray
    # int64 (steps, B): row of this plan, inside the same group; the row itself where none is mixed.
    mix_partner: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def n_adv(self) -> int:
        return self.noise_key.shape[1] * self.spec.adv_group_rows

    @property
    def n_clean(self) -> int:
        n_loaded = self.index.shape[1]
        if self.spec.adv_are_copies:
            return n_loaded
        return n_loaded - self.n_adv

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
        mix_lam = self.mix_lam
        mix_box = self.mix_box
        if mix_lam.ndim == 2:  # one for every row
            mix_lam = mix_lam[:, rows]
            mix_box = mix_box[:, rows]
        own_number = np.zeros(self.index.shape[1], np.int64)
        own_number[rows] = np.arange(len(rows))
        return replace(
            self,
            index=self.index[:, rows],
            window=self.window[:, rows],
            place=_taken(self.place, rows),
            flip=self.flip[:, rows],
            augment=self.augment.of_rows(rows),
            shuffle=shuffle,
            noise_key=self.noise_key[:, _share(n_adv_groups, rank, world)],
            mix_lam=mix_lam,
            mix_box=mix_box,
            mix_partner=own_number[self.mix_partner[:, rows]],
        )


def draw_epoch(
    spec: PlanSpec,
    heights: np.ndarray,  # (N,) pixels
    widths: np.ndarray,  # (N,) pixels
    epoch: int,
    labels: np.ndarray | None = None,  # integers (N,): for `sampling: balanced`
) -> EpochPlan:
    """Draw a training epoch; a partial last batch is dropped.

    Raises:
        ValueError: fewer images than one batch, an image too large (side > 32767) or too small
            to crop, or no labels where they are needed.
    """
    rows = spec.loaded_rows
    steps = len(heights) // rows
    if not steps:
        raise ValueError(
            f"clean_rows + adv_rows = {rows}: the data hold only {len(heights)} images"
        )
    shown = order.drawn(spec, _stream(spec, epoch, ORDER), len(heights), steps, labels)
    index = shown.ravel()
    height, width = heights[index], widths[index]
    rng = _stream(spec, epoch, WINDOW)
    place = _whole_canvas(spec)
    match spec.crop:
        case "random_resized":
            window = windows.random_resized(rng, height, width, spec.scale, spec.ratio)
        case "pad":
            window = windows.padded(rng, height, width, spec.sides[0], spec.pad)
        case "letterbox":
            window, place = windows.letterbox(rng, height, width, spec.sides, spec.jitter)
        case "center":
            raise ValueError(
                "crop = 'center': training plans take 'random_resized', 'pad' or 'letterbox'"
            )
    return _complete(spec, epoch, shown, window, place)


def eval_plan(
    heights: np.ndarray,  # (N,) pixels
    widths: np.ndarray,  # (N,) pixels
    *,
    size: Size,
    resize: int,
    batch: int,
    crop: Literal["center", "letterbox"] = "center",
    filter: EvalFilter = "bilinear",
) -> EpochPlan:
    """Every image once, in order.

    `center` shows what torchvision's Resize(resize) and CenterCrop(size) show of it; `letterbox`
    all of it, and ignores `resize`. The last step is filled with PADDING rows (empty window and
    place). Any `world` that divides `batch` may slice it.

    Raises:
        ValueError: a size that the crop does not take, or a side above MAX_PLACE.
    """
    # Groups of one row: then a batch of any size consists of whole groups.
    spec = PlanSpec(0, size, batch, clean_group_rows=1, crop=crop, filter=filter, flip=0.0)
    if crop == "letterbox":
        # Without jitter the stream decides nothing.
        rng = _stream(spec, 0, WINDOW)
        window, place = windows.letterbox(rng, heights, widths, spec.sides, spec.jitter)
    else:
        side, _ = spec.sides
        if side > resize:
            raise ValueError(f"resize = {resize}: must be at least size = {side}")
        window, place = windows.centred(heights, widths, side, resize)
        _check_places(place, resize, heights, widths)
    missing = -len(heights) % batch
    index = np.pad(np.arange(len(heights), dtype=np.uint32), (0, missing), constant_values=PADDING)
    below = ((0, missing), (0, 0))
    return _complete(spec, 0, index.reshape(-1, batch), np.pad(window, below), np.pad(place, below))


def _check_places(
    place: np.ndarray,  # (n, 4)
    resize: int,
    heights: np.ndarray,  # (n,) pixels
    widths: np.ndarray,  # (n,) pixels
) -> None:
    if place[:, 2:].max(initial=0) <= MAX_PLACE:
        return
    at = int(np.argmax(place[:, 2:].max(1)))
    raise ValueError(
        f"resize = {resize}: an image of {heights[at]} x {widths[at]} pixels would be resized to"
        f" {place[at, 2]:.0f} x {place[at, 3]:.0f}, and {MAX_PLACE} a side is the most"
    )


def _whole_canvas(spec: PlanSpec) -> np.ndarray:
    """(1, 4): the place of every row, in memory once."""
    return np.array([[0, 0, *spec.sides]], np.int32)


def _taken(place: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`place[:, rows]`; where all rows are one in memory, so they are in what this returns."""
    if place.strides[:2] == (0, 0):
        return np.broadcast_to(place[:1, :1], (len(place), len(rows), 4))
    return place[:, rows]


def _share(n: int, rank: int, world: int) -> slice:
    """The part of one rank where n things in a row are divided among `world` ranks."""
    each = n // world
    return slice(rank * each, (rank + 1) * each)


def _stream(spec: PlanSpec, epoch: int, field: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([spec.seed, epoch, field])))


def _augmented(spec: PlanSpec, epoch: int, steps: int) -> draws.AugmentDraws:
    clean = np.arange(spec.loaded_rows) < spec.clean_rows
    chosen = {"both": clean | True, "clean": clean, "adv": ~clean}
    return draws.drawn(
        spec.augment,
        _stream(spec, epoch, OPERATIONS),
        _stream(spec, epoch, COLOURS),
        _stream(spec, epoch, ERASING),
        steps=steps,
        chosen=chosen[spec.augment.on],
        sides=spec.sides,
    )


def _complete(
    spec: PlanSpec,
    epoch: int,
    index: np.ndarray,  # (steps, B)
    window: np.ndarray,  # (steps * B, 4)
    place: np.ndarray,  # (steps * B, 4), or (1, 4) for all rows
) -> EpochPlan:
    """Add the fields that do not depend on the images' sizes."""
    steps = len(index)
    places = place.astype(np.int32)
    if len(places) == 1:
        places = np.broadcast_to(places, (*index.shape, 4))
    if window.max(initial=0) > MAX_WINDOW:
        raise ValueError(
            f"images with a side above {MAX_WINDOW} pixels: shrink them (fap-convert --max-side)"
        )
    noise_shape = (steps, spec.adv_groups)
    mixes = mixing.mixed(spec, steps, _stream(spec, epoch, MIX), _stream(spec, epoch, MIX_ADV))
    return EpochPlan(
        spec=spec,
        epoch=epoch,
        index=index,
        window=window.astype(np.int16).reshape(*index.shape, 4),
        place=places.reshape(*index.shape, 4),
        flip=_stream(spec, epoch, FLIP).random(index.shape, dtype=np.float32) < spec.flip,
        augment=_augmented(spec, epoch, steps),
        shuffle=exchanges.shuffled(
            _stream(spec, epoch, SHUFFLE),
            steps,
            spec.adv_groups,
            spec.adv_group_rows,
            spec.shuffle_groups,
        ),
        noise_key=_stream(spec, epoch, NOISE).integers(0, NOISE_KEYS, noise_shape, dtype=np.int32),
        mix_lam=mixes.lam,
        mix_box=mixes.box,
        mix_partner=mixes.partner,
    )
