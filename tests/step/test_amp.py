"""Mixed precision: one grey level survives the cast at the stem, and so do gradients and signs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fap.distributed import ONE_RANK
from fap.nets.stem import stem_of
from fap.step.half import HALF, Amp, grey_level_survives_bf16
from fap.step.rows import Rows
from tests.step.made_steps import IMAGENET, make, poison


class Received(TorchDispatchMode):
    """What the convolution kernel really gets for images of three channels, after every cast."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket.__name__ == "convolution" and args[0].shape[1] == 3:
            self.inputs.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def perturbation(amp: Amp, data: dict[str, Any]) -> tuple[Tensor, Tensor, torch.dtype]:
    """What an attack of one grey level does to the stem's input.

    Returns (adversarial - clean) rows as the stem's convolution receives them, the same in the grey
    levels that were asked for, and the dtype of what is received.
    """
    method = {"random_start": False, "shuffle": "off", "eps_255": 1.0}
    step = make("sequential", amp=amp, size=32, method=method, data=data)
    images = step.inputs.images
    g = torch.Generator().manual_seed(3)
    # Away from the ends of the pixel range, where the attack would be clipped.
    images.copy_(torch.randint(2, 254, images.shape, generator=g, dtype=torch.uint8))
    asked: list[Tensor] = []
    publish = step.adv.publish

    def watched(rows: Rows) -> None:
        asked.append((rows.images_255 - images[step.inputs.n_clean :].float()).clone())
        publish(rows)

    step.adv.publish = watched  # type: ignore[method-assign]
    with Received() as received:
        step()
    # Without a random start the noise pass sees the attacked rows as they were loaded.
    _, clean, adv = received.inputs
    return adv.float() - clean.float(), asked[0], clean.dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    ("amp", "low", "high"), [("off", 0.999, 1.001), ("fp16", 0.99, 1.07), ("bf16", 0.95, 1.30)]
)
def test_one_grey_level_survives_the_cast_at_the_stem(amp: Amp, low: float, high: float) -> None:
    delta, asked, dtype = perturbation(amp, {})
    assert dtype == HALF.get(amp, torch.float32)
    moved = asked != 0
    assert moved.float().mean() > 0.99
    assert torch.equal(asked[moved].abs(), torch.ones_like(asked[moved]))
    assert torch.equal(delta[moved].sign(), asked[moved].sign())
    grey_level = 2 / 255  # in [-1, 1]
    size = delta[moved].abs() / grey_level
    print(f"{amp}: |delta| in {size.min():.4f} .. {size.max():.4f} grey levels")
    assert low <= size.min()
    assert size.max() <= high


@pytest.mark.slow
def test_imagenet_statistics_in_bf16_run_the_stem_in_full_precision() -> None:
    delta, asked, dtype = perturbation("bf16", IMAGENET)
    assert dtype == torch.float32
    moved = asked != 0
    grey_level = torch.tensor([1 / 255 / std for std in IMAGENET["std"]]).view(1, 3, 1, 1)
    expected = grey_level.expand_as(delta)
    assert torch.equal(delta[moved].sign(), asked[moved].sign())
    torch.testing.assert_close(delta[moved].abs(), expected[moved], rtol=1e-3, atol=0)
    assert perturbation("fp16", IMAGENET)[2] == torch.float16


def test_bf16_would_lose_the_perturbation_with_imagenet_statistics() -> None:
    """The reason for the rule: without it the magnitude is off by half."""
    assert grey_level_survives_bf16((0.5,) * 3, (0.5,) * 3)
    assert not grey_level_survives_bf16(IMAGENET["mean"], IMAGENET["std"])
    red_mean = IMAGENET["mean"][0]
    red_std = IMAGENET["std"][0]
    grey = torch.arange(2, 253).float()
    clean = (grey / 255 - red_mean) / red_std
    moved = ((grey + 1) / 255 - red_mean) / red_std
    grey_level = 1 / 255 / red_std
    size = (moved.bfloat16().float() - clean.bfloat16().float()) / grey_level
    assert size.max() > 1.3 or size.min() < 0.95


@pytest.mark.parametrize(
    ("amp", "data", "full"),
    [
        ("bf16", IMAGENET, True),
        ("fp16", IMAGENET, False),
        ("off", IMAGENET, False),
        ("bf16", {}, False),
    ],
)
def test_the_stem_follows_the_config_of_the_step_that_owns_it(
    amp: Amp, data: dict[str, Any], full: bool
) -> None:
    stem = stem_of(make("fused", amp=amp, data=data).network.model)
    assert stem is not None
    assert stem.full_precision is full


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vanilla", "sequential", "fused", "pipelined", "advprop"])
@pytest.mark.parametrize(("amp", "limit"), [("fp16", 0.05), ("bf16", 0.2)])
def test_gradients_under_autocast_are_close_to_float32(
    variant: str, amp: Amp, limit: float
) -> None:
    method = {}
    if variant != "vanilla":
        # Flipped signs of tiny gradients must not count.
        method = {"eps_255": 0.001, "step_255": 0.001}

    def gradient(amp: Amp) -> Tensor:
        step = make(variant, amp=amp, size=16, method=method)
        step()
        return step.network.flat.grad  # the optimiser has unscaled it

    reference = gradient("off")
    ours = gradient(amp)
    assert torch.isfinite(ours).all()
    assert (ours - reference).norm() <= limit * reference.norm()


# ---------------------------------------------------------------------- signs


@pytest.mark.parametrize("variant", ["sequential", "fused", "pipelined", "decoupled", "advprop"])
def test_zero_signs_are_counted(variant: str) -> None:
    step = make(variant)
    assert step.attack is not None
    step()
    metrics = step.metrics.take(ONE_RANK)
    n_attack_steps = 2 if variant == "advprop" else 1
    signs = step.n_adv * 3 * 8 * 8 * n_attack_steps
    assert metrics["signs"] == signs
    assert metrics["zero_signs"] < 0.01 * signs
    fc_weight = step.network.flat.parameters["fc.weight"]
    fc_weight.data.zero_()  # no gradient reaches the image
    step()
    assert step.metrics.take(ONE_RANK)["zero_signs"] == signs


def test_loss_scaling_keeps_the_signs_that_fp16_would_lose() -> None:
    """A row's loss counts 1 / W, so input gradients fall below fp16's smallest number.

    The loss scale brings them back.
    """

    def share_of_zeros(scale: float) -> float:
        step = make("fused", amp="fp16")
        step.update.scale.fill_(scale)
        step()
        metrics = step.metrics.take(ONE_RANK)
        return metrics["zero_signs"] / metrics["signs"]

    assert share_of_zeros(2.0**16) < 0.05 < share_of_zeros(2.0**-20)


def test_a_non_finite_gradient_has_no_sign() -> None:
    step = make("sequential")
    poison(step)
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["zero_signs"] == metrics["signs"]
    assert torch.isfinite(step.adv.rows.images_255).all()
