"""The evaluation of data.val while a run trains, all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import pipelines
from fap.config import Config
from fap.distributed import Ranks
from fap.evaluate.exact import evaluate
from fap.run.data import RunData, closing, open_loader
from fap.step.half import Amp
from fap.tasks.base import Result, Task


class Validation:
    """Each call evaluates a model on every image of data.val, through the main norms."""

    def __init__(
        self,
        config: Config,
        data: RunData,
        task: Task,
        ranks: Ranks,
        device: torch.device,
        amp: Amp,
        say: Callable[[str], Any],
    ) -> None:
        self.config = config
        self.data = data
        self.task = task
        self.ranks = ranks
        self.device = device
        self.amp = amp
        self.say = say
        # A package that it needs and that is missing is noticed now, not after an epoch.
        task.evaluator(device, data.matching, data.val)

    def __call__(
        self,
        model: nn.Module,
        before_each_batch: Callable[[], None],  # called as often on every rank
    ) -> Result:
        store = self.data.val
        plan = self._plan()
        references = self.task.references(store, plan).to(self.device)
        with closing(open_loader(self.config, store, self.device), self.say) as loader:

            def batches() -> Iterator[tuple[Tensor, Tensor]]:
                for batch in loader.load(plan):
                    before_each_batch()
                    yield batch.images, references[batch.step]

            result = evaluate(
                model,
                batches(),
                self.task.evaluator(self.device, self.data.matching, store),
                mean=self.config.data.mean,
                std=self.config.data.std,
                device=self.device,
                amp=self.amp,
            )
        del result["count"]  # that of data.val
        return result

    def _plan(self) -> pipelines.EpochPlan:
        """This rank's rows: as many batches as every other rank has, the last one padded."""
        rows = self.config.run.eval_batch or self.task.eval_batch
        rows_per_rank = max(1, rows // self.ranks.world)
        plan = pipelines.eval_plan(
            self.data.val.heights,
            self.data.val.widths,
            size=self.config.data.size,
            resize=self.config.data.resize,
            batch=rows_per_rank * self.ranks.world,
            crop=self.config.data.eval_crop,
            filter=self.config.data.eval_filter,
        )
        return plan.for_rank(self.ranks.rank, self.ranks.world)


def in_words(result: Result, task: Task) -> str:
    """`top-1 76.20%, top-5 93.00%, loss 0.9612`: percentages first."""
    percents = {name: words for name, words in task.percents.items() if name in result}
    parts = [f"{words} {result[name]:.2%}" for name, words in percents.items()]
    parts += [f"{name} {v:.4f}" for name, v in result.items() if name not in task.percents]
    return ", ".join(parts)
