"""The run as a user meets it: start, stop, resume, and what happens on bad days."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fap import checkpoint, train
from fap.cli import train as cli
from fap.config import load_config
from fap.distributed import Ranks
from fap.graph import FreshProcessNeeded
from fap.norm import DualBatchNorm2d
from fap.train import NonFinite, Run

STEPS = 20  # five epochs of four steps


def words(data: Path, runs: Path, *more: str) -> list[str]:
    return [
        f"data.train={data}", f"data.val={data}", "data.size=32", "data.resize=32", "data.crop=pad", "data.pipeline=reference",
        "data.threads=1", "model.name=cifar_resnet8", "model.num_classes=10", "optim.clean_batch=16", "method.group=8",
        "budget.epochs=6", "budget.milestones=[3,5]", "run.device=cpu", "run.log_every=1", f"run.dir={runs}", *more,
    ]  # fmt: skip


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "fap.cli.train", *args]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(data: Path, runs: Path, *more: str) -> tuple[Path, dict]:
    training = Run(load_config(None, words(data, runs, *more)))
    return training.folder, training.train()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    path, tensors, meta = checkpoint.Checkpoints(folder / "checkpoints").newest()
    assert meta["step"] == STEPS, path
    return {k: v for k, v in tensors.items() if k != "metrics"}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.fixture(scope="module")
def uninterrupted(tiny_beton: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(command(*words(tiny_beton, folder)), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return final_state(folder / "fast_advprop" / "seed0")


def test_a_run_leaves_everything_that_is_needed_to_understand_it(tiny_beton: Path, tmp_path: Path, capsys) -> None:
    folder, result = run(tiny_beton, tmp_path)
    said = capsys.readouterr().out
    for part in ("fused", "2 passes", "0.00784", "main of 8 rows", "image passes", "aux BN", "change places among 2 groups"):
        assert part in said
    assert folder == tmp_path / "fast_advprop" / "seed0"
    assert load_config(folder / "config.yaml").optim.clean_batch == 16
    assert json.loads((folder / "versions.json").read_text())["torch"]
    assert list(folder.glob("tensorboard/*"))
    steps = [r for r in records(folder) if "lr" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert all({"loss_clean", "acc_noise", "loss_adv", "zero_signs"} <= r.keys() for r in steps)
    assert [r["epoch"] for r in records(folder) if "val_top1" in r] == [1, 2, 3, 4, 5]
    assert result == json.loads((folder / "result.json").read_text())
    assert result["image_passes"] == STEPS * (16 + 4 + 4)
    assert 0 < result["last"]["top1"] <= result["best"]["top1"]
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="never overwritten"):
        run(tiny_beton, tmp_path)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("schedule", ["fused", "pipelined"])
def test_stopping_anywhere_and_resuming_gives_the_same_weights(tiny_beton: Path, tmp_path: Path, schedule: str) -> None:
    method = f"method.schedule={schedule}"
    whole, _ = run(tiny_beton, tmp_path / "whole", method)
    for stop in sorted(random.sample(range(1, STEPS), 3)):
        run(tiny_beton, tmp_path / "parts", method, f"run.max_steps={stop}", "resume=auto")
    parts, _ = run(tiny_beton, tmp_path / "parts", method, "resume=auto")
    assert_same(final_state(whole), final_state(parts))
    losses = [[r["loss_adv"] for r in records(f) if "lr" in r] for f in (whole, parts)]
    assert losses[0] == losses[1]


def kill_and_resume(data: Path, runs: Path, kills: int, expected: dict[str, torch.Tensor], seed: int) -> None:
    rng = random.Random(seed)
    cmd = command(*words(data, runs, "resume=auto", "run.checkpoint_every=1"))
    folder = runs / "fast_advprop" / "seed0"
    for _ in range(kills):
        before = len((folder / "metrics.jsonl").read_bytes()) if (folder / "metrics.jsonl").exists() else 0
        process = subprocess.Popen(cmd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (
            (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_bytes()) != before
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.wait()
    done = subprocess.run(cmd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert_same(final_state(folder), expected)


@pytest.mark.slow
def test_kill_9_and_resume(tiny_beton: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    kill_and_resume(tiny_beton, tmp_path, 3, uninterrupted, random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave(tiny_beton: Path, tmp_path: Path, number: int, code: int) -> None:
    cmd = command(*words(tiny_beton, tmp_path, "budget.epochs=600"))
    process = subprocess.Popen(cmd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "fast_advprop" / "seed0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert "continue with resume=auto" in output
    last = [json.loads(line) for line in metrics.read_text().splitlines()][-1]["step"]
    newest = checkpoint.Checkpoints(metrics.parent / "checkpoints").newest()
    assert newest is not None
    assert newest[2]["step"] >= last


def test_a_damaged_newest_checkpoint_is_noticed(tiny_beton: Path, tmp_path: Path, capsys) -> None:
    folder, _ = run(tiny_beton, tmp_path)
    whole = final_state(folder)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    capsys.readouterr()
    run(tiny_beton, tmp_path, "resume=auto")
    said = capsys.readouterr().out
    assert newest.name in said
    assert "at step 16" in said
    assert_same(final_state(folder), whole)


def test_a_full_disk_costs_a_checkpoint_not_the_run(tiny_beton: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    folder, result = run(tiny_beton, tmp_path)
    assert result["steps"] == STEPS
    assert "No space left" in capsys.readouterr().out
    assert not list((folder / "checkpoints").glob("step_*"))


def test_only_the_same_run_is_resumed(tiny_beton: Path, tmp_path: Path) -> None:
    run(tiny_beton, tmp_path, "run.max_steps=2")
    with pytest.raises(ValueError, match=r"optim\.lr"):
        run(tiny_beton, tmp_path, "resume=auto", "optim.lr=0.3")
    with pytest.raises(ValueError, match=r"method\.eps_255"):
        run(tiny_beton, tmp_path, "resume=auto", "method.eps_255=2")
    run(tiny_beton, tmp_path, "resume=auto", "run.max_steps=3", "data.threads=2", "run.keep=1")


def test_a_run_that_diverges_stops_and_says_where(tiny_beton: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"non-finite steps in a row.*last good checkpoint"):
        run(tiny_beton, tmp_path, "optim.lr=1e30", "run.max_skipped=4")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train=null", "data.train is not set"),
        ("data.train=/nowhere/x.beton", "/nowhere/x.beton"),
        ("model.num_classes=5", "labels 0 to 9"),
        ("optim.clean_batch=512", "fewer than one batch"),
        ("model.name=resnet1000", "neither torchvision nor timm"),
        ("model.name=vit_b_16", "no batch norm"),
        ("model.name=inception_v3", "does not accept images of 32 px"),
        ("run.graph=on", "need a GPU"),
        ("run.norm_kernel=triton", "run.norm_kernel = 'triton': it needs a GPU; use 'auto' or 'framework'"),
        ("model.init=/nowhere.safetensors", "no such file"),
    ],
)
def test_mistakes_are_one_clear_error(tiny_beton: Path, tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(tiny_beton, tmp_path, override)


@pytest.mark.parametrize(("wanted", "kernel"), [("auto", "auto"), ("framework", "split")])
def test_the_norm_that_was_asked_for_is_the_steps(tiny_beton: Path, tmp_path: Path, wanted: str, kernel: str) -> None:
    training = Run(load_config(None, words(tiny_beton, tmp_path, f"run.norm_kernel={wanted}", "run.max_steps=1")))
    assert training.step.row_groups.kernel == kernel
    training.train()
    assert training.step.row_groups.kernel == kernel


def test_a_kernel_that_cannot_be_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, gpu = load_config(None, ["run.norm_kernel=triton"]), torch.device("cuda", 0)
    monkeypatch.setattr(train, "find_spec", lambda name: object())
    assert train.norm_kernel(config, gpu) == "triton"
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.norm_kernel = 'triton': it needs the package triton"):
        train.norm_kernel(config, gpu)
    for kernel in ("auto", "framework"):  # which need none
        assert train.norm_kernel(load_config(None, [f"run.norm_kernel={kernel}", "run.compile=true"]), gpu) == "split"


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "triton", "framework"])
def test_the_norm_that_was_asked_for_runs(tiny_beton: Path, tmp_path: Path, wanted: str, monkeypatch, capsys) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    calls, on_grid = [], DualBatchNorm2d._on_grid

    def counted(norm, x, residual, groups):
        calls.append(norm)
        return on_grid(norm, x, residual, groups)

    monkeypatch.setattr(DualBatchNorm2d, "_on_grid", counted)
    run(tiny_beton, tmp_path, f"run.norm_kernel={wanted}", "run.device=cuda", "run.max_steps=2")
    assert bool(calls) == (wanted != "framework")
    assert (", CUDA graph, framework norm," in capsys.readouterr().out) == (wanted == "framework")


FAILS_ONCE = """
import os, sys
from pathlib import Path

