"""`fap-convert SRC DST.beton`: make the data file that `fap-train` reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from os.path import expanduser, isdir, lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fap.cli.output import survive, told
from fap.cli.signals import Stopped, importing, raising_stopped

if TYPE_CHECKING:
    from pipelines.convert import Encoding

# What each option goes with.
OPTIONS_OF = {
    "max_side": ("images", "coco"),
    "quality": ("images", "coco"),
    "raw": ("images", "coco"),
    "decoded": ("images", "coco"),
    "skip_bad": ("images", "coco"),
    "allow_odd_classes": ("images",),
    "threads": ("images", "coco", "--check"),
    "split": ("images", "cifar10"),
    "labels": ("images",),
    "classes": ("images",),
    "val_split": ("images",),
    "seed": ("images",),
    "shard": ("images",),
    "limit": ("cifar10",),
}

USAGE = """fap-convert [options] SRC DST.beton
       fap-convert [options] coco IMAGES ANNOTATIONS DST.beton
       fap-convert --check FILE.beton"""


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    args = arguments(argv)
    with importing("fap-convert"):
        # With all that `check` and `convert` import.
        import pipelines.convert_boxes
        import pipelines.convert_images  # noqa: F401
    try:
        with raising_stopped(tidying=True):
            if args.check is not None:
                return check(args)
            return convert(args)
    except Stopped as stopped:
        state = "nothing was written"
        if args.dst and lexists(args.dst):
            state = "the file is complete"
        print(f"\nfap-convert: stopped by {stopped}; {state}", file=sys.stderr)
        return stopped.exit_code
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        print(f"fap-convert: {told(error)}", file=sys.stderr)
        return 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("fap-convert", usage=USAGE, description=__doc__)
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="SRC DST",
        help="SRC: what holds the images (README, section Convert, has a table): class folders, a"
        " tar, a zip, ImageNet as it is downloaded, parquet files, WebDataset shards, a .beton, or"
        " cifar10; a pattern in quotes for several files. DST: file to write; one that exists is"
        " never overwritten. For detection write coco IMAGES ANNOTATIONS DST: the folder of the"
        " images, and COCO's instances_*.json or a folder of Pascal VOC's XML files, which may be"
        " the same folder",
    )
    add(
        "--check",
        metavar="FILE",
        type=expanduser,
        help="verify structure and every checksum of a .beton, writing nothing",
    )
    add(
        "--max-side",
        type=int,
        metavar="N",
        help="shrink larger images so that the longer side is N pixels",
    )
    add("--quality", type=int, metavar="Q", help="re-encode every image as a JPEG of this quality")
    add("--raw", action="store_true", help="store decoded RGB pixels")
    add(
        "--decoded",
        choices=("yuv420",),
        help="store the decoded planes of the JPEGs: several times faster to load, two to three"
        " times as large; for the pipelines ffcv, turbojpeg and reference",
    )
    add("--skip-bad", action="store_true", help="leave damaged images out instead of failing")
    add(
        "--allow-odd-classes",
        action="store_true",
        help="take a single class, and classes called train, val or test",
    )
    add("--threads", type=int, metavar="T", help="default: all cores")
    add("--split", choices=("train", "val", "test"), help="which part of SRC, where it has several")
    add(
        "--labels",
        type=expanduser,
        metavar="FILE",
        help="of images that lie in no class folders: ImageNet's devkit (a folder or .tar.gz),"
        " Kaggle's LOC_val_solution.csv, or lines of path,label",
    )
    add(
        "--classes",
        type=expanduser,
        metavar="FILE",
        help="names of the classes, one a line in the order of the labels, where SRC has numbers"
        " only",
    )
    add(
        "--val-split",
        type=float,
        metavar="F",
        help="write DST.val.beton too, with this fraction of every class, and DST without it",
    )
    add("--seed", type=int, metavar="S", help="which images --val-split takes; default: 0")
    add(
        "--shard",
        metavar="I/N",
        help="convert one of N parts, such as 3/16, to DST-03-of-16.beton; one that is complete is"
        " left as it is",
    )
    add("--limit", type=int, metavar="N", help="cifar10 only: the first N images")
    args = parser.parse_intermixed_args(argv)  # words may stand on both sides of an option
    _name_the_words(args, parser)
    _refuse_what_does_not_go_together(args, parser)
    return args


def _name_the_words(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set src, annotations and dst; None where they are not given."""
    args.src = None
    args.annotations = None
    args.dst = None
    match [expanduser(word) for word in args.words]:
        case []:
            pass
        case ["coco", images, annotations, dst]:
            args.src = images
            args.annotations = annotations
            args.dst = dst
        case ["coco", *_] if not isdir("coco"):  # a folder of images may be called so
            parser.error("coco takes three more: IMAGES ANNOTATIONS DST")
        case [src]:
            args.src = src
        case [src, dst]:
            args.src = src
            args.dst = dst
        case words:
            parser.error(
                f"{len(words)} words: give SRC and DST, or coco IMAGES ANNOTATIONS DST for boxes"
            )


