"""`fap-predict`: the way in. `fap.cli.predict_command`, which needs torch, does the rest."""

import sys
from collections.abc import Sequence

from fap.cli.output import survive
from fap.cli.signals import Stopped, end, importing, raising_stopped


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    with importing("fap-predict"):
        from fap.cli import predict_command
    try:
        with raising_stopped():
            return predict_command.run(argv)
    except Stopped as stopped:
        return end("fap-predict", stopped, "; a file is written whole or not at all")


if __name__ == "__main__":
    sys.exit(main())
