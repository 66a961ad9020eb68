"""What does the suite measure, and in which order? One process per cell.

    python -m bench.gpu.suite --list      # shows them

A library of `bench.gpu.suite`; no failure of a cell reaches the next one. First contact and the GPU
tests come first, since without them no figure means anything. Then every cell that a target hangs
on (`bench.gpu.table.TARGETS`), detection's too, then the rest: whole-batch norm, bfloat16, the
other schedules, the peers, each of our ingredients taken away, the loaders, the study.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STUDY_SECONDS = "{seconds}"  # stands for the seconds left

# Clean rows of the real thing: a large step, and one batch-norm group.
LARGE = 256
SMALL = 64

# Of detection, as in configs/coco: clean rows, and canvases.
DETECTOR_ROWS = 16
SQUARE = "640"
FULL = "800x1344"


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
    detector: str
    canvas: dict[str, str]  # of the detector, by that of the real thing
    rows: dict[int, int]  # clean rows, by those of the real thing
    amp: dict[str, str]  # precision, by that of the real thing
    half: str  # precision of what exists in half precision only
    rounds: int
    block: int  # steps per block
    images: int  # JPEGs for the loaders
    compile_backend: str
    test_processes: int
    tests: str  # what pytest collects
    # Further options of single benches.
    loaders: Mapping[str, Any]
    smoke: Mapping[str, Any]
    kernels: Mapping[str, Any]
    study: Mapping[str, Any]


REAL = Sizes(
    model="resnet50",
    px=224,
    detector="retinanet_resnet50_fpn",
    canvas={SQUARE: SQUARE, FULL: FULL},
    rows={LARGE: 256, SMALL: 64},
    amp={"fp16": "fp16", "bf16": "bf16"},
    half="fp16",
    rounds=6,
    block=5,
    images=8000,
    compile_backend="inductor",
    test_processes=6,
    tests="tests",
    loaders={"rounds": 2, "seconds": 5},
    smoke={},
    kernels={},
    study={},
)
TOY = Sizes(
    model="cifar_resnet8",
    px=4,
    detector="retinanet_tiny",
    canvas={SQUARE: "32", FULL: "32x64"},
    rows={LARGE: 128, SMALL: 64},
    amp={"fp16": "off", "bf16": "bf16"},  # a CPU takes seconds for what float16 needs
    half="bf16",
    rounds=1,
    block=1,
    images=480,
    compile_backend="eager",
    test_processes=0,
    tests="tests/step/test_capture.py",
    loaders={"rounds": 1, "seconds": 0.1, "batch": 8},
    smoke={"steps": 1},
    kernels={"main_rows": 2, "aux_rows": 2},
    study={"toy": True},
)


def cells(sizes: Sizes, images: Path) -> list[Cell]:
    """Every cell in the order in which it runs.

    `images` is the folder of the loaders' JPEGs, which the first wave makes.
    """
    return [
        *_smoke(sizes),
        _photos(sizes, images),
        _tests(sizes),
        *_targets(sizes),
        *_other_parities(sizes),
        *_other_peers(sizes),
        *_ingredients(sizes),
        *_loaders(sizes, images),
        _study(sizes),
    ]


def command(module: str, **options: Any) -> tuple[str, ...]:
    """What follows `python -m`: True is `--name`, False `--no-name`, a tuple several values."""
    words = [module]
    for name, value in options.items():
        option = name.replace("_", "-")
        match value:
            case True:
                words.append(f"--{option}")
            case False:
                words.append(f"--no-{option}")
            case tuple():
                words += [f"--{option}", *value]
            case _:
                words += [f"--{option}", str(value)]
    return tuple(words)


# ------------------------------------------------------------------ first contact


def _smoke(sizes: Sizes) -> list[Cell]:
    found = []
    for schedule in ("vanilla", "fused", "pipelined", "sequential", "parallel"):
        options = {"model": sizes.model, "size": sizes.px, "rows": sizes.rows[SMALL]}
        found.append(_smoke_of(sizes, schedule, schedule, options))
    detector = {"model": sizes.detector, "size": sizes.canvas[SQUARE], "rows": DETECTOR_ROWS}
    found.append(_smoke_of(sizes, "detection", "fused", detector))
    return found


def _smoke_of(sizes: Sizes, name: str, schedule: str, options: Mapping[str, Any]) -> Cell:
    words = command("bench.gpu.smoke", schedule=schedule, **options, amp="fp16", **sizes.smoke)
    return Cell(f"smoke/{name}", words, limit_s=120, usual_s=20, at_once=True)


def _photos(sizes: Sizes, images: Path) -> Cell:
    words: tuple[str, ...] = ("bench.jpegs", str(images), "--count", str(sizes.images), "--beton")
    if sizes is TOY:
        words += ("--made-up",)
    return Cell("photos", words, limit_s=120, usual_s=20, at_once=True, results=False)


def _tests(sizes: Sizes) -> Cell:
    words = (
        "pytest",
        *("-m", "gpu and not soak"),
        *("-rs", "-q"),
        *("-p", "no:cacheprovider"),
        *("-n", str(sizes.test_processes), "--dist", "worksteal"),
        sizes.tests,
    )
    return Cell("tests", words, limit_s=240, usual_s=60, results=False)


# ------------------------------------------------------------------ steps


def _targets(sizes: Sizes) -> list[Cell]:
    """All that a target hangs on, and two profiles."""
    kernels = command("bench.gpu.kernels", **sizes.kernels)
    return [
        _parity(sizes, "fp16", LARGE, "fused", "groups"),
        _parity(sizes, "fp16", SMALL, "fused", "groups"),
        _parity(sizes, "fp16", LARGE, "pipelined", "groups"),
        _parity(sizes, "fp16", SMALL, "pipelined", "groups"),
        Cell("kernels", kernels, limit_s=90, usual_s=25),
        _step(sizes, LARGE, "timm-like: AMP"),
        _profile(sizes, "vanilla"),
        _profile(sizes, "fused"),
        _step(sizes, LARGE, "torchvision reference"),
        _detection(sizes, SQUARE),
        _detection(sizes, FULL),
        _step(sizes, LARGE, "timm-like, compiled"),
    ]


def _other_parities(sizes: Sizes) -> list[Cell]:
    """Against whole-batch norm, in bfloat16, of the other schedules."""
    # At toy size one of each is enough: the others differ in a value that other cells try.
    batch_sizes: tuple[int, ...] = (LARGE, SMALL)
    both: tuple[str, ...] = ("fused", "pipelined")
    if sizes is TOY:
        batch_sizes = (SMALL,)
        both = ("fused",)
    found = []
    for amp, schedules, bn in (
        ("fp16", both, "whole"),
        ("bf16", both, "groups"),
        ("fp16", ("sequential", "parallel"), "groups"),
    ):
        for rows in batch_sizes:
            for schedule in schedules:
                found.append(_parity(sizes, amp, rows, schedule, bn))
    return found


def _other_peers(sizes: Sizes) -> list[Cell]:
    peers = ["three passes: fp32", "three passes: AMP"]
    if sizes is not TOY:
        peers += ["timm-like: AMP", "torchvision reference", "timm-like, compiled"]
    return [_step(sizes, SMALL, peer) for peer in peers]


def _ingredients(sizes: Sizes) -> list[Cell]:
    """Ours without each of its ingredients."""
    ingredients = ["stem function", "channels_last"]
    if sizes is not TOY:
        ingredients = ["norm kernel", "graph", *ingredients]
    found = [_step(sizes, SMALL, f"ours without {name}") for name in ingredients]
    for name in ("half-precision copy", "AMP"):
        found.append(_step(sizes, SMALL, f"ours without {name}", amp=sizes.half))
    return found


def _parity(
    sizes: Sizes, amp: str, rows: int, schedule: str, bn: str, data: Mapping[str, Any] | None = None
) -> Cell:
    """A whole run against vanilla's. `data` are a loader's options; without them there is none."""
    name = "parity"
    options = {"block": sizes.block}
    if data is not None:
        name = "loader"
        options = dict(data)
    words = command(
        "bench.cost_parity",
        amp=sizes.amp[amp],
        models=sizes.model,
        size=sizes.px,
        rows=sizes.rows[rows],
        schedules=schedule,
        vanilla_bn=bn,
        equal_rows=False,
        rounds=sizes.rounds,
        **options,
    )
    return Cell(f"{name}/{amp}/{rows}/{schedule}/{bn}", words, limit_s=120, usual_s=30)


def _detection(sizes: Sizes, canvas: str) -> Cell:
    """A whole run of a detector against vanilla's."""
    words = command(
        "bench.cost_parity",
        amp=sizes.amp["fp16"],
        models=sizes.detector,
        size=sizes.canvas[canvas],
        rows=DETECTOR_ROWS,
        schedules="fused",
        vanilla_bn="groups",
        equal_rows=False,
        rounds=sizes.rounds,
        block=sizes.block,
    )
    return Cell(f"detection/{canvas}", words, limit_s=180, usual_s=45)


