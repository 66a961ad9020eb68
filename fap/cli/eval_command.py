"""What `fap-eval` does, from the arguments to the report. `fap.cli.eval` is the way in."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import pipelines
from fap import class_maps
from fap.checkpoint import DamagedCheckpoint, checkpoint_at
from fap.cli.output import told
from fap.evaluate import report
from fap.evaluate.benchmarks import Wanted
from fap.evaluate.images import usable_device
from fap.evaluate.published import PUBLISHED
from fap.evaluate.results import Results
from fap.evaluate.validated import check_validated_on, part_of, validated_on
from fap.evaluate.work import carry_out, look
from fap.run.torch_setup import limit_threads
from pipelines import Store
from pipelines.corrupt import NAMES, QUICK, SMALL, definitions
from pipelines.names import names_in
from pipelines.sources import accepted
from pipelines.subset import SubsetStore
from pipelines.workers import Workers

DESCRIPTION = (
    "Exact accuracy of checkpoints on clean images and under corruptions, "
    "beside the paper's numbers."
)
SEVERITIES = range(1, 6)
DEFAULT_SEVERITY = 3
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes a part of a key
IMAGENET = "imagenet"  # of --classes; a file of this name is ./imagenet


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


def arguments(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="fap-eval", description=DESCRIPTION)
    _add_image_sets(parser)
    _add_settings(parser)
    args = parser.parse_args(argv)
    if args.corrupt is None:
        for option, given in (("--keep", args.keep), ("--severity", args.severity)):
            if given is not None:
                parser.error(f"{option} is about the sets of --corrupt, which is not given")
    if args.data is None and args.val_share is not None:
        parser.error("--val-share is about --data, which is not given")
    if args.data is None and args.plain is not None:
        parser.error("--plain: give --data, as weights do not say what to evaluate them on")
    if args.weights is not None and args.plain is not None:
        parser.error("--weights is about checkpoints; a file of --plain holds one set of weights")
    if args.classes is not None and args.plain is None:
        parser.error("--classes is about --plain: the names of a checkpoint's classes are in it")
    if args.best and args.plain is not None:
        parser.error("--best is about a run's checkpoints; --plain takes files")
    return args


def _add_image_sets(parser: ArgumentParser) -> None:
    """What is evaluated, and on which images."""
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a run's folder, or a step_*.safetensors of it; with --plain plain weights",
    )
    add("--best", action="store_true", help="of a run's folder: the best epoch, not the newest")
    add(
        "--plain",
        nargs="*",
        metavar="KEY=VALUE",
        help="what is given are plain weights of a torchvision or timm model: a .safetensors or"
        " .pth file, torchvision:WEIGHTS, timm:MODEL.TAG, hf-hub:USER/REPOSITORY. The words are"
        " model.name=resnet50, where the weights do not say it, and what differs from"
        " torchvision's evaluation, such as data.resize=232 or model.num_classes=10",
    )
    add(
        "--classes",
        metavar="FILE",
        help="names of the outputs of --plain, one a line; the word imagenet: the outputs are"
        " ImageNet's 1,000 classes in their usual order (published weights say so themselves)",
    )
    add(
        "--data",
        help=f"clean images: {accepted()}; of a run's folder by default what it validated on",
    )
    add(
        "--val-share",
        type=float,
        metavar="F",
        help="of --data only what data.val_share=F holds out of training",
    )
    add(
        "--corrupt",
        nargs="*",
        choices=["all", *NAMES],
        help=f"corrupt --data on the fly; alone: {', '.join(QUICK)}; all: 19 at 5 severities",
    )
    add(
        "--keep",
        metavar="DIR",
        help="build each corrupted set once, as a .beton of raw images in this folder",
    )
    add("--severity", nargs="+", type=int, choices=SEVERITIES, help="of --corrupt; default 3")
    for one in PUBLISHED:
        add(one.option, metavar="DIR", help=f"{one.title}: {one.layout.replace('`', '')}")
    add(
        "--folder",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="images of your own, as --data takes them, whose classes are some of the model's, by"
        " name; may be given several times",
    )


def _add_settings(parser: ArgumentParser) -> None:
    """How it is evaluated, and where the report goes."""
    add = parser.add_argument
    add(
        "--labels-by-position",
        action="store_true",
        help="compare labels by position "
        "where only the checkpoint or only the data has class names",
    )
    add("--bn", choices=("main", "aux"), default="main")
    add(
        "--weights",
        choices=("ema", "raw"),
        help="of a run with optim.ema: the average (default), or the raw ones",
    )
    add(
        "--pipeline",
        choices=list(pipelines.BACK_ENDS),
        help="default: ffcv for a .beton, or turbojpeg without it; reference for a folder",
    )
    add("--batch", type=int, help="images at once; default: 256, of a detector 16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="of the corruptions computed here")
    add(
        "--out",
        metavar="DIR",
        default="eval",
        help="for tables, plot and each set's result, which is not computed again",
    )


def evaluate(args: Namespace) -> int:
    """Look at everything, say what will be done, do it, and report."""

    def say(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    limit_threads()
    wanted = wishes(args)
    out = _path(args.out)
    results = Results(out / "results", say)
    many = _everything(args)
    checkpoints = _checkpoints(args)
    with closing(_data(args, checkpoints)) as data, Workers(say=say) as workers:
        wanted = replace(wanted, data=data.path, part=_part(data))
        works = [look(path, wanted, data, workers, results) for path in checkpoints]
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


def _checkpoints(args: Namespace) -> list[Path]:
    """The files to evaluate; plain weights are those that were given. Raises ValueError."""
    paths = [_path(path) for path in args.checkpoints]
    if args.plain is not None:
        return paths
    return [checkpoint_at(path, best=args.best) for path in paths]


def _data(args: Namespace, checkpoints: Sequence[Path]) -> Store:
    """The clean images: those of --data, or what the runs validated on."""
    if args.data is not None:
        store = pipelines.open_store(args.data)
        return store if args.val_share is None else part_of(store, args.val_share)
    store = validated_on(_path(args.checkpoints[0]), checkpoints[0])
    for path in checkpoints[1:]:
        check_validated_on(path, store)
    return store


def _part(store: Store) -> str:
    """What of the data is evaluated, for the report, where it is not all of it."""
    return "the part held out of training" if isinstance(store, SubsetStore) else ""


def wishes(args: Namespace) -> Wanted:
    """The arguments as `fap.evaluate.benchmarks.Wanted`. Raises ValueError."""
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch {args.batch}: must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be at least 0")
    usable_device(args.device)
    return Wanted(
        data=_path(args.data or ""),
        computed=_corruptions(args),
        keep=_optional(args.keep),
        published=_published(args),
        folders=_folders(args.folder),
        back_end=args.pipeline,
        batch=args.batch,
        device=args.device,
        seed=args.seed,
        bn=args.bn,
        weights=args.weights,
        pictures=_path(args.out) / "pictures",
        by_position=args.labels_by_position,
        plain=None if args.plain is None else tuple(args.plain),
        classes=_class_names(args.classes),
    )


def _published(args: Namespace) -> dict[str, Path]:
    """The folders of published benchmarks, by key."""
    given = {one.key: getattr(args, one.key) for one in PUBLISHED}
    return {key: _path(text) for key, text in given.items() if text is not None}


def _folders(words: Sequence[str]) -> dict[str, Path]:
    """The images of --folder NAME=DIR, by name. Raises ValueError."""
    found: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not FOLDER_NAME.fullmatch(name) or not folder:
            raise ValueError(
                f"--folder {word}: write NAME=DIR; a name is made of letters, digits, . _ and -"
            )
        if name in found:
            raise ValueError(f"--folder {word}: {name} is there twice")
        found[name] = _path(folder)
    return found


def _class_names(text: str | None) -> tuple[str, ...] | None:
    """Those of --classes. Raises ValueError."""
    if text is None:
        return None
    if text == IMAGENET:
        return class_maps.imagenet()
    return names_in(_path(text))


def _corruptions(args: Namespace) -> tuple[tuple[str, int], ...]:
    """(name, severity) of the sets to compute, in the order of NAMES, not in the user's."""
    if args.corrupt is None:
        return ()
    definitions()  # a package that is missing is noticed now, not after the clean images
    if _everything(args):
        names: Sequence[str] = NAMES
        severities: Sequence[int] = SEVERITIES
    else:
        names = args.corrupt or QUICK  # --corrupt without a name
        severities = [DEFAULT_SEVERITY]
    if args.severity:
        severities = args.severity
    return tuple(
        (name, severity)
        for name in NAMES
        for severity in SEVERITIES
        if name in names and severity in severities
    )


def _everything(args: Namespace) -> bool:
    return args.corrupt is not None and "all" in args.corrupt


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _optional(text: str | None) -> Path | None:
    return None if text is None else _path(text)
