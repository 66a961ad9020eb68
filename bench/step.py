"""Seconds per step: ours against peers written from public recipes, and each of our ingredients
taken away.

Every contender alternates in short blocks with our own step on images of the same shape: the ratio
is its seconds per step over ours, with a 95% bootstrap interval. Without a GPU: CIFAR size, no CUDA
graph, no AMP unless asked for.
"""

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pipelines
from bench.common import alternate, options, ratio, report, spread
from fap.config import Config, make_config
from fap.nets.build import build, plain
from fap.nets.norm import Group, norm_state, set_groups
from fap.nets.stem import stem_of
from fap.run.epoch import plan_spec
from fap.run.stopwatch import Stopwatch
from fap.run.torch_setup import set_up_torch
from fap.step.graph import runner
from fap.step.step import Step

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
AMPS = ("fp16", "bf16", "off")[:: 1 if GPU else -1]  # the first is the default
SCHEDULES = ("sequential", "pipelined", *(["parallel"] if GPU else []))  # and fused, the default
INGREDIENTS = ("channels_last", "stem function", "half-precision copy", "norm kernel", "graph")
ON_A_GPU_ONLY = ("norm kernel", "graph")  # the kernel also needs channels_last
sync = torch.cuda.synchronize if GPU else lambda: None


def config_of(model: str, rows: int, size: int, **method: Any) -> Config:
    """Data of CIFAR-10's kind up to 64 pixels, of ImageNet's above."""
    data = {"size": size, "resize": size, "crop": "random_resized" if size > 64 else "pad"}
    model_config = {"name": model, "num_classes": 1000 if size > 64 else 10}
    return make_config(
        {"model": model_config, "method": method, "data": data, "optim": {"clean_batch": rows}}
    )


def synthetic(config: Config) -> pipelines.Batch:
    shape = (
        config.optim.clean_batch + config.loader_adv_rows,
        3,
        config.data.size,
        config.data.size,
    )
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE).contiguous(
        memory_format=torch.channels_last
    )
    return pipelines.Batch(
        images, torch.randint(0, config.model.num_classes, shape[:1], device=DEVICE), 0
    )


class Contestant:
    """Our step and its data: those of a loader, or one batch again and again; perhaps `without` an
    ingredient.
    """

    def __init__(
        self,
        config: Config,
        amp: Any,
        store: Any = None,
        pipeline: Any = "",
        without: str = "",
        compiled: str = "",  # torch.compile's back end
    ) -> None:
        torch.manual_seed(0)
        set_up_torch(DEVICE)  # as in fap-train, for the peers too
        self.config, size, spec = config, config.data.size, plan_spec(config)
        self.model = build(
            config.model.name,
            config.model.num_classes,
            aux=config.method.name != "vanilla",
            size=size,
        )
        stem = stem_of(self.model)
        if without == "stem function" and stem is not None:
            stem.__class__ = torch.nn.Conv2d  # then the whole batch gets an input gradient
        layout = torch.contiguous_format if without == "channels_last" else torch.channels_last
        self.step = Step(self.model.to(DEVICE, memory_format=layout), config, amp=amp)
        self.step.pass_input = [x.contiguous(memory_format=layout) for x in self.step.pass_input]
        if without == "half-precision copy":
            self.step.half = None  # then autocast casts every weight in every pass
        sides = (store.heights, store.widths) if store else np.full((2, spec.loaded_rows), size)
        self.plan, self.at, self.sample = (
            pipelines.draw_epoch(spec, *sides, 0),
            0,
            synthetic(config),
        )
        self.draws = {
            k: torch.from_numpy(getattr(self.plan, k).copy()).to(DEVICE)
            for k in ("shuffle", "noise_key")
        }
        self.loader = (
            pipelines.open_loader(pipeline, store, size=size, device=DEVICE) if store else None
        )
        self.run = self.step
        norm = norm_state(self.model)
        norm.kernel = "framework"  # counts alike; a kernel that fails is for the runner to replace
        with FlopCounterMode(display=False) as counter:
            self.train(self.sample)
        self.flops, watch = counter.get_total_flops(), Stopwatch()
        norm.kernel = "framework" if compiled or without == "norm kernel" else "auto"
        if compiled:
            self.step.forward = torch.compile(self.model, backend=compiled)
        self.run, self.how = runner(self.step, "on" if GPU and without != "graph" else "off")
        self.run()
        sync()
        self.startup = watch.lap()[0]

    def train(self, batch: pipelines.Batch) -> None:
        self.step.feed(
            batch.images, batch.labels, 0.01, **{k: v[batch.step] for k, v in self.draws.items()}
        )
        self.run()

    def block(self, steps: int) -> tuple[float, float]:
        """Seconds per step, and the part of them spent waiting for data."""
        warm_up, batches = 0, itertools.repeat(self.sample)
        if self.loader:
            warm_up = 4  # batches decoded while the other contestant ran, or a cold start
            if len(self.plan) <= warm_up:
                raise ValueError(
                    f"{self.loader.store.path}: {len(self.plan)} steps of {len(self.sample.labels)}"
                    f" rows; at least {warm_up + 1} are needed, {warm_up} of them to warm up"
                )
            steps = min(steps, len(self.plan) - warm_up)
            first = self.at if self.at + warm_up + steps <= len(self.plan) else 0
            batches, self.at = self.loader.load(self.plan, first), first + warm_up + steps
        watch = Stopwatch()
        batches = watch.on(batches)
        for count in (warm_up, steps):
            sync()
            watch.lap()
            for batch in itertools.islice(batches, count):
                self.train(batch)
        sync()
        seconds, waited = watch.lap()
        return seconds / steps, waited / steps


