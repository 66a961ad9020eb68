"""Train a classifier or a detector with Fast AdvProp (the default), AdvProp or plain training.

Without CONFIG: Fast AdvProp, ResNet-50, ImageNet. Example: fap-train configs/imagenet/vanilla.yaml
data.train=train.beton data.val=val.beton --pipeline dali resume=auto

In place of a file, CONFIG may be the name of a recipe that comes with the package:
fap-train finetune data.train=photos/ model=timm:convnext_tiny

SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save and leave with exit code 128 + the
signal's number; a Ctrl-C two seconds after that ends at once. Exit code 0 means that the last
checkpoint and result.json are on the disk.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import pipelines
from fap import distributed, recipes
from fap.checkpoint import DamagedCheckpoint
from fap.config import Config, load_config
from fap.run import train
from fap.run.fit import fitted_config
from fap.run.monitor import NonFinite
from fap.run.saving import NotSaved
from fap.run.session import Interrupted, StopSignal
from fap.step.graph import FreshProcessNeeded, out_of_memory
from fap.tasks.base import Task
from pipelines.back_ends import AUTO
from pipelines.files import listed, readable

YAML = (".yaml", ".yml")

# Faults of the user, of the data or of the machine. Their text says all; a traceback would hide it.
FAULTS = (
    ValueError,
    OSError,
    ImportError,
    NonFinite,
    NotSaved,
    DamagedCheckpoint,
    pipelines.DamagedData,
)


def run(argv: Sequence[str] | None) -> None:
    """Train. What goes wrong is a message on standard error and an exit code."""
    args = arguments(argv)
    ranks = distributed.ONE_RANK
    with StopSignal() as stop:
        try:
            ranks = distributed.connect()
            with ranks.together():
                config, fitted = wanted(args, ranks.world)
            if fitted and ranks.first:
                print(fitted, flush=True)
            training = train.Run(config, ranks, stop)
            result = training.train()
            distributed.disconnect()
        except Interrupted as stopped:
            _end(stopped.exit_code, str(stopped), ranks.world)
        except FreshProcessNeeded as needed:
            if ranks.world > 1:  # torchrun started us, and the other ranks are where they are
                _end(1, str(needed), ranks.world)
            _start_again(argv, needed.reason, needed.settings)
        except FAULTS as error:
            _end(1, str(error), ranks.world)
        except (RuntimeError, MemoryError) as error:
            problem = _problem(error)
            if problem is None:  # a fault of ours
                raise
            _end(1, problem, ranks.world)
        # Before signals have their usual effect again: who is killed then has said that it is done.
        if ranks.first:
            _report(result, training.task)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fap-train", description=__doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG | key=value",
        help="a YAML file or a recipe's name; e.g. optim.lr=0.2: any config field;"
        " model=timm:NAME is short for model.name and model.init",
    )
    parser.add_argument(
        "--pipeline", choices=[AUTO, *pipelines.BACK_ENDS], help="short for data.pipeline=..."
    )
    return parser.parse_intermixed_args(argv)


def wanted(args: argparse.Namespace, world: int = 1) -> tuple[Config, str]:
    """The config that the words ask for, and of a recipe what was fitted. Raises ValueError.

    Of a recipe also what opening its data raises.
    """
    overrides = [word for word in args.words if "=" in word]
    files = [word for word in args.words if "=" not in word]
    if args.pipeline:
        overrides.append(f"data.pipeline={args.pipeline}")
    if len(files) > 1:
        raise ValueError(
            f"one CONFIG at most, found {', '.join(files)}; other words must be key=value"
        )
    if not files:
        return load_config(None, overrides), ""
    (file,) = files
    recipe = recipes.file_of(file)
    there = os.path.expanduser(file)
    if os.path.lexists(there) and not (recipe is not None and os.path.isdir(there)):
        return load_config(file, overrides), ""
    if recipe is not None:  # also beside a folder of that name, such as that of the runs
        return fitted_config(recipe, overrides, world)
    if not file.endswith(YAML):
        raise ValueError(
            f"{readable(file)}: neither a file nor a recipe: recipes are {listed(recipes.names())}"
        )
    return load_config(file, overrides), ""  # which says what is wrong with it


def _problem(error: Exception) -> str | None:
    """What a user can do about an error without a type of its own, or None."""
    text = str(error)
    if distributed.lost_a_rank(error):
        return f"another rank is gone, its own output says why ({text.splitlines()[0][:200]})"
    if out_of_memory(error):
        remedies = (
            "fewer optim.clean_batch rows, a smaller model or data.size, or fewer data.threads"
        )
        return f"out of memory: {text[:300]}\nremedies: {remedies}"
    return None


def _report(result: dict[str, Any], task: Task) -> None:
    last = result["last"]
    # A metric may be absent, such as AP of a size that no object has.
    reached = ", ".join(
        f"{words} {last[name]:.2%}" for name, words in task.percents.items() if name in last
    )
    cost = f"{result['image_passes']:,} image passes in {result['seconds']:.0f} s"
    print(f"done: {reached} after {cost}", flush=True)


def _end(code: int, message: str, world: int) -> NoReturn:
    """Say why and exit; one of several ranks at once, as tidying up would wait for the others."""
    print(f"fap-train: {message}", file=sys.stderr)
    if world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _start_again(argv: Sequence[str] | None, reason: str, settings: Sequence[str]) -> NoReturn:
    """Replace this process by one with the same arguments and, as later words win, `settings`.

    That one cannot fail for the same reason again: what is asked for by name does not fall back.
    """
    more = [*settings, "resume=auto"]
    print(f"fap-train: {reason}; a fresh process goes on with {' '.join(more)}", file=sys.stderr)
    if argv is None:
        _, *command = sys.orig_argv
    else:
        command = ["-m", "fap.cli.train", *argv]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *command, *more])
