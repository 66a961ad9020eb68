"""fap-export: a run's checkpoint as plain weights that torchvision or timm load with strict=True."""

import argparse
import sys
from collections.abc import Sequence

from fap.checkpoint import DamagedCheckpoint, export


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fap-export", description=__doc__)
    parser.add_argument("checkpoint", help="a step_*.safetensors of a run")
    parser.add_argument("out", help="the .safetensors file to write; it must not exist")
    args = parser.parse_args(argv)
    try:
        meta = export(args.checkpoint, args.out)
    except (ValueError, OSError, DamagedCheckpoint) as error:
        print(f"fap-export: {error}", file=sys.stderr)
        return 1
    name = meta["model"].removeprefix("timm/")
    print(f"wrote {args.out}: {name}, {meta['num_classes']} classes, after {meta['step']} steps of run {meta['run']}")
    print(f"input: RGB in 0..1, {meta['size']} px, minus mean {meta['mean']}, divided by std {meta['std']}")
    print(f"load:  model.load_state_dict(safetensors.torch.load_file({args.out!r}), strict=True)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
