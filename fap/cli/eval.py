"""`fap-eval`: the way in. `fap.cli.eval_command`, which needs torch, does the rest."""

import sys
from collections.abc import Sequence

from fap.cli.output import survive
from fap.cli.signals import Stopped, end, importing, raising_stopped


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    with importing("fap-eval"):
        from fap.cli import eval_command
    try:
        with raising_stopped():
            return eval_command.run(argv)
    except Stopped as stopped:
        return end("fap-eval", stopped, "; the same command goes on after the last finished set")


if __name__ == "__main__":
    sys.exit(main())
