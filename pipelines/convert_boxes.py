"""Images with boxes (COCO's JSON, or Pascal VOC's XML files) -> `.beton` with annotations.

Images are stored as `convert_folder` stores them, and boxes are scaled with them. What is odd about
the annotations is counted, told, and kept in the sidecar. An image whose file is missing, damaged,
turned by Exif, or of other sides than the annotations say is a bad image: its boxes may be wrong.
"""

from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.convert import AS_THEY_ARE, CHUNK, BadImages, Encoding, cores, encode_content
from pipelines.files import read_regular, readable
from pipelines.images import unturned_sides
from pipelines.progress import in_order
from pipelines.sources.annotated import NOT_NAMED, Annotated, image_files
from pipelines.sources.beton_writer import BetonWriter, Sample, refuse_existing
from pipelines.sources.coco import read_coco
from pipelines.sources.sidecar import MOST_BOXES
from pipelines.sources.voc import read_voc


def convert_boxes(
    images: str | Path,
    annotations: str | Path,
    dst: str | Path,
    encoding: Encoding = AS_THEY_ARE,
    *,
    skip_bad: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Images of a folder and their boxes. Returns the sidecar's `encoding` entry.

    `annotations` is COCO's `instances_*.json`, or a folder of Pascal VOC's XML files. Images come
    in the order of their COCO ids, or of the names of the XML files. The entry's `skipped` holds
    the images left out, `counted` what was odd and how often.

    Raises:
        BadImages: images that cannot be used, unless `skip_bad`.
        ValueError, OSError: wrong arguments, annotations that are none or contradict themselves,
            nothing can be written.
    """
    images = Path(images)
    if not images.is_dir():
        raise ValueError(f"{readable(images)}: no such folder; expected the folder of the images")
    refuse_existing(Path(dst))  # COCO's annotations take half a minute to read
    annotated = read_annotations(annotations, images)
    entries = annotated.images
    sides = np.ones((len(entries), 2), np.int64)  # height, width of the files
    stored = np.ones((len(entries), 2), np.int64)  # as they are stored

    def one(place: int) -> Sample | str:
        entry = entries[place]

        def look_at(data: bytes) -> None:
            found = unturned_sides(data)
            if entry.sides not in (None, found):
                raise ValueError(
                    f"the annotations say {_pixels(entry.sides)}, it has {_pixels(found)}"
                )
            sides[place] = found

        if entry.fault:
            return entry.fault
        path = str(images / entry.name)
        return encode_content(partial(read_regular, path), encoding, path, look_at)

    bad: list[tuple[str, str]] = []
    kept: list[int] = []  # places of the images that are stored
    n_verbatim = 0
    with (
        BetonWriter(dst, len(entries), encoding.planes) as writer,
        closing(in_order(one, range(len(entries)), cores(threads), CHUNK, "convert")) as results,
    ):
        for place, result in enumerate(results):
            if isinstance(result, str):
                bad.append((entries[place].name, result))
            elif not bad or skip_bad:  # else nothing will be kept: only the list goes on
                writer.add(result, len(kept))
                stored[place] = result.height, result.width
                kept.append(place)
                n_verbatim += result.verbatim
        if bad and not (skip_bad and kept):
            raise BadImages([(str(images / name), why) for name, why in bad])
        rows = np.array(kept, np.int64)
        boxes, counts = annotated.for_images(rows, sides[rows], stored[rows])
        counts |= annotated.notes | {NOT_NAMED: _not_named(images, annotated)}
        done = asdict(encoding) | {
            "annotations": Path(annotations).name,
            "count": writer.count,
            "verbatim": n_verbatim,
            "skipped": [name for name, _ in bad],
            "counted": counts,
        }
        writer.commit(annotated.classes, done, annotations=boxes)
    return done


def read_annotations(annotations: str | Path, images: Path) -> Annotated:
    """Of COCO or Pascal VOC.

    Raises:
        ValueError: neither of them, no boxes, or more than a sidecar takes.
        OSError: a file cannot be read.
    """
    path = Path(annotations)
    if not path.exists():
        raise ValueError(
            f"{readable(path)}: no such file or folder; expected COCO's instances_*.json,"
            " or a folder of Pascal VOC's XML files"
        )
    annotated = read_voc(path, images) if path.is_dir() else read_coco(path)
    if not 0 < len(annotated.boxes) <= MOST_BOXES:
        raise ValueError(
            f"{readable(path)}: {len(annotated.boxes):,} boxes: must be 1 to {MOST_BOXES:,}"
        )
    return annotated


def _not_named(images: Path, annotated: Annotated) -> int:
    """Image files in the folder that no entry names."""
    named = {entry.name for entry in annotated.images}
    return sum(name not in named for name in image_files(images))


def _pixels(sides: tuple[int, int] | None) -> str:
    assert sides is not None
    height, width = sides
    return f"{width} x {height} pixels"
