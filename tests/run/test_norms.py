"""Runs of models with any norms: what `method.aux` changes, checkpoints, resume, evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fap import checkpoint
from fap.cli import eval as eval_cli
from fap.evaluate.load import load_model
from fap.export.formats import export
from fap.nets.build import plain
from fap.nets.dual import evaluate_with, has_aux, norms
from tests.run.wiring import CLASSES, Seen, observe

SIZE = ("data.size=32", "data.resize=32", "run.eval_every=9")
LAYER_NORMS = ("model.name=timm/test_convnext", *SIZE)
NORM_FREE = ("model.name=timm/test_nfnet", *SIZE)
NO_P_ADV = "method.p_adv=null"
VANILLA = ("method.name=vanilla", NO_P_ADV)
STEPS = 3  # of a run here: one and a half epochs


@pytest.fixture(scope="module")
def ran(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[str]], Seen]:
    """Runs of a few steps, each made once."""
    made: dict[tuple[str, ...], Seen] = {}

    def run(words: Sequence[str]) -> Seen:
        key = tuple(words)
        if key not in made:
            runs = tmp_path_factory.mktemp("norms") / "runs"
            more = (f"run.max_steps={STEPS}", "run.checkpoint_every=1")
            made[key] = observe([*key, *more], files, runs)
        return made[key]

    return run


def newest(seen: Seen) -> Path:
    assert seen.run is not None
    return seen.run.saving.checkpoints.paths()[-1]


def names_of_aux(seen: Seen) -> list[str]:
    assert seen.run is not None
    return [name for name in seen.run.model.state_dict() if ".aux." in name]


# ---------------------------------------------------------------------- method.aux


def test_every_norm_has_an_auxiliary_twin_which_is_trained(
    ran: Callable[[Sequence[str]], Seen],
) -> None:
    seen = ran(LAYER_NORMS)
    assert seen.error == ""
    assert "norms      5 LayerNorm2d, 9 LayerNorm with auxiliary twins" in seen.said
    assert "groups     2 main of 4 rows, 2 auxiliary of 2 rows; no statistics" in seen.said
    assert seen.run is not None
    for norm in norms(seen.run.model):
        assert norm.aux is not None
        assert any(
            not torch.equal(a, b)
            for a, b in zip(norm.main_parameters(), norm.aux.parameters(), strict=True)
        )
    assert names_of_aux(ran([*LAYER_NORMS, "method.aux=norms"])) == names_of_aux(seen)
    again = ran([*LAYER_NORMS, "method.aux=norms"])
    assert torch.equal(again.weights[-1], seen.weights[-1])


def test_without_auxiliary_norms_adversarial_rows_go_through_the_main_ones(
    ran: Callable[[Sequence[str]], Seen],
) -> None:
    seen = ran(LAYER_NORMS)
    single = ran([*LAYER_NORMS, "method.aux=none"])
    assert single.error == ""
    assert names_of_aux(single) == []
    assert "LayerNorm without auxiliary twins (method.aux = none)" in single.said
    assert single.run is not None and seen.run is not None
    through = {g.bn for one in single.run.step.passes for g in one.groups}
    assert through == {"main"}
    assert (single.run.step.weights.main, single.run.step.weights.aux) == (1, 1)
    assert seen.run.step.weights.main > 1 < seen.run.step.weights.aux
    of = [dict(one.run.step.network.flat.parameters) for one in (seen, single)]  # type: ignore[union-attr]
    assert any(not torch.equal(of[0][name], value) for name, value in of[1].items())


def test_a_model_without_norms(ran: Callable[[Sequence[str]], Seen]) -> None:
    seen = ran(NORM_FREE)
    assert seen.error == ""
    assert "norms      none, so all rows train the same parameters" in seen.said
    assert names_of_aux(seen) == []
    assert ran([*NORM_FREE, *VANILLA]).error == ""
    refused = ran([*NORM_FREE, "method.aux=norms"])
    assert refused.error.startswith("method.aux = 'norms': model.name = 'timm/test_nfnet' has no")
    assert not refused.inputs


def test_norms_that_nothing_divides_train_vanilla_only(
    ran: Callable[[Sequence[str]], Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch norm of another class, which a pass goes through as one batch."""

    class Foreign(torch.nn.BatchNorm2d):
        pass

    def with_foreign(*arguments: Any) -> torch.nn.Module:
        model = plain(*arguments)
        model.bn1.__class__ = Foreign  # type: ignore[union-attr]
        return model

    monkeypatch.setattr("fap.tasks.classification.plain", with_foreign)
    seen = ran([*VANILLA, "run.keep=49"])
    assert seen.error == ""
    assert "norms      8 BatchNorm2d; 1 Foreign that see a whole pass as one batch" in seen.said
    for words in (["method.name=fast_advprop"], ["method.name=adversarial_training", NO_P_ADV]):
        refused = ran([*words, "run.keep=49"])
        assert "bn1 is a tests.run.test_norms" in refused.error


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("words", [LAYER_NORMS, NORM_FREE], ids=["LayerNorm", "no norms"])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(
    words: tuple[str, ...],
    ran: Callable[[Sequence[str]], Seen],
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    half = observe([*words, "run.max_steps=1", "run.checkpoint_every=1"], files, tmp_path / "runs")
    assert len(half.inputs) == 1  # of two steps of its epoch
    more = (f"run.max_steps={STEPS}", "run.checkpoint_every=1", "resume=auto")
    resumed = observe([*words, *more], files, tmp_path / "runs")
    assert len(resumed.inputs) == STEPS - 1
    states = []
    for seen in (resumed, ran(words)):
        tensors, _ = checkpoint.load(newest(seen))
        states.append({name: value for name, value in tensors.items() if name != "metrics"})
    assert states[0].keys() == states[1].keys()
    assert [
        name for name, value in states[0].items() if not torch.equal(value, states[1][name])
    ] == []


@pytest.mark.parametrize("aux", ["auto", "none"])
def test_checkpoints_are_loaded_evaluated_and_exported(
    aux: str, ran: Callable[[Sequence[str]], Seen], tmp_path: Path
) -> None:
    words = LAYER_NORMS if aux == "auto" else (*LAYER_NORMS, f"method.aux={aux}")
    seen = ran(words)
    assert seen.run is not None
    trained = load_model(newest(seen))
    assert has_aux(trained.model) == (aux == "auto")
    x = torch.randn(3, 3, 32, 32)
    seen.run.model.eval()

    def outputs(bn: str) -> list[Tensor]:
        found = []
        for model in (seen.run.model, trained.model):  # type: ignore[union-attr]
            with torch.inference_mode(), evaluate_with(model, bn):  # type: ignore[arg-type]
                found.append(model(x))
        return found

    main = outputs("main")
    torch.testing.assert_close(*main)
    if aux == "auto":
        auxiliary = outputs("aux")
        torch.testing.assert_close(*auxiliary)
        assert not torch.allclose(auxiliary[0], main[0])
    file = tmp_path / "plain.safetensors"
    export(newest(seen), file)
    model = plain("timm/test_convnext", CLASSES, 32)
    model.load_state_dict(safetensors.torch.load_file(file), strict=True)
    torch.testing.assert_close(model.eval()(x), main[0])
    # And back: the auxiliary norms begin as copies of the main ones.
    again = ran([*LAYER_NORMS, f"model.init={file}"])
    assert again.error == ""
    assert again.run is not None
    start = again.run.step.network.flat.named(again.weights[0])
    first = safetensors.torch.load_file(file)
    assert all(torch.equal(v, first[name.replace(".aux.", ".")]) for name, v in start.items())


@pytest.mark.parametrize("words", [LAYER_NORMS, (*LAYER_NORMS, "method.aux=none"), NORM_FREE])
def test_fap_eval_through_either_set(
    words: tuple[str, ...],
    ran: Callable[[Sequence[str]], Seen],
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(newest(ran(words)))
    fixed = [file, "--data", str(files["data"]), "--device", "cpu", "--pipeline", "reference"]
    reached = {}
    for bn in ("main", "aux"):
        out = tmp_path / bn
        code = eval_cli.main([*fixed, "--bn", bn, "--out", str(out)])
        if bn == "aux" and words != LAYER_NORMS:
            assert code == 1
            assert "was trained without auxiliary norms" in capsys.readouterr().err
            continue
        assert code == 0
        (report,) = json.loads((out / "report.json").read_text())
        reached[bn] = report["results"]["clean"]["loss"]
    if words == LAYER_NORMS:
        assert reached["main"] != reached["aux"]
