"""Capture of a whole step as one CUDA graph, and its replay.

A step qualifies when its shapes are static, it never asks the device for a value and everything that changes
between steps lies in tensors: `fap.step.Step` on the CPU and here is the same function.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Literal

import torch

from fap.step import Step


class Graphed:
    """Replays `step` as one CUDA graph. Warm-up and capture, failed ones too, leave its state and the generator alone.

    A call first waits for the replay before the last one: the host is never further ahead, so the time it then spends
    waiting for the loader is time in which the GPU is about to starve.
    """

    def __init__(self, step: Step) -> None:
        self.step = step  # whose tensors the graph reads and writes
        self.done = [torch.cuda.Event(), torch.cuda.Event()]
        before = {name: tensor.clone() for name, tensor in step.state().items()}
        random = torch.cuda.get_rng_state(step.device)
        current, side = torch.cuda.current_stream(step.device), torch.cuda.Stream(step.device)
        try:
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):  # allocations, cuDNN plans and compiled kernels happen here, not in the capture
                    step()
            current.wait_stream(side)
            gc.collect()  # garbage of before the capture must not be freed inside it
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: loaders, TensorBoard and NCCL's watchdog have threads of their own that may call CUDA meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                step()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own
            for name, tensor in step.state().items():
                tensor.copy_(before[name])
            torch.cuda.set_rng_state(random, step.device)

    def __call__(self) -> None:
        self.done[0].synchronize()
        self.graph.replay()
        self.done[0].record()
        self.done.reverse()


def runner(step: Step, mode: Literal["auto", "on", "off"]) -> tuple[Callable[[], None], str]:
    """What to call once per step, and how it runs: `CUDA graph` or `eager`.

    `on` raises ValueError without a GPU and whatever the capture raises; only `auto` may fall back, with a warning, and not
    when memory runs out.
    """
    if mode == "on" and step.device.type != "cuda":
        raise ValueError("run.graph = 'on': CUDA graphs need a GPU; use 'auto' or 'off'")
    if mode == "off" or step.device.type != "cuda":
        return step, "eager"
    try:
        return Graphed(step), "CUDA graph"
    except RuntimeError as e:
        if mode == "on" or isinstance(e, torch.cuda.OutOfMemoryError):
            raise
        warnings.warn(f"the step could not be captured, so it runs eagerly: {e}", stacklevel=2)
        return step, "eager"
