"""Images in any form that `pipelines.intake` knows -> `.beton`, or several of them at once."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.convert import AS_THEY_ARE, CHUNK, BadImages, Encoding, cores, encode_content
from pipelines.files import readable
from pipelines.intake.collection import Collection, Image
from pipelines.intake.parts import Part
from pipelines.intake.recognise import Wishes, recognise
from pipelines.progress import in_order
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.sources.sidecar import read_sidecar
from pipelines.store import check_class_names


def convert_images(
    src: str | Path,
    dst: str | Path,
    encoding: Encoding = AS_THEY_ARE,
    *,
    wishes: Wishes = Wishes(),  # noqa: B008
    skip_bad: bool = False,
    allow_odd_classes: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """All images at `src` into one file. Returns the sidecar's `encoding` entry.

    Raises as `recognise` and `convert_collection`.
    """
    with closing(recognise(src, wishes)) as collection:
        everything = Part(Path(dst), np.arange(len(collection)))
        (done,) = convert_collection(
            collection,
            [everything],
            encoding,
            skip_bad=skip_bad,
            allow_odd_classes=allow_odd_classes,
            threads=threads,
        )
    return done


def convert_collection(
    collection: Collection,
    parts: Sequence[Part],  # no image is in two of them
    encoding: Encoding = AS_THEY_ARE,
    *,
    skip_bad: bool = False,
    allow_odd_classes: bool = False,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Write some images of a collection, in one pass. Returns each sidecar's `encoding` entry.

    An entry's `skipped` holds the images left out, `ignored` what was passed over. A class that
    loses all its images keeps its name and its place.

    Raises:
        BadImages: damaged images, unless `skip_bad`.
        ValueError, OSError: wrong arguments, odd class names (unless allowed), no images, nothing
            can be written.
    """
    if collection.classes is not None and not allow_odd_classes:
        check_class_names(collection.path, collection.classes)
    part_of = np.full(len(collection), len(parts))  # which file an image goes to
    place_of = np.zeros(len(collection), np.int64)  # its number there
    for index, part in enumerate(parts):
        if not len(part.numbers):
            raise ValueError(f"{readable(part.dst)}: would have no images")
        part_of[part.numbers] = index
        place_of[part.numbers] = np.arange(len(part.numbers))
    wanted = np.flatnonzero(part_of < len(parts))

    def one(item: tuple[int, Callable[[], Image]]) -> tuple[int, Sample | str]:
        number, read = item
        return number, encode_content(read, encoding, collection.shown(number))

    bad: list[tuple[int, str]] = []
    skipped: list[list[int]] = [[] for _ in parts]
    n_verbatim = [0] * len(parts)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(BetonWriter(part.dst, len(part.numbers), encoding.planes))
            for part in parts
        ]
        results = stack.enter_context(
            closing(
                in_order(
                    one,
                    collection.contents(wanted),
                    cores(threads),
                    CHUNK,
                    "convert",
                    total=len(wanted),
                )
            )
        )
        for number, result in results:
            index = part_of[number]
            if isinstance(result, str):
                bad.append((number, result))
                skipped[index].append(number)
            elif not bad or skip_bad:  # else nothing will be kept: only the list goes on
                label = int(collection.labels[number])
                writers[index].add(result, label, int(place_of[number]))
                n_verbatim[index] += result.verbatim
        if bad and not (skip_bad and all(writer.count for writer in writers)):
            raise BadImages([(collection.shown(number), why) for number, why in sorted(bad)])
        entries = []
        for part, writer, left_out, verbatim in zip(
            parts, writers, skipped, n_verbatim, strict=True
        ):
            entries.append(
                asdict(encoding)
                | part.made_as
                | {
                    "source": collection.described_as,
                    "count": writer.count,
                    "verbatim": verbatim,
                    "skipped": [collection.name(number) for number in sorted(left_out)],
                    "ignored": collection.ignored,
                    "allow_odd_classes": allow_odd_classes,
                }
            )
        for writer, entry in zip(writers, entries, strict=True):
            writer.commit(collection.classes, entry)
    return entries


def is_complete(part: Part, encoding: Encoding) -> bool:
    """Whether a part was written before, in the same way: conversion may begin again with others.

    Raises:
        ValueError: there is a file of that name, but it was made otherwise.
        DamagedData: it is damaged.
    """
    if not part.dst.exists():
        return False
    sidecar = read_sidecar(part.dst)
    wanted = asdict(encoding) | part.made_as
    entry = {} if sidecar is None else sidecar.encoding
    n_skipped = len(entry.get("skipped", ()))
    BetonStore(part.dst).close()
    same = all(entry.get(name) == value for name, value in wanted.items())
    if not same or entry["count"] + n_skipped != len(part.numbers):
        raise ValueError(
            f"{readable(part.dst)} exists, and was made from other images or with other options;"
            " remove it or choose another name"
        )
    return True
