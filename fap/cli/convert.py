"""`fap-convert SRC DST.beton`: make the data file that `fap-train` reads."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from os.path import expanduser, isdir, lexists

from fap.cli.output import survive, told
from fap.cli.signals import Stopped, importing, raising_stopped

USAGE = """fap-convert [options] SRC DST.beton
       fap-convert [options] coco IMAGES ANNOTATIONS DST.beton
       fap-convert --check FILE.beton"""


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    args = arguments(argv)
    with importing("fap-convert"):
        import pipelines.convert_boxes  # noqa: F401  # with all that `check` and `convert` import
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
        help="SRC: image folder in ImageNet's layout (one folder per class), or cifar10; DST: file"
        " to write; one that exists is never overwritten. For detection write coco IMAGES"
        " ANNOTATIONS DST: the folder of the images, and COCO's instances_*.json or a folder of"
        " Pascal VOC's XML files, which may be the same folder",
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
    add("--skip-bad", action="store_true", help="leave damaged images out instead of failing")
    add(
        "--allow-odd-classes",
        action="store_true",
        help="take a single class, and classes called train, val or test",
    )
    add("--threads", type=int, metavar="T", help="default: all cores")
    add("--split", choices=("train", "test"), help="cifar10 only; default: train")
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
    for_folders = (
        args.max_side is not None
        or args.quality is not None
        or args.raw
        or args.skip_bad
        or args.allow_odd_classes
    )
    if for_folders and (checks or cifar10):
        parser.error(
            "--max-side, --quality, --raw, --skip-bad and --allow-odd-classes are for image folders"
        )
    if args.allow_odd_classes and boxes:
        parser.error("--allow-odd-classes: the classes of boxes are those of the annotations")
    if not cifar10 and (args.split or args.limit is not None):
        parser.error("--split and --limit are for cifar10")
    if args.threads is not None and (args.threads < 1 or cifar10):
        parser.error(
            f"--threads {args.threads}: at least 1, and not for cifar10, which is not decoded"
        )


def check(args: argparse.Namespace) -> int:
    from pipelines.convert import check as faults_of
    from pipelines.files import readable

    faults = faults_of(args.check, args.threads)
    for fault in faults:
        print(fault)
    print(f"{readable(args.check)}: {len(faults) or 'no'} fault(s)")
    return int(bool(faults))


def convert(args: argparse.Namespace) -> int:
    from pipelines.convert import MOST_TOLD, Encoding, convert_cifar10, convert_folder
    from pipelines.convert_boxes import convert_boxes
    from pipelines.files import readable
    from pipelines.sources.beton import BetonStore
    from pipelines.sources.listing import Listing
    from pipelines.sources.sidecar import sidecar_path

    encoding = Encoding(args.max_side, args.quality, args.raw)
    if args.annotations is not None:
        done = convert_boxes(
            args.src,
            args.annotations,
            args.dst,
            encoding,
            skip_bad=args.skip_bad,
            threads=args.threads,
        )
    elif args.src == "cifar10":
        done = convert_cifar10(args.dst, args.split or "train", args.limit)
    else:
        done = convert_folder(
            args.src,
            args.dst,
            encoding,
            skip_bad=args.skip_bad,
            allow_odd_classes=args.allow_odd_classes,
            threads=args.threads,
        )
    skipped = done["skipped"]
    for path in skipped[:MOST_TOLD]:
        print(f"left out: {readable(path)}")
    if len(skipped) > MOST_TOLD:
        print(f"and {len(skipped) - MOST_TOLD:,} more, all in {readable(sidecar_path(args.dst))}")
    for note in Listing((), [], done.get("ignored", {})).notes():
        print(note)
    for what, count in done.get("counted", {}).items():
        if count:
            print(f"{count:,} {what}")
    with closing(BetonStore(args.dst)) as store:  # what is reported is what can be read
        print("\n".join(store.describe()))
    print(f"{readable(args.dst)}: {done['count']} images, {len(skipped)} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
