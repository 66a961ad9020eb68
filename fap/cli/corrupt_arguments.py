"""The arguments of `fap-corrupt`, and the sets that they ask for."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import get_args

from pipelines.corrupt import EXTRA, NAMES, PUBLISHED, SEVERITIES
from pipelines.corrupt_copies import QUALITY, Format, How
from pipelines.sources import accepted

DESCRIPTION = (
    "Write corrupted copies of images, in the layout of ImageNet-C: DST/CORRUPTION/SEVERITY/CLASS/"
    "NAME.JPEG. fap-eval --imagenet-c DST reads them."
)
GROUPS = {"all": NAMES, "imagenet-c": PUBLISHED, "extra": EXTRA}


def arguments(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="fap-corrupt", description=DESCRIPTION)
    add = parser.add_argument
    add("src", metavar="SRC", type=_path, help=f"clean images: {accepted()}")
    add(
        "dst",
        metavar="DST",
        type=_path,
        help="a new folder, or one that the same command began to fill: it goes on there",
    )
    add(
        "--corruptions",
        nargs="+",
        default=["imagenet-c"],
        metavar="NAME",
        choices=[*GROUPS, *NAMES],
        help="imagenet-c: the 15 of ImageNet-C (default); extra: its 4 others; all: both; or names:"
        f" {', '.join(NAMES)}",
    )
    add("--severity", nargs="+", type=int, choices=SEVERITIES, help="default: 1 2 3 4 5")
    add("--seed", type=int, default=0, help="of the corruptions; default: 0, as for fap-eval")
    add("--resize", type=int, metavar="PX", help="the shorter side; default: 256 for --size 224")
    add("--size", type=int, metavar="PX", help="of the centre that is cut out; default: 224")
    add(
        "--as-stored",
        action="store_true",
        help="no resize and no crop; the default where no image is larger than 64 px",
    )
    add(
        "--format",
        choices=get_args(Format),
        default="jpeg",
        help="jpeg, as published; png, without loss; beton, a file of raw pixels for each set",
    )
    add("--quality", type=int, metavar="Q", help="of JPEGs; default: 85, as published")
    add("--workers", type=int, metavar="N", help="processes; default: as many as there are cores")
    args = parser.parse_intermixed_args(argv)  # SRC and DST may stand behind the options
    if args.as_stored and (args.resize is not None or args.size is not None):
        parser.error("--as-stored: images in their own size go with neither --resize nor --size")
    if args.quality is not None and args.format != "jpeg":
        parser.error(f"--quality is of JPEGs, and --format is {args.format}")
    for name, least, most in (
        ("seed", 0, 2**63 - 1),
        ("resize", 1, 1 << 15),
        ("size", 1, 1 << 15),
        ("quality", 1, 100),
        ("workers", 1, 1024),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} {value}: must be {least:,} to {most:,}")
    if args.format == "jpeg" and args.quality is None:
        args.quality = QUALITY
    return args


def sets_of(args: Namespace) -> list[How]:
    """The sets that are asked for, in the order of NAMES and of severities, not in the user's."""
    asked = [GROUPS.get(word, (word,)) for word in args.corruptions]
    names = set(chain.from_iterable(asked))
    severities = args.severity or SEVERITIES
    return [
        How(name, severity, args.seed, args.format, args.quality)
        for name in NAMES
        for severity in SEVERITIES
        if name in names and severity in severities
    ]


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))
