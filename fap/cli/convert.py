"""`fap-convert SRC DST.beton`: make the data file that `fap-train` reads."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from os.path import expanduser, lexists

from fap.cli.output import survive, told
from fap.cli.signals import Stopped, importing, raising_stopped


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    args = arguments(argv)
    with importing("fap-convert"):
        import pipelines.convert  # noqa: F401  # with all that `check` and `convert` import
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
    parser = argparse.ArgumentParser("fap-convert", description=__doc__)
    add = parser.add_argument
    add(
        "src",
        nargs="?",
        type=expanduser,
        help="image folder in ImageNet's layout (one folder per class), or cifar10",
    )
    add(
        "dst",
        nargs="?",
        type=expanduser,
        help="file to write; one that exists is never overwritten",
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
    args = parser.parse_args(argv)
    _refuse_what_does_not_go_together(args, parser)
    return args


def _refuse_what_does_not_go_together(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    converts = args.src is not None
    checks = args.check is not None
    if converts == checks or converts != (args.dst is not None):
        parser.error("give SRC and DST, or --check FILE")
    cifar10 = args.src == "cifar10"
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
    from pipelines.files import readable
    from pipelines.sources.beton import BetonStore
    from pipelines.sources.listing import Listing
    from pipelines.sources.sidecar import sidecar_path

    if args.src == "cifar10":
        done = convert_cifar10(args.dst, args.split or "train", args.limit)
    else:
        done = convert_folder(
            args.src,
            args.dst,
            Encoding(args.max_side, args.quality, args.raw),
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
    with closing(BetonStore(args.dst)) as store:  # what is reported is what can be read
        print("\n".join(store.describe()))
    print(f"{readable(args.dst)}: {done['count']} images, {len(skipped)} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
