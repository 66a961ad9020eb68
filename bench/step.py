"""Seconds per step: ours against peers written from public recipes, and each of our ingredients taken away.

Every contender alternates in short blocks with our own step on images of the same shape: the ratio is its seconds
per step over ours, with a 95% bootstrap interval. Without a GPU: CIFAR size, no CUDA graph, no AMP unless asked for.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import pipelines
from bench.common import spread, write_json
from fap.config import Config, make_config
from fap.graph import runner
from fap.models import build, plain, stem_of
from fap.norm import Group, set_groups, shared_groups
from fap.step import Step
from fap.train import plan_spec

# fmt: off
GPU = torch.cuda.is_available()
sync = torch.cuda.synchronize if GPU else lambda: None

def config_of(a: Any, model: str, rows: int, **method: Any) -> Config:
    data = {"size": a.size, "resize": a.size, "crop": "random_resized" if a.size > 64 else "pad"}
    model_config = {"name": model, "num_classes": 1000 if a.size > 64 else 10}
    return make_config({"model": model_config, "method": method, "data": data, "optim": {"clean_batch": rows}})

def synthetic(config: Config, device: torch.device) -> pipelines.Batch:
    shape = (config.optim.clean_batch + config.loader_adv_rows, 3, config.data.size, config.data.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).contiguous(memory_format=torch.channels_last)
    return pipelines.Batch(images, torch.randint(0, config.model.num_classes, shape[:1], device=device), 0)

class Contestant:
    """Our step and its data: those of a loader, or one batch again and again; perhaps `without` an ingredient."""

    def __init__(self, config: Config, amp: Any, a: Any, store: pipelines.Store | None = None, without: str = "") -> None:
        torch.manual_seed(0)
        self.config, size, spec = config, config.data.size, plan_spec(config)
        model = build(config.model.name, config.model.num_classes, aux=config.method.name != "vanilla", size=size)
        stem, self.model = stem_of(model), model.to(a.device)
        if without == "stem function" and stem is not None:
            stem.__class__ = torch.nn.Conv2d  # then the whole batch gets an input gradient
        layout = torch.contiguous_format if without == "channels_last" else torch.channels_last
        self.step = Step(model.to(memory_format=layout), config, amp=amp)
        self.step.pass_input = [x.contiguous(memory_format=layout) for x in self.step.pass_input]
        sides = (store.heights, store.widths) if store else np.full((2, 64 * spec.loaded_rows), size)
        self.plan, self.at, self.sample = pipelines.draw_epoch(spec, *sides, 0), 0, synthetic(config, a.device)
        names = ("shuffle", "noise_key") if self.step.n_adv else ()
        self.draws = {k: torch.from_numpy(getattr(self.plan, k).copy()).to(a.device) for k in names}
        self.loader = pipelines.open_loader(a.pipeline, store, size=size, device=a.device) if store else None
        self.feed(self.sample, 0)
        with FlopCounterMode(display=False) as counter:
            self.step()
        self.flops, began = counter.get_total_flops(), time.perf_counter()
        shared_groups(model).functional = a.compile or without == "norm slices"
        if a.compile:
            self.step.forward = torch.compile(model)
        self.run, self.how = runner(self.step, "off" if without == "graph" else a.graph)
        self.run()
        sync()
        self.startup = time.perf_counter() - began

    def feed(self, batch: pipelines.Batch, at: int) -> None:
        self.step.feed(batch.images, batch.labels, 0.01, **{k: v[at] for k, v in self.draws.items()})

    def block(self, steps: int) -> tuple[float, float]:
        """Seconds per step, and the part of them spent waiting for data."""
        warm_up = 4 if self.loader else 0  # batches decoded while the other contestant ran, or a cold start
        steps = min(steps, len(self.plan) - warm_up)
        first = self.at if self.at + warm_up + steps <= len(self.plan) else 0
        batches = iter(self.loader.load(self.plan, first)) if self.loader else itertools.repeat(self.sample)
        self.at = first + warm_up + steps
        for at in range(first, self.at):
            if at == first + warm_up:
                sync()
                began, waited = time.perf_counter(), 0.0
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.feed(batch, at)
            self.run()
        sync()
        return (time.perf_counter() - began) / steps, waited / steps

class Peer:
    """Another's loop, whole-batch norms: torchvision's reference and timm's for `vanilla`, else the authors' three passes."""

    def __init__(self, config: Config, amp: str, a: Any, nhwc: bool = False, compiled: bool = False) -> None:
        self.vanilla, name, classes = config.method.name == "vanilla", config.model.name, config.model.num_classes
        layout, batch = torch.channels_last if nhwc else torch.contiguous_format, synthetic(config, a.device)
        model = plain(name, classes) if self.vanilla else build(name, classes, size=config.data.size)
        self.model = model.to(a.device, memory_format=layout).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        self.scaler, self.reads = torch.amp.GradScaler(a.device.type, enabled=amp == "fp16"), not nhwc
        self.cast = torch.autocast(a.device.type, torch.bfloat16 if amp == "bf16" else torch.float16, amp != "off", False)
        self.images, self.labels = batch.images.contiguous(memory_format=layout), batch.labels
        self.rows = config.optim.clean_batch

    def _backward(self, x: torch.Tensor, labels: torch.Tensor, weight: float, bn: Any = None) -> None:
        if bn:
            set_groups(self.model, [Group(bn, len(x), 0, 1)])
        with self.cast:
            logits = self.forward(x)
            loss = F.cross_entropy(logits, labels, reduction="sum") * weight / len(self.labels)
        self.scaler.scale(loss).backward()
        if self.reads:  # the reference loop's meters wait for the device in every step
            loss.item(), (logits.argmax(1) == labels).sum().item()

    def _three_passes(self, x: torch.Tensor) -> None:
        (clean, source), labels, eps = (x[: self.rows], x[self.rows :]), self.labels[self.rows :], 2 / 255
        self._backward(clean, self.labels[: self.rows], 1, "main")
        noise = source + torch.empty_like(source).uniform_(-eps, eps)
        self._backward(noise.requires_grad_(), labels, 0.5, "aux")
        adv = noise.detach() + eps * noise.grad.sign()
        adv = torch.minimum(torch.maximum(adv, source - eps), source + eps).clamp_(-1, 1)
        order = torch.randperm(len(adv), device=adv.device)
        self._backward(adv[order], labels[order], 0.5, "aux")
        for name, p in self.model.named_parameters():  # one kernel per parameter
            p.grad.mul_(len(x) / len(source) if ".aux." in f".{name}" else len(x) / self.rows if "bn" in name else 1)

    def block(self, steps: int) -> tuple[float, float]:
        sync()
        began = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            x = self.images.float().sub_(127.5).div_(127.5)
            self._backward(x, self.labels, 1) if self.vanilla else self._three_passes(x)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        sync()
        return (time.perf_counter() - began) / steps, 0.0

def alternate(contestants: Any, rounds: int, block: int) -> np.ndarray:
    """(contestants, 2, rounds): seconds per step and waiting, in turns; the first two rounds are thrown away."""
    return np.array([[c.block(block) for c in contestants] for _ in range(rounds + 2)])[2:].transpose(1, 2, 0)

def ratio(top: np.ndarray, bottom: np.ndarray, fixed: Any = (0, 0)) -> dict[str, float]:
    """(median(top) + fixed) / (median(bottom) + fixed) with its 95% bootstrap interval over the rounds."""
    picks = np.random.default_rng(0).integers(len(top), size=(4000, len(top)))
    value, drawn = ((np.median(t, -1) + fixed[0]) / (np.median(b, -1) + fixed[1])
                    for t, b in ((top, bottom), (top[picks], bottom[picks])))
    return dict(zip(("ratio", "low", "high"), map(float, (value, *np.percentile(drawn, (2.5, 97.5)))), strict=True))

def main(argv: Any = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--amp", choices=["off", "fp16", "bf16"], default="fp16" if GPU else "off")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=GPU, help="also the compiled contenders")
    values = ("resnet50", 224, 64, 10, 5) if GPU else ("cifar_resnet8", 32, 128, 15, 1)
    for name, value in zip(("model", "size", "rows", "rounds", "block"), values, strict=True):
        p.add_argument(f"--{name}", type=type(value), default=value)
    p.add_argument("--out", type=Path, default=Path("bench/results"))
    a = p.parse_args(argv)
    meta = {k: v for k, v in vars(a).items() if k != "out"}
    a.device, a.graph, compiled, a.compile = torch.device("cuda" if GPU else "cpu"), "auto", a.compile, False
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    vanilla, fused = config_of(a, a.model, a.rows, name="vanilla"), config_of(a, a.model, a.rows, schedule="fused")
    squeezed = argparse.Namespace(**vars(a) | {"compile": True})  # as `a`, compiled
    contenders: list[tuple[Config, str, Any]] = [
        (vanilla, "torchvision reference: fp32, NCHW", lambda: Peer(vanilla, "off", a)),
        (vanilla, f"timm-like: AMP {a.amp}, NHWC", lambda: Peer(vanilla, a.amp, a, nhwc=True)),
        (vanilla, "timm-like, compiled", lambda: Peer(vanilla, a.amp, a, nhwc=True, compiled=True)),
        (vanilla, "ours, compiled", lambda: Contestant(vanilla, a.amp, squeezed)),
        (fused, "authors' three passes: fp32, NCHW", lambda: Peer(fused, "off", a)),
        (fused, f"authors' three passes: AMP {a.amp}, NHWC", lambda: Peer(fused, a.amp, a, nhwc=True)),
        *((fused, f"ours, {s}", lambda s=s: Contestant(config_of(a, a.model, a.rows, schedule=s), a.amp, a))
          for s in ("sequential", "pipelined")),
        *((fused, f"ours without {w}", lambda w=w: Contestant(fused, a.amp, a, without=w))
          for w in ("channels_last", "norm slices", "stem function", *(["graph"] if GPU else []))),
        (fused, "ours without AMP", lambda: Contestant(fused, "off", a)),
        (fused, "ours, compiled", lambda: Contestant(fused, a.amp, squeezed)),
    ]
    results, own, baseline = [], None, None
    for config, name, make in contenders:
        if ("compiled" in name and not compiled) or ("without AMP" in name and a.amp == "off"):
            continue
        if config is not baseline:
            own, baseline = Contestant(config, a.amp, a), config
        theirs, mine = alternate([make(), own], a.rounds, a.block)[:, 0]
        torch.cuda.empty_cache()
        r = {"ours": config.method.name, "how": own.how, "other": name, "s": spread(theirs), "ours_s": spread(mine)}
        results.append(r | ratio(theirs, mine))
        print("{ours:12} {other:40} {s[median]:.4f} s, ours {ours_s[median]:.4f} s: {ratio:.3f} [{low:.3f}, {high:.3f}]".format(
            **results[-1]), flush=True)
        write_json(a.out / f"step_{a.device.type}.json", {**meta, "results": results})
    return 0

if __name__ == "__main__":
    sys.exit(main())
