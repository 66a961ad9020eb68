"""The section `run`: where and how a run is run; nothing of what it trains."""

from __future__ import annotations

from typing import Literal

from fap.fields import FilePath, PositiveInt, Section


class RunConfig(Section):
    dir: FilePath = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """auto: fp16 on a GPU, off on a CPU."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph; auto: on a GPU."""
    norm_kernel: Literal["auto", "triton", "framework"] = "auto"
    """Batch norm in training: our Triton kernel, or the framework's group after group.
    auto: on a GPU triton, and framework, with a warning, if that fails."""
    compile: bool = False
    torch_threads: PositiveInt | None = None
    """CPU threads of the training process; unset: torch's default, or a container's CPU quota if
    that is less."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps in all; the schedule is that of the whole run."""
    log_every: PositiveInt = 50
    """Steps between records."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints; one is also written at each epoch's end."""
    keep: PositiveInt = 2
    """Checkpoints that are kept."""
    keep_best: bool = True
    """Also keep that of the best epoch, as best.safetensors: a link to it, not counted in `keep`.
    fap-eval and fap-export take it with --best."""
    eval_every: PositiveInt = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_batch: PositiveInt | None = None
    """Images of an evaluation's batch over all ranks; unset: what suits the task, 256 or 16."""
    max_skipped: PositiveInt = 20
    """Consecutive non-finite steps after which the run stops."""
