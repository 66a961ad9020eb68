"""The whole step is static: no host sync, no new buffers, no layout copies, no harm from a skipped step; and its capture."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fap.config import make_config
from fap.graph import runner
from fap.models import build
from fap.norm import norms, shared_groups
from fap.step import Step

KINDS = ("vanilla", "sequential", "fused", "pipelined", "parallel")
ALL = [*KINDS, "advprop", "decoupled"]


def make(kind, *, device="cpu", amp="off", size=8, seed=0, **sections):
    """A step of 16 clean rows in two groups, fed; `kind` is a method or a schedule of Fast AdvProp."""
    method = {"name": kind} if kind in ("vanilla", "advprop", "decoupled") else {"schedule": kind}
    method |= {"group": 8} | ({} if kind in ("vanilla", "advprop") else {"p_adv": "1/3"})
    if kind == "advprop":
        method["attack_steps"] = 2
    method |= sections.get("method", {})
    data = {"size": size, "resize": size, "crop": "pad"} | sections.get("data", {})
    config = make_config({"model": {"name": "cifar_resnet8", "num_classes": 10}, "method": method, "data": data,
                          "optim": {"clean_batch": 16}})  # fmt: skip
    torch.manual_seed(seed)
    model = build("cifar_resnet8", 10, aux=kind != "vanilla", size=size).to(device)
    step = Step(model, config, amp=amp)
    feed(step, 0)
    return step


def feed(step, seed):
    g = torch.Generator().manual_seed(seed)
    rows, size = step.inputs.images.shape[0], step.inputs.images.shape[-1]
    images = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=g)
    draws = {}
    if step.n_adv:
        draws["shuffle"] = torch.randperm(step.n_adv, generator=g)
        draws["noise_key"] = torch.randint(0, 2**31 - 1, (step.aux_groups,), dtype=torch.int32, generator=g)
    if step.config.data.mix:
        draws["mix_lam"], draws["mix_box"] = torch.rand((), generator=g), torch.tensor([1, 2, 5, 7])
        draws["mix_partner"] = torch.randperm(step.n_clean, generator=g)
    step.feed(images, torch.randint(0, 10, (rows,), generator=g), 0.1, **draws)


def clone(step):
    return {k: v.clone() for k, v in step.state().items()}


def changed(before, after, *but):
    return {k for k in before if not torch.equal(before[k], after[k]) and not k.startswith(("metrics", *but))}


def poison(step):
    """Infinite weights in the last layer of the network make every gradient non-finite."""
    step.model.fc.bias.data[0] = float("inf")


# ------------------------------------------------------------------ the runner


def test_graph_on_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"run\.graph = 'on'.*'auto' or 'off'"):
        runner(make("vanilla"), "on")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_without_a_gpu_the_step_itself_runs_eagerly(mode):
    step = make("fused")
    assert runner(step, mode) == (step, "eager")


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing"), torch.cuda.OutOfMemoryError()]
)
def test_a_failed_capture_leaves_the_step_as_it_was(monkeypatch, mode, error):
    """On a stand-in for torch.cuda: the warm-up trains, the capture fails, `auto` goes on eagerly from where it began."""
    step, streams = make("pipelined"), []
    before = clone(step)
    step.device = torch.device("cuda")  # after __init__ only the runner and the end of `parallel` look at it

    @contextlib.contextmanager
    def failing(*_, **__):
        yield
        assert changed(before, clone(step))
        raise error

    stand_ins = dict.fromkeys(("Event", "Stream", "CUDAGraph"), lambda *_: mock.Mock())
    current = mock.Mock()
    stand_ins |= {"current_stream": lambda _: current, "set_stream": streams.append}
    stand_ins |= {"get_rng_state": lambda _: "random", "set_rng_state": lambda *_: None}
    stand_ins |= {"stream": lambda _: contextlib.nullcontext(), "graph": failing}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    if mode == "on" or isinstance(error, torch.cuda.OutOfMemoryError):
        with pytest.raises(type(error)):
            runner(step, mode)
    else:
        with pytest.warns(UserWarning, match="could not be captured"):
            assert runner(step, mode) == (step, "eager")
    assert streams == [current]
    assert not changed(before, clone(step))
    assert torch.equal(step.metrics, before["metrics"])


# ------------------------------------------------------------------ what capture needs, seen from a CPU


class NoHostSync(TorchDispatchMode):
    """Fails on operators that hand a device value to Python, or whose output shape depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "allclose")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{func} would wait for the device"
        assert not (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])), "boolean indexing"
        return func(*args, **(kwargs or {}))


def test_the_watch_for_host_syncs_sees_them():
    for bad in (lambda t: t.item(), lambda t: bool(t), lambda t: t[None][t[None] > 0]):
        with pytest.raises(AssertionError), NoHostSync():
            bad(torch.ones(()))


