"""The whole step is static: no host sync, no new buffers, no layout copies, no harm from a skipped
step; and its capture.
"""

import ast
import contextlib
import subprocess
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from fap.config import make_config
from fap.distributed import ONE_RANK
from fap.nets.build import build
from fap.nets.dual import norm_state, norms
from fap.nets.norm import DualBatchNorm2d
from fap.step.graph import WARM_UP_STEPS, FreshProcessNeeded, answers, runner
from fap.step.step import Step
from tests.step.layout_copies import layout_copies

KINDS = ("vanilla", "sequential", "fused", "pipelined", "parallel")
ALL = [*KINDS, "advprop", "decoupled"]


def make(kind, *, device="cpu", amp="off", size=8, seed=0, **sections):
    """A step of 16 clean rows in two groups, fed; `kind` is a method or a schedule of Fast AdvProp."""
    method = {"name": kind} if kind in ("vanilla", "advprop", "decoupled") else {"schedule": kind}
    method |= {"group_rows": 8} | ({} if kind in ("vanilla", "advprop") else {"p_adv": "1/3"})
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
        draws["noise_key"] = torch.randint(
            0, 2**31 - 1, (step.n_adv_groups,), dtype=torch.int32, generator=g
        )
    if step.mix:
        draws["mix_lam"], draws["mix_box"] = torch.rand((), generator=g), torch.tensor([1, 2, 5, 7])
        draws["mix_partner"] = torch.randperm(step.inputs.n_clean, generator=g)
    step.feed(images, torch.randint(0, 10, (rows,), generator=g), 0.1, **draws)


def clone(step):
    return {k: v.clone() for k, v in step.state().items()}


def changed(before, after, *but):
    return {
        k
        for k in before
        if not torch.equal(before[k], after[k]) and not k.startswith(("metrics", *but))
    }


def poison(step):
    """Infinite weights in the last layer of the network make every gradient non-finite."""
    step.network.model.fc.bias.data[0] = float("inf")


# ------------------------------------------------------------------ the runner


def test_graph_on_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"run\.graph = 'on'.*'auto' or 'off'"):
        runner(make("vanilla"), "on")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_without_a_gpu_the_step_itself_runs_eagerly(mode):
    step = make("fused")
    assert runner(step, mode) == (step, "eager")


ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"


class StandIn:
    """What `fap.step.graph` asks of torch.cuda, on a CPU, with the failures that a test wishes for."""

    def __init__(self, monkeypatch):
        self.stream = mock.Mock(name="the current stream")
        self.streams = []  # made current by hand
        self.events = []  # arguments of their making
        self.random = "as before"  # the generator's state
        self.dead = False  # every answer is an error from now on
        self.pending = 0  # so many answers are an error
        self.capture_error = None
        self.captures = 0
        names = ("graph", "synchronize", "get_rng_state", "set_rng_state")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: mock.Mock())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: mock.Mock())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", self.streams.append)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch, "__version__", "2.14.0")
        monkeypatch.setattr(DualBatchNorm2d, "_on_grid", self.on_grid)

    def step(self, kind="pipelined"):
        step = make(kind)
        # After __init__ only the runner and the end of `parallel` look at it.
        step.device = torch.device("cuda")
        self.before = clone(step)
        return step

    @staticmethod
    def on_grid(norm, x, residual, groups):
        """The twin in place of the kernel, which takes seconds in Triton's interpreter."""
        kernel, norm.shared.kernel = norm.shared.kernel, "framework"
        try:
            return norm.forward(x, residual)
        finally:
            norm.shared.kernel = kernel

    def event(self, **options):
        self.events.append(options)
        return mock.Mock()

    @contextlib.contextmanager
    def graph(self, *_, **__):
        self.captures += 1
        yield
        if self.capture_error is not None:
            raise self.capture_error

    def synchronize(self, *_):
        if self.dead or self.pending:
            self.pending = max(0, self.pending - 1)
            raise RuntimeError(ILLEGAL_ACCESS)

    def get_rng_state(self, _):
        return self.random

    def set_rng_state(self, state, _):
        self.random = state

    def assert_untouched(self, step):
        assert not changed(self.before, clone(step))
        assert torch.equal(step.metrics.sums, self.before["metrics"])
        assert self.random == "as before"
        assert set(self.streams) == {self.stream}


