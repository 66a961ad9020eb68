import io
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from pipelines import DamagedData, open_store
from pipelines.sources.folder import LINKS, SUFFIXES, FolderStore, list_images


@pytest.fixture(autouse=True)
def _cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(
    path: Path, seed: int, side: tuple[int, int] = (40, 30), mode: str = "RGB", **save
) -> np.ndarray:
    """A smooth picture, so that JPEG hardly changes it; (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(small).resize(side, Image.Resampling.BICUBIC)
    image.convert(mode).save(path, save.pop("format", "JPEG"), **save)
    return np.asarray(image)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "images"
    for i, name in enumerate(["b/1.JPEG", "a/2.jpeg", "a/10.jpg", "a/deep/0.JPEG", "c/x.JPEG"]):
        write(root / name, i, (40 + i, 30 + 2 * i))
    (root / "a" / "notes.txt").write_text("no image")
    return root


def decode(data: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


def test_order_and_labels_are_torchvisions_and_bytes_are_the_files(folder):
    store, twin = open_store(folder), ImageFolder(str(folder))
    assert isinstance(store, FolderStore)
    assert list(store.classes) == twin.classes and len(store) == len(twin)
    for i, (path, label) in enumerate(twin.samples):
        assert store.file(i) == Path(path) and store.labels[i] == label
        assert store.read(i).tobytes() == Path(path).read_bytes() and store.sizes[
            i
        ] == os.path.getsize(path)
        assert (store.widths[i], store.heights[i]) == Image.open(path).size
    assert (
        store.heights.dtype == np.int32 and store.labels.dtype == np.int64 and not store.modes.any()
    )


def test_index_is_used_and_notices_changes(folder, monkeypatch):
    FolderStore(folder)
    scanned: list[str] = []
    sides = FolderStore._sides
    monkeypatch.setattr(
        FolderStore,
        "_sides",
        lambda s, f: scanned.append(os.path.relpath(f, folder)) or sides(s, f),
    )
    again = FolderStore(folder)
    assert not scanned and again.heights[again.labels == 2].tolist() == [38]
    write(folder / "c/x.JPEG", 9, (50, 60))  # changed
    write(folder / "b/0.JPEG", 9, (50, 61))  # new
    (folder / "a/10.jpg").unlink()
    changed = FolderStore(folder)
    assert sorted(scanned) == ["b/0.JPEG", "c/x.JPEG"]
    assert len(changed) == 5 and changed.heights[changed.labels > 0].tolist() == [61, 30, 60]
    (folder / ".fap-index.npz").write_bytes(b"PK damaged")
    assert FolderStore(folder).heights.tolist() == changed.heights.tolist() and len(scanned) == 7


def test_read_only_folder_is_indexed_in_the_users_cache(folder, tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if Path(target).is_relative_to(folder):
            raise PermissionError(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    first = FolderStore(folder)
    assert len(list((tmp_path / "cache" / "fap").iterdir())) == 1
    monkeypatch.setattr(FolderStore, "_sides", lambda *_: pytest.fail("scanned again"))
    assert FolderStore(folder).heights.tolist() == first.heights.tolist()


@pytest.mark.parametrize(
    "kind", ["png named JPEG", "CMYK", "grey", "EXIF-rotated", "EXIF, upright"]
)
def test_what_imagenet_really_holds(folder, kind):
    path = folder / "c/x.JPEG"
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "EXIF-rotated" else 1  # to be turned by 90 degrees
    save = {
        "png named JPEG": {"format": "PNG"},
        "CMYK": {"mode": "CMYK", "quality": 95},
        "grey": {"mode": "L", "quality": 95},
    }.get(kind, {"exif": exif, "quality": 95})
    picture = write(path, 3, (44, 36), **save).astype(int)
    store = FolderStore(folder)
    data = store.read(4)
    header = Image.open(io.BytesIO(data.tobytes()))
    if kind == "grey":
        picture = np.asarray(
            Image.fromarray(picture.astype(np.uint8)).convert("L").convert("RGB")
        ).astype(int)
    if kind == "EXIF-rotated":
        picture = np.rot90(picture, -1)
    height, width, _ = picture.shape
    assert (header.format, header.mode, header.size) == ("JPEG", "RGB", (width, height))
    assert (store.heights[4], store.widths[4]) == (height, width)
    assert (data.tobytes() == path.read_bytes()) == (kind == "EXIF, upright")
    assert np.abs(decode(data) - picture).mean() < 4


def test_damage_and_mistakes_name_the_file(folder, tmp_path):
    store = FolderStore(folder)
    write(folder / "c/x.JPEG", 9, (50, 60))
    with pytest.raises(
        DamagedData, match=r"c/x\.JPEG: sample 4: \(60, 50\) pixels, \(38, 44\) when"
    ):
        store.read(4)
    (folder / "c/x.JPEG").write_bytes(b"\0" * 900)
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4"):
        store.read(4)
    with pytest.raises(ValueError, match=r"1 files cannot be used: .*\n  c/x\.JPEG: not an image"):
        FolderStore(folder)
    (folder / "c/x.JPEG").unlink()
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4"):
        store.read(4)
    with pytest.raises(ValueError, match="no images under c"):
        FolderStore(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images under CLASS"):
        FolderStore(tmp_path / "empty")
    write(tmp_path / "empty" / "0.JPEG", 0)
    with pytest.raises(
        ValueError, match=r"no images under CLASS.*ignored: 1 files beside the class folders"
    ):
        FolderStore(tmp_path / "empty")
    shutil.rmtree(folder / "c")
    assert len(FolderStore(folder)) == 4


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


TRAPS = [
    "@eaDir",
    ".ipynb_checkpoints",
    "__MACOSX",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    ".git",
]


def is_trap(name: str) -> bool:
    return name.startswith(".") or name.lower() in {trap.lower() for trap in TRAPS}


def random_tree(rng: np.random.Generator, root: Path) -> None:
    """Three classes with folders, traps, all kinds of names, and links to folders up, down and
    beside.
    """
    files = [
        "1.JPEG",
        "2.jpg",
        "a.PNG",
        "b.Jpeg",
        "c.webp",
        "d.tif",
        ".hidden.jpg",
        "._1.JPEG",
        "Thumbs.db",
        "x.txt",
    ]
    files += ["y.jfif", "z.gif", "no suffix", "jpg", "e.jpg.bak", "\u00e9.jpeg", "a b.bmp"]
    folders = ["deep", "a", "a b", "a-b", "a.b", "z.JPEG", *TRAPS]
    every = [root]
    for name in ("c1", "c10", "c 2"):
        put(root / name / "0.JPEG")
        inside = [root / name]
        for _ in range(int(rng.integers(6))):
            folder = inside[rng.integers(len(inside))] / str(rng.choice(folders))
            folder.mkdir(exist_ok=True)
            inside.append(folder)
        for _ in range(int(rng.integers(12))):
            put(inside[rng.integers(len(inside))] / str(rng.choice(files)))
        every += inside
    for i in range(int(rng.integers(6))):
        link = every[rng.integers(1, len(every))] / f"link{i}"
        link.symlink_to(every[rng.integers(len(every))], target_is_directory=True)


def listed_slowly(root: Path) -> list[str]:
    """A twin: real folders first, then links, in the order of their paths, to what has not been
    listed yet.
    """
    found = []
    for name in sorted(os.listdir(root)):
        paths, seen = [], {root.resolve(), *root.resolve().parents}
        waiting = [str(root / name)]
        while waiting:
            top = waiting.pop(0)
            if Path(top).resolve() in seen:
                continue
            for folder, inner, files in os.walk(top):
                inner[:] = [name for name in inner if not is_trap(name)]
                waiting += [
                    os.path.join(folder, name)
                    for name in inner
                    if os.path.islink(os.path.join(folder, name))
                ]
                seen.add(Path(folder).resolve())
                images = [
                    name
                    for name in files
                    if name[0] != "." and Path(name).suffix.lower() in SUFFIXES
                ]
                paths += [(folder, name) for name in images]
            waiting.sort()
        found += [os.path.join(*pair) for pair in sorted(paths)]
    return found


def test_random_trees_with_traps_and_links(tmp_path):
    rng = np.random.default_rng()
    for i in range(30):
        root = tmp_path / f"{i}"
        random_tree(rng, root)
        listing = list_images(root)
        assert listing.classes == ("c 2", "c1", "c10")
        assert [path for path, _ in listing.files] == listed_slowly(root)
        for path, label in listing.files:
            assert path.startswith(f"{root}/{listing.classes[label]}/")


def test_the_order_of_trees_without_traps_is_torchvisions(tmp_path):
    assert SUFFIXES == IMG_EXTENSIONS
    rng = np.random.default_rng()
    for i in range(20):
        root = tmp_path / f"{i}"
        random_tree(rng, root)
        for folder, inner, files in os.walk(root, topdown=False):
            for name in [*inner, *files]:
                path = Path(folder, name)
                if path.is_symlink():
                    path.unlink()
                elif is_trap(name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert list_images(root).files == ImageFolder(str(root)).samples


def test_a_link_to_a_folder_above_multiplies_nothing(folder):
    before = list_images(folder).files
    for target in (".", "..", "../..", "../../..", "/"):
        (folder / "c" / f"to {target.replace('/', ' ')}").symlink_to(target)
    (folder / "up").symlink_to(".")
    (folder / "c" / "self").symlink_to("self")
    listing = list_images(folder)
    assert listing.files == before
    assert listing.ignored[LINKS] == 6
    beside = folder.parent / "more"
    write(beside / "y.JPEG", 1)
    (folder / "c" / "more").symlink_to(beside)
    (folder / "c" / "again").symlink_to(beside)  # the same folder
    assert [path for path, _ in list_images(folder).files][-2:] == [
        f"{folder}/c/x.JPEG",
        f"{folder}/c/again/y.JPEG",
    ]


def test_links_cannot_make_a_small_tree_a_huge_one(tmp_path):
    """Two links from each of 30 folders to the next: 2^30 paths."""
    for i in range(30):
        put(tmp_path / "src" / f"{i}" / "0.JPEG")
        for name in "ab":
            (tmp_path / "src" / f"{i}" / name).symlink_to(f"../{i + 1}" if i < 29 else "../0")
    assert len(list_images(tmp_path / "src").files) == 30 * 30


def test_what_is_passed_over_is_listed_by_suffix(folder):
    for name in (
        "a/1.avif",
        "b/2.AVIF",
        "b/3.jfif",
        "c/Thumbs.db",
        "c/._x.JPEG",
        "c/.DS_Store",
        "c/README",
        "top.jpg",
        ".x",
    ):
        put(folder / name)
    for name in (
        "a/@eaDir/x.jpg",
        "a/.ipynb_checkpoints/x.jpg",
        "@EADIR/x.jpg",
        "__MACOSX/a/._1.JPEG",
        "lost+found/x.jpg",
    ):
        put(folder / name)
    store = FolderStore(folder)
    assert store.notes[0].startswith("ignored: 3 hidden files, 2 .avif, 1 ")
    assert list_images(folder).ignored == {
        ".avif": 2, ".jfif": 1, ".db": 1, ".txt": 1, "hidden files": 3, "files without suffix": 1, "@EADIR folders": 1,
        "files beside the class folders": 1, "@eaDir folders": 1, "hidden folders": 1, "__MACOSX folders": 1,
        "lost+found folders": 1,
    }  # fmt: skip
    assert len(store) == 5


def test_a_note_is_one_short_line(folder):
    for i in range(1000):
        put(folder / "a" / f"file.{i:04d}\n")
    (note,) = list_images(folder).notes()
    assert len(note) < 400
    assert note.isprintable()
    assert note.startswith("ignored: 1 .0000\\n, 1 .0001\\n")
    assert note.endswith("991 of 991 other kinds")


def test_an_empty_class_says_what_lies_there_instead(folder):
    put(folder / "d" / "1.avif")
    (folder / "e").mkdir()
    with pytest.raises(
        ValueError,
        match=r"no images under d, e: 2 class folder.*\.webp; ignored: 1 \.avif, 1 \.txt",
    ):
        list_images(folder)


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="a/deep"):
        list_images(folder)


@pytest.mark.parametrize("kind", ["named pipe", "/dev/zero", "folder", "dangling"])
def test_images_are_files(folder, kind):
    store = FolderStore(folder)
    image = folder / "c/x.JPEG"
    image.unlink()
    if kind == "named pipe":
        os.mkfifo(image)
    elif kind == "folder":
        image.mkdir()
    else:
        image.symlink_to(kind)
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4: (is a|No such file)"):
        store.read(4)
    with pytest.raises(DamagedData, match=r"c/x\.JPEG: sample 4: (is a|No such file)"):
        store.identity()
    wanted = (
        "no images under c"
        if kind == "folder"
        else r"1 files cannot be used(.|\n)*c/x\.JPEG: (is a|No such file)"
    )
    with pytest.raises(ValueError, match=wanted):
        FolderStore(folder)


def test_a_huge_file_is_not_read(folder, monkeypatch):
    (folder / "c/x.JPEG").write_bytes(b"\xff\xd8")
    os.truncate(folder / "c/x.JPEG", 3 << 30)  # sparse
    with pytest.raises(ValueError, match=r"c/x\.JPEG: has more than 1,073,741,824 bytes"):
        FolderStore(folder)


def test_odd_file_names(folder):
    names = [b"caf\xe9.JPEG", b"new\nline.JPEG", b"tab\t'quote\".JPEG", b"n" * 250 + b".jpg"]
    for i, name in enumerate(names):
        source = write(folder / "a" / "tmp.JPEG", i)
        os.rename(folder / "a" / "tmp.JPEG", os.path.join(os.fsencode(folder), b"b", name))
    for _ in range(2):  # the second time from the index
        store = FolderStore(folder)
        assert len(store) == 9
        for i in range(9):
            assert store.read(i).tobytes() == store.file(i).read_bytes()
    assert source.size
    assert store.identity()["count"] == 9
    for i in range(9):
        store.file(i).write_bytes(b"damaged")
        with pytest.raises(DamagedData) as caught:
            store.read(i)
        assert str(caught.value).isprintable()
    for name in ("a", "c"):
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=r"b/caf\\udce9\.JPEG: not an image"):
        FolderStore(folder)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def poison(index: Path, **change) -> None:
    with np.load(index) as good:
        np.savez(index, **{**good, **change})


def test_an_index_cannot_make_sides_wrong_in_silence(folder):
    FolderStore(folder)
    index = folder / ".fap-index.npz"
    with np.load(index) as good:
        table = good["table"].copy()
    table[4, 2:] = 7, 9
    poison(index, table=table)
    store = FolderStore(folder)
    assert (store.heights[4], store.widths[4]) == (7, 9)
    with pytest.raises(
        DamagedData, match=r"c/x\.JPEG: sample 4: \(38, 44\) pixels, \(7, 9\) when .*fap-index"
    ):
        store.read(4)
    for sides in ((0, 9), (-1, 9), (9, 40000)):
        table[4, 2:] = sides
        poison(index, table=table)
        with pytest.raises(ValueError, match=r"c/x\.JPEG: .* pixels: sides must be 1 to 32767"):
            FolderStore(folder)


@pytest.mark.parametrize(
    "kind", ["named pipe", "/dev/zero", "folder", "old", "pickle", "floats", "compressed", "short"]
)
def test_an_index_that_is_none_is_made_again(folder, tmp_path, kind):
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # which a float holds
    wanted = FolderStore(folder)
    index = folder / ".fap-index.npz"
    with np.load(index) as good:
        tables = dict(good)
    index.unlink()
    wrong = tables["table"] * [1, 1, 0, 0] + [0, 0, 5, 5]
    match kind:
        case "named pipe":
            os.mkfifo(index)
        case "folder":
            index.mkdir()
        case "/dev/zero":
            index.symlink_to(kind)
        case "old":  # sides as stored, before there was a version
            np.savez(index, names=tables["names"], table=wrong)
        case "pickle":
            np.savez(index, **tables | {"table": np.array([Trap(tmp_path / "trap")] * 5)})
        case "floats":
            np.savez(index, **tables | {"table": wrong.astype(float)})
        case "compressed":
            np.savez_compressed(index, **tables | {"table": wrong})
        case "short":
            np.savez(index, **tables | {"table": wrong[:3]})
    for _ in range(2):
        assert FolderStore(folder).heights.tolist() == wanted.heights.tolist()
    assert not (tmp_path / "trap").exists()


def test_no_home_and_a_read_only_folder(folder, monkeypatch):
    """A container's uid without an account: the index has no place, which costs a scan."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(
        Path,
        "home",
        lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")),
    )
    monkeypatch.setattr(
        np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    assert len(FolderStore(folder)) == 5
    assert not (folder / ".fap-index.npz").exists()


def test_no_semaphores_are_needed(folder, monkeypatch):
    """Without /dev/shm there are none."""
    import _multiprocessing

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    with pytest.raises(OSError, match="not implemented"):
        multiprocessing.get_context().Lock()
    assert len(FolderStore(folder)) == 5
