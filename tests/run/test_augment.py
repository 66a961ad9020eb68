"""Runs with augmentation: resumed bit by bit, by every back end, in training alone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fap.config import load_config
from fap.run.epoch import augment_spec
from fap.sections.data import MAGNITUDES
from pipelines.augment.policies import POLICIES
from pipelines.augment.spec import magnitude_range
from tests.run.detections import DETECTION
from tests.run.runs import assert_same, final_state, run
from tests.run.wiring import observe

EVERYTHING = ("data.color_jitter=[0.4,0.4,0.4,0.1]", "data.erase=0.5")


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_goes_on_in_the_middle_of_an_epoch(
    policy: str, files: dict[str, Path], tmp_path: Path
) -> None:
    words = (f"data.augment={policy}", *EVERYTHING, "method.schedule=pipelined")
    whole = observe(words, files, tmp_path / "whole")
    assert whole.error == ""
    observe([*words, "run.max_steps=3"], files, tmp_path / "runs")
    rest = observe([*words, "resume=auto"], files, tmp_path / "runs")
    assert len(rest.inputs) == len(whole.inputs) - 3
    for ours, theirs in zip(rest.inputs, whole.inputs[3:], strict=True):
        assert torch.equal(ours["images"], theirs["images"])
    assert torch.equal(rest.weights[-1], whole.weights[-1])
    assert rest.result["last"] == whole.result["last"]


def test_evaluation_sees_images_as_they_are(files: dict[str, Path], tmp_path: Path) -> None:
    plain = observe(["run.max_steps=2"], files, tmp_path / "plain")
    words = ("data.augment=augmix", *EVERYTHING, "run.max_steps=2")
    changed = observe(words, files, tmp_path / "changed")
    assert len(changed.evaluated) == len(plain.evaluated) > 0
    for ours, theirs in zip(changed.evaluated, plain.evaluated, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(changed.inputs[0]["images"], plain.inputs[0]["images"])


@pytest.mark.parametrize("part", ["clean", "adv"])
def test_the_other_partition_is_trained_as_it_is(
    part: str, files: dict[str, Path], tmp_path: Path
) -> None:
    plain = observe(["run.max_steps=2"], files, tmp_path / "plain")
    words = ("data.augment=randaugment", *EVERYTHING, f"data.augment_on={part}", "run.max_steps=2")
    changed = observe(words, files, tmp_path / "changed")
    for ours, theirs in zip(changed.inputs, plain.inputs, strict=True):
        same = (ours["images"] == theirs["images"]).flatten(1).all(1)
        clean, adv = same[:8], same[8:]
        kept, left = (adv, clean) if part == "clean" else (clean, adv)
        assert kept.all()
        assert not left.all()


def test_a_method_with_copies_attacks_the_augmented_rows(
    files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["method.name=advprop", "method.p_adv=null", "run.max_steps=2", "data.erase=1"]
    words += ["method.eps_255=1", "method.step_255=1", "method.attack_steps=1"]
    seen = observe(words, files, tmp_path / "runs")
    assert seen.error == ""
    for fed, adv in zip(seen.inputs, seen.adversarial, strict=True):
        # Within the ball around what was fed, as far as the shuffle lets rows be found.
        distance = (adv[:, None].float() - fed["images"][None].float()).abs().flatten(2).amax(2)
        assert (distance.amin(1) <= 1 + 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["ffcv", "turbojpeg", "dali"])
def test_all_pipelines_train_on_the_same_pixels(
    pipeline: str, tiny_beton: Path, tmp_path: Path
) -> None:
    """Raw samples that are not resized: what is shown of them is exact."""
    module = {"dali": "nvidia.dali"}.get(pipeline, pipeline)
    if pipeline != "turbojpeg" and find_spec(module) is None:
        pytest.skip(f"needs {module}")
    words = ("data.augment=trivialaugment", *EVERYTHING, "data.filter=bilinear")
    reference, _ = run(tiny_beton, tmp_path / "reference", *words)
    folder, _ = run(tiny_beton, tmp_path / pipeline, *words, f"data.pipeline={pipeline}")
    assert_same(final_state(folder), final_state(reference))


def test_colours_of_a_detector_are_jittered_and_nothing_else(
    boxes: dict[str, Path], tmp_path: Path
) -> None:
    plain = observe([*DETECTION, "run.max_steps=1"], boxes, tmp_path / "plain")
    words = [*DETECTION, "run.max_steps=1", "data.color_jitter=[0.4,0.4,0.4,0.1]"]
    changed = observe(words, boxes, tmp_path / "changed")
    assert changed.error == ""
    jitter = "colour jitter (brightness 0.4, contrast 0.4, saturation 0.4, hue 0.1)"
    assert f"augment    {jitter}; on all rows" in changed.said
    ours, theirs = changed.inputs[0], plain.inputs[0]
    assert not torch.equal(ours["images"], theirs["images"])
    for name in ("targets", "place"):
        assert torch.equal(ours[name], theirs[name])
    black = (theirs["images"] == 0).all(1)
    assert not ours["images"].amax(1)[black].any()
    for word in ("data.augment=randaugment", "data.erase=0.1"):
        with pytest.raises(ValueError, match="boxes do not follow"):
            load_config(None, [*DETECTION, word])


# ---------------------------------------------------------------------- what unset fields mean


def test_the_fields_are_the_policies() -> None:
    """The config lists them without importing what executes them."""
    for policy in POLICIES:
        data = load_config(None, [f"data.augment={policy}"]).data
        spec = augment_spec(data)
        assert spec.policy == policy
        assert (policy in MAGNITUDES) == (policy in ("randaugment", "augmix"))
        if policy in MAGNITUDES:
            assert MAGNITUDES[policy][:2] == magnitude_range(policy)
            assert spec.magnitude == MAGNITUDES[policy].unset == data.shown_magnitude
    with pytest.raises(ValueError, match=r"data\.augment = 'fast'"):
        load_config(None, ["data.augment=fast"])