@pytest.fixture
def stand_in(monkeypatch):
    return StandIn(monkeypatch)


def failing_kernel(step, error, gpu=None, norms=("auto", "triton")):
    """After a first step, forwards with one of the `norms` fail, and `gpu`, if given, is dead."""
    whole, calls = step.network.forward, []

    def forward(x):
        calls.append(step.network.norm_state.kernel)
        torch.cuda.set_rng_state("moved on", None)
        if step.network.norm_state.kernel in norms and len(calls) > len(step.passes):
            if gpu is not None:
                gpu.dead = True
            raise error
        return whole(x)

    step.network.forward = forward
    return calls


def triton_errors():
    """One of every class that a launch of the kernel can raise on some machine."""
    errors = [
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        ImportError("No module named 'triton'"),
        FileNotFoundError(2, "No such file or directory: 'ptxas'"),
    ]
    with contextlib.suppress(ImportError):
        from triton.compiler import errors as compiler
        from triton.runtime import errors as runtime

        node = ast.parse("a + b").body[0]
        for name in (
            "CompilationError",
            "CompileTimeAssertionFailure",
            "UnsupportedLanguageConstruct",
        ):
            errors.append(getattr(compiler, name)("a + b", node, "b is not defined"))
        errors.append(runtime.OutOfResources(300_000, 232_448, "shared memory"))
        errors.append(runtime.PTXASError("fatal: unknown target"))
    return errors


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


def names(error):
    return type(error).__name__


def said(recwarn: pytest.WarningsRecorder) -> list[str]:
    """Our warnings. A file or process that an earlier test left open is collected, and warned of,
    at any time.
    """
    return [str(w.message) for w in recwarn.list if not issubclass(w.category, ResourceWarning)]


def test_a_step_is_warmed_up_and_captured(stand_in, recwarn):
    step = stand_in.step()
    forwards = failing_kernel(step, None, norms=())
    replay, how = runner(step, "auto")
    assert how == "CUDA graph"
    assert len(forwards) == (WARM_UP_STEPS + 1) * len(step.passes)
    assert stand_in.captures == 1
    stand_in.assert_untouched(step)
    assert said(recwarn) == []
    assert stand_in.events == [{"blocking": True}] * 2  # the host sleeps while it waits
    first, second = replay.done
    # Each call waits for the replay before the last one.
    for done, other in ((first, second), (second, first)):
        replay()
        done.synchronize.assert_called_once()
        done.record.assert_called_once()
        assert replay.done == [other, done]


def test_off_tries_the_step_and_runs_it_eagerly(stand_in):
    step = stand_in.step()
    forwards = failing_kernel(step, None, norms=())
    assert runner(step, "off") == (step, "eager")
    assert len(forwards) == WARM_UP_STEPS * len(step.passes)
    assert stand_in.captures == 0
    stand_in.assert_untouched(step)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "on", "off"])
@pytest.mark.parametrize("error", triton_errors(), ids=names)
def test_a_kernel_that_fails_gives_way_to_the_framework(stand_in, mode, error, recwarn):
    step = stand_in.step()
    failing_kernel(step, error)
    run, how = runner(step, mode)
    assert how == ("eager" if mode == "off" else "CUDA graph") + ", framework norm"
    assert (run is step) == (mode == "off")
    assert step.network.norm_state.kernel == "framework"
    stand_in.assert_untouched(step)
    (warning,) = said(recwarn)
    assert warning.startswith(f"the Triton norm kernel failed ({type(error).__name__}: ")
    assert warning.endswith("; the framework's batch norm is used instead")
    assert "\n" not in warning
    if hasattr(error, "error_message"):
        assert error.error_message in warning  # not only the source that the compiler quotes
    step()
    assert changed(stand_in.before, clone(step))


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_a_kernel_asked_for_by_name_does_not_give_way(stand_in, mode):
    step = stand_in.step()
    step.network.norm_state.kernel = "triton"
    error = ImportError("No module named 'triton'")
    failing_kernel(step, error)
    with pytest.raises(ImportError) as raised:
        runner(step, mode)
    assert raised.value is error
    assert step.network.norm_state.kernel == "triton"
    stand_in.assert_untouched(step)


