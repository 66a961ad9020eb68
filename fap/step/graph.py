"""How the step is run: warmed up, captured whole as one CUDA graph, and what if either fails.

A step qualifies for capture when its shapes are static, it never asks the device for a value, and
everything that changes between steps lies in tensors. `fap.step.step.Step` is written so, and is
the same function on a CPU and here.
"""

import contextlib
import gc
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from fap.step.step import Step

WARM_UP_STEPS = 3  # allocations, cuDNN plans and compiled kernels belong here, not in the capture
OUT_OF_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")
LONGEST_MESSAGE = 300  # characters of an error in a warning
ANSWERS_TRIED = 2  # a lesser error may be reported once more; an illegal access is for ever

# The first torch that forgets a capture which failed at its end. 2.11 raises in
# CUDAGraph::capture_end before it tells the allocators, which then believe in a capture for ever:
# blocks that two streams used are not given back, and empty_cache, or a retry under low memory,
# dies of an internal assertion. pytorch/pytorch#180395 mends that, too late for 2.12. Until
# #190348, too late for 2.13, the failed capture's pool, a whole step's activations, is never freed.
# Read in the machine code of the wheels of 2.11 and 2.14.
FORGETS_FAILED_CAPTURES = (2, 14)


class FreshProcessNeeded(RuntimeError):  # noqa: N818
    """This process can no longer train on its GPU; another one, started with `settings`, can."""

    def __init__(self, reason: str, *settings: str) -> None:
        self.reason = reason
        self.settings = settings  # key=value, as on a command line
        advice = f"start again with {' '.join(settings)} resume=auto"
        super().__init__(f"{reason}; this process cannot go on: {advice}")


class Graphed:
    """Replays `step`, which has been warmed up, as one CUDA graph.

    A call first waits for the replay before the last one, so the host is never further ahead. The
    time it then spends waiting for the loader is time in which the GPU is about to starve.
    """

    def __init__(self, step: Step) -> None:
        self.step = step  # whose tensors the graph reads and writes
        # blocking: the host sleeps until a replay is done. Else it would burn one of the cores that
        # the loader decodes on.
        self.done = [torch.cuda.Event(blocking=True), torch.cuda.Event(blocking=True)]
        gc.collect()  # garbage of before the capture must not be freed inside it
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: loaders, TensorBoard and NCCL's watchdog have threads of their own that may
        # call CUDA meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            step()  # recorded, not run

    def __call__(self) -> None:
        self.done[0].synchronize()
        self.graph.replay()
        self.done[0].record()
        self.done.reverse()


def runner(step: Step, mode: Literal["auto", "on", "off"]) -> tuple[Callable[[], None], str]:
    """What to call once per step, and how it runs, for example `CUDA graph, framework norm`.

    On a GPU the step is tried first. Neither that nor the capture, failed or not, leaves a trace in
    the step's state or the generator. A Triton norm kernel that fails gives way to the framework's
    batch norm if its choice is `auto`, and a capture that fails gives way to eager steps if `mode`
    is; both with a warning. What was asked for by name never falls back. Out of memory is raised.

    Raises:
        ValueError: `on` without a GPU.
        FreshProcessNeeded: there is something to fall back to, but not in this process.
    """
    if step.device.type != "cuda":
        if mode == "on":
            raise ValueError("run.graph = 'on': CUDA graphs need a GPU; use 'auto' or 'off'")
        return step, "eager"
    _settle_the_norm(step)
    norm = ""
    if step.network.norm_state.kernel == "framework":
        norm = ", framework norm"
    if mode == "off":
        return step, f"eager{norm}"
    try:
        with untouched(step):
            return Graphed(step), f"CUDA graph{norm}"
    except Exception as error:
        if mode == "on" or out_of_memory(error):
            raise
        reason = f"the step could not be captured ({describe(error)})"
    # From here on outside the except block: the error's traceback would hold the failed graph.
    if not (forgets_failed_captures() and answers(step)):
        settings = ["run.graph=off"]
        if norm:  # where the kernel failed, it would only fail again
            settings.append("run.norm_kernel=framework")
        raise FreshProcessNeeded(reason, *settings)
    give_memory_back()
    warnings.warn(f"{reason}, so it runs eagerly", stacklevel=2)
    return step, f"eager{norm}"


def _settle_the_norm(step: Step) -> None:
    """Warm the step up, with the framework's norm if it fails and the kernel was our choice.

    The kernel's errors have no base in common: Triton's CompilationError is no RuntimeError, a
    missing compiler is a CalledProcessError, a missing Triton an ImportError. So any error counts.
    """
    choice = step.network.norm_state
    try:
        warm_up(step)
        return
    except Exception as error:
        if choice.kernel != "auto" or out_of_memory(error):
            raise
        reason = f"the Triton norm kernel failed ({describe(error)})"
    # From here on outside the except block: the error's traceback would hold the failed step's
    # activations.
    if not answers(step):
        raise FreshProcessNeeded(reason, "run.norm_kernel=framework")
    give_memory_back()
    choice.kernel = "framework"
    try:
        warm_up(step)
    except Exception as error:  # it was not the kernel's fault, or the step is too large without it
        error.add_note(f"This was with the framework's batch norm, after {reason}.")
        raise
    warnings.warn(f"{reason}; the framework's batch norm is used instead", stacklevel=3)


def warm_up(step: Step) -> None:
    """A few steps that leave no trace, on a side stream as capture wants it.

    Raises their errors, whatever they are.
    """
    current = torch.cuda.current_stream(step.device)
    side = torch.cuda.Stream(step.device)
    with untouched(step):
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                step()
        current.wait_stream(side)
        # A kernel's failure must show here, not in the capture.
        torch.cuda.synchronize(step.device)


@contextlib.contextmanager
def untouched(step: Step) -> Iterator[None]:
    """After the block, failed or not, state, generator and current stream are those of before.

    On a device that answers no more, nothing is left to restore.
    """
    before = {name: tensor.clone() for name, tensor in step.state().items()}
    random = torch.cuda.get_rng_state(step.device)
    current = torch.cuda.current_stream(step.device)
    try:
        yield
    finally:
        torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own
        if answers(step):  # which also waits for what other streams still do to the state
            for name, tensor in step.state().items():
                tensor.copy_(before[name])
            torch.cuda.set_rng_state(random, step.device)


def forgets_failed_captures() -> bool:
    """Can this process go on after a capture that failed? See `FORGETS_FAILED_CAPTURES`."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= FORGETS_FAILED_CAPTURES


def answers(step: Step) -> bool:
    """Does the step's device still compute? After an illegal access it only repeats that error."""
    for _ in range(ANSWERS_TRIED):
        try:
            step.inputs.lr.add(1)
            torch.cuda.synchronize(step.device)
            return True
        except Exception as error:
            if out_of_memory(error):  # a full device computes
                return True
    return False


def out_of_memory(error: Exception) -> bool:
    """Is it for want of memory? Triton, cuDNN, cuBLAS and the host's allocator say so in words."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return any(phrase in str(error) for phrase in OUT_OF_MEMORY)


def describe(error: Exception) -> str:
    """An error in one line; a compiler's without the source that it quotes."""
    message = getattr(error, "error_message", None) or str(error)
    text = f"{type(error).__name__}: {message}"
    return textwrap.shorten(text, LONGEST_MESSAGE, placeholder=" ...")


def give_memory_back() -> None:
    """What a failed attempt, or a graph that has gone, held must not be missing from the next."""
    gc.collect()
    torch.cuda.empty_cache()
