"""The table of published benchmarks: options, layouts, which logits count, and their sets.

To add one, append an entry to PUBLISHED. The options of `fap-eval`, the rows of the report and the
table of docs/evaluate.md follow from it.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fap import class_maps
from fap.evaluate.cue_conflict import CLASS_MAP as CUE_CONFLICT_MAP
from fap.evaluate.cue_conflict import CueConflictSet
from fap.evaluate.images import Reading
from fap.evaluate.objectnet import meanings_in, objects_of_imagenet, parts_of
from fap.evaluate.sets import ArraySet, EvalSet, StoredSet
from fap.tasks.labels import ClassMap
from pipelines.corrupt import NAMES
from pipelines.corrupt_folder import RECORD
from pipelines.files import readable
from pipelines.sources import cifar10

SEVERITIES = range(1, 6)
BETON = ".beton"
MOST_NAMED = 5  # of what a folder holds instead

C_BAR = (
    "caustic_refraction",
    "inverse_sparkles",
    "sparkles",
    "perlin_noise",
    "blue_noise_sample",
    "plasma_noise",
    "checkerboard_cutout",
    "cocentric_sine_waves",
    "single_frequency_greyscale",
    "brownish_noise",
)
MADE_HERE = "fap_corrupt"  # of the keys of what fap-corrupt wrote


@dataclass(frozen=True)
class Published(ABC):
    """One benchmark: an option of `fap-eval`. The texts are Markdown, for the page and the help."""

    key: str
    """Of its sets, or the first part of theirs."""
    title: str
    layout: str
    """What the folder holds."""
    logits: str
    """Which of them count."""
    images: str
    measures: str
    paper: str

    @property
    def option(self) -> str:
        return "--" + self.key.replace("_", "-")

    @abstractmethod
    def sets(self, root: Path, reading: Reading) -> tuple[list[EvalSet], list[str]]:
        """In the order of the report, and what of the folder belongs to none of them.

        Raises ValueError for a folder that holds nothing of the benchmark, OSError.
        """


# ---------------------------------------------------------------------- one folder, a number or two


class Way(NamedTuple):
    """One number of a folder."""

    key: str
    title: str
    class_map: ClassMap | None  # None: its classes have the model's names, and all logits count


@dataclass(frozen=True)
class ClassFolders(Published):
    """Class folders; or what else `--data` takes, with their names as its class names."""

    ways: tuple[Way, ...]

    def sets(self, root: Path, reading: Reading) -> tuple[list[EvalSet], list[str]]:
        return [StoredSet(way.key, root, reading, class_map=way.class_map) for way in self.ways], []


@dataclass(frozen=True)
class CueConflict(Published):
    """Folders by shape, textures in the names of the files."""

    def sets(self, root: Path, reading: Reading) -> tuple[list[EvalSet], list[str]]:
        # Shown whole: model-vs-human, the authors' own benchmark, neither resizes nor crops them.
        one = CueConflictSet(self.key, root, reading.as_stored(), class_map=CUE_CONFLICT_MAP)
        return [one], []


class Counted(NamedTuple):
    """One number of ObjectNet."""

    key: str
    title: str
    restrict: bool
    """Only the logits of the classes that it shares with ImageNet count."""


@dataclass(frozen=True)
class ObjectNet(Published):
    """A folder for each object, and the files that say what of ImageNet it is."""

    ways: tuple[Counted, ...]

    def sets(self, root: Path, reading: Reading) -> tuple[list[EvalSet], list[str]]:
        images, mappings = parts_of(root)
        meanings = meanings_in(mappings)
        view = partial(objects_of_imagenet, meanings=meanings)
        found: list[EvalSet] = []
        for way in self.ways:
            class_map = ClassMap(self.title, "by the published map", meanings, way.restrict)
            found.append(StoredSet(way.key, images, reading, class_map=class_map, view=view))
        return found, []


# ---------------------------------------------------------------------- corruptions


@dataclass(frozen=True)
class CorruptionFolders(Published):
    """CORRUPTION/SEVERITY/WNID, of images that have been cropped already.

    SEVERITY.beton is a set too, as fap-corrupt writes it.
    """

    corruptions: tuple[str, ...]
    """In the report's order."""

    def sets(self, root: Path, reading: Reading) -> tuple[list[EvalSet], list[str]]:
        folders, unused = self._folders(root)
        # Copies made here are no published files, though they lie as those do.
        benchmark = MADE_HERE if (root / RECORD).is_file() else self.key
        return [
            StoredSet(f"{benchmark}/{name}/{severity}", folder, reading.as_stored())
            for (name, severity), folder in folders.items()
        ], unused

    def _folders(self, root: Path) -> tuple[dict[tuple[str, int], Path], list[str]]:
        names = self.corruptions
        found: dict[tuple[str, int], Path] = {}
        unused: list[str] = []
        for entry in _listed(root, self.option):
            if entry.name not in names or not entry.is_dir():
                unused.append(_unused(root, entry.name, names))
                continue
            for part in _listed(entry, self.option):
                is_beton = part.suffix == BETON and part.is_file()
                if part.name.endswith(f"{BETON}.json"):  # the sidecar of one
                    continue
                severity = part.stem if is_beton else part.name
                is_set = severity in map(str, SEVERITIES) and (is_beton or part.is_dir())
                if is_set and (entry.name, int(severity)) not in found:
                    found[entry.name, int(severity)] = part
                else:
                    unused.append(_unused(root, f"{entry.name}/{part.name}", names))
        if not found:
            raise ValueError(
                f"{self.option} {root}: holds none of {', '.join(names)} "
                f"with severities 1 to 5{_and_holds(unused)}"
            )
        in_order = sorted(found, key=lambda at: (names.index(at[0]), at[1]))
        return {at: found[at] for at in in_order}, unused


