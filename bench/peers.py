"""Other people's training loops, written in our own words from public recipes.

A library of `bench.step`. For `vanilla` torchvision's reference loop (float32, NCHW, loss and
accuracy read back in every step) or timm's (AMP, channels_last); else the authors' three passes.
All hold one card, and norm over the whole batch. Their images start as uint8 like ours, so nobody's
loader is measured.
"""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import pipelines
from bench.contestants import DEVICE, LR, synthetic, timed_steps
from fap.config import Config
from fap.nets.build import build, plain
from fap.nets.dual import norm_state, set_groups
from fap.nets.norm import Group

EPS = 2 / 255  # of pixels in [-1, 1]: the paper's 1 of 255 grey levels
AUX_WEIGHT = 0.5  # of the noise rows' loss and of the adversarial rows', section 3.2.2
MIDDLE_255 = 127.5  # grey level that becomes 0, and half the range


class Peer:
    """Another's loop on the data of `config`, again and again on one batch."""

    def __init__(self, config: Config, amp: str, *, nhwc: bool = False, compiled: str = "") -> None:
        self.vanilla = config.method.name == "vanilla"
        self.clean_rows = config.optim.clean_batch
        layout = torch.contiguous_format
        if nhwc:
            layout = torch.channels_last
        batch, self.labels = synthetic(config)
        images = batch.images.contiguous(memory_format=layout)
        self.sample = pipelines.Batch(images, batch.step)
        if self.vanilla:
            model = plain(config.model.name, config.model.num_classes)
        else:
            model = build(config.model.name, config.model.num_classes, size=config.data.size)
            norm_state(model).kernel = "framework"  # theirs is the framework's
        self.model = model.to(DEVICE, memory_format=layout).train()
        self.forward = self.model
        if compiled:
            self.forward = torch.compile(self.model, backend=compiled)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LR, momentum=0.9, weight_decay=1e-4
        )
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=amp == "fp16")
        self.cast = torch.autocast(
            DEVICE.type,
            torch.bfloat16 if amp == "bf16" else torch.float16,
            enabled=amp != "off",
            cache_enabled=False,
        )
        self.reads_meters = not nhwc

    def block(self, steps: int) -> tuple[float, float]:
        """Seconds per step, and the part of them spent waiting for data: none."""
        return timed_steps(self.train, itertools.repeat(self.sample), steps)

    def train(self, batch: pipelines.Batch) -> None:
        self.optimizer.zero_grad()
        x = batch.images.float().sub_(MIDDLE_255).div_(MIDDLE_255)
        if self.vanilla:
            self._backward(x, self.labels[batch.step])
        else:
            self._three_passes(x, self.labels[batch.step])
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _three_passes(
        self,
        x: Tensor,  # (B, 3, H, W) in [-1, 1]: clean rows, then those to be attacked
        labels: Tensor,  # int64 (B,)
    ) -> None:
        """Clean rows, noise rows, whose input gradient attacks, and adversarial rows."""
        self._backward(x[: self.clean_rows], labels[: self.clean_rows], bn="main")
        source = x[self.clean_rows :]
        labels = labels[self.clean_rows :]
        noise = source + torch.empty_like(source).uniform_(-EPS, EPS)
        self._backward(noise.requires_grad_(), labels, AUX_WEIGHT, "aux")
        adv = noise.detach() + EPS * noise.grad.sign()
        adv = torch.minimum(torch.maximum(adv, source - EPS), source + EPS).clamp_(-1, 1)
        order = torch.randperm(len(adv), device=adv.device)
        self._backward(adv[order], labels[order], AUX_WEIGHT, "aux")
        self._synchronise(len(x), len(source))

    def _synchronise(self, rows: int, adv_rows: int) -> None:
        """Update-speed synchronisation as released: one kernel per parameter."""
        for name, parameter in self.model.named_parameters():
            factor: float = 1
            if ".aux." in f".{name}":
                factor = rows / adv_rows
            elif "bn" in name:
                factor = rows / self.clean_rows
            parameter.grad.mul_(factor)

    def _backward(
        self,
        x: Tensor,  # (rows, 3, H, W) in [-1, 1]
        labels: Tensor,  # int64 (rows,)
        weight: float = 1,
        bn: Literal["main", "aux"] | None = None,  # None: a plain model
    ) -> None:
        """One pass. The loss is divided by all rows of the step."""
        if bn is not None:
            set_groups(self.model, [Group(bn, len(x), 0, 1)])
        with self.cast:
            logits = self.forward(x)
            loss_sum = F.cross_entropy(logits, labels, reduction="sum")
            loss = loss_sum * weight / len(self.sample.images)
        self.scaler.scale(loss).backward()
        if self.reads_meters:  # the reference loop's meters wait for the device in every step
            loss.item()
            (logits.argmax(1) == labels).sum().item()
