"""`fap-train`: the way in. `fap.cli.train_command`, which needs torch, does the rest."""

import sys
from collections.abc import Sequence

from fap.cli.output import survive
from fap.cli.signals import importing


def main(argv: Sequence[str] | None = None) -> None:
    survive()
    try:
        with importing("fap-train"):
            from fap.cli import train_command
        train_command.run(argv)
    # A Ctrl-C between those that handle the signals: after the imports, after the run.
    except KeyboardInterrupt:
        print("fap-train: stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
