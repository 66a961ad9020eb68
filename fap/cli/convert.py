"""`fap-convert SRC DST.beton`: make the data file that `fap-train` reads."""

import argparse
import signal
import sys
from collections.abc import Sequence

from pipelines.convert import Encoding, check, convert_cifar10, convert_folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("fap-convert", description=__doc__)
    add = parser.add_argument
    add("src", nargs="?", help="image folder in ImageNet's layout (one folder per class), or cifar10")
    add("dst", nargs="?", help="file to write; one that exists is never overwritten")
    add("--check", metavar="FILE", help="verify structure and every checksum of a .beton, writing nothing")
    add("--max-side", type=int, metavar="N", help="shrink larger images so that the longer side is N pixels")
    add("--quality", type=int, metavar="Q", help="re-encode every image as a JPEG of this quality")
    add("--raw", action="store_true", help="store decoded RGB pixels")
    add("--skip-bad", action="store_true", help="leave damaged images out instead of failing")
    add("--threads", type=int, metavar="T", help="default: all cores")
    add("--split", choices=("train", "test"), help="cifar10 only; default: train")
    add("--limit", type=int, metavar="N", help="cifar10 only: the first N images")
    a = parser.parse_args(argv)
    if (a.check is None) == (a.src is None) or (a.src is None) != (a.dst is None):
        parser.error("give SRC and DST, or --check FILE")
    if (a.check or a.src == "cifar10") and (a.max_side is not None or a.quality is not None or a.raw or a.skip_bad):
        parser.error("--max-side, --quality, --raw and --skip-bad are for image folders")
    if a.src != "cifar10" and (a.split or a.limit is not None):
        parser.error("--split and --limit are for cifar10")
    if a.threads is not None and (a.threads < 1 or a.src == "cifar10"):
        parser.error(f"--threads {a.threads}: at least 1, and not for cifar10, which is not decoded")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no partial file stays
    try:
        if a.check:
            faults = check(a.check, a.threads)
            print("\n".join([*faults, f"{a.check}: {len(faults) or 'no'} fault(s)"]))
            return bool(faults)
        if a.src == "cifar10":
            done = convert_cifar10(a.dst, a.split or "train", a.limit)
        else:
            done = convert_folder(a.src, a.dst, Encoding(a.max_side, a.quality, a.raw), skip_bad=a.skip_bad, threads=a.threads)
    except KeyboardInterrupt:
        print("\nfap-convert: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"fap-convert: {error}", file=sys.stderr)
        return 1
    for path in done["skipped"]:
        print(f"left out: {path}")
    print(f"{a.dst}: {done['count']} images, {len(done['skipped'])} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
