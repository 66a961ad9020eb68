"""Exactness of the evaluation, the benchmarks' summaries, and `fap-eval` end to end on small
folders.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fap.evaluate.labels import match_classes, match_labels
from PIL import Image
from torch import Tensor, nn

from fap import checkpoint
from fap.cli import eval as cli
from fap.config import make_config
from fap.evaluate import benchmarks, report
from fap.evaluate import work as evaluation
from fap.evaluate.exact import Result, evaluate
from fap.evaluate.mce import ALEXNET_ERRORS, EXTRA, lacking, mce, summarise
from fap.evaluate.results import Results, safe_name
from fap.nets.build import build as build_model
from fap.nets.dual import convert, norms
from fap.nets.norm import DualBatchNorm2d
from fap.run import session
from pipelines import open_store
from pipelines.convert import convert_arrays
from pipelines.corrupt import NAMES, QUICK, corrupt
from pipelines.sources import cifar10
from tests.hostile_meta import valid_meta

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@dataclass(frozen=True)
class Rows:
    images: Tensor
    labels: Tensor
    step: int


def batches(images: Tensor, labels: Tensor, size: int) -> list[Rows]:
    """Steps of one size; the last is filled with zero images of label -1."""
    short = -len(images) % size
    images = torch.cat([images, images.new_zeros(short, *images.shape[1:])])
    labels = torch.cat([labels, labels.new_full((short,), -1)])
    return [
        Rows(x, y, i)
        for i, (x, y) in enumerate(zip(images.split(size), labels.split(size), strict=True))
    ]


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8, generator=g)
    return images, torch.randint(0, 12, (37,), generator=g)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 12),
    )
    dual = convert(plain)
    for norm in norms(dual):
        for side in (norm, norm.branch("aux")):
            side.running_mean.normal_()
            side.running_var.uniform_(0.5, 2)
    return dual


def naive(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    bn: str = "main",
    columns: list[int] | None = None,
) -> tuple:
    """One image at a time, in float64: the loss, and the place of the label's logit among all."""
    model = model.double().eval()
    norm = next(m for m in model.modules() if isinstance(m, DualBatchNorm2d)).branch(bn)
    losses, places = [], []
    for image, label in zip(images, labels.tolist(), strict=True):
        x = (image.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(
            STD
        ).double().view(3, 1, 1)
        x = model[0](x[None])
        stats = [
            t.double().view(1, -1, 1, 1)
            for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        ]
        x = (x - stats[0]) / (stats[1] + 1e-5).sqrt() * stats[2] + stats[3]
        logits = model[5](x.clamp(min=0).mean((2, 3)))[0]
        logits = logits if columns is None else logits[columns]
        losses.append(-torch.log_softmax(logits, 0)[label].item())
        places.append(int((logits > logits[label]).sum()))
    model.float()
    places = np.array(places)
    return np.mean(losses), np.mean(places < 1), np.mean(places < 5)


@pytest.mark.parametrize("bn", ["main", "aux"])
@pytest.mark.parametrize("size", [1, 5, 16, 37, 64])
def test_every_image_once_whatever_the_batch(model, data, size, bn):
    result = evaluate(model, batches(*data, size), mean=MEAN, std=STD, bn=bn)
    loss, top1, top5 = naive(model, *data, bn=bn)
    assert (result.top1, result.top5, result.count) == (top1, top5, 37)
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_main_and_aux_differ_and_modes_are_restored(model, data):
    model.train()
    model[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    main, aux = (
        evaluate(model, batches(*data, 8), mean=MEAN, std=STD, bn=bn) for bn in ("main", "aux")
    )
    assert main.loss != aux.loss
    assert [m.training for m in model] == [False, True, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_cannot_be_evaluated(model, data):
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, [], mean=MEAN, std=STD)
    vanilla = convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 12)),
        aux=False,
    )
    with pytest.raises(ValueError, match="aux"):
        evaluate(vanilla, batches(*data, 8), mean=MEAN, std=STD, bn="aux")


def test_fewer_than_five_classes(data):
    images, labels = data[0], data[1] % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert evaluate(model, batches(images, labels, 8), mean=MEAN, std=STD).top5 == 1


def test_classes_of_a_folder_and_the_mask_of_imagenet_r(model, data):
    classes = [f"n{i:08d}" for i in range(12)]
    folders = ["n00000003", "n00000004", "n00000007", "n00000011", "n00000001", "n00000009"]
    label_map = match_classes(folders, classes)
    assert label_map.tolist() == [3, 4, 7, 11, 1, 9]
    images, labels = data[0], data[1] % 6
    arguments = {"mean": MEAN, "std": STD, "label_map": label_map}
    all_logits = evaluate(model, batches(images, labels, 8), **arguments)
    masked = evaluate(model, batches(images, labels, 8), **arguments, restrict=True)
    expected = naive(model, images, label_map[labels])
    assert (all_logits.loss, all_logits.top1, all_logits.top5) == (
        pytest.approx(expected[0], rel=1e-5),
        *expected[1:],
    )
    expected = naive(model, images, labels, columns=label_map.tolist())
    assert (masked.loss, masked.top1, masked.top5) == (
        pytest.approx(expected[0], rel=1e-5),
        *expected[1:],
    )
    assert masked.top5 > all_logits.top5
    with pytest.raises(ValueError, match=r"1 of the 2 class folders.*'n02'"):
        match_classes(["n00000003", "n02"], classes)
    for twice in ((["a", "a"], ["a", "b"]), (["a"], ["a", "b", "b"])):
        with pytest.raises(ValueError, match="twice"):
            match_classes(*twice)


