"""The DALI back end: the images of the others, exactness where it is promised, streams, damage."""

import contextlib
import ctypes
import gc
import io
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="pip install -e '.[dali]'")

from nvidia.dali import Pipeline, fn
from nvidia.dali.types import _raw_cuda_stream_ptr

from pipelines import DamagedData, PlanSpec, draw_epoch, eval_plan, loader_options, open_loader
from pipelines.plan import PADDING
from pipelines.sources.folder import FolderStore
from pipelines.store import JPG, RAW, Store

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


class MemoryStore(Store):
    """Images held in memory, so that each test says what it decodes."""

    path, classes = "memory.beton", None

    def __init__(self, images: list[np.ndarray], modes: list[int], **save) -> None:
        self.heights, self.widths = np.array([image.shape[:2] for image in images], np.int32).T
        self.labels = np.arange(len(images), dtype=np.int64) % 7
        self.modes = np.array(modes, np.uint8)
        self.images = images
        self.data = [self.encode(i, m, save) for i, m in zip(images, modes, strict=True)]
        self.sizes = np.array([d.size for d in self.data])

    @staticmethod
    def encode(image: np.ndarray, mode: int, save: dict) -> np.ndarray:
        if mode == RAW:
            return image.reshape(-1)
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", **({"quality": 92} | save))
        return np.frombuffer(out.getvalue(), np.uint8)

    def read(self, index: int) -> np.ndarray:
        return self.data[index]

    def _content_crc32(self) -> int:
        return zlib.crc32(b"".join(self.data))

    def close(self) -> None:
        pass


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """Something with smooth regions, edges and texture."""
    rng = np.random.default_rng(seed)
    layers = []
    for cells, strength in ((4, 90), (24, 30), (96, 8)):
        noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        layers.append(strength / 128 * (np.asarray(layer, float) - 128))
    return (128 + sum(layers)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photos() -> MemoryStore:
    sides = [(375, 500), (500, 375), (200, 180), (333, 500), (120, 400), (480, 640)]
    return MemoryStore([photo(i, *sides[i % 6]) for i in range(24)], [JPG] * 24)


@pytest.fixture(scope="module")
def cifar() -> MemoryStore:
    rng = np.random.default_rng(0)
    return MemoryStore([rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(50)], [RAW] * 50)


def spec_of(*args, **fields) -> PlanSpec:
    """DALI shows one filter only."""
    return PlanSpec(*args, filter="bilinear", **fields)


def run(loader, plan, start_step=0) -> torch.Tensor:
    """Every batch of a plan: images (rows, 3, H, W) on the CPU."""
    steps = []
    images = [torch.empty(0, 3, plan.spec.size, plan.spec.size, dtype=torch.uint8)]
    for batch in loader.load(plan, start_step):
        steps.append(batch.step)
        images.append(batch.images.cpu().clone())
    assert steps == list(range(start_step, len(plan)))
    return torch.cat(images)


def assert_agree(a: torch.Tensor, b: torch.Tensor, mean: float = 2, most: int = 12) -> None:
    """Grey levels: `mean` on average, `most` for 99% of the values."""
    difference = (a.int() - b.int()).abs()
    assert difference.float().mean() <= mean
    assert (difference <= most).float().mean() >= 0.99


FFCV = pytest.param("ffcv", marks=pytest.mark.skipif(find_spec("ffcv") is None, reason="no FFCV"))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("twin", ["reference", FFCV])
def test_same_images_as_the_other_back_ends(photos, device, twin):
    """Decoders agree exactly on a CPU, filters but at the borders of windows that shrink."""
    spec = spec_of(3, 224, 8, 4, clean_group_rows=4, adv_group_rows=2)
    plan = draw_epoch(spec, photos.heights, photos.widths, 1)
    images = run(open_loader("dali", photos, size=224, device=device), plan)
    expected = run(open_loader(twin, photos, size=224), plan)
    assert images.shape == (24, 3, 224, 224)
    assert images.dtype == torch.uint8
    assert_agree(images, expected, 0.5, 2)
    # Row by row: each shows the sample that the plan names, and no other comes as near.
    for row, image in enumerate(images):
        distances = (expected.int() - image.int()).abs().float().mean((1, 2, 3))
        assert distances.argmin() == row
    mirrored = replace(plan, flip=~plan.flip)
    flipped = run(open_loader("dali", photos, size=224, device=device), mirrored)
    assert_agree(flipped.flip(-1), images, 0.1, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_are_channels_last_on_the_device_without_a_copy(photos, device):
    plan = draw_epoch(spec_of(3, 64, 8, clean_group_rows=8), photos.heights, photos.widths, 0)
    for batch in open_loader("dali", photos, size=64, device=device).load(plan):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_a_window_of_the_output_size_is_the_decoded_region(photos, device):
    """No resize: what is left is the decoder, exact on a CPU and within a rounding on a GPU."""
    spec = spec_of(5, 96, 8, clean_group_rows=8, crop="pad", pad=40)
    plan = draw_epoch(spec, photos.heights, photos.widths, 0)
    images = run(open_loader("dali", photos, size=96, device=device), plan)
    window = plan.window.reshape(-1, 4).astype(int)
    assert (window[:, :2] < 0).any()
    assert (window[:, 0] + 96 > photos.heights[plan.index.reshape(-1)]).any()
    rows = zip(images, plan.index.reshape(-1), window, plan.flip.reshape(-1), strict=True)
    for got, index, (top, left, *_), flip in rows:
        whole = np.asarray(Image.open(io.BytesIO(photos.data[index].tobytes())).convert("RGB"))
        padded = np.pad(whole, ((40, 40), (40, 40), (0, 0)))[top + 40 :, left + 40 :][:96, :96]
        expected = torch.from_numpy(padded[:, ::-1].copy() if flip else padded).permute(2, 0, 1)
        if device == "cpu":
            assert torch.equal(got, expected)
        else:
            assert_agree(got, expected, 1, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_raw_cifar_is_exact(cifar, device):
    plan = draw_epoch(spec_of(1, 32, 16, 4, 8, 2, crop="pad"), cifar.heights, cifar.widths, 0)
    images = run(open_loader("dali", cifar, size=32, device=device), plan)
    windows = plan.window.reshape(-1, 4).astype(int)
    rows = zip(images, plan.index.reshape(-1), windows, plan.flip.reshape(-1), strict=True)
    for got, index, (top, left, *_), flip in rows:
        padded = np.pad(cifar.images[index], ((4, 4), (4, 4), (0, 0)))
        expected = padded[top + 4 :, left + 4 :][:32, :32]
        assert np.array_equal(got.permute(1, 2, 0), expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["photos", "cifar"])
def test_validation_is_exact_with_a_partial_last_batch(name, device, request):
    store = request.getfixturevalue(name)
    size, resize = (224, 256) if name == "photos" else (32, 32)
    plan = eval_plan(store.heights, store.widths, size=size, resize=resize, batch=9)
    n = len(store)
    missing = plan.index.size - n
    assert missing > 0
    assert plan.look_up(store.labels, -1).ravel().tolist() == store.labels.tolist() + [-1] * missing
    images = run(open_loader("dali", store, size=size, device=device), plan)
    assert len(images) == n + missing
    assert not images[n:].any()
    expected = run(open_loader("reference", store, size=size), plan)
    mean, most = (0.5, 1) if name == "photos" else (0, 0)
    assert_agree(images, expected, mean, most)
    # What a rank may get as its last slice.
    empty = replace(plan, index=np.full_like(plan.index, PADDING))
    assert not run(open_loader("dali", store, size=size, device=device), empty).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["photos", "cifar"])
def test_resume_and_thread_count_change_nothing(name, device, request):
    store = request.getfixturevalue(name)
    plan = draw_epoch(spec_of(2, 32, 4, clean_group_rows=4), store.heights, store.widths, 3)
    one = open_loader("dali", store, size=32, device=device, threads=1, prefetch=1)
    whole = run(one, plan)
    assert len(whole) == 4 * len(plan)
    loader = open_loader("dali", store, size=32, device=device, threads=2)
    for start in (0, 2, len(plan) - 1, len(plan)):
        assert torch.equal(run(loader, plan, start), whole[4 * start :])
    loader.close()


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(0, 80, 120)
    plain = MemoryStore([image], [JPG])
    turned = MemoryStore([image], [JPG], exif=exif)
    plan = eval_plan(plain.heights, plain.widths, size=64, resize=64, batch=1)
    assert turned.sizes[0] > plain.sizes[0]
    expected = run(open_loader("dali", plain, size=64), plan)
    assert torch.equal(run(open_loader("dali", turned, size=64), plan), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_jpeg_that_does_not_decode_names_file_and_index(photos, device):
    broken = MemoryStore(photos.images[:8], [JPG] * 8)
    broken.data[5] = np.zeros_like(broken.data[5])
    plan = eval_plan(broken.heights, broken.widths, size=64, resize=64, batch=2)
    steps: list[int] = []
    batches = open_loader("dali", broken, size=64, device=device).load(plan)
    with pytest.raises(DamagedData, match=r"memory\.beton: sample 5: "):
        steps.extend(batch.step for batch in batches)
    assert steps == [0, 1]
    # Nothing is left behind.
    assert len(run(open_loader("dali", photos, size=64, device=device), plan)) == 8


def test_damage_found_by_the_store_and_in_a_folder(photos, tmp_path):
    class Checked(MemoryStore):
        def read(self, index):
            if index == 3:
                raise DamagedData("sample 3: wrong checksum")
            return super().read(index)

    store = Checked(photos.images[:6], [JPG] * 6)
    plan = eval_plan(store.heights, store.widths, size=64, resize=64, batch=2)
    with pytest.raises(DamagedData, match=r"^sample 3: wrong checksum$"):
        run(open_loader("dali", store, size=64), plan)
    for i in range(3):
        (tmp_path / "k").mkdir(exist_ok=True)
        (tmp_path / "k" / f"{i}.JPEG").write_bytes(photos.data[i].tobytes())
    folder = FolderStore(tmp_path)
    plan = eval_plan(folder.heights, folder.widths, size=64, resize=64, batch=2)
    from_folder = run(open_loader("dali", folder, size=64), plan)
    from_memory = run(open_loader("dali", photos, size=64), plan)
    assert torch.equal(from_folder[:3], from_memory[:3])
    header = photos.data[1].tobytes()
    header = header[: header.index(b"\xff\xda") + 14]  # whole, but no pixels follow
    (tmp_path / "k" / "1.JPEG").write_bytes(header)
    with pytest.raises(DamagedData, match=r"k/1\.JPEG: sample 1: "):
        run(open_loader("dali", FolderStore(tmp_path), size=64), plan)


def test_where_every_row_decodes_alone_no_sample_is_blamed(photos, monkeypatch):
    """An error of another sort, of memory say, goes through as it is."""
    loader = open_loader("dali", photos, size=64)
    plan = eval_plan(photos.heights, photos.widths, size=64, resize=64, batch=2)
    decoded = loader._decoded

    def short_of_memory(asked, start_step):
        if asked.index.shape[1] == 2:
            raise RuntimeError("out of memory")
        yield from decoded(asked, start_step)

    monkeypatch.setattr(loader, "_decoded", short_of_memory)
    with pytest.raises(RuntimeError, match=r"^out of memory$") as raised:
        run(loader, plan)
    assert not isinstance(raised.value, DamagedData)


def test_mistakes_are_errors_that_help(photos):
    assert loader_options("dali") == {"threads", "prefetch", "hw_decoder_load"}
    area = draw_epoch(PlanSpec(0, 64, 4, clean_group_rows=4), photos.heights, photos.widths, 0)
    with pytest.raises(
        ValueError, match="filter = 'area': DaliLoader shows only bilinear, bicubic"
    ):
        open_loader("dali", photos, size=64).load(area)
    mixed = MemoryStore(photos.images[:3], [JPG, RAW, JPG])
    with pytest.raises(ValueError, match=r"raw samples \(1\) with JPEG ones \(2\).*fap-convert"):
        open_loader("dali", mixed, size=64)
    for option in ({"threads": 0}, {"prefetch": 0}, {"hw_decoder_load": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} = "):
            open_loader("dali", photos, size=64, **option)
    plan = eval_plan(photos.heights, photos.widths, size=64, resize=64, batch=2)
    with pytest.raises(ValueError, match="size = 32"):
        next(open_loader("dali", photos, size=32).load(plan))


@pytest.mark.slow
def test_leaving_early_leaks_neither_threads_nor_memory(photos):
    plan = draw_epoch(spec_of(0, 224, 8, clean_group_rows=8), photos.heights, photos.widths, 0)
    loader = open_loader("dali", photos, size=224, threads=2)

    def leave() -> tuple[int, int]:
        for batch in loader.load(plan):
            assert batch.step == 0
            break
        gc.collect()
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        n_threads = len(os.listdir("/proc/self/task"))
        return n_threads, resident_pages * os.sysconf("SC_PAGE_SIZE")

    threads, memory = [leave() for _ in range(8)][-1]
    later = [leave() for _ in range(12)][-1]
    assert later[0] == threads
    assert later[1] - memory < 24e6  # a leaked pipeline holds 5 MB, twelve would be 60


@pytest.mark.slow
def test_missing_dali_names_the_install_command():
    code = """
import sys
sys.modules["nvidia.dali"] = None
import pipelines
back_ends = {"ffcv", "numba", "pipelines.loaders.dali", "pipelines.loaders.ffcv"}
assert not back_ends & set(sys.modules)
try:
    pipelines.open_loader("dali", None, size=8)
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "pip install -e '.[dali]'" in told
    assert ".[dali12]" in told


class DefaultStream:
    """torch's default stream as DALI sees it; a real one needs a GPU."""

    cuda_stream = 0
    __cuda_stream__ = torch.cuda.Stream.__cuda_stream__


def test_torchs_default_stream_is_no_missing_stream_to_dali():
    """Its handle is 0, which is false; a None would end the order of decoding and training."""
    assert DefaultStream().__cuda_stream__()[1] == 0
    pointer = _raw_cuda_stream_ptr(DefaultStream())
    assert isinstance(pointer, ctypes.c_void_p)
    assert not pointer.value
    assert _raw_cuda_stream_ptr(None) is None
    side = DefaultStream()
    side.cuda_stream = 0x55D0
    assert _raw_cuda_stream_ptr(side).value == 0x55D0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that of a missing driver")
def test_dalis_binding_looks_the_default_stream_up():
    """Without a driver that fails; without a stream it does not: so 0 is one to the binding."""
    pipeline = Pipeline(1, 1, None, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        pipeline.set_outputs(fn.external_source(source=lambda: [np.zeros(1, np.uint8)], batch=True))
    pipeline.build()
    pipeline.run(None)
    with pytest.raises(RuntimeError, match="CUDA runtime API error"):
        pipeline.run(DefaultStream())


def test_the_stream_is_the_current_one_of_the_loaders_device(photos, monkeypatch):
    """The handle 0 means the default stream of whatever device is current."""
    devices, streams = [0], []

    @contextlib.contextmanager
    def device(chosen):
        devices.append(chosen.index)
        yield
        devices.pop()

    class Recorder:
        def run(self, stream):
            streams.append(stream)

    loader = open_loader("dali", photos, size=64)
    loader._run(Recorder())
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: f"current of {devices[-1]}")
    loader.device = torch.device("cuda", 1)
    loader._run(Recorder())
    assert streams == [None, "current of 1"]
    assert devices == [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("stream", ["default", "side"])  # training runs on the default one
def test_images_are_ordered_on_the_current_stream(photos, stream):
    """Batches read on a stream that is kept busy equal those read after a full synchronisation."""
    plan = draw_epoch(spec_of(0, 224, 8, clean_group_rows=8), photos.heights, photos.widths, 0)
    loader = open_loader("dali", photos, size=224, device="cuda")
    expected = run(loader, plan)
    got = []
    chosen = torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()
    assert (chosen.cuda_stream == 0) == (stream == "default")
    with torch.cuda.stream(chosen):
        for batch in loader.load(plan):
            torch.cuda._sleep(20_000_000)
            # Runs long after the host has asked for the next batch.
            got.append(batch.images.clone())
    torch.cuda.synchronize()
    assert torch.equal(torch.cat(got).cpu(), expected)
