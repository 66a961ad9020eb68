"""Published sets in their published layout, each against the numbers that plain loops give."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fap.class_maps import cifar100, imagenet, imagenet_a, imagenet_r, sixteen_categories
from fap.cli.convert import main as convert
from fap.cli.export import main as export
from fap.evaluate.load import Trained, load_model
from fap.evaluate.published import PUBLISHED, ClassFolders, ObjectNet
from tests.evaluate.imagenet_world import (
    MODEL,
    best,
    cropped,
    framed,
    load,
    logits,
    pictures,
    pixels,
    saved,
    write_model,
)
from tests.evaluate.objectnet_files import MEANT, write_mappings
from tests.evaluate.world import counted, refused, run, write_checkpoint, write_folder

Capture = pytest.CaptureFixture[str]
N = 12  # images of a miniature
SIDES = (44, 38)
CATEGORIES = list(sixteen_categories())
WNID_OF_NUMBER = {str(number): wnid for number, wnid in enumerate(imagenet())}


@dataclass(frozen=True)
class World:
    """Everything evaluated by one command, and what comes out by plain loops."""

    at: Path
    found: dict[str, Any]
    text: str
    expected: dict[str, dict[str, float]]


def place(
    folder: Path,
    trained: Trained,
    suffix: str,
    choose: Callable[[int, dict[str, float]], str],  # a class folder, by number and logits
    seed: int,
    change: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> list[tuple[str, dict[str, float]]]:
    """Fill a miniature; (class folder, logits by class name) of each image.

    The images are chosen a folder by their logits before a file exists; a JPEG's are others.
    """
    found = []
    images = pictures(N, SIDES, seed)
    for number, (image, before) in enumerate(
        zip(images, logits(trained, [cropped(image) for image in images]), strict=True)
    ):
        name = choose(number, before)
        shown = saved(change(image), folder / name / f"{number}{suffix}")
        if change is framed:
            shown = shown.crop((2, 2, shown.width - 2, shown.height - 2))
        found.append((name, logits(trained, [cropped(shown)])[0]))
    return found


def accuracies(rows: list[tuple[set[str], dict[str, float]]]) -> dict[str, float]:
    """Of (names that are right, logits by name): top-1 and top-5."""
    places = []
    for right, by_name in rows:
        order = sorted(by_name, key=lambda name: -by_name[name])
        places.append(min(order.index(name) for name in right))
    return {f"top{k}": sum(place < k for place in places) / len(places) for k in (1, 5)}


def every_other(
    names: tuple[str, ...] | list[str], meaning: Callable[[str], str]
) -> Callable[[int, dict[str, float]], str]:
    """The likeliest class for every other image, any class for the rest."""

    def choose(number: int, by_name: dict[str, float]) -> str:
        if number % 2:
            return names[(37 * number) % len(names)]
        return max(names, key=lambda name: by_name[meaning(name)])

    return choose


def write_sets(at: Path, trained: Trained) -> dict[str, dict[str, float]]:
    """All miniatures, and their numbers by hand."""
    expected: dict[str, dict[str, float]] = {}

    for key, wnids, suffix in (
        ("imagenet_a", imagenet_a(), ".jpg"),
        ("imagenet_r", imagenet_r(), ".jpg"),
        ("imagenet_sketch", imagenet(), ".JPEG"),
        ("stylized", imagenet(), ".JPEG"),
    ):
        same = every_other(wnids, lambda name: name)
        rows = place(at / key, trained, suffix, same, seed=len(expected))
        plain = [({name}, by_name) for name, by_name in rows]
        masked = [({name}, {w: by_name[w] for w in wnids}) for name, by_name in rows]
        expected[key] = accuracies(masked)  # the mask of all 1,000 is none
        if key == "imagenet_a":
            expected["imagenet_a_1000way"] = accuracies(plain)
    (at / "imagenet_a" / "README.txt").write_text("hello")

    by_number = every_other([str(number) for number in range(1000)], WNID_OF_NUMBER.__getitem__)
    rows = place(at / "imagenet_v2", trained, ".jpeg", by_number, seed=20)
    expected["imagenet_v2"] = accuracies([({WNID_OF_NUMBER[k]}, by) for k, by in rows])

    def object_of(number: int, by_name: dict[str, float]) -> str:
        if number % 3 == 0:
            return max(MEANT, key=lambda name: max(by_name[wnid] for wnid in MEANT[name]))
        return ["alarm_clock", "chair"][number % 2]  # of several classes each

    write_mappings(at / "objectnet" / "mappings")
    objects = at / "objectnet" / "images"
    rows = place(objects, trained, ".png", object_of, seed=30, change=framed)
    expected["objectnet"] = accuracies([(set(MEANT[name]), by_name) for name, by_name in rows])
    expected["objectnet_113way"] = accuracies(
        [
            ({name}, {n: max(by_name[wnid] for wnid in wnids) for n, wnids in MEANT.items()})
            for name, by_name in rows
        ]
    )
    for name in ("air_freshener", "wrench", "wrench"):
        saved(framed(pictures(1, SIDES, 3)[0]), objects / name / "1.png")

    expected["cue_conflict"] = write_cue_conflict(at / "cue_conflict", trained)
    for name, severity in (("sparkles", "1"), ("inverse_sparkles", "4"), ("sparkles", "4")):
        rows = []
        for number, image in enumerate(pictures(4, (32, 32), seed=len(rows) + len(expected))):
            (before,) = logits(trained, [image])
            wnid = best(before) if number < 2 else imagenet()[number]
            file = at / "imagenet_c_bar" / name / severity / wnid / f"{number}.JPEG"
            rows.append(({wnid}, logits(trained, [saved(image, file)])[0]))
        expected[f"imagenet_c_bar/{name}/{severity}"] = accuracies(rows)
    (at / "imagenet_c_bar" / "sparkels" / "1").mkdir(parents=True)
    (at / "imagenet_c_bar" / "sparkles" / "9.00").mkdir()  # no severity

    def odd(number: int, by_name: dict[str, float]) -> str:
        return best(by_name) if number % 3 else imagenet()[number]

    rows = place(at / "mine", trained, ".jpg", odd, seed=60)
    expected["folder/mine"] = accuracies([({name}, by_name) for name, by_name in rows])
    return expected


def write_cue_conflict(folder: Path, trained: Trained) -> dict[str, float]:
    """Shown whole: no resize, no crop. Decisions by the authors' rule, one by one."""
    decisions = []
    images = pictures(N, (32, 32), seed=40)
    for by_name in logits(trained, images):
        weights = {name: np.exp(value) for name, value in by_name.items()}
        means = [
            np.mean([weights[wnid] for wnid in wnids]) for wnids in sixteen_categories().values()
        ]
        decisions.append(int(np.argmax(means)))
    n_shape = n_texture = 0
    for number, (image, decision) in enumerate(zip(images, decisions, strict=True)):
        others = [category for category in range(16) if category != decision]
        shape, texture = others[number], others[(number + 5) % 15]
        if number % 4 == 0:
            shape = decision
            n_shape += 1
        if number % 4 == 1:
            texture = decision
            n_texture += 1
        first, second = CATEGORIES[shape], CATEGORIES[texture]
        saved(image, folder / first / f"{first}{number}-{second}2.png")
    saved(images[0], folder / "cat" / "cat1-cat3.png")
    saved(images[0], folder / "cat" / "whiskers.png")
    bias = n_shape / (n_shape + n_texture)
    return {"shape_bias": bias, "top1": n_shape / N, "texture": n_texture / N}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    at = tmp_path_factory.mktemp("sets")
    write_model(at / MODEL)
    write_folder(at / "val", imagenet()[:2], 1, (36, 36))
    expected = write_sets(at, load(at))
    options = [
        word
        for one in PUBLISHED
        if (at / one.key).is_dir()
        for word in (one.option, str(at / one.key))
    ]
    found, text = run(at, *options, "--folder", f"mine={at / 'mine'}", model=MODEL)
    return World(at, found, text, expected)


