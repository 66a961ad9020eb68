"""`fap-convert SRC DST.beton`: make the data file that `fap-train` reads."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from os.path import expanduser, lexists

from fap.cli.output import survive, told
from fap.cli.signals import Stopped, importing, raising_stopped


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
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
    a = parser.parse_args(argv)
    if (a.check is None) == (a.src is None) or (a.src is None) != (a.dst is None):
        parser.error("give SRC and DST, or --check FILE")
    for_folders = (
        a.max_side is not None
        or a.quality is not None
        or a.raw
        or a.skip_bad
        or a.allow_odd_classes
    )
    if (a.check or a.src == "cifar10") and for_folders:
        parser.error(
            "--max-side, --quality, --raw, --skip-bad and --allow-odd-classes are for image folders"
        )
    if a.src != "cifar10" and (a.split or a.limit is not None):
        parser.error("--split and --limit are for cifar10")
    if a.threads is not None and (a.threads < 1 or a.src == "cifar10"):
        parser.error(
            f"--threads {a.threads}: at least 1, and not for cifar10, which is not decoded"
        )
    return a


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    a = parse(argv)
    with importing("fap-convert"):
        import pipelines.convert  # noqa: F401  # with all that `check` and `convert` import
    try:
        with raising_stopped(tidying=True):
            return check(a) if a.check else convert(a)
    except Stopped as stopped:
        state = "the file is complete" if a.dst and lexists(a.dst) else "nothing was written"
        print(f"\nfap-convert: stopped by {stopped}; {state}", file=sys.stderr)
        return stopped.exit_code
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        print(f"fap-convert: {told(error)}", file=sys.stderr)
        return 1


def check(a: argparse.Namespace) -> int:
    from pipelines.convert import check as faults_of
    from pipelines.files import readable

    faults = faults_of(a.check, a.threads)
    print("\n".join([*faults, f"{readable(a.check)}: {len(faults) or 'no'} fault(s)"]))
    return int(bool(faults))


def convert(a: argparse.Namespace) -> int:
    from pipelines.convert import MOST_TOLD, Encoding, convert_cifar10, convert_folder
    from pipelines.files import readable
    from pipelines.sources.beton import BetonStore
    from pipelines.sources.listing import Listing
    from pipelines.sources.sidecar import sidecar_path

    if a.src == "cifar10":
        done = convert_cifar10(a.dst, a.split or "train", a.limit)
    else:
        encoding = Encoding(a.max_side, a.quality, a.raw)
        permissions = {"skip_bad": a.skip_bad, "allow_odd_classes": a.allow_odd_classes}
        done = convert_folder(a.src, a.dst, encoding, **permissions, threads=a.threads)
    skipped = done["skipped"]
    for path in skipped[:MOST_TOLD]:
        print(f"left out: {readable(path)}")
    if len(skipped) > MOST_TOLD:
        print(f"and {len(skipped) - MOST_TOLD:,} more, all in {readable(sidecar_path(a.dst))}")
    for note in Listing((), [], done.get("ignored", {})).notes():
        print(note)
    with closing(BetonStore(a.dst)) as store:  # what is reported is what can be read
        print("\n".join(store.describe()))
    print(f"{readable(a.dst)}: {done['count']} images, {len(skipped)} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
