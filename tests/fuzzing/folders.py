"""Targets: an image folder, used directly or converted, and trees of all that lies about."""

# ruff: noqa: PT017  # an error is judged where it is met; not every input must raise one

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import pipelines
from pipelines import convert
from pipelines.archives.listing import list_images
from pipelines.convert import Encoding
from pipelines.convert_images import convert_images
from tests.fuzzing.damage import mutate
from tests.fuzzing.intact import FILES, images, make_folder
from tests.fuzzing.judge import (
    ALLOWED,
    SAME_ROW,
    Damage,
    assert_says_where,
    deliver,
    judge,
    pick_loaders,
    twins,
)
from tests.pipelines.trees import listed_slowly, random_tree

# Listed as often as they shall come.
WAYS = ["bytes"] * 7 + ["sides"] * 4 + ["empty", "dangling", "folder", "text", "index"]
ENCODINGS = [Encoding(), Encoding(), Encoding(max_side=48), Encoding(raw=True)]
SAME_IMAGE = 12  # grey levels between an image and what conversion makes of it
CONVERTED_SIZE = 16  # pixels


def damage_folder(rng: np.random.Generator, root: Path) -> tuple[set[int], str]:
    """Returns the damaged samples, in the order of their names, which no damage changes."""
    i = int(rng.integers(len(FILES)))
    file = root.joinpath(*FILES[i])
    how = str(rng.choice(WAYS))
    match how:
        case "bytes":
            bad, how = mutate(rng, file.read_bytes())
            file.write_bytes(bad)
        case "sides":
            height, width = images()[i].shape[:2]
            file.write_bytes(with_other_sides(rng, file.read_bytes(), height, width))
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("<html>404</html>")
        case "dangling":
            file.unlink()
            file.symlink_to("nowhere")
        case "folder":
            file.unlink()
            file.mkdir()
        case "index":
            make_index = type(pipelines.open_store(root))
            make_index(root)
            index = root / ".fap-index.npz"
            index.write_bytes(mutate(rng, index.read_bytes())[0])
            return set(), "index"
    return {i}, how


def with_other_sides(rng: np.random.Generator, data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose header says other sides, up to 65535 x 65535."""
    new = [30000, 30000]
    if rng.random() >= 0.5:
        new = rng.choice([1, height + 1, 30000, 65535], 2).tolist()
    before = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    after = new[0].to_bytes(2, "big") + new[1].to_bytes(2, "big")
    return data.replace(b"\x08" + before, b"\x08" + after)  # 8 bits per sample come first


def fuzz_folder(rng: np.random.Generator, folder: Path) -> str:
    root = make_folder(folder)
    late = rng.random() < 0.3  # damaged while it is in use
    store = pipelines.open_store(root) if late else None
    touched, how = damage_folder(rng, root)
    if how == "folder" and not late:
        root.joinpath(*FILES[min(touched)]).rmdir()
        return "gone"  # one sample fewer, as if it had never been
    try:
        if store is None:
            store = pipelines.open_store(root)
    except ALLOWED as error:
        assert_says_where(error, root)
        assert touched
        return f"{how}: {error}"
    size = int(rng.choice([16, 40]))
    labels = [int(name == "b") for name, _ in FILES]
    try:
        refused = judge(store, pick_loaders(rng, "folder"), size, "folder", labels, Damage(touched))
    except ALLOWED as error:  # by the plan
        assert_says_where(error, root)
        return f"{how}: {error}"
    return f"{how} {size} late={late}: touched {touched}, refused {refused or '-'}"


def fuzz_convert(rng: np.random.Generator, folder: Path) -> str:
    root = make_folder(folder)
    dst = folder / "out.beton"
    touched, how = damage_folder(rng, root)
    skip = bool(rng.random() < 0.5)
    encoding = ENCODINGS[int(rng.integers(4))]
    try:
        done = convert_images(root, dst, encoding, skip_bad=skip, threads=1)
    except ALLOWED as error:
        assert_says_where(error, root)
        named = {i for i, parts in enumerate(FILES) if str(root.joinpath(*parts)) in str(error)}
        assert named == touched
        assert not isinstance(error, convert.BadImages) or not skip
        assert not list(folder.glob("out*")), "something was left behind"
        return f"{how}: {error}"
    assert convert.check(dst, threads=1) == []
    kept = [i for i, parts in enumerate(FILES) if os.path.join(*parts) not in done["skipped"]]
    if how == "folder":  # which is no image file
        kept = [i for i in kept if i not in touched]
    assert set(range(len(FILES))) - set(kept) <= touched
    judge_converted(dst, kept, touched, done["count"], pick_loaders(rng, "mixed")[0])
    return f"{how}: kept {len(kept)}, damaged {touched or '-'}"


def judge_converted(dst: Path, kept: list[int], touched: set[int], count: int, loader: str) -> None:
    """Each image of the new file is that of its own source, or a damaged one and no other's."""
    store = pipelines.open_store(dst)
    assert len(kept) == len(store) == count
    expected = twins("folder", loader, CONVERTED_SIZE)
    for k, label, image, error in deliver(loader, store, CONVERTED_SIZE):
        i = kept[k]
        assert image is not None, error
        assert label == int(FILES[i][0] == "b")
        far = [np.abs(image.astype(int) - other).mean() for other in expected]
        if i in touched:
            assert min(far[:i] + far[i + 1 :]) > SAME_ROW, far
        else:
            assert int(np.argmin(far)) == i and far[i] < SAME_IMAGE, far
    store.close()


def fuzz_tree(rng: np.random.Generator, folder: Path) -> str:
    """Folders with what lies about in folders: the listing is its slow twin's."""
    random_tree(rng, folder / "tree")
    listing = list_images(folder / "tree")
    assert [path for path, _ in listing.files] == listed_slowly(folder / "tree")
    return f"{len(listing.files)} images, {listing.ignored}"
