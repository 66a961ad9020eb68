"""The work of `fap-eval`: look at everything, then evaluate the sets that have no result yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from fap.config import Config
from fap.evaluate.benchmarks import Wanted, eval_sets
from fap.evaluate.evaluation import Evaluation, Item, Outcome, one_bn
from fap.evaluate.images import Reading
from fap.evaluate.load import Trained, WhichWeights
from fap.evaluate.models import Model, check_bn
from fap.evaluate.results import Results
from fap.evaluate.titles import CLEAN
from fap.evaluate.training import Training, training_of
from fap.nets.dual import has_aux
from fap.nets.norm import Bn
from fap.tasks.base import Result, Task
from fap.tasks.class_counts import ClassCounts
from pipelines import Store
from pipelines.corrupt import SMALL
from pipelines.progress import tracked
from pipelines.workers import Workers


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
    if wanted.bn == "both":
        return ("main", "aux") if has_aux(trained.model) else ("main",)
    check_bn(model, trained, wanted.bn)
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
    evaluation = Evaluation(trained, wanted, results)
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
        bn=one_bn(wanted),
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
        evaluation = Evaluation(trained, wanted, results)
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
