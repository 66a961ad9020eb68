"""What the suite measures, in order of value: one process per cell, so that no failure reaches the
next one.

First contact and the GPU tests come first, since without them no figure means anything. Then every
cell that a target hangs on (`bench.gpu.table.TARGETS`), then the rest: whole-batch norm, bfloat16,
the other schedules, the peers, each of our ingredients taken away, the loaders, the study.
"""

from dataclasses import dataclass
from pathlib import Path

STUDY_SECONDS = "{seconds}"  # stands for the seconds left


@dataclass(frozen=True)
class Cell:
    """One process: `python -m` and its words; `--out FOLDER` is added where `results` is set."""

    name: str
    words: tuple[str, ...]
    limit_s: int
    """Ended after so many seconds."""
    usual_s: int
    """Not started with less time left."""
    at_once: bool = False
    """Runs beside its neighbours: nothing is timed here."""
    needs: tuple[str, ...] = ()
    """Packages without which it is left out."""
    results: bool = True
    """Writes a JSON of results into its folder."""


@dataclass(frozen=True)
class Sizes:
    """The real thing, or a toy that exercises the same code on a CPU."""

    model: str
    px: int
    rows: dict[
        int, int
    ]  # clean rows, by those of the real thing: a large step, and one batch-norm group
    amp: dict[str, str]  # precision, by that of the real thing
    half: str  # precision of what exists in half precision only
    rounds: int
    block: int  # steps per block
    images: int  # JPEGs for the loaders
    loader: tuple[str, ...]
    smoke: tuple[str, ...]
    kernels: tuple[str, ...]
    study: tuple[str, ...]
    compile_backend: str
    test_processes: int
    tests: str  # what pytest collects


REAL = Sizes(
    model="resnet50",
    px=224,
    rows={256: 256, 64: 64},
    amp={"fp16": "fp16", "bf16": "bf16"},
    half="fp16",
    rounds=6,
    block=5,
    images=8000,
    loader=("--rounds", "2", "--seconds", "5"),
    smoke=(),
    kernels=(),
    study=(),
    compile_backend="inductor",
    test_processes=6,
    tests="tests",
)
TOY = Sizes(
    model="cifar_resnet8",
    px=4,
    rows={256: 128, 64: 64},
    amp={"fp16": "off", "bf16": "bf16"},  # a CPU takes seconds for what float16 needs
    half="bf16",
    rounds=1,
    block=1,
    images=480,
    loader=("--rounds", "1", "--seconds", "0.1", "--batch", "8"),
    smoke=("--steps", "1"),
    kernels=("--main-rows", "2", "--aux-rows", "2"),
    study=("--toy",),
    compile_backend="eager",
    test_processes=0,
    tests="tests/test_graph.py",
)


def cells(sizes: Sizes, images: Path) -> list[Cell]:
    """Every cell in the order in which it runs. `images`: folder of the loaders' JPEGs, made by the
    first wave.
    """
    first = [*_smoke(sizes), _photos(sizes, images), _tests(sizes)]
    targets = [
        _parity(sizes, "fp16", 256, "fused", "groups"),
        _parity(sizes, "fp16", 64, "fused", "groups"),
        _parity(sizes, "fp16", 256, "pipelined", "groups"),
        _parity(sizes, "fp16", 64, "pipelined", "groups"),
        Cell("kernels", ("bench.gpu.kernels", *sizes.kernels), 90, 25),
        _step(sizes, 256, "timm-like: AMP"),
        _profile("vanilla", sizes),
        _profile("fused", sizes),
        _step(sizes, 256, "torchvision reference"),
        _step(sizes, 256, "timm-like, compiled", limit_s=240, usual_s=90),
    ]
    # At toy size one of each is enough: the others differ in a value that other cells try.
    batch_sizes = (64,) if sizes is TOY else (256, 64)
    both = ("fused",) if sizes is TOY else ("fused", "pipelined")
    whole_batch_norm = [
        _parity(sizes, "fp16", rows, schedule, "whole") for rows in batch_sizes for schedule in both
    ]
    bfloat16 = [
        _parity(sizes, "bf16", rows, schedule, "groups")
        for rows in batch_sizes
        for schedule in both
    ]
    schedules = [
        _parity(sizes, "fp16", rows, schedule, "groups")
        for rows in batch_sizes
        for schedule in ("sequential", "parallel")
    ]
    peers = [_step(sizes, 64, "three passes: fp32"), _step(sizes, 64, "three passes: AMP")]
    if sizes is not TOY:
        peers += [
            _step(sizes, 64, "timm-like: AMP"),
            _step(sizes, 64, "torchvision reference"),
            _step(sizes, 64, "timm-like, compiled", limit_s=240, usual_s=90),
        ]
    on_gpu_only = () if sizes is TOY else ("norm kernel", "graph")
    ingredients = [
        _step(sizes, 64, f"ours without {name}")
        for name in (*on_gpu_only, "stem function", "channels_last")
    ]
    ingredients += [
        _step(sizes, 64, f"ours without {name}", amp=sizes.half)
        for name in ("half-precision copy", "AMP")
    ]
    return [*first, *targets, *whole_batch_norm, *bfloat16, *schedules, *peers, *ingredients, *_loaders(sizes, images),
            _study(sizes)]  # fmt: skip