def _step(sizes: Sizes, rows: int, contender: str, amp: str = "") -> Cell:
    """One contender of `bench.step`: the one whose name holds `contender`."""
    limit_s = 120
    usual_s = 30
    options: dict[str, Any] = {"compile": False}
    if "compiled" in contender:
        limit_s = 240
        usual_s = 90
        options = {"compile": True, "compile_backend": sizes.compile_backend}
    words = command(
        "bench.step",
        amp=amp or sizes.amp["fp16"],
        model=sizes.model,
        size=sizes.px,
        rows=sizes.rows[rows],
        rounds=sizes.rounds,
        block=sizes.block,
        only=contender,
        **options,
    )
    return Cell(f"step/{rows}/{contender}", words, limit_s, usual_s)


def _profile(sizes: Sizes, method: str) -> Cell:
    words = command(
        "bench.gpu.profile",
        method=method,
        model=sizes.model,
        size=sizes.px,
        rows=sizes.rows[LARGE],
        amp=sizes.amp["fp16"],
    )
    return Cell(f"profile/{method}", words, limit_s=90, usual_s=25)


# ------------------------------------------------------------------ loaders and study


def _loaders(sizes: Sizes, images: Path) -> list[Cell]:
    """The loaders alone, then cost parity with a loader in the loop."""
    beton = images.with_suffix(".beton")

    def alone(name: str, *contestants: str, limit_s: int, usual_s: int, **more: Any) -> Cell:
        words = command(
            "bench.loaders", images=images, beton=beton, **sizes.loaders, only=contestants
        )
        return Cell(f"loaders/{name}", words, limit_s, usual_s, **more)

    dali: tuple[str, ...] = ("dali, GPU, hw 0.65", "stock DALI, GPU")
    rows = LARGE
    if sizes is TOY:
        dali = ("dali",)
        rows = SMALL
    found = [
        alone("ffcv", "ffcv", limit_s=60, usual_s=25, needs=("ffcv",)),
        alone("torchvision", "torchvision", limit_s=60, usual_s=25),
        alone("dali", *dali, limit_s=90, usual_s=30, needs=("nvidia.dali",)),
    ]
    for pipeline, package in (("ffcv", "ffcv"), ("dali", "nvidia.dali")):
        data = {"data": beton, "pipeline": pipeline}
        cell = _parity(sizes, "fp16", rows, "fused", "groups", data)
        name = f"{cell.name}/{pipeline}"
        found.append(replace(cell, name=name, limit_s=150, usual_s=60, needs=(package,)))
    return found


def _study(sizes: Sizes) -> Cell:
    words = command("bench.gpu.study", seconds=STUDY_SECONDS, **sizes.study)
    return Cell("study", words, limit_s=1800, usual_s=180)
