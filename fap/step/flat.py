"""Parameters, gradients and running statistics as views of flat buffers.

The order is shared | main | aux, so the update-speed synchronisation is two slice multiplications,
the reduction over ranks one all-reduce, the optimiser one kernel, and restoring the running
statistics of a skipped step one `where`.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from fap.nets.dual import norms

ALIGN = 64  # elements; keeps every view as aligned as a fresh allocation


class Flat:
    """Moves a converted model's parameters into flat buffers, in place; the model must already be
    on its device.
    """

    def __init__(self, model: nn.Module, first: Collection[nn.Parameter] = ()) -> None:
        """`first`: shared parameters that lie together at the front (`fap.step.half` copies them as
        one).
        """
        main = {p for n in norms(model) for p in (n.weight, n.bias)}
        aux = {p for n in norms(model) if n.aux is not None for p in n.aux.parameters()}
        front = set(first)
        parts = (front, {*model.parameters()} - front - main - aux, main, aux)
        self.parameters = dict(model.named_parameters())
        self.slices: dict[str, slice] = {}
        bounds, end = [0], 0
        for part in parts:
            for name, p in self.parameters.items():
                if p in part:
                    self.slices[name] = slice(end, end + p.numel())
                    end += -(-p.numel() // ALIGN) * ALIGN
            bounds.append(end)
        self.first, _, self.main, self.aux = map(slice, bounds, bounds[1:])
        self.shared = slice(0, self.main.start)  # begins with `first`
        n_front, n_rest, n_main, n_aux = (sum(p.numel() for p in part) for part in parts)
        self.counts = (n_front + n_rest, n_main, n_aux)

        self.param = nn.Parameter(next(model.parameters()).new_zeros(end))
        self.grad = self.param.grad = torch.zeros_like(self.param)
        gradients = self.named(self.grad)
        for name, view in self.named(self.param.data).items():
            self.parameters[name].data = view.copy_(self.parameters[name].data)
            self.parameters[name].grad = gradients[name]
        statistics = [b for n in norms(model) for b in n.buffers() if b.is_floating_point()]
        self.stats = torch.cat(statistics)
        for buffer, view in zip(
            statistics, self.stats.split([len(b) for b in statistics]), strict=True
        ):
            buffer.data = view

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat buffer under the parameters' names and shapes."""
        return {
            k: flat[self.slices[k]].as_strided(p.shape, p.stride())
            for k, p in self.parameters.items()
        }


class GradientSum:
    """Adds up the gradients of several passes in a flat buffer, with a few kernels per pass instead
    of one or two each.

    Gradients of another dtype than the buffer's (`fap.step.half`) are first brought together in a
    flat buffer of their own, then added as one tensor. Twin: autograd's accumulation into `.grad`.
    """

    def __init__(
        self,
        flat: Flat,
        total: Tensor,  # (len(flat.param),)
        half_dtype: torch.dtype
        | None = None,  # of the gradients that are not of total's dtype; those of flat.first only
    ) -> None:
        self.total = total
        self.strides = [p.stride() for p in flat.parameters.values()]
        self.targets = [total[flat.slices[name]] for name in flat.parameters]
        self.front = total[flat.first]
        # Static and zero between the parameters: what lies there is added too.
        self.half = None if half_dtype is None else torch.zeros_like(self.front, dtype=half_dtype)
        self.half_targets: list[Tensor | None] = []
        for name in flat.parameters:
            place = flat.slices[name]
            if self.half is not None and place.stop <= flat.first.stop:
                self.half_targets.append(self.half[place])
            else:
                self.half_targets.append(None)

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one pass's gradients, in the order of `flat.parameters`; None where the pass did not
        use the parameter.
        """
        same_targets: list[Tensor] = []
        same_values: list[Tensor] = []
        half_targets: list[Tensor] = []
        half_values: list[Tensor] = []
        stale: list[Tensor] = []  # half-precision targets that this pass does not write
        places = zip(gradients, self.strides, self.targets, self.half_targets, strict=True)
        for gradient, strides, target, half_target in places:
            if gradient is not None and gradient.dtype != self.total.dtype:
                assert half_target is not None, f"a gradient of {gradient.dtype} outside flat.first"
                half_targets.append(half_target)
                half_values.append(_in_memory_order(gradient, strides))
                continue
            if gradient is not None:
                same_targets.append(target)
                same_values.append(_in_memory_order(gradient, strides))
            if half_target is not None:
                stale.append(half_target)
        if same_values:
            torch._foreach_add_(same_targets, same_values)
        if half_values:
            assert self.half is not None
            if stale:
                torch._foreach_zero_(stale)
            torch._foreach_copy_(half_targets, half_values)
            self.front.add_(self.half)


def _in_memory_order(
    gradient: Tensor,
    strides: tuple[int, ...],  # of its parameter, which is dense
) -> Tensor:  # (gradient.numel(),)
    """The values in the parameter's memory order: a view if the gradient already has it, else a
    copy.
    """
    sides = zip(gradient.shape, gradient.stride(), strides, strict=True)
    if any(size > 1 and own != wanted for size, own, wanted in sides):
        ordered = torch.empty_strided(
            gradient.shape, strides, dtype=gradient.dtype, device=gradient.device
        )
        gradient = ordered.copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))
