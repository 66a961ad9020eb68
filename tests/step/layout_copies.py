"""Which kernels of a profile turn tensors from one memory layout into the other.

All images are channels_last. cuDNN itself does so around a convolution with three input channels,
the stem, for which it has no channels_last kernel of its own on every GPU; that is its business.
Anywhere else it means that a tensor of ours came in the wrong layout.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

TRANSPOSING = ("nchwToNhwc", "nhwcToNchw")  # in the names of cuDNN's kernels
STEM_CHANNELS = 3


def layout_copies(events: Iterable[Any]) -> list[str]:
    """The offending kernels and who launched them; `events` of a profile with `record_shapes`."""
    events = list(events)
    offences: list[str] = []
    launched: Counter[str] = Counter()
    for event in events:
        for kernel in event.kernels:
            if transposes(kernel.name):
                launched[kernel.name] += 1
                if not in_the_stem(event):
                    by = f"{event.name} on {event.input_shapes}"
                    offences.append(f"{kernel.name} launched by {by}")

    # What ran on the device but belongs to no operator cannot be the stem's.
    on_the_device = Counter(event.name for event in events if event.device_type != DeviceType.CPU)
    for name, count in (on_the_device - launched).items():
        if transposes(name):
            offences += [f"{name} launched by no operator of the profile"] * count
    return offences


def transposes(kernel: str) -> bool:
    return any(word in kernel for word in TRANSPOSING)


def in_the_stem(event: Any) -> bool:
    """Is it, or what called it, a convolution of three channels, or the backward of one?"""
    while event is not None:
        if is_stem_convolution(event):
            return True
        event = event.cpu_parent
    return False


def is_stem_convolution(event: Any) -> bool:
    name = event.name.lower()
    if "conv" not in name or not event.input_shapes:
        return False
    # forward: input, weight, ...; backward: gradient of the output, input, weight, ...
    first = 1 if "backward" in name else 0
    operands = event.input_shapes[first : first + 2]
    # A weight with three input channels tells the stem from a depthwise convolution of three.
    return len(operands) == 2 and all(shape[1:2] == [STEM_CHANNELS] for shape in operands)