SINGLE = [
    "imagenet_a", "imagenet_a_1000way", "imagenet_r", "imagenet_sketch", "imagenet_v2",
    "objectnet", "objectnet_113way", "stylized", "folder/mine",
]  # fmt: skip


@pytest.mark.parametrize("key", SINGLE)
def test_a_set_has_the_numbers_of_a_plain_loop(world: World, key: str) -> None:
    found = world.found["results"][key]
    assert found["count"] == N
    assert 0 < world.expected[key]["top1"] < 1, "nothing would be shown"
    for metric, value in world.expected[key].items():
        assert found[metric] == pytest.approx(value), metric


def test_the_two_ways_of_counting_differ(world: World) -> None:
    """Else one could be taken for the other, and no test would notice."""
    results = world.found["results"]
    for first, second in (("imagenet_a", "imagenet_a_1000way"), ("objectnet", "objectnet_113way")):
        assert results[first]["top1"] != results[second]["top1"]
        assert results[first]["loss"] != results[second]["loss"]


def test_shape_bias(world: World) -> None:
    found = world.found["results"]["cue_conflict"]
    assert found == world.expected["cue_conflict"] | {"count": N}
    assert found["shape_bias"] == 0.5


def test_imagenet_c_bar(world: World) -> None:
    keys = [key for key in world.found["results"] if key.startswith("imagenet_c_bar")]
    assert keys == [
        "imagenet_c_bar/inverse_sparkles/4", "imagenet_c_bar/sparkles/1",
        "imagenet_c_bar/sparkles/4",
    ]  # fmt: skip
    for key in keys:
        assert world.found["results"][key]["count"] == 4
        assert world.found["results"][key]["top1"] == world.expected[key]["top1"] > 0
    assert "| error, all 3 sets (ImageNet-C-bar) |" in world.text
    assert "corruptions (ImageNet-C-bar)" not in world.text


