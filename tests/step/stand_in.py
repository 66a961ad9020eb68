"""torch.cuda as `fap.step.graph` sees it, on a CPU, failing as a test wishes."""

from __future__ import annotations

import ast
import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fap.nets.norm import DualBatchNorm2d, Group
from fap.step.step import Step
from tests.step.made_steps import changed, clone, make

ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"

OUT_OF_MEMORY: list[Exception] = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


class StandIn:
    """What `fap.step.graph` asks of torch.cuda, with the failures that a test wishes for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = mock.Mock(name="the current stream")
        self.streams: list[Any] = []  # made current by hand
        self.events: list[dict[str, Any]] = []  # arguments of their making
        self.random: Any = "as before"  # the generator's state
        self.dead = False  # every answer is an error from now on
        self.pending = 0  # so many answers are an error
        self.capture_error: Exception | None = None
        self.captures = 0
        for name in ("graph", "synchronize", "get_rng_state", "set_rng_state"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: mock.Mock())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: mock.Mock())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", self.streams.append)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch, "__version__", "2.14.0")
        monkeypatch.setattr(DualBatchNorm2d, "_on_grid", on_grid)

    def step(self, variant: str = "pipelined") -> Step:
        """A step that says it is on a GPU; its state is remembered."""
        step = make(variant)
        # After __init__ only the runner looks at this field of the step.
        step.device = torch.device("cuda")
        self.before = clone(step)
        return step

    def event(self, **options: Any) -> mock.Mock:
        self.events.append(options)
        return mock.Mock()

    @contextlib.contextmanager
    def graph(self, *_: Any, **__: Any) -> Iterator[None]:
        """A capture fails at its end, as real ones do."""
        self.captures += 1
        yield
        if self.capture_error is not None:
            raise self.capture_error

    def synchronize(self, *_: Any) -> None:
        if self.dead or self.pending:
            self.pending = max(0, self.pending - 1)
            raise RuntimeError(ILLEGAL_ACCESS)

    def get_rng_state(self, _: Any) -> Any:
        return self.random

    def set_rng_state(self, state: Any, _: Any) -> None:
        self.random = state

    def assert_untouched(self, step: Step) -> None:
        """State, metrics, generator and stream are as they were when the step was made."""
        assert not changed(self.before, clone(step))
        assert torch.equal(step.metrics.sums, self.before["metrics"])
        assert self.random == "as before"
        assert set(self.streams) == {self.stream}


def on_grid(
    norm: DualBatchNorm2d, x: Tensor, residual: Tensor | None, groups: Sequence[Group]
) -> Tensor:
    """The twin in place of the norm kernel, which takes seconds in Triton's interpreter."""
    kernel = norm.shared.kernel
    norm.shared.kernel = "framework"
    try:
        return norm.forward(x, residual)
    finally:
        norm.shared.kernel = kernel


def watch_kernels(step: Step) -> list[str]:
    """Which norm kernel each forward of the step was to use; fills as the step runs."""
    return failing_kernel(step, None, kernels=())


def failing_kernel(
    step: Step,
    error: BaseException | None,
    gpu: StandIn | None = None,
    kernels: tuple[str, ...] = ("auto", "triton"),
) -> list[str]:
    """After a first step, forwards with one of the `kernels` raise `error`.

    `gpu`, if given, is dead from then on. Returns a list as `watch_kernels` does.
    """
    whole: Callable[[Tensor], Tensor] = step.network.forward
    used: list[str] = []

    def forward(x: Tensor) -> Tensor:
        kernel = step.network.norm_state.kernel
        used.append(kernel)
        torch.cuda.set_rng_state("moved on", None)  # type: ignore[arg-type]
        if kernel in kernels and len(used) > len(step.passes):
            if gpu is not None:
                gpu.dead = True
            assert error is not None
            raise error
        return whole(x)

    step.network.forward = forward
    return used


def triton_errors() -> list[Exception]:
    """One of every class that a launch of the kernel can raise on some machine."""
    errors: list[Exception] = [
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        ImportError("No module named 'triton'"),
        FileNotFoundError(2, "No such file or directory: 'ptxas'"),
    ]
    with contextlib.suppress(ImportError):
        from triton.compiler import errors as compiler
        from triton.runtime import errors as runtime

        node = ast.parse("a + b").body[0]
        for made in (
            compiler.CompilationError,
            compiler.CompileTimeAssertionFailure,
            compiler.UnsupportedLanguageConstruct,
        ):
            errors.append(made("a + b", node, "b is not defined"))
        errors.append(runtime.OutOfResources(300_000, 232_448, "shared memory"))
        errors.append(runtime.PTXASError("fatal: unknown target"))
    return errors


def class_name(error: Exception) -> str:
    """A test's id."""
    return type(error).__name__


def said(recwarn: pytest.WarningsRecorder) -> list[str]:
    """Our warnings.

    A file or process that an earlier test left open is collected, and warned of, at any time.
    """
    return [str(w.message) for w in recwarn.list if not issubclass(w.category, ResourceWarning)]
