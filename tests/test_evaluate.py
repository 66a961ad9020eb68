"""Exactness of the evaluation, the benchmarks' summaries, and `fap-eval` end to end on small folders."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from fap import checkpoint, models
from fap.cli import eval as cli
from fap.config import make_config
from fap.evaluate import ALEXNET_ERRORS, EXTRA, evaluate, match_classes, mce, summarise
from fap.norm import DualBatchNorm2d, convert, norms
from pipelines import open_store
from pipelines.corrupt import NAMES, corrupt

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
    return [Rows(x, y, i) for i, (x, y) in enumerate(zip(images.split(size), labels.split(size), strict=True))]


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8, generator=g)
    return images, torch.randint(0, 12, (37,), generator=g)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12)
    )
    dual = convert(plain)
    for norm in norms(dual):
        for side in (norm, norm.side("aux")):
            side.running_mean.normal_()
            side.running_var.uniform_(0.5, 2)
    return dual


def naive(model: nn.Module, images: Tensor, labels: Tensor, bn: str = "main", columns: list[int] | None = None) -> tuple:
    """One image at a time, in float64: the loss, and the place of the label's logit among all."""
    model = model.double().eval()
    norm = next(m for m in model.modules() if isinstance(m, DualBatchNorm2d)).side(bn)
    losses, places = [], []
    for image, label in zip(images, labels.tolist(), strict=True):
        x = (image.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
        x = model[0](x[None])
        stats = [t.double().view(1, -1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
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
    main, aux = (evaluate(model, batches(*data, 8), mean=MEAN, std=STD, bn=bn) for bn in ("main", "aux"))
    assert main.loss != aux.loss
    assert [m.training for m in model] == [False, True, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_cannot_be_evaluated(model, data):
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, [], mean=MEAN, std=STD)
    vanilla = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 12)), aux=False)
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
    assert (all_logits.loss, all_logits.top1, all_logits.top5) == (pytest.approx(expected[0], rel=1e-5), *expected[1:])
    expected = naive(model, images, labels, columns=label_map.tolist())
    assert (masked.loss, masked.top1, masked.top5) == (pytest.approx(expected[0], rel=1e-5), *expected[1:])
    assert masked.top5 > all_logits.top5
    with pytest.raises(ValueError, match=r"1 of 2 class folders.*'n02'"):
        match_classes(["n00000003", "n02"], classes)


def _rank(rank: int, world: int, port_file: str, model: nn.Module, images: Tensor, labels: Tensor, out) -> None:
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world)
    mine = [Rows(b.images[rank::world], b.labels[rank::world], b.step) for b in batches(images, labels, 8)]
    result = evaluate(model, mine, mean=MEAN, std=STD)
    out.put((result.loss, result.top1, result.top5, result.count))
    dist.destroy_process_group()


@pytest.mark.slow
def test_exact_across_ranks(model, data, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, 2, str(tmp_path / "meet"), model, *data, out)) for r in range(2)]
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
    errors = {name: dict.fromkeys(range(1, 6), 0.5) for name in ALEXNET_ERRORS} | {"fog": {s: s / 10 for s in range(1, 6)}}
    expected = {"mean", "raw_15", "mce"}
    assert summarise(errors).keys() == expected
    assert summarise(errors)["raw_15"] == pytest.approx((14 * 50 + 30) / 15)
    full = errors | {name: dict.fromkeys(range(1, 6), 1.0) for name in EXTRA}
    assert summarise(full)["raw_19"] == pytest.approx((14 * 50 + 30 + 4 * 100) / 19)
    assert summarise(full)["mce"] == summarise(errors)["mce"]
    assert summarise(errors | {"fog": {3: 0.1}}).keys() == {"mean"}


# ---------------------------------------------------------------------- the command

WNIDS = ["n01", "n02", "n03", "n04", "n05", "n06"]


