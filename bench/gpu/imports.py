"""Which of the project's modules do not import here?

    python -m bench.gpu.imports

Prints this machine's versions and each module that fails with its reason. Exit status 1 if there
are any.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from bench.common import ROOT

VERSIONS = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "numba",
    "pydantic",
    "faster-coco-eval",
    "simplejpeg",
)
# DALI is no part of the kit. Conversion is not measured on a GPU machine, and FFCV's own writer
# compiles for ten seconds.
NOT_NEEDED = {"pipelines.loaders.dali", "bench.convert"}


def modules() -> list[str]:
    """Every module of fap, pipelines and bench, by name."""
    names = set()
    for package in ("fap", "pipelines", "bench"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.add(".".join(parts).removesuffix(".__init__"))
    return sorted(names - NOT_NEEDED)


def failures(names: list[str]) -> dict[str, str]:
    """The modules that do not import, and why."""
    found = {}
    for name in names:
        try:
            import_module(name)
        except BaseException as error:  # a module may also leave by SystemExit
            found[name] = f"{type(error).__name__}: {error}"
    return found


def version_of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} missing"


def main() -> int:
    facts = [f"python {sys.version.split()[0]}"]
    facts += [version_of(package) for package in VERSIONS]
    facts.append(f"{len(os.sched_getaffinity(0))} cores")
    print(", ".join(facts))
    names = modules()
    failed = failures(names)
    for name, reason in failed.items():
        print(f"IMPORT FAILED {name}: {reason}")
    print(f"{len(names) - len(failed)} of {len(names)} modules import")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
