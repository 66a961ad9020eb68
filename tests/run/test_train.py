"""The run as a user meets it: start, stop, resume, and what happens on bad days."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import pipelines
from fap import checkpoint, distributed
from fap.cli import train as cli
from fap.config import load_config
from fap.distributed import Ranks
from fap.nets.norm import DualBatchNorm2d
from fap.run import folder as run_folder
from fap.run import session, train
from fap.run.train import NonFinite, NotSaved, Run
from fap.step.graph import FreshProcessNeeded
from fap.step.step import Step
from tests.conftest import write_beton
from tests.run.runs import (
    STEPS,
    assert_same,
    command,
    environment,
    final_state,
    kill_and_resume,
    records,
    wait_for_a_record,
    words,
)


def run(data: Path, runs: Path, *more: str) -> tuple[Path, dict]:
    training = Run(load_config(None, words(data, runs, *more)))
    return training.folder, training.train()


def test_a_run_leaves_everything_that_is_needed_to_understand_it(
    tiny_beton: Path, tmp_path: Path, capsys
) -> None:
    folder, result = run(tiny_beton, tmp_path)
    said = capsys.readouterr().out
    for part in (
        "fused",
        "2 passes",
        "0.00784",
        "main of 8 rows",
        "image passes",
        "aux BN",
        "change places among 2 groups",
    ):
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
def test_stopping_anywhere_and_resuming_gives_the_same_weights(
    tiny_beton: Path, tmp_path: Path, schedule: str
) -> None:
    method = f"method.schedule={schedule}"
    whole, _ = run(tiny_beton, tmp_path / "whole", method)
    for stop in sorted(random.sample(range(1, STEPS), 3)):
        run(tiny_beton, tmp_path / "parts", method, f"run.max_steps={stop}", "resume=auto")
    parts, _ = run(tiny_beton, tmp_path / "parts", method, "resume=auto")
    assert_same(final_state(whole), final_state(parts))
    losses = [[r["loss_adv"] for r in records(f) if "lr" in r] for f in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_kill_9_and_resume(
    tiny_beton: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    kill_and_resume(tiny_beton, tmp_path, 3, uninterrupted, random.randrange(1 << 30))


def start(data: Path, runs: Path, *more: str, **options: object) -> tuple[subprocess.Popen, Path]:
    """A long run that has written its first record."""
    cmd = command(*words(data, runs, "budget.epochs=600", *more))
    process = subprocess.Popen(cmd, env=environment(), text=True, **options)  # type: ignore[call-overload]
    folder = runs / "fast_advprop" / "seed0"
    wait_for_a_record(folder, process)
    return process, folder


def assert_saved_to_the_last_record(folder: Path) -> None:
    last = records(folder)[-1]["step"]
    newest = checkpoint.Checkpoints(folder / "checkpoints").newest()
    assert newest is not None
    assert newest[2]["step"] >= last


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.yaml"])
def test_what_is_no_file_in_a_run_folder_is_an_error_at_once(
    tiny_beton: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "fast_advprop" / "seed0"
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name}: is not a file"):
        Run(load_config(None, words(tiny_beton, tmp_path, "resume=auto")))
    assert [p.name for p in folder.iterdir()] == [name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGHUP], [signal.SIGUSR1], [signal.SIGTERM] * 500]
)
def test_signals_save_and_leave(
    tiny_beton: Path, tmp_path: Path, numbers: list[signal.Signals]
) -> None:
    """A scheduler's SIGTERM comes more than once; here until the process has ended."""
    process, folder = start(tiny_beton, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for number in numbers:
        if process.poll() is None:
            process.send_signal(number)
            time.sleep(0.02)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + numbers[0], output
    assert "continue with resume=auto" in output
    assert f"fap-train: stopped by {numbers[0].name}\n" in output
    assert "Traceback" not in output
    assert_saved_to_the_last_record(folder)
    assert not (folder / ".lock").exists()


@pytest.mark.slow
def test_a_signal_without_room_for_the_checkpoint_is_no_success(
    tiny_beton: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk: no checkpoint fits in 100 kB."""
    limit = ["prlimit", "--fsize=100000"]
    cmd = [
        *limit,
        *command(*words(tiny_beton, tmp_path, "budget.epochs=600", "run.eval_every=600")),
    ]
    process = subprocess.Popen(
        cmd, env=environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for_a_record(tmp_path / "fast_advprop" / "seed0", process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1, said
    assert "stopped by SIGTERM, and step" in said
    assert "could not be saved; no step of it has been saved" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_reader_of_the_output_may_leave(tiny_beton: Path, tmp_path: Path) -> None:
    process, folder = start(
        tiny_beton, tmp_path, "run.max_steps=40", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert json.loads((folder / "result.json").read_text())["steps"] == 40
    assert_saved_to_the_last_record(folder)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.3, 1.5, 2.5])
def test_ctrl_c_before_training_is_one_line(tiny_beton: Path, tmp_path: Path, after: float) -> None:
    process = subprocess.Popen(
        command(*words(tiny_beton, tmp_path, "model.name=resnet152")),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert said == "fap-train: stopped by SIGINT\n"
    assert list(tmp_path.iterdir()) == []


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


def no_room(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_a_checkpoint_not_the_run(
    tiny_beton: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Of five saves the second and third find no room."""
    saves = iter([checkpoint.save, no_room, no_room, checkpoint.save, checkpoint.save])
    monkeypatch.setattr(checkpoint, "save", lambda *a: next(saves)(*a))
    folder, result = run(tiny_beton, tmp_path)
    assert result["steps"] == STEPS
    said = capsys.readouterr().out
    assert (
        "could not save step 8 ([Errno 28] No space left on device); the last good checkpoint is"
        " that of step 4" in said
    )
    assert [p.name for p in checkpoint.Checkpoints(folder / "checkpoints").paths()] == [
        "step_00000016.safetensors",
        "step_00000020.safetensors",
    ]


def test_a_run_whose_last_checkpoint_is_not_there_is_not_done(
    tiny_beton: Path, tmp_path: Path, monkeypatch
) -> None:
    """It stops with an error, tells where the last good one is, writes no result, and can be
    finished later.
    """
    whole, _ = run(tiny_beton, tmp_path / "whole", "run.max_steps=8")
    saves = iter([checkpoint.save, no_room])
    monkeypatch.setattr(checkpoint, "save", lambda *a: next(saves)(*a))
    folder = tmp_path / "full" / "fast_advprop" / "seed0"
    with pytest.raises(
        NotSaved,
        match=(
            r"training is done, but its last checkpoint could not be saved; .* that of step 4 in "
        ),
    ):
        run(tiny_beton, tmp_path / "full", "run.max_steps=8")
    assert not (folder / "result.json").exists()
    monkeypatch.undo()
    run(tiny_beton, tmp_path / "full", "run.max_steps=8", "resume=auto")
    states = [
        checkpoint.load(f / "checkpoints" / "step_00000008.safetensors")[0] for f in (whole, folder)
    ]
    assert_same(*({k: v for k, v in state.items() if k != "metrics"} for state in states))


def test_a_result_that_cannot_be_written_is_an_error(
    tiny_beton: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(train, "write_whole", no_room)
    with pytest.raises(
        NotSaved, match=r"result\.json could not be written .*No space left.*that of step 2 in "
    ):
        run(tiny_beton, tmp_path, "run.max_steps=2")
    assert not (tmp_path / "fast_advprop" / "seed0" / "result.json").exists()


def test_only_the_same_run_is_resumed(tiny_beton: Path, tmp_path: Path) -> None:
    run(tiny_beton, tmp_path, "run.max_steps=2")
    with pytest.raises(ValueError, match=r"other settings.*\n  optim\.lr: 0\.1, now 0\.3$"):
        run(tiny_beton, tmp_path, "resume=auto", "optim.lr=0.3")
    with pytest.raises(ValueError, match=r"method\.eps_255: 1\.0, now 2\.0"):
        run(tiny_beton, tmp_path, "resume=auto", "method.eps_255=2")
    with pytest.raises(
        ValueError, match=r"run\.amp: 'off', now 'bf16'"
    ):  # a loss scale of one is none of the other
        run(tiny_beton, tmp_path, "resume=auto", "run.amp=bf16")
    with pytest.raises(ValueError, match=r"max_steps = 1, but .* is already at step 2"):
        run(tiny_beton, tmp_path, "resume=auto", "run.max_steps=1")
    run(
        tiny_beton,
        tmp_path,
        "resume=auto",
        "run.max_steps=3",
        "data.threads=2",
        "run.keep=1",
        "data.mix_alpha=3",
    )


def test_data_are_the_same_by_content_not_by_path(tiny_beton: Path, tmp_path: Path) -> None:
    """Moved: goes on. Other images, labels or number under the same path: refused, for data.train
    and data.val alike.
    """
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tiny_beton, data / "a.beton")
    run(data / "a.beton", tmp_path, "run.max_steps=2")
    moved = shutil.move(data / "a.beton", data / "b.beton")
    run(moved, tmp_path, "run.max_steps=3", "resume=auto")

    rng = np.random.default_rng(5)
    others = {
        "another content": list(rng.integers(0, 256, (96, 32, 32, 3), dtype=np.uint8)),
        "96 images, now 64": list(rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)),
    }
    for says, images in others.items():
        other = write_beton(data / "a.beton", images, [i % 10 for i in range(len(images))])
        for field in ("train", "val"):
            with pytest.raises(
                ValueError, match=rf"other data than data\.{field} is now: .*{says}"
            ):
                run(moved, tmp_path, "run.max_steps=4", "resume=auto", f"data.{field}={other}")


def test_a_run_that_diverges_stops_and_says_where(tiny_beton: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"non-finite steps in a row.*last good checkpoint"):
        run(tiny_beton, tmp_path, "optim.lr=1e30", "run.max_skipped=4")


def test_what_fails_later_does_not_hide_why_a_run_stopped(
    tiny_beton: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("cannot be closed")

    monkeypatch.setattr(pipelines.Loader, "close", broken)
    monkeypatch.setattr(SummaryWriter, "close", broken)
    with pytest.raises(NonFinite):
        run(tiny_beton, tmp_path, "optim.lr=1e30", "run.max_skipped=4")
    said = capsys.readouterr().out
    assert "warning: the loader was not closed properly: cannot be closed" in said
    assert "warning: TensorBoard is off from here on: cannot be closed" in said
    _, result = run(tiny_beton, tmp_path / "good", "run.max_steps=2")
    assert result["steps"] == 2


# ------------------------------------------------------------------ the folder of a run


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def fail_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(step: Step) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "__call__", out_of_memory)


def fail_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipelines.loaders.reference", None)


def fail_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "Log", no_room)