def test_labels_are_matched_by_name_wherever_there_are_names():
    numbers = tuple(map(str, range(12)))
    as_text = sorted(numbers)  # 0, 1, 10, 11, 2: how the folders stand
    found = match_labels(as_text, (0, 11), numbers, 12)
    assert found.map.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert found.how == "by name (12 of 12 classes)"
    assert match_labels(["3", "10"], (0, 1), numbers, 12).map.tolist() == [3, 10]
    assert match_labels(["3", "10"], (0, 1), numbers, 12).how == "by name (2 of 12 classes)"
    assert match_labels(numbers, (0, 11), numbers, 12, by_position=True).how == "by name"
    with pytest.raises(ValueError, match="none of the model's 12 classes, the first being 'x'"):
        match_labels([*as_text[:11], "x"], (0, 11), numbers, 12, by_position=True)


def test_labels_by_position_only_where_nothing_else_is_known_or_it_is_asked_for():
    names = ("a", "b", "c")
    assert match_labels(None, (0, 2), None, 3) == (
        None,
        "by position (neither side has class names)",
    )
    assert match_labels(None, (0, 1), None, 3).map is None
    for data, model, side in ((names, None, "the checkpoint"), (None, names, "the data")):
        with pytest.raises(ValueError, match=f"{side} has no class names.*--labels-by-position"):
            match_labels(data, (0, 2), model, 3)
        found = match_labels(data, (0, 2), model, 3, by_position=True)
        assert found == (
            None,
            f"by position (allowed by --labels-by-position; {side} has no class names)",
        )
    with pytest.raises(ValueError, match="3 classes and the model 4"):
        match_labels(names, (0, 2), None, 4, by_position=True)


@pytest.mark.parametrize(("names", "labels", "classes"), [
    (None, (0, 3), None),
    (None, (-1, 2), None),
    (None, (0, 3), ("a", "b", "c")),
    (("a", "b"), (0, 2), ("a", "b", "c")),
    (("a", "b", "c"), (-1, 2), ("a", "b", "c")),
])  # fmt: skip
def test_labels_beyond_the_classes(names, labels, classes):
    with pytest.raises(ValueError, match=f"its labels are {labels[0]} to {labels[1]}"):
        match_labels(names, labels, classes, 3, by_position=True)


@pytest.mark.parametrize(("names", "classes", "who"), [
    (None, None, "neither the checkpoint nor the data"),
    (("a", "b"), None, "the checkpoint has none"),
    (None, ("a", "b"), "the data has none"),
])  # fmt: skip
def test_imagenet_r_needs_names(names, classes, who):
    with pytest.raises(ValueError, match=f"only the logits of its own classes count.*{who}"):
        match_labels(names, (0, 1), classes, 2, by_position=True, restrict=True)


def _rank(
    rank: int, world: int, port_file: str, model: nn.Module, images: Tensor, labels: Tensor, out
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world)
    mine = [
        Rows(b.images[rank::world], b.labels[rank::world], b.step)
        for b in batches(images, labels, 8)
    ]
    result = evaluate(model, mine, mean=MEAN, std=STD)
    out.put((result.loss, result.top1, result.top5, result.count))
    dist.destroy_process_group()


@pytest.mark.slow
def test_exact_across_ranks(model, data, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(r, 2, str(tmp_path / "meet"), model, *data, out))
        for r in range(2)
    ]
    torch.set_num_threads(1)
    for process in ranks:
        process.start()
    results = [out.get() for _ in ranks]
    for process in ranks:
        process.join()
    one = evaluate(model, batches(*data, 8), mean=MEAN, std=STD)
    assert results[0] == results[1]
    assert results[0] == (pytest.approx(one.loss, rel=1e-6), one.top1, one.top5, 37)


def test_mce():
    assert mce(ALEXNET_ERRORS) == pytest.approx(100.0)
    assert mce({k: v / 2 for k, v in ALEXNET_ERRORS.items()}) == pytest.approx(50.0)
    one_worse = ALEXNET_ERRORS | {"fog": 2 * ALEXNET_ERRORS["fog"]}
    assert mce(one_worse) == pytest.approx(100 * 16 / 15)
    with pytest.raises(ValueError, match="missing: fog"):
        mce({k: v for k, v in ALEXNET_ERRORS.items() if k != "fog"})
    assert (*ALEXNET_ERRORS, *EXTRA) == NAMES


def test_summaries_appear_when_they_are_complete():
    errors = {name: dict.fromkeys(range(1, 6), 0.5) for name in ALEXNET_ERRORS} | {
        "fog": {s: s / 10 for s in range(1, 6)}
    }
    expected = {"mean", "raw_15", "mce"}
    assert summarise(errors).keys() == expected
    assert summarise(errors)["raw_15"] == pytest.approx((14 * 50 + 30) / 15)
    full = errors | {name: dict.fromkeys(range(1, 6), 1.0) for name in EXTRA}
    assert summarise(full)["raw_19"] == pytest.approx((14 * 50 + 30 + 4 * 100) / 19)
    assert summarise(full)["mce"] == summarise(errors)["mce"]
    assert summarise(errors | {"fog": {3: 0.1}}).keys() == {"mean"}


def test_what_a_mean_lacks_is_said():
    full = {name: dict.fromkeys(range(1, 6), 0.5) for name in ALEXNET_ERRORS}
    assert lacking(full) == ""
    assert lacking(full | {"snow": dict.fromkeys((1, 2, 3, 5), 0.5)}) == "snow lacks severity 4"
    assert lacking(full | {"fog": {1: 0.5, 3: 0.5}}) == "fog lacks severities 2, 4, 5"
    without = {name: by for name, by in full.items() if name not in ("snow", "fog")}
    assert lacking(without) == "no snow, fog"
    assert lacking({}) == "no gaussian_noise, shot_noise, impulse_noise and 12 more"
    assert lacking(full, EXTRA) == "no speckle_noise, gaussian_blur, spatter and 1 more"
    some = {name: {3: 0.5} for name in ALEXNET_ERRORS}
    assert len(lacking(some)) < 250


