"""`fap-export`: a run's model as plain weights, ONNX or a folder of the Hugging Face Hub."""

import argparse
import os
import sys
from collections.abc import Sequence

from fap.cli.output import survive, told
from fap.cli.signals import Stopped, end, importing, raising_stopped

DESCRIPTION = "fap-export: a run's model for torchvision, timm, ONNX or the Hugging Face Hub."


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    parser = argparse.ArgumentParser(prog="fap-export", description=DESCRIPTION)
    parser.add_argument("checkpoint", help="a run's folder, or a step_*.safetensors of it")
    parser.add_argument(
        "out",
        help="what to write; it must not exist. By its name: NAME.safetensors and NAME.pth are "
        "weights, NAME.onnx is the model, NAME/ a folder for the Hugging Face Hub",
    )
    parser.add_argument(
        "--best", action="store_true", help="of a run's folder: the best epoch, not the newest"
    )
    parser.add_argument(
        "--normalise",
        action="store_true",
        help="of NAME.onnx: mean and std inside, so that it takes RGB in 0..1",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of a run with optim.ema: the average (default), or the raw ones",
    )
    parser.add_argument(
        "--bn",
        choices=("main", "aux"),
        default="main",
        help="the norms that the model gets: those of clean images (main, default), or the "
        "auxiliary ones, which trained on adversarial images",
    )
    args = parser.parse_args(argv)
    with importing("fap-export"):
        from fap.checkpoint import DamagedCheckpoint, checkpoint_at
        from fap.export.formats import export
    out = os.path.expanduser(args.out)
    try:
        with raising_stopped():
            path = checkpoint_at(os.path.expanduser(args.checkpoint), best=args.best)
            lines = export(path, out, normalise=args.normalise, weights=args.weights, bn=args.bn)
    except Stopped as stopped:
        return end("fap-export", stopped)
    except (ValueError, OSError, ImportError, DamagedCheckpoint) as error:
        print(f"fap-export: {told(error)}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"fap-export: {args.checkpoint}: not enough memory for it", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
