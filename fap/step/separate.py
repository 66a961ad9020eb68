"""A separate attack: K steps of PGD, with input gradients only, before the passes that train.

Of the methods that do not recycle the attack's gradient: AdvProp, decoupled training, adversarial
training and Det-AdvProp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fap.nets.norm import Group
from fap.sections import MethodConfig
from fap.step.attack import Attack
from fap.step.losses import Losses
from fap.step.network import Network
from fap.step.rows import Aim, Rows, in_one
from fap.tasks.base import Task


class SeparateAttack:
    """It crafts and does not train: weights, statistics and counts of rows stay as they are."""

    def __init__(
        self,
        attack: Attack,
        network: Network,
        task: Task,
        losses: Losses,
        method: MethodConfig,
        scale: Tensor,  # float32 (), static: of the loss, under float16
        n_parts: int,  # into which the rows are divided, each of whole groups
    ) -> None:
        self.attack = attack
        self.network = network
        self.task = task
        self.losses = losses
        self.method = method
        self.group_rows = method.adv_group_rows
        self.scale = scale
        self.n_parts = n_parts

    def craft(
        self,
        started: Tensor,  # (n, 3, H, W) grey levels: where the attack starts
        source: Rows,  # n clean images, and what they should come to
        keys: Tensor,  # int32 (groups,)
        pictures: Tensor | None,  # bool (n, 1, H, W), see `Attack`
    ) -> Tensor:  # (n, 3, H, W) grey levels
        """The adversarial images, one part of the rows after the other."""
        if not self.method.entry.takes_gradients:
            return self.attack.advance(started, source.images_255, None, keys, pictures)

        aimed = source.aim
        if self.method.targeted:
            aimed = aimed.retargeted(lambda targets: self.task.wrong_targets(keys, targets))
        attacked = AttackedRows(started, source.images_255, aimed, source.aim, keys, pictures)
        n_groups = len(keys) // self.n_parts
        parts = [
            attacked.groups(i * n_groups, (i + 1) * n_groups, self.group_rows)
            for i in range(self.n_parts)
        ]
        return in_one([self._crafted(part) for part in parts])

    def _crafted(self, rows: AttackedRows) -> Tensor:
        if self.method.attack_loss != "max":
            return self._pgd(rows, self.method.attack_loss or "total")

        # Det-AdvProp (Chen et al., CVPR 2021): an image from each part of the loss; of
        # every row the one with the largest total loss, by its true target, is trained.
        images: Tensor | None = None
        largest: Tensor | None = None
        for part in self.task.loss_parts:
            crafted = self._pgd(rows, part)
            with torch.no_grad():
                outputs = self.network(self._normalised(crafted), self._groups(len(crafted)))
                losses = self.losses.of_attack(outputs, rows.true_aim, "total")
            if images is None or largest is None:
                images, largest = crafted, losses
                continue
            worse = losses > largest
            images = torch.where(worse.view(-1, 1, 1, 1), crafted, images)
            largest = torch.where(worse, losses, largest)
        assert images is not None
        return images

    def _pgd(self, rows: AttackedRows, part: str) -> Tensor:
        """K steps away from or towards `rows.aimed`, by a part of the loss."""
        current = rows.started
        for _ in range(self.attack.n_steps):
            leaf = self._normalised(current).requires_grad_()
            # No leaf goes in: see `Network.probing`.
            outputs = self.network(leaf.view_as(leaf), self._groups(len(leaf)))
            loss = self.losses.of_attack(outputs, rows.aimed, part).mean()
            if self.n_parts > 1:
                loss = loss / self.n_parts  # the mean is that over all rows
            (gradient,) = torch.autograd.grad(loss * self.scale, leaf)
            current = self.attack.advance(current, rows.clean, gradient, rows.keys, rows.pictures)
        return current

    def _groups(self, n_rows: int) -> list[Group]:
        """Calls of no average: an attack crafts, it does not train, so it moves no statistics."""
        bn = self.method.norms["adv"]
        if self.method.attack_bn == "running":
            return [Group(bn, n_rows, running=True)]
        return [Group(bn, self.group_rows)] * (n_rows // self.group_rows)

    def _normalised(self, images_255: Tensor) -> Tensor:
        x = torch.empty_like(images_255, memory_format=torch.channels_last)
        self.network.normalise(images_255, out=x)
        return x


class AttackedRows(NamedTuple):
    """What is attacked together."""

    started: Tensor  # (n, 3, H, W) grey levels
    clean: Tensor  # (n, 3, H, W) grey levels: centres of the balls
    aimed: Aim  # away from or towards which the attack goes
    true_aim: Aim
    keys: Tensor  # int32 (groups,)
    pictures: Tensor | None  # bool (n, 1, H, W)

    def groups(self, first: int, stop: int, group_rows: int) -> AttackedRows:
        """Those of some groups alone."""

        def own(tensor: Tensor) -> Tensor:
            return tensor[first * group_rows : stop * group_rows]

        return AttackedRows(
            own(self.started),
            own(self.clean),
            self.aimed.each(own),
            self.true_aim.each(own),
            self.keys[first:stop],
            None if self.pictures is None else own(self.pictures),
        )
