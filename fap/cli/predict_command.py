"""What `fap-predict` does, from the arguments to the CSV. `fap.cli.predict` is the way in."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import pipelines
from fap.checkpoint import DamagedCheckpoint
from fap.cli.output import told
from fap.cli.signals import ENDED_BY_SIGNAL
from fap.evaluate.images import Reading, usable_device
from fap.evaluate.load import Trained
from fap.evaluate.models import check_bn, check_words, model_of, refuse_idle
from fap.evaluate.predict import Predictor, csv_bytes
from fap.run.torch_setup import keep_freed_memory, limit_threads
from fap.step.graph import out_of_memory
from pipelines import Store
from pipelines.files import readable, write_whole
from pipelines.names import names_in
from pipelines.sources.loose import ACCEPTED, open_images

DESCRIPTION = (
    "What a checkpoint says of images: a CSV with a line for each image (path, class, probability),"
    " or of a detector a line for each box (path, class, score, and its edges in pixels)."
)
STANDARD_OUTPUT = "-"
MOST_TOLD = 20  # images that are skipped; the rest is counted


def run(argv: Sequence[str] | None) -> int:
    """The exit code. Whatever is a user's or the machine's fault is one line on standard error."""
    args = arguments(argv)
    try:
        return predict(args)
    except BrokenPipeError:  # such as `| head`: whoever read it has read enough
        _drop_standard_output()
        return ENDED_BY_SIGNAL + signal.SIGPIPE
    except (ValueError, OSError, ImportError, pipelines.DamagedData, DamagedCheckpoint) as error:
        problem = told(error)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or out_of_memory(error)):
            raise
        problem = f"out of memory; a smaller --batch needs less ({str(error)[:200]})"
    print(f"fap-predict: {problem}", file=sys.stderr)
    return 1


def arguments(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="fap-predict", description=DESCRIPTION)
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a run's folder, or a step_*.safetensors of it; or plain weights, as for fap-eval",
    )
    add("--best", action="store_true", help="of a run's folder: the best epoch, not the newest")
    add(
        "--weights",
        choices=("ema", "raw"),
        help="of a run with optim.ema: the average (default), or the raw ones",
    )
    add("images", nargs="+", metavar="IMAGES", help=f"{ACCEPTED}; class folders need not be there")
    add(
        "--out",
        metavar="FILE",
        default="predictions.csv",
        help="the CSV, written whole or not at all; - is standard output; default: predictions.csv",
    )
    add("--top", type=int, metavar="K", help="the K likeliest classes of each image; default: 1")
    add("--skip-bad", action="store_true", help="name damaged images and go on without them")
    add(
        "--plain",
        nargs="*",
        metavar="KEY=VALUE",
        help="what plain weights do not say, as for fap-eval; after the images",
    )
    add("--classes", metavar="FILE", help="names of the outputs of plain weights, one a line")
    add("--pipeline", choices=list(pipelines.BACK_ENDS), help="as for fap-eval")
    add(
        "--bn",
        choices=("main", "aux"),
        default="main",
        help="the norms that a run's model uses: those of clean images, or the auxiliary ones",
    )
    add("--batch", type=int, help="images at once; default: 256, of a detector 16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch {args.batch}: must be at least 1")
    return args


@dataclass
class Done:
    """How far it is: images that have their lines, and images that were left out."""

    n_images: int = 0
    n_skipped: int = 0

    def skip(self, what: str) -> None:
        self.n_skipped += 1
        if self.n_skipped <= MOST_TOLD:
            _say(f"skipped: {what}")
        elif self.n_skipped == MOST_TOLD + 1:
            _say("skipped: more, which are counted at the end")


def predict(args: Namespace) -> int:
    limit_threads()
    if args.device == "cpu":
        keep_freed_memory()
    done = Done()
    trained = _trained(args, usable_device(args.device))
    predictor = _predictor(args, trained, done.skip if args.skip_bad else None)
    header = predictor.columns()
    _try_to_write(args.out)
    sources = open_images([_path(path) for path in args.images], predictor.skip)
    with ExitStack() as opened:
        for store, _ in sources:
            opened.callback(store.close)
        _write(args.out, _parts(header, predictor, sources, done))
    n = done.n_images
    _say(f"{readable(args.out)}: {n:,} image{'' if n == 1 else 's'}, {done.n_skipped:,} skipped")
    return 0


def _trained(args: Namespace, device: str) -> Trained:
    words = args.plain or []
    check_words("--plain", words)
    classes = None if args.classes is None else names_in(_path(args.classes))
    model = model_of(
        str(_path(args.model)), words=words, classes=classes, weights=args.weights, best=args.best
    )
    if args.plain is not None and not model.is_plain:
        raise ValueError(f"--plain: {readable(args.model)} is a run's, which has its own config")
    runs = {"--best": args.best, "--weights": args.weights, "--bn aux": args.bn == "aux"}
    refuse_idle([model], classes=classes, runs=runs)
    trained = model.load(device)
    check_bn(model, trained, args.bn)
    return trained


def _predictor(args: Namespace, trained: Trained, skip: Callable[[str], None] | None) -> Predictor:
    reading = Reading.of(
        trained.task,
        trained.config.data,
        batch=args.batch,
        device=args.device,
        back_end=args.pipeline,
    )
    return Predictor(trained, reading, args.top, args.bn, skip)


def _parts(
    header: list[str],
    predictor: Predictor,
    sources: Sequence[tuple[Store, Callable[[int], str]]],
    done: Done,
) -> Iterator[bytes]:
    """The CSV, a batch of images at a time."""
    total = sum(len(store) for store, _ in sources)
    yield csv_bytes([header])
    with tqdm(total=total, unit="img", disable=None, leave=False, file=sys.stderr) as bar:
        for store, name in sources:
            for n_images, lines in predictor.lines(store, name):
                yield csv_bytes(lines)
                done.n_images += n_images
                bar.update(n_images)


# ---------------------------------------------------------------------- the output


def _try_to_write(out: str) -> None:
    """What cannot be written is noticed now, and costs no hours of work. Raises ValueError."""
    if out == STANDARD_OUTPUT:
        return
    path = _path(out)
    if path.is_dir():
        raise ValueError(f"--out {readable(out)}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"--out {readable(out)}: there is no folder {readable(path.parent)}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {readable(out)}: {error.strerror}") from None


def _write(out: str, parts: Iterable[bytes]) -> None:
    """Raises OSError; BrokenPipeError where nobody reads standard output any more."""
    if out != STANDARD_OUTPUT:
        write_whole(_path(out), parts)
        return
    stream = sys.stdout.buffer  # errors count here, unlike those of what is printed
    for part in parts:
        stream.write(part)
        stream.flush()


def _drop_standard_output() -> None:
    """Python would try to write again what is left in its buffer when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))
