"""One training step of vanilla training, AdvProp, decoupled training and Fast AdvProp.

A step is a list of passes; a pass is one forward and backward over contiguous blocks of rows, each
block going through the main or the auxiliary batch norm in groups. The methods differ only in their
passes and weights, so they share this code and are timed on equal terms:

    vanilla                   [clean]
    advprop, decoupled        attack (input gradients only), then [clean, adv]
    fast_advprop, sequential  [clean]  [noise] -> adv  [adv]           the authors' order
    fast_advprop, parallel    the same three, [clean] on a second stream beside [noise] -> adv  [adv]
    fast_advprop, fused       [clean A, noise] -> adv  [clean B, adv]  two equally large passes
    fast_advprop, pipelined   [clean, noise + adv of the step before]  -> adv of the next

Loss of a pass: sum_i w_i l_i / W with W the sum of weights over all rows of the step and all ranks.
Then the gradients of the main norms are multiplied by W / (weights that reached them), likewise the
auxiliary ones: the update-speed synchronisation of section 3.2.2. Every tensor is static and
nothing asks the device for a value, so the same function runs eagerly on a CPU and is captured as
one CUDA graph.
Twin: tests/reference_step.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fap.config import Config
from fap.distributed import ONE_RANK, Ranks
from fap.nets.dual import norm_state
from fap.nets.norm import Group
from fap.nets.stem import stem_of
from fap.step import attack
from fap.step.flat import Flat, GradientSum
from fap.step.half import HalfWeights, castable
from fap.step.layout import image_order, memory_order

Kind = Literal["clean", "noise", "adv", "mixed"]
Amp = Literal["off", "fp16", "bf16"]
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ("clean", "noise", "adv")
METRICS = (
    *(f"{what}_{kind}" for kind in KINDS for what in ("loss", "correct", "rows", "nonfinite")),
    *("zero_signs", "signs", "steps", "skipped", "skipped_in_a_row"),
)


class Block(NamedTuple):
    """Rows [start, stop) of one kind, of those the device holds."""

    kind: Kind
    start: int
    stop: int


def passes(schedule: str, n_clean: int, n_noise: int, n_adv: int, group: int) -> list[list[Block]]:
    """The passes of a step on one device that holds so many rows of each kind."""
    clean, noise, adv = (
        Block("clean", 0, n_clean),
        Block("noise", 0, n_noise),
        Block("adv", 0, n_adv),
    )
    if schedule == "joint":
        return [[b for b in (clean, adv) if b.stop]]
    if schedule in ("sequential", "parallel"):
        return [[clean], [noise], [adv]]
    if schedule == "pipelined":
        return [[clean, Block("mixed", 0, n_noise + n_adv)]]
    half = -(-n_clean // group // 2) * group
    return [
        [Block("clean", 0, half), noise],
        [b for b in (Block("clean", half, n_clean), adv) if b.stop > b.start],
    ]


@dataclass
class Inputs:
    """The static tensors that a step reads, filled by `Step.feed`."""

    images: Tensor  # uint8 (n_clean + loaded adversarial rows, 3, H, W), channels_last
    labels: Tensor  # int64 (n_clean + loaded adversarial rows,)
    shuffle: (
        Tensor  # int64 (n_adv,): new rows = rows[shuffle], in the numbering of the shuffle's scope
    )
    noise_key: Tensor  # int32 (auxiliary groups,)
    lr: Tensor  # float32 ()
    mix_lam: Tensor  # float32 ()
    mix_box: Tensor  # int64 (4,): top, left, bottom, right in pixels
    mix_partner: Tensor  # int64 (n_clean,)


class Step:
    """A training step over static buffers. `model` must be converted (`fap.nets.build.build`) and
    on its device.
    """

    def __init__(
        self, model: nn.Module, config: Config, ranks: Ranks = ONE_RANK, *, amp: Amp = "off"
    ):
        self.norm_state = norm_state(model)  # first of all: no other model can be trained
        method, data = config.method, config.data
        if config.optim.clean_batch % (ranks.world * method.group_rows):
            raise ValueError(
                f"optim.clean_batch = {config.optim.clean_batch} gives no whole batch-norm groups"
                f" of {method.group_rows} rows on each of {ranks.world} ranks; use a multiple of"
                f" {ranks.world * method.group_rows}"
            )
        classes = config.model.num_classes
        if classes is None or classes < 2:
            raise ValueError(
                f"model.num_classes = {classes}: a classifier needs at least 2 classes, "
                "and a targeted attack a wrong one to aim at"
            )
        self.num_classes: int = classes
        self.model, self.config, self.ranks, self.amp = model.train(), config, ranks, amp
        self.stem = stem_of(model)
        if self.stem is not None:
            self.stem.full_precision = amp == "bf16" and not _survives_bf16(data.mean, data.std)
        cast, half_dtype = castable(model), HALF.get(amp)
        self.flat = Flat(model, first=cast)
        self.half = None if half_dtype is None else HalfWeights(model, self.flat, cast, half_dtype)
        device, self.dtype = self.flat.param.device, self.flat.param.dtype
        self.device = device
        self.forward: Callable[[Tensor], Tensor] = model

        self.n_clean = config.optim.clean_batch // ranks.world
        self.n_adv = self.n_clean // method.group_rows * method.adv_group_rows
        n_loaded = config.loader_adv_rows // ranks.world
        n_noise = self.n_adv if method.reuses_gradient else 0
        schedule = method.schedule or "joint"
        self.passes = passes(schedule, self.n_clean, n_noise, self.n_adv, method.group_rows)
        self.aux_groups = self.n_adv // method.adv_group_rows if self.n_adv else 0

        # Weights (section 3.2.2). `mean` is Algorithm 1: means over each kind, added with beta.
        weight = {
            "clean": method.weight_clean or 1.0,
            "noise": method.weight_noise or 0.0,
            "adv": method.weight_adv or 0.0,
        }
        rows = {"clean": self.n_clean, "noise": n_noise, "adv": self.n_adv}
        total = {k: weight[k] * rows[k] * ranks.world for k in KINDS}
        if method.combine == "mean":
            self.row_weight = {k: weight[k] / (rows[k] * ranks.world) for k in KINDS if rows[k]}
        else:
            self.row_weight = {k: weight[k] / sum(total.values()) for k in KINDS}
        self.main_factor = sum(total.values()) / total["clean"] if method.sync else 1.0
        self.aux_factor = (
            sum(total.values()) / (total["noise"] + total["adv"]) if method.sync else 1.0
        )

        def empty(n: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((n, data.size, data.size, 3), dtype=dtype, device=device).permute(
                0, 3, 1, 2
            )

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.inputs = Inputs(
            images=empty(self.n_clean + n_loaded, torch.uint8),
            labels=ints(self.n_clean + n_loaded),
            shuffle=torch.arange(self.n_adv, device=device),
            noise_key=torch.zeros(self.aux_groups, dtype=torch.int32, device=device),
            lr=torch.zeros((), device=device),
            mix_lam=torch.ones((), device=device),
            mix_box=ints(4),
            mix_partner=torch.arange(self.n_clean, device=device),
        )
        self.pass_input = [
            empty(sum(b.stop - b.start for b in blocks), self.dtype) for blocks in self.passes
        ]
        self.mean_255 = (
            torch.tensor(data.mean, dtype=self.dtype, device=device).mul(255).view(1, 3, 1, 1)
        )
        self.std_255 = (
            torch.tensor(data.std, dtype=self.dtype, device=device).mul(255).view(1, 3, 1, 1)
        )
        self.pixels = torch.arange(data.size, device=device)
        self.adv_255 = empty(
            self.n_adv, self.dtype
        )  # grey levels; with `pipelined` the carry to the next step
        self.adv_labels = ints(self.n_adv)
        self.carries = torch.zeros(
            (), dtype=torch.bool, device=device
        )  # pipelined: is there a carry yet?
        self.gradients = GradientSum(self.flat, self.flat.grad, half_dtype)
        # parallel: the clean pass has gradients of its own, since two streams must not add to the
        # same ones.
        self.clean_gradients = None
        if schedule == "parallel":
            self.clean_gradients = GradientSum(
                self.flat, torch.zeros_like(self.flat.grad), half_dtype
            )
        self.clean_stream = (
            torch.cuda.Stream(device) if schedule == "parallel" and device.type == "cuda" else None
        )

        self.optimizer = torch.optim.SGD(
            [self.flat.param], lr=self.inputs.lr if device.type == "cuda" else 0.0, momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay, fused=True,
        )  # fmt: skip
        # A first step that is skipped would leave an uninitialised buffer behind.
        self.optimizer.state[self.flat.param]["momentum_buffer"] = torch.zeros_like(self.flat.param)
        # Dynamic loss scaling as torch.amp.GradScaler does it, but with the verdict left on the
        # device for us to read.
        self.scale = torch.full((), 2.0**16 if amp == "fp16" else 1.0, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)

        self.metrics = torch.zeros(len(METRICS), dtype=torch.float64, device=device)

    # ------------------------------------------------------------------ the step

    def feed(self, images: Tensor, labels: Tensor, lr: float, **plan_row: Tensor) -> None:
        """Fill the static inputs: a batch of the loader, the learning rate and the plan's draws for
        this step.
        """
        for name, value in (("images", images), ("labels", labels), *plan_row.items()):
            getattr(self.inputs, name).copy_(value, non_blocking=True)
        self.inputs.lr.fill_(lr)
        if self.device.type == "cpu":  # fused SGD takes a tensor learning rate on a GPU only
            self.optimizer.param_groups[0]["lr"] = lr

    def __call__(self) -> None:
        """One optimiser step on the fed inputs. A non-finite gradient on any rank leaves weights
        and statistics alone.
        """
        self.flat.grad.zero_()
        if self.half is not None:
            self.half.refresh()
        stats_before = self.flat.stats.clone()
        images, labels = {"adv": self.adv_255}, {"adv": self.adv_labels}
        images["clean"], labels["clean"] = self._clean()
        if self.n_adv:
            source, labels["noise"] = self._adv_source()
            images["noise"] = self._noise(source)
            if not self.config.method.reuses_gradient:
                self._publish(
                    self._attack(images["noise"], source, labels["noise"]), labels["noise"]
                )

        calls = {"main": 0, "aux": 0}
        for blocks, x in zip(self.passes, self.pass_input, strict=True):
            if blocks[-1].kind == "mixed":
                images["mixed"], labels["mixed"] = self._mixed(images["noise"], labels["noise"])
            with self._stream_of(blocks[0].kind) as gradients:
                gradient = self._run(blocks, x, images, labels, calls, gradients)
            if gradient is not None:
                self._publish(self._ascend(images["noise"], source, gradient), labels["noise"])
        if self.clean_gradients is not None:
            if self.clean_stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.clean_stream)
            self.flat.grad.add_(self.clean_gradients.total)
        self._update(stats_before)

    @contextlib.contextmanager
    def _stream_of(self, kind: Kind) -> Iterator[GradientSum]:
        """Where a pass runs, and what its gradients are added to.

        With `parallel` the clean pass runs beside the others; what it reads stays referenced until
        the step joins it.
        """
        if self.clean_gradients is None or kind != "clean":
            yield self.gradients
            return
        if self.clean_stream is not None:
            self.clean_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.clean_stream):
            self.clean_gradients.total.zero_()
            yield self.clean_gradients

    def _run(
        self,
        blocks: list[Block],
        x: Tensor,  # (rows of the pass, 3, H, W): the pass's static buffer
        images: dict[str, Tensor],  # by kind, grey levels
        labels: dict[str, Tensor],
        calls: dict[str, int],
        gradients: GradientSum,
    ) -> Tensor | None:
        """One pass: forward, loss, backward. Returns the gradient of the noise rows, if the pass
        has some.
        """
        groups: list[Group] = []
        row, probe_rows = 0, None
        for block in blocks:
            n = block.stop - block.start
            self._normalise(images[block.kind][block.start : block.stop], out=x[row : row + n])
            groups += self._groups(block, calls)
            if block.kind in ("noise", "mixed"):
                probe_rows = slice(row, row + n)
            row += n
        self.norm_state.groups = tuple(groups)

        with self._probing(x, probe_rows) as (x_in, probe):
            logits = self._forward(x_in)
            loss = logits.new_zeros(())
            row = 0
            for block in blocks:
                n = block.stop - block.start
                loss = loss + self._loss(block, logits[row : row + n], labels[block.kind])
                row += n
            leaves = list(self.flat.parameters.values()) if self.half is None else self.half.leaves
            wanted = leaves if probe is None else [*leaves, probe]
            found = torch.autograd.grad(loss * self.scale, wanted, allow_unused=True)
        gradients.add(found[: len(leaves)])
        if probe_rows is None:
            return None
        assert probe is not None
        gradient = found[-1] if len(probe) < len(x) else found[-1][probe_rows]
        return self._unmix(gradient)[0] if blocks[-1].kind == "mixed" else gradient

    def _groups(self, block: Block, calls: dict[str, int]) -> list[Group]:
        """The batch-norm groups of a block, numbered over the step so that a sequence's groups make
        one average.
        """
        method = self.config.method
        bn: Literal["main", "aux"] = "main" if block.kind == "clean" else "aux"
        sequence = self.n_clean // method.group_rows if bn == "main" else self.aux_groups
        size = {"clean": method.group_rows, "mixed": 2 * method.adv_group_rows}.get(
            block.kind, method.adv_group_rows
        )
        count = (block.stop - block.start) // size
        calls[bn] += count
        return [Group(bn, size, (calls[bn] - count + i) % sequence, sequence) for i in range(count)]

    def _forward(self, x: Tensor) -> Tensor:
        if self.amp == "off":
            return self.forward(x)
        # Entered inside the captured region: the weight cache must not outlive the step.
        with torch.autocast(self.device.type, HALF[self.amp]), self._half_weights():
            return self.forward(x).float()

    def _half_weights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.half is None else self.half.in_model()

    @contextlib.contextmanager
    def _probing(self, x: Tensor, rows: slice | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The input and the leaf whose gradient is that of `rows`: at the stem if there is one,
        else of the whole input.
        """
        stem = self.stem
        if rows is None:
            yield x, None
        elif stem is None:
            whole = x.detach().requires_grad_()
            yield (
                whole.view_as(whole),
                whole,
            )  # a model's hooks on its input work on no leaf under autograd.grad
        else:
            stem.probe, stem.first = x[rows].detach().requires_grad_(), rows.start
            try:
                yield x, stem.probe
            finally:
                stem.probe = None

    def _loss(self, block: Block, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted sum of a block's losses; also counts its metrics."""
        smoothing = self.config.optim.label_smoothing
        if block.kind == "mixed":
            noise, adv = self._unmix(logits)
            noise_labels, adv_labels = self._unmix(labels)
            return self._loss(Block("noise", 0, len(noise)), noise, noise_labels) + self._loss(
                Block("adv", 0, len(adv)), adv, adv_labels
            )
        target = labels[block.start : block.stop]
        each = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        if block.kind == "clean" and self.config.data.mix:
            partner = labels[self.inputs.mix_partner[block.start : block.stop]]
            lam = self.inputs.mix_lam.to(each.dtype)
            each = lam * each + (1 - lam) * F.cross_entropy(
                logits, partner, reduction="none", label_smoothing=smoothing
            )
        with torch.no_grad():
            finite = each.isfinite()
            k = 4 * KINDS.index(block.kind)
            self.metrics[k] += torch.where(finite, each, 0).double().sum()
            self.metrics[k + 1] += (logits.argmax(1) == target).sum()
            self.metrics[k + 2] += len(target)
            self.metrics[k + 3] += (~finite).sum()
        return each.sum() * self.row_weight[block.kind]

    def _update(self, stats_before: Tensor) -> None:
        flat = self.flat
        if self.main_factor != 1:
            flat.grad[flat.main].mul_(self.main_factor)
        if self.aux_factor != 1:
            flat.grad[flat.aux].mul_(self.aux_factor)
        self.ranks.sum_(flat.grad)
        self.ranks.sum_(
            flat.stats.div_(self.ranks.world)
        )  # the mean of the ranks' averages is the average over all groups
        found_inf = (
            ~torch.linalg.vector_norm(flat.grad, torch.inf).isfinite()
        ).float()  # one reduction; a NaN gets through
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.grad_scale = self.scale if self.amp == "fp16" else None  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.amp == "fp16":
            torch._amp_update_scale_(self.scale, self.growth, found_inf, 2.0, 0.5, 2000)
        torch.where(found_inf.bool(), stats_before, flat.stats, out=flat.stats)
        self.metrics[-3] += 1
        self.metrics[-2] += found_inf
        self.metrics[-1] = (self.metrics[-1] + 1) * found_inf

    # ------------------------------------------------------------------ the rows

    def _normalise(self, images_255: Tensor, out: Tensor) -> None:
        torch.sub(images_255, self.mean_255, out=out)
        out.div_(self.std_255)

    def _clean(self) -> tuple[Tensor, Tensor]:
        """Clean rows in grey levels, mixed with their partners if the run mixes, and their labels."""
        images, labels = self.inputs.images[: self.n_clean], self.inputs.labels[: self.n_clean]
        if self.config.data.mix is None:
            return images, labels
        images = images.to(self.dtype)
        partner = images[self.inputs.mix_partner]
        if self.config.data.mix == "mixup":
            return torch.lerp(partner, images, self.inputs.mix_lam.to(self.dtype)), labels
        top, left, bottom, right = self.inputs.mix_box
        inside = ((self.pixels >= top) & (self.pixels < bottom))[:, None] & (
            (self.pixels >= left) & (self.pixels < right)
        )
        return torch.where(inside, partner, images), labels

    def _adv_source(self) -> tuple[Tensor, Tensor]:
        """The images (grey levels) that are attacked, and their labels."""
        first = 0 if self.config.method.name == "advprop" else self.n_clean
        return self.inputs.images[first:].to(self.dtype), self.inputs.labels[first:]

    def _noise(self, source: Tensor) -> Tensor:
        """x + U(-eps, eps); not clipped to the pixel range."""
        if not self.config.method.random_start:
            return source
        eps_255 = self.config.method.eps_255
        assert eps_255 is not None
        return torch.add(
            source, attack.uniform(self.inputs.noise_key, source.shape, self.dtype), alpha=eps_255
        )

    def _ascend(self, current: Tensor, source: Tensor, gradient: Tensor) -> Tensor:
        method = self.config.method
        assert method.eps_255 is not None
        direction = attack.sign(gradient)
        if method.name == "noise":
            direction = attack.uniform(
                self.inputs.noise_key ^ 0x5BD1E995, source.shape, self.dtype
            ).sign()
        self.metrics[-5] += (direction == 0).sum()
        self.metrics[-4] += direction.numel()
        if method.targeted:
            direction = -direction
        return attack.ascend(current, source, direction, method.step_size_255, method.eps_255)

    def _attack(self, current: Tensor, source: Tensor, labels: Tensor) -> Tensor:
        """K steps of PGD through the auxiliary norms; input gradients only."""
        method = self.config.method
        assert method.attack_steps is not None
        if method.targeted:
            labels = attack.other_label(self.inputs.noise_key, labels, self.num_classes)
        # No `calls`: an attack crafts, it does not train, so the running statistics stay alone in
        # both modes.
        if method.attack_bn == "running":
            self.norm_state.groups = (Group("aux", self.n_adv, running=True),)
        else:
            self.norm_state.groups = (Group("aux", method.adv_group_rows),) * self.aux_groups
        x = torch.empty_like(current, memory_format=torch.channels_last)
        for _ in range(method.attack_steps):
            self._normalise(current, out=x)
            leaf = x.detach().requires_grad_()
            logits = self._forward(leaf.view_as(leaf))  # no leaf, as in `_probing`
            loss = F.cross_entropy(
                logits, labels, label_smoothing=self.config.optim.label_smoothing
            )
            (gradient,) = torch.autograd.grad(loss * self.scale, leaf)
            current = self._ascend(current, source, gradient)
        return current

    def _publish(self, adv_255: Tensor, labels: Tensor) -> None:
        """Make crafted rows the adversarial rows of the next pass, or with `pipelined` of the next
        step.
        """
        if self.config.method.schedule != "pipelined":
            adv_255, labels = self._shuffled(adv_255, labels)
        self.adv_255.copy_(adv_255)
        self.adv_labels.copy_(labels)
        self.carries.fill_(True)

    def _shuffled(self, adv_255: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shuffling BN (section 3.2.2): adversarial rows change places, so that they meet other
        statistics.
        """
        if self.config.method.shuffle == "off":
            return adv_255, labels
        if self.config.method.shuffle == "ranks":
            adv_255, labels = self.ranks.gather_rows(adv_255), self.ranks.gather_rows(labels)
        return adv_255[self.inputs.shuffle], labels[self.inputs.shuffle]

    def _mixed(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Every auxiliary group holds its noise rows and as many shuffled rows of the carry (noise
        rows at step 0).
        """
        carry = self._shuffled(
            torch.where(self.carries, self.adv_255, noise),
            torch.where(self.carries, self.adv_labels, labels),
        )
        halves = zip((noise, labels), carry, strict=True)
        images, targets = (
            torch.cat([self._by_group(a), self._by_group(b)], 1).flatten(0, 1) for a, b in halves
        )
        return image_order(images), targets

    def _unmix(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        noise, carry = self._by_group(rows).chunk(2, 1)
        return image_order(noise.flatten(0, 1)), image_order(carry.flatten(0, 1))

    def _by_group(self, rows: Tensor) -> Tensor:
        return memory_order(rows).unflatten(0, (self.aux_groups, -1))

    # ------------------------------------------------------------------ the state

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name: live static tensors, to be cloned or
        copied into.
        """
        momentum = self.optimizer.state[self.flat.param]["momentum_buffer"]
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state |= {f"momentum.{k}": v for k, v in self.flat.named(momentum).items()}
        state |= {"scale": self.scale, "growth": self.growth, "metrics": self.metrics}
        if self.config.method.schedule == "pipelined":
            state |= {
                "carry.images_255": self.adv_255,
                "carry.labels": self.adv_labels,
                "carry.filled": self.carries,
            }
        return state

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Copy a saved `state()` back in place. Raises ValueError if it belongs to another model or
        method.
        """
        state = self.state()
        if state.keys() != saved.keys() or any(saved[k].shape != v.shape for k, v in state.items()):
            odd = sorted(state.keys() ^ saved.keys()) or [
                k for k, v in state.items() if saved[k].shape != v.shape
            ]
            raise ValueError(f"checkpoint does not fit the run: {', '.join(odd[:3])}")
        for name, tensor in state.items():
            tensor.copy_(saved[name])

    def take_metrics(self) -> dict[str, float]:
        """Sums since the last call, over all ranks (a host sync); counters start anew, except
        `skipped_in_a_row`.
        """
        totals = self.metrics_of_all_ranks()
        self.metrics[:-1].zero_()
        return dict(zip(METRICS, totals.tolist(), strict=True))

    def metrics_of_all_ranks(self) -> Tensor:
        """The metrics so far; what counts rows is summed over the ranks, steps are common to all."""
        totals = self.metrics.clone()
        self.ranks.sum_(totals[: METRICS.index("steps")])
        return totals


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """64 well spread bits for the generator behind a model's own random layers (dropout, stochastic
    depth).

    A function of its arguments alone, the same in every process, so that resuming repeats the step.
    The spawn key keeps it apart from the plan's streams, whose seeds have none.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(step, rank))
    return int(sequence.generate_state(1, np.uint64)[0])


def _survives_bf16(mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    """Is one grey level at least 2 ulp of bfloat16 (8 significant bits) at the largest input?"""
    for m, s in zip(mean, std, strict=True):
        largest = max(m, 1 - m) / s
        if 1 / (255 * s) < 2 * 2.0 ** (math.ceil(math.log2(largest)) - 8):
            return False
    return True
