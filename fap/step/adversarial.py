"""The adversarial rows of a step: who made them, and which pass or step trains them."""

from __future__ import annotations

import torch
from torch import Tensor

from fap.distributed import Ranks
from fap.sections import MethodConfig
from fap.step.rows import Rows, join_by_group, shuffled


class AdversarialRows:
    """Static buffers that a crafting pass, or an attack of its own, fills."""

    def __init__(
        self,
        buffers: Rows,  # of all adversarial rows of this device
        method: MethodConfig,
        ranks: Ranks,
        order: Tensor,  # int64 (n_adv,), static: the plan's shuffle of the step
    ) -> None:
        self.rows = buffers
        self.pipelined = method.schedule == "pipelined"
        self.scope = method.shuffle or "off"
        self.ranks = ranks
        self.order = order
        # pipelined: is there a carry of the step before?
        self.carries = torch.zeros((), dtype=torch.bool, device=order.device)

    def publish(self, images_255: Tensor, targets: Tensor) -> None:
        """Make crafted rows the adversarial ones of the next pass.

        With `pipelined` they are those of the next step, which shuffles them.
        """
        crafted = Rows(images_255, targets)
        if not self.pipelined:
            crafted = self._shuffled(crafted)
        self.rows.images_255.copy_(crafted.images_255)
        self.rows.targets.copy_(crafted.targets)
        self.carries.fill_(True)

    def joined_with(self, noise: Rows, n_groups: int) -> Rows:
        """pipelined: every group holds its noise rows and as many shuffled rows of the carry.

        The first step has no carry yet: its own noise rows stand in.
        """
        carry = Rows(
            torch.where(self.carries, self.rows.images_255, noise.images_255),
            torch.where(self.carries, self.rows.targets, noise.targets),
        )
        return join_by_group(noise, self._shuffled(carry), n_groups)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on: the carry."""
        if not self.pipelined:
            return {}
        return {
            "carry.images_255": self.rows.images_255,
            "carry.targets": self.rows.targets,
            "carry.filled": self.carries,
        }

    def _shuffled(self, rows: Rows) -> Rows:
        return shuffled(rows, self.order, self.scope, self.ranks)