def write_folder(path, names, per_class: int, side: tuple[int, int], change=lambda x: x, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = change(np.asarray(Image.fromarray(small).resize(side, Image.Resampling.BICUBIC)))
            Image.fromarray(image).save(path / name / f"{i}.JPEG", quality=95)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run's checkpoint and one small folder of each benchmark's layout."""
    at = tmp_path_factory.mktemp("eval")
    write_folder(at / "val", WNIDS, 3, (40, 36))
    for severity in (1, 2):
        write_folder(at / "c" / "fog" / str(severity), WNIDS, 2, (32, 32), lambda x, s=severity: corrupt(x, "fog", s))
    write_folder(at / "r", ["n02", "n05"], 4, (50, 33))
    write_folder(at / "stylized", WNIDS, 1, (32, 32))
    rng = np.random.default_rng(3)
    (at / "cifar").mkdir()
    np.save(at / "cifar" / "contrast.npy", rng.integers(0, 256, (35, 32, 32, 3), dtype=np.uint8))
    np.save(at / "cifar" / "labels.npy", np.tile(np.arange(7) % 6, 5).astype(np.uint8))
    config = make_config({
        "name": "tiny", "paper": {"top1": 76.5, "imagenet_r": 38.2},
        "model": {"name": "cifar_resnet8", "num_classes": 6}, "data": {"size": 32, "resize": 36},
    })  # fmt: skip
    torch.manual_seed(0)
    model = models.build("cifar_resnet8", 6, aux=True, size=32)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    meta = {"config": config.model_dump(mode="json"), "step": 5, "classes": WNIDS}
    checkpoint.save(at / "step_00000005.safetensors", state, meta)
    return at


def run(world, *arguments: str, out: str = "out") -> tuple[dict, str]:
    fixed = ["--data", str(world / "val"), "--device", "cpu", "--batch", "4", "--out", str(world / out)]
    cli.main([str(world / "step_00000005.safetensors"), *fixed, *arguments])
    (report,) = json.loads((world / out / "report.json").read_text())
    return report, (world / out / "report.md").read_text()


def test_every_set_of_the_command(world, capsys):
    folders = [("--imagenet-c", "c"), ("--imagenet-r", "r"), ("--stylized", "stylized"), ("--cifar10-c", "cifar")]
    report, text = run(world, "--corrupt", *(str(v) for k, f in folders for v in (k, world / f)))
    results = report["results"]
    counts = {key: result["count"] for key, result in results.items()}
    assert counts == {
        "clean": 18, **{f"computed/{n}/3": 18 for n in ("gaussian_noise", "defocus_blur", "contrast", "jpeg_compression")},
        "imagenet_c/fog/1": 12, "imagenet_c/fog/2": 12, "imagenet_r": 8, "stylized": 6,
        **{f"cifar10_c/contrast/{s}": 7 for s in range(1, 6)},
    }  # fmt: skip
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "computed here, not the published files" in text
    assert f"| top-1 accuracy | {100 * results['clean']['top1']:.2f} (paper 76.5) |" in text
    assert f"| ImageNet-R top-1 | {100 * results['imagenet_r']['top1']:.2f} (paper 38.2) |" in text
    assert results["imagenet_r"]["top5"] == 1  # of two classes
    assert (world / "out" / "report.png").stat().st_size > 10_000


def test_finished_sets_are_not_computed_again(world, monkeypatch):
    first, _ = run(world, "--corrupt", "fog", "contrast", "--severity", "2", out="again")
    calls = []
    monkeypatch.setattr(cli, "evaluate", lambda *a, **k: calls.append(a) or evaluate(*a, **k))
    second, _ = run(world, "--corrupt", "fog", "contrast", "snow", "--severity", "2", out="again")
    assert len(calls) == 1
    assert {k: v for k, v in second["results"].items() if "snow" not in k} == first["results"]
    run(world, "--seed", "1", out="again")
    assert len(calls) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["--data", "@/nowhere"], "nowhere"),
    (["--batch", "0"], "--batch 0"),
    (["--imagenet-c", "@/stylized"], "holds none of"),
    (["--imagenet-r", "@/c/fog"], "class folders are none of the model's 6 classes"),
    (["--stylized", "@/nowhere"], "nowhere"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_1(world, arguments, message):
    arguments = [a.replace("@", str(world)) for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        run(world, *arguments, out="mistakes")
    assert str(stopped.value.code).startswith("fap-eval: ")
    assert message in str(stopped.value.code)


def test_unknown_names_are_refused_before_anything_is_done(capsys):
    for arguments in (["--corrupt", "rain"], ["--corrupt", "fog", "--severity", "6"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["x.safetensors", "--data", "x", *arguments])
        assert f"invalid choice: {arguments[-1]!r}".replace("'6'", "6") in capsys.readouterr().err


@pytest.mark.slow
def test_kept_sets_are_built_once(world, monkeypatch):
    keep = ["--corrupt", "fog", "jpeg_compression", "--keep", str(world / "kept"), "--pipeline", "reference"]
    plain, _ = run(world, *keep[:-4], *keep[-2:], out="plain")
    kept, _ = run(world, *keep, out="kept1")
    assert kept["results"] == plain["results"]
    files = sorted((world / "kept").glob("*.beton"))
    assert [len(open_store(f)) for f in files] == [18, 18]
    assert open_store(files[0]).classes == tuple(WNIDS)
    monkeypatch.setattr(cli, "build", None)
    again, _ = run(world, *keep, out="kept2")
    assert again["results"] == plain["results"]
