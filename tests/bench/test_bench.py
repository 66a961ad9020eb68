"""The benches run, count as the budget does, and fail when their gate says so.

No test here asserts a time.
"""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("bench.cost_parity")
from bench import cost_parity
from bench import step as bench_step
from bench.common import alternate, cell, interval, ratio, spread
from bench.contestants import Contestant, canvas, config_of, largest_pass, synthetic
from bench.peers import Peer
from fap.nets.dual import norm_state

SMALL = [
    *("--models", "cifar_resnet8"),
    *("--size", "8"),
    *("--rows", "64"),
    *("--rounds", "2"),
    *("--amp", "off"),
]
ONE = ["--schedules", "fused", "--vanilla-bn", "groups"]


def run_parity(tmp_path, *extra):
    code = cost_parity.main([*SMALL, "--synthetic", "--out", str(tmp_path), *extra])
    return code, written(tmp_path, "cost_parity")


def written(folder, bench):
    (file,) = folder.glob(f"{bench}_*.json")
    return json.loads(file.read_text())


# ------------------------------------------------------------------ cost parity


@pytest.mark.slow
def test_cost_parity_measures_whole_runs_under_the_budget(tmp_path):
    extra = ["--schedules", "fused", "pipelined", "--vanilla-bn", "groups", "whole", "--equal-rows"]
    code, found = run_parity(tmp_path, *extra)
    assert code == 0
    assert [(r["schedule"], r["bn"]) for r in found["results"]] == [
        ("fused", "groups"),
        ("fused", "whole"),
        ("pipelined", "groups"),
        ("pipelined", "whole"),
    ]
    assert found["environment"]["commit"]
    # 64 clean + 16 adversarial rows: fused's largest pass has 80, vanilla's nearest whole groups
    # 64; pipelined 96 -> 128.
    rows_of = {"fused": 64, "pipelined": 128}
    for r in found["results"]:
        rows = rows_of[r["schedule"]]
        assert r["vanilla"]["rows"] == rows
        assert r["vanilla"]["bn_group"] == {"groups": 64, "whole": rows}[r["bn"]]
        assert r["ours"]["steps"] == 87 * (50_000 // 80)
        assert r["vanilla"]["steps"] == 105 * (50_000 // rows)
        assert r["ideal"] == pytest.approx(0.994, abs=0.003)
        for run in (r["ours"], r["vanilla"]):
            seconds = run["s_per_step"]["median"] * run["steps"]
            evaluations = run["evaluation_share"] * run["whole_run_s"]
            assert run["whole_run_s"] == pytest.approx(seconds + run["startup_s"] + evaluations)
            assert 0 < run["evaluation_share"] < 1
            assert run["tflop_per_s"] > 0
        w = r["whole_run"]
        assert w["ratio"] == pytest.approx(r["ours"]["whole_run_s"] / r["vanilla"]["whole_run_s"])
        assert w["low"] <= w["high"]
    assert next(tmp_path.glob("*.png")).stat().st_size > 1000
    assert "0.99" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize(
    ("schedule", "rows", "largest"), [("fused", 64, 80), ("fused", 128, 96), ("pipelined", 64, 96)]
)
def test_the_largest_pass_is_the_step_s_own(schedule, rows, largest):
    config = config_of("cifar_resnet8", rows, 8, schedule=schedule)
    assert largest_pass(config) == largest
    step = Contestant(config, "off").step
    assert max(len(x) for x in step.pass_input) == largest


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "code"), [("1e-3", 1), ("1e3", 0)])
def test_the_gate_is_the_exit_status(tmp_path, limit, code):
    found, _ = run_parity(tmp_path, *ONE, "--max-ratio", limit)
    assert found == code