# ---------------------------------------------------------------------- results that are kept


ORIGIN = {"set": "clean", "images": {"data": {"classes": ["b", "a"]}}}
RESULT = Result(1.5, 0.25, 1.0, 40)


def test_a_result_belongs_to_its_origin(tmp_path):
    results = Results(tmp_path / "results", pytest.fail)
    assert results.find("run-clean", ORIGIN, 40) is None
    results.keep("run-clean", ORIGIN, RESULT)
    assert results.find("run-clean", ORIGIN, 40) == RESULT
    assert results.find("run-clean", dict(reversed(ORIGIN.items())), 40) == RESULT
    assert results.find("run-clean", ORIGIN | {"bn": "aux"}, 40) is None
    assert len(list((tmp_path / "results").iterdir())) == 1
    results.keep("run-clean", ORIGIN, Result(float("nan"), 0, 0, 40))  # of a model that diverged
    assert np.isnan(results.find("run-clean", ORIGIN, 40).loss)


def result_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def spoilt(file: Path, how: str) -> None:
    tree = json.loads(file.read_text())
    match how:
        case "truncated":
            file.write_text(file.read_text()[:-9])
        case "empty":
            file.write_text("")
        case "binary":
            file.write_bytes(os.urandom(2000))
        case "huge":
            os.truncate(file, 1 << 40)
        case "deep":
            file.write_text("[" * 60_000)
        case "folder":
            file.unlink()
            file.mkdir()
        case "fifo":
            file.unlink()
            os.mkfifo(file)
        case "device":
            file.unlink()
            file.symlink_to("/dev/zero")
        case "list":
            file.write_text("[1]")
        case "null":
            file.write_text("null")
        case "another's":
            file.write_text(json.dumps(tree | {"of": "0" * 64}))
        case _:
            field, value = how.split("=")
            file.write_text(
                json.dumps(tree | {"result": tree["result"] | {field: json.loads(value)}})
            )


@pytest.mark.parametrize("how", [
    "truncated", "empty", "binary", "huge", "deep", "folder", "fifo", "device", "list", "null", "another's",
    "top1=2", "top1=true", 'top1="0.5"', "top1=NaN", "top1=-1", "top5=0.1", "loss=null", "loss=-1", "count=41", "count=40.0",
    "extra=1",
])  # fmt: skip
def test_a_damaged_result_is_computed_again(tmp_path, how):
    said: list[str] = []
    results = Results(tmp_path / "results", said.append)
    results.keep("run-clean", ORIGIN, RESULT)
    file = result_file(tmp_path / "results")
    spoilt(file, how)
    assert results.find("run-clean", ORIGIN, 40) is None
    assert len(said) == 1
    assert str(file) in said[0]
    assert len(said[0]) < 500
    results.keep("run-clean", ORIGIN, RESULT)
    if how == "folder":
        assert "cannot be kept" in said[-1]
    else:
        assert results.find("run-clean", ORIGIN, 40) == RESULT


def test_two_processes_may_keep_results_in_one_folder(tmp_path):
    """Of many writers at once a reader sees one whole result."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            Results(tmp_path / "r", pytest.fail).keep("run-clean", ORIGIN, RESULT)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    try:
        reader = Results(tmp_path / "r", pytest.fail)
        while reader.find("run-clean", ORIGIN, 40) is None:
            time.sleep(0.01)
        found = [reader.find("run-clean", ORIGIN, 40) for _ in range(300)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert set(found) == {RESULT}
    assert [f.suffix for f in (tmp_path / "r").iterdir()] == [".json"]


@pytest.mark.parametrize(
    "name",
    [
        "../../../x",
        "/etc/x",
        "..",
        ".",
        "",
        "a/b",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 5000,
        "é",
        "-rf",
        "~",
    ],
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    """A run's name comes out of a checkpoint, which may be a stranger's."""
    assert "/" not in safe_name(name)
    assert not safe_name(name).startswith(".")
    results = Results(tmp_path / "out" / "results", pytest.fail)
    results.keep(f"{name}-computed/fog/3", ORIGIN, RESULT)
    assert results.find(f"{name}-computed/fog/3", ORIGIN, 40) == RESULT
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["results"]
    assert result_file(tmp_path / "out" / "results").suffix == ".json"


# ---------------------------------------------------------------------- the command

WNIDS = ["n01", "n02", "n03", "n04", "n05", "n06"]


def write_folder(
    path, names, per_class: int, side: tuple[int, int], change=lambda x: x, seed: int = 0
) -> None:
    rng = np.random.default_rng(seed)
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = change(
                np.asarray(Image.fromarray(small).resize(side, Image.Resampling.BICUBIC))
            )
            Image.fromarray(image).save(path / name / f"{i}.JPEG", quality=95)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run's checkpoint and one small folder of each benchmark's layout."""
    at = tmp_path_factory.mktemp("eval")
    write_folder(at / "val", WNIDS, 3, (40, 36))
    for severity in (1, 2):
        write_folder(
            at / "c" / "fog" / str(severity),
            WNIDS,
            2,
            (32, 32),
            lambda x, s=severity: corrupt(x, "fog", s),
        )
    write_folder(at / "r", ["n02", "n05"], 4, (50, 33))
    write_folder(at / "stylized", WNIDS, 1, (32, 32))
    (at / "cifar").mkdir()
    rng = np.random.default_rng(3)
    np.save(at / "cifar" / "contrast.npy", rng.integers(0, 256, (35, 32, 32, 3), dtype=np.uint8))
    np.save(at / "cifar" / "labels.npy", np.tile(np.arange(7), 5).astype(np.uint8))
    write_checkpoint(at / "step_00000005.safetensors", WNIDS)
    return at


