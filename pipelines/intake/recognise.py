"""What somebody holds: the form of a path, told by what lies there and not by its name alone."""

import glob
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pipelines.archives.listing import is_foreign, list_images
from pipelines.archives.names import innermost_root, is_image, looks_like_shards
from pipelines.archives.tar import StreamedTar, TarTree, compression_of, has_tar_header
from pipelines.archives.tree import FolderTree, JoinedTree, ListedFolder, Tree
from pipelines.archives.zips import ZipTree
from pipelines.files import listed, open_regular, readable
from pipelines.intake import layouts
from pipelines.intake.collection import Collection, TreeCollection
from pipelines.intake.label_files import ACCEPTED, Labels, labels_beside, labels_inside, read_labels
from pipelines.intake.parquet import ParquetFiles, is_parquet, parquet_files, split_of
from pipelines.intake.stores import Samples
from pipelines.intake.webdataset import WebDataset
from pipelines.sources import SOURCES, source_of
from pipelines.sources.beton import BetonStore
from pipelines.sources.folder import FolderStore
from pipelines.sources.image_files import ImageFilesStore
from pipelines.sources.shards import is_pattern

Split = Literal["train", "val", "test"]

# What folders of a part of a data set are called.
SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # below Kaggle's root, or part of it
TAR_OF = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}

FORMS = (
    "class folders, in a folder, a .tar (also .gz, .bz2, .xz) or a .zip; ImageNet's"
    " ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; a flat folder or archive with --labels;"
    " the root of Kaggle's or torchvision's ImageNet with --split; Hugging Face's parquet files;"
    " WebDataset shards; a .beton; cifar10"
)


class Wishes(NamedTuple):
    """What the user said beside the path."""

    split: Split | None = None
    labels: Path | None = None  # a file of labels, or ImageNet's devkit
    classes: tuple[str, ...] | None = None  # names, where the data have numbers only


def recognise(src: str | Path, wishes: Wishes = Wishes()) -> Collection:  # noqa: B008
    """The images at `src`: a path, or a pattern such as "shards/*.tar".

    Raises:
        ValueError: nothing is there, it is none of FORMS, or `wishes` do not fit it.
        OSError: it cannot be read.
        ImportError: a package that this form needs is missing.
        DamagedData: a `.beton` contradicts itself.
    """
    collection = _recognised(src, wishes._replace(classes=None))
    if wishes.classes is not None:
        _name_classes(collection, wishes.classes)
    return collection


def _recognised(src: str | Path, wishes: Wishes) -> Collection:
    path = Path(src)
    if is_pattern(path):
        return _of_many(str(src), wishes)
    if not path.exists():
        raise ValueError(f"{readable(path)}: no such file or folder; accepted are {FORMS}")
    if path.is_dir():
        return _of_folder(path, wishes)
    return _of_file(path, wishes)


def _name_classes(collection: Collection, classes: tuple[str, ...]) -> None:
    where = readable(collection.path)
    if collection.classes is not None:
        raise ValueError(f"{where}: names its classes itself: leave out --classes")
    most = int(collection.labels.max())
    if most >= len(classes):
        raise ValueError(f"{where}: holds labels up to {most}, --classes {len(classes)} names")
    collection.classes = classes


# ------------------------------------------------------------------ files


def _of_file(path: Path, wishes: Wishes) -> Collection:
    for source in SOURCES:
        # Image files in a tar have names, which a store does not tell.
        if not issubclass(source, ImageFilesStore) and source.accepts(path):
            _refuse(wishes, path, source.described_as)
            return Samples(source(path))
    if is_parquet(path):
        _refuse(wishes, path, "a parquet file")
        return ParquetFiles(path, [path])
    tree = _archive(path)
    try:
        return _of_archive(tree, wishes)
    except BaseException:
        tree.close()
        raise


def _archive(path: Path) -> Tree:
    """The tree in an archive. ValueError for what is none."""
    with open_regular(path) as file:
        is_zip = zipfile.is_zipfile(file)
    if is_zip or path.suffix.lower() == ".zip":
        return ZipTree(path)
    if compression_of(path) is not None:
        return StreamedTar(path)
    if path.suffix == ".tar" or has_tar_header(path):
        return TarTree(path)
    raise ValueError(f"{readable(path)}: not recognised; accepted are {FORMS}")


def _of_archive(tree: Tree, wishes: Wishes) -> Collection:
    if looks_like_shards(tree.names):
        _refuse(wishes, tree.path, "WebDataset shards")
        return WebDataset(tree)
    root = _split_in(tree, wishes.split) if wishes.split else innermost_root(tree.names)
    labels = _labels_for(tree, root, wishes)
    if labels is not None:
        return layouts.flat(tree, labels, root)
    return layouts.class_folders(tree, root)


def _split_in(tree: Tree, split: Split) -> str:
    """The folder of an archive that holds a split, "a/b/"; the outermost one of that name."""
    roots: set[str] = set()
    for name in tree.names:
        if not is_image(name):
            continue
        folders = name.split("/")[:-1]
        for depth, folder in enumerate(folders, 1):
            if folder.lower() in SPLIT_FOLDERS[split]:
                roots.add("/".join(folders[:depth]) + "/")
                break
    if len(roots) != 1:
        found = f"several: {listed(sorted(roots))}" if roots else "no folder of that name"
        raise ValueError(f"{readable(tree.path)}: split = {split}: {found} with images below")
    return roots.pop()


