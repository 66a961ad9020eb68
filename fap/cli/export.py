"""`fap-export`: a run's checkpoint as plain weights that torchvision or timm load."""

import argparse
import os
import sys
from collections.abc import Sequence

from fap.cli.output import survive, told
from fap.cli.signals import Stopped, end, importing, raising_stopped

DESCRIPTION = (
    "fap-export: a run's checkpoint as plain weights "
    "that torchvision or timm load with strict=True."
)


def main(argv: Sequence[str] | None = None) -> int:
    survive()
    parser = argparse.ArgumentParser(prog="fap-export", description=DESCRIPTION)
    parser.add_argument("checkpoint", help="a run's folder, or a step_*.safetensors of it")
    parser.add_argument("out", help="the .safetensors file to write; it must not exist")
    parser.add_argument(
        "--best", action="store_true", help="of a run's folder: the best epoch, not the newest"
    )
    args = parser.parse_args(argv)
    with importing("fap-export"):
        from fap.checkpoint import checkpoint_at
        from fap.evaluate import load
    out = os.path.expanduser(args.out)
    try:
        with raising_stopped():
            path = checkpoint_at(os.path.expanduser(args.checkpoint), best=args.best)
            meta = load.export(path, out)
    except Stopped as stopped:
        return end("fap-export", stopped)
    except (ValueError, OSError, load.DamagedCheckpoint) as error:
        print(f"fap-export: {told(error)}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"fap-export: {args.checkpoint}: not enough memory for it", file=sys.stderr)
        return 1

    name = meta["model"].removeprefix("timm/")
    classes = f"{meta['num_classes']} classes"
    print(f"wrote {out}: {name}, {classes}, after {meta['step']} steps of run {meta['run']}")
    scaled = f"minus mean {meta['mean']}, divided by std {meta['std']}"
    print(f"input: RGB in 0..1, {meta['size']} px, {scaled}")
    print(f"load:  model.load_state_dict(safetensors.torch.load_file({out!r}), strict=True)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
