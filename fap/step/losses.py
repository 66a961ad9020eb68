"""The losses of rows: of those that a pass trains, and of those that an attack moves.

Of mixed rows (Mixup, CutMix) it is the mean over both targets, in training as in the attack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fap.methods import Kind
from fap.step.metrics import Metrics
from fap.step.passes import Block, BlockKind, Pass
from fap.step.rows import Aim, Rows, split_aim_by_group, split_by_group
from fap.step.weights import Weights
from fap.tasks.base import Task


class Losses:
    """Asks the task, weighs its answers, and counts the metrics of what is trained."""

    def __init__(self, task: Task, weights: Weights, metrics: Metrics) -> None:
        self.task = task
        self.weights = weights
        self.metrics = metrics

    def of_pass(
        self,
        one: Pass,
        outputs: Tensor,  # of the pass's rows
        rows: Mapping[BlockKind, Rows],  # all rows of the step
    ) -> Tensor:  # ()
        """The weighted sum of the losses of a pass's rows; also counts their metrics."""
        loss = outputs.new_zeros(())
        for block in one.blocks:
            aim = rows[block.kind].aim
            loss = loss + self._of_block(block, outputs[block.rows], aim)
        return loss

    def of_attack(
        self,
        outputs: Tensor,  # of n rows
        aim: Aim,
        part: str,  # "total", or one of the task's `loss_parts`
    ) -> Tensor:  # (n,)
        """What an attack ascends, row by row; nothing is counted."""
        losses = self.task.attack_losses(outputs, aim.targets, part)
        return self._mixed(
            losses, aim, lambda targets: self.task.attack_losses(outputs, targets, part)
        )

    def _of_block(
        self,
        block: Block,
        outputs: Tensor,  # of the block's rows
        aim: Aim,  # of all rows of the block's kind
    ) -> Tensor:  # ()
        own = aim.each(lambda part: part[block.start : block.stop])
        if block.kind == "joined":
            noise, adv = split_by_group(outputs, len(block.groups))
            noise_aim, adv_aim = split_aim_by_group(own, len(block.groups))
            noise_loss = self._of_kind("noise", noise, noise_aim)
            return noise_loss + self._of_kind("adv", adv, adv_aim)
        return self._of_kind(block.kind, outputs, own)

    def _of_kind(self, kind: Kind, outputs: Tensor, aim: Aim) -> Tensor:  # ()
        """Of a mixed row a hit is its own target's."""
        losses, hits = self.task.losses_and_hits(outputs, aim.targets)
        losses = self._mixed(losses, aim, lambda targets: self.task.losses(outputs, targets))
        self.metrics.count_rows(kind, losses, hits)
        return losses.sum() * self.weights.of_row[kind]

    def _mixed(
        self,
        losses: Tensor,  # (rows,): by the rows' own targets
        aim: Aim,
        losses_by: Callable[[Tensor], Tensor],  # targets (rows, ...) -> (rows,)
    ) -> Tensor:  # (rows,)
        """Each target's loss times the task's weight of it; of mixed rows that of both targets."""

        def weighted(losses: Tensor, targets: Tensor) -> Tensor:
            weights = self.task.row_weights(targets)
            if weights is None:
                return losses
            return losses * weights.to(losses.dtype)

        own = weighted(losses, aim.targets)
        return aim.mixed(own, lambda targets: weighted(losses_by(targets), targets))