@pytest.mark.parametrize(("kind", "mix"), [*((k, None) for k in ALL), ("fused", "mixup"), ("pipelined", "cutmix")])
def test_the_step_never_asks_the_device_for_a_value(kind, mix):
    step = make(kind, amp="bf16", data={"mix": mix})
    with NoHostSync():
        step()
    assert step.take_metrics()["steps"] == 1


@pytest.mark.parametrize("kind", ALL)
def test_every_tensor_of_the_state_and_input_stays_where_it_is(kind):
    step = make(kind)

    def pointers():
        tensors = step.state() | {f"inputs.{k}": v for k, v in vars(step.inputs).items()}
        tensors |= {f"grad.{k}": p.grad for k, p in step.model.named_parameters()}
        return {k: v.data_ptr() for k, v in tensors.items()}

    before = pointers()
    for seed in range(3):
        feed(step, seed)
        step()
    assert pointers() == before


@pytest.mark.parametrize("kind", ALL)
def test_every_convolution_sees_channels_last_forward_and_backward(kind):
    step, seen = make(kind), []

    def channels_last(t, where):
        if t is not None and t.dim() == 4 and t.shape[1] > 1 and t.shape[2] > 1:
            seen.append(where)
            assert t.is_contiguous(memory_format=torch.channels_last), f"{where}: {tuple(t.shape)} strides {t.stride()}"

    for name, m in step.model.named_modules():
        if isinstance(m, nn.Conv2d) or m in norms(step.model):
            m.register_forward_hook(
                lambda m, x, y, n=name: (channels_last(x[0], f"{n} in"), channels_last(y, f"{n} out"), None)[2]
            )
        if isinstance(m, nn.Conv2d):
            channels_last(m.weight, f"{name} weight")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name == "convolution_backward":
                channels_last(args[0], "gradient of a convolution's output")
                channels_last(args[1], "input of a convolution's backward")
            out = func(*args, **(kwargs or {}))
            if name == "convolution_backward":
                channels_last(out[0], "gradient of a convolution's input")
            return out

    with Watch():
        step()
    assert len([s for s in seen if s.startswith("gradient")]) >= 9
    for name, p in step.model.named_parameters():
        assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("kind", ALL)
def test_rows_are_put_together_without_changing_their_layout(kind):
    """Five-dimensional `cat` and `flatten` of channels_last rows would transpose them, and every later kernel would pay."""
    step, layouts = make(kind, data={"mix": "mixup"} if kind != "advprop" else {}), []

    def watched(images, out, normalise=step._normalise):
        layouts.append(images.is_contiguous(memory_format=torch.channels_last))
        normalise(images, out)

    def ascend(current, source, gradient, ascend=step._ascend):
        layouts.append(gradient.is_contiguous(memory_format=torch.channels_last))
        return ascend(current, source, gradient)

    step._normalise, step._ascend = watched, ascend
    for _ in range(2):  # `pipelined` mixes a carry from the second step on
        step()
    assert layouts
    assert all(layouts), layouts


# ------------------------------------------------------------------ state and skipped steps


@pytest.mark.parametrize(("kind", "amp"), [*((k, "off") for k in ALL), ("pipelined", "bf16")])
def test_state_round_trip_is_exact(kind, amp):
    step = make(kind, amp=amp)
    step()
    saved = clone(step)
    feed(step, 1)
    step()
    expected = clone(step)
    other = make(kind, amp=amp, seed=7)
    other()
    other.load_state(saved)
    assert not changed(saved, clone(other))
    feed(other, 1)
    other()
    assert not changed(expected, clone(other))


def test_state_of_another_method_is_refused_by_name():
    with pytest.raises(ValueError, match="does not fit the run"):
        make("fused").load_state(make("vanilla").state())


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("kind", ALL)
def test_a_non_finite_step_changes_no_bit(kind, when):
    step = make(kind)
    for seed in range(when):
        feed(step, seed)
        step()
    poison(step)
    step.take_metrics()
    before = clone(step)
    step()
    assert not changed(before, clone(step), "carry")
    metrics = step.take_metrics()
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    assert metrics["nonfinite_clean"] == step.n_clean
    assert torch.isfinite(step.adv_255).all()
    step.model.fc.bias.data[0] = 0
    step()
    metrics = step.take_metrics()
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (0, 0)
    assert "model.fc.weight" in changed(before, clone(step))
    assert all(torch.isfinite(v).all() for v in step.state().values())


@pytest.mark.parametrize("when", [0, 2])
def test_fp16_overflow_halves_the_scale_and_changes_nothing_else(when):
    step = make("fused", amp="fp16")
    for _ in range(when):
        step()
    step.scale.fill_(2.0**60)
    before = clone(step)
    step()
    assert changed(before, clone(step), "carry", "growth") == {"scale"}
    assert (step.scale, step.growth) == (2.0**59, 0)
    step.scale.fill_(2.0**10)
    step()
    assert "model.fc.weight" in changed(before, clone(step))