def write_checkpoint(path: Path, classes, n_classes: int = 6, seed: int = 0) -> Path:
    config = make_config({
        "name": "tiny", "paper": {"top1": 76.5, "imagenet_r": 38.2},
        "model": {"name": "cifar_resnet8", "num_classes": n_classes}, "data": {"size": 32, "resize": 36},
    })  # fmt: skip
    torch.manual_seed(seed)
    model = build_model("cifar_resnet8", n_classes, aux=True, size=32)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    checkpoint.save(path, state, valid_meta(config, classes))
    return path


def run(
    world,
    *arguments: str,
    out: str = "out",
    model: str = "step_00000005.safetensors",
    data: str = "val",
    plot: bool = False,  # it takes most of the time
):
    """The one checkpoint's report, and the table."""
    fixed = [
        "--data",
        str(world / data),
        "--device",
        "cpu",
        "--batch",
        "4",
        "--out",
        str(world / out),
    ]
    with pytest.MonkeyPatch.context() as patch:
        if not plot:
            patch.setattr(report, "_plot", lambda reports: b"")
        assert cli.main([str(world / model), *fixed, *arguments]) == 0
    (found,) = json.loads((world / out / "report.json").read_text())
    return found, (world / out / "report.md").read_text()


def refused(capsys, world, *arguments: str, **where: str) -> str:
    """The one line of a command that ends with exit code 1."""
    with pytest.raises(AssertionError):
        run(world, *arguments, **where)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("fap-eval: ")
    return lines[-1]


def test_every_set_of_the_command(world, capsys):
    folders = [("--imagenet-c", "c"), ("--imagenet-r", "r"), ("--stylized", "stylized")]
    found, text = run(
        world, "--corrupt", *(str(v) for k, f in folders for v in (k, world / f)), plot=True
    )
    results = found["results"]
    counts = {key: result["count"] for key, result in results.items()}
    assert counts == {
        "clean": 18, **{f"computed/{n}/3": 18 for n in QUICK},
        "imagenet_c/fog/1": 12, "imagenet_c/fog/2": 12, "imagenet_r": 8, "stylized": 6,
    }  # fmt: skip
    told = capsys.readouterr()
    assert text == told.out
    assert "computed here, not the published files" in text
    assert f"| top-1 accuracy | {100 * results['clean']['top1']:.2f} (paper 76.5) |" in text
    assert f"| ImageNet-R top-1 | {100 * results['imagenet_r']['top1']:.2f} (paper 38.2) |" in text
    assert results["imagenet_r"]["top5"] == 1  # of two classes
    assert (world / "out" / "report.png").stat().st_size > 10_000
    plan = told.err[: told.err.index("clean: top-1")]  # what comes before the first result
    assert (
        "step_00000005.safetensors: tiny, seed 0, step 5: cifar_resnet8, 6 classes (n01, n02, n03"
        " ... n06)" in plan
    )
    assert f"clean: 1 set of 18 images, {world / 'val'}, labels by name" in plan
    assert "computed: 4 sets of 18 images" in plan
    assert f"imagenet_c: 2 sets of 12 images, {world / 'c'}" in plan
    assert "imagenet_r: 1 set of 8 images" in plan
    assert "labels by name (2 of 6 classes)" in plan


def test_cifar10_c_belongs_to_cifar10s_classes(world, capsys):
    array = ["--cifar10-c", str(world / "cifar")]
    assert "10 class folders are none of the model's 6 classes" in refused(
        capsys, world, *array, out="cifar1"
    )
    order = [*reversed(cifar10.CLASSES)]
    write_checkpoint(world / "ten.safetensors", order, 10)
    write_folder(world / "ten", order, 1, (40, 36), seed=5)
    found, text = run(world, *array, model="ten.safetensors", data="ten", out="cifar2")
    assert {k: v["count"] for k, v in found["results"].items()} == {
        "clean": 10,
        **{f"cifar10_c/contrast/{s}": 7 for s in range(1, 6)},
    }
    assert found["labels"]["cifar10_c/contrast/2"] == "by name (10 of 10 classes)"
    images = torch.from_numpy(np.load(world / "cifar" / "contrast.npy")[7:14]).permute(0, 3, 1, 2)
    trained = evaluation.load_model(world / "ten.safetensors")
    with torch.inference_mode():
        predicted = trained.model((images.float() / 255 - 0.5) / 0.5).argmax(1).tolist()
    right = sum(
        order[p] == cifar10.CLASSES[label] for p, label in zip(predicted, range(7), strict=True)
    )
    assert found["results"]["cifar10_c/contrast/2"]["top1"] == pytest.approx(right / 7)
    assert "AlexNet's errors are those of ImageNet-C" in text
    write_checkpoint(world / "nameless.safetensors", None, 10)
    arguments = {"model": "nameless.safetensors", "data": "ten", "out": "cifar3"}
    assert "the checkpoint has no class names" in refused(capsys, world, *array, **arguments)