def test_the_frameworks_norm_asked_for_by_name_is_said(stand_in):
    step = stand_in.step()
    step.network.norm_state.kernel = "framework"
    failing_kernel(step, RuntimeError("never"))
    assert runner(step, "auto")[1] == "CUDA graph, framework norm"
    assert runner(step, "off")[1] == "eager, framework norm"


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_an_error_that_is_not_the_kernels_is_raised(stand_in, mode, recwarn):
    step, error = stand_in.step(), AssertionError("a bug of ours")
    failing_kernel(step, error, norms=("auto", "framework"))
    with pytest.raises(AssertionError, match="a bug of ours") as raised:
        runner(step, mode)
    assert "the Triton norm kernel failed" in raised.value.__notes__[0]
    assert said(recwarn) == []
    stand_in.assert_untouched(step)


@pytest.mark.parametrize("kernel", ["auto", "framework"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=names)
def test_out_of_memory_in_the_warm_up_is_raised(stand_in, error, kernel):
    step = stand_in.step()
    step.network.norm_state.kernel = kernel
    failing_kernel(step, error, norms=("auto", "framework"))
    with pytest.raises(type(error)) as raised:
        runner(step, "auto")
    assert raised.value is error
    assert step.network.norm_state.kernel == kernel
    stand_in.assert_untouched(step)


def test_an_interruption_leaves_the_step_as_it_was(stand_in):
    step = stand_in.step()
    failing_kernel(step, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        runner(step, "auto")
    stand_in.assert_untouched(step)


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_a_kernel_that_kills_the_device_needs_a_fresh_process(stand_in, mode):
    step = stand_in.step()
    error = RuntimeError(ILLEGAL_ACCESS)
    failing_kernel(step, error, stand_in)
    with pytest.raises(
        FreshProcessNeeded, match=r"norm kernel failed.*illegal memory access"
    ) as raised:
        runner(step, mode)
    assert raised.value.settings == ("run.norm_kernel=framework",)
    assert str(raised.value).endswith("start again with run.norm_kernel=framework resume=auto")
    assert stand_in.streams == [stand_in.stream]


@pytest.mark.parametrize("kernel", ["triton", "framework"])
def test_a_device_that_dies_of_what_was_asked_for_is_that_error(stand_in, kernel):
    step, error = stand_in.step(), RuntimeError(ILLEGAL_ACCESS)
    step.network.norm_state.kernel = kernel
    failing_kernel(step, error, stand_in, norms=(kernel,))
    with pytest.raises(RuntimeError) as raised:
        runner(step, "auto")
    assert raised.value is error


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operation not permitted when stream is capturing"),
        *triton_errors()[-2:],
        *OUT_OF_MEMORY,
    ],
    ids=names,
)
def test_a_failed_capture_leaves_the_step_as_it_was(stand_in, mode, error, recwarn):
    """`auto` goes on eagerly from where it began; this torch forgets the failed capture."""
    step = stand_in.step()
    stand_in.capture_error = error
    if mode == "on" or error in OUT_OF_MEMORY:
        with pytest.raises(type(error)) as raised:
            runner(step, mode)
        assert raised.value is error
    else:
        assert runner(step, mode) == (step, "eager")
        (warning,) = said(recwarn)
        assert warning.startswith("the step could not be captured (")
        assert warning.endswith(", so it runs eagerly")
    assert stand_in.captures == 1
    stand_in.assert_untouched(step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", ["2.11.0+cu130", "2.12.1", "2.13.0", "2.14.0", "2.20.0.dev20270101", "3.0.0"]
)
@pytest.mark.parametrize("kernel", ["auto", "triton", "framework"])
def test_a_torch_that_believes_in_the_capture_needs_a_fresh_process(
    stand_in, monkeypatch, version, kernel
):
    monkeypatch.setattr(torch, "__version__", version)
    step = stand_in.step()
    step.network.norm_state.kernel = kernel
    stand_in.capture_error = RuntimeError("operation failed due to a previous error during capture")
    if version in ("2.11.0+cu130", "2.12.1", "2.13.0"):
        with pytest.raises(
            FreshProcessNeeded, match=r"could not be captured.*previous error"
        ) as raised:
            runner(step, "auto")
        kept = ("run.norm_kernel=framework",) if kernel == "framework" else ()
        assert raised.value.settings == ("run.graph=off", *kept)
    else:
        with pytest.warns(UserWarning, match="could not be captured"):
            runner(step, "auto")
    stand_in.assert_untouched(step)