STARTS_THAT_FAIL = {
    "data": (["data.val=/nowhere.beton"], None, ValueError),
    "model": (["model.name=vit_b_16"], None, ValueError),
    "batch": (["optim.clean_batch=512"], None, ValueError),
    "package": ([], fail_without_the_package, ImportError),
    "memory": ([], fail_in_the_first_step, torch.cuda.OutOfMemoryError),
    "disk": ([], fail_on_a_full_disk, OSError),
}


@pytest.mark.parametrize("case", STARTS_THAT_FAIL)
def test_a_start_that_fails_leaves_nothing_behind(
    tiny_beton: Path, tmp_path: Path, case: str, monkeypatch
) -> None:
    """Neither in a new place nor in a folder with a checkpoint; the next attempt's config.yaml is
    its own.
    """
    overrides, breaks, error = STARTS_THAT_FAIL[case]
    run(tiny_beton, tmp_path / "old", "run.max_steps=2")
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        if breaks is not None:
            breaks(patch)
        for runs in (tmp_path / "new" / "place", tmp_path / "old"):
            with pytest.raises(error):
                run(
                    tiny_beton,
                    runs,
                    "resume=auto",
                    "run.log_every=2",
                    "run.max_steps=3",
                    *overrides,
                )
    assert tree(tmp_path) == before
    folder, _ = run(tiny_beton, tmp_path / "new" / "place", "optim.lr=0.7", "run.max_steps=1")
    assert load_config(folder / "config.yaml").optim.lr == 0.7
    assert not (folder / ".lock").exists()