def _labels_for(tree: Tree, root: str, wishes: Wishes) -> Labels | None:
    """Those asked for; else, where images lie flat, those found beside the data."""
    if wishes.labels is not None:
        return read_labels(wishes.labels)
    images = [name for name in tree.names if name.startswith(root) and is_image(name)]
    if not images or any("/" in name[len(root) :] for name in images):
        return None
    inside = labels_inside(tree)
    if inside is not None:
        return inside
    folder = tree.path if tree.path.is_dir() else tree.path.parent
    beside = labels_beside(folder)
    if beside is None:
        raise ValueError(
            f"{readable(tree.path)}: {len(images):,} images in no class folders: name their labels"
            f" with --labels: {ACCEPTED}"
        )
    return read_labels(beside)


# ------------------------------------------------------------------ folders


def _of_folder(path: Path, wishes: Wishes) -> Collection:
    parquets = parquet_files(path)
    if parquets:
        return _parquets(path, parquets, wishes)
    if wishes.split is not None:
        return _of_split(path, wishes.split, wishes._replace(split=None))
    if wishes.labels is not None:
        return layouts.flat(FolderTree(path), read_labels(wishes.labels))
    _refuse_roots(path)
    entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    if any(entry.is_dir() and not is_foreign(entry.name) for entry in entries):
        return _listed(path)
    tars = [path / entry.name for entry in entries if entry.name.endswith(".tar")]
    if tars:
        return _of_tars(path, tars, wishes)
    return _of_archive(FolderTree(path), wishes)


def _listed(path: Path) -> TreeCollection:
    """Class folders."""
    listing = list_images(path)
    names = [os.path.relpath(file, path) for file, _ in listing.files]
    labels = [label for _, label in listing.files]
    return TreeCollection(
        ListedFolder(path, names),
        range(len(names)),
        labels,
        listing.classes,
        FolderStore.described_as,
        listing.ignored,
    )


def _of_split(path: Path, split: Split, wishes: Wishes) -> Collection:
    """A part of a root: Kaggle's, torchvision's, or one with train and val folders."""
    for folder in ("", *KAGGLE):
        for name in SPLIT_FOLDERS[split]:
            part = path / folder / name
            if part.is_dir():
                return _of_folder(part, wishes)
    archive = path / TAR_OF.get(split, "")
    if archive.is_file():
        return _of_file(archive, wishes)
    raise ValueError(
        f"{readable(path)}: split = {split}: holds neither a folder"
        f" {' or '.join(SPLIT_FOLDERS[split])}, nor {KAGGLE[0]}, nor {TAR_OF['train']}, nor parquet"
        " files"
    )


def _refuse_roots(path: Path) -> None:
    """ValueError for a root of ImageNet, which has parts."""
    for root in KAGGLE:
        if (path / root).is_dir():
            raise ValueError(
                f"{readable(path)}: is Kaggle's ImageNet: add --split train or --split val"
            )
    for split, name in TAR_OF.items():
        if (path / name).is_file():
            raise ValueError(
                f"{readable(path)}: holds {name}: give that file, or add --split {split}"
            )


# ------------------------------------------------------------------ many files


def _of_many(pattern: str, wishes: Wishes) -> Collection:
    """The files of a pattern, all of one form."""
    paths = [Path(name) for name in sorted(glob.glob(pattern))]
    if not paths:
        raise ValueError(f"{readable(pattern)}: no file matches")
    path = Path(pattern)
    if all(is_parquet(one) for one in paths):
        return _parquets(path, paths, wishes)
    if all(BetonStore.accepts(one) for one in paths):
        _refuse(wishes, path, "a .beton")
        return Samples(source_of(path)(path))
    if all(one.suffix == ".tar" for one in paths):
        return _of_tars(path, paths, wishes)
    raise ValueError(
        f"{readable(pattern)}: matches {listed([one.name for one in paths])}: expected tars,"
        " parquet files, or .beton files"
    )


def _of_tars(path: Path, tars: Sequence[Path], wishes: Wishes) -> Collection:
    """Shards; or a tar for each class, as in ILSVRC2012_img_train.tar unpacked once."""
    trees: list[tuple[str, Tree]] = [
        (tar.stem, TarTree(tar, keep_open=len(tars) == 1)) for tar in tars
    ]
    return _of_archive(JoinedTree(path, trees), wishes)


def _parquets(path: Path, files: Sequence[Path], wishes: Wishes) -> Collection:
    if wishes.labels is not None:
        raise ValueError(f"{readable(path)}: parquet files have labels of their own, not --labels")
    splits = {split_of(file) for file in files}
    if wishes.split is not None:
        files = [file for file in files if split_of(file) == wishes.split]
        if not files:
            raise ValueError(f"{readable(path)}: split = {wishes.split}: no file is of that split")
    elif len(splits) > 1:
        names = listed(sorted(str(split) for split in splits))
        raise ValueError(
            f"{readable(path)}: parquet files of several splits ({names}): add --split"
        )
    return ParquetFiles(path, files)


def _refuse(wishes: Wishes, path: Path, what: str) -> None:
    """ValueError for wishes that a form does not have."""
    for name, value in wishes._asdict().items():
        if value is not None:
            raise ValueError(f"{readable(path)}: is {what}, which takes no --{name}")
