"""One training step: its passes over static buffers, then one update.

All methods differ only in passes (passes.py) and weights (weights.py), so they share this code and
are timed on equal terms. The loss of a pass is the sum of its rows' losses times their weights.
Every tensor is static and nothing asks the device for a value, so the same function runs eagerly on
a CPU and is captured as one CUDA graph (graph.py).
Twin: tests/step/reference_step.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fap.config import Config
from fap.distributed import ONE_RANK, Ranks
from fap.nets.dual import counted, undivided
from fap.step.adversarial import AdversarialRows
from fap.step.attack import Attack, picture_mask
from fap.step.flat import GradientSum
from fap.step.half import Amp
from fap.step.inputs import Inputs, image_buffer
from fap.step.losses import Losses
from fap.step.metrics import Metrics
from fap.step.network import Network
from fap.step.passes import BlockKind, Pass, passes_of, rows_of
from fap.step.rows import Aim, Rows, in_one, split_by_group
from fap.step.separate import SeparateAttack
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
        self.losses = Losses(self.task, self.weights, self.metrics)
        self.update = Update(
            flat, model, self.inputs.lr, config.optim, self.weights, ranks, scaled=amp == "fp16"
        )
        self.attack: Attack | None = None
        self.separate: SeparateAttack | None = None
        if self.n_adv:
            self.attack = Attack(self.method, self.metrics)
            if not self.method.entry.recycles:
                self.separate = SeparateAttack(
                    self.attack,
                    self.network,
                    self.task,
                    self.losses,
                    self.method,
                    self.update.scale,
                    self.accumulate,
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
            if self.separate is not None:
                crafted = self.separate.craft(started, source, self.inputs.noise_key, pictures)
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
                gradient = in_one(input_gradients)
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
            loss = self.losses.of_pass(one, outputs, rows) * self.update.scale
            gradients.add(torch.autograd.grad(loss, leaves, allow_unused=True))
            return None

        with self.network.probing(x, one.crafting.rows) as (x_in, probe):
            outputs = self.network(x_in, one.groups)
            loss = self.losses.of_pass(one, outputs, rows) * self.update.scale
            *found, gradient = torch.autograd.grad(loss, [*leaves, probe], allow_unused=True)
        gradients.add(found)
        if len(gradient) == len(x):  # the whole input's: there is no stem that takes fewer rows
            gradient = gradient[one.crafting.rows]
        if one.joins:
            gradient, _ = split_by_group(gradient, len(one.crafting.groups))
        return gradient

    def _pictures(self, copies: bool) -> Tensor | None:
        """Which pixels of the attacked images may change: all, or those that are no padding."""
        if not self.has_padding:
            return None
        sides = self.inputs.images.shape[-2:]
        return picture_mask(self.inputs.attacked_places(copies), (sides[0], sides[1]))

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
