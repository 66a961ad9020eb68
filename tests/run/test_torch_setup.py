"""torch in the process of a run: its threads, its precision, its batch norm."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fap.config import load_config
from fap.nets.norm import DualBatchNorm2d
from fap.run import torch_setup
from fap.run.train import Run
from tests.run.runs import run, words

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("wanted", "cores", "used"), [(None, 2, 2), (None, 100, 4), (3, 2, 3)])
def test_threads_follow_a_quota_unless_their_number_is_given(
    wanted: int | None, cores: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch_setup, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch_setup.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch_setup.torch, "set_num_threads", set_to.append)
    torch_setup.limit_threads(wanted)
    assert set_to == [used]


@pytest.mark.parametrize(
    ("wanted", "device", "amp"),
    [("auto", CPU, "off"), ("auto", GPU, "fp16"), ("bf16", CPU, "bf16"), ("off", GPU, "off")],
)
def test_half_precision_is_the_default_on_a_gpu_only(
    wanted: str, device: torch.device, amp: Any
) -> None:
    config = load_config(None, [f"run.amp={wanted}"])
    assert torch_setup.precision(config, device) == amp
    assert torch_setup.settled(config, amp).run.amp == amp
    assert config.run.amp == wanted


@pytest.mark.parametrize("wanted", ["auto", "framework"])
def test_the_norm_that_was_asked_for_is_the_steps(
    tiny_beton: Path, tmp_path: Path, wanted: str
) -> None:
    settings = words(tiny_beton, tmp_path, f"run.norm_kernel={wanted}", "run.max_steps=1")
    training = Run(load_config(None, settings))
    assert training.step.network.norm_state.kernel == wanted
    training.train()
    assert training.step.network.norm_state.kernel == wanted


def test_a_kernel_that_cannot_be_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["run.norm_kernel=triton"])
    monkeypatch.setattr(torch_setup, "find_spec", lambda name: object())
    assert torch_setup.norm_kernel(config, GPU) == "triton"
    monkeypatch.setattr(torch_setup, "find_spec", lambda name: None)
    says = r"run\.norm_kernel = 'triton': it needs the package triton"
    with pytest.raises(ValueError, match=says):
        torch_setup.norm_kernel(config, GPU)
    for kernel in ("auto", "framework"):  # which need none
        compiled = load_config(None, [f"run.norm_kernel={kernel}", "run.compile=true"])
        assert torch_setup.norm_kernel(compiled, GPU) == "framework"


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "triton", "framework"])
def test_the_norm_that_was_asked_for_runs(
    tiny_beton: Path,
    tmp_path: Path,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    calls = []
    on_grid = DualBatchNorm2d._on_grid

    def counted(norm: Any, x: Any, residual: Any, groups: Any) -> Any:
        calls.append(norm)
        return on_grid(norm, x, residual, groups)

    monkeypatch.setattr(DualBatchNorm2d, "_on_grid", counted)
    run(tiny_beton, tmp_path, f"run.norm_kernel={wanted}", "run.device=cuda", "run.max_steps=2")
    assert bool(calls) == (wanted != "framework")
    assert (", CUDA graph, framework norm," in capsys.readouterr().out) == (wanted == "framework")