def test_an_unmeasured_case_does_not_pass_the_gate(tmp_path, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(cost_parity, "compare", full)
    code, found = run_parity(tmp_path, "--schedules", "fused", "--max-ratio", "1000")
    assert code == 1
    assert found["results"][0]["error"] == "OutOfMemoryError: full"
    assert "not measured" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.slow
def test_cost_parity_with_a_loader_waits_for_it(tmp_path):
    pytest.importorskip("pipelines.loaders.reference")
    from PIL import Image

    rng = np.random.default_rng(0)
    for k in range(400):
        folder = tmp_path / "images" / f"c{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.jpeg")
    loader = ["--data", str(tmp_path / "images"), "--pipeline", "reference"]
    loader += ["--val-images", "10", "--block", "1"]
    assert cost_parity.main([*SMALL, *ONE, *loader, "--out", str(tmp_path)]) == 0
    (r,) = written(tmp_path, "cost_parity")["results"]
    assert r["ours"]["steps"] == 87 * (400 // 80)
    assert 0 < r["ours"]["waiting_share"] < 1


# ------------------------------------------------------------------ detection

TINY = ["--models", "retinanet_tiny", "--rows", "16", "--rounds", "1", "--amp", "off", *ONE]


@pytest.mark.slow
def test_cost_parity_of_a_detector_is_that_of_a_run_over_coco(tmp_path):
    arguments = [*TINY, "--size", "32x64", "--schedules", "fused", "pipelined", "--equal-rows"]
    assert cost_parity.main([*arguments, "--out", str(tmp_path)]) == 0
    assert [file.stem for file in tmp_path.glob("*.json")] == [
        f"cost_parity_detection_{cost_parity.DEVICE.type}"
    ]
    found = written(tmp_path, "cost_parity_detection")
    assert found["settings"]["size"] == [32, 64]
    # Two groups of 8 clean + 2 adversarial rows: fused's largest pass has 12, a tie of 8 and 16;
    # pipelined's 24.
    rows_of = {"fused": 16, "pipelined": 24}
    for r in found["results"]:
        rows = rows_of[r["schedule"]]
        assert (r["vanilla"]["rows"], r["vanilla"]["bn_group"]) == (rows, 8)
        assert r["ours"]["bn_group"] == 8
        assert r["ours"]["steps"] == 20 * (118_287 // 20)
        assert r["vanilla"]["steps"] == 24 * (118_287 // rows)
        assert r["ideal"] == pytest.approx(1, abs=0.001)
        assert 0 < r["ours"]["evaluation_share"] < 1


def test_detectors_and_others_share_no_file(tmp_path, capsys):
    models = ["--models", "retinanet_tiny", "cifar_resnet8", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        cost_parity.main(models)
    assert "measure them apart" in capsys.readouterr().err


def test_a_size_is_a_number_or_two(capsys):
    assert canvas("224") == 224
    assert canvas("800x1344") == (800, 1344)
    for wrong in ("224 px", "800x", "x800", "1x2x3"):
        with pytest.raises(SystemExit):
            cost_parity.main(["--size", wrong])
        assert f"{wrong!r}: must be N or HxW" in capsys.readouterr().err


def test_synthetic_boxes_are_on_the_canvas_and_some_images_have_none():
    config = config_of("retinanet_tiny", 64, (32, 96))
    batch, targets = synthetic(config)
    assert batch.images.shape == (64 + 16, 3, 32, 96)
    assert targets.shape == (1, 64 + 16, config.data.most_boxes, 5)
    is_box = targets[0, :, :, 0] >= 0
    counts = is_box.sum(1)
    assert counts.min() == 0
    assert 1 < counts.max() <= 8
    classes, left, top, right, bottom = targets[0][is_box].unbind(1)
    assert set(classes.tolist()) <= set(range(80))
    assert len(classes.unique()) > 10
    for low, high, side in ((left, right, 96), (top, bottom, 32)):
        assert low.min() >= 0
        assert high.max() <= side
        assert (high - low).min() >= 1 - 1e-4
        assert high.max() > 0.8 * side
    padding = torch.tensor([-1.0, 0, 0, 0, 0], device=targets.device)
    assert (targets[0][~is_box] == padding).all()


def test_a_detector_trains_on_its_boxes_within_its_pictures():
    """The step gets what a run would feed it: every box, and where the picture is."""
    contestant = Contestant(config_of("retinanet_tiny", 16, (32, 64)), "off")
    assert contestant.draws["place"].shape == (1, 20, 4)
    step = contestant.step
    step.inputs.place.zero_()
    step.inputs.targets.zero_()
    before = step.network.flat.param.clone()
    contestant.block(1)
    assert step.inputs.place.tolist() == [[0, 0, 32, 64]] * 20
    assert torch.equal(step.inputs.targets, contestant.targets[0])
    assert not torch.equal(step.network.flat.param, before)


# ------------------------------------------------------------------ what the benches share


def test_ratio_and_its_interval():
    rng = np.random.default_rng(1)
    bottom = rng.normal(1, 0.02, 50)
    r = ratio(2 * bottom, bottom)
    assert r["ratio"] == pytest.approx(2)
    assert r["low"] == pytest.approx(2)  # paired: noise that both share cancels
    r = ratio(rng.normal(1.1, 0.05, 50), bottom)
    assert r["low"] < r["ratio"] < r["high"]
    assert ratio(np.ones(3), np.ones(3), (1, 0))["ratio"] == 2


def test_an_interval_is_a_middle_and_its_limits():
    found = spread([1.0, 4.0, 2.0])
    assert interval(found) == (2.0, 1.0, 4.0)
    assert cell(found) == "2 [1, 4]"
    assert interval({"ratio": 1.5, "low": 1.0, "high": 2.0}) == (1.5, 1.0, 2.0)


def test_contestants_take_turns():
    order = []

    def measure(name):
        order.append(name)
        return len(order), 0.0

    times = alternate(measure, "ab", 3)
    assert times.shape == (2, 2, 3)
    assert order == ["a", "b"] * 5
    assert times[:, 0].tolist() == [[5, 7, 9], [6, 8, 10]]  # without the two rounds of warm-up


# ------------------------------------------------------------------ steps


@pytest.mark.slow
def test_step_bench_runs_every_contender(tmp_path):
    arguments = ["--model", "cifar_resnet8", "--size", "8", "--rows", "64", "--rounds", "1"]
    arguments += ["--no-compile", "--amp", "off", "--out", str(tmp_path)]
    assert bench_step.main(arguments) == 0
    results = written(tmp_path, "step")["results"]
    names = {r["other"] for r in results}
    for part in (
        "torchvision",
        "timm",
        "three passes: fp32, NCHW",
        "pipelined",
        "stem function",
        "channels_last",
    ):
        assert any(part in n for n in names), part
    assert all(r["other's s"]["median"] > 0 for r in results)
    assert all(r["other / ours"]["low"] <= r["other / ours"]["high"] for r in results)


def test_taking_an_ingredient_away_takes_it_away():
    def made(without):
        return Contestant(config_of("cifar_resnet8", 64, 8), "off", without=without)

    whole = made("")
    assert made("stem function").flops > whole.flops  # the clean rows' data gradient
    assert norm_state(made("norm kernel").model).kernel == "framework"
    step = made("channels_last").step
    assert all(x.is_contiguous() for x in step.pass_input)
    assert step.network.model.blocks[0].conv1.weight.is_contiguous()


def test_the_peers_train_on_the_same_work_as_ours():
    """The authors' three passes cost the FLOPs of our sequential schedule."""
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of("cifar_resnet8", 64, 8, schedule="sequential")
    peer = Peer(config, "off")
    before = {k: v.clone() for k, v in peer.model.state_dict().items()}
    with FlopCounterMode(display=False) as counter:
        peer.block(1)
    assert counter.get_total_flops() == Contestant(config, "off").flops
    after = peer.model.state_dict()
    for name in ("conv1.weight", "bn1.weight", "bn1.aux.weight", "bn1.aux.running_mean"):
        assert not torch.equal(before[name], after[name]), name
