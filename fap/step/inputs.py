"""The static tensors that a step reads. A captured graph reads the same memory in every replay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fap.config import Config
from fap.step.rows import Rows, cutmix, mixup
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
    images: Tensor  # uint8 (n_clean + loaded adversarial rows, 3, H, W), channels_last
    targets: Tensor  # (n_clean + loaded adversarial rows, ...)
    shuffle: Tensor  # int64 (n_adv,): new rows = rows[shuffle], in the numbering of its scope
    noise_key: Tensor  # int32 (groups of adversarial rows,)
    lr: Tensor  # float32 ()
    mix_lam: Tensor  # float32 ()
    mix_box: Tensor  # int64 (4,): top, left, bottom, right in pixels
    mix_partner: Tensor  # int64 (n_clean,)
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
        return cls(
            n_clean=n_clean,
            images=image_buffer(n_loaded, sides, torch.uint8, device),
            targets=task.empty_targets(n_loaded, device),
            shuffle=torch.arange(n_adv, device=device),
            noise_key=torch.zeros(n_adv_groups, dtype=torch.int32, device=device),
            lr=torch.zeros((), device=device),
            mix_lam=torch.ones((), device=device),
            mix_box=torch.zeros(4, dtype=torch.int64, device=device),
            mix_partner=torch.arange(n_clean, device=device),
            pixels=torch.arange(sides[0], device=device),
        )

    def clean_rows(self, mix: str | None, dtype: torch.dtype) -> Rows:
        """Mixed with their partners if the run mixes: `data.mix`. The targets are their own."""
        images = self.images[: self.n_clean]
        targets = self.targets[: self.n_clean]
        match mix:
            case "mixup":
                images = mixup(images.to(dtype), self.mix_partner, self.mix_lam.to(dtype))
            case "cutmix":
                images = cutmix(images.to(dtype), self.mix_partner, self.mix_box, self.pixels)
        return Rows(images, targets)

    def attacked_rows(self, copies: bool, dtype: torch.dtype) -> Rows:
        """What is attacked, as it was loaded: rows of its own, or `copies` of the clean ones."""
        first = self.n_clean
        if copies:
            first = 0
        return Rows(self.images[first:].to(dtype), self.targets[first:])
