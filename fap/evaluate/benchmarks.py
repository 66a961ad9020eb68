"""What `fap-eval` evaluates on: clean images, corruptions computed here, and the published
benchmarks' files.
"""

import difflib
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import PIL
import scipy
import torch
from torch import Tensor
from tqdm import tqdm

import pipelines
from fap.evaluate.results import digest, safe_name
from fap.nets.norm import Bn
from fap.tasks.base import Task
from pipelines import Store
from pipelines.corrupt import NAMES
from pipelines.corrupt_batches import build, corrupted
from pipelines.files import lock, shown
from pipelines.sources import arrays, cifar10
from pipelines.sources.sidecar import read_sidecar, sidecar_path

PIXELS = {
    "opencv": cv2.__version__,
    "pillow": PIL.__version__,
    "scipy": scipy.__version__,
    "numpy": np.__version__,
}
BackEnd = Literal["ffcv", "dali", "reference"]
Batches = Generator[tuple[Tensor, Tensor], None, None]  # images, and targets


@dataclass(frozen=True)
class Wanted:
    """What a user asks for. Paths are None where a benchmark is not asked for."""

    data: Path
    """Clean images: a `.beton` or a folder."""
    computed: tuple[tuple[str, int], ...] = ()
    """(corruption, severity) of `data`, computed here."""
    keep: Path | None = None
    """A folder in which the computed sets are stored."""
    imagenet_c: Path | None = None
    imagenet_r: Path | None = None
    stylized: Path | None = None
    cifar10_c: Path | None = None
    back_end: BackEnd | None = None
    batch: int = 256
    device: str = "cpu"
    seed: int = 0
    """Of the corruptions computed here."""
    bn: Bn = "main"
    """The batch norms that the model is evaluated with."""
    by_position: bool = False
    """Labels may be compared by position where only one side has class names."""


@dataclass(frozen=True)
class Opened:
    """One set of images, open."""

    classes: tuple[str, ...] | None  # names in the order of the labels
    labels: tuple[int, int]  # the least and the greatest
    count: int  # images
    steps: int  # batches
    identity: dict[str, Any]  # JSON: what the images are, by content, and what is done to them
    stamps: Callable[
        [], str
    ]  # of the files as they are now: another value means that they have changed
    batches: Callable[[], Batches]
    build: Callable[[], None] | None = (
        None  # a kept set that is not there yet: it must be built, then opened again
    )


class EvalSet(NamedTuple):
    """One number's worth of images. `key`: clean | KIND/CORRUPTION/SEVERITY | imagenet_r |
    stylized.
    """

    key: str
    source: Path
    open: Callable[[], AbstractContextManager[Opened]]

    @property
    def restrict(self) -> bool:
        """Only the logits of its own classes count."""
        return self.key == "imagenet_r"


def eval_sets(
    task: Task, wanted: Wanted, data: Store, size: int, resize: int, workers: Executor
) -> tuple[list[EvalSet], list[str]]:
    """The sets in the order of the report, and what in the benchmarks' folders belongs to none of
    them.

    `data`: the store of `wanted.data`; `size`, `resize`: pixels, the model's. Raises ValueError and
    OSError for folders that hold nothing of their kind.
    """
    stamps = _stamps(_files(data))
    known = data.identity()  # once for all that is computed from it

    def from_data(change: _Change | None = None) -> AbstractContextManager[Opened]:
        return nullcontext(_read(task, wanted, data, known, stamps, size, resize, change, workers))

    sets = [EvalSet("clean", wanted.data, from_data)]
    for name, severity in wanted.computed:
        key = f"computed/{name}/{severity}"
        opening: Callable[[], AbstractContextManager[Opened]] = partial(
            from_data, _Change(name, severity, wanted.seed)
        )
        if wanted.keep is not None:
            opening = partial(_kept, task, wanted, data, size, resize, key, opening())
        sets.append(EvalSet(key, wanted.data, opening))
    unused: list[str] = []
    if wanted.imagenet_c is not None:
        found, rest = _corruption_folders(wanted.imagenet_c)
        for (name, severity), folder in found.items():
            # The stored images are shown as they are, without resize or crop.
            sets.append(
                EvalSet(
                    f"imagenet_c/{name}/{severity}",
                    folder,
                    partial(_stored, task, wanted, size, size, folder),
                )
            )
        unused += rest
    if wanted.cifar10_c is not None:
        files, rest = _corruption_arrays(wanted.cifar10_c)
        for name, file in files.items():
            for severity in range(1, 6):
                key = f"cifar10_c/{name}/{severity}"
                sets.append(EvalSet(key, file, partial(_array, wanted, size, file, severity)))
        unused += rest
    for key, path in (("imagenet_r", wanted.imagenet_r), ("stylized", wanted.stylized)):
        if path is not None:
            sets.append(EvalSet(key, path, partial(_stored, task, wanted, size, resize, path)))
    return sets, unused