def test_how_labels_were_matched_is_told(world: World) -> None:
    labels = world.found["labels"]
    n_a = len(list((world.at / "imagenet_a").glob("n*")))
    names = f"by name ({n_a} of ImageNet-A's 200 classes"
    assert labels["imagenet_a"] == f"{names}; only the logits of these 200 count)"
    assert labels["imagenet_a_1000way"] == f"{names}; all 1000 logits count)"
    assert labels["imagenet_v2"].startswith("by number (")
    assert labels["imagenet_v2"].endswith("ImageNet-V2's 1000 classes; all 1000 logits count)")
    which = "8 classes, which are 11 of the model's"
    assert f"{which}; all 1000 logits count)" in labels["objectnet"]
    assert f"{which}; only the logits of these 11 count)" in labels["objectnet_113way"]
    assert "of cue conflict's 16 classes" in labels["cue_conflict"]
    assert labels["folder/mine"].endswith("of 1000 classes)")


def test_what_belongs_to_no_set_is_told(world: World) -> None:
    unused = "\n".join(world.found["unused"])
    assert "ignored: 1 files beside the class folders" in unused
    objects = world.at / "objectnet" / "images"
    foreign = f"2 images of 2 classes of {objects} that are not in ImageNet"
    assert f"{foreign}: air_freshener, wrench" in unused
    assert f"1 images of {world.at / 'cue_conflict'} whose shape and texture are the same" in unused
    assert "1 files without the names of two cues: " in unused
    assert "cat/whiskers.png" in unused
    assert f"{world.at}/imagenet_c_bar/sparkels (did you mean sparkles?)" in unused
    assert f"{world.at}/imagenet_c_bar/sparkles/9.00" in unused
    assert "not used: " in world.text


def test_titles_in_the_report(world: World) -> None:
    for title, key in (
        ("ImageNet-A top-1", "imagenet_a"),
        ("ImageNet-A, 1000-way, top-1", "imagenet_a_1000way"),
        ("ImageNet-Sketch top-1", "imagenet_sketch"),
        ("ImageNet-V2 top-1", "imagenet_v2"),
        ("ObjectNet, 1000-way, top-1", "objectnet"),
        ("ObjectNet, 113-way, top-1", "objectnet_113way"),
        ("folder mine top-1", "folder/mine"),
    ):
        assert f"| {title} | {100 * world.expected[key]['top1']:.2f} |" in world.text
    assert "| cue conflict: shape bias | 50.00 |" in world.text


