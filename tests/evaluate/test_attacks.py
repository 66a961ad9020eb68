"""Attacks of an evaluation: against a slow twin, closed forms, and what must not matter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fap.evaluate import evaluation
from fap.evaluate.attack_options import attacks_of
from fap.evaluate.attacked import chosen
from fap.evaluate.attacks import LinfAttack, evaluate_attacked, pgd, random_start, start_keys, worst
from fap.evaluate.exact import evaluate, forward
from fap.nets.dual import convert, norms
from fap.tasks.base import Result
from fap.tasks.classification import Accuracy
from tests.evaluate.world import WNIDS, counted, refused, run, write_folder

MEAN = (0.4, 0.5, 0.6)
STD = (0.2, 0.3, 0.4)
N_CLASSES = 5
N_IMAGES = 17
CPU = torch.device("cpu")


def one_attack(method: str, eps: float, **options: Any) -> LinfAttack:
    given = {"step": None, "restarts": None, "seed": 0} | options
    (attack,) = attacks_of([method], [str(eps)], **given)
    return attack


def drawn_images(count: int = N_IMAGES, side: int = 8) -> tuple[Tensor, Tensor]:
    """uint8 (count, 3, side, side), black and white pixels among them, and labels."""
    images = torch.randint(-40, 296, (count, 3, side, side)).clamp(0, 255).to(torch.uint8)
    return images, torch.randint(0, N_CLASSES, (count,))


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The last one is filled with zero images of label -1, as an evaluation's plan does it."""
    short = -len(images) % size
    images = torch.cat([images, images.new_zeros(short, *images.shape[1:])])
    labels = torch.cat([labels, labels.new_full((short,), -1)])
    numbers = torch.arange(len(images), dtype=torch.int32)
    yield from zip(images.split(size), labels.split(size), numbers.split(size), strict=True)


def reached(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    attack: LinfAttack,
    size: int = 8,
    bn: str = "main",
    label_map: Tensor | None = None,
) -> Result:
    evaluator = Accuracy(CPU, label_map, restrict=False)
    return evaluate_attacked(
        model,
        batches(*data, size),
        evaluator,
        attack,
        label_map=label_map,
        mean=MEAN,
        std=STD,
        bn=bn,
    )


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return drawn_images()


@pytest.fixture
def model() -> nn.Module:
    """A converted one whose main and auxiliary norms have different statistics."""
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten()]
    dual = convert(nn.Sequential(*layers, nn.Linear(6 * 36, N_CLASSES)))
    for norm in norms(dual):
        for branch in (norm, norm.branch("aux")):
            branch.running_mean.normal_()
            branch.running_var.uniform_(0.5, 2)
    return dual


class Linear(nn.Module):
    """Two classes: 0, and w x + b, of images that forward() normalised by 0 and 1/255."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * side * side))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], 1)


# ---------------------------------------------------------------------- twins and closed forms


def twin(
    model: nn.Module, image: Tensor, label: int, start: Tensor, steps: int, step: float, eps: float
) -> Tensor:
    """PGD on one image (3, H, W), pixel by pixel as it is defined, in float64."""
    mean = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    x = start.clone()
    for _ in range(steps):
        x.requires_grad_()
        logits = model(((x / 255 - mean) / std)[None])[0]
        loss = logits.exp().sum().log() - logits[label]
        (slope,) = torch.autograd.grad(loss, x)
        moved = []
        for old, centre, g in zip(
            x.detach().flatten().tolist(),
            image.flatten().tolist(),
            slope.flatten().tolist(),
            strict=True,
        ):
            new = old + step * ((g > 0) - (g < 0))
            new = min(max(new, centre - eps), centre + eps)
            moved.append(min(max(new, 0), 255))
        x = torch.tensor(moved, dtype=torch.float64).view(image.shape)
    return x


@pytest.mark.parametrize(("steps", "step", "eps"), [(1, 3.0, 3.0), (4, 1.0, 2.5), (6, 2.5, 4.0)])
def test_pgd_equals_the_twin(
    model: nn.Module, data: tuple[Tensor, Tensor], steps: int, step: float, eps: float
) -> None:
    model.double().eval()
    images = data[0].double()
    start = (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 255)
    outputs_of = forward(model, mean=MEAN, std=STD)
    found = pgd(
        outputs_of, images, data[1], start, steps=steps, step_255=step, eps_255=eps
    )  # fmt: skip
    for i, label in enumerate(data[1].tolist()):
        expected = twin(model, images[i], label, start[i], steps, step, eps)
        assert (found[i] - expected).abs().max() < 1e-9
    assert (found - start).abs().max() > 0.9 * step


@pytest.mark.parametrize("method", ["fgsm", "pgd20"])
def test_the_worst_case_of_a_linear_model_is_found(method: str) -> None:
    """It is known: every pixel moves by eps against its weight's sign, as far as pixels reach."""
    model = Linear(side=4)
    images, _ = drawn_images(60, side=4)
    weight = model.weight.detach().double()
    pixels = images.double().flatten(1)
    with torch.no_grad():  # boundaries through the cloud of images
        model.bias.copy_(-(pixels @ weight).mean() / 255)
    bias = model.bias.item()
    labels = (pixels @ weight / 255 + bias > 0).long()
    accuracies = []
    for eps in (0, 1, 4, 16, 64):
        away = torch.where(labels == 1, -1.0, 1.0)[:, None] * weight.sign()
        scores = (pixels + eps * away).clamp(0, 255) @ weight / 255 + bias
        margins = torch.where(labels == 1, scores, -scores)
        evaluator = Accuracy(CPU, None, restrict=False)
        found = evaluate_attacked(
            model,
            batches(images, labels, 16),
            evaluator,
            one_attack(method, eps),
            label_map=None,
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )
        assert found["top1"] == pytest.approx((margins > 0).double().mean().item())
        loss = torch.nn.functional.softplus(-margins).mean().item()
        assert found["loss"] == pytest.approx(loss, rel=1e-4)
        accuracies.append(found["top1"])
    assert accuracies[0] == 1
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < 0.5