# ---------------------------------------------------------------------- folders and .beton files


class _Change(NamedTuple):
    """A corruption of stored images."""

    name: str
    severity: int
    seed: int


@contextmanager
def _stored(task: Task, wanted: Wanted, size: int, resize: int, path: Path) -> Iterator[Opened]:
    with closing(pipelines.open_store(path)) as store:
        stamps = _stamps(_files(store))
        yield _read(task, wanted, store, store.identity(), stamps, size, resize)


def _read(
    task: Task,
    wanted: Wanted,
    store: Store,
    identity: dict[str, Any],
    stamps: str,
    size: int,
    resize: int,
    change: _Change | None = None,
    workers: Executor | None = None,
) -> Opened:
    plan = pipelines.eval_plan(
        store.heights, store.widths, size=size, resize=resize, batch=wanted.batch
    )
    back_end = _back_end(wanted, store.path)
    loader = pipelines.open_loader(back_end, store, size=size, device=wanted.device)
    how: dict[str, Any] = {
        "size": size,
        "resize": resize,
        "batch": wanted.batch,
        "back end": back_end,
        "pixels": PIXELS,
    }
    if change is not None:
        how["corrupted"] = change._asdict()

    targets = task.targets(store, plan)

    def batches() -> Batches:
        shown = loader.load(plan)
        if change is not None:
            assert workers is not None
            shown = corrupted(shown, plan.index, pool=workers, **change._asdict())
        for batch in shown:
            yield batch.images, targets[batch.step]

    return Opened(
        classes=store.classes,
        labels=(int(store.labels.min()), int(store.labels.max())),
        count=len(store),
        steps=len(plan),
        identity=how | {"data": identity, "files": stamps},
        stamps=lambda: _stamps(_files(store)),
        batches=batches,
    )


def _back_end(wanted: Wanted, path: Path) -> BackEnd:
    if wanted.back_end is not None:
        return wanted.back_end
    return "reference" if path.is_dir() else "ffcv"


def _files(store: pipelines.Store) -> Iterable[Path]:
    files = dict.fromkeys(
        store.file(index) for index in range(len(store))
    )  # a .beton is one for all its samples
    side = sidecar_path(store.path)
    return [*files, *([side] if side.exists() else [])]


def _stamps(files: Iterable[Path]) -> str:
    """Sizes and times of files. A store's identity covers some images only where there are no
    checksums.

    `st_ctime` also shows a replacement that was given the old date.
    """
    sha256 = hashlib.sha256()
    for file in files:
        found = os.stat(file)
        numbers = f"\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\0{found.st_ino}\n"
        sha256.update(os.fsencode(file) + numbers.encode())
    return sha256.hexdigest()


def _corruption_folders(root: Path) -> tuple[dict[tuple[str, int], Path], list[str]]:
    """ROOT/CORRUPTION/SEVERITY as published, in the report's order, and what else lies there."""
    found: dict[tuple[str, int], Path] = {}
    unused: list[str] = []
    for entry in _listed(root, "--imagenet-c"):
        if entry.name not in NAMES or not entry.is_dir():
            unused.append(_unused(root, entry.name))
            continue
        for part in _listed(entry, "--imagenet-c"):
            if part.is_dir() and part.name in ("1", "2", "3", "4", "5"):
                found[entry.name, int(part.name)] = part
            else:
                unused.append(_unused(root, f"{entry.name}/{part.name}"))
    if not found:
        raise ValueError(
            f"--imagenet-c {root}: holds none of {', '.join(NAMES)} with severities 1 to"
            f" 5{_and_holds(unused)}"
        )
    order = sorted(found, key=lambda at: (NAMES.index(at[0]), at[1]))
    return {at: found[at] for at in order}, unused


def _corruption_arrays(root: Path) -> tuple[dict[str, Path], list[str]]:
    """ROOT/CORRUPTION.npy as published, in the report's order, and what else lies there."""
    entries = _listed(root, "--cifar10-c")
    files = {
        entry.stem: entry for entry in entries if entry.suffix == ".npy" and entry.stem in NAMES
    }
    unused = [
        _unused(root, e.name) for e in entries if e not in files.values() and e.name != "labels.npy"
    ]
    if not files:
        named = ", ".join(f"{name}.npy" for name in NAMES)
        raise ValueError(f"--cifar10-c {root}: holds none of {named}{_and_holds(unused)}")
    return {name: files[name] for name in NAMES if name in files}, unused


