"""The same few images in every form in which people hold them, made from class folders."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.io import savemat

from tests.pipelines.samples import encoded, jpeg, picture

WNIDS = ("n01440764", "n01443537", "n02102040")
NUMBERS = (18, 180, 2, 10026)  # as texts they sort otherwise than as numbers

Files = dict[str, bytes]  # WNID/NAME.JPEG -> content


def train_files() -> Files:
    """ImageNet's names; one file is a PNG, as one of ImageNet's is."""
    files: Files = {}
    for c, wnid in enumerate(WNIDS):
        for i, number in enumerate(NUMBERS):
            files[f"{wnid}/{wnid}_{number}.JPEG"] = jpeg(10 * c + i)
    files[f"{WNIDS[1]}/{WNIDS[1]}_18.JPEG"] = encoded(picture(99), "PNG")
    return files


def val_files(rng: np.random.Generator) -> Files:
    """Those of `val`, ten of them, every class at least once."""
    labels = rng.permutation([0, 1, 2, *rng.integers(0, len(WNIDS), 7)])
    return {
        f"{WNIDS[label]}/ILSVRC2012_val_{number:08}.JPEG": jpeg(200 + number)
        for number, label in enumerate(labels, 1)
    }


def wnid(path: str) -> str:
    return path.partition("/")[0]


def file_name(path: str) -> str:
    return path.rpartition("/")[2]


# ------------------------------------------------------------------ folders and archives


def folders(files: Files, root: Path) -> Path:
    """Class folders."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def flat_folder(files: Files, root: Path) -> Path:
    return folders({file_name(path): content for path, content in files.items()}, root)


def tar(members: Iterable[tuple[str, bytes]], path: Path, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def as_bytes(make: Callable[[Path], object], folder: Path) -> bytes:
    """The file that `make` writes."""
    temporary = folder / "temporary"
    make(temporary)
    content = temporary.read_bytes()
    temporary.unlink()
    return content


def class_tars(files: Files, folder: Path) -> dict[str, bytes]:
    """WNID.tar -> content, each with the images of a class and no folder."""
    tars = {}
    for one in dict.fromkeys(map(wnid, files)):
        members = [(file_name(p), content) for p, content in files.items() if wnid(p) == one]
        tars[f"{one}.tar"] = as_bytes(lambda path, m=members: tar(m, path), folder)  # type: ignore[misc]
    return tars


def zipped(files: Files, path: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# ------------------------------------------------------------------ labels of flat images


def ilsvrc_ids() -> dict[str, int]:
    """ILSVRC's own ids, which are not in the order of the WNIDs."""
    return {WNIDS[0]: 3, WNIDS[1]: 1, WNIDS[2]: 2}


def devkit_files(val: Files, folder: Path) -> Files:
    """ImageNet's devkit: the classes, one that has children, and the ground truth."""
    fields = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
    ]
    rows = [(number, one, "words", "gloss", 0) for one, number in ilsvrc_ids().items()]
    rows.append((4, "n00000001", "fish", "gloss", 2))
    synsets = np.array(sorted(rows), fields).reshape(-1, 1)
    by_name = sorted(val, key=file_name)
    truth = "".join(f"{ilsvrc_ids()[wnid(path)]}\n" for path in by_name)
    meta = as_bytes(lambda path: _save_mat(path, synsets), folder)
    root = "ILSVRC2012_devkit_t12"
    return {
        f"{root}/readme.txt": b"",
        f"{root}/data/meta.mat": meta,
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def _save_mat(path: Path, synsets: np.ndarray) -> None:
    with path.open("wb") as file:
        savemat(file, {"synsets": synsets})


def kaggle_csv(val: Files, path: Path, rng: np.random.Generator) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for number in rng.permutation(len(val)):
            one = list(val)[number]
            box = f"{wnid(one)} 1 2 3 4 "
            writer.writerow([Path(one).stem, box * int(rng.integers(1, 3))])
    return path


def own_csv(files: Files, path: Path, header: bool = True, delimiter: str = ",") -> Path:
    lines = [f"path{delimiter}label"] if header else []
    lines += [f"{file_name(one)}{delimiter}{wnid(one)}" for one in files]
    path.write_text("\n".join(lines) + "\n")
    return path


# ------------------------------------------------------------------ parquet and WebDataset


def parquets(
    files: Files,
    folder: Path,
    rng: np.random.Generator,
    split: str = "train",
    n_files: int = 3,
    names: bool = True,  # of the images' files, with the WNID appended, as on the hub
) -> Path:
    """Hugging Face's: rows in random order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [list(files)[i] for i in rng.permutation(len(files))]
    for number, some in enumerate(np.array_split(np.array(paths, object), n_files)):
        images = []
        for one in some:
            path = Path(file_name(one))
            called = f"{path.stem}_{wnid(one)}{path.suffix}" if names else None
            images.append({"bytes": files[one], "path": called})
        table = pa.table(
            {
                "image": pa.array(
                    images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                ),
                "label": pa.array([WNIDS.index(wnid(one)) for one in some], pa.int64()),
            }
        )
        features = {"label": {"names": ["tench, Tinca", "goldfish", "spaniel"]}}
        noted = json.dumps({"info": {"features": features}}).encode()
        pq.write_table(
            table.replace_schema_metadata({b"huggingface": noted}),
            folder / f"{split}-{number:05}-of-{n_files:05}.parquet",
            row_group_size=2,
        )
    return folder


def shards(
    files: Files,
    folder: Path,
    rng: np.random.Generator,
    n_files: int = 2,
    *,
    keys: str = "names",  # of the samples: the images' names, or numbers
    labels: str = "cls",
) -> Path:
    """WebDataset's: samples in random order, their label in KEY.cls or KEY.json."""
    paths = [list(files)[i] for i in rng.permutation(len(files))]
    for number, some in enumerate(np.array_split(np.array(paths, object), n_files)):
        members: list[tuple[str, bytes]] = []
        for i, one in enumerate(some):
            key = Path(one).stem if keys == "names" else f"{number:02}{i:04}"
            label = WNIDS.index(wnid(one))
            members.append((f"{key}.jpg", files[one]))
            if labels == "cls":
                members.append((f"{key}.cls", str(label).encode()))
            else:
                entries = {"filename": file_name(one), "label": label}
                members.append((f"{key}.json", json.dumps(entries).encode()))
        tar(members, folder / f"imagenet-{number:06}.tar")
    return folder


def copied(src: Path, dst: Path) -> Path:
    dst.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(src, dst)
    return dst
