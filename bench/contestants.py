"""Our step as a contestant: it trains in short timed blocks, which alternate with those of others.

A library of the benches that time steps. What touches the inside of `Step` or of a batch stands
here (and, for other people's loops, in `bench.peers`), not in the benches.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pipelines
from fap.config import Config, make_config
from fap.nets.build import build
from fap.nets.dual import norm_state
from fap.nets.stem import stem_of
from fap.run.epoch import plan_spec
from fap.run.stopwatch import Stopwatch
from fap.run.torch_setup import set_up_torch
from fap.step.graph import runner
from fap.step.passes import passes_of
from fap.step.step import Step

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

# What is measured unless asked otherwise. The first precision is the default one.
if GPU:
    MODEL = "resnet50"
    SIZE = 224  # pixels a side
    AMPS = ("fp16", "bf16", "off")
    SCHEDULES: tuple[str, ...] = ("sequential", "pipelined", "parallel")  # and fused, the default
else:
    MODEL = "cifar_resnet8"
    SIZE = 32
    AMPS = ("off", "bf16", "fp16")
    SCHEDULES = ("sequential", "pipelined")

LARGEST_CIFAR_SIZE = 64  # pixels a side; above it the data is like ImageNet's
LR = 0.01  # any that trains: nothing here is trained to the end
LOADER_WARM_UP = 4  # batches decoded while another contestant ran, or a cold start


def sync() -> None:
    """Wait until the device has done all that it was asked for."""
    if GPU:
        torch.cuda.synchronize()


def config_of(model: str, rows: int, size: int, **method: Any) -> Config:
    """For `rows` clean rows; data like CIFAR-10's up to 64 pixels a side, like ImageNet's above."""
    if size > LARGEST_CIFAR_SIZE:
        crop = "random_resized"
        classes = 1000
    else:
        crop = "pad"
        classes = 10
    return make_config(
        {
            "model": {"name": model, "num_classes": classes},
            "method": method,
            "data": {"size": size, "resize": size, "crop": crop},
            "optim": {"clean_batch": rows},
        }
    )


def method_of(schedule: str) -> dict[str, str]:
    """The method's config by a bench's word: `vanilla`, or a schedule of Fast AdvProp."""
    if schedule == "vanilla":
        return {"name": "vanilla"}
    return {"schedule": schedule}


def synthetic(config: Config) -> tuple[pipelines.Batch, torch.Tensor]:
    """A batch of random images, of the shape that a loader would give, and their labels (1, B)."""
    rows = config.optim.clean_batch + config.loader_adv_rows
    shape = (rows, 3, *config.data.sides)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    images = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, config.model.num_classes, (1, rows), device=DEVICE)
    return pipelines.Batch(images, 0), labels


def largest_pass(config: Config) -> int:
    """Rows of the largest pass of a step on one device."""
    return max(one.n_rows for one in passes_of(config.method, config.optim.clean_batch))


def timed_steps(
    train: Callable[[pipelines.Batch], None],
    batches: Iterator[pipelines.Batch],
    steps: int,
    warm_up: int = 0,
) -> tuple[float, float]:
    """Seconds per step, and the part of them spent waiting for data, after `warm_up` steps."""
    watch = Stopwatch()
    batches = watch.on(batches)
    for batch in itertools.islice(batches, warm_up):
        train(batch)
    sync()
    watch.lap()
    for batch in itertools.islice(batches, steps):
        train(batch)
    sync()
    seconds, waited = watch.lap()
    return seconds / steps, waited / steps


class Contestant:
    """Our step and its data: those of a loader, or one batch again and again.

    `without` takes an ingredient away: one of `bench.step.INGREDIENTS`.
    """

    def __init__(
        self,
        config: Config,
        amp: Any,
        store: pipelines.Store | None = None,  # without one, random images
        pipeline: Any = "",  # the loader's name
        *,
        without: str = "",
        compiled: str = "",  # torch.compile's back end
    ) -> None:
        torch.manual_seed(0)
        set_up_torch(DEVICE)  # as in fap-train, for the peers too
        self.config = config
        size = config.data.size
        self.model = build(
            config.model.name, config.model.num_classes, aux=config.method.entry.has_aux, size=size
        )
        self.step = self._made_step(amp, without)

        spec = plan_spec(config)
        heights, widths = np.full((2, spec.loaded_rows), size)
        if store is not None:
            heights, widths = store.heights, store.widths
        self.plan = pipelines.draw_epoch(spec, heights, widths, 0)
        self.at = 0  # step of the plan where the next block begins
        self.sample, self.targets = synthetic(config)
        if store is not None:
            self.targets = self.step.task.targets(store, self.plan).to(DEVICE)
        self.draws = {}
        for name in ("shuffle", "noise_key"):
            self.draws[name] = torch.from_numpy(getattr(self.plan, name).copy()).to(DEVICE)
        self.loader: Any = None
        if store is not None:
            self.loader = pipelines.open_loader(pipeline, store, size=size, device=DEVICE)

        self.run: Callable[[], object] = self.step
        norm = norm_state(self.model)
        norm.kernel = "framework"  # counts alike; a kernel that fails is for the runner to replace
        with FlopCounterMode(display=False) as counter:
            self.train(self.sample)
        self.flops = counter.get_total_flops()

        watch = Stopwatch()
        norm.kernel = "auto"
        if compiled or without == "norm kernel":
            norm.kernel = "framework"
        if compiled:
            self.step.network.forward = torch.compile(self.model, backend=compiled)
        captured = GPU and without != "graph"
        self.run, self.how = runner(self.step, "on" if captured else "off")
        self.run()
        sync()
        self.startup = watch.lap()[0]  # seconds: warm-up, capture, compilation

    def _made_step(self, amp: Any, without: str) -> Step:
        """The step of the model, `without` one of what belongs to the step or to the model."""
        stem = stem_of(self.model)
        if without == "stem function" and stem is not None:
            stem.__class__ = torch.nn.Conv2d  # then the whole batch gets an input gradient
        layout = torch.channels_last
        if without == "channels_last":
            layout = torch.contiguous_format
        step = Step(self.model.to(DEVICE, memory_format=layout), self.config, amp=amp)
        step.pass_input = [x.contiguous(memory_format=layout) for x in step.pass_input]
        if without == "half-precision copy":
            step.network.half = None  # then autocast casts every weight in every pass
        return step

    def train(self, batch: pipelines.Batch) -> None:
        """One step. The plan's draws are those of the batch's row of it."""
        draws = {name: values[batch.step] for name, values in self.draws.items()}
        self.step.feed(batch.images, self.targets[batch.step], LR, **draws)
        self.run()

    def block(self, steps: int) -> tuple[float, float]:
        """Seconds per step, and the part of them spent waiting for data.

        With a loader a block may be shorter, and begins where the last one ended, or anew.
        """
        if self.loader is None:
            return timed_steps(self.train, itertools.repeat(self.sample), steps)
        warm_up = LOADER_WARM_UP
        if len(self.plan) <= warm_up:
            raise ValueError(
                f"{self.loader.store.path}: {len(self.plan)} steps of {len(self.sample.images)} "
                f"rows; at least {warm_up + 1} are needed, {warm_up} of them to warm up"
            )
        steps = min(steps, len(self.plan) - warm_up)
        if self.at + warm_up + steps > len(self.plan):
            self.at = 0
        batches = self.loader.load(self.plan, self.at)
        self.at += warm_up + steps
        return timed_steps(self.train, batches, steps, warm_up)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
