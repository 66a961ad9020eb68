"""Train an image classifier with Fast AdvProp (the default), AdvProp or plain training.

Without CONFIG: Fast AdvProp, ResNet-50, ImageNet. Example: fap-train configs/imagenet/vanilla.yaml
data.train=train.beton data.val=val.beton --pipeline dali resume=auto

SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save and leave with exit code 128 + the
signal's number; a Ctrl-C two seconds after that ends at once. Exit code 0 means that the last
checkpoint and result.json are on the disk.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fap.cli.output import survive
from fap.cli.signals import importing


def main(argv: Sequence[str] | None = None) -> None:
    survive()
    try:
        _train(argv)
    except (
        KeyboardInterrupt
    ):  # between those that handle the signals: after the imports, after the run
        _end(130, "stopped by SIGINT")


def _train(argv: Sequence[str] | None) -> None:
    with importing("fap-train"):
        import pipelines
        from fap.checkpoint import DamagedCheckpoint
        from fap.config import load_config
        from fap.distributed import ONE_RANK, connect, disconnect, lost_a_rank
        from fap.run.monitor import NonFinite
        from fap.run.saving import NotSaved
        from fap.run.session import Interrupted, StopSignal
        from fap.run.train import Run
        from fap.step.graph import FreshProcessNeeded, out_of_memory

    parser = argparse.ArgumentParser(prog="fap-train", description=__doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | key=value",
        help="e.g. optim.lr=0.2; any config field",
    )
    parser.add_argument(
        "--pipeline", choices=list(pipelines.BACK_ENDS), help="short for data.pipeline=..."
    )
    args = parser.parse_intermixed_args(argv)
    overrides = [word for word in args.words if "=" in word]
    files = [word for word in args.words if "=" not in word]
    if args.pipeline:
        overrides.append(f"data.pipeline={args.pipeline}")

    ranks = ONE_RANK
    with StopSignal() as stop:
        try:
            ranks = connect()
            with ranks.together():
                if len(files) > 1:
                    raise ValueError(
                        f"one CONFIG.yaml at most, found {', '.join(files)}; other words must be"
                        " key=value"
                    )
                config = load_config(files[0] if files else None, overrides)
            result = Run(config, ranks, stop).train()
            disconnect()
        except Interrupted as e:
            _end(e.exit_code, str(e), ranks.world)
        except FreshProcessNeeded as e:
            if ranks.world > 1:  # torchrun started us, and the other ranks are where they are
                _end(1, str(e), ranks.world)
            _start_again(argv, e.reason, e.settings)
        except (
            ValueError,
            OSError,
            ImportError,
            NonFinite,
            NotSaved,
            DamagedCheckpoint,
            pipelines.DamagedData,
        ) as e:
            _end(1, str(e), ranks.world)
        except (RuntimeError, MemoryError) as e:
            if lost_a_rank(e):
                _end(
                    1,
                    "another rank is gone, its own output says why"
                    f" ({str(e).splitlines()[0][:200]})",
                    ranks.world,
                )
            if out_of_memory(e):
                smaller = (
                    "fewer optim.clean_batch rows, a smaller model or data.size, or fewer"
                    " data.threads"
                )
                _end(1, f"out of memory: {str(e)[:300]}\nremedies: {smaller}", ranks.world)
            raise
    if ranks.first:
        done = (
            "done: top-1 {top1:.2%}, top-5 {top5:.2%} after {image_passes:,} image passes in"
            " {seconds:.0f} s"
        )
        print(done.format(**result | result["last"]))


def _end(code: int, message: str, world: int = 1) -> NoReturn:
    """Say why and exit; one of several ranks at once, since tidying up would wait for the others."""
    print(f"fap-train: {message}", file=sys.stderr)
    if world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _start_again(argv: Sequence[str] | None, reason: str, settings: Sequence[str]) -> NoReturn:
    """Replace this process by one with the same arguments and, as later words win, `settings`.

    That one cannot fail for the same reason again: what is asked for by name does not fall back.
    """
    more = [*settings, "resume=auto"]
    print(f"fap-train: {reason}; a fresh process goes on with {' '.join(more)}", file=sys.stderr)
    if argv is None:
        _, *command = sys.orig_argv
    else:
        command = ["-m", "fap.cli.train", *argv]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *command, *more])


if __name__ == "__main__":
    main()
