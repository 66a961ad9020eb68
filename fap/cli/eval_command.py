"""What `fap-eval` does, from the arguments to the report. `fap.cli.eval` is the way in."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from dataclasses import replace

from tqdm import tqdm

import pipelines
from fap.checkpoint import DamagedCheckpoint
from fap.cli.eval_arguments import arguments
from fap.cli.eval_wishes import everything, models_of, path_of, wishes
from fap.cli.output import told
from fap.evaluate import report
from fap.evaluate.models import Model
from fap.evaluate.results import Results
from fap.evaluate.validated import check_validated_on, part_of, validated_on
from fap.evaluate.work import carry_out, look
from fap.run.torch_setup import keep_freed_memory, limit_threads
from pipelines import Store
from pipelines.corrupt import SMALL
from pipelines.subset import SubsetStore
from pipelines.workers import Workers


def run(argv: Sequence[str] | None) -> int:
    """The exit code. Whatever is a user's or the machine's fault is one line on standard error."""
    args = arguments(argv)
    try:
        return evaluate(args)
    except BrokenExecutor as error:
        problem = f"a worker process was ended, perhaps for want of memory: {error}"
    except (ValueError, OSError, ImportError, pipelines.DamagedData, DamagedCheckpoint) as error:
        problem = told(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        problem = f"out of memory; a smaller --batch needs less ({str(error)[:200]})"
    print(f"fap-eval: {problem}", file=sys.stderr)
    return 1


def _is_lack_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def evaluate(args: Namespace) -> int:
    """Look at everything, say what will be done, do it, and report."""

    def say(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    limit_threads()
    if args.device == "cpu":
        keep_freed_memory()
    wanted = wishes(args)
    models = models_of(args)
    out = path_of(args.out)
    results = Results(out / "results", say)
    many = everything(args)
    with closing(_data(args, models)) as data, Workers(say=say) as workers:
        wanted = replace(wanted, data=data.path, part=_part(data))
        works = [work for model in models for work in look(model, wanted, data, workers, results)]
        for work in works:
            say(report.plan(work))
            many = many or max(work.config.data.sides) > SMALL
        if not many:
            workers.n = 0  # seconds of work, which is what processes take to start
        out.mkdir(parents=True, exist_ok=True)
        # A folder that cannot be written is noticed now, and costs no hours of work.
        with tempfile.TemporaryFile(dir=out):
            pass
        reports = [carry_out(work, wanted, workers, results, say) for work in works]
    print(report.markdown(reports), end="", flush=True)
    # Last: a full disk does not take the printed table with it.
    missing = report.write_report(reports, out)
    if missing:
        say(missing)
    return 0


def _data(args: Namespace, models: Sequence[Model]) -> Store:
    """The clean images: those of --data, or what the runs validated on."""
    if args.data is not None:
        store = pipelines.open_store(args.data)
        return store if args.val_share is None else part_of(store, args.val_share)
    first = models[0]
    if first.is_plain:
        raise ValueError(
            f"{first.source}: give --data, as weights do not say what to evaluate them on"
        )
    named = args.models[0] if args.models else args.model[0][0]
    store = validated_on(path_of(named), first.source)
    for model in models[1:]:
        if not model.is_plain:
            check_validated_on(model.source, store)
    return store


def _part(store: Store) -> str:
    """What of the data is evaluated, for the report, where it is not all of it."""
    return "the part held out of training" if isinstance(store, SubsetStore) else ""