def _refuse_what_does_not_go_together(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    converts = args.src is not None
    checks = args.check is not None
    if converts == checks or converts != (args.dst is not None):
        parser.error("give SRC and DST, or coco IMAGES ANNOTATIONS DST, or --check FILE")
    boxes = args.annotations is not None
    cifar10 = args.src == "cifar10" and not boxes
    for name, takes in OPTIONS_OF.items():
        value = getattr(args, name)
        kind = "--check" if checks else "coco" if boxes else "cifar10" if cifar10 else "images"
        if value not in (None, False) and kind not in takes:
            parser.error(f"--{name.replace('_', '-')} does not go with {kind}")
    if cifar10 and args.split == "val":
        parser.error("--split val: cifar10 has train and test")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads {args.threads}: must be at least 1")
    if args.val_split is not None and args.shard is not None:
        parser.error("--val-split and --shard: convert the whole set, or one part of it")
    if args.seed is not None and (args.val_split is None or args.seed < 0):
        parser.error(f"--seed {args.seed}: at least 0, and with --val-split only")


def check(args: argparse.Namespace) -> int:
    from pipelines.convert import check as faults_of
    from pipelines.files import readable

    faults = faults_of(args.check, args.threads)
    for fault in faults:
        print(fault)
    print(f"{readable(args.check)}: {len(faults) or 'no'} fault(s)")
    return int(bool(faults))


def convert(args: argparse.Namespace) -> int:
    from pipelines.convert import Encoding, convert_cifar10
    from pipelines.convert_boxes import convert_boxes

    encoding = Encoding(args.max_side, args.quality, args.raw, args.decoded is not None)
    if args.annotations is not None:
        done = convert_boxes(
            args.src,
            args.annotations,
            args.dst,
            encoding,
            skip_bad=args.skip_bad,
            threads=args.threads,
        )
        tell(args.dst, done)
    elif args.src == "cifar10":
        tell(args.dst, convert_cifar10(args.dst, args.split or "train", args.limit))
    else:
        convert_images(args, encoding)
    return 0


def convert_images(args: argparse.Namespace, encoding: Encoding) -> None:
    """Images in any form: all of them, one shard, or two files for training and validation."""
    from pipelines.convert_images import convert_collection, is_complete
    from pipelines.files import readable
    from pipelines.intake.parts import Shard, parts_of
    from pipelines.intake.recognise import Wishes, recognise
    from pipelines.names import names_in
    from pipelines.sources.beton_writer import refuse_existing

    shard = None if args.shard is None else Shard.parsed(args.shard)
    if shard is None:
        refuse_existing(Path(args.dst))  # a large archive takes minutes to look through
    wishes = Wishes(
        args.split, args.labels and Path(args.labels), args.classes and names_in(Path(args.classes))
    )
    with closing(recognise(args.src, wishes)) as collection:
        print("\n".join(collection.describe()), flush=True)
        parts = parts_of(
            collection, Path(args.dst), shard=shard, val_split=args.val_split, seed=args.seed or 0
        )
        if shard is not None and is_complete(parts[0], encoding):
            print(f"{readable(parts[0].dst)}: is complete already, nothing to do")
            return
        done = convert_collection(
            collection,
            parts,
            encoding,
            skip_bad=args.skip_bad,
            allow_odd_classes=args.allow_odd_classes,
            threads=args.threads,
        )
    for part, entry in zip(parts, done, strict=True):
        tell(part.dst, entry)


def tell(dst: str | Path, done: dict[str, Any]) -> None:
    """What was written, and what was not: `done` is the sidecar's `encoding` entry."""
    from pipelines.archives.listing import notes_of
    from pipelines.convert import MOST_TOLD
    from pipelines.files import readable
    from pipelines.sources.beton import BetonStore
    from pipelines.sources.sidecar import sidecar_path

    skipped = done["skipped"]
    for path in skipped[:MOST_TOLD]:
        print(f"left out: {readable(path)}")
    if len(skipped) > MOST_TOLD:
        print(f"and {len(skipped) - MOST_TOLD:,} more, all in {readable(sidecar_path(dst))}")
    for note in notes_of(done.get("ignored", {})):
        print(note)
    for what, count in done.get("counted", {}).items():
        if count:
            print(f"{count:,} {what}")
    with closing(BetonStore(dst)) as store:  # what is reported is what can be read
        print("\n".join(store.describe()))
    print(f"{readable(dst)}: {done['count']} images, {len(skipped)} left out")


if __name__ == "__main__":
    sys.exit(main())
