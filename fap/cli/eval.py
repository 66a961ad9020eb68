"""fap-eval: exact accuracy of checkpoints on clean images and under corruptions, beside the paper's numbers."""

import hashlib
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import pipelines
from fap import checkpoint
from fap.evaluate import evaluate, match_classes, summarise
from pipelines.corrupt import NAMES, QUICK, SMALL, build, corrupted, worker_pool

TOP1 = {"clean": "top-1 accuracy", "imagenet_r": "ImageNet-R top-1", "stylized": "Stylized-ImageNet top-1"}
KINDS = {"computed": "computed here, not the published files", "imagenet_c": "ImageNet-C", "cifar10_c": "CIFAR-10-C"}
SUMMARY = {"mean": "all sets", "raw_15": "15 corruptions", "raw_19": "19 corruptions", "mce": "mCE, AlexNet = 100"}
# What a set opens as: its class names (None: labels are the model's), the number of batches, the batches.
Opened = tuple[tuple[str, ...] | None, int, Iterator[Any]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="fap-eval", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a step_*.safetensors of a run")
    add("--data", required=True, help="clean images: a .beton file or an image folder")
    add("--corrupt", nargs="*", choices=["all", *NAMES],
        help=f"corrupt --data on the fly; alone: {', '.join(QUICK)}; all: 19 at 5 severities")  # fmt: skip
    add("--keep", metavar="DIR", help="build each corrupted set once, as a .beton of raw images in this folder")
    add("--severity", nargs="+", type=int, choices=range(1, 6), help="of --corrupt; default 3")
    add("--imagenet-c", metavar="DIR", help="CORRUPTION/SEVERITY/WNID/*.JPEG, taken without resize or crop")
    add("--imagenet-r", metavar="DIR", help="200 class folders; only those classes' logits count")
    add("--stylized", metavar="DIR", help="the validation folder of Stylized-ImageNet")
    add("--cifar10-c", metavar="DIR", help="CORRUPTION.npy and labels.npy")
    add("--bn", choices=("main", "aux"), default="main")
    add("--pipeline", choices=list(pipelines.BACK_ENDS), help="default: ffcv for a .beton, reference for a folder")
    add("--batch", type=int, default=256)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="of the corruptions computed here")
    add("--out", metavar="DIR", default="eval", help="for tables, plot and each set's result, which is not computed again")
    args = parser.parse_args(argv)
    try:
        if args.batch < 1:
            raise ValueError(f"--batch {args.batch}: must be at least 1")
        print(write_report([evaluate_checkpoint(Path(path), args) for path in args.checkpoints], Path(args.out)))
    except (ValueError, OSError, ImportError, pipelines.DamagedData, checkpoint.DamagedCheckpoint) as e:
        sys.exit(f"fap-eval: {e}")


def evaluate_checkpoint(path: Path, args: Namespace) -> dict[str, Any]:
    """Results of every set that `args` ask for; each is saved when it is finished, and not computed again."""
    model, config, meta = checkpoint.load_model(path, args.device)
    fields = ("data", "imagenet_c", "imagenet_r", "stylized", "cifar10_c", "bn", "pipeline", "seed")
    settings = {field: getattr(args, field) for field in fields}
    identity = _digest([settings, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns])
    saved = Path(args.out) / f"{config.name}-{identity}.json"
    saved.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(saved.read_text())["results"] if saved.exists() else {}
    report = {"checkpoint": str(path), "name": config.name, "seed": config.seed, "step": meta["step"],
              "paper": config.paper, "settings": settings, "results": done}  # fmt: skip
    many = config.data.size > SMALL or "all" in (args.corrupt or ())  # minutes of work; processes take seconds to start
    measure = partial(evaluate, model, mean=config.data.mean, std=config.data.std, bn=args.bn, device=args.device)
    with worker_pool() if many else ThreadPoolExecutor(1) as pool:
        sets = _sets(args, config.data.size, config.data.resize, pool)
        for key, opened in (bar := tqdm(sets.items(), desc=config.name, unit="set")):
            bar.set_postfix_str(key)
            if key in done:
                continue
            restrict = key == "imagenet_r"
            with opened as (names, steps, batches):
                label_map = match_classes(names, meta["classes"]) if names and (meta["classes"] or restrict) else None
                done[key] = asdict(measure(tqdm(batches, key, steps, leave=False), label_map=label_map, restrict=restrict))
            saved.with_suffix(".tmp").write_text(json.dumps(report, indent=1))
            saved.with_suffix(".tmp").replace(saved)  # complete or not at all
    return report | {"results": {key: done[key] for key in sets}}


def _sets(args: Namespace, size: int, resize: int, pool: Executor) -> dict[str, AbstractContextManager[Opened]]:
    """By name: clean | KIND/CORRUPTION/SEVERITY | imagenet_r | stylized."""
    sets: dict[str, AbstractContextManager[Opened]] = {"clean": _stored(args, size, resize, args.data)}
    everything = "all" in (args.corrupt or ())
    names = () if args.corrupt is None else NAMES if everything else args.corrupt or QUICK
    severities = args.severity or (range(1, 6) if everything else [3])
    for name, severity in product(NAMES, range(1, 6)):
        if name in names and severity in severities:
            change = partial(corrupted, name=name, severity=severity, seed=args.seed, pool=pool)
            computed, key = _stored(args, size, resize, args.data, change), f"computed/{name}/{severity}"
            sets[key] = computed if args.keep is None else _kept(args, size, f"{size}-{resize}-{key}", computed)
        if args.imagenet_c and (folder := Path(args.imagenet_c) / name / str(severity)).is_dir():
            sets[f"imagenet_c/{name}/{severity}"] = _stored(args, size, size, folder)
        if args.cifar10_c and (file := Path(args.cifar10_c) / f"{name}.npy").is_file():
            sets[f"cifar10_c/{name}/{severity}"] = _array(args, file, severity)
    for kind in ("imagenet_c", "cifar10_c"):
        if (folder := getattr(args, kind)) and not any(key.startswith(kind) for key in sets):
            raise ValueError(f"--{kind.replace('_', '-')} {folder}: holds none of {', '.join(NAMES)}")
    return sets | {k: _stored(args, size, resize, path) for k in ("imagenet_r", "stylized") if (path := getattr(args, k))}


