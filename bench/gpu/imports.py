"""Which of the project's modules do not import here: `python -m bench.gpu.imports`. Exit status 1 if there are any."""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from bench.common import ROOT

VERSIONS = ("torch", "torchvision", "triton", "numpy", "numba", "pydantic")
NOT_NEEDED = {"pipelines.dali"}  # DALI is no part of the kit


def modules() -> list[str]:
    """Every module of fap, pipelines and bench, by name."""
    files = [path.relative_to(ROOT) for package in ("fap", "pipelines", "bench") for path in (ROOT / package).rglob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
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
    print(f"python {sys.version.split()[0]},", ", ".join(map(version_of, VERSIONS)) + f", {len(os.sched_getaffinity(0))} cores")
    names = modules()
    failed = failures(names)
    for name, reason in failed.items():
        print(f"IMPORT FAILED {name}: {reason}")
    print(f"{len(names) - len(failed)} of {len(names)} modules import")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
