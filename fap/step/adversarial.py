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

    def restart(self, images_255: Tensor) -> None:
        """Fill another buffer from here on, of images of another size; there is no carry yet."""
        self.rows = self.rows._replace(images_255=images_255)
        self.carries.fill_(False)

    def publish(self, crafted: Rows) -> None:
        """Make crafted rows the adversarial ones of the next pass.

        With `pipelined` they are those of the next step, which shuffles them.
        """
        if not self.pipelined:
            crafted = self._shuffled(crafted)
        for name, value in crafted.named().items():
            self.rows.named()[name].copy_(value)
        self.carries.fill_(True)

    def joined_with(self, noise: Rows, n_groups: int) -> Rows:
        """pipelined: every group holds its noise rows and as many shuffled rows of the carry.

        The first step has no carry yet: its own noise rows stand in.
        """
        carry = self.rows.each_with(noise, self._carried)
        return join_by_group(noise, self._shuffled(carry), n_groups)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on: the carry."""
        if not self.pipelined:
            return {}
        state = {f"carry.{name}": value for name, value in self.rows.named().items()}
        return state | {"carry.filled": self.carries}

    def _carried(self, carry: Tensor, noise: Tensor) -> Tensor:
        return torch.where(self.carries, carry, noise)

    def _shuffled(self, rows: Rows) -> Rows:
        return shuffled(rows, self.order, self.scope, self.ranks)