class Peer(Contestant):
    """Another's loop, whole-batch norms: torchvision's reference and timm's for `vanilla`, else the
    authors' three passes.
    """

    def __init__(self, config: Config, amp: str, nhwc: bool = False, compiled: str = "") -> None:
        self.vanilla, name, classes = (
            config.method.name == "vanilla",
            config.model.name,
            config.model.num_classes,
        )
        layout, batch = torch.channels_last if nhwc else torch.contiguous_format, synthetic(config)
        self.loader, self.sample = (
            None,
            replace(batch, images=batch.images.contiguous(memory_format=layout)),
        )
        model = (
            plain(name, classes) if self.vanilla else build(name, classes, size=config.data.size)
        )
        if not self.vanilla:
            norm_state(model).kernel = "framework"  # theirs is the framework's
        self.model = model.to(DEVICE, memory_format=layout).train()
        self.forward = torch.compile(self.model, backend=compiled) if compiled else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4
        )
        self.scaler, self.reads = torch.amp.GradScaler(DEVICE.type, enabled=amp == "fp16"), not nhwc
        self.cast = torch.autocast(
            DEVICE.type, torch.bfloat16 if amp == "bf16" else torch.float16, amp != "off", False
        )
        self.rows = config.optim.clean_batch

    def _backward(
        self, x: torch.Tensor, labels: torch.Tensor, weight: float, bn: Any = None
    ) -> None:
        if bn:
            set_groups(self.model, [Group(bn, len(x), 0, 1)])
        with self.cast:
            logits = self.forward(x)
            loss = (
                torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                * weight
                / len(self.sample.labels)
            )
        self.scaler.scale(loss).backward()
        if self.reads:  # the reference loop's meters wait for the device in every step
            loss.item(), (logits.argmax(1) == labels).sum().item()

    def _three_passes(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        self._backward(x[: self.rows], labels[: self.rows], 1, "main")
        source, labels, eps = x[self.rows :], labels[self.rows :], 2 / 255
        noise = source + torch.empty_like(source).uniform_(-eps, eps)
        self._backward(noise.requires_grad_(), labels, 0.5, "aux")
        adv = noise.detach() + eps * noise.grad.sign()
        adv = torch.minimum(torch.maximum(adv, source - eps), source + eps).clamp_(-1, 1)
        order = torch.randperm(len(adv), device=adv.device)
        self._backward(adv[order], labels[order], 0.5, "aux")
        for name, p in self.model.named_parameters():  # one kernel per parameter
            p.grad.mul_(
                len(x) / len(source)
                if ".aux." in f".{name}"
                else len(x) / self.rows
                if "bn" in name
                else 1
            )

    def train(self, batch: pipelines.Batch) -> None:
        self.optimizer.zero_grad()
        x = batch.images.float().sub_(127.5).div_(127.5)
        self._backward(x, batch.labels, 1) if self.vanilla else self._three_passes(x, batch.labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def contenders(a: Any) -> list[tuple[Config, str, Callable[[], Contestant]]]:
    """(our step's config, the other's name, what makes it) of all that this machine and these
    options allow.

    First the targets; then what compiles for a minute each; a time limit may cut off the rest.
    """
    vanilla = config_of(a.model, a.rows, a.size, name="vanilla")
    fused, *others = (config_of(a.model, a.rows, a.size, schedule=s) for s in ("fused", *SCHEDULES))
    amp, backend = a.amp, a.compile_backend
    every = [
        (vanilla, "torchvision reference: fp32, NCHW", partial(Peer, vanilla, "off")),
        (vanilla, f"timm-like: AMP {amp}, NHWC", partial(Peer, vanilla, amp, nhwc=True)),
        (fused, "authors' three passes: fp32, NCHW", partial(Peer, fused, "off")),
        (fused, f"authors' three passes: AMP {amp}, NHWC", partial(Peer, fused, amp, nhwc=True)),
        (vanilla, "timm-like, compiled", partial(Peer, vanilla, amp, nhwc=True, compiled=backend)),
        (vanilla, "ours, compiled", partial(Contestant, vanilla, amp, compiled=backend)),
        (
            vanilla,
            "vanilla without norm kernel",
            partial(Contestant, vanilla, amp, without="norm kernel"),
        ),
        *((fused, f"ours, {c.method.schedule}", partial(Contestant, c, amp)) for c in others),
        *(
            (fused, f"ours without {w}", partial(Contestant, fused, amp, without=w))
            for w in INGREDIENTS
        ),
        (fused, "ours without AMP", partial(Contestant, fused, "off")),
        (fused, "Fast AdvProp, compiled", partial(Contestant, fused, amp, compiled=backend)),
    ]
    missing = () if a.compile else ("compiled",)
    missing += () if GPU else ON_A_GPU_ONLY
    missing += ("without AMP", "half-precision copy") if amp == "off" else ()
    return [contender for contender in every if not contender[1].endswith(missing)]


def main(argv: Any = None) -> int:
    model, size, rows, rounds, block = (
        ("resnet50", 224, 64, 10, 5) if GPU else ("cifar_resnet8", 32, 128, 15, 1)
    )
    parser = options(
        __doc__, model=model, size=size, rows=rows, rounds=rounds, block=block, compile=GPU
    )
    parser.add_argument("--amp", choices=AMPS, default=AMPS[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="contenders whose names hold one of these",
    )
    parser.add_argument(
        "--compile-backend", default="inductor", help="of torch.compile; default: %(default)s"
    )
    a = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    own: dict[str, Contestant] = {}
    for config, name, make in contenders(a):
        if not any(word in name for word in a.only):
            continue
        method = config.method.name
        result: dict[str, Any] = {"ours": method, "other": name}
        try:
            own[method] = mine = own.get(method) or Contestant(config, a.amp)
            theirs, times = alternate(
                [partial(c.block, a.block) for c in (make(), mine)], a.rounds
            )[:, 0]
            result |= {
                "how": mine.how,
                "our rows/s": config.optim.clean_batch / float(np.median(times)),
                "other's s": spread(theirs),
                "our s": spread(times),
                "other / ours": ratio(theirs, times),
            }
        except (
            Exception
        ) as e:  # out of GPU memory, a failed capture, Triton's errors, which are no RuntimeError
            result["error"] = f"{type(e).__name__}: {e}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
        results.append(result)
        print(report(f"step_{DEVICE.type}", a, results, ["other / ours"])[-1], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