def _listed(folder: Path, option: str) -> list[Path]:
    """What lies in a folder, by name, but for hidden things."""
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder")
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _unused(root: Path, name: str) -> str:
    first = name.split("/")[0].removesuffix(".npy")
    near = difflib.get_close_matches(first, NAMES, n=1)
    hint = f" (did you mean {near[0]}?)" if near and near[0] != first else ""
    return shown(str(root / name))[1:-1] + hint


def _and_holds(unused: list[str]) -> str:
    return f"; it holds {', '.join(unused[:5])}" if unused else ""


# ---------------------------------------------------------------------- CIFAR-10-C


@contextmanager
def _array(wanted: Wanted, size: int, file: Path, severity: int) -> Iterator[Opened]:
    both = [file, file.with_name("labels.npy")]
    stamps = _stamps(both)
    part = arrays.read_severity(file, severity)
    sides = part.images.shape[1:3]
    if sides != (size, size):
        raise ValueError(
            f"{file}: its images have {sides[0]} x {sides[1]} pixels, the model takes {size} x"
            f" {size}"
        )
    steps = -(-len(part.images) // wanted.batch)

    def batches() -> Batches:
        labels = torch.from_numpy(part.labels)
        for step in range(steps):
            rows = slice(step * wanted.batch, (step + 1) * wanted.batch)
            images = torch.from_numpy(part.images[rows].copy()).permute(0, 3, 1, 2)
            yield images, labels[rows]

    yield Opened(
        classes=cifar10.CLASSES,
        labels=(int(part.labels.min()), int(part.labels.max())),
        count=len(part.images),
        steps=steps,
        identity={
            "content": part.content,
            "severity": severity,
            "batch": wanted.batch,
            "files": stamps,
        },
        stamps=lambda: _stamps(both),
        batches=batches,
    )


# ---------------------------------------------------------------------- corrupted sets that are kept


@contextmanager
def _kept(
    task: Task,
    wanted: Wanted,
    data: Store,
    size: int,
    resize: int,
    key: str,
    opening: AbstractContextManager[Opened],
) -> Iterator[Opened]:
    """A corrupted set as a `.beton` in `wanted.keep`: the set to build, or once that is done, the
    set to read.
    """
    assert wanted.keep is not None
    with opening as computed:
        # Neither the batch nor, where checksums cover every image, dates change a pixel: no reason
        # to build again.
        irrelevant = {"batch"} if getattr(data, "crc32", None) is None else {"batch", "files"}
        said = {"set": key} | {k: v for k, v in computed.identity.items() if k not in irrelevant}
        file = (
            wanted.keep
            / f"{size}-{resize}-{safe_name(key.replace('/', '-'))}-{digest(said)[:12]}.beton"
        )
        if not _is_whole(file, said):
            yield replace(computed, build=partial(_build, file, said, computed, wanted.batch))
            return
    as_stored = replace(wanted, back_end=_back_end(wanted, wanted.data))
    with _stored(task, as_stored, size, size, file) as stored:
        yield replace(stored, identity=stored.identity | {"built from": said})


def _is_whole(file: Path, said: dict[str, Any]) -> bool:
    """Whether the kept set is there. Raises ValueError for another file of its name, DamagedData
    for damage.
    """
    if not file.exists():
        return False
    sidecar = read_sidecar(file)
    if sidecar is None or digest(sidecar.encoding) != digest(said):
        raise ValueError(
            f"{file}: is not the set that it is named for; remove it, and it is built again"
        )
    return True


def _build(file: Path, said: dict[str, Any], computed: Opened, batch: int) -> None:
    """Build a kept set unless it is there; one process does, others wait for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "ab") as turn:
        while True:
            try:
                lock(turn)
                break
            except BlockingIOError:
                time.sleep(0.5)
        if _is_whole(file, said):
            return
        sidecar_path(file).unlink(
            missing_ok=True
        )  # of a build that was killed between its two renames
        with closing(computed.batches()) as batches:
            rows = tqdm(batches, f"building {file.name}", computed.steps, leave=False, disable=None)
            build(
                rows, file, capacity=computed.steps * batch, classes=computed.classes, encoding=said
            )
