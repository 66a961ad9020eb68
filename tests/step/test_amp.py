"""Mixed precision: one grey level survives the cast at the stem; gradients stay close to float32's;
zero signs are counted.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fap.distributed import ONE_RANK
from fap.nets.stem import StemConv2d, stem_of
from fap.step.half import grey_level_survives_bf16
from tests.step.test_graph import make

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Received(TorchDispatchMode):
    """What the convolution kernel really gets for images of three channels, after every cast."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "convolution" and args[0].shape[1] == 3:
            self.inputs.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def perturbation(amp, eps_255=1.0, grey=(2, 253), **data):
    """(adversarial - clean) rows as the stem's convolution receives them, the sign asked for, and
    the inputs' dtype.
    """
    step = make(
        "sequential",
        amp=amp,
        data=data,
        size=32,
        method={"random_start": False, "shuffle": "off", "eps_255": eps_255},
    )
    g = torch.Generator().manual_seed(3)
    images = step.inputs.images
    images.copy_(torch.randint(grey[0], grey[1] + 1, images.shape, generator=g, dtype=torch.uint8))
    asked = []
    publish = step.adv.publish

    def watched(adv_255, targets):
        asked.append((adv_255 - images[step.inputs.n_clean :].float()).clone())
        publish(adv_255, targets)

    step.adv.publish = watched
    with Received() as received:
        step()
    _, clean, adv = (
        received.inputs
    )  # without a random start the noise pass sees the clean adversarial rows
    return (adv.float() - clean.float()), asked[0], clean.dtype


@pytest.mark.parametrize(
    ("amp", "low", "high"), [("off", 0.999, 1.001), ("fp16", 0.99, 1.07), ("bf16", 0.95, 1.30)]
)
def test_one_grey_level_survives_the_cast_at_the_stem(amp, low, high):
    delta, asked, dtype = perturbation(amp)
    assert dtype == DTYPES.get(amp, torch.float32)
    moved = asked != 0
    assert moved.float().mean() > 0.99
    assert torch.equal(asked[moved].abs(), torch.ones_like(asked[moved]))
    assert torch.equal(delta[moved].sign(), asked[moved].sign())
    eps = 2 / 255  # one grey level in [-1, 1]
    size = delta[moved].abs() / eps
    print(f"{amp}: |delta| / eps in {size.min():.4f} .. {size.max():.4f}")
    assert low <= size.min()
    assert size.max() <= high


def test_imagenet_statistics_in_bf16_run_the_stem_in_full_precision():
    delta, asked, dtype = perturbation("bf16", **IMAGENET)
    assert dtype == torch.float32
    moved = asked != 0
    per_channel = (
        torch.tensor([1 / 255 / s for s in IMAGENET["std"]]).view(1, 3, 1, 1).expand_as(delta)
    )
    assert torch.equal(delta[moved].sign(), asked[moved].sign())
    torch.testing.assert_close(delta[moved].abs(), per_channel[moved], rtol=1e-3, atol=0)
    assert perturbation("fp16", **IMAGENET)[2] == torch.float16


def test_bf16_would_lose_the_perturbation_with_imagenet_statistics():
    """The reason for the rule: without it the magnitude is off by half."""
    assert grey_level_survives_bf16((0.5,) * 3, (0.5,) * 3)
    assert not grey_level_survives_bf16(IMAGENET["mean"], IMAGENET["std"])
    grey = torch.arange(2, 253).float()
    x = [((grey + d) / 255 - 0.485) / 0.229 for d in (0, 1)]
    size = (x[1].bfloat16().float() - x[0].bfloat16().float()) / (1 / 255 / 0.229)
    assert size.max() > 1.3 or size.min() < 0.95


def test_the_stem_follows_the_config_of_the_step_that_owns_it():
    for amp, data, full in (
        ("bf16", IMAGENET, True),
        ("fp16", IMAGENET, False),
        ("off", IMAGENET, False),
        ("bf16", {}, False),
    ):
        stem = stem_of(make("fused", amp=amp, data=data).network.model)
        assert isinstance(stem, StemConv2d)
        assert stem.full_precision is full


@pytest.mark.parametrize("kind", ["vanilla", "sequential", "fused", "pipelined", "advprop"])
@pytest.mark.parametrize(("amp", "limit"), [("fp16", 0.05), ("bf16", 0.2)])
def test_gradients_under_autocast_are_close_to_float32(kind, amp, limit):
    gradients = []
    for which in ("off", amp):
        step = make(
            kind,
            amp=which,
            size=16,
            method={"eps_255": 0.001, "step_255": 0.001} if kind != "vanilla" else {},
        )
        # flipped signs of tiny gradients must not count: the attack is a thousandth of a grey level
        step()
        gradients.append(step.network.flat.grad.clone())  # the optimiser has unscaled it
    reference, ours = gradients
    assert torch.isfinite(ours).all()
    assert (ours - reference).norm() <= limit * reference.norm()


@pytest.mark.parametrize("kind", ["sequential", "fused", "pipelined", "decoupled", "advprop"])
def test_zero_signs_are_counted(kind):
    step = make(kind)
    step()
    metrics = step.metrics.take(ONE_RANK)
    signs = step.n_adv * 3 * 8 * 8 * (2 if kind == "advprop" else 1)
    assert metrics["signs"] == signs
    assert metrics["zero_signs"] < 0.01 * signs
    step.network.model.fc.weight.data.zero_()  # no gradient reaches the image
    step()
    assert step.metrics.take(ONE_RANK)["zero_signs"] == signs


def test_loss_scaling_keeps_the_signs_that_fp16_would_lose():
    """Per-row weights of 1 / (W rows) push input gradients below fp16's smallest number; the loss
    scale brings them back.
    """
    zeros = {}
    for scale in (2.0**-20, 2.0**16):
        step = make("fused", amp="fp16")
        step.update.scale.fill_(scale)
        step()
        metrics = step.metrics.take(ONE_RANK)
        zeros[scale] = metrics["zero_signs"] / metrics["signs"]
    assert zeros[2.0**16] < 0.05 < zeros[2.0**-20]


def test_a_non_finite_gradient_has_no_sign():
    step = make("sequential")
    step.network.model.fc.bias.data[0] = float("inf")
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["zero_signs"] == metrics["signs"]
    assert torch.isfinite(step.adv.rows.images_255).all()
