"""fap-eval: exact accuracy of checkpoints on clean images and under corruptions, beside the paper's numbers."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import pipelines
from fap import checkpoint
from fap.evaluate import evaluate, match_classes, summarise
from pipelines.corrupt import NAMES, QUICK, SMALL, build, corrupted, worker_pool

KINDS = {
    "computed": "corruptions computed here, not the published files",
    "imagenet_c": "ImageNet-C, the published files",
    "cifar10_c": "CIFAR-10-C, the published files",
}
SUMMARY = {"mean": "all sets", "raw_15": "15 corruptions", "raw_19": "19 corruptions", "mce": "mCE, AlexNet = 100"}
# What a set opens as: its class names (None: labels are the model's), the number of batches, the batches.
Opened = tuple[tuple[str, ...] | None, int, Iterator[Any]]
Sets = dict[str, AbstractContextManager[Opened]]  # clean | KIND/CORRUPTION/SEVERITY | imagenet_r | stylized


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fap-eval", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a step_*.safetensors of a run")
    add("--data", required=True, help="clean images: a .beton file or an image folder")
    quick = ", ".join(QUICK)
    add("--corrupt", nargs="*", choices=["all", *NAMES], metavar="NAME",
        help=f"corrupt --data on the fly; alone: {quick}; all: 19 at 5 severities; or of {', '.join(NAMES)}")  # fmt: skip
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
    add("--limit", type=int, help="only so many images of every set, evenly spaced")
    add("--seed", type=int, default=0, help="of the corruptions computed here")
    add("--out", metavar="DIR", default="eval", help="for tables, plot and each set's result, which is not computed again")
    args = parser.parse_args(argv)
    try:
        if args.batch < 1 or (args.limit is not None and args.limit < 1):
            raise ValueError(f"--batch {args.batch} --limit {args.limit}: must be at least 1")
        print(write_report([evaluate_checkpoint(Path(path), args) for path in args.checkpoints], Path(args.out)))
    except (ValueError, OSError, ImportError, pipelines.DamagedData, checkpoint.DamagedCheckpoint) as e:
        sys.exit(f"fap-eval: {e}")


def evaluate_checkpoint(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Results of every set that `args` ask for; each is saved when it is finished, and not computed again."""
    model, config = checkpoint.load_model(path, args.device)
    meta = checkpoint.load(path)[1]
    fields = ("data", "imagenet_c", "imagenet_r", "stylized", "cifar10_c", "bn", "pipeline", "limit", "seed")
    settings = {field: getattr(args, field) for field in fields}
    identity = _digest([settings, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns])
    saved = Path(args.out) / f"{config.name}-{identity}.json"
    saved.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(saved.read_text())["results"] if saved.exists() else {}
    report = {"checkpoint": str(path), "name": config.name, "seed": config.seed, "step": meta["step"],
              "paper": config.paper, "settings": settings, "results": done}  # fmt: skip
    many = config.data.size > SMALL or "all" in (args.corrupt or ())  # minutes of work; processes take seconds to start
    with worker_pool() if many else ThreadPoolExecutor(1) as pool:
        sets = _sets(args, config.data.size, config.data.resize, pool)
        for key, opened in (bar := tqdm(sets.items(), desc=config.name, unit="set")):
            bar.set_postfix_str(key)
            if key in done:
                continue
            with opened as (names, steps, batches):
                label_map = (
                    match_classes(names, meta["classes"]) if names and (meta["classes"] or key == "imagenet_r") else None
                )
                done[key] = asdict(evaluate(
                    model, tqdm(batches, key, steps, leave=False), mean=config.data.mean, std=config.data.std,
                    bn=args.bn, device=args.device, label_map=label_map, restrict=key == "imagenet_r",
                ))  # fmt: skip
            saved.with_suffix(".tmp").write_text(json.dumps(report, indent=1))
            saved.with_suffix(".tmp").replace(saved)  # complete or not at all
    return report | {"results": {key: done[key] for key in sets}}