def test_results_are_found_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    again, _ = run(
        world.at,
        *("--imagenet-a", str(world.at / "imagenet_a")),
        *("--cue-conflict", str(world.at / "cue_conflict")),
        *("--objectnet", str(world.at / "objectnet" / "images")),
        model=MODEL,
    )
    assert not calls
    for key in ("imagenet_a", "imagenet_a_1000way", "cue_conflict", "objectnet"):
        assert again["results"][key] == world.found["results"][key]


def test_another_class_map_gives_another_result(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map that is mended later must not find what the old one gave."""
    shutil.copytree(world.at / "objectnet", tmp_path / "objectnet")
    map_file = tmp_path / "objectnet" / "mappings" / "objectnet_to_imagenet_1k.json"
    changed = json.loads(map_file.read_text())
    changed["Chair"], changed["Alarm clock"] = changed["Alarm clock"], changed["Chair"]
    map_file.write_text(json.dumps(changed))
    calls = counted(monkeypatch)
    found, _ = run(world.at, "--objectnet", str(tmp_path / "objectnet"), model=MODEL)
    assert len(calls) == 2
    for key in ("objectnet", "objectnet_113way"):
        assert found["labels"][key] == world.found["labels"][key]
        assert found["results"][key]["loss"] != world.found["results"][key]["loss"]


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("key", "says"), [
    ("imagenet_a", "1 of its 1 classes are none of ImageNet-A's 200, the first being 'images'"),
    ("imagenet_r", "1 of its 1 classes are none of ImageNet-R's 200, the first being 'images'"),
    ("imagenet_sketch", "1 of the 1 classes are none of the model's 1000 classes"),
    ("imagenet_v2", "1 of its 1 classes are none of ImageNet-V2's 1000, the first being 'images'"
                    "; those are '0', '1', '2' ..."),
    ("objectnet", "mappings: holds no folder_to_objectnet_label.json, objectnet_to_imagenet"),
    ("cue_conflict", "holds no image with a name such as cat/cat7-elephant1.png"),
    ("imagenet_c_bar", "holds none of caustic_refraction, inverse_sparkles"),
    ("cifar100_c", "holds none of gaussian_noise.npy"),
])  # fmt: skip
def test_a_wrong_folder_is_named(
    world: World, tmp_path: Path, capsys: Capture, key: str, says: str
) -> None:
    """The folder above the right one, most often."""
    write_folder(tmp_path / "above", ["images"], 1, (32, 32))
    option = f"--{key.replace('_', '-')}"
    message = refused(capsys, world.at, option, str(tmp_path / "above"), model=MODEL)
    assert says in message
    assert str(tmp_path / "above") in message
    message = refused(capsys, world.at, option, str(tmp_path / "nowhere"), model=MODEL)
    assert str(tmp_path / "nowhere") in message
    assert "no such" in message


def test_folders_that_are_none_of_objectnets(world: World, tmp_path: Path, capsys: Capture) -> None:
    write_mappings(tmp_path / "mappings")
    write_folder(tmp_path / "images", ["cat", "vase"], 1, (32, 32))
    message = refused(capsys, world.at, "--objectnet", str(tmp_path), model=MODEL)
    assert f"{tmp_path / 'images'}: cat: none of the 10 folders of folder_to_objectnet" in message


def test_imagenet_v2_is_not_sorted_as_text(world: World, tmp_path: Path) -> None:
    """Folders 0, 1, 10, 100, 2: the third is class 10, not class 2."""
    images = pictures(5, SIDES, seed=70)
    trained = load(world.at)
    names = ["0", "1", "10", "100", "2"]
    rows = []
    for name, image in zip(names, images, strict=True):
        shown = saved(image, tmp_path / "v2" / name / "1.jpeg")
        rows.append((name, logits(trained, [cropped(shown)])[0]))
    found, _ = run(world.at, "--imagenet-v2", str(tmp_path / "v2"), model=MODEL, out="v2")
    losses = []
    for name, by_name in rows:
        values = np.array(list(by_name.values()))
        losses.append(np.log(np.exp(values).sum()) - by_name[imagenet()[int(name)]])
    assert found["results"]["imagenet_v2"]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_red_border_is_cut_off(world: World, tmp_path: Path, capsys: Capture) -> None:
    """Two folders whose images differ in the border alone give the same numbers."""
    results = []
    write_mappings(tmp_path / "mappings")
    for colour in ("red", "blue"):
        for number, image in enumerate(pictures(4, SIDES, seed=80)):
            whole = Image.new("RGB", (SIDES[0] + 4, SIDES[1] + 4), colour)
            whole.paste(image, (2, 2))
            saved(whole, tmp_path / colour / "banana" / f"{number}.png")
        words = ["--objectnet", str(tmp_path / colour)]
        found, _ = run(world.at, *words, model=MODEL, out=f"border-{colour}")
        results.append(found["results"]["objectnet"])
    assert results[0] == results[1]
    saved(Image.new("RGB", (4, 30), "red"), tmp_path / "red" / "banana" / "small.png")
    message = refused(capsys, world.at, "--objectnet", str(tmp_path / "red"), model=MODEL)
    assert "small.png" in message
    assert "30 x 4 pixels are nothing but its border of 2" in message


def test_folders_of_cue_conflict_agree_with_the_names(
    world: World, tmp_path: Path, capsys: Capture
) -> None:
    saved(pictures(1, (32, 32), 1)[0], tmp_path / "c" / "dog" / "cat1-elephant1.png")
    message = refused(capsys, world.at, "--cue-conflict", str(tmp_path / "c"), model=MODEL)
    assert "its name says cat, its folder dog" in message


def test_a_model_of_other_classes(world: World, tmp_path: Path, capsys: Capture) -> None:
    """What needs ImageNet's classes says which are lacking."""
    write_checkpoint(world.at / "few.safetensors", imagenet()[:6])
    for key in ("imagenet_v2", "objectnet", "cue_conflict"):
        option = f"--{key.replace('_', '-')}"
        message = refused(
            capsys, world.at, option, str(world.at / key), model="few.safetensors", out="few"
        )
        assert "classes are ImageNet's, and" in message
        assert "none of the model's 6 classes" in message


def test_a_folder_of_ones_own(world: World, tmp_path: Path, capsys: Capture) -> None:
    folder = str(world.at / "mine")
    words = ["--folder", f"a={folder}", "--folder", f"b.2={world.at / 'imagenet_r'}"]
    found, text = run(world.at, *words, model=MODEL, out="folders")
    assert [*found["results"]] == ["clean", "folder/a", "folder/b.2"]
    assert found["results"]["folder/a"] == world.found["results"]["folder/mine"]
    assert "| folder b.2 top-1 |" in text
    for word, says in (
        ("mine", "write NAME=DIR"),
        ("=x", "write NAME=DIR"),
        ("a/b=x", "write NAME=DIR"),
        ("a=", "write NAME=DIR"),
    ):
        assert says in refused(capsys, world.at, "--folder", word, model=MODEL)
    twice = ["--folder", f"a={folder}", "--folder", f"a={folder}"]
    assert "a is there twice" in refused(capsys, world.at, *twice, model=MODEL)


@pytest.mark.parametrize("form", [".beton", ".tar"])
def test_sets_in_one_file(world: World, tmp_path: Path, form: str) -> None:
    """Folders are not the only form: the same numbers, where the names of the files are kept."""
    objects = tmp_path / f"objectnet{form}"
    words = ["--objectnet", str(objects)]
    shutil.copytree(world.at / "objectnet" / "mappings", tmp_path / "mappings")
    if form == ".tar":
        with tarfile.open(objects, "w") as archive:
            archive.add(world.at / "objectnet" / "images", "images")
    else:
        assert convert([str(world.at / "objectnet" / "images"), str(objects), "--raw"]) == 0
    keys = ["imagenet_v2"]
    if form == ".tar":
        keys.append("cue_conflict")  # whose cues are the files' names
    for key in keys:
        file = tmp_path / f"{key}{form}"
        if form == ".tar":
            with tarfile.open(file, "w") as archive:
                archive.add(world.at / key, key)
        else:
            assert convert([str(world.at / key), str(file)]) == 0
        words += [f"--{key.replace('_', '-')}", str(file)]
    found, _ = run(world.at, *words, model=MODEL, out=f"form{form}")
    for key in (*keys, "objectnet", "objectnet_113way"):
        assert found["results"][key] == pytest.approx(world.found["results"][key], rel=1e-5)


# ---------------------------------------------------------------------- arrays


def test_cifar100_c(tmp_path: Path, capsys: Capture) -> None:
    """Labels are fine classes in the order of the alphabet; the model's are backwards."""
    order = [*reversed(cifar100())]
    write_checkpoint(tmp_path / "hundred.safetensors", order, 100)
    write_folder(tmp_path / "val", order[:2], 1, (32, 32))
    (tmp_path / "c").mkdir()
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "c" / "fog.npy", images)
    labels = np.array([0, 99, 17, 30, 5, 62, 81, 44])
    np.save(tmp_path / "c" / "labels.npy", np.tile(labels, 5))
    words = ["--cifar100-c", str(tmp_path / "c")]
    found, text = run(tmp_path, *words, model="hundred.safetensors")
    model = load_model(tmp_path / "hundred.safetensors").model
    for severity in (1, 5):
        losses = []
        for image, label in zip(images[8 * (severity - 1) :][:8], labels, strict=True):
            with torch.inference_mode():
                outputs = model(pixels(Image.fromarray(image))[None])[0].double().tolist()
            by_name = dict(zip(order, outputs, strict=True))
            values = np.array(list(by_name.values()))
            losses.append(np.log(np.exp(values).sum()) - by_name[cifar100()[label]])
        result = found["results"][f"cifar100_c/fog/{severity}"]
        assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert "(CIFAR-100-C)" in text
    np.save(tmp_path / "c" / "labels.npy", np.tile(labels % 10, 5))
    message = refused(capsys, tmp_path, *words, model="hundred.safetensors")
    assert "labels 0 to 9: those of CIFAR-10-C" in message
    np.save(tmp_path / "c" / "labels.npy", np.tile(labels + 1, 5))
    message = refused(capsys, tmp_path, *words, model="hundred.safetensors")
    assert "labels 1 to 100: CIFAR-100 has 0 to 99" in message


