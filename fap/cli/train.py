"""Train an image classifier with Fast AdvProp (the default), AdvProp or plain training.

Without CONFIG: Fast AdvProp, ResNet-50, ImageNet. Example: fap-train configs/imagenet/vanilla.yaml
data.train=train.beton data.val=val.beton --pipeline dali resume=auto
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

import pipelines
from fap.checkpoint import DamagedCheckpoint
from fap.config import load_config
from fap.distributed import connect, disconnect
from fap.graph import FreshProcessNeeded
from fap.train import Interrupted, NonFinite, Run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fap-train", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="e.g. optim.lr=0.2; any config field")
    parser.add_argument("--pipeline", choices=list(pipelines.BACK_ENDS), help="short for data.pipeline=...")
    args = parser.parse_intermixed_args(argv)
    overrides = [word for word in args.words if "=" in word]
    files = [word for word in args.words if "=" not in word]
    if args.pipeline:
        overrides.append(f"data.pipeline={args.pipeline}")
    try:
        if len(files) > 1:
            raise ValueError(f"one CONFIG.yaml at most, found {', '.join(files)}; other words must be key=value")
        config = load_config(files[0] if files else None, overrides)
        ranks = connect("cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu")
        result = Run(config, ranks).train()
    except Interrupted as e:
        print(f"fap-train: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except FreshProcessNeeded as e:
        if ranks.world > 1:  # torchrun started us, and the other ranks are where they are
            sys.exit(f"fap-train: {e}")
        _start_again(argv, e)
    except (ValueError, OSError, ImportError, NonFinite, DamagedCheckpoint, pipelines.DamagedData) as e:
        sys.exit(f"fap-train: {e}")
    finally:
        disconnect()
    if ranks.first:
        done = "done: top-1 {top1:.2%}, top-5 {top5:.2%} after {image_passes:,} image passes in {seconds:.0f} s"
        print(done.format(**result | result["last"]))


def _start_again(argv: Sequence[str] | None, e: FreshProcessNeeded) -> NoReturn:
    """Replace this process by one with the same arguments and, as later words win, `e.settings`.

    That one cannot fail for the same reason again: what is asked for by name does not fall back.
    """
    more = [*e.settings, "resume=auto"]
    said = f"fap-train: {e.reason}; a fresh process goes on with {' '.join(more)}"
    print(said, file=sys.stderr)
    if argv is None:
        _, *command = sys.orig_argv
    else:
        command = ["-m", "fap.cli.train", *argv]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *command, *more])


if __name__ == "__main__":
    main()