def _sets(args: argparse.Namespace, size: int, resize: int, pool: Executor) -> Sets:
    back_end = args.pipeline or ("reference" if Path(args.data).is_dir() else "ffcv")
    of_folder = partial(_stored, args, "dali" if args.pipeline == "dali" else "reference", size)
    sets: Sets = {"clean": _stored(args, back_end, size, resize, args.data)}
    everything = "all" in (args.corrupt or ())
    for name in () if args.corrupt is None else NAMES if everything else args.corrupt or QUICK:
        for severity in args.severity or (range(1, 6) if everything else [3]):
            change = partial(corrupted, name=name, severity=severity, seed=args.seed, pool=pool)
            computed = _stored(args, back_end, size, resize, args.data, change)
            key = f"computed/{name}/{severity}"
            sets[key] = computed if args.keep is None else _kept(args, size, f"{size}-{resize}-{key}", computed)
    for name in NAMES:
        for severity in range(1, 6):
            if args.imagenet_c and (folder := Path(args.imagenet_c) / name / str(severity)).is_dir():
                sets[f"imagenet_c/{name}/{severity}"] = of_folder(size, folder)
            if args.cifar10_c and (file := Path(args.cifar10_c) / f"{name}.npy").is_file():
                sets[f"cifar10_c/{name}/{severity}"] = _array(args, file, severity)
    for kind in ("imagenet_c", "cifar10_c"):
        if (folder := getattr(args, kind)) and not any(key.startswith(kind) for key in sets):
            raise ValueError(f"--{kind.replace('_', '-')} {folder}: holds none of {', '.join(NAMES)}")
    return sets | {k: of_folder(resize, folder) for k in ("imagenet_r", "stylized") if (folder := getattr(args, k))}


@contextmanager
def _stored(
    args: argparse.Namespace, back_end: Any, size: int, resize: int, path: str | Path, change: Callable | None = None
) -> Iterator[Opened]:
    with closing(pipelines.open_store(path)) as store:
        n = min(len(store), args.limit or len(store))
        chosen = np.arange(n) * len(store) // max(n, 1)
        sides = store.heights[chosen], store.widths[chosen]
        plan = pipelines.eval_plan(*sides, size=size, resize=resize, batch=args.batch)
        index = np.append(chosen, pipelines.PADDING).astype(np.uint32)[np.minimum(plan.index, n)]
        with closing(pipelines.open_loader(back_end, store, size=size, device=args.device)) as loader:
            batches = loader.load(replace(plan, index=index))
            yield store.classes, len(plan), change(batches, index) if change else batches


@contextmanager
def _kept(args: argparse.Namespace, size: int, key: str, computed: AbstractContextManager[Opened]) -> Iterator[Opened]:
    """A corrupted set as a `.beton` in args.keep, built the first time."""
    said = {"source": str(Path(args.data).resolve()), "changed": Path(args.data).stat().st_mtime_ns, "set": key,
            "seed": args.seed, "limit": args.limit, "pipeline": args.pipeline}  # fmt: skip
    file = Path(args.keep) / f"{key.replace('/', '-')}-{_digest(said)}.beton"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with computed as (names, steps, batches):
            rows = tqdm(batches, f"building {file.name}", steps, leave=False)
            build(rows, file, capacity=steps * args.batch, classes=names or (), encoding=said)
    with _stored(args, args.pipeline or "ffcv", size, size, file) as opened:
        yield opened