def test_config_yaml_says_how_the_run_runs_now(tiny_beton: Path, tmp_path: Path) -> None:
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=2")
    run(tiny_beton, tmp_path, "run.max_steps=3", "run.log_every=2", "resume=auto")
    now, before = (
        load_config(folder / "config.yaml"),
        load_config(folder / "config-until-step-2.yaml"),
    )
    assert (now.run.max_steps, now.run.log_every) == (3, 2)
    assert (before.run.max_steps, before.run.log_every) == (2, 1)
    assert not (folder / "versions-until-step-2.json").exists()  # nothing changed
    shutil.rmtree(
        folder / "checkpoints"
    )  # as if the first save had not come about: the run starts over
    run(tiny_beton, tmp_path, "run.max_steps=1", "optim.lr=0.7", "resume=auto")
    assert load_config(folder / "config.yaml").optim.lr == 0.7


def test_one_run_per_folder(tiny_beton: Path, tmp_path: Path) -> None:
    config = load_config(None, words(tiny_beton, tmp_path, "run.max_steps=1", "resume=auto"))
    first = Run(config)
    with pytest.raises(
        ValueError,
        match=r"another process trains in .*seed0: wait for it, or use another name or seed",
    ):
        Run(config)
    Run(config.model_copy(update={"seed": 1})).train()
    assert first.train()["steps"] == 1
    assert Run(config).train()["steps"] == 1


