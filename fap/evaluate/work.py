"""The work of `fap-eval`: look at everything first, then evaluate the sets that have no result yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
from tqdm import tqdm

from fap.config import Config
from fap.evaluate.benchmarks import EvalSet, Opened, Wanted, eval_sets
from fap.evaluate.exact import evaluate
from fap.evaluate.load import Trained, load_model
from fap.evaluate.results import Results
from fap.tasks.base import Result
from fap.tasks.labels import Matching
from fap.versions import versions
from pipelines import Store
from pipelines.corrupt import SMALL
from pipelines.workers import Workers


@dataclass(frozen=True)
class Item:
    """One set of one checkpoint."""

    set: EvalSet
    count: int  # images
    labels: str  # how they are matched
    known: Result | None  # from an earlier call


@dataclass(frozen=True)
class Work:
    """One checkpoint and the sets to evaluate it on."""

    path: Path
    content: str  # of the checkpoint
    config: Config
    step: int
    classes: tuple[str, ...] | None
    items: list[Item]
    unused: list[str]  # what belongs to no set in the benchmarks' folders


def look(path: Path, wanted: Wanted, data: Store, workers: Workers, results: Results) -> Work:
    """Check the checkpoint and every set before any of the work is done: files, labels, class
    names.

    `data`: the store of `wanted.data`. Raises ValueError, OSError, ImportError, DamagedCheckpoint
    or DamagedData.
    """
    trained = load_model(path)
    if wanted.bn == "aux" and not any(
        name.endswith("aux.running_mean") for name in trained.model.state_dict()
    ):
        raise ValueError(
            f"--bn aux: {path} was trained without auxiliary batch norms; only main is there"
        )
    config = trained.config
    size = config.data.size
    sets, unused = eval_sets(trained.task, wanted, data, size, config.data.resize, workers)
    items = []
    for one in tqdm(sets, "looking at the data", leave=False, disable=None, delay=1):
        with one.open() as opened:
            matching = _match(one, opened, trained, wanted)
            known = None
            if opened.build is None:
                name, origin = _name_and_origin(one, opened, trained, matching, wanted)
                known = results.find(name, origin, opened.count, trained.task)
            items.append(Item(one, opened.count, matching.how, known))
    return Work(
        path, trained.content, config, trained.meta.step, trained.meta.train.classes, items, unused
    )


def carry_out(
    work: Work, wanted: Wanted, workers: Workers, results: Results, say: Callable[[str], Any]
) -> dict[str, Any]:
    """Evaluate what has no result yet; each result is kept as soon as it is there. Returns the
    checkpoint's report.

    Raises as `look`, and ValueError if a file changed in the meantime.
    """
    found = {item.set.key: item.known for item in work.items if item.known is not None}
    todo = [item.set for item in work.items if item.known is None]
    if todo:
        trained = load_model(work.path, wanted.device)
        if trained.content != work.content:
            raise ValueError(f"{work.path}: the file changed since it was looked at; start again")
        for one in tqdm(todo, work.config.name, unit="set", disable=None):
            found[one.key] = result = _evaluate(one, trained, wanted, workers, results)
            words = trained.task.percents[trained.task.primary]
            reached = result[trained.task.primary]
            say(f"  {one.key}: {words} {reached:.2%} of {result['count']:,} images")
    return {
        "checkpoint": str(work.path),
        "name": work.config.name,
        "seed": work.config.seed,
        "step": work.step,
        "paper": dict(work.config.paper),
        "small": work.config.data.size <= SMALL,
        "settings": {
            "data": str(wanted.data),
            "bn": wanted.bn,
            "seed": wanted.seed,
            "batch": wanted.batch,
        },
        "labels": {item.set.key: item.labels for item in work.items},
        "unused": work.unused,
        "results": {item.set.key: found[item.set.key] for item in work.items},
    }


def _evaluate(
    one: EvalSet, trained: Trained, wanted: Wanted, workers: Workers, results: Results
) -> Result:
    with _built(one) as opened:
        matching = _match(one, opened, trained, wanted)
        data = trained.config.data
        evaluator = trained.task.evaluator(torch.device(wanted.device), matching)
        with closing(opened.batches()) as batches:
            try:
                result = evaluate(
                    trained.model,
                    tqdm(batches, one.key, opened.steps, leave=False, disable=None),
                    evaluator,
                    mean=data.mean,
                    std=data.std,
                    bn=wanted.bn,
                    device=wanted.device,
                )
            except BaseException:
                # else closing the batches waits for corruptions that nobody wants any more
                workers.stop()
                raise
        if result["count"] != opened.count:
            raise ValueError(
                f"{one.key}: {one.source}: {opened.count} images, but {result['count']} were"
                " evaluated"
            )
        if opened.stamps() != opened.identity["files"]:
            raise ValueError(
                f"{one.key}: {one.source}: files changed while they were evaluated; start again"
            )
        results.keep(*_name_and_origin(one, opened, trained, matching, wanted), result)
    return result


@contextmanager
def _built(one: EvalSet) -> Iterator[Opened]:
    """The set, opened; a kept one is built first."""
    with one.open() as opened:
        if opened.build is None:
            yield opened
            return
        opened.build()
    with one.open() as opened:
        yield opened


def _match(one: EvalSet, opened: Opened, trained: Trained, wanted: Wanted) -> Matching:
    try:
        return trained.task.match(
            opened.classes,
            opened.labels,
            trained.meta.train.classes,
            by_position=wanted.by_position,
            restrict=one.restrict,
        )
    except ValueError as error:
        raise ValueError(f"{one.key}: {one.source}: {error}") from None


def _name_and_origin(
    one: EvalSet, opened: Opened, trained: Trained, matching: Matching, wanted: Wanted
) -> tuple[str, dict[str, Any]]:
    """A result's name, and all that it depends on. Rather too much than too little: it is soon
    computed again.
    """
    origin = {
        "set": one.key,
        "images": opened.identity,
        "checkpoint": trained.content,
        "labels": matching.how,
        "bn": wanted.bn,
        "device": wanted.device,
        "versions": versions() | {"pillow": PIL.__version__},
    }
    return f"{trained.config.name}-{one.key}", origin