def test_a_capture_after_a_failed_kernel_asks_for_both(stand_in, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    step = stand_in.step()
    failing_kernel(step, ImportError("No module named 'triton'"))
    stand_in.capture_error = RuntimeError("no")
    with (
        pytest.warns(UserWarning, match="norm kernel"),
        pytest.raises(FreshProcessNeeded) as raised,
    ):
        runner(step, "auto")
    assert raised.value.settings == ("run.graph=off", "run.norm_kernel=framework")


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_capture_that_kills_the_device(stand_in, mode):
    step, error = stand_in.step(), RuntimeError(ILLEGAL_ACCESS)

    @contextlib.contextmanager
    def killing(*_, **__):
        yield
        stand_in.dead = True
        raise error

    with mock.patch.object(torch.cuda, "graph", killing), pytest.raises(RuntimeError) as raised:
        runner(step, mode)
    if mode == "on":
        assert raised.value is error
    else:
        assert isinstance(raised.value, FreshProcessNeeded)
        assert raised.value.settings == ("run.graph=off",)


def test_an_error_that_is_reported_once_more_is_no_death(stand_in):
    step = stand_in.step()
    assert answers(step)
    stand_in.pending = 1
    assert answers(step)
    stand_in.pending = 2
    assert not answers(step)
    stand_in.dead = True
    assert not answers(step)


def test_a_full_device_still_answers(stand_in, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "synchronize", full)
    assert answers(stand_in.step())


# ------------------------------------------------------------------ what capture needs, seen from a CPU


class NoHostSync(TorchDispatchMode):
    """Fails on operators that hand a device value to Python, or whose output shape depends on
    values.
    """

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique",
        "_unique2",
        "allclose",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{func} would wait for the device"
        assert not (
            name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        ), "boolean indexing"
        return func(*args, **(kwargs or {}))


def test_the_watch_for_host_syncs_sees_them():
    for bad in (lambda t: t.item(), lambda t: bool(t), lambda t: t[None][t[None] > 0]):
        with pytest.raises(AssertionError), NoHostSync():
            bad(torch.ones(()))


@pytest.mark.parametrize(
    ("kind", "mix"), [*((k, None) for k in ALL), ("fused", "mixup"), ("pipelined", "cutmix")]
)
def test_the_step_never_asks_the_device_for_a_value(kind, mix):
    step = make(kind, amp="bf16", data={"mix": mix})
    with NoHostSync():
        step()
    assert step.metrics.take(ONE_RANK)["steps"] == 1


@pytest.mark.parametrize("kind", ALL)
def test_every_tensor_of_the_state_and_input_stays_where_it_is(kind):
    step = make(kind)

    def pointers():
        inputs = {k: v for k, v in vars(step.inputs).items() if isinstance(v, torch.Tensor)}
        tensors = step.state() | {f"inputs.{k}": v for k, v in inputs.items()}
        tensors |= {f"grad.{k}": p.grad for k, p in step.network.model.named_parameters()}
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
            assert t.is_contiguous(memory_format=torch.channels_last), (
                f"{where}: {tuple(t.shape)} strides {t.stride()}"
            )

    for name, m in step.network.model.named_modules():
        if isinstance(m, nn.Conv2d) or m in norms(step.network.model):
            m.register_forward_hook(
                lambda m, x, y, n=name: (
                    channels_last(x[0], f"{n} in"),
                    channels_last(y, f"{n} out"),
                    None,
                )[2]
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
    for name, p in step.network.model.named_parameters():
        assert p.grad.stride() == p.stride(), name


def cpu_event(name, shapes=(), parent=None, kernels=()):
    kernels = [SimpleNamespace(name=kernel) for kernel in kernels]
    kind = DeviceType.CPU
    return SimpleNamespace(
        name=name, input_shapes=list(shapes), cpu_parent=parent, kernels=kernels, device_type=kind
    )


def device_event(name):
    kind = DeviceType.CUDA
    return SimpleNamespace(
        name=name, input_shapes=[], cpu_parent=None, kernels=[], device_type=kind
    )


TO = "void cudnn::ops::nchwToNhwcKernel<__half, __half>(...)"
FRO = "void cudnn::ops::nhwcToNchwKernel<__half, __half>(...)"
MAIN = "sm90_xmma_fprop_implicit_gemm"
STEM = ([96, 3, 32, 32], [16, 3, 3, 3])  # input and weight
INNER = ([96, 16, 32, 32], [16, 16, 3, 3])
DEPTHWISE = ([96, 3, 32, 32], [3, 1, 3, 3])
TO_THREE = ([96, 16, 32, 32], [3, 16, 3, 3])


@pytest.mark.parametrize("shapes", [STEM, INNER, DEPTHWISE, TO_THREE])
@pytest.mark.parametrize("forward", [True, False])
def test_only_the_stem_may_be_transposed(shapes, forward):
    if forward:
        outer = cpu_event("aten::conv2d", [*shapes, [16]])
        inner = cpu_event("aten::cudnn_convolution", [*shapes, [], []], outer, [TO, MAIN, FRO])
    else:
        outer = cpu_event("autograd::engine::evaluate_function: ConvolutionBackward0")
        gradient = [96, shapes[1][0], 32, 32]
        given = [gradient, *shapes, []]
        inner = cpu_event("aten::convolution_backward", given, outer, [TO, MAIN, FRO])
    found = layout_copies([outer, inner, *map(device_event, (TO, MAIN, FRO))])
    if shapes == STEM:
        assert found == []
    else:
        by = f"launched by {inner.name} on {inner.input_shapes}"
        assert found == [f"{TO} {by}", f"{FRO} {by}"]


def test_what_the_stem_calls_may_transpose_and_nothing_else():
    stem = cpu_event("aten::conv2d", STEM)
    inside = cpu_event("aten::copy_", [[96, 3, 32, 32]], stem, [TO])
    beside = cpu_event("aten::copy_", [[96, 3, 32, 32]], None, [TO])
    assert layout_copies([stem, inside, device_event(TO)]) == []
    (found,) = layout_copies([stem, inside, beside, device_event(TO), device_event(TO)])
    assert found == f"{TO} launched by aten::copy_ on [[96, 3, 32, 32]]"
    three_out = cpu_event("aten::convolution_backward", [[96, 3, 32, 32], *TO_THREE], None, [TO])
    assert len(layout_copies([three_out])) == 1


def test_a_transposition_that_nobody_launched_is_an_offence():
    stem = cpu_event("aten::cudnn_convolution", STEM, None, [TO])
    known = [stem, device_event(TO), device_event(MAIN)]
    assert layout_copies(known) == []
    assert layout_copies([*known, device_event(TO)]) == [
        f"{TO} launched by no operator of the profile"
    ]
    assert layout_copies([device_event(FRO)]) == [f"{FRO} launched by no operator of the profile"]


def test_convolutions_are_recognised_in_a_real_profile():
    """Names, shapes and parents as this torch's profiler gives them; kernels are added by hand."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    stem, inner = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
        inner(stem(x)).sum().backward()
    launched = (
        "aten::mkldnn_convolution",
        "aten::_slow_conv2d_forward",
        "aten::convolution_backward",
    )
    events = [e for e in trace.events() if e.name in launched]
    for event in events:
        event.append_kernel(TO, 0, 1)
    assert len(events) == 4
    found = layout_copies(trace.events())
    assert len(found) == 2  # the inner convolution's, forward and backward
    assert all("[2, 4, 6, 6]" in line for line in found)


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_a_step_can_be_watched_by_hooks_on_the_model_s_input(kind, stem):
    """FlopCounterMode's hooks refuse a leaf as input while torch.autograd.grad runs; it has counted
    every pass here.
    """
    from torch.utils.flop_counter import FlopCounterMode

    step = make(kind)
    if not stem:
        step.network.stem.__class__ = nn.Conv2d
        step.network.stem = None
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("kind", ALL)
def test_rows_are_put_together_without_changing_their_layout(kind):
    """Five-dimensional `cat` and `flatten` of channels_last rows would transpose them, and every
    later kernel would pay.
    """
    step, layouts = make(kind, data={"mix": "mixup"} if kind != "advprop" else {}), []

    def watched(images, out, normalise=step.network.normalise):
        layouts.append(images.is_contiguous(memory_format=torch.channels_last))
        normalise(images, out)

    step.network.normalise = watched
    if step.attack is not None:
        advance = step.attack.advance

        def watched_advance(current, clean, gradient, keys):
            layouts.append(gradient.is_contiguous(memory_format=torch.channels_last))
            return advance(current, clean, gradient, keys)

        step.attack.advance = watched_advance
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
    step.metrics.take(ONE_RANK)
    before = clone(step)
    step()
    assert not changed(before, clone(step), "carry")
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    assert metrics["nonfinite_clean"] == step.inputs.n_clean
    assert torch.isfinite(step.adv.rows.images_255).all()
    step.network.model.fc.bias.data[0] = 0
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (0, 0)
    assert "model.fc.weight" in changed(before, clone(step))
    assert all(torch.isfinite(v).all() for v in step.state().values())


@pytest.mark.parametrize("when", [0, 2])
def test_fp16_overflow_halves_the_scale_and_changes_nothing_else(when):
    step = make("fused", amp="fp16")
    for _ in range(when):
        step()
    step.update.scale.fill_(2.0**60)
    before = clone(step)
    step()
    assert changed(before, clone(step), "carry", "growth") == {"scale"}
    assert (step.update.scale, step.update.growth) == (2.0**59, 0)
    step.update.scale.fill_(2.0**10)
    step()
    assert "model.fc.weight" in changed(before, clone(step))


# ------------------------------------------------------------------ on a GPU

gpu = pytest.mark.gpu


@pytest.fixture
def strict_sync(monkeypatch):
    """Any hidden host synchronisation raises; the same kernels run whether captured or not. Needs a
    GPU.
    """
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
    step.update.scale.fill_(2.0**60)
    before = clone(step)
    strict_sync(replay)
    assert changed(before, clone(step), "carry") == {"scale"}
    assert step.update.scale == 2.0**59


@gpu
def test_every_replay_draws_its_own_dropout(strict_sync):
    step = make("vanilla", device="cuda", size=32)
    step.network.model.fc = nn.Sequential(nn.Dropout(0.5), step.network.model.fc)
    replay, _ = runner(step, "on")
    losses = []
    for _ in range(3):
        step.inputs.lr.fill_(0)
        replay()
        losses.append(step.metrics.take(ONE_RANK)["loss_clean"])
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
    with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
        step()
        torch.cuda.synchronize()
    assert any(event.kernels for event in trace.events())
    assert not layout_copies(trace.events())


@pytest.mark.slow
@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-4), ("bf16", 0.05)])
def test_a_compiled_step_is_whole_graphs_and_equals_the_eager_one(amp, tolerance):
    """Traced by Dynamo and AOTAutograd as `run.compile` does, without the code generator, which
    takes minutes here.

    With AMP the compiled model reads the half-precision copies of the weights too.
    """
    from torch._dynamo.utils import counters

    # Noise, not an attack: in bfloat16 rounding turns signs of small gradients.
    noise = {"name": "noise", "schedule": "fused"} if amp != "off" else {}
    eager, compiled = (make("fused", amp=amp, method=noise) for _ in range(2))
    norm_state(compiled.network.model).kernel = "framework"
    compiled.network.forward = torch.compile(compiled.network.model, backend="aot_eager")
    counters.clear()
    for seed in range(3):
        for step in (eager, compiled):
            feed(step, seed)
            step()
    assert counters["stats"]["unique_graphs"] == 2  # one per pass
    assert not counters["graph_break"]
    for name, value in eager.state().items():
        assert torch.allclose(
            value.double(), compiled.state()[name].double(), rtol=tolerance, atol=tolerance / 100
        ), name