def test_a_lock_file_that_its_last_holder_removed_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """Between our opening and locking it, the other process ends and a third one starts."""
    at, lock = tmp_path / ".lock", run_folder.lock
    holders = []

    def overtaken(file: IO[bytes]) -> bool:
        if not holders:
            at.unlink()
            holders.append(at.open("ab"))
            assert lock(holders[0])
        return lock(file)

    monkeypatch.setattr(run_folder, "lock", overtaken)
    folder = run_folder.RunFolder(tmp_path, print)
    with pytest.raises(ValueError, match="another process trains in"):
        folder.take(may_go_on=True)
    folder.release()
    holders[0].close()
    folder.take(may_go_on=True)
    folder.release()


def test_without_locks_a_run_goes_on_with_a_warning(
    tiny_beton: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(run_folder, "lock", lambda file: False)
    _, result = run(tiny_beton, tmp_path, "run.max_steps=1")
    assert result["steps"] == 1
    assert "has no locks: never start two runs in this folder" in capsys.readouterr().out


# ------------------------------------------------------------------ what fap-train says of failures


def fail_as_gloo_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(step: Step) -> None:
        raise RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by"
            " peer\nand more"
        )

    monkeypatch.setattr(Step, "__call__", gone)


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (
            fail_in_the_first_step,
            "fap-train: out of memory: CUDA out of memory\nremedies: fewer optim.clean_batch rows",
        ),
        (fail_as_gloo_does, "fap-train: another rank is gone, its own output says why ([/pytorch"),
        (
            fail_without_the_package,
            "fap-train: pipeline = 'reference' needs a package that is missing",
        ),
        (fail_on_a_full_disk, "fap-train: [Errno 28] No space left on device\n"),
    ],
)
def test_the_environments_faults_are_a_message(
    breaks, says: str, tiny_beton: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    breaks(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        cli.main(words(tiny_beton, tmp_path))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(says)
    assert list(tmp_path.iterdir()) == []


def test_our_own_faults_keep_their_traceback(tiny_beton: Path, tmp_path: Path, monkeypatch) -> None:
    def wrong(step: Step) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Step, "__call__", wrong)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        cli.main(words(tiny_beton, tmp_path))


@pytest.mark.slow
def test_no_room_at_all_is_a_message(tiny_beton: Path, tmp_path: Path) -> None:
    """Not even for what torch writes when it is imported."""
    done = subprocess.run(
        ["prlimit", "--fsize=0", *command(*words(tiny_beton, tmp_path))],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("fap-train: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train=null", "data.train is not set"),
        ("seed=9999999999999999999", "seed = 9999999999999999999"),
        ("data.train=/nowhere/x.beton", "/nowhere/x.beton"),
        ("model.num_classes=5", "labels 0 to 9"),
        ("optim.clean_batch=512", "fewer than one batch"),
        ("model.name=resnet1000", "neither torchvision nor timm"),
        ("model.name=vit_b_16", "no batch norm"),
        ("model.name=inception_v3", "does not accept images of 32 px"),
        ("run.graph=on", "need a GPU"),
        (
            "run.norm_kernel=triton",
            "run.norm_kernel = 'triton': it needs a GPU; use 'auto' or 'framework'",
        ),
        ("model.init=/nowhere.safetensors", "no such file"),
    ],
)
def test_mistakes_are_one_clear_error(
    tiny_beton: Path, tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        run(tiny_beton, tmp_path, override)


@pytest.mark.parametrize(("wanted", "kernel"), [("auto", "auto"), ("framework", "framework")])
def test_the_norm_that_was_asked_for_is_the_steps(
    tiny_beton: Path, tmp_path: Path, wanted: str, kernel: str
) -> None:
    training = Run(
        load_config(
            None, words(tiny_beton, tmp_path, f"run.norm_kernel={wanted}", "run.max_steps=1")
        )
    )
    assert training.step.norm_state.kernel == kernel
    training.train()
    assert training.step.norm_state.kernel == kernel


def test_a_kernel_that_cannot_be_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, gpu = load_config(None, ["run.norm_kernel=triton"]), torch.device("cuda", 0)
    monkeypatch.setattr(session, "find_spec", lambda name: object())
    assert session.norm_kernel(config, gpu) == "triton"
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"run\.norm_kernel = 'triton': it needs the package triton"
    ):
        session.norm_kernel(config, gpu)
    for kernel in ("auto", "framework"):  # which need none
        assert (
            session.norm_kernel(
                load_config(None, [f"run.norm_kernel={kernel}", "run.compile=true"]), gpu
            )
            == "framework"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "triton", "framework"])
