"""Labels, names and folders of each benchmark, through the command."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines
from fap.evaluate.exact import evaluate
from fap.evaluate.load import load_model
from fap.tasks.classification import Accuracy
from pipelines.convert import convert_arrays
from pipelines.sources import cifar10
from tests.evaluate.world import WNIDS, fresh, refused, run, write_checkpoint, write_folder

HALF = (0.5, 0.5, 0.5)


def test_cifar10_c_belongs_to_cifar10s_classes(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array = ["--cifar10-c", str(world / "cifar")]
    message = refused(capsys, world, *array, out="cifar1")
    assert "10 classes are none of the model's 6 classes" in message
    order = [*reversed(cifar10.CLASSES)]
    write_checkpoint(world / "ten.safetensors", order, 10)
    write_folder(world / "ten", order, 1, (40, 36), seed=5)
    found, text = run(world, *array, model="ten.safetensors", data="ten", out="cifar2")
    counts = {key: result["count"] for key, result in found["results"].items()}
    assert counts == {"clean": 10, **{f"cifar10_c/contrast/{s}": 7 for s in range(1, 6)}}
    assert found["labels"]["cifar10_c/contrast/2"] == "by name (10 of 10 classes)"
    images = torch.from_numpy(np.load(world / "cifar" / "contrast.npy")[7:14]).permute(0, 3, 1, 2)
    trained = load_model(world / "ten.safetensors")
    with torch.inference_mode():
        predicted = trained.model((images.float() / 255 - 0.5) / 0.5).argmax(1).tolist()
    right = sum(
        order[guess] == cifar10.CLASSES[label]
        for guess, label in zip(predicted, range(7), strict=True)
    )
    assert found["results"]["cifar10_c/contrast/2"]["top1"] == pytest.approx(right / 7)
    assert "AlexNet's errors are those of ImageNet-C" in text
    write_checkpoint(world / "nameless.safetensors", None, 10)
    message = refused(capsys, world, *array, model="nameless.safetensors", data="ten", out="cifar3")
    assert "the checkpoint has no class names" in message


def test_a_folder_of_fewer_classes_is_evaluated_with_the_right_labels(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of twelve classes, and numbers that are sorted as text.

    By position the result would be another.
    """
    at = fresh(world, tmp_path)
    names = [str(i) for i in range(12)]  # sorted as text 0, 1, 10, 11, 2: folders in this order
    write_checkpoint(at / "numbers.safetensors", names, 12)
    write_folder(at / "few", ["2", "10"], 6, (36, 36))
    found, text = run(at, model="numbers.safetensors", data="few")
    assert found["labels"] == {"clean": "by name (2 of 12 classes)"}
    assert "- labels of all sets: by name (2 of 12 classes)" in text

    store = pipelines.open_store(at / "few")
    plan = pipelines.eval_plan(store.heights, store.widths, size=32, resize=36, batch=4)
    batches = pipelines.open_loader("reference", store, size=32).load(plan)
    labels = torch.from_numpy(store.labels[plan.index.astype(int)])  # 12 images: no padding
    pairs = ((batch.images, labels[batch.step]) for batch in batches)
    trained = load_model(at / "numbers.safetensors")
    by_hand = Accuracy(torch.device("cpu"), torch.tensor([10, 2]), restrict=False)
    right = evaluate(trained.model, pairs, by_hand, mean=HALF, std=HALF)
    assert found["results"]["clean"]["loss"] == pytest.approx(right["loss"], rel=1e-9)

    write_checkpoint(at / "nameless.safetensors", None, 12)
    nameless = {"model": "nameless.safetensors", "data": "few", "out": "b"}
    assert "the checkpoint has no class names" in refused(capsys, at, **nameless)
    message = refused(capsys, at, "--labels-by-position", **nameless)
    assert "it has 2 classes and the model 12" in message
    assert not (at / "b").exists()


