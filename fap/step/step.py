"""One training step: its passes over static buffers, then one update.

All methods differ only in passes (passes.py) and weights (weights.py), so they share this code and
are timed on equal terms. The loss of a pass is the sum of its rows' losses times their weights.
Every tensor is static and nothing asks the device for a value, so the same function runs eagerly on
a CPU and is captured as one CUDA graph (graph.py).
Twin: tests/step/reference_step.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fap.config import Config
from fap.distributed import ONE_RANK, Ranks
from fap.methods import Kind
from fap.nets.norm import Group
from fap.step.attack import Attack
from fap.step.flat import GradientSum
from fap.step.half import Amp
from fap.step.inputs import Inputs, image_buffer
from fap.step.metrics import Metrics
from fap.step.network import Network
from fap.step.passes import Block, BlockKind, Pass, passes_of, rows_of
from fap.step.rows import Rows, join_by_group, shuffled, split_by_group
from fap.step.update import Update
from fap.step.weights import weights_of
from fap.tasks import make_task
from fap.tasks.base import Task


class Step:
    """A training step of a prepared model (`fap.nets.build.prepare`) that is on its device."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        ranks: Ranks = ONE_RANK,
        *,
        amp: Amp = "off",
        task: Task | None = None,  # None: the config's
    ) -> None:
        """Raises ValueError for another model, and for rows that give no whole groups."""
        self.network = Network(model, config, amp)
        self.task = task or make_task(config)
        self.method = config.method
        self.mix = config.data.mix
        self.ranks = ranks

        n_clean = _clean_rows_per_rank(config, ranks)
        n_rows = rows_of(self.method, n_clean)
        self.passes = passes_of(self.method, n_clean)
        self.weights = weights_of(self.method, n_rows, ranks.world)
        self.n_adv = n_rows["adv"]
        self.n_adv_groups = 0
        if self.n_adv:
            self.n_adv_groups = self.n_adv // self.method.adv_group_rows

        # Everything that a captured graph reads and writes.
        flat = self.network.flat
        self.device = flat.param.device
        self.dtype = flat.param.dtype
        self.inputs = Inputs.empty(
            config,
            self.task,
            self.device,
            n_clean,
            config.loader_adv_rows // ranks.world,
            self.n_adv,
            self.n_adv_groups,
        )
        self.pass_input = [self._images(one.n_rows, config) for one in self.passes]
        self.mean_255 = self._per_channel(config.data.mean).mul_(255)
        self.std_255 = self._per_channel(config.data.std).mul_(255)
        # The adversarial rows made last; with `pipelined` the carry to the next step.
        self.adv = Rows(
            self._images(self.n_adv, config), self.task.empty_targets(self.n_adv, self.device)
        )
        self.carries = torch.zeros((), dtype=torch.bool, device=self.device)
        self.gradients = GradientSum(flat, flat.grad, self.network.half_dtype)
        # parallel: the clean pass has gradients of its own, since two streams must not add to the
        # same ones.
        self.clean_gradients: GradientSum | None = None
        self.clean_stream: torch.cuda.Stream | None = None
        if self.method.schedule == "parallel":
            own = torch.zeros_like(flat.grad)
            self.clean_gradients = GradientSum(flat, own, self.network.half_dtype)
            if self.device.type == "cuda":
                self.clean_stream = torch.cuda.Stream(self.device)

        self.metrics = Metrics(self.device)
        self.attack = Attack(self.method, self.metrics) if self.n_adv else None
        self.update = Update(
            flat, self.inputs.lr, config.optim, self.weights, ranks, scaled=amp == "fp16"
        )

    def _images(self, n: int, config: Config) -> Tensor:
        return image_buffer(n, config.data.size, self.dtype, self.device)

    def _per_channel(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device).view(1, 3, 1, 1)

    def feed(self, images: Tensor, targets: Tensor, lr: float, **draws: Tensor) -> None:
        """Fill the static inputs: a batch of the loader, its targets, and the plan's draws for this
        step by their names in `Inputs`.
        """
        for name, value in {"images": images, "targets": targets, **draws}.items():
            getattr(self.inputs, name).copy_(value, non_blocking=True)
        self.inputs.lr.fill_(lr)
        self.update.set_lr(lr)

    def __call__(self) -> None:
        """One optimiser step on the fed inputs.

        A non-finite gradient on any rank leaves weights and statistics alone.
        """
        self.network.flat.grad.zero_()
        self.network.refresh()
        stats_before = self.network.flat.stats.clone()

        rows: dict[BlockKind, Rows] = {"adv": self.adv}
        rows["clean"] = self.inputs.clean_rows(self.mix, self.dtype)
        if self.attack is not None:
            copies = self.method.entry.attacked == "copies"
            source = self.inputs.attacked_rows(copies, self.dtype)
            started = self.attack.start(source.images_255, self.inputs.noise_key)
            rows["noise"] = Rows(started, source.targets)
            if not self.method.entry.recycles:
                self._publish(self._craft(self.attack, started, source), source.targets)

        for one, x in zip(self.passes, self.pass_input, strict=True):
            if one.joins:
                rows["joined"] = self._joined(rows["noise"])
            with self._stream_of(one) as gradients:
                gradient = self._run(one, x, rows, gradients)
            if one.crafting is not None:
                assert self.attack is not None
                crafted = self.attack.advance(
                    started, source.images_255, gradient, self.inputs.noise_key
                )
                self._publish(crafted, source.targets)
        self._join_streams()
        self.update(stats_before, self.metrics)

    # ------------------------------------------------------------------ a pass

    def _run(
        self,
        one: Pass,
        x: Tensor,  # (rows of the pass, 3, H, W): the pass's static buffer
        rows: dict[BlockKind, Rows],
        gradients: GradientSum,
    ) -> Tensor | None:
        """Forward, loss, backward. Returns the gradient of the noise rows if the pass crafts."""
        for block in one.blocks:
            images_255 = rows[block.kind].images_255[block.start : block.stop]
            self._normalise(images_255, out=x[block.rows])

        leaves = self.network.leaves
        if one.crafting is None:
            outputs = self.network(x, one.groups)
            loss = self._loss(one, outputs, rows) * self.update.scale
            gradients.add(torch.autograd.grad(loss, leaves, allow_unused=True))
            return None

        with self.network.probing(x, one.crafting.rows) as (x_in, probe):
            outputs = self.network(x_in, one.groups)
            loss = self._loss(one, outputs, rows) * self.update.scale
            *found, gradient = torch.autograd.grad(loss, [*leaves, probe], allow_unused=True)
        gradients.add(found)
        if len(gradient) == len(x):  # the whole input's: there is no stem that takes fewer rows
            gradient = gradient[one.crafting.rows]
        if one.joins:
            gradient, _ = split_by_group(gradient, self.n_adv_groups)
        return gradient

    def _normalise(self, images_255: Tensor, out: Tensor) -> None:
        torch.sub(images_255, self.mean_255, out=out)
        out.div_(self.std_255)

    def _loss(self, one: Pass, outputs: Tensor, rows: dict[BlockKind, Rows]) -> Tensor:
        loss = outputs.new_zeros(())
        for block in one.blocks:
            loss = loss + self._loss_of_block(block, outputs[block.rows], rows[block.kind].targets)
        return loss

    def _loss_of_block(
        self,
        block: Block,
        outputs: Tensor,  # of the block's rows
        targets: Tensor,  # of all rows of the block's kind
    ) -> Tensor:
        if block.kind == "joined":
            noise, adv = split_by_group(outputs, self.n_adv_groups)
            noise_targets, adv_targets = split_by_group(targets, self.n_adv_groups)
            noise_loss = self._loss_of("noise", noise, noise_targets)
            return noise_loss + self._loss_of("adv", adv, adv_targets)
        own = targets[block.start : block.stop]
        partner = None
        if block.kind == "clean" and self.mix is not None:
            partner = targets[self.inputs.mix_partner[block.start : block.stop]]
        return self._loss_of(block.kind, outputs, own, partner)

    def _loss_of(
        self,
        kind: Kind,
        outputs: Tensor,
        targets: Tensor,
        partner: Tensor | None = None,  # targets of the images that are mixed in
    ) -> Tensor:
        """Weighted sum of the rows' losses; also counts their metrics."""
        losses = self.task.losses(outputs, targets)
        if partner is not None:
            lam = self.inputs.mix_lam.to(losses.dtype)
            losses = lam * losses + (1 - lam) * self.task.losses(outputs, partner)
        self.metrics.count_rows(kind, losses, self.task.hits(outputs, targets))
        return losses.sum() * self.weights.of_row[kind]

    @contextlib.contextmanager
    def _stream_of(self, one: Pass) -> Iterator[GradientSum]:
        """Where a pass runs, and what its gradients are added to.

        With `parallel` the clean pass runs beside the others; what it reads stays referenced until
        the step joins it.
        """
        if self.clean_gradients is None or one.blocks[0].kind != "clean":
            yield self.gradients
            return
        if self.clean_stream is not None:
            self.clean_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.clean_stream):
            self.clean_gradients.total.zero_()
            yield self.clean_gradients

    def _join_streams(self) -> None:
        if self.clean_gradients is None:
            return
        if self.clean_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.clean_stream)
        self.gradients.total.add_(self.clean_gradients.total)

    # ------------------------------------------------------------------ adversarial rows

    def _craft(self, attack: Attack, current: Tensor, source: Rows) -> Tensor:
        """The images of a separate attack: K steps of PGD, with input gradients only."""
        if not self.method.entry.takes_gradients:
            return attack.advance(current, source.images_255, None, self.inputs.noise_key)
        targets = source.targets
        if self.method.targeted:
            targets = self.task.wrong_targets(self.inputs.noise_key, targets)
        # Calls of no average: an attack crafts, it does not train, so it moves no statistics.
        bn = self.method.entry.norms["adv"]
        groups = [Group(bn, self.method.adv_group_rows)] * self.n_adv_groups
        if self.method.attack_bn == "running":
            groups = [Group(bn, self.n_adv, running=True)]
        x = torch.empty_like(current, memory_format=torch.channels_last)
        for _ in range(attack.n_steps):
            self._normalise(current, out=x)
            leaf = x.detach().requires_grad_()
            outputs = self.network(leaf.view_as(leaf), groups)  # no leaf: see `Network.probing`
            loss = self.task.losses(outputs, targets).mean()
            (gradient,) = torch.autograd.grad(loss * self.update.scale, leaf)
            current = attack.advance(current, source.images_255, gradient, self.inputs.noise_key)
        return current

    def _publish(self, adv_255: Tensor, targets: Tensor) -> None:
        """Make crafted rows the adversarial rows of the next pass.

        With `pipelined` they are those of the next step, which shuffles them.
        """
        crafted = Rows(adv_255, targets)
        if self.method.schedule != "pipelined":
            crafted = self._shuffled(crafted)
        self.adv.images_255.copy_(crafted.images_255)
        self.adv.targets.copy_(crafted.targets)
        self.carries.fill_(True)

    def _shuffled(self, rows: Rows) -> Rows:
        return shuffled(rows, self.inputs.shuffle, self.method.shuffle or "off", self.ranks)

    def _joined(self, noise: Rows) -> Rows:
        """Every group holds its noise rows and as many shuffled rows of the carry.

        The first step has no carry yet: its own noise rows stand in.
        """
        carry = Rows(
            torch.where(self.carries, self.adv.images_255, noise.images_255),
            torch.where(self.carries, self.adv.targets, noise.targets),
        )
        return join_by_group(noise, self._shuffled(carry), self.n_adv_groups)

    # ------------------------------------------------------------------ the state

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name.

        Live static tensors, to be cloned or copied into.
        """
        momentum = self.network.flat.named(self.update.momentum)
        state = {f"model.{name}": v for name, v in self.network.model.state_dict().items()}
        state |= {f"momentum.{name}": v for name, v in momentum.items()}
        state["scale"] = self.update.scale
        state["growth"] = self.update.growth
        state["metrics"] = self.metrics.sums
        if self.method.schedule == "pipelined":
            state["carry.images_255"] = self.adv.images_255
            state["carry.targets"] = self.adv.targets
            state["carry.filled"] = self.carries
        return state

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Copy a saved `state()` back in place.

        Raises ValueError if it belongs to another model or method.
        """
        state = self.state()
        odd = sorted(state.keys() ^ saved.keys())
        if not odd:
            odd = [name for name, tensor in state.items() if saved[name].shape != tensor.shape]
        if odd:
            raise ValueError(f"checkpoint does not fit the run: {', '.join(odd[:3])}")
        for name, tensor in state.items():
            tensor.copy_(saved[name])


def _clean_rows_per_rank(config: Config, ranks: Ranks) -> int:
    """Raises ValueError unless they are whole groups."""
    whole = ranks.world * config.method.group_rows
    if config.optim.clean_batch % whole:
        raise ValueError(
            f"optim.clean_batch = {config.optim.clean_batch} gives no whole batch-norm groups of "
            f"{config.method.group_rows} rows on each of {ranks.world} ranks; "
            f"use a multiple of {whole}"
        )
    return config.optim.clean_batch // ranks.world