# ------------------------------------------------------------------ on a GPU

gpu = pytest.mark.gpu


@pytest.fixture
def strict_sync(monkeypatch):
    """Any hidden host synchronisation raises; the same kernels run whether captured or not. Needs a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def run(step):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


@gpu
@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ALL)
def test_captured_equals_eager(kind, amp, strict_sync):
    eager, captured = (make(kind, device="cuda", amp=amp, size=32) for _ in range(2))
    replay, how = runner(captured, "on")
    assert how == "CUDA graph"
    for seed in range(5):
        for step, call in ((eager, eager), (captured, replay)):
            feed(step, seed)
            step.inputs.lr.fill_(1e-3)  # at 0.1 five steps amplify rounding a millionfold
            strict_sync(call)
    for (name, a), b in zip(eager.state().items(), captured.state().values(), strict=True):
        assert torch.isfinite(a).all()
        if a.is_floating_point() and name != "metrics":
            scale = a.float().abs().max().clamp(min=1e-3)
            limit = 1e-3 if amp == "off" else 0.05  # a sign of the attack may flip
            assert (a - b).float().abs().max() <= limit * scale or name.startswith("carry"), name
    assert eager.take_metrics()["steps"] == captured.take_metrics()["steps"] == 5


@gpu
def test_capture_leaves_state_and_generator_alone(strict_sync):
    step = make("pipelined", device="cuda", amp="fp16", size=32)
    before, random = clone(step), torch.cuda.get_rng_state()
    runner(step, "on")
    assert not changed(before, clone(step))
    assert torch.equal(step.metrics, before["metrics"])
    assert torch.equal(random, torch.cuda.get_rng_state())


@gpu
def test_overflow_at_step_0_under_capture(strict_sync):
    step = make("fused", device="cuda", amp="fp16", size=32)
    replay, _ = runner(step, "on")
    step.scale.fill_(2.0**60)
    before = clone(step)
    strict_sync(replay)
    assert changed(before, clone(step), "carry") == {"scale"}
    assert step.scale == 2.0**59


@gpu
def test_every_replay_draws_its_own_dropout(strict_sync):
    step = make("vanilla", device="cuda", size=32)
    step.model.fc = nn.Sequential(nn.Dropout(0.5), step.model.fc)
    replay, _ = runner(step, "on")
    losses = []
    for _ in range(3):
        step.inputs.lr.fill_(0)
        replay()
        losses.append(step.take_metrics()["loss_clean"])
    assert len(set(losses)) == 3


@gpu
@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_every_replay_uses_the_mix_it_was_fed(mix, strict_sync):
    eager, captured = (make("fused", device="cuda", size=32, data={"mix": mix}) for _ in range(2))
    replay, _ = runner(captured, "on")
    for seed in range(4):
        for step, call in ((eager, eager), (captured, replay)):
            feed(step, seed)
            step.inputs.lr.fill_(0)  # the loss depends on the mix alone
            call()
        a, b = eager.take_metrics()["loss_clean"], captured.take_metrics()["loss_clean"]
        assert a == pytest.approx(b, rel=1e-3)


@gpu
@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_no_layout_copies_in_the_trace(amp, strict_sync):
    step = make("fused", device="cuda", amp=amp, size=32)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        step()
        torch.cuda.synchronize()
    names = {e.key for e in trace.key_averages()}
    assert not [n for n in names if "nchwToNhwc" in n or "nhwcToNchw" in n]


@pytest.mark.slow
@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-4), ("bf16", 0.05)])
def test_a_compiled_step_is_whole_graphs_and_equals_the_eager_one(amp, tolerance):
    """Traced by Dynamo and AOTAutograd as `run.compile` does, without the code generator, which takes minutes here.

    With AMP the compiled model reads the half-precision copies of the weights too.
    """
    from torch._dynamo.utils import counters

    # Noise, not an attack: in bfloat16 rounding turns signs of small gradients.
    noise = {"name": "noise", "schedule": "fused"} if amp != "off" else {}
    eager, compiled = (make("fused", amp=amp, method=noise) for _ in range(2))
    shared_groups(compiled.model).kernel = "split"
    compiled.forward = torch.compile(compiled.model, backend="aot_eager")
    counters.clear()
    for seed in range(3):
        for step in (eager, compiled):
            feed(step, seed)
            step()
    assert counters["stats"]["unique_graphs"] == 2  # one per pass
    assert not counters["graph_break"]
    for name, value in eager.state().items():
        assert torch.allclose(value.double(), compiled.state()[name].double(), rtol=tolerance, atol=tolerance / 100), name
