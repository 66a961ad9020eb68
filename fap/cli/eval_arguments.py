"""The arguments of `fap-eval`, and which of them belong together."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import torch

import pipelines
from fap.evaluate.published import PUBLISHED
from pipelines.corrupt import NAMES, QUICK, SEVERITIES
from pipelines.sources import accepted

DESCRIPTION = (
    "Exact accuracy of models side by side, on clean images and under corruptions, beside the "
    "paper's numbers. A model is a run's checkpoint or plain weights; the first is the baseline."
)
DEFAULT_EPS = ("1", "4")  # training's own strength, and what ImageNet's literature evaluates at
DEFAULT_ATTACKED = 1000  # images


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
