"""AutoAttack (Croce & Hein, 2020), by its authors' package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fap.evaluate.attacks import LinfAttack, Outputs, nothing
from fap.tasks.class_counts import PADDING_LABEL
from pipelines.extras import needs

TARGETS = 9  # wrong classes that its targeted attacks aim at, one after the other


def package() -> ModuleType:
    """Raises ImportError that names the extra."""
    with needs("attacks", "AutoAttack"):
        import pyautoattack
    return pyautoattack


@dataclass(frozen=True)
class AutoAttack(LinfAttack):
    """The standard version: APGD-CE, then on what is still right targeted APGD-DLR, FAB, Square.

    Its random draws are those of a whole batch.
    """

    fewest_classes = 4  # the targeted DLR loss has the third and fourth logit in it

    @property
    def words(self) -> str:
        return "standard version"

    @property
    def steps_of_a_batch(self) -> None:
        return None

    def origin(self) -> dict[str, Any]:
        return super().origin() | {"pyautoattack": package().__version__}

    def candidates(
        self,
        outputs_of: Outputs,
        clean: Tensor,
        labels: Tensor,
        numbers: Tensor,
        after_step: Callable[[], Any] = nothing,
    ) -> Iterator[Tensor]:
        rows = (labels != PADDING_LABEL).nonzero()[:, 0]
        if not self.eps_255 or not len(rows):
            return

        def logits_of(images: Tensor) -> Tensor:  # in 0..1, as the package has them
            after_step()
            return outputs_of(images * 255)

        images = clean[rows].contiguous()
        devices = [clean.device] if clean.is_cuda else []
        with torch.random.fork_rng(devices):  # the package seeds torch's own generators
            adversary = self._adversary(logits_of, clean)
            found, _ = adversary.run_standard_evaluation(
                images / 255, labels[rows], batch_size=len(rows)
            )
        attacked = clean.clone()
        # In grey levels rounding may lead a last digit out of the ball.
        attacked[rows] = (found * 255).clamp_(images - self.eps_255, images + self.eps_255)
        yield attacked.clamp_(0, 255)

    def _adversary(self, logits_of: Outputs, clean: Tensor) -> Any:
        with torch.no_grad():
            n_classes = logits_of(clean[:1] / 255).shape[1]
        adversary = package().AutoAttack(
            logits_of,
            norm="Linf",
            eps=self.eps_255 / 255,
            seed=self.seed,
            version="standard",
            device=clean.device,
        )
        # The package takes for granted that there are ten classes.
        adversary.apgd_targeted.n_target_classes = min(TARGETS, n_classes - 1)
        adversary.fab.n_target_classes = min(TARGETS, n_classes - 1)
        return adversary
