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
from typing import Any

import torch
from tqdm import tqdm

import pipelines
from fap import class_maps
from fap.checkpoint import DamagedCheckpoint
from fap.cli.output import told
from fap.evaluate import report
from fap.evaluate.attack_options import attacks_of
from fap.evaluate.attacks import LinfAttack
from fap.evaluate.benchmarks import Wanted
from fap.evaluate.images import usable_device
from fap.evaluate.models import Model, check_words, model_of, refuse_idle
from fap.evaluate.published import PUBLISHED
from fap.evaluate.results import Results
from fap.evaluate.validated import check_validated_on, part_of, validated_on
from fap.evaluate.work import carry_out, look
from fap.run.torch_setup import limit_threads
from pipelines import Store
from pipelines.corrupt import NAMES, QUICK, SMALL, definitions
from pipelines.files import listed, readable
from pipelines.names import names_in
from pipelines.sources import accepted
from pipelines.subset import SubsetStore
from pipelines.workers import Workers

DESCRIPTION = (
    "Exact accuracy of models side by side, on clean images and under corruptions, beside the "
    "paper's numbers. A model is a run's checkpoint or plain weights; the first is the baseline."
)
SEVERITIES = range(1, 6)
DEFAULT_SEVERITY = 3
DEFAULT_EPS = ("1", "4")  # training's own strength, and what ImageNet's literature evaluates at
DEFAULT_ATTACKED = 1000  # images
CLASSES = "classes="  # among the words of --model: a file as that of --classes
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
    _add_attacks(parser)
    _add_settings(parser)
    args = parser.parse_intermixed_args(argv)  # models may stand on both sides of an option
    if not args.models and not args.model:
        parser.error("give at least one MODEL")
    if args.corrupt is None:
        for option, given in (("--keep", args.keep), ("--severity", args.severity)):
            if given is not None:
                parser.error(f"{option} is about the sets of --corrupt, which is not given")
    if args.attack is None:
        for option, given in (
            ("--eps", args.eps),
            ("--attack-step", args.attack_step),
            ("--restarts", args.restarts),
            ("--attack-images", args.attack_images),
        ):
            if given is not None:
                parser.error(f"{option} is about --attack, which is not given")
    if args.data is None and args.val_share is not None:
        parser.error("--val-share is about --data, which is not given")
    return args


def _add_image_sets(parser: ArgumentParser) -> None:
    """What is evaluated, and on which images."""
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a run's folder, or a step_*.safetensors of it; plain weights of a torchvision or timm"
        " model: a .safetensors or .pth file, torchvision:WEIGHTS, timm:MODEL.TAG,"
        " hf-hub:USER/REPOSITORY",
    )
    add("--best", action="store_true", help="of a run's folder: the best epoch, not the newest")
    add(
        "--plain",
        nargs="*",
        metavar="KEY=VALUE",
        help="of every MODEL that is plain weights: model.name=resnet50, where the weights do not"
        " say it, and what differs from their own or else torchvision's evaluation, such as"
        " data.resize=232 or model.num_classes=10",
    )
    add(
        "--model",
        nargs="+",
        action="append",
        default=[],
        metavar=("SOURCE", "KEY=VALUE"),
        help="one more model, with words of its own: those of --plain, and classes=FILE in place of"
        " --classes; may be given several times",
    )
    add(
        "--classes",
        metavar="FILE",
        help="names of the outputs of plain weights, one a line; the word imagenet: the outputs are"
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


def _add_attacks(parser: ArgumentParser) -> None:
    """Attacks on the clean images; docs/evaluate.md says what their numbers can show."""
    add = parser.add_argument
    add(
        "--attack",
        nargs="+",
        metavar="METHOD",
        help="accuracy under attack (L-infinity, untargeted, on the model itself): fgsm; "
        "pgd<K> such as pgd10: K steps from a random start; autoattack",
    )
    add(
        "--eps",
        nargs="+",
        metavar="E",
        help="strengths of --attack, in grey levels of 0..255: 4 is what the literature writes "
        f"as 4/255; default: {' and '.join(DEFAULT_EPS)}",
    )
    add(
        "--attack-step",
        type=float,
        metavar="S",
        help="grey levels of a step of pgd<K>; default: 2.5 eps / K",
    )
    add(
        "--restarts",
        type=int,
        metavar="R",
        help="attacks of pgd<K> on each image, which is right only if it withstands all; default 1",
    )
    add(
        "--attack-images",
        type=int,
        metavar="N",
        help="attack only N of the images of --data, drawn once and for all; "
        f"default: {DEFAULT_ATTACKED:,}",
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
    add(
        "--bn",
        choices=("main", "aux", "both"),
        default="main",
        help="which norms of a model with auxiliary ones; both: a column for each; default: main,"
        " which an exported model has",
    )
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
    add("--seed", type=int, default=0, help="of the corruptions computed here, and of attacks")
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
    models = models_of(args)
    out = _path(args.out)
    results = Results(out / "results", say)
    many = _everything(args)
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


def models_of(args: Namespace) -> list[Model]:
    """What is to be evaluated, in the order of the columns. Raises ValueError, OSError."""
    words = args.plain or []
    check_words("--plain", words)
    classes = _class_names(args.classes)
    options = {"classes": classes, "weights": args.weights, "best": args.best}
    found = [model_of(_expanded(source), words=words, **options) for source in args.models]
    if args.plain is not None and not any(model.is_plain for model in found):
        raise ValueError(
            f"--plain: none of its models ({listed(args.models) or 'there are none'}) is plain "
            "weights; a run's checkpoint is none"
        )
    found += [_with_own_words(*words, **options) for words in args.model]
    runs = {"--best": args.best, "--weights": args.weights}
    refuse_idle(found, classes=classes, runs=runs)
    return found


def _with_own_words(source: str, *words: str, **options: Any) -> Model:
    """A model of --model. Raises as `models_of`."""
    check_words(f"--model {readable(source)}", words)
    names = [word.removeprefix(CLASSES) for word in words if word.startswith(CLASSES)]
    if names:
        options["classes"] = _class_names(names[-1])
    config = [word for word in words if not word.startswith(CLASSES)]
    model = model_of(_expanded(source), words=config, **options)
    if words and not model.is_plain:
        raise ValueError(
            f"--model {readable(source)} {readable(words[0])}: a run has its own config; only "
            "plain weights take KEY=VALUE"
        )
    return model


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
    store = validated_on(_path(named), first.source)
    for model in models[1:]:
        if not model.is_plain:
            check_validated_on(model.source, store)
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
        attacks=_attacks(args),
        attack_images=args.attack_images or DEFAULT_ATTACKED,
        back_end=args.pipeline,
        batch=args.batch,
        device=args.device,
        seed=args.seed,
        bn=args.bn,
        pictures=_path(args.out) / "pictures",
        by_position=args.labels_by_position,
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


def _attacks(args: Namespace) -> tuple[LinfAttack, ...]:
    if args.attack is None:
        return ()
    if args.attack_images is not None and args.attack_images < 1:
        raise ValueError(f"--attack-images {args.attack_images}: must be at least 1")
    return attacks_of(
        args.attack,
        args.eps or DEFAULT_EPS,
        step=args.attack_step,
        restarts=args.restarts,
        seed=args.seed,
    )


def _everything(args: Namespace) -> bool:
    return args.corrupt is not None and "all" in args.corrupt


def _expanded(text: str) -> str:
    return os.path.expanduser(text)


def _path(text: str) -> Path:
    return Path(_expanded(text))


def _optional(text: str | None) -> Path | None:
    return None if text is None else _path(text)
