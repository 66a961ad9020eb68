"""Every image counts once, in the right mode, whatever the batch and the number of ranks."""

from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fap.evaluate.exact import evaluate
from fap.nets.dual import convert, norms
from fap.nets.norm import DualBatchNorm2d
from fap.tasks.base import Result
from fap.tasks.classification import Accuracy
from fap.tasks.labels import match_classes
from tests.tasks.test_classification import naive_ece

MEAN = (0.4, 0.5, 0.6)
STD = (0.2, 0.3, 0.4)
N_CLASSES = 12
CPU = torch.device("cpu")


def pairs(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of one size; the last is filled with zero images of label -1."""
    short = -len(images) % size
    images = torch.cat([images, images.new_zeros(short, *images.shape[1:])])
    labels = torch.cat([labels, labels.new_full((short,), -1)])
    return list(zip(images.split(size), labels.split(size), strict=True))


def reached(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    bn: str = "main",
    label_map: Tensor | None = None,
    restrict: bool = False,
) -> Result:
    evaluator = Accuracy(CPU, label_map, restrict)
    return evaluate(model, batches, evaluator, mean=MEAN, std=STD, bn=bn)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8, generator=g)
    return images, torch.randint(0, N_CLASSES, (37,), generator=g)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, N_CLASSES),
    )
    dual = convert(plain)
    for norm in norms(dual):
        for branch in (norm, norm.branch("aux")):
            branch.running_mean.normal_()
            branch.running_var.uniform_(0.5, 2)
    return dual


def naive(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    bn: str = "main",
    columns: list[int] | None = None,
) -> tuple[float, float, float, float]:
    """One image at a time, in float64.

    Loss, top-1 and top-5 by the place of the label's logit, calibration error.
    """
    model = model.double().eval()
    norm = next(m for m in model.modules() if isinstance(m, DualBatchNorm2d)).branch(bn)
    mean, var, weight, bias = (
        tensor.double().view(1, -1, 1, 1)
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    pixel_mean = torch.tensor(MEAN).double().view(3, 1, 1)
    pixel_std = torch.tensor(STD).double().view(3, 1, 1)
    losses = []
    places = []
    confidences = []
    for image, label in zip(images, labels.tolist(), strict=True):
        x = (image.double() / 255 - pixel_mean) / pixel_std
        x = model[0](x[None])
        x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        logits = model[5](x.clamp(min=0).mean((2, 3)))[0]
        if columns is not None:
            logits = logits[columns]
        losses.append(-torch.log_softmax(logits, 0)[label].item())
        places.append(int((logits > logits[label]).sum()))
        confidences.append(logits.softmax(0).max().item())
    model.float()
    ece = naive_ece(confidences, [place < 1 for place in places])
    return np.mean(losses), np.mean(np.array(places) < 1), np.mean(np.array(places) < 5), ece


@pytest.mark.parametrize("bn", ["main", "aux"])
@pytest.mark.parametrize("size", [1, 5, 16, 37, 64])
def test_every_image_once_whatever_the_batch(
    model: nn.Module, data: tuple[Tensor, Tensor], size: int, bn: str
) -> None:
    result = reached(model, pairs(*data, size), bn)
    loss, top1, top5, ece = naive(model, *data, bn=bn)
    assert result == {
        "loss": pytest.approx(loss, rel=1e-5),
        "top1": top1,
        "top5": top5,
        "ece": pytest.approx(ece, rel=1e-5),
        "count": 37,
    }


def test_main_and_aux_differ_and_modes_are_restored(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    model.train()
    model[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    main = reached(model, pairs(*data, 8), "main")
    aux = reached(model, pairs(*data, 8), "aux")
    assert main["loss"] != aux["loss"]
    assert [m.training for m in model] == [False, True, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_cannot_be_evaluated(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="no images"):
        reached(model, [])
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, N_CLASSES)]
    vanilla = convert(nn.Sequential(*layers), aux=False)
    with pytest.raises(ValueError, match="aux"):
        reached(vanilla, pairs(*data, 8), "aux")


def test_fewer_than_five_classes(data: tuple[Tensor, Tensor]) -> None:
    images = data[0]
    labels = data[1] % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert reached(model, pairs(images, labels, 8))["top5"] == 1


def test_classes_of_a_folder_and_the_mask_of_imagenet_r(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    classes = [f"n{i:08d}" for i in range(N_CLASSES)]
    folders = ["n00000003", "n00000004", "n00000007", "n00000011", "n00000001", "n00000009"]
    label_map = match_classes(folders, classes)
    assert label_map.tolist() == [3, 4, 7, 11, 1, 9]
    images = data[0]
    labels = data[1] % 6
    all_logits = reached(model, pairs(images, labels, 8), label_map=label_map)
    masked = reached(model, pairs(images, labels, 8), label_map=label_map, restrict=True)
    loss, top1, top5, ece = naive(model, images, label_map[labels])
    assert all_logits["loss"] == pytest.approx(loss, rel=1e-5)
    assert all_logits["ece"] == pytest.approx(ece, rel=1e-5)
    assert (all_logits["top1"], all_logits["top5"]) == (top1, top5)
    loss, top1, top5, ece = naive(model, images, labels, columns=label_map.tolist())
    assert masked["loss"] == pytest.approx(loss, rel=1e-5)
    assert masked["ece"] == pytest.approx(ece, rel=1e-5)
    assert (masked["top1"], masked["top5"]) == (top1, top5)
    assert masked["top5"] > all_logits["top5"]


def _rank(
    rank: int,
    world: int,
    meeting: str,  # a file
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    out: "SimpleQueue[Result]",
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    mine = [(x[rank::world], y[rank::world]) for x, y in pairs(images, labels, 8)]
    out.put(reached(model, mine))
    dist.destroy_process_group()


@pytest.mark.slow
def test_exact_across_ranks(model: nn.Module, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(rank, 2, str(tmp_path / "meet"), model, *data, out))
        for rank in range(2)
    ]
    torch.set_num_threads(1)
    for process in ranks:
        process.start()
    results = [out.get() for _ in ranks]
    for process in ranks:
        process.join()
    one = reached(model, pairs(*data, 8))
    assert results[0] == results[1]
    assert results[0] == one | {
        name: pytest.approx(one[name], rel=1e-6) for name in ("loss", "ece")
    }
    assert results[0]["count"] == 37
