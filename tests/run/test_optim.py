"""Runs with the optimisers, an average of the weights, and steps in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fap.checkpoint import Checkpoints
from fap.cli import eval as eval_cli
from fap.cli import export as export_cli
from fap.cli import predict_command
from fap.evaluate.load import load_model
from fap.export.formats import export
from fap.nets.weights.files import weights_in
from fap.run.validation import Validation
from tests.run.runs import assert_same, records, run, without_metrics

SHORT = ("run.max_steps=7", "run.checkpoint_every=1", "run.keep=50")
OPTIMS: dict[str, tuple[str, ...]] = {
    "sgd": ("optim.nesterov=true", "optim.freeze=[conv1]"),
    "adamw": ("optim.name=adamw", "optim.decay_on=weights", "method.schedule=pipelined"),
    "lamb": ("optim.name=lamb", "optim.accumulate=2", "optim.clip_norm=1"),
}
EMA = ("optim.ema=0.9", *SHORT)


def tensors_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    newest = Checkpoints(folder / "checkpoints").newest()
    assert newest is not None
    path, tensors, meta = newest
    assert meta["step"] == step, path
    return tensors


@pytest.mark.parametrize("name", OPTIMS)
def test_resumed_in_mid_epoch_bit_for_bit(name: str, tiny_beton: Path, tmp_path: Path) -> None:
    """Averages, counts of steps and the average of the weights are in the checkpoint."""
    words = (*OPTIMS[name], *EMA)
    whole, _ = run(tiny_beton, tmp_path / "whole", *words)
    run(tiny_beton, tmp_path / "parts", *words, "run.max_steps=3")
    parts, _ = run(tiny_beton, tmp_path / "parts", *words, "resume=auto")
    found = tensors_at(parts, 7)
    assert_same(without_metrics(found), without_metrics(tensors_at(whole, 7)))
    assert ("optimizer.step" in found) == (name != "sgd")
    assert "ema.fc.weight" in found


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.name=adamw", r"optim\.name: 'sgd', now 'adamw'"),
        ("optim.ema=0.5", r"optim\.ema: None, now 0\.5"),
        ("optim.freeze=[fc]", r"optim\.freeze: \[\], now \['fc'\]"),
    ],
)
def test_another_optimiser_does_not_go_on(
    word: str, said: str, tiny_beton: Path, tmp_path: Path
) -> None:
    run(tiny_beton, tmp_path, "run.max_steps=1")
    with pytest.raises(ValueError, match=said):
        run(tiny_beton, tmp_path, word, "resume=auto")


def test_the_average_is_what_is_evaluated_and_exported(
    tiny_beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[torch.Tensor] = []
    validate = Validation.__call__

    def watched(self: Validation, model: Any, before_each_batch: Any) -> Any:
        seen.append(model.fc.weight.detach().clone())
        return validate(self, model, before_each_batch)

    monkeypatch.setattr(Validation, "__call__", watched)
    folder, result = run(tiny_beton, tmp_path, *EMA)
    out = capsys.readouterr().out
    assert "EMA 0.9 of the weights, which is what is evaluated" in out

    saved = tensors_at(folder, 7)
    raw, average = seen[-2:]
    assert torch.equal(raw, saved["model.fc.weight"])
    assert torch.equal(average, saved["ema.fc.weight"])
    last = [record for record in records(folder) if "val_top1" in record][-1]
    assert last["val_top1"] == result["last"]["top1"]
    assert last["val_raw_loss"] != last["val_loss"]

    path = Checkpoints(folder / "checkpoints").paths()[-1]
    for weights, expected in ((None, average), ("ema", average), ("raw", raw)):
        loaded = load_model(path, weights=weights)  # type: ignore[arg-type]
        assert torch.equal(loaded.model.state_dict()["fc.weight"], expected)
        assert loaded.weights == (weights or "ema")
        file = tmp_path / f"{weights}.safetensors"
        export(path, file, weights=weights)  # type: ignore[arg-type]
        assert torch.equal(safetensors.torch.load_file(file)["fc.weight"], expected)
    contents = {load_model(path, weights=weights).content for weights in ("ema", "raw")}
    assert len(contents) == 2, "results of the two are kept apart"
    assert export_cli.main([str(path), str(tmp_path / "words.safetensors")]) == 0
    assert "the average of its weights (--weights raw: the others)" in capsys.readouterr().out


def test_the_commands_say_which_weights_they_use(
    tiny_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run(tiny_beton, tmp_path, "optim.ema=0.9", "run.max_steps=2")
    for words, name in (((), "step 2, EMA |"), (("--weights", "raw"), "step 2 |")):
        to = ("--device", "cpu", "--pipeline", "reference", "--out", str(tmp_path / "eval"))
        assert eval_cli.main([str(folder), "--data", str(tiny_beton), *to, *words]) == 0
        assert name in capsys.readouterr().out
    assert len(list((tmp_path / "eval" / "results").iterdir())) == 2, "neither is the other's"
    for words, weights in (((), "ema"), (("--weights", "raw"), "raw")):
        args = predict_command.arguments([str(folder), str(tiny_beton), *words])
        assert predict_command._trained(args, "cpu").weights == weights


def test_an_average_that_is_not_there_is_refused(tiny_beton: Path, tmp_path: Path) -> None:
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=1")
    path = Checkpoints(folder / "checkpoints").paths()[-1]
    with pytest.raises(ValueError, match=r"no average of its weights \(optim.ema\)"):
        load_model(path, weights="ema")
    assert load_model(path).weights == "raw"


def test_a_checkpoint_of_any_optimiser_is_no_plain_weights(
    tiny_beton: Path, tmp_path: Path
) -> None:
    folder, _ = run(tiny_beton, tmp_path, "optim.name=adamw", "run.max_steps=1")
    path = Checkpoints(folder / "checkpoints").paths()[-1]
    with pytest.raises(ValueError, match="a run's checkpoint, no plain weights"):
        weights_in(path.read_bytes(), path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "optimiser  SGD, momentum 0.9, decay 0.0001 on all parameters"),
        (
            ("optim.name=lamb", "optim.decay_on=weights", "optim.clip_norm=1"),
            "optimiser  LAMB, betas 0.9 and 0.999, eps 1e-06, decay 0.02 on weights, none on norms "
            "and biases, gradient clipped at 1",
        ),
        (("optim.freeze=[conv1]",), "frozen     432 of "),
        (("optim.head_lr_scale=10",), "rates      x 1 on "),
        (
            ("optim.accumulate=2",),
            "step       2 passes per device, each in 2 parts: clean 8 + noise 8 | clean 8 + adv 8",
        ),
    ],
)
def test_what_the_start_up_lines_say(
    words: tuple[str, ...],
    line: str,
    tiny_beton: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tiny_beton, tmp_path, *words, "run.max_steps=1", "method.p_adv=1/3")
    assert line in capsys.readouterr().out


def test_mistakes_name_the_field(tiny_beton: Path, tmp_path: Path) -> None:
    for word, message in (
        ("optim.accumulate=3", r"optim\.accumulate = 3: .* must be 1 or 2$"),
        ("optim.freeze=[layer9]", r"optim\.freeze = 'layer9'"),
        ("optim.layer_decay=0.5", r"optim\.layer_decay = 0\.5"),
        ("optim.betas=[0.9,0.9]", r"optim\.betas = .* no meaning for optim\.name = 'sgd'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tiny_beton, tmp_path, word)
    assert not list(tmp_path.iterdir())