def test_labels_by_position_must_be_asked_for_and_is_reported(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = fresh(world, tmp_path, "val", "r", "c")
    nameless = {"model": "nameless.safetensors"}
    write_checkpoint(at / "nameless.safetensors", None)
    assert "--labels-by-position" in refused(capsys, at, **nameless)
    found, text = run(at, "--labels-by-position", **nameless)
    named, _ = run(at, out="named")  # the same weights
    assert found["results"] == named["results"]
    how = "by position (allowed by --labels-by-position; the checkpoint has no class names)"
    assert how in text
    imagenet_r = ["--imagenet-r", str(at / "r")]
    message = refused(capsys, at, "--labels-by-position", *imagenet_r, **nameless)
    assert "imagenet_r: " in message
    assert "the checkpoint has none" in message
    write_folder(at / "five", WNIDS[:5], 1, (32, 32))
    message = refused(capsys, at, "--labels-by-position", data="five", **nameless)
    assert "it has 5 classes and the model 6" in message


def test_data_without_names(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = fresh(world, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (12, 36, 36, 3), dtype=np.uint8)
    convert_arrays(at / "data.beton", images, np.arange(12) % 6, WNIDS, "noise")
    reference = ["--pipeline", "reference"]
    named, _ = run(at, *reference, data="data.beton")
    (at / "data.beton.json").unlink()  # as FFCV's own writer leaves it
    message = refused(capsys, at, *reference, data="data.beton")
    assert "the data has no class names" in message
    found, _ = run(at, *reference, "--labels-by-position", data="data.beton")
    assert found["results"]["clean"] == named["results"]["clean"]
    write_checkpoint(at / "nameless.safetensors", None)
    nameless = {"model": "nameless.safetensors", "data": "data.beton"}
    found, text = run(at, *reference, **nameless)
    assert found["results"]["clean"] == named["results"]["clean"]
    assert "by position (neither side has class names)" in text
    corrupt = ["--corrupt", "saturate", "--keep", str(at / "sets")]
    for _ in range(2):  # built, then read: a kept set without names
        found, _ = run(at, *reference, *corrupt, **nameless)
        assert found["results"]["computed/saturate/3"]["count"] == 12
    write_checkpoint(at / "five.safetensors", None, 5)
    message = refused(capsys, at, *reference, model="five.safetensors", data="data.beton")
    assert "its labels are 0 to 5, but the model has 5 classes" in message


def test_incomplete_trees_are_named_where_they_count(world: Path, tmp_path: Path) -> None:
    at = fresh(world, tmp_path, "val")
    there = {"snow": (1, 3, 5), "frost": (2,), "gausian_noise": (1,), "fog": range(1, 6)}
    for name, severities in there.items():
        for severity in severities:
            write_folder(at / "c" / name / str(severity), WNIDS, 1, (32, 32))
    (at / "c" / "snow" / "4").write_text("not a folder")
    (at / "c" / "snow" / "6").mkdir()
    (at / "c" / "README.txt").write_text("hello")
    (at / "c" / ".hidden").mkdir()
    found, text = run(at, "--imagenet-c", str(at / "c"))
    snow = "error, snow (ImageNet-C), over severities 1, 3, 5 only"
    assert f"| {snow} |" in text
    assert "| error, frost (ImageNet-C), over severity 2 only |" in text
    assert "| error, fog (ImageNet-C) |" in text
    assert "| error, all 9 sets (ImageNet-C) |" in text
    lack = "no gaussian_noise, shot_noise, impulse_noise and 9 more"
    assert f"15 corruptions (ImageNet-C): not computed: {lack}" in text
    assert "mCE, AlexNet = 100 (ImageNet-C): not computed: AlexNet's errors" in text  # 32 px
    assert "snow lacks severities 2, 4; frost lacks severities 1, 3, 4, 5" in text
    assert found["unused"] == [
        f"{at}/c/README.txt",
        f"{at}/c/gausian_noise (did you mean gaussian_noise?)",
        f"{at}/c/snow/4",
        f"{at}/c/snow/6",
    ]
    assert "not used: " in text
    errors = [1 - found["results"][f"imagenet_c/snow/{s}"]["top1"] for s in (1, 3, 5)]
    assert found["summary"][snow] == pytest.approx(100 * np.mean(errors))


def test_nothing_of_a_benchmark_is_a_mistake(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = fresh(world, tmp_path, "val")
    (at / "c" / "gausian_noise" / "1").mkdir(parents=True)
    message = refused(capsys, at, "--imagenet-c", str(at / "c"))
    assert "holds none of gaussian_noise" in message
    assert "gausian_noise (did you mean gaussian_noise?)" in message
    (at / "a").mkdir()
    np.save(at / "a" / "labels.npy", np.zeros(5, np.uint8))
    assert "holds none of gaussian_noise.npy" in refused(capsys, at, "--cifar10-c", str(at / "a"))
    for option in ("--imagenet-c", "--cifar10-c"):
        assert "no such folder" in refused(capsys, at, option, str(at / "nowhere"))


def test_images_of_another_size_than_the_models_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = fresh(world, tmp_path, "val", "cifar")
    np.save(at / "cifar" / "contrast.npy", np.zeros((35, 24, 28, 3), np.uint8))
    message = refused(capsys, at, "--cifar10-c", str(at / "cifar"))
    assert "its images have 24 x 28 pixels, the model takes 32 x 32" in message