@contextmanager
def _stored(args: Namespace, size: int, resize: int, path: str | Path, change: Callable | None = None) -> Iterator[Opened]:
    with closing(pipelines.open_store(path)) as store:
        plan = pipelines.eval_plan(store.heights, store.widths, size=size, resize=resize, batch=args.batch)
        back_end: Any = args.pipeline or ("reference" if Path(path).is_dir() else "ffcv")
        batches = pipelines.open_loader(back_end, store, size=size, device=args.device).load(plan)
        yield store.classes, len(plan), change(batches, plan.index) if change else batches


@contextmanager
def _kept(args: Namespace, size: int, key: str, computed: AbstractContextManager[Opened]) -> Iterator[Opened]:
    """A corrupted set as a `.beton` in args.keep, built the first time."""
    said = {"source": str(Path(args.data).resolve()), "changed": Path(args.data).stat().st_mtime_ns, "set": key,
            "seed": args.seed, "pipeline": args.pipeline}  # fmt: skip
    file = Path(args.keep) / f"{key.replace('/', '-')}-{_digest(said)}.beton"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with computed as (names, steps, batches):
            rows = tqdm(batches, f"building {file.name}", steps, leave=False)
            build(rows, file, capacity=steps * args.batch, classes=names or (), encoding=said)
    with _stored(args, size, size, file) as opened:
        yield opened


@contextmanager
def _array(args: Namespace, file: Path, severity: int) -> Iterator[Opened]:
    images, labels = np.load(file, mmap_mode="r"), torch.from_numpy(np.load(file.with_name("labels.npy")).astype(np.int64))
    if images.ndim != 4 or len(images) != len(labels) or len(images) % 5:
        raise ValueError(f"{file}: {images.shape}, labels {tuple(labels.shape)}: expected five severities, as many of each")
    of_each = len(images) // 5
    parts = np.array_split(np.arange((severity - 1) * of_each, severity * of_each), -(-of_each // args.batch))
    rows = (pipelines.Batch(torch.from_numpy(images[p]).permute(0, 3, 1, 2), labels[p], i) for i, p in enumerate(parts))
    yield None, len(parts), rows


def rows_of(report: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """{row of the table: (ours, the paper's or None)}; percent but for the loss."""
    results, paper = report["results"], {"clean": report["paper"].get("top1")} | report["paper"]
    rows = {row: (100 * results[key]["top1"], paper.get(key)) for key, row in TOP1.items() if key in results}
    rows |= {"top-5 accuracy": (100 * results["clean"]["top5"], None), "loss": (results["clean"]["loss"], None)}
    errors: dict[str, dict[str, dict[int, float]]] = {}  # {kind: {corruption: {severity: a fraction}}}
    for kind, name, severity in (key.split("/") for key in results if "/" in key):
        error = 1 - results[f"{kind}/{name}/{severity}"]["top1"]
        errors.setdefault(kind, {}).setdefault(name, {})[int(severity)] = error
    for kind, of_kind in errors.items():
        for key, value in summarise(of_kind).items():
            of_paper = paper.get("imagenet_c") if key == "raw_19" and kind != "cifar10_c" else None
            rows[f"error, {SUMMARY[key]} ({KINDS[kind]})"] = (value, of_paper)
        for name, by_severity in of_kind.items():
            rows[f"error, {name} ({KINDS[kind]})"] = (100 * fmean(by_severity.values()), None)
    return rows


def write_report(reports: list[dict[str, Any]], out: Path) -> str:
    """Write report.md, report.json and report.png, the checkpoints side by side; returns the Markdown."""
    import matplotlib.figure  # a Figure of its own needs no display

    tables = [rows_of(r) for r in reports]
    heads = [f"{r['name']}, seed {r['seed']}, step {r['step']}" for r in reports]
    settings, rows = reports[0]["settings"], list(tables[0])
    lines = [f"{reports[0]['results']['clean']['count']} images of {settings['data']}, {settings['bn']} BN; percent.", ""]
    lines += [f"| | {' | '.join(heads)} |", "|---" + "|--:" * len(heads) + "|"]
    lines += [f"| {row} | {' | '.join(_cell(*table[row]) for table in tables)} |" for row in rows]
    (out / "report.md").write_text(text := "\n".join(lines) + "\n")
    full = [r | {"summary": {row: ours for row, (ours, _) in t.items()}} for r, t in zip(reports, tables, strict=True)]
    (out / "report.json").write_text(json.dumps(full, indent=1))
    rows.remove("loss")
    figure = matplotlib.figure.Figure(figsize=(10, 1 + 0.2 * len(rows) * (1 + len(heads))), layout="constrained")
    axes, width = figure.add_subplot(xlabel="percent"), 0.8 / len(heads)
    for i, (head, table) in enumerate(zip(heads, tables, strict=True)):
        axes.barh(np.arange(len(rows)) + (i + 0.5) * width, [table[row][0] for row in rows], width, label=head)
    axes.set_yticks(np.arange(len(rows)) + 0.4, rows)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(out / "report.png", dpi=120)
    return text


def _cell(ours: float, paper: float | None) -> str:
    return f"{ours:.2f}" if paper is None else f"{ours:.2f} (paper {paper:g})"


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
