"""What `fap-eval` evaluates on: clean images, corruptions of them, and the published benchmarks."""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fap.evaluate.attacked import AttackedSet
from fap.evaluate.attacks import LinfAttack
from fap.evaluate.images import BackEnd, Corruption, Reading, Seen, look_at
from fap.evaluate.kept import KeptSet
from fap.evaluate.published import PUBLISHED
from fap.evaluate.sets import CleanSet, ComputedSet, CorruptedStoreSet, EvalSet, StoredSet, whole
from fap.nets.norm import Bn
from pipelines import Store


@dataclass(frozen=True)
class Wanted:
    """What a user asks for."""

    data: Path
    """Clean images: a `.beton` or a folder."""
    part: str = ""
    """Which part of `data`, in words; empty: all of it."""
    computed: tuple[tuple[str, int], ...] = ()
    """(corruption, severity) of `data`, computed here."""
    keep: Path | None = None
    """A folder in which the computed sets are stored."""
    published: Mapping[str, Path] = field(default_factory=dict)
    """Folders of published benchmarks, by the keys of `PUBLISHED`."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Images of one's own, by name: whatever `data` may be."""
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
    for one in PUBLISHED:
        if one.key in wanted.published:
            found, others = one.sets(wanted.published[one.key], reading)
            sets += found
            unused += others
    for name, path in wanted.folders.items():
        # As --data shows them: the same images have the same number.
        sets.append(StoredSet(f"folder/{name}", path, reading, view=whole))
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
    for one in PUBLISHED:
        if one.key in wanted.published:
            raise ValueError(
                f"{one.option}: its images have class labels and no boxes, and the checkpoint is a "
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
