"""Parameters, gradients and running statistics as views of flat buffers.

The order is shared | main | aux. So the update-speed synchronisation is two slice multiplications,
the reduction over ranks one all-reduce, the optimiser one kernel, and restoring the running
statistics of a skipped step one `where`. Within each part parameters of equal settings lie
together, so that the optimiser gets few tensors; if all are equal, it is the whole buffer.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fap.nets.dual import norms, statistics
from fap.step.parameters import Setting

ALIGN = 64  # elements; keeps every view as aligned as a fresh allocation


class Flat:
    """A converted model's parameters, moved into flat buffers in place.

    The model must already be on its device: moving it afterwards would undo the views.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, Setting] | None = None,  # of every parameter; None: all are equal
        first: Collection[nn.Parameter] = (),
    ) -> None:
        """`first`: shared parameters to lie together at the very front.

        `fap.step.half` copies those as one slice.
        """
        self.parameters = dict(model.named_parameters())
        self.settings = settings or dict.fromkeys(self.parameters, Setting(1.0, 0.0))
        self.trained = [name for name in self.parameters if self.settings[name].trained]
        """Those that are not frozen: the order of a pass's gradients."""
        self.slices: dict[str, slice] = {}
        """Where each parameter lies in the buffers, by its name."""

        main: set[nn.Parameter] = set()
        aux: set[nn.Parameter] = set()
        for norm in norms(model):
            main |= {*norm.main_parameters()}
            if norm.aux is not None:
                aux |= {*norm.aux.parameters()}
        front = set(first)
        rest = {*model.parameters()} - front - main - aux

        self.first = self._place(front, 0)
        after_shared = self._place(rest, self.first.stop).stop
        self.shared = slice(0, after_shared)  # begins with `first`
        self.main = self._place(main, after_shared)
        self.aux = self._place(aux, self.main.stop)
        self.counts = (_n_values(front) + _n_values(rest), _n_values(main), _n_values(aux))
        """Values of the shared, main and auxiliary parameters, without the gaps between them."""

        self.param = nn.Parameter(next(model.parameters()).new_zeros(self.aux.stop))
        self.grad = torch.zeros_like(self.param)
        self.param.grad = self.grad
        self.stretches = self._stretches()
        values = self.named(self.param.data)
        gradients = self.named(self.grad)
        for name, parameter in self.parameters.items():
            parameter.data = values[name].copy_(parameter.data)
            if self.settings[name].trained:
                parameter.grad = gradients[name]
            else:
                parameter.requires_grad_(False)

        # Counters of batches are integers and stay where they are.
        buffers = statistics(model)
        self.stats = self.param.new_zeros(0)  # of a model without batch norms
        if buffers:
            self.stats = torch.cat([buffer.flatten() for buffer in buffers])
        views = self.stats.split([buffer.numel() for buffer in buffers])
        for buffer, view in zip(buffers, views, strict=True):
            buffer.data = view.view_as(buffer)

    def _place(self, part: Collection[nn.Parameter], start: int) -> slice:
        """Give the parameters of a part their places from `start` on.

        They lie setting after setting, and within one in the model's order.
        """
        names = [name for name, parameter in self.parameters.items() if parameter in part]
        names.sort(key=lambda name: self.settings[name], reverse=True)  # stable
        end = start
        for name in names:
            n_values = self.parameters[name].numel()
            self.slices[name] = slice(end, end + n_values)
            end = _aligned(end + n_values)
        return slice(start, end)

    def _stretches(self) -> dict[Setting, list[slice]]:
        """The stretches of the buffers that each setting holds, without the frozen ones.

        The gaps behind parameters are theirs: they hold zeros.
        """
        runs: dict[Setting, list[slice]] = {}
        before: Setting | None = None
        for name in sorted(self.slices, key=lambda name: self.slices[name].start):
            setting = self.settings[name]
            place = self.slices[name]
            end = _aligned(place.stop)
            places = runs.setdefault(setting, [])
            if setting == before:
                place = places.pop()
            places.append(slice(place.start, end))
            before = setting
        return {setting: places for setting, places in runs.items() if setting.trained}

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat buffer under the parameters' names and shapes.

        They have the parameters' strides: convolutions are channels_last in the buffer too.
        """
        return {
            name: flat[self.slices[name]].as_strided(parameter.shape, parameter.stride())
            for name, parameter in self.parameters.items()
        }


def _aligned(n: int) -> int:
    """`n` elements, rounded up to where the next view may begin."""
    return (n + ALIGN - 1) // ALIGN * ALIGN


def _n_values(parameters: Collection[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


class GradientSum:
    """Adds up the gradients of several passes in a flat buffer.

    It takes a few kernels per pass, where one or two per parameter would be usual. Gradients of
    another dtype than the buffer's (`fap.step.half`) are first brought together in a flat buffer
    of their own, then added as one tensor. Twin: autograd's accumulation into `.grad`.
    """

    def __init__(
        self,
        flat: Flat,
        total: Tensor,  # (len(flat.param),)
        half_dtype: torch.dtype | None = None,  # of gradients that are not of total's dtype
    ) -> None:
        """Gradients of `half_dtype` may only come for the parameters of `flat.first`."""
        self.total = total
        self.strides = [flat.parameters[name].stride() for name in flat.trained]
        self.targets = [total[flat.slices[name]] for name in flat.trained]
        self.front = total[flat.first]
        self.half: Tensor | None = None
        if half_dtype is not None:
            # Static, and zero between the parameters: what lies there is added too.
            self.half = torch.zeros_like(self.front, dtype=half_dtype)
        self.half_targets: list[Tensor | None] = []
        for name in flat.trained:
            place = flat.slices[name]
            if self.half is not None and place.stop <= flat.first.stop:
                self.half_targets.append(self.half[place])
            else:
                self.half_targets.append(None)

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one pass's gradients, in the order of `flat.trained`.

        None stands where the pass did not use the parameter.
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
            # The whole half buffer is added, so what an earlier pass left in it must not count.
            if stale:
                torch._foreach_zero_(stale)
            torch._foreach_copy_(half_targets, half_values)
            self.front.add_(self.half)


def _in_memory_order(
    gradient: Tensor,
    strides: tuple[int, ...],  # of its parameter, which is dense
) -> Tensor:  # (gradient.numel(),)
    """The values in the parameter's memory order, copied only where they have another one."""
    dimensions = zip(gradient.shape, gradient.stride(), strides, strict=True)
    # The stride of a dimension of one means nothing.
    if any(length > 1 and own != wanted for length, own, wanted in dimensions):
        ordered = torch.empty_strided(
            gradient.shape, strides, dtype=gradient.dtype, device=gradient.device
        )
        gradient = ordered.copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))
