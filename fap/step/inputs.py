"""The static tensors that a step reads. A captured graph reads the same memory in every replay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fap.config import Config
from fap.sections import DataConfig
from fap.step.rows import Aim, Rows, cutmix, mixup, mixup_or_cutmix
from fap.tasks.base import Task


def image_buffer(
    n: int, sides: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros (n, 3, *sides), channels_last."""
    nhwc = torch.zeros((n, *sides, 3), dtype=dtype, device=device)
    return nhwc.permute(0, 3, 1, 2)


@dataclass
class Inputs:
    """A batch of the loader, and the plan's draws for it. `n_clean` clean rows come first."""

    n_clean: int
    data: DataConfig  # of which `mix` and what belongs to it are read
    images: Tensor  # uint8 (n_clean + loaded adversarial rows, 3, H, W), channels_last
    targets: Tensor  # (n_clean + loaded adversarial rows, ...)
    shuffle: Tensor  # int64 (n_adv,): new rows = rows[shuffle], in the numbering of its scope
    noise_key: Tensor  # int32 (groups of adversarial rows,)
    place: Tensor  # int64 (as targets, 4): where on the canvas the picture is: see `EpochPlan`
    lr: Tensor  # float32 ()
    mix_lam: Tensor  # float32 (), or (as targets,) with `data.mix_per: row`
    mix_box: Tensor  # int64 (4,), or (as targets, 4): top, left, bottom, right in pixels
    mix_partner: Tensor  # int64 (as targets,)
    pixels: Tensor  # int64 (H,): 0, 1, ...; never fed; what is mixed is square

    @classmethod
    def empty(
        cls,
        config: Config,
        task: Task,
        device: torch.device,
        *,
        n_clean: int,  # rows of one device, as all counts here
        n_loaded_adv: int,
        n_adv: int,
        n_adv_groups: int,
    ) -> Inputs:
        sides = config.data.sides
        n_loaded = n_clean + n_loaded_adv
        of_mixes: tuple[int, ...] = ()
        if config.data.mix_per == "row":
            of_mixes = (n_loaded,)
        return cls(
            n_clean=n_clean,
            data=config.data,
            images=image_buffer(n_loaded, sides, torch.uint8, device),
            targets=task.empty_targets(n_loaded, device),
            shuffle=torch.arange(n_adv, device=device),
            noise_key=torch.zeros(n_adv_groups, dtype=torch.int32, device=device),
            place=torch.tensor([0, 0, *sides], device=device).repeat(n_loaded, 1),
            lr=torch.zeros((), device=device),
            mix_lam=torch.ones(of_mixes, device=device),
            mix_box=torch.zeros((*of_mixes, 4), dtype=torch.int64, device=device),
            mix_partner=torch.arange(n_loaded, device=device),
            pixels=torch.arange(sides[0], device=device),
        )

    def resize(self, sides: tuple[int, int]) -> None:
        """Take images of another size, each of which fills its canvas."""
        n, device = len(self.images), self.images.device
        self.images = image_buffer(n, sides, torch.uint8, device)
        self.place = torch.tensor([0, 0, *sides], device=device).repeat(n, 1)
        self.pixels = torch.arange(sides[0], device=device)

    def clean_rows(self, dtype: torch.dtype) -> Rows:
        """Mixed with their partners if the run mixes them: `data.mix_on`."""
        return self._rows(slice(0, self.n_clean), self.data.mixes_clean, dtype)

    def attacked_rows(
        self,
        copied: Rows | None,  # None: rows of its own are attacked
        dtype: torch.dtype,
    ) -> Rows:
        """What is attacked, mixed before if the run mixes it: own rows, or copies."""
        rows = copied
        if rows is None:
            rows = self._rows(slice(self.n_clean, None), self.data.mixes_adv, dtype)
        return Rows(rows.images_255.to(dtype), rows.aim)

    def attacked_places(self, copies: bool) -> Tensor:
        first = 0 if copies else self.n_clean
        return self.place[first:]

    def _rows(self, part: slice, mixes: bool, dtype: torch.dtype) -> Rows:
        """Some of the loaded rows; `dtype` is that of images that are blends of two."""
        images = self.images[part]
        targets = self.targets[part]
        if not mixes:
            return Rows(images, Aim(targets))
        partner = self.mix_partner[part]
        others = self.images[partner]
        lam = self.mix_lam
        box = self.mix_box
        if self.data.mix_per == "row":
            lam = lam[part]
            box = box[part]
        match self.data.mix:
            case "mixup":
                images = mixup(images.to(dtype), others.to(dtype), lam.to(dtype))
            case "cutmix":
                images = cutmix(images, others, box, self.pixels)
            case "either":
                images = mixup_or_cutmix(
                    images.to(dtype), others.to(dtype), lam.to(dtype), box, self.pixels
                )
        return Rows(images, Aim(targets, self.targets[partner], lam.expand(len(partner))))
