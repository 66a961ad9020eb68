"""Target: images in an archive, in parquet files or in shards, converted."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import convert
from pipelines.convert_images import convert_images
from pipelines.sources.beton import BetonStore
from tests.fuzzing.damage import mutate
from tests.fuzzing.folders import SAME_IMAGE, SAME_ROW, deliver
from tests.fuzzing.intact import FILES, make_folder
from tests.fuzzing.judge import ALLOWED, assert_says_where, twins
from tests.pipelines.intake import forms

SIZE = 16  # pixels
LABEL_OF = {"a": 0, "b": 1}
# Whose labels lie under no checksum: a flipped bit makes another number of one.
LABELS_MAY_CHANGE = ("shard", "shard.gz")


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an image folder by their path."""
    root = make_folder(folder)
    return {"/".join(parts): root.joinpath(*parts).read_bytes() for parts in FILES}


def samples(files: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """The members of a shard of WebDataset, in the order of FILES."""
    members: list[tuple[str, bytes]] = []
    for number, (path, content) in enumerate(files.items()):
        members.append((f"{number}.jpg", content))
        members.append((f"{number}.cls", str(LABEL_OF[path[0]]).encode()))
    return members


def write_parquet(files: dict[str, bytes], path: Path) -> Path:
    """With checksums of its pages."""
    images = [{"bytes": content, "path": name} for name, content in files.items()]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([LABEL_OF[name[0]] for name in files], pa.int64())
    table = pa.table({"image": pa.array(images, struct), "label": labels})
    pq.write_table(table, path, row_group_size=3, write_page_checksum=True, compression="NONE")
    return path


def make(form: str, files: dict[str, bytes], folder: Path) -> Path:
    match form:
        case "tar":
            return forms.tar(files.items(), folder / "x.tar")
        case "tar.gz":
            return forms.tar(files.items(), folder / "x.tgz", "w:gz")
        case "tars":
            deep = {name.replace("deep/", ""): content for name, content in files.items()}
            return forms.tar(forms.class_tars(deep, folder).items(), folder / "x.tar")
        case "zip":
            return forms.zipped(files, folder / "x.zip", zipfile.ZIP_STORED)
        case "parquet":
            return write_parquet(files, folder / "x.parquet")
        case "shard":
            return forms.tar(samples(files), folder / "x.tar")
        case _:
            return forms.tar(samples(files), folder / "x.tgz", "w:gz")


FORMS = ("tar", "tar.gz", "tars", "zip", "parquet", "shard", "shard.gz")


def fuzz_archive(rng: np.random.Generator, folder: Path) -> str:
    """Every image of the result is that of its own source, or a damaged one and no other's.

    None is lost without a word: what is not in the result is in an error, or was left out by name.
    """
    form = FORMS[int(rng.integers(len(FORMS)))]
    path = make(form, contents(folder), folder)
    dst = folder / "out.beton"
    bad, how = mutate(rng, path.read_bytes())
    path.write_bytes(bad)
    skip = bool(rng.random() < 0.5)
    try:
        done = convert_images(path, dst, skip_bad=skip, threads=1)
    except ALLOWED as error:
        assert_says_where(error, path)
        assert not list(folder.glob("out*")), "something was left behind"
        return f"{form} {how}: {error}"
    assert convert.check(dst, threads=1) == []
    n_left_out = len(done["skipped"])
    # A zip has no checksum of names: one that is damaged may no longer be an image's.
    n_told = n_left_out + sum(done["ignored"].values())
    # Zeros to the end are how a tar ends. A few kilobytes of them nobody can tell from damage.
    ends_early = how == "zero" and form in ("tar", "tars", "shard")
    assert done["count"] + n_told >= len(FILES) or ends_early, "an image was lost without a word"
    shown = judge(dst, form)
    return f"{form} {how}: {done['count']} kept, {n_left_out} left out, {shown} as ever"


def judge(dst: Path, form: str) -> int:
    """How many images are as they were. The others are damaged, and none is another's."""
    expected = twins("folder", "reference", SIZE)
    labels = [LABEL_OF[name] for name, _ in FILES]
    store = BetonStore(dst)
    seen: list[int] = []
    for _, label, image, error in deliver("reference", store, SIZE):
        assert image is not None, error
        far = [np.abs(image.astype(int) - other).mean() for other in expected]
        nearest = int(np.argmin(far))
        if far[nearest] < SAME_IMAGE:
            assert label == labels[nearest] or form in LABELS_MAY_CHANGE
            seen.append(nearest)
        else:
            assert min(far) > SAME_ROW
    store.close()
    assert len(set(seen)) == len(seen), "an image is there twice"
    return len(seen)
