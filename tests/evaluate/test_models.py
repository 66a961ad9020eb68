"""Models of any kind in one call of `fap-eval`: each is told by what it is, and scores as alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from safetensors.torch import save_file

from fap.checkpoint import DamagedCheckpoint
from fap.cli import eval as cli
from fap.cli.export import main as export
from fap.cli.predict import main as predict
from fap.evaluate import report
from fap.evaluate.models import Model, is_plain, model_of
from fap.nets.build import build
from tests.evaluate.world import CHECKPOINT, WNIDS, counted, no_plot, write_checkpoint

Capture = pytest.CaptureFixture[str]
MODEL = ("model.name=cifar_resnet8", "data.size=32", "data.resize=36")
HUB = "hf-hub:me/mine"


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every kind. Nothing can be fetched: caches hold what is published."""
    at = tmp_path_factory.mktemp("models")
    (at / "run" / "checkpoints").mkdir(parents=True)
    write_checkpoint(at / "run" / "checkpoints" / CHECKPOINT, WNIDS)
    write_checkpoint(at / CHECKPOINT, WNIDS, seed=1)
    torch.manual_seed(2)
    bare = build("cifar_resnet8", 6, aux=False, size=32).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in bare.items()}, at / "a.safetensors")
    torch.save({"state_dict": bare}, at / "b.pth")
    assert export([str(at / CHECKPOINT), str(at / "exported.safetensors")]) == 0
    assert export([str(at / CHECKPOINT), str(at / "folder")]) == 0

    snapshot = at / "hub" / "models--me--mine" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    state = timm.create_model("test_resnet", num_classes=6).state_dict()
    save_file(dict(state), snapshot / "model.safetensors")
    cfg = {"input_size": [3, 40, 40], "crop_pct": 0.8, "mean": [0.1, 0.2, 0.3],
           "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}  # fmt: skip
    config = {"architecture": "test_resnet", "num_classes": 6, "pretrained_cfg": cfg}
    (snapshot / "config.json").write_text(json.dumps(config))

    published = at / "torch" / "hub" / "checkpoints"
    published.mkdir(parents=True)
    squeezed = torchvision.models.squeezenet1_1()
    torch.save(squeezed.state_dict(), published / "squeezenet1_1-b8a52dc0.pth")
    (at / "names.txt").write_text("\n".join(WNIDS))
    others = [f"other {i}" for i in range(1000 - len(WNIDS))]
    (at / "thousand.txt").write_text("\n".join([*WNIDS, *others]))
    return at


@pytest.fixture(autouse=True)
def caches(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    monkeypatch.setattr(report, "_plot", no_plot)
    monkeypatch.setattr(report, "_confusion_plot", no_plot)


def evaluated(world: Path, out: Path, *words: str) -> list[dict[str, Any]]:
    fixed = ["--data", str(world / "val"), "--device", "cpu", "--batch", "4", "--out", str(out)]
    assert cli.main([*words, *fixed, "--labels-by-position"]) == 0
    return json.loads((out / "report.json").read_text())


def test_a_mixed_call_gives_each_the_numbers_it_has_alone(
    world: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own size, mean and std, its own words, and its labels by its own names."""
    run, file = str(place / "run"), str(place / CHECKPOINT)
    bare = [str(place / "a.safetensors"), *MODEL, "model.num_classes=6"]
    pickled = [str(place / "b.pth"), "model.name=cifar_resnet8", "model.num_classes=6"]
    pickled.append("data.size=40")
    published = ["torchvision:squeezenet1_1", f"classes={place / 'thousand.txt'}"]
    calls = counted(monkeypatch)
    with_words = [word for one in (published, bare, pickled) for word in ("--model", *one)]
    mixed = evaluated(world, tmp_path / "mixed", run, file, HUB, *with_words)
    means = [tuple(call["mean"]) for call in calls]
    checkpoint = str(place / "run" / "checkpoints" / CHECKPOINT)
    order = [checkpoint, file, HUB, published[0], bare[0], pickled[0]]
    assert [found["checkpoint"] for found in mixed] == order

    alone = [
        evaluated(world, tmp_path / "0", run),
        evaluated(world, tmp_path / "1", file),
        evaluated(world, tmp_path / "2", HUB),
        evaluated(world, tmp_path / "3", published[0], "--classes", str(place / "thousand.txt")),
        evaluated(world, tmp_path / "4", bare[0], "--plain", *bare[1:]),
        evaluated(world, tmp_path / "5", "--model", *pickled),
    ]
    assert [found["results"] for found in mixed] == [found["results"] for (found,) in alone]
    assert [tuple(call["mean"]) for call in calls[len(mixed) :]] == means
    assert len(set(means)) == 3  # a run's, ImageNet's, the Hub's model's
    losses = [found["results"]["clean"]["loss"] for found in mixed]
    assert len(set(losses)) == len(losses)
    known = [found["training"] is not None for found in mixed]
    assert known == [True, True, False, False, False, False]
    table = (tmp_path / "mixed" / "report.md").read_text()
    assert (
        "| tiny, seed 0, step 5 [1] | tiny, seed 0, step 5 [2] | hf-hub-me-mine | torchvision-"
        in table
    )


def test_words_of_plain_are_for_all_plain_weights_and_for_no_run(
    world: Path, place: Path, tmp_path: Path
) -> None:
    names = [str(place / name) for name in ("run", "a.safetensors", "b.pth")]
    words = ["--plain", *MODEL, "--classes", str(place / "names.txt")]
    run, first, second = evaluated(world, tmp_path / "out", *names, *words)
    assert first["results"] == second["results"] != run["results"]
    # Models may stand on both sides of the options.
    again = evaluated(world, tmp_path / "out", "--seed", "0", *names, *words)
    assert [found["results"] for found in again] == [run["results"], *[first["results"]] * 2]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("run", False),
        ("run/checkpoints", False),
        (CHECKPOINT, False),
        ("a.safetensors", True),
        ("b.pth", True),
        ("exported.safetensors", True),
        ("folder", True),
    ],
)
def test_a_model_is_told_by_what_it_is(place: Path, name: str, plain: bool) -> None:
    """Whatever it is called."""
    assert is_plain(str(place / name)) == plain
    if (place / name).is_file():
        shutil.copy(place / name, place / "renamed")
        assert is_plain(str(place / "renamed")) == plain
    found = model_of(str(place / name), words=MODEL, classes=tuple(WNIDS), weights="raw")
    assert found.is_plain == plain
    if plain:
        assert found == Model(place / name, MODEL, tuple(WNIDS))
    else:
        assert found.source.name == CHECKPOINT
        assert found.words is None
        assert found.weights == "raw"


def said(capsys: Capture, world: Path, *words: str) -> str:
    """The one line of a command that ends with exit code 1."""
    capsys.readouterr()
    assert cli.main([*words, "--data", str(world / "val"), "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fap-eval: ")
    return line


def test_what_is_no_model_is_said(
    world: Path, place: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = tmp_path / "text.pth"
    text.write_text("hello")
    names, more = str(place / "names.txt"), str(place / "thousand.txt")
    for words, message in (
        (["torchvison:resnet18"], "; did you mean torchvision:resnet18?"),
        (["tim:test_resnet"], "; did you mean timm:test_resnet?"),
        (["hf_hub:me/mine"], "; did you mean hf-hub:me/mine?"),
        (["resnet18"], "; did you mean torchvision:resnet18 or timm:resnet18?"),
        (["runs/nowhere"], "runs/nowhere: no such file or folder; give a run's folder"),
        ([str(text)], "text.pth: neither a safetensors file"),
        ([str(tmp_path)], "is no folder of a run"),
        (["torchvision:resnet1"], "did you mean"),
        (["--model", HUB, "fog"], f"--model {HUB}: 'fog' is no KEY=VALUE"),
        (["--model", str(place / "run"), "data.size=3"], "data.size=3: a run has its own config"),
        ([str(place / "run"), "--plain", "data.size=3"], "is plain weights"),
        (["--model", HUB, "--plain", "data.size=3"], "(there are none) is plain weights"),
        ([HUB, "--best"], "--best is about a run's checkpoints"),
        ([HUB, "--weights", "raw"], "--weights is about a run's checkpoints"),
        ([str(place / "run"), "--classes", str(place / "names.txt")], "about plain weights"),
        (["--classes", names, "--model", HUB, f"classes={names}s"], "names.txts"),
        (["--classes", more, "--model", HUB, f"classes={names}"], "--classes is about plain"),
        (
            [HUB, "--plain", "model.name=cifar_resnet8", "--labels-by-position"],
            "the weights say that they are of timm/test_resnet: with --model SOURCE KEY=VALUE",
        ),
    ):
        assert message in said(capsys, world, *words)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--data", str(world / "val")])
    assert "give at least one MODEL" in capsys.readouterr().err
    assert cli.main([HUB, str(place / "run")]) == 1
    assert f"{HUB}: give --data" in capsys.readouterr().err


def test_a_torn_checkpoint_is_still_a_runs(place: Path, tmp_path: Path) -> None:
    """Not weights that lack a word."""
    torn = tmp_path / CHECKPOINT
    torn.write_bytes((place / CHECKPOINT).read_bytes()[:-100])
    assert not is_plain(str(torn))
    with pytest.raises(DamagedCheckpoint):
        model_of(str(torn)).load()


def test_predictions_need_no_plain_either(world: Path, place: Path, tmp_path: Path) -> None:
    outs = []
    for name in (CHECKPOINT, "exported.safetensors"):
        outs.append(tmp_path / f"{name}.csv")
        words = [str(place / name), str(world / "val"), "--device", "cpu", "--out", str(outs[-1])]
        assert predict([*words, "--pipeline", "reference"]) == 0
    assert outs[0].read_text() == outs[1].read_text()
