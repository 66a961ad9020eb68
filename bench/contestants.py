"""Our step as a contestant: it trains in short timed blocks, which alternate with those of others.

A library of the benches that time steps. What touches the inside of `Step` or of a batch stands
here (and, for other people's loops, in `bench.peers`), not in the benches.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pipelines
from fap.config import Config, make_config
from fap.nets.build import prepare
from fap.nets.dual import norm_state
from fap.nets.retinanet import SPECS
from fap.run.epoch import plan_spec, step_draws
from fap.run.stopwatch import Stopwatch
from fap.run.torch_setup import set_up_torch
from fap.step.graph import runner
from fap.step.passes import passes_of
from fap.step.step import Step
from fap.tasks import make_task
from pipelines.sizes import Size, sides_of

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
GROUP_ROWS = 64  # of vanilla's batch norm, as on several GPUs
DETECTOR_GROUP_ROWS = 8  # as in configs/coco
COCO_CLASSES = 80
COCO_BUDGET = {"epochs": 24, "milestones": [16, 22]}  # Table 7
COCO_CLIP_NORM = 35  # as in configs/coco
MOST_SYNTHETIC_BOXES = 8  # of an image; COCO's have 7 on average
LR = 0.01  # any that trains: nothing here is trained to the end
LOADER_WARM_UP = 4  # batches decoded while another contestant ran, or a cold start


def sync() -> None:
    """Wait until the device has done all that it was asked for."""
    if GPU:
        torch.cuda.synchronize()


def canvas(text: str) -> Size:
    """An option's value: 224, or 800x1344, height by width."""
    height, by, width = text.partition("x")
    try:
        if by:
            return int(height), int(width)
        return int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be N or HxW, pixels") from None


def is_detector(model: str) -> bool:
    """Is it trained to find boxes?"""
    return model in SPECS


def config_of(model: str, rows: int, size: Size, **method: Any) -> Config:
    """For `rows` clean rows; a detector's is that of configs/coco at `size`.

    Other data is like CIFAR-10's up to 64 pixels a side, like ImageNet's above.
    """
    if is_detector(model):
        return _detector_config(model, rows, size, {"group_rows": DETECTOR_GROUP_ROWS} | method)
    if max(sides_of(size)) > LARGEST_CIFAR_SIZE:
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


def _detector_config(model: str, rows: int, size: Size, method: dict[str, Any]) -> Config:
    return make_config(
        {
            "task": "detection",
            "model": {"name": model, "num_classes": COCO_CLASSES},
            "method": method,
            "data": {"size": size, "crop": "letterbox"},
            "optim": {"clean_batch": rows, "clip_norm": COCO_CLIP_NORM},
            "budget": COCO_BUDGET,
        }
    )


def method_of(schedule: str) -> dict[str, str]:
    """The method's config by a bench's word: `vanilla`, or a schedule of Fast AdvProp."""
    if schedule == "vanilla":
        return {"name": "vanilla"}
    return {"schedule": schedule}


def synthetic(config: Config) -> tuple[pipelines.Batch, torch.Tensor]:
    """A batch of random images, of the shape that a loader would give, and targets (1, B, ...).

    They are random labels, or the boxes of `synthetic_boxes`.
    """
    rows = config.optim.clean_batch + config.loader_adv_rows
    shape = (rows, 3, *config.data.sides)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    images = pixels.contiguous(memory_format=torch.channels_last)
    if is_detector(config.model.name):
        targets = synthetic_boxes(config, rows).to(DEVICE)[None]
    else:
        targets = torch.randint(0, config.model.classes, (1, rows), device=DEVICE)
    return pipelines.Batch(images, 0), targets


def synthetic_boxes(config: Config, rows: int) -> torch.Tensor:  # float32 (rows, most_boxes, 5)
    """Random boxes of random classes, from none to eight in an image, as `Detection.targets`."""
    most_boxes = config.data.most_boxes
    height, width = config.data.sides
    classes = torch.randint(0, config.model.classes, (rows, most_boxes, 1))
    # Two corners, of each coordinate the lesser one first; a box has at least 1 px a side.
    corners = torch.rand(rows, most_boxes, 2, 2).sort(2).values
    corners = corners * torch.tensor([width - 1, height - 1])
    corners[:, :, 1] += 1
    boxes = torch.cat([classes, corners.flatten(2)], 2)
    counts = torch.randint(0, MOST_SYNTHETIC_BOXES + 1, (rows, 1, 1))
    counts[0] = 0  # whatever is drawn, some image has none
    padding = torch.tensor([-1.0, 0, 0, 0, 0])
    return torch.where(torch.arange(most_boxes)[:, None] < counts, boxes, padding)


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
        plain = make_task(config).plain_model()
        self.model = prepare(plain, aux=config.method.has_aux, size=size)
        self.step = self._made_step(amp, without)

        spec = plan_spec(config)
        if pipeline and spec.filter not in pipelines.BACK_ENDS[pipeline].filters:
            spec = replace(spec, filter=pipelines.BACK_ENDS[pipeline].filters[0])
        heights, widths = (np.full(spec.loaded_rows, side) for side in spec.sides)
        if store is not None:
            heights, widths = store.heights, store.widths
        self.plan = pipelines.draw_epoch(spec, heights, widths, 0)
        self.at = 0  # step of the plan where the next block begins
        self.sample, self.targets = synthetic(config)
        if store is not None:
            self.targets = self.step.task.targets(store, self.plan).to(DEVICE)
        self.draws = step_draws(self.plan, config, DEVICE)
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
        layout = torch.channels_last
        if without == "channels_last":
            layout = torch.contiguous_format
        step = Step(self.model.to(DEVICE, memory_format=layout), self.config, amp=amp)
        if without == "stem function":
            step.network.stem = None  # then the whole batch gets an input gradient
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