@contextmanager
def _array(args: argparse.Namespace, file: Path, severity: int) -> Iterator[Opened]:
    images, labels = np.load(file, mmap_mode="r"), torch.from_numpy(np.load(file.with_name("labels.npy")).astype(np.int64))
    if images.ndim != 4 or len(images) != len(labels) or len(images) % 5:
        raise ValueError(f"{file}: {images.shape}, labels {tuple(labels.shape)}: expected five severities, as many of each")
    n = min(len(images) // 5, args.limit or len(images))
    chosen = (severity - 1) * (len(images) // 5) + np.arange(n) * (len(images) // 5) // n
    parts = np.split(chosen, range(args.batch, n, args.batch))
    rows = (pipelines.Batch(torch.from_numpy(images[p]).permute(0, 3, 1, 2), labels[p], i) for i, p in enumerate(parts))
    yield None, len(parts), rows


def rows_of(report: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """{row of the table: (ours, the paper's or None)}; percent but for the loss."""
    results, paper = report["results"], report["paper"]
    clean = results["clean"]
    rows = {"top-1 accuracy": (100 * clean["top1"], paper.get("top1")), "top-5 accuracy": (100 * clean["top5"], None),
            "loss": (clean["loss"], None)}  # fmt: skip
    for kind, errors in errors_of(report).items():
        for key, value in summarise(errors).items():
            of_paper = paper.get("imagenet_c") if key == "raw_19" and kind != "cifar10_c" else None
            rows[f"error, {SUMMARY[key]} ({KINDS[kind]})"] = (value, of_paper)
    for key, name in (("imagenet_r", "ImageNet-R top-1"), ("stylized", "Stylized-ImageNet top-1")):
        if key in results:
            rows[name] = (100 * results[key]["top1"], paper.get(key))
    return rows


def errors_of(report: dict[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """{kind: {corruption: {severity: top-1 error, a fraction}}}"""
    errors: dict[str, dict[str, dict[int, float]]] = {}
    for kind, name, severity in (key.split("/") for key in report["results"] if "/" in key):
        top1 = report["results"][f"{kind}/{name}/{severity}"]["top1"]
        errors.setdefault(kind, {}).setdefault(name, {})[int(severity)] = 1 - top1
    return errors


def write_report(reports: list[dict[str, Any]], out: Path) -> str:
    """Write report.md, report.json and report.png, the checkpoints side by side; returns the Markdown."""
    import matplotlib.figure  # a Figure of its own needs no display

    tables, errors = [rows_of(r) for r in reports], [errors_of(r) for r in reports]
    heads = [f"{r['name']}, seed {r['seed']}, step {r['step']}" for r in reports]
    settings = reports[0]["settings"]
    lines = [f"{reports[0]['results']['clean']['count']} images of {settings['data']}, {settings['bn']} BN; percent.", ""]
    beside = [{n: f"{v:.2f}" + (f" (paper {p:g})" if p is not None else "") for n, (v, p) in t.items()} for t in tables]
    lines += _table("", heads, {n: [b[n] for b in beside] for n in tables[0]})
    figure = matplotlib.figure.Figure(figsize=(10, 4 * max(1, len(errors[0]))), layout="constrained")
    for panel, kind in enumerate(errors[0]):
        means = {n: [100 * float(np.mean(list(e[kind][n].values()))) for e in errors] for n in errors[0][kind]}
        lines += ["", f"Top-1 error, mean over severities: {KINDS[kind]}", ""]
        lines += _table("corruption", heads, {n: [f"{m:.2f}" for m in row] for n, row in means.items()})
        axes = figure.add_subplot(len(errors[0]), 1, panel + 1, ylabel="top-1 error, %", title=KINDS[kind])
        bars = {"clean": [100 - t["top-1 accuracy"][0] for t in tables]} | means
        for i, head in enumerate(heads):
            x = np.arange(len(bars)) + (i + 0.5) * 0.8 / len(heads)
            axes.bar(x, [b[i] for b in bars.values()], 0.8 / len(heads), label=head)
        axes.set_xticks(np.arange(len(bars)) + 0.4, list(bars), rotation=40, ha="right")
        axes.legend()
    (out / "report.md").write_text(text := "\n".join(lines) + "\n")
    full = [r | {"summary": {n: v for n, (v, _) in t.items()}} for r, t in zip(reports, tables, strict=True)]
    (out / "report.json").write_text(json.dumps(full, indent=1))
    if errors[0]:
        figure.savefig(out / "report.png", dpi=120)
    return text


def _table(first: str, heads: list[str], rows: dict[str, list[str]]) -> list[str]:
    head = [f"| {first} | {' | '.join(heads)} |", "|---" + "|--:" * len(heads) + "|"]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