def _smoke(sizes: Sizes) -> list[Cell]:
    schedules = ("vanilla", "fused", "pipelined", "sequential", "parallel")
    size = (
        "--model",
        sizes.model,
        "--size",
        str(sizes.px),
        "--rows",
        str(sizes.rows[64]),
        "--amp",
        "fp16",
    )
    return [
        Cell(
            f"smoke/{name}",
            ("bench.gpu.smoke", "--schedule", name, *size, *sizes.smoke),
            120,
            20,
            at_once=True,
        )
        for name in schedules
    ]


def _photos(sizes: Sizes, images: Path) -> Cell:
    made_up = ("--made-up",) if sizes is TOY else ()
    words = ("bench.jpegs", str(images), "--count", str(sizes.images), "--beton", *made_up)
    return Cell("photos", words, 120, 20, at_once=True, results=False)


def _tests(sizes: Sizes) -> Cell:
    words = ("pytest", "-m", "gpu and not soak", "-rs", "-q", "-p", "no:cacheprovider",
             "-n", str(sizes.test_processes), "--dist", "worksteal", sizes.tests)  # fmt: skip
    return Cell("tests", words, 240, 60, results=False)


def _parity(sizes: Sizes, amp: str, rows: int, schedule: str, bn: str, *more: str) -> Cell:
    words = ("bench.cost_parity", "--amp", sizes.amp[amp], "--models", sizes.model, "--size", str(sizes.px),
             "--rows", str(sizes.rows[rows]),
             "--schedules", schedule, "--vanilla-bn", bn, "--no-equal-rows", "--rounds", str(sizes.rounds), *more)  # fmt: skip
    block = () if more else ("--block", str(sizes.block))
    name = "loader" if more else "parity"
    return Cell(f"{name}/{amp}/{rows}/{schedule}/{bn}", words + block, 120, 30)


def _step(
    sizes: Sizes, rows: int, contender: str, amp: str = "", limit_s: int = 120, usual_s: int = 30
) -> Cell:
    amp = amp or sizes.amp["fp16"]
    words = ("bench.step", "--amp", amp, "--model", sizes.model, "--size", str(sizes.px), "--rows", str(sizes.rows[rows]),
             "--rounds", str(sizes.rounds), "--block", str(sizes.block), "--only", contender)  # fmt: skip
    compiled = (
        ("--compile", "--compile-backend", sizes.compile_backend)
        if "compiled" in contender
        else ("--no-compile",)
    )
    return Cell(f"step/{rows}/{contender}", words + compiled, limit_s, usual_s)


def _profile(method: str, sizes: Sizes) -> Cell:
    words = ("bench.gpu.profile", "--method", method, "--model", sizes.model, "--size", str(sizes.px),
             "--rows", str(sizes.rows[256]), "--amp", sizes.amp["fp16"])  # fmt: skip
    return Cell(f"profile/{method}", words, 90, 25)


def _loaders(sizes: Sizes, images: Path) -> list[Cell]:
    beton = images.with_suffix(".beton")
    bench = (
        "bench.loaders",
        "--images",
        str(images),
        "--beton",
        str(beton),
        *sizes.loader,
        "--only",
    )
    on_gpu = () if sizes is TOY else ("dali, GPU, hw 0.65", "stock DALI, GPU")
    found = [
        Cell("loaders/ffcv", (*bench, "ffcv"), 60, 25, needs=("ffcv",)),
        Cell("loaders/torchvision", (*bench, "torchvision"), 60, 25),
        Cell("loaders/dali", (*bench, *(on_gpu or ("dali",))), 90, 30, needs=("nvidia.dali",)),
    ]
    for pipeline, package in (("ffcv", "ffcv"), ("dali", "nvidia.dali")):
        data = ("--data", str(beton), "--pipeline", pipeline)
        cell = _parity(sizes, "fp16", 256 if sizes is REAL else 64, "fused", "groups", *data)
        found.append(Cell(f"{cell.name}/{pipeline}", cell.words, 150, 60, needs=(package,)))
    return found


def _study(sizes: Sizes) -> Cell:
    words = ("bench.gpu.study", "--seconds", STUDY_SECONDS, *sizes.study)
    return Cell("study", words, 1800, 180)