@dataclass(frozen=True)
class CorruptionArrays(Published):
    """CORRUPTION.npy, five severities one behind the other, and labels.npy."""

    classes: tuple[str, ...]
    """In the order of its labels."""

    def sets(self, root: Path, reading: Reading) -> tuple[list[EvalSet], list[str]]:
        files, unused = self._files(root)
        return [
            ArraySet(f"{self.key}/{name}/{severity}", file, reading, severity, self.classes)
            for name, file in files.items()
            for severity in SEVERITIES
        ], unused

    def _files(self, root: Path) -> tuple[dict[str, Path], list[str]]:
        found: dict[str, Path] = {}
        unused: list[str] = []
        for entry in _listed(root, self.option):
            if entry.suffix == ".npy" and entry.stem in NAMES:
                found[entry.stem] = entry
            elif entry.name != "labels.npy":
                unused.append(_unused(root, entry.name, NAMES))
        if not found:
            expected = ", ".join(f"{name}.npy" for name in NAMES)
            raise ValueError(f"{self.option} {root}: holds none of {expected}{_and_holds(unused)}")
        return {name: found[name] for name in NAMES if name in found}, unused


def _listed(folder: Path, option: str) -> list[Path]:
    """What lies in a folder, by name, but for hidden things."""
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder")
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _unused(root: Path, name: str, corruptions: list[str] | tuple[str, ...]) -> str:
    """A path for a message, with the corruption that its name may be meant for."""
    path = readable(str(root / name))
    first = name.split("/")[0].removesuffix(".npy")
    near = difflib.get_close_matches(first, corruptions, n=1)
    if near and near[0] != first:
        return f"{path} (did you mean {near[0]}?)"
    return path


def _and_holds(unused: list[str]) -> str:
    if not unused:
        return ""
    return f"; it holds {', '.join(unused[:MOST_NAMED])}"


# ---------------------------------------------------------------------- the table


def _same_names(title: str, names: tuple[str, ...], *, restrict: bool) -> ClassMap:
    return ClassMap(title, "by name", {name: (name,) for name in names}, restrict)


def _by_number() -> ClassMap:
    """ImageNet-V2: folder k is the k-th of ImageNet's sorted WNIDs, counted from 0."""
    numbers = {str(number): (wnid,) for number, wnid in enumerate(class_maps.imagenet())}
    return ClassMap("ImageNet-V2", "by number", numbers)


ALL = "all"