import fap.train
from fap.cli.train import main
from fap.graph import FreshProcessNeeded

starts, runner = Path(sys.argv.pop(1)), fap.train.runner

def failing(step, mode):
    with starts.open("a") as file:
        print(os.getpid(), mode, step.row_groups.kernel, file=file)
    if mode == "auto":
        raise FreshProcessNeeded("the capture failed (made up)", "run.graph=off", "run.norm_kernel=framework")
    return runner(step, mode)

fap.train.runner = failing
main()
"""


def test_a_run_goes_on_in_a_fresh_process(tiny_beton: Path, tmp_path: Path) -> None:
    """The first start cannot go on; it is replaced, with the same arguments and more, and the run is finished."""
    script, starts = tmp_path / "fails_once.py", tmp_path / "starts"
    script.write_text(FAILS_ONCE)
    arguments = words(tiny_beton, tmp_path / "runs", "run.max_steps=3", "seed=7")
    environment_ = environment() | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, str(script), str(starts), *arguments], env=environment_, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, second = (line.split() for line in starts.read_text().splitlines())
    assert first[1:] == ["auto", "auto"]
    assert second[1:] == ["off", "split"]
    assert first[0] == second[0]  # replaced, not a child
    settings = "run.graph=off run.norm_kernel=framework resume=auto"
    said = [line for line in done.stderr.splitlines() if "fap-train" in line]
    assert said == [f"fap-train: the capture failed (made up); a fresh process goes on with {settings}"]
    folder = tmp_path / "runs" / "fast_advprop" / "seed7"
    assert json.loads((folder / "result.json").read_text())["steps"] == 3
    assert [r["step"] for r in records(folder) if "lr" in r] == [1, 2, 3]
    assert "done: top-1" in done.stdout


@pytest.mark.parametrize("world", [1, 2])
def test_only_a_run_of_one_rank_starts_itself_again(monkeypatch, capsys, world: int) -> None:
    class Failing:
        def __init__(self, *_: object) -> None:
            raise FreshProcessNeeded("the capture failed", "run.graph=off")

    class Replaced(Exception):  # noqa: N818
        pass

    def execv(*args: object) -> None:
        raise Replaced(*args)

    monkeypatch.setattr(cli, "Run", Failing)
    monkeypatch.setattr(cli, "connect", lambda _: Ranks(0, world, 0))
    monkeypatch.setattr(cli.os, "execv", execv)
    if world == 1:
        with pytest.raises(Replaced) as replaced:
            cli.main(["run.graph=auto", "--pipeline", "dali"])
        program, command = replaced.value.args
        assert program == sys.executable
        expected = ["-m", "fap.cli.train", "run.graph=auto", "--pipeline", "dali", "run.graph=off", "resume=auto"]
        assert command == [sys.executable, *expected]
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main(["run.graph=auto"])
        advice = "start again with run.graph=off resume=auto"
        assert ended.value.code == f"fap-train: the capture failed; this process cannot go on: {advice}"


def test_the_leak_is_reported(tiny_beton: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def leaking(metrics: dict[str, float]) -> dict[str, float]:
        return {"acc_clean": 0.5, "acc_adv": 0.9}

    monkeypatch.setattr(train, "rates", leaking)
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=4")
    assert "leak labels" in capsys.readouterr().out
    assert any("leak" in r for r in records(folder))


def test_a_frozen_run_keeps_its_losses(tiny_beton: Path, tmp_path: Path) -> None:
    """100 losses of a seeded run against the recorded ones; 2% covers other CPUs and torch versions at step 100."""
    file = Path(__file__).parent / "assets" / "frozen_losses.json"
    folder, _ = run(tiny_beton, tmp_path, "budget.epochs=30", "optim.lr=0.05", "run.eval_every=100", "run.torch_threads=1")
    losses = [r["loss_clean"] for r in records(folder) if "lr" in r][:100]
    if os.environ.get("FREEZE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([round(x, 6) for x in losses]) + "\n")
    frozen = json.loads(file.read_text())
    assert len(frozen) == len(losses) == 100
    assert losses[:10] == pytest.approx(frozen[:10], rel=1e-4)
    assert losses == pytest.approx(frozen, rel=0.02)


CONFIGS = sorted(Path("configs").rglob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_config_runs_two_steps(tiny_beton: Path, tmp_path: Path, file: Path, monkeypatch) -> None:
    """Only data, image size, batch and number of steps are overridden, never model or method."""
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)  # half a gigabyte for a ResNet-152; saved in other tests
    machine = [
        f"data.train={tiny_beton}", f"data.val={tiny_beton}", "data.pipeline=reference", "data.threads=1", "data.size=16",
        "data.resize=16", "optim.clean_batch=64", "run.max_steps=2", f"run.dir={tmp_path}", "run.device=cpu",
    ]  # fmt: skip
    config = load_config(file, machine)
    if config.loader_adv_rows > 32:  # 96 images hold no batch of 64 + 64
        config = load_config(file, [*machine, f"data.train={_twice(tiny_beton, tmp_path)}"])
    result = Run(config).train()
    assert result["steps"] == 2
    assert result["last"]["loss"] == result["last"]["loss"]  # not NaN


def _twice(data: Path, folder: Path) -> Path:
    from conftest import write_beton

    import pipelines

    store = pipelines.open_store(data)
    samples = [store.read(i).reshape(32, 32, 3) for i in range(len(store))] * 2
    return write_beton(folder / "twice.beton", samples, [*store.labels.tolist()] * 2)
