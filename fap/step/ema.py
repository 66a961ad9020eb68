"""An exponential average of the weights and running statistics: `optim.ema`.

Twin: one tensor after the other, in tests/step/test_ema.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fap.step.flat import Flat


class Ema:
    """The average as two flat buffers, each of which follows the step's by one lerp."""

    def __init__(self, flat: Flat, model: nn.Module, decay: float) -> None:
        self.flat = flat
        self.model = model
        self.decay = decay
        self.param = flat.param.data.clone()
        self.stats = flat.stats.clone()
        # float64, which counts exactly far beyond the longest run.
        self.updates = torch.zeros((), dtype=torch.float64, device=self.param.device)

    @torch.no_grad()
    def update(
        self,
        found_inf: Tensor,  # float32 (): 1 if the step was skipped, which moves no average
    ) -> None:
        """After the t-th step the decay is min(decay, (1 + t) / (10 + t)).

        That is TensorFlow's warm-up of an average, with which EfficientNet was trained: without it
        the first, random weights would count for thousands of steps.
        """
        applies = 1 - found_inf.double()
        self.updates.add_(applies)
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        weight = (1 - decay) * applies
        self.param.lerp_(self.flat.param.data, weight.to(self.param.dtype))
        self.stats.lerp_(self.flat.stats, weight.to(self.stats.dtype))

    def state(self) -> dict[str, Tensor]:
        """Live tensors: `ema.NAME` of what the model's state dict calls NAME."""
        state: dict[str, Tensor] = {"ema_updates": self.updates}
        for name, tensor in self.model.state_dict().items():
            average = self._average_of(tensor)
            if average is not None:
                state[f"ema.{name}"] = average
        return state

    def _average_of(self, tensor: Tensor) -> Tensor | None:
        """The view of the averages that a view of the step's flat buffers stands for.

        None for what lies elsewhere, such as counters.
        """
        pairs = ((self.flat.param.data, self.param), (self.flat.stats, self.stats))
        for flat, average in pairs:
            if tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
                place = (tensor.shape, tensor.stride(), tensor.storage_offset())
                return average.as_strided(*place)
        return None

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block the model computes with the averages. No step may run in it."""
        before: list[tuple[Tensor, Tensor]] = []
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            average = self._average_of(tensor.data)
            if average is not None:
                before.append((tensor, tensor.data))
                tensor.data = average
        try:
            yield
        finally:
            for tensor, data in before:
                tensor.data = data
