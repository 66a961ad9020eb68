"""One model evaluated on one set after the other; each result is kept as soon as it is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import PIL
import torch
from torch import Tensor

from fap.evaluate.attacked import AttackedImages, AttackedSet
from fap.evaluate.attacks import evaluate_attacked
from fap.evaluate.benchmarks import Wanted
from fap.evaluate.exact import evaluate
from fap.evaluate.images import Opened
from fap.evaluate.load import Trained
from fap.evaluate.pictures import file_of, write_pictures
from fap.evaluate.results import Results, digest
from fap.evaluate.sets import EvalSet
from fap.evaluate.titles import CLEAN
from fap.nets.norm import Bn
from fap.tasks.base import Evaluator, Result
from fap.tasks.class_counts import ClassCounter, ClassCounts
from fap.tasks.labels import Matching, match_labels
from fap.versions import versions
from pipelines.progress import progress_of, tracked
from pipelines.workers import Workers

IMAGES_OF_A_SHEET = 4


class Outcome(NamedTuple):
    """What came of a set."""

    result: Result
    counts: ClassCounts | None  # by class, of a classifier on the clean images


@dataclass(frozen=True)
class Item:
    """One set of one checkpoint."""

    set: EvalSet
    count: int  # images
    labels: str  # how they are matched
    names: tuple[str, ...] | None  # of the model's classes, as far as they are known
    known: Outcome | None  # from an earlier call
    unused: tuple[str, ...] = ()  # what in its folder belongs to it in no way, or is left out


class Both:
    """An evaluator, and what counts by class beside it: a `fap.tasks.base.Evaluator`."""

    def __init__(self, evaluator: Evaluator, counter: ClassCounter) -> None:
        self.evaluator = evaluator
        self.counter = counter

    def update(self, outputs: Tensor, references: Tensor) -> None:
        self.evaluator.update(outputs, references)
        self.counter.update(outputs, references)

    def result(self) -> Result:
        return self.evaluator.result()


def one_bn(wanted: Wanted) -> Bn:
    """The norms of one piece of work."""
    assert wanted.bn != "both"
    return wanted.bn


@contextmanager
def _stopping(workers: Workers) -> Iterator[None]:
    """Stop them where the block fails."""
    try:
        yield
    except BaseException:
        workers.stop()
        raise


@dataclass(frozen=True)
class Evaluation:
    """A model, how the user wants it evaluated, and where its results are kept."""

    trained: Trained
    wanted: Wanted
    results: Results

    def look(self, one: EvalSet) -> Item:
        """What a set is, and its result from an earlier call."""
        with one.open() as opened:
            matching = self._match(one, opened)
            known = None
            if not opened.unbuilt:
                known = self._known(one, opened, matching)
            names = self.trained.classes
            if names is None and matching.label_map is None:  # by position: the data's are its own
                names = opened.classes
            return Item(one, opened.count, matching.how, names, known, opened.unused)

    def _known(self, one: EvalSet, opened: Opened, matching: Matching) -> Outcome | None:
        """What came of a set in an earlier call, if all of it was kept."""
        name, origin = self._name_and_origin(one, opened, matching)
        task = self.trained.task
        result = self.results.find(name, origin, opened.count, one.judge(task))
        if result is None:
            return None
        if self._counter(one, matching, torch.device("cpu")) is None:
            return Outcome(result, None)
        counts = self.results.find_counts(name, origin, result, task.n_classes)
        if counts is None:
            return None
        return Outcome(result, counts)

    def evaluate(self, one: EvalSet, workers: Workers) -> Outcome:
        """The result of a set, which is kept too. `workers` are stopped where that fails."""
        one.build()
        with one.open() as opened:
            matching = self._match(one, opened)
            outcome = self._run(one, opened, matching, workers)
            result = outcome.result
            where = f"{one.key}: {one.source}"
            if result["count"] != opened.count:
                raise ValueError(
                    f"{where}: {opened.count} images, but {result['count']} were evaluated"
                )
            if opened.stamps() != opened.identity["files"]:
                raise ValueError(f"{where}: files changed while they were evaluated; start again")
            name, origin = self._name_and_origin(one, opened, matching)
            self.results.keep(name, origin, result, outcome.counts)
            return outcome

    def draw(self, one: EvalSet, workers: Workers, say: Callable[[str], Any]) -> bool:
        """Write the sheet of a set, unless it is there; False if it could not be written.

        `workers` are stopped where anything else fails.
        """
        assert self.wanted.pictures is not None
        trained = self.trained
        with one.open() as opened:
            _, origin = self._name_and_origin(one, opened, self._match(one, opened))
            name = f"{trained.config.name}-seed{trained.config.seed}"
            file = file_of(self.wanted.pictures, name, one.key, digest(origin))
            if os.path.exists(file):  # False where the folder may not be looked into
                return True
            with _stopping(workers):
                return write_pictures(
                    trained.model,
                    trained.task,
                    trained.classes,
                    opened,
                    file,
                    most=IMAGES_OF_A_SHEET,
                    mean=trained.config.data.mean,
                    std=trained.config.data.std,
                    bn=one_bn(self.wanted),
                    device=torch.device(self.wanted.device),
                    say=say,
                )

    def _counter(
        self, one: EvalSet, matching: Matching, device: torch.device
    ) -> ClassCounter | None:
        """What counts by class: on the clean images alone."""
        if one.key != CLEAN:
            return None
        return self.trained.task.class_counter(device, matching)

    def _run(self, one: EvalSet, opened: Opened, matching: Matching, workers: Workers) -> Outcome:
        data = self.trained.config.data
        device = torch.device(self.wanted.device)
        judge = one.judge(self.trained.task)
        evaluator = judge.evaluator(device, matching, opened.store)
        if isinstance(one, AttackedSet):
            assert isinstance(opened, AttackedImages)
            with _stopping(workers):
                return Outcome(self._under_attack(one, opened, matching, evaluator), None)
        counter = self._counter(one, matching, device)
        # Stopped first: else closing the batches waits for corruptions that nobody wants any more.
        with closing(opened.batches()) as batches, _stopping(workers):
            result = evaluate(
                self.trained.model,
                tracked(batches, one.key, "batch", opened.n_batches),
                evaluator if counter is None else Both(evaluator, counter),
                mean=data.mean,
                std=data.std,
                bn=one_bn(self.wanted),
                device=device,
            )
        return Outcome(result, None if counter is None else counter.result())

    def _under_attack(
        self, one: AttackedSet, opened: AttackedImages, matching: Matching, evaluator: Evaluator
    ) -> Result:
        data = self.trained.config.data
        steps = one.attack.steps_of_a_batch
        total, unit = opened.n_batches, "batch"
        if steps is not None:
            total, unit = steps * opened.n_batches, "step"
        with (
            closing(opened.numbered()) as batches,
            progress_of(total, one.key, unit, leave=False) as update,
        ):

            def told() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
                for batch in batches:
                    yield batch
                    if steps is None:
                        update(1)

            def after_step() -> None:
                if steps is not None:
                    update(1)

            return evaluate_attacked(
                self.trained.model,
                told(),
                evaluator,
                one.attack,
                label_map=matching.label_map,
                mean=data.mean,
                std=data.std,
                bn=one_bn(self.wanted),
                device=torch.device(self.wanted.device),
                after_step=after_step,
            )

    def _match(self, one: EvalSet, opened: Opened) -> Matching:
        try:
            return match_labels(
                opened.classes,
                opened.labels,
                self.trained.classes,
                self.trained.task.n_classes,
                by_position=self.wanted.by_position,
                class_map=one.class_map,
            )
        except ValueError as error:
            raise ValueError(f"{one.key}: {one.source}: {error}") from None

    def _name_and_origin(
        self, one: EvalSet, opened: Opened, matching: Matching
    ) -> tuple[str, dict[str, Any]]:
        """A result's name, and all that it depends on.

        Rather too much than too little: a result is soon computed again.
        """
        origin = {
            "set": one.key,
            "images": opened.identity,
            "checkpoint": self.trained.content,
            "labels": matching.tree(),
            "bn": self.wanted.bn,
            "device": self.wanted.device,
            "versions": versions() | {"pillow": PIL.__version__},
        }
        return f"{self.trained.config.name}-{one.key}", origin
