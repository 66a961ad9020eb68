"""What the arguments of `fap-eval` ask for: models, sets of images, attacks, settings."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fap import class_maps
from fap.cli.eval_arguments import DEFAULT_ATTACKED, DEFAULT_EPS
from fap.evaluate.attack_options import attacks_of
from fap.evaluate.attacks import LinfAttack
from fap.evaluate.benchmarks import Wanted
from fap.evaluate.images import usable_device
from fap.evaluate.models import Model, check_words, model_of, refuse_idle
from fap.evaluate.published import PUBLISHED
from pipelines.corrupt import NAMES, QUICK, SEVERITIES, definitions
from pipelines.files import listed, readable
from pipelines.names import names_in

DEFAULT_SEVERITY = 3
CLASSES = "classes="  # among the words of --model: a file as that of --classes
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes a part of a key
IMAGENET = "imagenet"  # of --classes; a file of this name is ./imagenet


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


def wishes(args: Namespace) -> Wanted:
    """The arguments as `fap.evaluate.benchmarks.Wanted`. Raises ValueError."""
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch {args.batch}: must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be at least 0")
    usable_device(args.device)
    return Wanted(
        data=path_of(args.data or ""),
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
        pictures=path_of(args.out) / "pictures",
        by_position=args.labels_by_position,
    )


def _published(args: Namespace) -> dict[str, Path]:
    """The folders of published benchmarks, by key."""
    given = {one.key: getattr(args, one.key) for one in PUBLISHED}
    return {key: path_of(text) for key, text in given.items() if text is not None}


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
        found[name] = path_of(folder)
    return found


def _class_names(text: str | None) -> tuple[str, ...] | None:
    """Those of --classes. Raises ValueError."""
    if text is None:
        return None
    if text == IMAGENET:
        return class_maps.imagenet()
    return names_in(path_of(text))


def _corruptions(args: Namespace) -> tuple[tuple[str, int], ...]:
    """(name, severity) of the sets to compute, in the order of NAMES, not in the user's."""
    if args.corrupt is None:
        return ()
    definitions()  # a package that is missing is noticed now, not after the clean images
    if everything(args):
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


def everything(args: Namespace) -> bool:
    return args.corrupt is not None and "all" in args.corrupt


def _expanded(text: str) -> str:
    return os.path.expanduser(text)


def path_of(text: str) -> Path:
    return Path(_expanded(text))


def _optional(text: str | None) -> Path | None:
    return None if text is None else path_of(text)