# ---------------------------------------------------------------------- weights without names


def test_plain_weights_of_1000_outputs_say_whose_they_are(
    world: World, tmp_path: Path, capsys: Capture
) -> None:
    """A file of weights knows no names: without --classes imagenet there is no number."""
    write_model(tmp_path / "sorted.safetensors", imagenet())
    assert export([str(tmp_path / "sorted.safetensors"), str(tmp_path / "known.safetensors")]) == 0
    save_file(load_file(tmp_path / "known.safetensors"), tmp_path / "bare.safetensors")
    shutil.copytree(world.at / "val", tmp_path / "val")
    sets = [
        word
        for key in ("imagenet_v2", "objectnet", "cue_conflict", "imagenet_a")
        for word in (f"--{key.replace('_', '-')}", str(world.at / key))
    ]
    words = ["--plain", "model.name=cifar_resnet8", "data.size=32", "data.resize=36"]
    words += ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
    bare = {"model": "bare.safetensors"}
    message = refused(capsys, tmp_path, *words, **bare)
    assert "--classes imagenet: ImageNet's, in their usual order" in message
    # Other weights of the same shape need not be ImageNet's: position is no proof of it.
    message = refused(capsys, tmp_path, *words, "--imagenet-v2", sets[1], **bare)
    assert "--classes imagenet" in message
    found, _ = run(tmp_path, *sets, *words, "--classes", "imagenet", **bare)
    known, _ = run(tmp_path, *sets, model="sorted.safetensors", out="known")
    assert found["results"] == known["results"]
    assert found["labels"] == known["labels"]


# ---------------------------------------------------------------------- the table


def test_the_page_has_the_table() -> None:
    """A row for each set, word for word what the options' help says."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text()
    for one in PUBLISHED:
        cells = (one.title, f"`{one.option} DIR`", one.layout, one.logits, one.images)
        assert f"| {' | '.join(cells)} | {one.measures} | {one.paper} |" in page


def test_no_two_sets_share_a_key() -> None:
    keys = [one.key for one in PUBLISHED]
    ways = [
        way.key
        for one in PUBLISHED
        if isinstance(one, ClassFolders | ObjectNet)
        for way in one.ways
    ]
    assert len(set(keys)) == len(keys)
    assert len(set(ways)) == len(ways)
    assert set(ways) - set(keys) == {"imagenet_a_1000way", "objectnet_113way"}