def test_a_gradient_that_float32_rounds_to_nothing_is_followed() -> None:
    """A model that is very sure is no robust model."""
    model = Linear(side=4)
    images = torch.full((1, 3, 4, 4), 128.0)
    with torch.no_grad():
        model.bias.fill_(30.0 - float(images.flatten() @ model.weight) / 255)
    outputs_of = forward(model, mean=(0, 0, 0), std=(1, 1, 1))
    found = pgd(outputs_of, images, torch.tensor([1]), images, steps=1, step_255=2, eps_255=2)
    assert torch.equal((found - images).flatten(), -2 * model.weight.detach().sign())


def test_without_strength_it_is_the_clean_accuracy(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    pairs = [(images, labels) for images, labels, _ in batches(*data, 8)]
    clean = evaluate(model, pairs, Accuracy(CPU, None, restrict=False), mean=MEAN, std=STD)
    for method in ("fgsm", "pgd3"):
        assert reached(model, data, one_attack(method, 0)) == clean


# ---------------------------------------------------------------------- what an image counts as


def test_an_image_is_right_only_if_it_is_right_clean_and_under_every_attack() -> None:
    """Rows: right throughout; wrong clean; wrong in the first attack; wrong in the second."""
    labels = torch.tensor([0, 0, 0, 0])
    right, surer, wrong = ([1.0, 0], [2.0, 0], [0, 1.0])
    trials = iter([
        torch.tensor([surer, wrong, right, right]),
        torch.tensor([right, right, wrong, right]),
        torch.tensor([surer, surer, surer, wrong]),
    ])  # fmt: skip
    images = torch.zeros(4, 3, 1, 1)
    found = worst(lambda _: next(trials), images, labels, [images, images])
    assert found.tolist() == [right, wrong, wrong, wrong]


def test_more_restarts_never_help_the_model(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    losses = [
        reached(model, data, one_attack("pgd2", 8, restarts=restarts))["loss"]
        for restarts in (1, 2, 4)
    ]
    assert losses[0] < losses[1] < losses[2]


def test_the_batch_does_not_matter(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    attack = one_attack("pgd3", 4, restarts=2)
    one, other = (reached(model, data, attack, size) for size in (3, 7))
    assert one["count"] == N_IMAGES
    assert one == other | {name: pytest.approx(other[name]) for name in other}
    elsewhere = reached(model, data, one_attack("pgd3", 4, restarts=2, seed=1))
    assert elsewhere["loss"] != pytest.approx(one["loss"], rel=1e-9)


def test_the_attack_goes_through_the_norms_that_are_evaluated(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    attack = one_attack("pgd3", 4)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = {bn: reached(model, data, attack, bn=bn)["loss"] for bn in ("main", "aux")}
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    # The same as on a model that has these norms alone.
    for norm in norms(model):
        norm.running_mean, norm.running_var = norm.aux.running_mean, norm.aux.running_var
    assert reached(model, data, attack)["loss"] == pytest.approx(losses["aux"])
    assert losses["main"] != losses["aux"]


def test_labels_are_attacked_as_the_models_classes(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    images, labels = data
    label_map = torch.tensor([3, 0, 4, 1, 2])
    attack = one_attack("pgd3", 4)
    mapped = reached(model, (images, labels), attack, label_map=label_map)
    assert mapped == reached(model, (images, label_map[labels]), attack)


# ---------------------------------------------------------------------- random starts and images


def test_random_starts_fill_the_ball_and_are_those_of_the_image() -> None:
    clean = torch.full((40, 3, 8, 8), 100.0)
    clean[0] = 255
    numbers = torch.arange(40, dtype=torch.int32)
    start = random_start(clean, start_keys(0, 0, numbers), 4.0)
    assert start[0].max() == 255
    moved = (start - clean)[1:]
    counts = torch.histc(moved, bins=8, min=-4, max=4) / moved.numel()
    assert counts.sum() == pytest.approx(1)
    assert counts.min() > 0.11  # of 0.125
    some = numbers[[7, 3]]
    again = random_start(clean[[7, 3]], start_keys(0, 0, some), 4.0)
    assert torch.equal(again, start[[7, 3]])
    keys = [start_keys(seed, restart, numbers) for seed in (0, 1) for restart in (0, 1)]
    assert len(torch.cat(keys).unique()) == 160


def test_the_images_are_drawn_whatever_their_order() -> None:
    few = chosen(1000, 50)
    assert len(set(few.tolist())) == 50
    assert np.array_equal(few, np.sort(few))
    assert set(few) < set(chosen(1000, 60))
    for part in np.bincount(few // 250, minlength=4), np.bincount(few % 4, minlength=4):
        assert part.min() > 3  # sorted by class or class after class: no class is left out
    assert np.array_equal(chosen(20, 1000), np.arange(20))


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def at(world: Path) -> Path:
    write_folder(world / "few", WNIDS, 2, (32, 32), seed=4)
    return world


def test_the_command_attacks(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = attacked(monkeypatch)
    words = ["--attack", "fgsm", "pgd2", "--attack-images", "5", "--restarts", "2"]
    found, text = run(at, *words, data="few", out="attacks")
    results = found["results"]
    keys = ["attack/fgsm/1", "attack/fgsm/4", "attack/pgd2/1", "attack/pgd2/4"]
    assert [*results] == ["clean", *keys]
    assert all(results[key]["count"] == 5 for key in keys)
    assert results["attack/pgd2/1"]["loss"] < results["attack/pgd2/4"]["loss"]
    accuracy = 100 * results["attack/pgd2/4"]["top1"]
    assert f"| accuracy under PGD-2, eps 4 / 255 | {accuracy:.2f} |" in text
    assert "on 5 of the clean images" in text
    assert (
        "(fgsm: 1 step of eps, no random start; pgd2: 2 steps of 1.25 eps, 2 random starts)" in text
    )
    assert "attack: 4 sets of 5 images" in capsys.readouterr().err
    assert len(calls) == 4
    again, _ = run(at, *words, data="few", out="attacks")
    assert again["results"] == results
    assert len(calls) == 4
    run(at, *words, "--eps", "1", "0.5", data="few", out="attacks")
    assert [attack.key for attack in calls[4:]] == ["attack/fgsm/0.5", "attack/pgd2/0.5"]
    for other in (
        ["--seed", "3"],
        ["--attack-step", "0.25"],
        ["--bn", "aux"],
        ["--restarts", "3"],
        ["--attack-images", "4"],
    ):
        calls.clear()
        run(at, *words[:1], "pgd2", *words[3:], "--eps", "1", *other, data="few", out="attacks")
        assert len(calls) == 1, other


def attacked(monkeypatch: pytest.MonkeyPatch) -> list[LinfAttack]:
    """The attacks that are computed from here on."""
    calls: list[LinfAttack] = []

    def counting(model: Any, pairs: Any, evaluator: Any, attack: LinfAttack, **options: Any) -> Any:
        calls.append(attack)
        return evaluate_attacked(model, pairs, evaluator, attack, **options)

    monkeypatch.setattr(evaluation, "evaluate_attacked", counting)
    return calls


def test_eps_0_is_clean_whatever_is_left_out_of_the_folder(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    found, _ = run(at, "--attack", "pgd1", "--eps", "0", data="few", out="zero")
    assert len(calls) == 1  # the clean images; the attack is no plain evaluation
    assert found["results"]["attack/pgd1/0"] == found["results"]["clean"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--attack", "pgd"], "--attack pgd: must be fgsm, pgd<K>"),
    (["--attack", "pgd0"], "--attack pgd0: must be"),
    (["--attack", "pgd99999"], "--attack pgd99999: must have at most 10,000 steps"),
    (["--attack", "fgsm", "--eps", "4/255"], "--eps 4/255: must be grey levels"),
    (["--attack", "fgsm", "--eps", "-1"], "--eps -1: must be grey levels"),
    (["--attack", "fgsm", "--eps", "nan"], "--eps nan: must be grey levels"),
    (["--attack", "pgd2", "--restarts", "0"], "--restarts 0"),
    (["--attack", "pgd2", "--attack-step", "0"], "--attack-step 0"),
    (["--attack", "fgsm", "--restarts", "2"], "--restarts is about pgd<K>"),
    (["--attack", "fgsm", "--attack-step", "2"], "--attack-step is about pgd<K>"),
    (["--attack", "fgsm", "--attack-images", "0"], "--attack-images 0"),
])  # fmt: skip
def test_mistakes_are_one_line(
    at: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, at, *arguments, out="mistakes")
    assert not (at / "mistakes").exists()


@pytest.mark.parametrize("option", ["--eps", "--attack-step", "--restarts", "--attack-images"])
def test_options_of_an_attack_alone_are_refused(
    at: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(at, option, "1")
    assert f"{option} is about --attack, which is not given" in capsys.readouterr().err
