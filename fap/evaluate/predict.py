"""What a model says of images, one after the other: the lines of a table.

The images are shown as `fap-eval` shows them, so the outputs are those that it scores.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

import pipelines
from fap.evaluate.exact import evaluating, forward
from fap.evaluate.images import Reading
from fap.evaluate.load import Trained
from fap.nets.norm import Bn
from pipelines import EpochPlan, Store
from pipelines.plan import PADDING
from pipelines.subset import SubsetStore

Lines = list[list[str]]


@dataclass(frozen=True)
class Predictor:
    """A model, and how it is asked."""

    trained: Trained  # on the device of `reading`
    reading: Reading
    top: int | None  # guesses of an image
    bn: Bn
    skip: Callable[[str], None] | None
    """Is told of every image that cannot be decoded; None: it is an error."""

    def columns(self) -> list[str]:
        """Raises ValueError for a `top` that has no meaning."""
        return ["path", *self.trained.task.prediction_columns(self.top)]

    def lines(
        self,
        store: Store,
        name: Callable[[int], str],  # of an image of `store`
    ) -> Generator[tuple[int, Lines], None, None]:
        """(images that are done, their lines), batch after batch, in the order of the store.

        Raises DamagedData.
        """
        todo = np.arange(len(store))
        while len(todo):
            part = SubsetStore(store, todo)
            plan = self._plan(part)
            n_done = 0  # batches
            try:
                for rows, lines in self._batches(part, plan, name):
                    n_done += 1
                    yield rows, lines
                return
            except pipelines.DamagedData:
                if self.skip is None:
                    raise
                bad = self._bad(part, plan, n_done)
                if not bad:  # each alone is shown: not the images' fault
                    raise
            rest = np.ones(len(todo), bool)
            rest[plan.index[:n_done].ravel()] = False
            rest[bad] = False
            todo = todo[rest]

    def _plan(self, store: Store, batch: int | None = None) -> EpochPlan:
        """The evaluation's, in which every image stands once."""
        reading = self.reading
        return pipelines.eval_plan(
            store.heights,
            store.widths,
            size=reading.size,
            resize=reading.resize,
            batch=batch or reading.batch,
            crop=reading.crop,
            filter=reading.filter,
        )

    def _loader(self, store: Store) -> pipelines.Loader:
        reading = self.reading
        back_end = reading.back_end_for(store.path)
        return pipelines.open_loader(back_end, store, size=reading.size, device=reading.device)

    def _batches(
        self, store: SubsetStore, plan: EpochPlan, name: Callable[[int], str]
    ) -> Generator[tuple[int, Lines], None, None]:
        task = self.trained.task
        data = self.trained.config.data
        model = self.trained.model
        outputs_of = forward(model, mean=data.mean, std=data.std, device=self.reading.device)
        loader = self._loader(store)
        with closing(loader), closing(loader.load(plan)) as batches:
            for batch in batches:
                with evaluating(model, self.bn):
                    outputs = outputs_of(batch.images)
                index = plan.index[batch.step]
                n = int((index != PADDING).sum())  # padding stands at the end
                found = task.predictions(
                    outputs[:n],
                    plan.window[batch.step, :n],
                    plan.place[batch.step, :n],
                    self.trained.classes,
                    self.top,
                )
                numbers = store.numbers[index[:n]].tolist()
                lines = [
                    [name(number), *line]
                    for number, of_image in zip(numbers, found, strict=True)
                    for line in of_image
                ]
                yield n, lines

    def _bad(self, store: Store, plan: EpochPlan, first: int) -> list[int]:
        """Numbers of the images that cannot be shown alone, of the first batch that has any."""
        assert self.skip is not None
        for step in range(first, len(plan)):
            bad = []
            for number in plan.index[step][plan.index[step] != PADDING].tolist():
                alone = SubsetStore(store, np.array([number]))
                try:
                    loader = self._loader(alone)
                    with closing(loader), closing(loader.load(self._plan(alone, 1))) as batches:
                        next(batches)
                except pipelines.DamagedData as error:
                    self.skip(str(error))
                    bad.append(number)
            if bad:
                return bad
        return []


def csv_bytes(lines: Sequence[Sequence[str]]) -> bytes:
    """Lines of a CSV in UTF-8; what that cannot say of a path or a name is escaped."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode(errors="backslashreplace")