def test_the_norm_that_was_asked_for_runs(
    tiny_beton: Path, tmp_path: Path, wanted: str, monkeypatch, capsys
) -> None:
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

import fap.run.train
from fap.cli.train import main
from fap.step.graph import FreshProcessNeeded

starts, runner = Path(sys.argv.pop(1)), fap.run.train.runner

def failing(step, mode):
    with starts.open("a") as file:
        print(os.getpid(), mode, step.norm_state.kernel, file=file)
    if mode == "auto":
        raise FreshProcessNeeded("the capture failed (made up)", "run.graph=off", "run.norm_kernel=framework")
    return runner(step, mode)

fap.run.train.runner = failing
main()
"""


@pytest.mark.slow
def test_a_run_goes_on_in_a_fresh_process(tiny_beton: Path, tmp_path: Path) -> None:
    """The first start cannot go on; it is replaced, with the same arguments and more, and the run
    is finished.
    """
    script, starts = tmp_path / "fails_once.py", tmp_path / "starts"
    script.write_text(FAILS_ONCE)
    arguments = words(tiny_beton, tmp_path / "runs", "run.max_steps=3", "seed=7")
    environment_ = environment() | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, str(script), str(starts), *arguments],
        env=environment_,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (line.split() for line in starts.read_text().splitlines())
    assert first[1:] == ["auto", "auto"]
    assert second[1:] == ["off", "framework"]
    assert first[0] == second[0]  # replaced, not a child
    settings = "run.graph=off run.norm_kernel=framework resume=auto"
    said = [line for line in done.stderr.splitlines() if "fap-train" in line]
    assert said == [
        f"fap-train: the capture failed (made up); a fresh process goes on with {settings}"
    ]
    folder = tmp_path / "runs" / "fast_advprop" / "seed7"
    assert json.loads((folder / "result.json").read_text())["steps"] == 3
    assert [r["step"] for r in records(folder) if "lr" in r] == [1, 2, 3]
    assert "done: top-1" in done.stdout


@pytest.mark.parametrize("world", [1, 2])
def test_only_a_run_of_one_rank_starts_itself_again(monkeypatch, capsys, world: int) -> None:
    class Failing:
        def __init__(self, *_: object) -> None:
            raise FreshProcessNeeded("the capture failed", "run.graph=off")

    class Ended(Exception):  # noqa: N818
        pass

    def end(code: int) -> None:
        raise Ended(code)

    class Replaced(Exception):  # noqa: N818
        pass

    def execv(*args: object) -> None:
        raise Replaced(*args)

    monkeypatch.setattr(train, "Run", Failing)
    monkeypatch.setattr(distributed, "connect", lambda: Ranks(0, world, 0))
    monkeypatch.setattr(Ranks, "gather", lambda ranks, fact: [fact] * ranks.world)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "_exit", end)
    if world == 1:
        with pytest.raises(Replaced) as replaced:
            cli.main(["run.graph=auto", "--pipeline", "dali"])
        program, command = replaced.value.args
        assert program == sys.executable
        expected = [
            "-m",
            "fap.cli.train",
            "run.graph=auto",
            "--pipeline",
            "dali",
            "run.graph=off",
            "resume=auto",
        ]
        assert command == [sys.executable, *expected]
    else:
        with pytest.raises(Ended, match="1"):
            cli.main(["run.graph=auto"])
        advice = "start again with run.graph=off resume=auto"
        assert (
            capsys.readouterr().err
            == f"fap-train: the capture failed; this process cannot go on: {advice}\n"
        )


def test_the_leak_is_reported(tiny_beton: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def leaking(metrics: dict[str, float]) -> dict[str, float]:
        return {"acc_clean": 0.5, "acc_adv": 0.9}

    monkeypatch.setattr(train, "rates", leaking)
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=4")
    assert "leak labels" in capsys.readouterr().out
    assert any("leak" in r for r in records(folder))


@pytest.mark.slow
def test_a_frozen_run_keeps_its_losses(tiny_beton: Path, tmp_path: Path) -> None:
    """100 losses of a seeded run against the recorded ones; 2% covers other CPUs and torch versions
    at step 100.
    """
    file = Path(__file__).parents[1] / "assets" / "frozen_losses.json"
    folder, _ = run(
        tiny_beton,
        tmp_path,
        "budget.epochs=30",
        "optim.lr=0.05",
        "run.eval_every=100",
        "run.torch_threads=1",
    )
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
def test_every_config_runs_two_steps(
    tiny_beton: Path, tmp_path: Path, file: Path, monkeypatch
) -> None:
    """Only data, image size, batch and number of steps are overridden, never model or method."""
    monkeypatch.setattr(
        checkpoint, "save", lambda *_: None
    )  # half a gigabyte for a ResNet-152; saved in other tests
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
    store = pipelines.open_store(data)
    samples = [store.read(i).reshape(32, 32, 3) for i in range(len(store))] * 2
    return write_beton(folder / "twice.beton", samples, [*store.labels.tolist()] * 2)
