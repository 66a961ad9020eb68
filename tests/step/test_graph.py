"""How a step is run: the warm-up, the capture, and what follows when one of them fails.

No GPU: `tests/step/stand_in.py` answers in torch.cuda's place. tests/step/test_capture.py has real
captures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import pytest
import torch

from fap.step.graph import WARM_UP_STEPS, FreshProcessNeeded, Graphed, answers, runner
from tests.step.made_steps import changed, clone, make
from tests.step.stand_in import (
    ILLEGAL_ACCESS,
    OUT_OF_MEMORY,
    StandIn,
    class_name,
    failing_kernel,
    said,
    triton_errors,
    watch_kernels,
)

Mode = Literal["auto", "on", "off"]
NormKernel = Literal["auto", "triton", "framework"]

any_mode = pytest.mark.parametrize("mode", ["auto", "on", "off"])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


# ---------------------------------------------------------------------- nothing fails


def test_graph_on_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"run\.graph = 'on'.*'auto' or 'off'"):
        runner(make("vanilla"), "on")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_without_a_gpu_the_step_itself_runs_eagerly(mode: Mode) -> None:
    step = make("fused")
    assert runner(step, mode) == (step, "eager")


def test_a_step_is_warmed_up_and_captured(
    stand_in: StandIn, recwarn: pytest.WarningsRecorder
) -> None:
    step = stand_in.step()
    forwards = watch_kernels(step)
    replay, how = runner(step, "auto")
    assert how == "CUDA graph"
    assert len(forwards) == (WARM_UP_STEPS + 1) * len(step.passes)
    assert stand_in.captures == 1
    stand_in.assert_untouched(step)
    assert said(recwarn) == []
    assert stand_in.events == [{"blocking": True}] * 2  # the host sleeps while it waits

    # Each call waits for the replay before the last one.
    assert isinstance(replay, Graphed)
    first: Any
    second: Any
    first, second = replay.done
    for done, other in ((first, second), (second, first)):
        replay()
        done.synchronize.assert_called_once()
        done.record.assert_called_once()
        assert replay.done == [other, done]


def test_off_tries_the_step_and_runs_it_eagerly(stand_in: StandIn) -> None:
    step = stand_in.step()
    forwards = watch_kernels(step)
    assert runner(step, "off") == (step, "eager")
    assert len(forwards) == WARM_UP_STEPS * len(step.passes)
    assert stand_in.captures == 0
    stand_in.assert_untouched(step)


def test_the_frameworks_norm_asked_for_by_name_is_said(stand_in: StandIn) -> None:
    step = stand_in.step()
    step.network.norm_state.kernel = "framework"
    failing_kernel(step, RuntimeError("never"))
    assert runner(step, "auto")[1] == "CUDA graph, framework norm"
    assert runner(step, "off")[1] == "eager, framework norm"


# ---------------------------------------------------------------------- the warm-up fails


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "error"),
    [
        *(("auto", error) for error in triton_errors()),
        ("on", triton_errors()[0]),
        ("off", triton_errors()[0]),
    ],
    ids=lambda value: value if isinstance(value, str) else class_name(value),
)
def test_a_kernel_that_fails_gives_way_to_the_framework(
    stand_in: StandIn, mode: Mode, error: Exception, recwarn: pytest.WarningsRecorder
) -> None:
    step = stand_in.step()
    failing_kernel(step, error)
    run, how = runner(step, mode)
    if mode == "off":
        assert how == "eager, framework norm"
        assert run is step
    else:
        assert how == "CUDA graph, framework norm"
        assert run is not step
    assert step.network.norm_state.kernel == "framework"
    stand_in.assert_untouched(step)

    (warning,) = said(recwarn)
    assert warning.startswith(f"the Triton norm kernel failed ({type(error).__name__}: ")
    assert warning.endswith("; the framework's batch norm is used instead")
    assert "\n" not in warning
    if hasattr(error, "error_message"):
        assert error.error_message in warning  # not only the source that the compiler quotes

    step()
    assert changed(stand_in.before, clone(step))


@any_mode
def test_a_kernel_asked_for_by_name_does_not_give_way(stand_in: StandIn, mode: Mode) -> None:
    step = stand_in.step()
    step.network.norm_state.kernel = "triton"
    error = ImportError("No module named 'triton'")
    failing_kernel(step, error)
    with pytest.raises(ImportError) as raised:
        runner(step, mode)
    assert raised.value is error
    assert step.network.norm_state.kernel == "triton"
    stand_in.assert_untouched(step)


@pytest.mark.slow
@any_mode
def test_an_error_that_is_not_the_kernels_is_raised(
    stand_in: StandIn, mode: Mode, recwarn: pytest.WarningsRecorder
) -> None:
    step = stand_in.step()
    error = AssertionError("a bug of ours")
    failing_kernel(step, error, kernels=("auto", "framework"))
    with pytest.raises(AssertionError, match="a bug of ours") as raised:
        runner(step, mode)
    assert "the Triton norm kernel failed" in raised.value.__notes__[0]
    assert said(recwarn) == []
    stand_in.assert_untouched(step)


@pytest.mark.parametrize("kernel", ["auto", "framework"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=class_name)
def test_out_of_memory_in_the_warm_up_is_raised(
    stand_in: StandIn, error: Exception, kernel: NormKernel
) -> None:
    step = stand_in.step()
    step.network.norm_state.kernel = kernel
    failing_kernel(step, error, kernels=("auto", "framework"))
    with pytest.raises(type(error)) as raised:
        runner(step, "auto")
    assert raised.value is error
    assert step.network.norm_state.kernel == kernel
    stand_in.assert_untouched(step)


def test_an_interruption_leaves_the_step_as_it_was(stand_in: StandIn) -> None:
    step = stand_in.step()
    failing_kernel(step, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        runner(step, "auto")
    stand_in.assert_untouched(step)


@any_mode
def test_a_kernel_that_kills_the_device_needs_a_fresh_process(
    stand_in: StandIn, mode: Mode
) -> None:
    step = stand_in.step()
    failing_kernel(step, RuntimeError(ILLEGAL_ACCESS), stand_in)
    says = r"norm kernel failed.*illegal memory access"
    with pytest.raises(FreshProcessNeeded, match=says) as raised:
        runner(step, mode)
    assert raised.value.settings == ("run.norm_kernel=framework",)
    assert str(raised.value).endswith("start again with run.norm_kernel=framework resume=auto")
    assert stand_in.streams == [stand_in.stream]


@pytest.mark.parametrize("kernel", ["triton", "framework"])
def test_a_device_that_dies_of_what_was_asked_for_is_that_error(
    stand_in: StandIn, kernel: NormKernel
) -> None:
    step = stand_in.step()
    error = RuntimeError(ILLEGAL_ACCESS)
    step.network.norm_state.kernel = kernel
    failing_kernel(step, error, stand_in, kernels=(kernel,))
    with pytest.raises(RuntimeError) as raised:
        runner(step, "auto")
    assert raised.value is error


# ---------------------------------------------------------------------- the capture fails


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operation not permitted when stream is capturing"),
        *triton_errors()[-2:],
        *OUT_OF_MEMORY,
    ],
    ids=class_name,
)
def test_a_failed_capture_leaves_the_step_as_it_was(
    stand_in: StandIn, mode: Mode, error: Exception, recwarn: pytest.WarningsRecorder
) -> None:
    """`auto` goes on eagerly from where it began; this torch forgets the failed capture."""
    step = stand_in.step()
    stand_in.capture_error = error
    if mode == "on" or error in OUT_OF_MEMORY:
        with pytest.raises(type(error)) as raised:
            runner(step, mode)
        assert raised.value is error
    else:
        assert runner(step, mode) == (step, "eager")
        (warning,) = said(recwarn)
        assert warning.startswith("the step could not be captured (")
        assert warning.endswith(", so it runs eagerly")
    assert stand_in.captures == 1
    stand_in.assert_untouched(step)


BELIEVING = ("2.11.0+cu130", "2.12.1", "2.13.0")  # in a failed capture
FORGETTING = ("2.14.0", "2.20.0.dev20270101", "3.0.0")


@pytest.mark.slow
@pytest.mark.parametrize("version", [*BELIEVING, *FORGETTING])
@pytest.mark.parametrize("kernel", ["auto", "triton", "framework"])
def test_a_torch_that_believes_in_the_capture_needs_a_fresh_process(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, version: str, kernel: NormKernel
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    step = stand_in.step()
    step.network.norm_state.kernel = kernel
    stand_in.capture_error = RuntimeError("operation failed due to a previous error during capture")
    if version in BELIEVING:
        says = r"could not be captured.*previous error"
        with pytest.raises(FreshProcessNeeded, match=says) as raised:
            runner(step, "auto")
        if kernel == "framework":
            assert raised.value.settings == ("run.graph=off", "run.norm_kernel=framework")
        else:
            assert raised.value.settings == ("run.graph=off",)
    else:
        with pytest.warns(UserWarning, match="could not be captured"):
            runner(step, "auto")
    stand_in.assert_untouched(step)


def test_a_capture_after_a_failed_kernel_asks_for_both(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", BELIEVING[0])
    step = stand_in.step()
    failing_kernel(step, ImportError("No module named 'triton'"))
    stand_in.capture_error = RuntimeError("no")
    with (
        pytest.warns(UserWarning, match="norm kernel"),
        pytest.raises(FreshProcessNeeded) as raised,
    ):
        runner(step, "auto")
    assert raised.value.settings == ("run.graph=off", "run.norm_kernel=framework")


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_capture_that_kills_the_device(stand_in: StandIn, mode: Mode) -> None:
    step = stand_in.step()
    error = RuntimeError(ILLEGAL_ACCESS)

    @contextlib.contextmanager
    def killing(*_: Any, **__: Any) -> Iterator[None]:
        yield
        stand_in.dead = True
        raise error

    with mock.patch.object(torch.cuda, "graph", killing), pytest.raises(RuntimeError) as raised:
        runner(step, mode)
    if mode == "on":
        assert raised.value is error
    else:
        assert isinstance(raised.value, FreshProcessNeeded)
        assert raised.value.settings == ("run.graph=off",)


# ---------------------------------------------------------------------- does the device answer?


def test_an_error_that_is_reported_once_more_is_no_death(stand_in: StandIn) -> None:
    step = stand_in.step()
    assert answers(step)
    stand_in.pending = 1
    assert answers(step)
    stand_in.pending = 2
    assert not answers(step)
    stand_in.dead = True
    assert not answers(step)


def test_a_full_device_still_answers(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "synchronize", full)
    assert answers(stand_in.step())
