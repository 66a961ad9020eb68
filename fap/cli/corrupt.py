"""`fap-corrupt`: the way in. `fap.cli.corrupt_command`, which needs torch, does the rest."""

import sys
from collections.abc import Sequence

from fap.cli.output import survive
from fap.cli.signals import Stopped, end, importing, raising_stopped


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    with importing("fap-corrupt"):
        from fap.cli import corrupt_command
    try:
        with raising_stopped(tidying=True):
            return corrupt_command.run(argv)
    except Stopped as stopped:
        return end("fap-corrupt", stopped, "; the same command goes on after the last whole set")


if __name__ == "__main__":
    sys.exit(main())
