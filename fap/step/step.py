"""One training step: its passes over static buffers, then one update.

All methods differ only in passes (passes.py) and weights (weights.py), so they share this code and
are timed on equal terms. The loss of a pass is the sum of its rows' losses times their weights.
Every tensor is static and nothing asks the device for a value, so the same function runs eagerly on
a CPU and is captured as one CUDA graph (graph.py).
Twin: tests/step/reference_step.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fap.config import Config
from fap.distributed import ONE_RANK, Ranks
from fap.methods import Kind
from fap.nets.dual import counted, undivided
from fap.nets.norm import Group
from fap.step.adversarial import AdversarialRows
from fap.step.attack import Attack, picture_mask
from fap.step.flat import GradientSum
from fap.step.half import Amp
from fap.step.inputs import Inputs, image_buffer
from fap.step.metrics import Metrics
from fap.step.network import Network
from fap.step.passes import Block, BlockKind, Pass, passes_of, rows_of
from fap.step.rows import Aim, Rows, split_aim_by_group, split_by_group
from fap.step.streams import Streams
from fap.step.update import Update
from fap.step.weights import weights_of
from fap.tasks import make_task
from fap.tasks.base import Task
from pipelines.sizes import Size, sides_of


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
        """Raises ValueError for another model, for rows that give no whole groups, and for settings
        of `optim` that do not suit the model.
        """
        self.network = Network(model, config, amp)
        self.task = task or make_task(config)
        self.method = config.method
        self.has_padding = config.data.crop == "letterbox"

        n_clean = _clean_rows_per_rank(config, ranks)
        n_rows = rows_of(self.method, n_clean)
        self.passes = passes_of(self.method, n_clean, config.optim.accumulate)
        self.accumulate = config.optim.accumulate
        if self.accumulate > 1:
            _check_divisible(model, config)
        self.weights = weights_of(self.method, n_rows, ranks.world)
        self.n_adv = n_rows["adv"]
        self.n_adv_groups = 0
        if self.n_adv:
            self.n_adv_groups = self.n_adv // self.method.adv_group_rows

        flat = self.network.flat
        self.device = flat.param.device
        self.dtype = flat.param.dtype
        self.inputs = Inputs.empty(
            config,
            self.task,
            self.device,
            n_clean=n_clean,
            n_loaded_adv=config.loader_adv_rows // ranks.world,
            n_adv=self.n_adv,
            n_adv_groups=self.n_adv_groups,
        )
        sides = config.data.sides
        self.pass_input = [
            image_buffer(one.n_rows, sides, self.dtype, self.device) for one in self.passes
        ]
        aim = Aim(self.task.empty_targets(self.n_adv, self.device))
        if config.data.mixes_adv:
            partners = self.task.empty_targets(self.n_adv, self.device)
            aim = Aim(aim.targets, partners, torch.ones(self.n_adv, device=self.device))
        buffers = Rows(image_buffer(self.n_adv, sides, self.dtype, self.device), aim)
        self.adv = AdversarialRows(buffers, self.method, ranks, self.inputs.shuffle)
        self.streams = Streams(
            flat, self.network.half_dtype, parallel=self.method.schedule == "parallel"
        )
        self.metrics = Metrics(self.device)
        self.attack: Attack | None = None
        if self.n_adv:
            self.attack = Attack(self.method, self.metrics)
        self.update = Update(
            flat, model, self.inputs.lr, config.optim, self.weights, ranks, scaled=amp == "fp16"
        )

    def resize(self, size: Size) -> None:
        """Take images of another size from here on.

        The buffers are new, so a graph of the step must be captured anew; and as before the first
        step of all, nothing is carried to the next one.
        """
        sides = sides_of(size)
        if self.inputs.images.shape[-2:] == sides:
            return
        self.inputs.resize(sides)
        self.pass_input = [
            image_buffer(one.n_rows, sides, self.dtype, self.device) for one in self.passes
        ]
        self.adv.restart(image_buffer(self.n_adv, sides, self.dtype, self.device))

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

        rows: dict[BlockKind, Rows] = {"adv": self.adv.rows}
        rows["clean"] = self.inputs.clean_rows(self.dtype)
        if self.attack is not None:
            copies = self.method.entry.attacked == "copies"
            copied = rows["clean"] if copies else None
            source = self.inputs.attacked_rows(copied, self.dtype)
            pictures = self._pictures(copies)
            started = self.attack.start(source.images_255, self.inputs.noise_key, pictures)
            rows["noise"] = Rows(started, source.aim)
            if not self.method.entry.recycles:
                crafted = self._craft(self.attack, started, source, pictures)
                self.adv.publish(Rows(crafted, source.aim))

        input_gradients: list[Tensor] = []  # of the noise rows, part by part
        for one, x in zip(self.passes, self.pass_input, strict=True):
            if one.joins and "joined" not in rows:
                rows["joined"] = self.adv.joined_with(rows["noise"], self.n_adv_groups)
            with self.streams.of(one) as gradients:
                gradient = self._run(one, x, rows, gradients)
            if gradient is not None:
                input_gradients.append(gradient)
            if one.crafts_last:
                assert self.attack is not None
                gradient = joined_parts(input_gradients)
                crafted = self.attack.advance(
                    started, source.images_255, gradient, self.inputs.noise_key, pictures
                )
                self.adv.publish(Rows(crafted, source.aim))
        self.streams.join()
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
            self.network.normalise(images_255, out=x[block.rows])

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
            gradient, _ = split_by_group(gradient, len(one.crafting.groups))
        return gradient

    def _loss(self, one: Pass, outputs: Tensor, rows: dict[BlockKind, Rows]) -> Tensor:
        loss = outputs.new_zeros(())
        for block in one.blocks:
            aim = rows[block.kind].aim
            loss = loss + self._loss_of_block(block, outputs[block.rows], aim)
        return loss

    def _loss_of_block(
        self,
        block: Block,
        outputs: Tensor,  # of the block's rows
        aim: Aim,  # of all rows of the block's kind
    ) -> Tensor:
        own = aim.each(lambda part: part[block.start : block.stop])
        if block.kind == "joined":
            noise, adv = split_by_group(outputs, len(block.groups))
            noise_aim, adv_aim = split_aim_by_group(own, len(block.groups))
            noise_loss = self._loss_of("noise", noise, noise_aim)
            return noise_loss + self._loss_of("adv", adv, adv_aim)
        return self._loss_of(block.kind, outputs, own)

    def _loss_of(self, kind: Kind, outputs: Tensor, aim: Aim) -> Tensor:
        """Weighted sum of the rows' losses; also counts their metrics.

        Of a mixed row a hit is its own target's.
        """
        losses, hits = self.task.losses_and_hits(outputs, aim.targets)
        losses = self._mixed(losses, aim, lambda targets: self.task.losses(outputs, targets))
        self.metrics.count_rows(kind, losses, hits)
        return losses.sum() * self.weights.of_row[kind]

    def _mixed(
        self,
        losses: Tensor,  # (rows,): by the rows' own targets
        aim: Aim,
        losses_by: Callable[[Tensor], Tensor],  # targets (rows, ...) -> (rows,)
    ) -> Tensor:  # (rows,)
        """Each target's loss times the task's weight of it; of mixed rows that of both targets."""

        def weighted(losses: Tensor, targets: Tensor) -> Tensor:
            weights = self.task.row_weights(targets)
            if weights is None:
                return losses
            return losses * weights.to(losses.dtype)

        own = weighted(losses, aim.targets)
        return aim.mixed(own, lambda targets: weighted(losses_by(targets), targets))

    # ------------------------------------------------------------------ adversarial rows

    def _pictures(self, copies: bool) -> Tensor | None:
        """Which pixels of the attacked images may change: all, or those that are no padding."""
        if not self.has_padding:
            return None
        sides = self.inputs.images.shape[-2:]
        return picture_mask(self.inputs.attacked_places(copies), (sides[0], sides[1]))

    def _craft(
        self, attack: Attack, started: Tensor, source: Rows, pictures: Tensor | None
    ) -> Tensor:
        """The images of a separate attack: K steps of PGD, with input gradients only."""
        if not self.method.entry.takes_gradients:
            keys = self.inputs.noise_key
            return attack.advance(started, source.images_255, None, keys, pictures)
        aimed = source
        if self.method.targeted:
            keys = self.inputs.noise_key
            wrong = source.aim.retargeted(lambda targets: self.task.wrong_targets(keys, targets))
            aimed = Rows(source.images_255, wrong)
        crafted: list[Tensor] = []
        for part in self._attack_parts():
            rows = AttackedRows(
                started[part.rows],
                aimed.each(part.own),
                source.aim.each(part.own),
                self.inputs.noise_key[part.groups],
                None if pictures is None else part.own(pictures),
            )
            crafted.append(self._craft_part(attack, rows))
        return joined_parts(crafted)

    def _attack_parts(self) -> list[AttackPart]:
        """The rows of an attack that go through the network at once: whole groups of them."""
        n_groups = self.n_adv_groups // self.accumulate
        n_rows = n_groups * self.method.adv_group_rows
        return [
            AttackPart(slice(i * n_rows, (i + 1) * n_rows), slice(i * n_groups, (i + 1) * n_groups))
            for i in range(self.accumulate)
        ]

    def _craft_part(self, attack: Attack, rows: AttackedRows) -> Tensor:
        if self.method.attack_loss != "max":
            return self._pgd(attack, rows, self.method.attack_loss or "total")

        # Det-AdvProp (Chen et al., CVPR 2021): an image from each part of the loss; of
        # every row the one with the largest total loss, by its true target, is trained.
        images: Tensor | None = None
        largest: Tensor | None = None
        for part in self.task.loss_parts:
            crafted = self._pgd(attack, rows, part)
            with torch.no_grad():
                outputs = self.network(self._normalised(crafted), self._attack_groups(len(crafted)))
                losses = self._attack_losses(outputs, rows.true_aim, "total")
            if images is None or largest is None:
                images, largest = crafted, losses
                continue
            worse = losses > largest
            images = torch.where(worse.view(-1, 1, 1, 1), crafted, images)
            largest = torch.where(worse, losses, largest)
        assert images is not None
        return images

    def _pgd(self, attack: Attack, rows: AttackedRows, part: str) -> Tensor:
        """K steps away from or towards `rows.aimed`, by a part of the loss."""
        current = rows.started
        for _ in range(attack.n_steps):
            leaf = self._normalised(current).requires_grad_()
            # No leaf goes in: see `Network.probing`.
            outputs = self.network(leaf.view_as(leaf), self._attack_groups(len(leaf)))
            loss = self._attack_losses(outputs, rows.aimed.aim, part).mean()
            if self.accumulate > 1:
                loss = loss / self.accumulate  # the mean is that over all rows
            (gradient,) = torch.autograd.grad(loss * self.update.scale, leaf)
            clean = rows.aimed.images_255
            current = attack.advance(current, clean, gradient, rows.keys, rows.pictures)
        return current

    def _attack_losses(self, outputs: Tensor, aim: Aim, part: str) -> Tensor:
        """(rows,): mixed as those that are trained."""
        losses = self.task.attack_losses(outputs, aim.targets, part)
        return self._mixed(
            losses, aim, lambda targets: self.task.attack_losses(outputs, targets, part)
        )

    def _attack_groups(self, n_rows: int) -> list[Group]:
        """Calls of no average: an attack crafts, it does not train, so it moves no statistics."""
        bn = self.method.norms["adv"]
        if self.method.attack_bn == "running":
            return [Group(bn, n_rows, running=True)]
        n_groups = n_rows // self.method.adv_group_rows
        return [Group(bn, self.method.adv_group_rows)] * n_groups

    def _normalised(self, images_255: Tensor) -> Tensor:
        x = torch.empty_like(images_255, memory_format=torch.channels_last)
        self.network.normalise(images_255, out=x)
        return x

    # ------------------------------------------------------------------ the state

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name.

        Live static tensors, to be cloned or copied into.
        """
        state = {f"model.{name}": v for name, v in self.network.model.state_dict().items()}
        state |= self.update.state()
        state["metrics"] = self.metrics.sums
        state |= self.adv.state()
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


class AttackPart(NamedTuple):
    """Rows of a separate attack that are attacked together."""

    rows: slice
    groups: slice

    def own(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor of all rows."""
        return tensor[self.rows]


class AttackedRows(NamedTuple):
    """What such a part is attacked with."""

    started: Tensor  # (n, 3, H, W) grey levels: where the attack starts
    aimed: Rows  # the clean images, and the targets away from or towards which it goes
    true_aim: Aim
    keys: Tensor  # int32 (groups,)
    pictures: Tensor | None


def joined_parts(parts: Sequence[Tensor]) -> Tensor:
    """Rows that were computed in parts, together; one part is taken as it is."""
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(list(parts))
    return joined.contiguous(memory_format=torch.channels_last)


def _check_divisible(model: nn.Module, config: Config) -> None:
    """Raises ValueError for a model with norms to which the parts of a pass are other batches."""
    whole = undivided(model)
    if whole:
        raise ValueError(
            f"optim.accumulate = {config.optim.accumulate}: the model has {counted(whole)} that "
            "see a whole pass as one batch, so its parts would train otherwise; must be 1"
        )


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
