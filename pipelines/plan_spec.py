"""What stays fixed of the plans of a run: its rows, and how each image is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from pipelines import mixing, order
from pipelines.augment.spec import NO_AUGMENT, AugmentSpec
from pipelines.back_ends import EVAL_FILTERS, FILTERS, Filter
from pipelines.sizes import Size, sides_of

MAX_WINDOW = np.iinfo(np.int16).max  # pixels


@dataclass(frozen=True)
class PlanSpec:
    """What stays fixed for a run. Rows are global (all ranks together), sides are in pixels.

    `random_resized` is torchvision's RandomResizedCrop; `pad` its RandomCrop(size, padding=pad),
    zeros outside; `center` belongs to `eval_plan`. `letterbox` shows the whole image, its aspect
    ratio kept, at the top left corner of a canvas of any two sides (`windows.letterbox`).

    `filter` resizes the window, and sees nothing outside it. `area`: the mean over the area that an
    output pixel covers. `bilinear`: Pillow's, a triangle as wide as two pixels of the output where
    it shrinks, of the image where it enlarges. `bicubic`: Pillow's too, Keys' cubic of twice that
    width.

    Raises:
        ValueError: a field out of range, or rows that are no whole groups.
    """

    seed: int
    size: Size
    clean_rows: int
    adv_rows: int = 0
    clean_group_rows: int = 64
    adv_group_rows: int = 16
    sampling: order.Sampling = "shuffle"
    repeats: int = 1
    """How often an epoch shows each image that it shows; other images are left out for it."""
    crop: Literal["random_resized", "pad", "center", "letterbox"] = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4
    jitter: tuple[float, float] = (1.0, 1.0)
    """`letterbox`: range of a random factor on the size that just fits."""
    filter: Filter = "area"
    flip: float = 0.5
    augment: AugmentSpec = NO_AUGMENT
    """What is done to the pixels of the canvas; `eval_plan` does nothing."""
    mix: mixing.Mix | None = None
    mix_alpha: float = 1.0
    cutmix_alpha: float = 1.0
    """`either`: that of CutMix; `mix_alpha` is then that of Mixup."""
    mix_per: Literal["batch", "row"] = "batch"
    """What has a lambda and a box of its own."""
    mix_on: Literal["clean", "adv", "both"] = "clean"
    """The loaded rows that are mixed. `both` with `adv_are_copies`: the clean ones, then copied."""
    shuffle_groups: int = 0
    """Scope of the shuffle: so many adjacent adversarial groups exchange rows; below 2 none do.

    All groups: rows move between ranks. The groups of one rank: they stay on it.
    """
    adv_are_copies: bool = False
    """The adversarial rows are made from the clean ones (AdvProp): drawn for, but not loaded."""

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the canvas: of what a row shows."""
        return sides_of(self.size)

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
        minima = {"seed": 0, "clean_rows": 1, "adv_rows": 0, "pad": 0, "repeats": 1}
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
        known_crop = self.crop in ("random_resized", "pad", "center", "letterbox")
        known_mix = self.mix in (None, *get_args(mixing.Mix))
        if not (known_crop and known_mix):
            raise ValueError(f"crop = {self.crop!r}, mix = {self.mix!r}: unknown")
        self._check_order()
        self._check_mix()
        if self.filter not in FILTERS:
            raise ValueError(f"filter = {self.filter!r}: must be one of {', '.join(FILTERS)}")
        if self.crop == "center" and self.filter not in EVAL_FILTERS:
            allowed = " or ".join(map(repr, EVAL_FILTERS))
            raise ValueError(f"filter = {self.filter!r} with crop = 'center': must be {allowed}")
        self._check_canvas()
        self._check_augment()
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise ValueError(
                f"scale = {self.scale}, ratio = {self.ratio}: "
                "must be 0 < low <= high, scale at most 1"
            )

    def _check_order(self) -> None:
        if self.sampling not in get_args(order.Sampling):
            raise ValueError(f"sampling = {self.sampling!r}: must be 'shuffle' or 'balanced'")
        if self.repeats > self.loaded_rows:
            raise ValueError(
                f"repeats = {self.repeats}: a step has only {self.loaded_rows} rows to show an "
                "image in"
            )

    def _check_augment(self) -> None:
        if self.augment.moves and self.crop == "letterbox":
            raise ValueError(
                f"augment = {self.augment}: with crop = 'letterbox' colours only, "
                "since boxes do not follow"
            )
        if self.augment.on == "adv" and self.loaded_rows == self.clean_rows:
            raise ValueError("augment on 'adv': no adversarial rows are loaded")

    def _check_mix(self) -> None:
        for name, known in {
            "mix_per": ("batch", "row"),
            "mix_on": ("clean", "adv", "both"),
        }.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} = {value!r}: must be one of {', '.join(known)}")
        if self.mix is not None and self.adv_are_copies and self.mix_on != "both":
            raise ValueError(
                f"mix_on = {self.mix_on!r} with adv_are_copies: must be 'both', as rows are mixed "
                "before they are copied"
            )

    def _check_canvas(self) -> None:
        if min(self.sides) < 1 or max(self.sides) > MAX_WINDOW:
            raise ValueError(f"size = {self.size}: must be at least 1 and at most {MAX_WINDOW}")
        height, width = self.sides
        if height != width and self.mix is not None:
            raise ValueError(f"size = {self.size}: mix = {self.mix!r} takes squares only")
        if self.crop == "letterbox":
            if not 0 < self.jitter[0] <= self.jitter[1]:
                raise ValueError(f"jitter = {self.jitter}: must be 0 < low <= high")
            return
        if height != width:
            raise ValueError(
                f"size = {self.size}: crop = {self.crop!r} takes squares only, 'letterbox' any size"
            )
        if self.jitter != (1, 1):
            raise ValueError(f"jitter = {self.jitter}: only with crop = 'letterbox'")
