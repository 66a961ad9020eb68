"""Target: damaged annotations: COCO's JSON, Pascal VOC's XML, and those in a sidecar."""

# ruff: noqa: PT017  # an error is judged where it is met; not every input must raise one

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import pipelines
from pipelines import convert
from pipelines.boxes import BOX_FIELDS, Annotations
from pipelines.convert_boxes import convert_boxes
from pipelines.sources.sidecar import content_checksum, sidecar_path
from tests.fuzzing.damage import HOSTILE_JSON, mutate
from tests.fuzzing.intact import make_beton
from tests.fuzzing.judge import ALLOWED, assert_says_where
from tests.pipelines.annotated_trees import random_coco, voc_tree, write_json
from tests.pipelines.random_boxes import random_annotations
from tests.pipelines.samples import add_sidecar

# Listed as often as they shall come.
SORTS = ["json", "json", "value", "value", "xml", "sidecar", "sidecar entry"]
CLASSES = ("a", "b", "c")


def fuzz_annotations(rng: np.random.Generator, folder: Path) -> str:
    sort = str(rng.choice(SORTS))
    match sort:
        case "json":
            images, content = random_coco(rng, folder)
            labels = write_json(folder / "a.json", content)
            bad, how = mutate(rng, labels.read_bytes())
            labels.write_bytes(bad)
        case "value":
            images, content = random_coco(rng, folder)
            labels = folder / "a.json"
            text, how = with_hostile_value(rng, content)
            labels.write_text(text)
        case "xml":
            images, labels = voc_tree(folder)
            file = labels / f"{rng.integers(1, 4)}.xml"
            bad, how = mutate(rng, file.read_bytes())
            file.write_bytes(bad)
        case _:
            return f"{sort}: {in_a_sidecar(rng, folder, forged=sort == 'sidecar entry')}"
    return f"{sort} {how}: {converted(rng, images, labels, folder)}"


def with_hostile_value(rng: np.random.Generator, content: dict[str, Any]) -> tuple[str, str]:
    """One value of the tree is replaced: of the whole, of an entry, or of a list in one."""
    at: Any = content
    path: list[str] = []
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[int(rng.integers(len(keys)))]
        path.append(str(key))
        inner = at[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.1:
            at[key] = "@"
            break
        at = inner
    value = str(rng.choice(HOSTILE_JSON))
    return json.dumps(content).replace('"@"', value), f"{'.'.join(path)} = {value[:20]}"


def converted(rng: np.random.Generator, images: Path, labels: Path, folder: Path) -> str:
    """Either an error that says where, and no trace; or a file that is whole."""
    dst = folder / "out.beton"
    try:
        done = convert_boxes(images, labels, dst, skip_bad=bool(rng.integers(2)), threads=1)
    except ALLOWED as error:
        says = str(labels) in str(error) or str(images) in str(error)
        assert says, f"neither {labels} nor {images} is named: {error!r}"
        assert not list(folder.glob("out.beton*"))
        return str(error)[:150]
    assert convert.check(dst, threads=1) == []
    store = pipelines.open_store(dst)
    assert store.annotations is not None
    files = {file.read_bytes() for file in images.iterdir()}
    n_verbatim = sum(store.read(i).tobytes() in files for i in range(len(store)))
    assert n_verbatim == done["verbatim"]
    n = len(store.annotations.boxes)
    store.close()
    return f"{len(store)} images, {n} boxes"


def in_a_sidecar(rng: np.random.Generator, folder: Path, *, forged: bool) -> str:
    """Damage of the file; or, `forged`, another value under a checksum that fits."""
    path = make_beton(folder, "jpg")
    store = pipelines.open_store(path)
    annotations = random_annotations(rng, store.heights, store.widths, len(CLASSES))
    store.close()
    add_sidecar(path, CLASSES, annotations=annotations)
    side = sidecar_path(path)
    if forged:
        content = json.loads(side.read_text())
        entry = content["annotations"]
        how = str(rng.choice(list(entry)))
        entry[how] = json.loads(str(rng.choice(['"AAAA"', "3", "null", '"AAAAAAAA"', '""', "[]"])))
        content["checksum"] = content_checksum(content)
        side.write_text(json.dumps(content))
    else:
        good = side.read_bytes()
        bad, how = mutate(rng, good, good.index(b'"annotations"'))
        side.write_bytes(bad)
    try:
        store = pipelines.open_store(path)
    except ALLOWED as error:
        assert_says_where(error, side)
        return f"{how}: {error}"[:200]
    store.close()
    assert_same(store.annotations, annotations)
    return f"{how}: read as ever"


def assert_same(found: Annotations | None, expected: Annotations) -> None:
    assert found is not None
    for name in ("first", *BOX_FIELDS):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
