"""What `fap-eval` evaluates on: clean images, corruptions of them, and the published benchmarks."""

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fap.evaluate.attacked import AttackedSet
from fap.evaluate.attacks import LinfAttack
from fap.evaluate.images import BackEnd, Corruption, Reading, Seen, look_at
from fap.evaluate.kept import KeptSet
from fap.evaluate.published import SEVERITIES, corruption_arrays, corruption_folders
from fap.evaluate.sets import ArraySet, CleanSet, ComputedSet, CorruptedStoreSet, EvalSet, StoredSet
from fap.nets.norm import Bn
from pipelines import Store


@dataclass(frozen=True)
class Wanted:
    """What a user asks for. Paths are None where a benchmark is not asked for."""

    data: Path
    """Clean images: a `.beton` or a folder."""
    part: str = ""
    """Which part of `data`, in words; empty: all of it."""
    computed: tuple[tuple[str, int], ...] = ()
    """(corruption, severity) of `data`, computed here."""
    keep: Path | None = None
    """A folder in which the computed sets are stored."""
    imagenet_c: Path | None = None
    imagenet_r: Path | None = None
    stylized: Path | None = None
    cifar10_c: Path | None = None
    attacks: tuple[LinfAttack, ...] = ()
    """On images of `data`."""
    attack_images: int = 1000
    """At most so many of them."""
    back_end: BackEnd | None = None
    batch: int | None = None
    """Images at once; None: what suits the task."""
    device: str = "cpu"
    seed: int = 0
    """Of the corruptions computed here."""
    bn: Bn | Literal["both"] = "main"
    """The norms that a model is evaluated with; both: main, then aux where it has any."""
    pictures: Path | None = None
    """A folder for sheets of what was found in the first images; None: none are drawn."""
    by_position: bool = False
    """Labels may be compared by position where only one side has class names."""


def eval_sets(
    wanted: Wanted,
    reading: Reading,
    data: Store,  # that of `wanted.data`
    workers: Executor,  # of the corruptions computed here
) -> tuple[list[EvalSet], list[str]]:
    """The sets in the order of the report, and what in the benchmarks' folders belongs to none.

    Raises ValueError and OSError for folders that hold nothing of their kind.
    """
    if reading.crop == "letterbox":
        _check_for_detection(wanted)
    seen = look_at(data)  # once for all that is computed from it
    sets: list[EvalSet] = [CleanSet("clean", wanted.data, reading, seen)]
    sets += _computed(wanted, reading, seen, workers)
    unused: list[str] = []
    if wanted.imagenet_c is not None:
        folders, others = corruption_folders(wanted.imagenet_c)
        for (name, severity), folder in folders.items():
            key = f"imagenet_c/{name}/{severity}"
            sets.append(StoredSet(key, folder, reading.as_stored()))
        unused += others
    if wanted.cifar10_c is not None:
        files, others = corruption_arrays(wanted.cifar10_c)
        for name, file in files.items():
            for severity in SEVERITIES:
                sets.append(ArraySet(f"cifar10_c/{name}/{severity}", file, reading, severity))
        unused += others
    if wanted.imagenet_r is not None:
        sets.append(StoredSet("imagenet_r", wanted.imagenet_r, reading))
    if wanted.stylized is not None:
        sets.append(StoredSet("stylized", wanted.stylized, reading))
    for attack in wanted.attacks:
        if reading.task.n_classes < attack.fewest_classes:
            raise ValueError(
                f"--attack {attack.method}: needs a model of at least {attack.fewest_classes} "
                f"classes, and this one has {reading.task.n_classes}"
            )
    sets += [
        AttackedSet(attack.key, wanted.data, reading, seen, attack, wanted.attack_images)
        for attack in wanted.attacks
    ]
    return sets, unused


def _check_for_detection(wanted: Wanted) -> None:
    """Raise ValueError for what only classifiers are evaluated on."""
    folders = {
        "--imagenet-c": wanted.imagenet_c,
        "--imagenet-r": wanted.imagenet_r,
        "--stylized": wanted.stylized,
        "--cifar10-c": wanted.cifar10_c,
    }
    for option, folder in folders.items():
        if folder is not None:
            raise ValueError(
                f"{option}: its images have class labels and no boxes, and the checkpoint is a "
                "detector's; leave it out (--corrupt all is detection's benchmark, on --data)"
            )
    if wanted.attacks:
        raise ValueError(
            "--attack: only classifiers are attacked here, and the checkpoint is a detector's; "
            "leave it out"
        )
    if wanted.keep is not None:
        raise ValueError(
            "--keep: corrupted photographs are not kept for detection, which sees them resized "
            "from their own size; leave it out: every set's result is kept in --out"
        )


def _computed(wanted: Wanted, reading: Reading, data: Seen, workers: Executor) -> list[EvalSet]:
    sets: list[EvalSet] = []
    for name, severity in wanted.computed:
        key = f"computed/{name}/{severity}"
        corruption = Corruption(name, severity, wanted.seed)
        if reading.crop == "letterbox":  # COCO-C corrupts photographs, ImageNet-C crops of them
            sets.append(CorruptedStoreSet(key, wanted.data, reading, data, corruption, workers))
            continue
        computed = ComputedSet(key, wanted.data, reading, data, corruption, workers)
        if wanted.keep is None:
            sets.append(computed)
        else:
            sets.append(KeptSet(key, wanted.data, reading, computed, wanted.keep))
    return sets
