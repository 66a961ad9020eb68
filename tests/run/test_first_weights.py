"""A run that starts from weights (`model.init`): what arrives in it, what they settle, a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from huggingface_hub import constants

from fap.config import load_config
from fap.distributed import Ranks
from fap.nets.build import plain
from fap.run.train import Run
from tests.run.wiring import BASE, CLASSES, Seen, observe

MEAN = [0.1, 0.2, 0.3]
SHORT = ("run.max_steps=2",)


@pytest.fixture
def start_from(files: dict[str, Path], tmp_path: Path) -> Callable[..., Seen]:
    """A run of two steps that starts from a file of that name in `tmp_path`."""

    def run(name: str, *words: str, runs: str = "runs") -> Seen:
        init = f"model.init={tmp_path / name}"
        return observe([init, *SHORT, *words], files, tmp_path / runs)

    return run


def weights(n_classes: int = CLASSES) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return plain("cifar_resnet8", n_classes).state_dict()


def test_the_format_of_a_file_changes_nothing(
    start_from: Callable[..., Seen], tmp_path: Path
) -> None:
    safetensors.torch.save_file(weights(), tmp_path / "x.safetensors")
    torch.save({"state_dict": weights(), "epoch": 3}, tmp_path / "x.pth")
    safe = start_from("x.safetensors", runs="safe/runs")
    pickled = start_from("x.pth", runs="pickled/runs")
    assert safe.error == pickled.error == ""
    assert torch.equal(safe.weights[0], pickled.weights[0])
    assert torch.equal(safe.weights[-1], pickled.weights[-1])
    assert "its 'state_dict' is taken" in pickled.said


def test_what_the_weights_say_reaches_step_and_evaluation(
    start_from: Callable[..., Seen], tmp_path: Path
) -> None:
    header = {"mean": str(MEAN), "interpolation": '"bicubic"', "size": "64", "resize": "80"}
    safetensors.torch.save_file(weights(), tmp_path / "x.safetensors", header)
    seen = start_from("x.safetensors", "data.resize=13")
    assert seen.run is not None
    data = seen.run.config.data
    assert (data.mean, data.size, data.resize) == (tuple(MEAN), 8, 13)
    assert seen.evaluations[0]["mean"] == tuple(MEAN)
    assert "they settle data.mean = [0.1, 0.2, 0.3], data.eval_filter = bicubic" in seen.said
    assert "was trained with 64 px, but data.size = 8" in seen.said
    assert "evaluation shorter side 13, centre 8, bicubic filter" in seen.said
    # What is saved is what was settled.
    saved = yaml.safe_load((seen.run.folder / "config.yaml").read_text())
    assert (saved["data"]["mean"], saved["data"]["eval_filter"]) == (MEAN, "bicubic")
    # And what is set stays.
    other = start_from("x.safetensors", "data.mean=[0.5,0.5,0.5]", runs="other/runs")
    assert other.evaluations[0]["mean"] == (0.5, 0.5, 0.5)
    assert "warning: model.init" in other.said
    assert not torch.equal(other.weights[-1], seen.weights[-1])


def test_such_a_run_resumes_bit_for_bit(start_from: Callable[..., Seen], tmp_path: Path) -> None:
    safetensors.torch.save_file(weights(7), tmp_path / "x.safetensors", {"mean": str(MEAN)})
    whole = start_from("x.safetensors", "run.max_steps=6", runs="whole/runs")
    assert f"head of 7 classes replaced by one of {CLASSES}" in whole.said
    half = start_from("x.safetensors", "run.max_steps=3")
    rest = start_from("x.safetensors", "run.max_steps=6", "resume=auto")
    assert (len(half.inputs), len(rest.inputs)) == (3, 3)
    assert torch.equal(whole.weights[-1], rest.weights[-1])
    # Its own config.yaml sets all that the weights had settled.
    assert half.run is not None
    again = Run(load_config(half.run.folder / "config.yaml", ["run.max_steps=6"]))
    assert again.config.data.mean == tuple(MEAN)
    again.run_folder.release()


def test_a_run_starts_from_another_runs_folder(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = observe(SHORT, files, tmp_path / "first" / "runs")
    assert first.run is not None
    words = (*BASE, f"model.init={first.run.folder}")
    run = Run(load_config(None, [w.format(**files, runs=tmp_path / "runs") for w in words]))
    run.run_folder.release()
    trained = first.run.model.state_dict()
    for name, value in run.model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, trained[name.replace(".aux.", ".")]), name
    assert f"step 2 of run {first.config.name}, its main norms" in capsys.readouterr().out


def test_weights_that_do_not_fit_stop_the_run(
    start_from: Callable[..., Seen], tmp_path: Path
) -> None:
    state = plain("cifar_resnet14", CLASSES).state_dict()
    torch.save(state, tmp_path / "x.pth")
    seen = start_from("x.pth")
    said = "x.pth' for model.name = 'cifar_resnet8': the weights do not fit the model"
    assert said in seen.error
    assert not (tmp_path / "runs").exists()


def test_one_rank_downloads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank, then one of each other machine, then the rest."""
    for ranks, turn in ((Ranks(0, 4, 0), 0), (Ranks(2, 4, 0), 1), (Ranks(3, 4, 1), 2)):
        met: list[str] = []

        def gather(self: Ranks, fact: object, met: list[str] = met) -> list[object]:
            met.append("together")
            return [None] * 4

        monkeypatch.setattr(Ranks, "gather", gather)
        assert ranks.in_turns(lambda met=met: met.append("work") or "done") == "done"
        assert met.index("work") == turn
        assert met.count("together") == 3


@pytest.mark.slow
def test_a_transformer_of_one_size_starts_at_another(
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the name of its weights alone: the model, its positions resampled, a new head."""
    source = timm.create_model("test_vit")
    folder = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    (folder / "snapshots" / "0123").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    file = folder / "snapshots" / "0123" / "model.safetensors"
    safetensors.torch.save_file(dict(source.state_dict()), file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    unset = ("model.name=", "data.resize=")
    words = [word for word in BASE if not word.startswith(unset)]
    words += ["model.init=timm:test_vit", "data.size=32", "run.max_steps=1"]
    run = Run(load_config(None, [w.format(**files, runs=tmp_path / "runs") for w in words]))
    said = capsys.readouterr().out
    assert run.config.model.name == "timm/test_vit"
    assert (run.config.data.size, run.config.data.resize) == (32, 33)  # the weights' 160 and 168
    for part in (
        "these are test_vit.r160_in1k", "model.name = timm/test_vit", "data.eval_filter = bicubic",
        "was trained with 160 px, but data.size = 32",
        f"head of 1,000 classes replaced by one of {CLASSES}",
    ):  # fmt: skip
        assert part in said
    state = run.model.state_dict()
    assert state["pos_embed"].shape == (1, 1 + 4, 64)
    assert torch.equal(state["blocks.0.attn.qkv.weight"], source.blocks[0].attn.qkv.weight)
    assert run.train()["steps"] == 1
