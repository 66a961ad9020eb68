"""What `fap-corrupt` does, up to the last set. `fap.cli.corrupt` is the way in."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import pipelines
from fap.cli.corrupt_arguments import arguments, sets_of
from fap.cli.output import told
from fap.evaluate.images import Seen, look_at, pixel_versions, stamps_of
from fap.run.torch_setup import limit_threads
from fap.sections.data import usual_resize
from pipelines import Store
from pipelines.corrupt import DEFINITIONS, SMALL, definitions
from pipelines.corrupt_copies import (
    SUFFIXES,
    Fit,
    How,
    class_folders,
    file_names,
    pictures,
    size_of,
    write_beton,
    write_files,
)
from pipelines.corrupt_folder import CopiesFolder, whole_folder
from pipelines.files import readable
from pipelines.progress import progress_of
from pipelines.subset import SubsetStore
from pipelines.workers import Workers

USUAL_SIZE = 224  # pixels, of the published files
SAMPLED = 2  # images of each set, for an estimate of its bytes
LITTLE = 500  # images in all sets, which take less long than processes need to start
MB = 1e6
GB = 1e9


def run(argv: Sequence[str] | None) -> int:
    """The exit code. Whatever is a user's or the machine's fault is one line on standard error."""
    args = arguments(argv)
    try:
        return corrupt(args)
    except BrokenExecutor as error:
        problem = f"a worker process was ended, perhaps for want of memory: {error}"
    except (ValueError, OSError, ImportError, pipelines.DamagedData) as error:
        problem = told(error)
    except MemoryError:
        problem = "out of memory; fewer --workers need less"
    print(f"fap-corrupt: {problem}", file=sys.stderr)
    return 1


def corrupt(args: Namespace) -> int:
    """Look at everything, say what will be done, and do it set by set."""
    limit_threads()
    definitions()  # a package that is missing is noticed now
    _refuse_one_in_the_other(args.src, args.dst)
    with closing(pipelines.open_store(args.src)) as store:
        store.check_classes()
        if store.annotations is not None:
            raise ValueError(
                f"{readable(args.src)}: its images have boxes; fap-eval --corrupt corrupts them as "
                "COCO-C does, without copies"
            )
        job = _Job(look_at(store), args)
        todo = job.todo()
        _say("\n".join(job.describe(len(todo))))
        workers = args.workers
        if workers is None and len(todo) * len(store) <= LITTLE:
            workers = 0  # a thread of this process
        with Workers(workers, say=_warn) as pool:
            if todo:
                job.check_space(todo, pool)
                job.folder.begin()
            total = len(todo) * len(store)
            with progress_of(total, "fap-corrupt", "img") as update:
                for how in todo:
                    job.make(how, pool, update)
    dst = readable(args.dst)
    _say(f"{dst}: {len(job.wanted)} sets, complete")
    _say(f"evaluate them:  fap-eval MODEL --data {readable(args.src)} --imagenet-c {dst}")
    return 0


def _refuse_one_in_the_other(src: Path, dst: Path) -> None:
    source, target = src.resolve(), dst.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(
            f"{readable(dst)}: SRC and DST lie in one another; the copies would be read as images "
            "of SRC: choose another folder"
        )


class _Job:
    """What was asked for, of the images that are there."""

    def __init__(self, seen: Seen, args: Namespace) -> None:
        self.seen = seen
        self.store: Store = seen.store
        self.args = args
        self.fit = fit_for(self.store, args)
        self.names: list[str] | None = None  # of files; None: the sets are .beton files
        if args.format != "beton":
            folders = class_folders(self.store)
            self.names = file_names(self.store, folders, SUFFIXES[args.format])
        made_of: dict[str, Any] = {
            "source": seen.identity,
            "shown": "as stored" if self.fit is None else self.fit._asdict(),
            "seed": args.seed,
            "format": args.format,
            "quality": args.quality,
            "versions": {"definitions": DEFINITIONS, **pixel_versions()},
        }
        self.folder = CopiesFolder(args.dst, made_of, is_beton=self.names is None)
        self.wanted = sets_of(args)

    def todo(self) -> list[How]:
        """Those that are not there. Raises ValueError."""
        return [how for how in self.wanted if not self.folder.has(how.name, how.severity)]

    # -------------------------------------------------------------- said before

    def describe(self, n_todo: int) -> list[str]:
        store, args = self.store, self.args
        lines = [f"{readable(args.src)}: {line}" for line in store.describe()]
        lines += store.notes
        what = {
            "jpeg": f"JPEGs of quality {args.quality}",
            "png": "PNGs, without loss",
            "beton": "raw pixels, a .beton for each set",
        }
        lines.append(f"written {self._shown()}, as {what[args.format]}")
        lines.append(self._constants())
        if store.classes is None and self.names is not None:
            lines.append("labels have no names: folders are called by their numbers")
        corruptions = list(dict.fromkeys(how.name for how in self.wanted))
        severities = sorted({how.severity for how in self.wanted})
        there = len(self.wanted) - n_todo
        lines.append(
            f"{len(self.wanted)} sets of {len(store):,} images: {', '.join(corruptions)} at "
            f"severity {', '.join(map(str, severities))}"
            + (f"; {there} of them whole" if there else "")
        )
        return lines

    def _shown(self) -> str:
        if self.fit is None:
            return "in their own size"
        size, resize = self.fit
        return f"at {size} x {size} px, cut out of a shorter side of {resize} px"

    def _constants(self) -> str:
        """Whose constants the images get, which goes by their sides."""
        if self.fit is not None:
            n_small = len(self.store) if self.fit.size <= SMALL else 0
        else:
            longer = np.maximum(self.store.heights, self.store.widths)
            n_small = int((longer <= SMALL).sum())
        if n_small == 0:
            return "with ImageNet-C's constants"
        if n_small == len(self.store):
            return f"with CIFAR-10-C's constants, as for all images of at most {SMALL} px"
        return (
            f"with ImageNet-C's constants, {n_small:,} images of at most {SMALL} px with "
            "CIFAR-10-C's"
        )

    def check_space(self, todo: Sequence[How], pool: Workers) -> None:
        """Say how much room the sets need. Raises ValueError where there is less."""
        there = self.args.dst.absolute()
        while not there.exists():
            there = there.parent
        disk = os.statvfs(there)
        needed = self._bytes_needed(todo, pool, disk.f_frsize)
        free = disk.f_bavail * disk.f_frsize
        about = "" if self.names is None else "about "
        words = f"{readable(self.args.dst)}: {about}{_in_words(needed)} needed, "
        words += f"{_in_words(free)} free"
        if needed > free:
            raise ValueError(f"{words}: take fewer --corruptions, or another disk")
        _say(words)
        n_files = len(todo) * len(self.store)
        if self.names is not None and disk.f_files and n_files > disk.f_favail:
            raise ValueError(
                f"{readable(self.args.dst)}: {n_files:,} files are needed, and the file system has "
                f"room for {disk.f_favail:,}: --format beton makes one for each set"
            )

    def _bytes_needed(self, todo: Sequence[How], pool: Workers, block: int) -> int:
        """Of all sets; of files from a few images of each.

        These are made also where nothing is to be learnt from them: what a corruption lacks, such
        as photos of frost, shows now and not after hours.
        """
        store = self.store
        numbers = np.linspace(0, len(store) - 1, min(SAMPLED, len(store)), dtype=int)
        some = list(chain.from_iterable(pictures(SubsetStore(store, numbers), self.fit)))
        calls = [(number, picture, how) for how in todo for number, picture in some]
        sizes = list(pool.map(size_of, *zip(*calls, strict=True)))
        if self.names is None:
            pixels = store.heights.astype(np.int64) * store.widths
            if self.fit is not None:
                pixels = np.full(len(store), self.fit.size**2)
            return 3 * int(pixels.sum()) * len(todo)
        in_blocks = sum(-(-size // block) * block for size in sizes)
        return in_blocks * len(store) // len(some)

    # -------------------------------------------------------------- done

    def make(self, how: How, pool: Workers, update: Callable[[int], Any]) -> None:
        """Make a set, unless another command has made it by now. Raises as `corrupt`."""
        began = time.monotonic()
        with self.folder.turn(how.name, how.severity):
            if self.folder.has(how.name, how.severity):
                update(len(self.store))
                return
            self._write(how, pool, update)
        seconds = time.monotonic() - began
        _say(f"  {how.name}/{how.severity}: {len(self.store) / seconds:,.0f} images/s")

    def _write(self, how: How, pool: Workers, update: Callable[[int], Any]) -> None:
        place = self.folder.place(how.name, how.severity)
        if self.names is None:
            contents = {**self.folder.made_of, **how._asdict()}
            done = write_beton(
                self.store, self.fit, how, place, pool, encoding=contents, check=self._check
            )
            _follow(done, pool, update)
            return
        with whole_folder(place) as part:
            for folder in {name.split("/")[0] for name in self.names}:
                (part / folder).mkdir()
            paths = [f"{part}/{name}" for name in self.names]
            _follow(write_files(self.store, self.fit, how, paths, pool), pool, update)
            self._check()

    def _check(self) -> None:
        """ValueError if the source has changed since it was looked at."""
        if stamps_of(self.store.files()) != self.seen.stamps:
            raise ValueError(
                f"{readable(self.args.src)}: files changed while they were read; start again"
            )


def _follow(done: Generator[int, None, None], pool: Workers, update: Callable[[int], Any]) -> None:
    """Count what is done. Where that fails the workers stop: what they wrote is then removed."""
    with closing(done):
        try:
            for n in done:
                update(n)
        except BaseException:
            pool.stop()
            raise


def fit_for(store: Store, args: Namespace) -> Fit | None:
    """None: images in their own size."""
    given = args.size is not None or args.resize is not None
    all_small = max(store.heights.max(), store.widths.max()) <= SMALL
    if args.as_stored or (all_small and not given):
        return None
    size = args.size or USUAL_SIZE
    resize = args.resize or usual_resize(size)
    if resize < size:
        raise ValueError(f"--resize {resize}: must be at least --size, {size}")
    return Fit(size, resize)


def _in_words(n_bytes: int) -> str:
    return f"{n_bytes / GB:,.1f} GB" if n_bytes >= GB else f"{n_bytes / MB:,.1f} MB"


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)  # beside a progress bar
    sys.stdout.flush()


def _warn(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