def test_finished_sets_are_not_computed_again(world, monkeypatch, capsys):
    calls = counted(monkeypatch)
    first, _ = run(world, "--corrupt", "fog", "contrast", "--severity", "2", out="again")
    assert len(calls) == 3
    calls.clear()
    second, _ = run(world, "--corrupt", "fog", "contrast", "snow", "--severity", "2", out="again")
    assert len(calls) == 1
    assert "2 of them evaluated before" in capsys.readouterr().err
    assert {k: v for k, v in second["results"].items() if "snow" not in k} == first["results"]
    run(world, "--corrupt", "fog", "--severity", "2", "--seed", "1", out="again")
    assert len(calls) == 2  # the clean images have no seed
    run(world, "--pipeline", "reference", out="again")
    assert len(calls) == 2
    run(world, "--bn", "aux", out="again")
    assert len(calls) == 3


def counted(monkeypatch) -> list:
    """The calls of `evaluate` from here on."""
    calls: list = []
    monkeypatch.setattr(
        evaluation, "evaluate", lambda *a, **k: calls.append(k) or evaluate(*a, **k)
    )
    return calls


def fresh(world, tmp_path, *names: str) -> Path:
    """A copy of some of the world's folders and its checkpoint, to be changed."""
    import shutil

    for name in names:
        shutil.copytree(world / name, tmp_path / name)
    shutil.copy(world / "step_00000005.safetensors", tmp_path)
    return tmp_path


def dated(path: Path) -> tuple[int, int]:
    return path.stat().st_atime_ns, path.stat().st_mtime_ns


@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_another_file_under_the_same_name_gives_new_numbers(world, tmp_path, kept):
    """Same path, size and date, other pixels: nothing of the old file's results is used, nor of its
    kept sets.
    """
    at = fresh(world, tmp_path)

    def data(seed: int) -> Path:
        images = np.random.default_rng(seed).integers(0, 256, (24, 36, 36, 3), dtype=np.uint8)
        file = at / "data.beton"
        date = dated(file) if file.exists() else None
        for old in at.glob("data.beton*"):
            old.unlink()
        convert_arrays(file, images, np.arange(24) % 6, WNIDS, "noise")
        if date:
            for new in at.glob("data.beton*"):
                os.utime(new, ns=date)
        return file

    options = ["--corrupt", "brightness", "--pipeline", "reference"]
    if kept:
        options += ["--keep", str(at / "keep")]
    data(0)
    first, _ = run(at, *options, data="data.beton")
    again, _ = run(at, *options, data="data.beton")
    assert again["results"] == first["results"]
    data(1)
    second, _ = run(at, *options, data="data.beton")
    reference, _ = run(at, *options, data="data.beton", out="elsewhere")
    assert second["results"] == reference["results"]
    for key in ("clean", "computed/brightness/3"):
        assert second["results"][key]["loss"] != first["results"][key]["loss"]


def test_other_images_in_the_same_folder_give_new_numbers(world, tmp_path):
    at = fresh(world, tmp_path, "val", "c")
    options = ["--imagenet-c", str(at / "c")]
    first, _ = run(at, *options)
    for folder in ("val/n01", "c/fog/2/n01"):
        one = at / folder / "0.JPEG"
        date = dated(one)
        Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(one, quality=90)
        os.utime(one, ns=date)
    second, _ = run(at, *options)
    assert second["results"] == run(at, *options, out="elsewhere")[0]["results"]
    same = [key for key in first["results"] if first["results"][key] == second["results"][key]]
    assert same == ["imagenet_c/fog/1"]


@pytest.mark.parametrize("changed", ["contrast", "labels"])
def test_other_arrays_under_the_same_name_give_new_numbers(world, tmp_path, changed):
    at = fresh(world, tmp_path, "cifar")
    write_checkpoint(at / "ten.safetensors", cifar10.CLASSES, 10)
    write_folder(at / "ten", cifar10.CLASSES, 1, (32, 32), seed=5)
    arguments = ["--cifar10-c", str(at / "cifar")]
    first, _ = run(at, *arguments, model="ten.safetensors", data="ten")
    file = at / "cifar" / f"{changed}.npy"
    date = dated(file)
    old = np.load(file)
    new = 255 - old if changed == "contrast" else np.tile(np.arange(7)[::-1], 5).astype(np.uint8)
    np.save(file, new)
    os.utime(file, ns=date)
    second, _ = run(at, *arguments, model="ten.safetensors", data="ten")
    assert (
        second["results"]
        == run(at, *arguments, model="ten.safetensors", data="ten", out="elsewhere")[0]["results"]
    )
    assert second["results"]["cifar10_c/contrast/1"] != first["results"]["cifar10_c/contrast/1"]
    assert second["results"]["clean"] == first["results"]["clean"]


def test_another_checkpoint_under_the_same_name_gives_new_numbers(world, tmp_path, monkeypatch):
    at = fresh(world, tmp_path, "val")
    first, _ = run(at)
    file = at / "step_00000005.safetensors"
    date = dated(file)
    write_checkpoint(file, WNIDS, seed=1)
    os.utime(file, ns=date)
    second, _ = run(at)
    assert second["results"]["clean"]["loss"] != first["results"]["clean"]["loss"]
    calls = counted(monkeypatch)
    file.rename(at / "moved.safetensors")  # the same content elsewhere is the same
    assert run(at, model="moved.safetensors")[0]["results"] == second["results"]
    assert calls == []


def test_data_that_changes_meanwhile_is_an_error(world, tmp_path, monkeypatch, capsys):
    at = fresh(world, tmp_path, "val")

    def disturbed(*a, **k):
        result = evaluate(*a, **k)
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(at / "val" / "n02" / "1.JPEG")
        return result

    monkeypatch.setattr(evaluation, "evaluate", disturbed)
    assert "files changed while they were evaluated" in refused(capsys, at)
    assert not (at / "out" / "results").exists()
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    run(at)


# ---------------------------------------------------------------------- labels, in the command


