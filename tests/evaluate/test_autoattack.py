"""AutoAttack by its authors' package, as an attack of `fap-eval` like the others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fap.evaluate import autoattack
from fap.evaluate.attack_options import attacks_of
from fap.evaluate.attacks import LinfAttack, evaluate_attacked
from fap.evaluate.autoattack import AutoAttack
from fap.evaluate.exact import forward
from fap.tasks.base import Result
from fap.tasks.classification import Accuracy
from tests.evaluate.world import refused, run, write_checkpoint, write_folder

pytest.importorskip("pyautoattack")

CPU = torch.device("cpu")
N_CLASSES = 5
N_IMAGES = 24
EPS = 12
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def drawn() -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, 4, 4): a colour for each class, under noise that hides it from some."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(N_IMAGES) % N_CLASSES
    colours = torch.randint(70, 186, (N_CLASSES, 3, 1, 1), generator=g)
    noise = torch.randint(-40, 41, (N_IMAGES, 3, 4, 4), generator=g)
    return (colours[labels] + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model that is right about most of the images."""
    images, labels = drawn()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, N_CLASSES))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(80):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images / 255), labels).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model


def attack(method: str, eps: float = EPS) -> LinfAttack:
    (found,) = attacks_of([method], [str(eps)], step=None, restarts=None, seed=0)
    return found


def reached(model: nn.Module, one: LinfAttack) -> Result:
    """Six rows of padding are in the last batch."""
    images, labels = drawn()
    images = torch.cat([images, images.new_zeros(6, 3, 4, 4)]).split(15)
    labels = torch.cat([labels, labels.new_full((6,), -1)]).split(15)
    numbers = torch.arange(30, dtype=torch.int32).split(15)
    batches = zip(images, labels, numbers, strict=True)
    return evaluate_attacked(
        model, batches, Accuracy(CPU, None, restrict=False), one, label_map=None, **IDENTITY
    )


@pytest.mark.slow
def test_it_is_never_weaker_than_pgd_and_leaves_no_trace(trained: nn.Module) -> None:
    clean = reached(trained, attack("pgd1", 0))
    pgd = reached(trained, attack("pgd20"))
    before = torch.get_rng_state()
    found = reached(trained, attack("autoattack"))
    assert found["count"] == N_IMAGES
    assert clean["top1"] > pgd["top1"] > 0  # it is no comparison of nothing with nothing
    assert found["top1"] <= pgd["top1"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())


def test_its_images_are_in_the_ball_and_fool(trained: nn.Module) -> None:
    images, labels = drawn()
    clean = images.float()
    outputs_of = forward(trained, **IDENTITY)
    numbers = torch.arange(len(clean), dtype=torch.int32)
    labels[5] = -1
    one = attack("autoattack", 40)
    for parameter in trained.parameters():
        parameter.requires_grad_(False)
    calls: list[None] = []
    (found,) = one.candidates(outputs_of, clean, labels, numbers, lambda: calls.append(None))
    (again,) = one.candidates(outputs_of, clean, labels, numbers)
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    assert torch.equal(found, again)
    assert torch.equal(found[5], clean[5])
    assert 30 < (found - clean).abs().max() <= 40
    assert found.min() >= 0
    assert found.max() <= 255
    with torch.no_grad():
        right = (outputs_of(found).argmax(1) == labels).float().mean()
    assert right < 0.2
    assert len(calls) > 1


def test_without_strength_nothing_is_attacked(trained: nn.Module) -> None:
    assert reached(trained, attack("autoattack", 0)) == reached(trained, attack("pgd1", 0))


def test_its_origin_names_the_packages_version() -> None:
    one = attack("autoattack", 4)
    assert isinstance(one, AutoAttack)
    assert one.origin()["pyautoattack"] == autoattack.package().__version__
    assert one.key == "attack/autoattack/4"


def test_the_command_takes_it(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At eps 0, where it takes no time; a model of three classes is refused."""
    words = ["--attack", "autoattack", "--eps", "0"]
    found, text = run(world, *words, out="autoattack")
    assert found["results"]["attack/autoattack/0"] == found["results"]["clean"]
    assert "autoattack: standard version" in text
    names = ["a", "b", "c"]
    write_folder(world / "three", names, 1, (32, 32))
    write_checkpoint(world / "three.safetensors", names, 3)
    line = refused(capsys, world, *words, model="three.safetensors", data="three", out="three_out")
    assert "--attack autoattack: needs a model of at least 4 classes" in line
