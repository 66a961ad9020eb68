"""A captured step equals the eager one, on a GPU, without a host sync; so does a compiled one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fap.distributed import ONE_RANK
from fap.nets.dual import norm_state
from fap.step.graph import runner
from fap.step.half import Amp
from fap.step.step import Step
from tests.step.layout_copies import layout_copies
from tests.step.made_steps import CLASSES, STEPS, changed, clone, feed, make

gpu = pytest.mark.gpu
SIZE = 32

Strict = Callable[[Callable[[], None]], None]


@pytest.fixture
def strict_sync(monkeypatch: pytest.MonkeyPatch) -> Strict:
    """Calls a step such that any hidden host synchronisation raises. Needs a GPU.

    The same kernels run whether captured or not.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def run(step: Callable[[], None]) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


def two(variant: str, **more: Any) -> tuple[Step, Step]:
    """Two equal steps on the GPU."""
    first = make(variant, device="cuda", size=SIZE, **more)
    second = make(variant, device="cuda", size=SIZE, **more)
    return first, second


@gpu
@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
@pytest.mark.parametrize(("task", "variant"), STEPS)
def test_captured_equals_eager(task: str, variant: str, amp: Amp, strict_sync: Strict) -> None:
    eager, captured = two(variant, task=task, amp=amp)
    replay, how = runner(captured, "on")
    assert how == "CUDA graph"
    for seed in range(5):
        for step, call in ((eager, eager), (captured, replay)):
            feed(step, seed)
            step.inputs.lr.fill_(1e-3)  # at 0.1 five steps amplify rounding a millionfold
            strict_sync(call)
    limit = 1e-3 if amp == "off" else 0.05  # a sign of the attack may flip
    for (name, a), b in zip(eager.state().items(), captured.state().values(), strict=True):
        assert torch.isfinite(a).all()
        if a.is_floating_point() and name != "metrics":
            scale = a.float().abs().max().clamp(min=1e-3)
            assert (a - b).float().abs().max() <= limit * scale or name.startswith("carry"), name
    assert eager.metrics.take(ONE_RANK)["steps"] == captured.metrics.take(ONE_RANK)["steps"] == 5


@gpu
def test_capture_leaves_state_and_generator_alone(strict_sync: Strict) -> None:
    step = make("pipelined", device="cuda", amp="fp16", size=SIZE)
    before = clone(step)
    random = torch.cuda.get_rng_state()
    runner(step, "on")
    assert not changed(before, clone(step))
    assert torch.equal(step.metrics.sums, before["metrics"])
    assert torch.equal(random, torch.cuda.get_rng_state())


@gpu
def test_overflow_at_step_0_under_capture(strict_sync: Strict) -> None:
    step = make("fused", device="cuda", amp="fp16", size=SIZE)
    replay, _ = runner(step, "on")
    step.update.scale.fill_(2.0**60)
    before = clone(step)
    strict_sync(replay)
    assert changed(before, clone(step), "carry") == {"scale"}
    assert step.update.scale == 2.0**59


@gpu
def test_every_replay_draws_its_own_dropout(strict_sync: Strict) -> None:
    step = make("vanilla", device="cuda", size=SIZE)
    model = step.network.model
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)  # type: ignore[arg-type]
    replay, _ = runner(step, "on")
    losses = []
    for _ in range(3):
        step.inputs.lr.fill_(0)
        replay()
        losses.append(step.metrics.take(ONE_RANK)["loss_clean"])
    assert len(set(losses)) == 3


@gpu
@pytest.mark.parametrize("variant", ["fused", "pipelined", "decoupled"])
@pytest.mark.parametrize(
    "mix",
    [{"mix": "mixup"}, {"mix": "cutmix"}, {"mix": "either", "mix_per": "row", "mix_on": "both"}],
    ids=str,
)
def test_every_replay_uses_the_mix_it_was_fed(
    mix: dict[str, str], variant: str, strict_sync: Strict
) -> None:
    weights = [1.0 + label for label in range(CLASSES)]
    eager, captured = two(variant, data=mix, optim={"class_weights": weights})
    replay, _ = runner(captured, "on")
    for seed in range(4):
        for step, call in ((eager, eager), (captured, replay)):
            feed(step, seed)
            step.inputs.lr.fill_(0)  # the loss depends on the mix alone
            strict_sync(call)
        a = eager.metrics.take(ONE_RANK)
        b = captured.metrics.take(ONE_RANK)
        for loss in ("loss_clean", "loss_noise", "loss_adv"):
            limit = 1e-2 if loss == "loss_adv" else 1e-3  # a sign of the attack may flip
            assert a[loss] == pytest.approx(b[loss], rel=limit)


@gpu
@pytest.mark.parametrize("amp", ["fp16", "bf16"])
@pytest.mark.parametrize("task", ["classification", "detection"])
def test_no_layout_copies_in_the_trace(task: str, amp: Amp, strict_sync: Strict) -> None:
    step = make("fused", task=task, device="cuda", amp=amp, size=SIZE)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
        step()
        torch.cuda.synchronize()
    assert any(event.kernels for event in trace.events())
    assert not layout_copies(trace.events())


@pytest.mark.slow
@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-4), ("bf16", 0.05)])
def test_a_compiled_step_is_whole_graphs_and_equals_the_eager_one(
    amp: Amp, tolerance: float
) -> None:
    """Traced by Dynamo and AOTAutograd as `run.compile` does.

    Without the code generator, which takes minutes here. With AMP the compiled model reads the
    half-precision copies of the weights too.
    """
    from torch._dynamo.utils import counters

    method: dict[str, Any] = {}
    if amp != "off":
        # Noise, not an attack: in bfloat16 rounding turns signs of small gradients.
        method = {"name": "noise", "schedule": "fused"}
    eager = make("fused", amp=amp, method=method)
    compiled = make("fused", amp=amp, method=method)
    norm_state(compiled.network.model).kernel = "framework"
    compiled.network.forward = torch.compile(compiled.network.model, backend="aot_eager")
    counters.clear()
    for seed in range(3):
        for step in (eager, compiled):
            feed(step, seed)
            step()
    assert counters["stats"]["unique_graphs"] == 2  # one per pass
    assert not counters["graph_break"]
    found = compiled.state()
    for name, value in eager.state().items():
        close = torch.allclose(
            value.double(), found[name].double(), rtol=tolerance, atol=tolerance / 100
        )
        assert close, name