def test_a_folder_of_fewer_classes_is_evaluated_with_the_right_labels(world, tmp_path, capsys):
    """Two of six classes, and numbers that are sorted as text: by position the result would be
    another.
    """
    at = fresh(world, tmp_path)
    names = [str(i) for i in range(12)]  # sorted as text 0, 1, 10, 11, 2: folders in this order
    write_checkpoint(at / "numbers.safetensors", names, 12)
    write_folder(at / "few", ["2", "10"], 6, (36, 36))
    found, text = run(at, model="numbers.safetensors", data="few")
    assert found["labels"] == {"clean": "by name (2 of 12 classes)"}
    assert "- labels of all sets: by name (2 of 12 classes)" in text

    store = open_store(at / "few")
    plan = benchmarks.pipelines.eval_plan(store.heights, store.widths, size=32, resize=36, batch=4)
    batches = benchmarks.pipelines.open_loader("reference", store, size=32).load(plan)
    trained = evaluation.load_model(at / "numbers.safetensors")
    half = (0.5, 0.5, 0.5)
    right = evaluate(trained.model, batches, mean=half, std=half, label_map=torch.tensor([10, 2]))
    assert found["results"]["clean"]["loss"] == pytest.approx(right.loss, rel=1e-9)

    write_checkpoint(at / "nameless.safetensors", None, 12)
    message = refused(capsys, at, model="nameless.safetensors", data="few", out="b")
    assert "the checkpoint has no class names" in message
    message = refused(
        capsys, at, "--labels-by-position", model="nameless.safetensors", data="few", out="b"
    )
    assert "it has 2 classes and the model 12" in message
    assert not (at / "b").exists()


def test_labels_by_position_must_be_asked_for_and_is_reported(world, tmp_path, capsys):
    at = fresh(world, tmp_path, "val", "r", "c")
    write_checkpoint(at / "nameless.safetensors", None)
    assert "--labels-by-position" in refused(capsys, at, model="nameless.safetensors")
    found, text = run(at, "--labels-by-position", model="nameless.safetensors")
    named, _ = run(at, out="named")  # the same weights
    assert found["results"] == named["results"]
    assert (
        "by position (allowed by --labels-by-position; the checkpoint has no class names)" in text
    )
    message = refused(
        capsys,
        at,
        "--labels-by-position",
        "--imagenet-r",
        str(at / "r"),
        model="nameless.safetensors",
    )
    assert "imagenet_r: " in message
    assert "the checkpoint has none" in message
    write_folder(at / "five", WNIDS[:5], 1, (32, 32))
    message = refused(capsys, at, "--labels-by-position", model="nameless.safetensors", data="five")
    assert "it has 5 classes and the model 6" in message


def test_data_without_names(world, tmp_path, capsys):
    at = fresh(world, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (12, 36, 36, 3), dtype=np.uint8)
    convert_arrays(at / "data.beton", images, np.arange(12) % 6, WNIDS, "noise")
    options = {"data": "data.beton"}
    named, _ = run(at, "--pipeline", "reference", **options)
    (at / "data.beton.json").unlink()  # as FFCV's own writer leaves it
    assert "the data has no class names" in refused(
        capsys, at, "--pipeline", "reference", **options
    )
    found, _ = run(at, "--pipeline", "reference", "--labels-by-position", **options)
    assert found["results"]["clean"] == named["results"]["clean"]
    write_checkpoint(at / "nameless.safetensors", None)
    found, text = run(at, "--pipeline", "reference", model="nameless.safetensors", **options)
    assert found["results"]["clean"] == named["results"]["clean"]
    assert "by position (neither side has class names)" in text
    corrupt = ["--corrupt", "saturate", "--keep", str(at / "sets")]
    for _ in range(2):  # built, then read: a kept set without names
        found, _ = run(
            at, "--pipeline", "reference", *corrupt, model="nameless.safetensors", **options
        )
        assert found["results"]["computed/saturate/3"]["count"] == 12
    write_checkpoint(at / "five.safetensors", None, 5)
    message = refused(capsys, at, "--pipeline", "reference", model="five.safetensors", **options)
    assert "its labels are 0 to 5, but the model has 5 classes" in message


# ---------------------------------------------------------------------- incomplete benchmarks


def test_incomplete_trees_are_named_where_they_count(world, tmp_path):
    at = fresh(world, tmp_path, "val")
    for name, severities in (
        ("snow", (1, 3, 5)),
        ("frost", (2,)),
        ("gausian_noise", (1,)),
        ("fog", range(1, 6)),
    ):
        for severity in severities:
            write_folder(at / "c" / name / str(severity), WNIDS, 1, (32, 32))
    (at / "c" / "snow" / "4").write_text("not a folder")
    (at / "c" / "snow" / "6").mkdir()
    (at / "c" / "README.txt").write_text("hello")
    (at / "c" / ".hidden").mkdir()
    found, text = run(at, "--imagenet-c", str(at / "c"))
    assert "| error, snow (ImageNet-C), over severities 1, 3, 5 only |" in text
    assert "| error, frost (ImageNet-C), over severity 2 only |" in text
    assert "| error, fog (ImageNet-C) |" in text
    assert "| error, all 9 sets (ImageNet-C) |" in text
    assert (
        "mCE, AlexNet = 100 (ImageNet-C): not computed: no gaussian_noise, shot_noise,"
        " impulse_noise and 9 more" in text
    )
    assert "snow lacks severities 2, 4; frost lacks severities 1, 3, 4, 5" in text
    assert found["unused"] == [
        f"{at}/c/README.txt", f"{at}/c/gausian_noise (did you mean gaussian_noise?)", f"{at}/c/snow/4", f"{at}/c/snow/6",
    ]  # fmt: skip
    assert "not used: " in text
    errors = [1 - found["results"][f"imagenet_c/snow/{s}"]["top1"] for s in (1, 3, 5)]
    assert found["summary"][
        "error, snow (ImageNet-C), over severities 1, 3, 5 only"
    ] == pytest.approx(100 * np.mean(errors))


