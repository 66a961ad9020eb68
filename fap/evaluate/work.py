"""The work of `fap-eval`: look at everything, then evaluate the sets that have no result yet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import PIL
import torch
from torch import Tensor

from fap.config import Config
from fap.evaluate.attacked import AttackedImages, AttackedSet
from fap.evaluate.attacks import evaluate_attacked
from fap.evaluate.benchmarks import Wanted, eval_sets
from fap.evaluate.exact import evaluate
from fap.evaluate.images import Opened, Reading
from fap.evaluate.load import Trained, WhichWeights
from fap.evaluate.models import Model
from fap.evaluate.pictures import file_of, write_pictures
from fap.evaluate.results import Results, digest
from fap.evaluate.sets import EvalSet
from fap.evaluate.training import Training, training_of
from fap.nets.dual import has_aux
from fap.nets.norm import Bn
from fap.tasks.base import Evaluator, Result, Task
from fap.tasks.class_counts import ClassCounter, ClassCounts
from fap.tasks.labels import Matching, match_labels
from fap.versions import versions
from pipelines import Store
from pipelines.corrupt import SMALL
from pipelines.progress import progress_of, tracked
from pipelines.workers import Workers

CLEAN = "clean"  # the key of the set of clean images
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


@dataclass(frozen=True)
class Work:
    """One model, the norms it is evaluated through, and the sets to evaluate it on."""

    model: Model
    content: str  # of the checkpoint
    task: Task
    config: Config
    step: int
    classes: tuple[str, ...] | None
    items: list[Item]
    unused: list[str]  # what belongs to no set in the benchmarks' folders
    weights: WhichWeights
    bn: Bn
    training: Training | None  # None of plain weights
    notes: tuple[str, ...] = ()  # on plain weights: what was chosen or left out of them


@dataclass(frozen=True)
class Report:
    """What a checkpoint reached, and all that a reader must know about it."""

    task: Task
    checkpoint: str
    name: str
    seed: int
    step: int
    paper: dict[str, float]  # the paper's numbers, percent
    small: bool  # images so small that corruptions have other strengths than ImageNet-C's
    settings: dict[str, Any]
    labels: dict[str, str]  # how they were matched, by set
    unused: list[str]
    results: dict[str, Result]  # by set
    names: tuple[str, ...] | None = None  # of the model's classes
    counts: ClassCounts | None = None  # by class, of the clean images
    weights: WhichWeights = "raw"
    content: str = ""  # what the checkpoint is, wherever it lies
    training: Training | None = None  # None: nobody knows it, as of plain weights

    def tree(self) -> dict[str, Any]:
        """As JSON; the checkpoint says which task it is of, and other files have the counts."""
        left_out = {"task", "names", "counts"}
        tree = {name: value for name, value in vars(self).items() if name not in left_out}
        return tree | {"training": None if self.training is None else asdict(self.training)}


def look(
    model: Model, wanted: Wanted, data: Store, workers: Workers, results: Results
) -> list[Work]:
    """Check a model and every set before any of the work is done: files, labels, class names.

    `data`: the store of `wanted.data`. One piece of work for each kind of norms. Raises ValueError,
    OSError, ImportError, DamagedCheckpoint or DamagedData.
    """
    trained = model.load()
    return [
        _look(model, trained, replace(wanted, bn=bn), data, workers, results)
        for bn in _norms(model, trained, wanted)
    ]


def _norms(model: Model, trained: Trained, wanted: Wanted) -> tuple[Bn, ...]:
    """Those to evaluate a model through. Raises ValueError."""
    with_aux = has_aux(trained.model)
    if wanted.bn == "both":
        return ("main", "aux") if with_aux else ("main",)
    if wanted.bn == "aux" and not with_aux:
        raise ValueError(
            f"--bn aux: {model.source} was trained without auxiliary norms; only main is there"
        )
    return (wanted.bn,)


def _look(
    model: Model, trained: Trained, wanted: Wanted, data: Store, workers: Workers, results: Results
) -> Work:
    config = trained.config
    reading = Reading.of(
        trained.task,
        config.data,
        batch=wanted.batch,
        device=wanted.device,
        back_end=wanted.back_end,
    )
    sets, unused = eval_sets(wanted, reading, data, workers)
    evaluation = _Evaluation(trained, wanted, results)
    items = [evaluation.look(one) for one in tracked(sets, "looking at the data", "set")]
    return Work(
        model=model,
        content=trained.content,
        task=trained.task,
        config=config,
        step=trained.step,
        classes=trained.classes,
        items=items,
        unused=list(dict.fromkeys([*unused, *(line for item in items for line in item.unused)])),
        notes=trained.notes,
        weights=trained.weights,
        bn=_one_bn(wanted),
        training=None if trained.meta is None else training_of(trained.meta),
    )


def carry_out(
    work: Work, wanted: Wanted, workers: Workers, results: Results, say: Callable[[str], Any]
) -> Report:
    """Evaluate what has no result yet; each result is kept as soon as it is there.

    Raises as `look`, and ValueError if a file changed in the meantime.
    """
    wanted = replace(wanted, bn=work.bn)
    found = {item.set.key: item.known for item in work.items if item.known is not None}
    todo = [item.set for item in work.items if item.known is None]
    draws = wanted.pictures is not None and type(work.task).pictures is not Task.pictures
    if todo or draws:
        trained = work.model.load(wanted.device)
        if trained.content != work.content:
            raise ValueError(
                f"{work.model.source}: the file changed since it was looked at; start again"
            )
        evaluation = _Evaluation(trained, wanted, results)
        for one in tracked(todo, work.config.name, "set"):
            outcome = evaluation.evaluate(one, workers)
            found[one.key] = outcome
            say(f"  {one.key}: {one.in_words(work.task, outcome.result)}")
        if draws:
            for item in tracked(work.items, "pictures", "set"):
                if not evaluation.draw(item.set, workers, say):
                    break  # nor could the others be written
    return _report(work, wanted, found)


def _report(work: Work, wanted: Wanted, found: dict[str, Outcome]) -> Report:
    (clean,) = [item for item in work.items if item.set.key == CLEAN]
    return Report(
        task=work.task,
        checkpoint=str(work.model.source),
        name=work.config.name,
        seed=work.config.seed,
        step=work.step,
        paper={str(name): number for name, number in work.config.paper.items()},
        small=max(work.config.data.sides) <= SMALL,
        settings={
            "data": f"{wanted.data}, {wanted.part}" if wanted.part else str(wanted.data),
            "bn": work.bn,
            "seed": wanted.seed,
            "batch": wanted.batch or work.task.eval_batch,
        }
        | {attack.key: attack.words for attack in wanted.attacks},
        labels={item.set.key: item.labels for item in work.items},
        unused=work.unused,
        results={item.set.key: found[item.set.key].result for item in work.items},
        names=clean.names,
        counts=found[CLEAN].counts,
        weights=work.weights,
        content=work.content,
        training=work.training,
    )


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


def _one_bn(wanted: Wanted) -> Bn:
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
class _Evaluation:
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
                    bn=_one_bn(self.wanted),
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
                bn=_one_bn(self.wanted),
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
                bn=_one_bn(self.wanted),
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
