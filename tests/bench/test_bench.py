"""The benches run, count as the budget does, and fail when their gate says so. No test here asserts
a time.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("bench.cost_parity")
from bench import cost_parity
from bench import step as bench_step
from bench.common import alternate, ratio
from bench.step import Contestant, Peer, config_of
from fap.nets.dual import norm_state

SMALL = [
    "--models",
    "cifar_resnet8",
    "--size",
    "8",
    "--rows",
    "64",
    "--rounds",
    "2",
    "--amp",
    "off",
    "--synthetic",
]


def run_parity(tmp_path, *extra):
    code = cost_parity.main([*SMALL, "--out", str(tmp_path), *extra])
    return code, json.loads(next(tmp_path.glob("cost_parity_*.json")).read_text())


@pytest.mark.slow
def test_cost_parity_measures_whole_runs_under_the_budget(tmp_path):
    code, found = run_parity(
        tmp_path,
        "--schedules",
        "fused",
        "pipelined",
        "--vanilla-bn",
        "groups",
        "whole",
        "--equal-rows",
    )
    assert code == 0
    assert [(r["schedule"], r["bn"]) for r in found["results"]] == [
        (s, b) for s in ("fused", "pipelined") for b in ("groups", "whole")
    ]
    assert found["environment"]["commit"]
    for r in found["results"]:
        # 64 clean + 16 adversarial rows: fused's largest pass has 80, vanilla's nearest whole
        # groups 64; pipelined 96 -> 128
        rows = {"fused": 64, "pipelined": 128}[r["schedule"]]
        assert r["vanilla"]["rows"] == rows
        assert r["vanilla"]["bn_group"] == (64 if r["bn"] == "groups" else rows)
        assert r["ours"]["steps"] == 87 * (50_000 // 80)
        assert r["vanilla"]["steps"] == 105 * (50_000 // rows)
        assert r["ideal"] == pytest.approx(0.994, abs=0.003)
        for run in (r["ours"], r["vanilla"]):
            seconds = run["s_per_step"]["median"] * run["steps"]
            assert run["whole_run_s"] == pytest.approx(
                seconds + run["startup_s"] + run["evaluation_share"] * run["whole_run_s"]
            )
            assert 0 < run["evaluation_share"] < 1
            assert run["tflop_per_s"] > 0
        w = r["whole_run"]
        assert w["ratio"] == pytest.approx(r["ours"]["whole_run_s"] / r["vanilla"]["whole_run_s"])
        assert w["low"] <= w["high"]
    assert next(tmp_path.glob("*.png")).stat().st_size > 1000
    assert "0.99" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize(("limit", "code"), [("1e-3", 1), ("1e3", 0)])
def test_the_gate_is_the_exit_status(tmp_path, limit, code):
    found, _ = run_parity(
        tmp_path, "--schedules", "fused", "--vanilla-bn", "groups", "--max-ratio", limit
    )
    assert found == code


def test_an_unmeasured_cell_does_not_pass_the_gate(tmp_path, monkeypatch):
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
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{k}.jpeg")
    extra = [
        "--data",
        str(tmp_path / "images"),
        "--pipeline",
        "reference",
        "--val-images",
        "10",
        "--block",
        "1",
    ]
    arguments = [a for a in SMALL if a != "--synthetic"]
    assert (
        cost_parity.main(
            [
                *arguments,
                "--out",
                str(tmp_path),
                "--schedules",
                "fused",
                "--vanilla-bn",
                "groups",
                *extra,
            ]
        )
        == 0
    )
    (r,) = json.loads(next(tmp_path.glob("cost_parity_*.json")).read_text())["results"]
    assert r["ours"]["steps"] == 87 * (400 // 80)
    assert 0 < r["ours"]["waiting_share"] < 1


def test_ratio_and_its_interval():
    rng = np.random.default_rng(1)
    bottom = rng.normal(1, 0.02, 50)
    r = ratio(2 * bottom, bottom)
    assert r["ratio"] == pytest.approx(2)
    assert r["low"] == pytest.approx(2)  # paired: noise that both share cancels
    r = ratio(rng.normal(1.1, 0.05, 50), bottom)
    assert r["low"] < r["ratio"] < r["high"]
    assert ratio(np.ones(3), np.ones(3), (1, 0))["ratio"] == 2


def test_contestants_take_turns():
    order = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def block(self, steps):
            order.append(self.name)
            return float(steps), 0.0

    times = alternate([partial(Noted(name).block, 2) for name in "ab"], 3)
    assert times.shape == (2, 2, 3)
    assert order == ["a", "b"] * 5


@pytest.mark.slow
def test_step_bench_runs_every_contender(tmp_path):
    arguments = [
        "--model",
        "cifar_resnet8",
        "--size",
        "8",
        "--rows",
        "64",
        "--rounds",
        "1",
        "--no-compile",
    ]
    assert bench_step.main([*arguments, "--amp", "off", "--out", str(tmp_path)]) == 0
    results = json.loads(next(tmp_path.glob("step_*.json")).read_text())["results"]
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
    assert step.model.blocks[0].conv1.weight.is_contiguous()


def test_the_peers_train_on_the_same_work_as_ours():
    """Three passes of the authors cost as many FLOPs as our sequential schedule, but for the clean
    rows' stem.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of("cifar_resnet8", 64, 8, schedule="sequential")
    peer = Peer(config, "off")
    before = {k: v.clone() for k, v in peer.model.state_dict().items()}
    with FlopCounterMode(display=False) as counter:
        peer.block(1)
    assert counter.get_total_flops() == Contestant(config, "off").flops
    after = peer.model.state_dict()
    assert all(
        not torch.equal(before[k], after[k])
        for k in ("conv1.weight", "bn1.weight", "bn1.aux.weight", "bn1.aux.running_mean")
    )