def complete(top1: float = 0.5, count: int = 50) -> dict:
    """A report with every set of ImageNet-C."""
    one = {"loss": 1.0, "top1": top1, "top5": 1.0, "count": count}
    results = {"clean": one} | {
        f"imagenet_c/{name}/{s}": one for name in NAMES for s in range(1, 6)
    }
    return {
        "name": "tiny", "seed": 0, "step": 5, "paper": {}, "small": False, "settings": {"data": "x", "bn": "main"},
        "labels": dict.fromkeys(results, "by name"), "unused": [], "results": results,
    }  # fmt: skip


def test_mce_needs_every_severity_of_as_many_images():
    table = report.table_of(complete())
    assert table.rows["error, 15 corruptions (ImageNet-C)"][0] == 50
    assert table.rows["error, 19 corruptions (ImageNet-C)"][0] == 50
    assert "error, mCE, AlexNet = 100 (ImageNet-C)" in table.rows
    assert table.notes == ["labels of all sets: by name"]

    lacks = complete()
    del lacks["results"]["imagenet_c/snow/4"]
    table = report.table_of(lacks)
    assert not any("corruptions" in row or "mCE" in row for row in table.rows)
    assert "mCE, AlexNet = 100 (ImageNet-C): not computed: snow lacks severity 4" in table.notes
    lacks = complete()
    del lacks["results"]["imagenet_c/saturate/1"]  # one of the extra four
    table = report.table_of(lacks)
    assert "error, mCE, AlexNet = 100 (ImageNet-C)" in table.rows
    assert "error, 19 corruptions (ImageNet-C)" not in table.rows
    assert "19 corruptions (ImageNet-C): not computed: saturate lacks severity 1" in table.notes

    short = complete()
    short["results"]["imagenet_c/fog/3"] = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "count": 10}
    table = report.table_of(short)
    assert not any("corruptions" in row or "mCE" in row for row in table.rows)
    why = "fog at severity 3 has 10 images, but most sets have 50"
    assert f"mCE, AlexNet = 100 (ImageNet-C): not computed: {why}" in table.notes


def test_several_checkpoints_of_one_report(tmp_path):
    one, other = complete(), complete(0.25)
    del other["results"]["imagenet_c/snow/4"]
    other |= {"name": "a|b\n# c", "step": 6}
    text = report.markdown([one, other])
    assert r"| | tiny, seed 0, step 5 | a\|b\n# c, seed 0, step 6 |" in text
    assert "| error, snow (ImageNet-C) | 50.00 |  |" in text
    assert "| error, snow (ImageNet-C), over severities 1, 2, 3, 5 only |  | 75.00 |" in text
    report.write_report(
        [one] * 30, tmp_path
    )  # a plot that must not grow beyond what matplotlib draws
    assert sorted(os.listdir(tmp_path)) == ["report.json", "report.md", "report.png"]


def test_nothing_of_a_benchmark_is_a_mistake(world, tmp_path, capsys):
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


# ---------------------------------------------------------------------- mistakes, and a world that fails