PUBLISHED: tuple[Published, ...] = (
    CorruptionFolders(
        key="imagenet_c",
        title="ImageNet-C",
        layout="`CORRUPTION/SEVERITY/WNID/*.JPEG`, taken without resize or crop",
        logits=ALL,
        images="50,000 in each of 95 sets: 19 corruptions, 5 severities",
        measures="common corruptions; the report has mCE",
        paper="Hendrycks & Dietterich, ICLR 2019",
        corruptions=NAMES,
    ),
    CorruptionFolders(
        key="imagenet_c_bar",
        title="ImageNet-C-bar",
        layout="`CORRUPTION/SEVERITY/WNID/*.JPEG`, taken without resize or crop",
        logits=ALL,
        images="50,000 in each of 50 sets: 10 corruptions, 5 severities",
        measures="corruptions unlike those of ImageNet-C",
        paper="Mintun, Kirillov & Xie, NeurIPS 2021",
        corruptions=C_BAR,
    ),
    CorruptionArrays(
        key="cifar10_c",
        title="CIFAR-10-C",
        layout="`CORRUPTION.npy` and `labels.npy`",
        logits=ALL,
        images="10,000 in each of 95 sets: 19 corruptions, 5 severities",
        measures="common corruptions at 32 px",
        paper="Hendrycks & Dietterich, ICLR 2019",
        classes=cifar10.CLASSES,
    ),
    CorruptionArrays(
        key="cifar100_c",
        title="CIFAR-100-C",
        layout="`CORRUPTION.npy` and `labels.npy`",
        logits=ALL,
        images="10,000 in each of 95 sets: 19 corruptions, 5 severities",
        measures="common corruptions at 32 px",
        paper="Hendrycks & Dietterich, ICLR 2019",
        classes=class_maps.cifar100(),
    ),
    ClassFolders(
        key="imagenet_a",
        title="ImageNet-A",
        layout="`WNID/*.jpg`, 200 folders",
        logits="two numbers: those of its 200 classes, as its authors report it, and all 1,000",
        images="7,500",
        measures="photographs that a ResNet-50 gets wrong",
        paper="Hendrycks et al., CVPR 2021",
        ways=(
            Way(
                "imagenet_a",
                "ImageNet-A",
                _same_names("ImageNet-A", class_maps.imagenet_a(), restrict=True),
            ),
            Way(
                "imagenet_a_1000way",
                "ImageNet-A, 1000-way,",
                _same_names("ImageNet-A", class_maps.imagenet_a(), restrict=False),
            ),
        ),
    ),
    ClassFolders(
        key="imagenet_r",
        title="ImageNet-R",
        layout="`WNID/*.jpg`, 200 folders",
        logits="those of its 200 classes, as its authors report it",
        images="30,000",
        measures="renditions: art, cartoons, toys",
        paper="Hendrycks et al., ICCV 2021",
        ways=(
            Way(
                "imagenet_r",
                "ImageNet-R",
                _same_names("ImageNet-R", class_maps.imagenet_r(), restrict=True),
            ),
        ),
    ),
    ClassFolders(
        key="imagenet_sketch",
        title="ImageNet-Sketch",
        layout="`WNID/*.JPEG`, 1,000 folders",
        logits=ALL,
        images="50,889",
        measures="black and white sketches",
        paper="Wang et al., NeurIPS 2019",
        ways=(Way("imagenet_sketch", "ImageNet-Sketch", None),),
    ),
    ClassFolders(
        key="imagenet_v2",
        title="ImageNet-V2",
        layout="`NUMBER/*.jpeg`, folders 0 to 999: number k is the k-th of ImageNet's sorted WNIDs",
        logits=ALL,
        images="10,000; of its three variants the one that you give",
        measures="a second validation set, collected as the first",
        paper="Recht et al., ICML 2019",
        ways=(Way("imagenet_v2", "ImageNet-V2", _by_number()),),
    ),
    ObjectNet(
        key="objectnet",
        title="ObjectNet",
        layout="`objectnet-1.0/`, which holds `images/OBJECT/*.png` and `mappings/`; or its images,"
        " with `mappings/` beside them. 113 of its 313 folders are in ImageNet and used, without"
        " the red border of 2 px",
        logits="two numbers: all 1,000, as in its authors' code, and those of its 113 classes, the"
        " greatest of each, as in WiSE-FT",
        images="18,574 of 50,273",
        measures="objects in odd places, turned, from odd viewpoints",
        paper="Barbu et al., NeurIPS 2019",
        ways=(
            Counted("objectnet", "ObjectNet, 1000-way,", restrict=False),
            Counted("objectnet_113way", "ObjectNet, 113-way,", restrict=True),
        ),
    ),
    ClassFolders(
        key="stylized",
        title="Stylized-ImageNet",
        layout="`WNID/*`, 1,000 folders: its validation folder",
        logits=ALL,
        images="50,000",
        measures="shapes under the textures of paintings",
        paper="Geirhos et al., ICLR 2019",
        ways=(Way("stylized", "Stylized-ImageNet", None),),
    ),
    CueConflict(
        key="cue_conflict",
        title="cue conflict",
        layout="`SHAPE/SHAPE7-TEXTURE1.png`, 16 folders, taken without resize or crop",
        logits="all; the mean probability of the classes of each of 16 categories decides",
        images="1,200 of 1,280, those whose shape and texture differ",
        measures="shape bias: decisions for the shape among those for shape or texture",
        paper="Geirhos et al., ICLR 2019",
    ),
)

# For the report: titles of benchmarks of one set, by key, and of benchmarks of corruptions.
SINGLE_TITLES = {
    way.key: way.title
    for one in PUBLISHED
    if isinstance(one, ClassFolders | ObjectNet)
    for way in one.ways
}
CORRUPTION_TITLES = {
    one.key: one.title for one in PUBLISHED if isinstance(one, CorruptionFolders | CorruptionArrays)
}