@pytest.mark.parametrize(("arguments", "message"), [
    (["--data", "@/nowhere"], "nowhere"),
    (["--batch", "0"], "--batch 0"),
    (["--seed", "-1"], "--seed -1"),
    (["--device", "nothing"], "--device nothing"),
    (["--device", "meta"], "--device meta"),
    (["--imagenet-r", "@/c/fog"], "2 class folders are none of the model's 6 classes"),
    (["--stylized", "@/nowhere"], "nowhere"),
    (["--out", "@/step_00000005.safetensors"], "File exists"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_1(world, capsys, arguments, message):
    arguments = [a.replace("@", str(world)) for a in arguments]
    line = refused(capsys, world, *arguments, out="mistakes")
    assert message in line
    assert not (world / "mistakes").exists()


def test_odd_checkpoints_are_one_line(world, capsys, tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    for file in tmp_path.iterdir():
        assert (
            cli.main(
                [
                    str(file),
                    "--data",
                    str(world / "val"),
                    "--device",
                    "cpu",
                    "--out",
                    str(tmp_path / "o"),
                ]
            )
            == 1
        )
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fap-eval: ")
        assert str(file) in line


def test_the_home_folder_is_known(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.chdir(world)
    cli.main(
        ["~/step_00000005.safetensors", "--data", "~/val", "--device", "cpu", "--out", "~/home"]
    )
    assert (world / "home" / "report.md").exists()
    assert not (world / "~").exists()


def test_unknown_names_are_refused_before_anything_is_done(capsys):
    for arguments in (["--corrupt", "rain"], ["--corrupt", "fog", "--severity", "6"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["x.safetensors", "--data", "x", *arguments])
        assert f"invalid choice: {arguments[-1]!r}".replace("'6'", "6") in capsys.readouterr().err
    for arguments in (["--keep", "x"], ["--severity", "3"]):  # they would be accepted and ignored
        with pytest.raises(SystemExit, match="2"):
            cli.main(["x.safetensors", "--data", "x", *arguments])
        assert "--corrupt, which is not given" in capsys.readouterr().err


def test_lack_of_memory_is_said(world, monkeypatch, capsys):
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):

        def lacks(*_, error=error, **__):
            raise error

        monkeypatch.setattr(evaluation, "evaluate", lacks)
        assert "out of memory; a smaller --batch" in refused(capsys, world, out="memory")


def test_a_full_disk_costs_no_number(world, tmp_path, monkeypatch, capsys):
    """Results that cannot be kept are said; a report that cannot be written is printed all the
    same, with exit code 1.
    """
    at = fresh(world, tmp_path, "val")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AssertionError):
        run(at)
    told = capsys.readouterr()
    assert "| top-1 accuracy |" in told.out
    assert "the result of tiny-clean cannot be kept for a later call" in told.err
    last = told.err.splitlines()[-1]
    assert last.startswith("fap-eval: [Errno 28] No space left on device")
    assert "report.md" in last
    assert os.listdir(at / "out") == ["results"]
    assert os.listdir(at / "out" / "results") == []


def command(world, *arguments: str, **options) -> subprocess.Popen:
    fixed = [
        "--data",
        str(world / "val"),
        "--device",
        "cpu",
        "--batch",
        "4",
        "--out",
        str(world / "out"),
    ]
    words = [
        sys.executable,
        "-m",
        "fap.cli.eval",
        str(world / "step_00000005.safetensors"),
        *fixed,
        *arguments,
    ]
    return subprocess.Popen(
        words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@pytest.mark.slow
def test_lost_output_loses_no_report(world, tmp_path):
    at = fresh(world, tmp_path, "val")
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "fap.cli.eval", str(at / "step_00000005.safetensors"), "--data", str(at / "val"),
             "--device", "cpu", "--out", str(at / "out")], stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert sorted(os.listdir(at / "out")) == ["report.json", "report.md", "report.png", "results"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["import", "workers", "work"])
def test_a_signal_ends_it_at_once_without_a_traceback(world, tmp_path, number, code, moment):
    """To the whole group, as a terminal's Ctrl-C is sent. What is finished stays, and is not
    computed again.
    """
    at = fresh(world, tmp_path, "val")
    process = command(at, "--corrupt", "all", start_new_session=True)
    told = []
    if moment == "import":
        time.sleep(1.0)
    for line in process.stderr if moment != "import" else ():
        told.append(line)
        if ("clean: top-1" if moment == "workers" else "computed/shot_noise/1: top-1") in line:
            break
    started = time.monotonic()
    os.killpg(process.pid, number)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == code, rest
    assert time.monotonic() - started < 15
    assert "Traceback" not in rest, rest
    assert f"stopped by {signal.Signals(number).name}" in rest
    finished = [line.split(":")[0].strip() for line in told if "top-1" in line]
    if finished:
        assert len(list((at / "out" / "results").iterdir())) >= len(finished)
    assert not list(at.rglob("*.tmp"))


# ---------------------------------------------------------------------- kept sets

KEEP = ["--corrupt", "fog", "jpeg_compression", "--pipeline", "reference"]


def kept_world(world, tmp_path) -> tuple[Path, list[str]]:
    at = fresh(world, tmp_path, "val")
    return at, [*KEEP, "--keep", str(at / "kept")]


def test_kept_sets_are_built_once(world, tmp_path, monkeypatch):
    at, keep = kept_world(world, tmp_path)
    plain, _ = run(at, *KEEP, out="plain")
    kept, _ = run(at, *keep, out="kept1")
    assert kept["results"] == plain["results"]
    files = sorted((at / "kept").glob("*.beton"))
    assert [len(open_store(f)) for f in files] == [18, 18]
    assert open_store(files[0]).classes == tuple(WNIDS)
    monkeypatch.setattr(benchmarks, "build", None)
    again, _ = run(at, *keep, "--batch", "5", out="kept2")
    assert again["results"] == plain["results"]
    calls = counted(monkeypatch)
    run(at, *keep, out="kept1")
    assert calls == []


def test_a_kept_set_that_was_built_half_is_built_again(world, tmp_path):
    at, keep = kept_world(world, tmp_path)
    first, _ = run(at, *keep)
    one, other = sorted((at / "kept").glob("*.beton"))
    one.rename(f"{one}.part")  # killed before the renames
    os.rename(f"{one}.json", f"{one}.part.json")
    other.unlink()  # killed between them
    second, _ = run(at, *keep, out="second")
    assert second["results"] == first["results"]
    assert sorted((at / "kept").glob("*.beton")) == [one, other]
    assert [len(open_store(f)) for f in (one, other)] == [18, 18]


def test_a_kept_set_that_was_replaced_is_never_taken_for_it(world, tmp_path, capsys):
    at, keep = kept_world(world, tmp_path)
    run(at, *keep)
    one, other = sorted((at / "kept").glob("*.beton"))
    for suffix in ("", ".json"):  # another corruption's images
        Path(f"{one}{suffix}").write_bytes(Path(f"{other}{suffix}").read_bytes())
    assert f"{one}: is not the set that it is named for" in refused(capsys, at, *keep)
    one.unlink()
    Path(f"{one}.json").unlink()
    run(at, *keep)
    one.write_bytes(one.read_bytes()[:-100])
    assert str(one) in refused(capsys, at, *keep)


@pytest.mark.slow
def test_two_commands_build_a_kept_set_once(world, tmp_path):
    at, keep = kept_world(world, tmp_path)
    processes = [command(at, *keep) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert len(list((at / "kept").glob("*.beton"))) == 2
    assert json.loads((at / "out" / "report.json").read_text())[0]["results"].keys() == {
        "clean", "computed/fog/3", "computed/jpeg_compression/3",
    }  # fmt: skip


def test_threads_follow_a_quota(world, monkeypatch):
    used: list[int] = []
    monkeypatch.setattr(session, "usable_cores", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    run(world, out="quota")
    assert used == [1]
