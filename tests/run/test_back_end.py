"""The loader of a run: which back end `auto` is, what decodes, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from fap.config import Config, load_config
from fap.run.back_end import described, loader_name, settle
from fap.run.data import open_loader
from fap.run.epoch import plan_spec
from pipelines import loaders, open_store
from pipelines.back_ends import BACK_ENDS
from pipelines.loaders.base import Loader
from pipelines.loaders.cpu import CpuLoader
from tests.pipelines.many_fields import planes_columns, write_fields
from tests.run import runs

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # to have it named needs no GPU


class Dali(Loader):
    """What the registry has, without DALI: it shows no planes and no mixed stores."""

    filters = ("bilinear",)

    @classmethod
    def refusal(cls, store: pipelines.Store) -> str:
        return super().refusal(store) or ("mixed" if len(set(store.modes.tolist())) > 1 else "")


class Cpu(CpuLoader):
    """Any of those that decode on CPU cores."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The back ends that import; a test may take some away."""
    found = set(BACK_ENDS)

    def loader_class(name: str) -> type[Loader]:
        if name not in found:
            raise ImportError(f"pipeline = {name!r} needs a package that is missing")
        return Dali if name == "dali" else Cpu

    monkeypatch.setattr(loaders, "_loader_class", loader_class)
    return found


@pytest.fixture
def jpegs(jpeg_beton: Path) -> pipelines.Store:
    return open_store(jpeg_beton)


def settled(
    stores: Sequence[pipelines.Store], device: torch.device, *words: str
) -> tuple[str, str | None]:
    """data.pipeline and data.decode."""
    config = settle(load_config(None, words), stores, device)
    return config.data.pipeline, config.data.decode


def test_auto_is_the_best_that_is_installed(installed: set[str], jpegs: pipelines.Store) -> None:
    assert load_config().data.pipeline == "auto"
    for best in ("dali", "ffcv", "turbojpeg", "reference"):
        decode = "gpu" if best == "dali" else "cpu"
        assert settled([jpegs], CUDA) == (best, decode)
        on_cpu = "ffcv" if best == "dali" else best
        assert settled([jpegs], CPU) == (on_cpu, "cpu")
        installed.remove(best)
    with pytest.raises(ValueError, match="no back end can show these data"):
        settled([jpegs], CPU)


def test_a_named_back_end_is_taken_or_missed(installed: set[str], jpegs: pipelines.Store) -> None:
    installed.remove("turbojpeg")
    for device in (CPU, CUDA):
        assert settled([jpegs], device, "data.pipeline=ffcv") == ("ffcv", "cpu")
        assert settled([jpegs], device, "data.pipeline=turbojpeg") == ("turbojpeg", "cpu")
    with pytest.raises(ImportError, match="'turbojpeg' needs a package that is missing"):
        pipelines.open_loader("turbojpeg", jpegs, size=32)


def test_auto_shows_the_filter_and_the_data(
    installed: set[str], jpegs: pipelines.Store, mixed_beton: Path, photos: list, tmp_path: Path
) -> None:
    assert settled([jpegs], CUDA, "data.filter=area") == ("ffcv", "cpu")
    assert settled([jpegs], CUDA, "data.filter=bilinear") == ("dali", "gpu")
    planes = write_fields(tmp_path / "planes.beton", planes_columns(photos[:3], [0, 1, 2]))
    for path in (mixed_beton, planes):
        other = open_store(path)
        assert settled([jpegs, other], CUDA) == ("ffcv", "cpu")
        assert settled([other, jpegs], CPU) == ("ffcv", "cpu")


def test_what_auto_means_is_in_the_filter(installed: set[str], jpegs: pipelines.Store) -> None:
    for device, shown in ((CPU, "area"), (CUDA, "bilinear")):
        config = settle(load_config(), [jpegs], device)
        assert config.data.shown_filter == shown
        assert plan_spec(config).filter == shown


@pytest.mark.parametrize("pipeline", ["ffcv", "turbojpeg"])
def test_the_gpu_decodes_for_a_cpu_pipeline(
    pipeline: str, installed: set[str], jpegs: pipelines.Store
) -> None:
    named = f"data.pipeline={pipeline}"
    bilinear = "data.filter=bilinear"
    config = settle(load_config(None, [named, "data.decode=gpu"]), [jpegs], CUDA)
    assert (config.data.pipeline, config.data.decode) == (pipeline, "gpu")
    assert loader_name(config.data) == "dali"
    assert config.data.shown_filter == "bilinear"
    assert settled([jpegs], CUDA, named, bilinear) == (pipeline, "cpu")  # unset
    assert settled([jpegs], CUDA, named, bilinear, "data.decode=auto") == (pipeline, "gpu")
    assert settled([jpegs], CUDA, named, "data.decode=auto") == (pipeline, "cpu")  # area
    assert settled([jpegs], CPU, named, bilinear, "data.decode=auto") == (pipeline, "cpu")
    assert settled([jpegs], CUDA, "data.decode=gpu") == ("dali", "gpu")
    assert settled([jpegs], CUDA, "data.decode=cpu") == ("ffcv", "cpu")
    installed.remove("dali")
    assert settled([jpegs], CUDA, named, bilinear, "data.decode=auto") == (pipeline, "cpu")
    with pytest.raises(ImportError, match="'dali' needs a package that is missing"):
        settled([jpegs], CUDA, named, "data.decode=gpu")


def test_the_gpu_decodes_jpegs_only(
    installed: set[str], jpegs: pipelines.Store, raw_beton: Path, photos: list, tmp_path: Path
) -> None:
    planes = write_fields(tmp_path / "planes.beton", planes_columns(photos[:3], [0, 1, 2]))
    for path in (raw_beton, planes):
        other = open_store(path)
        with pytest.raises(ValueError, match=f"data.decode = 'gpu': {path} holds samples that are"):
            settled([jpegs, other], CUDA, "data.pipeline=ffcv", "data.decode=gpu")
        words = ("data.pipeline=ffcv", "data.decode=auto", "data.filter=bilinear")
        assert settled([jpegs, other], CUDA, *words) == ("ffcv", "cpu")


def test_without_a_gpu_the_option_says_so(installed: set[str], jpegs: pipelines.Store) -> None:
    reason = "run.device is not a GPU"
    if not torch.cuda.is_available():
        reason = "this machine has no GPU that torch can use"
    for pipeline in ("auto", "ffcv", "dali"):
        with pytest.raises(ValueError, match=f"data.decode = 'gpu': {reason}; must be 'cpu'"):
            settled([jpegs], CPU, f"data.pipeline={pipeline}", "data.decode=gpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.pipeline=reference", "data.decode=gpu"], "data.decode = 'gpu' with .*'reference'"),
        (["data.pipeline=memory", "data.decode=gpu"], "data.decode = 'gpu' with .*'memory'"),
        (["data.decode=gpu", "data.filter=area"], "data.filter = 'area' with data.decode = 'gpu'"),
        (["data.pipeline=nothing"], "data.pipeline.* must be 'auto', 'ffcv'"),
        (["data.decode=nvjpeg"], "data.decode"),
    ],
    ids=str,
)
def test_combinations_without_meaning(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, words)


def test_dali_decodes_where_the_run_is(installed: set[str], jpegs: pipelines.Store) -> None:
    dali = "data.pipeline=dali"
    assert settled([jpegs], CPU, dali) == settled([jpegs], CPU, dali, "data.decode=cpu")
    assert settled([jpegs], CUDA, dali, "data.decode=auto") == ("dali", "gpu")
    with pytest.raises(ValueError, match=r"data\.decode = 'cpu' with .* = 'dali'"):
        settled([jpegs], CUDA, dali, "data.decode=cpu")


def test_the_start_says_which_it_is(installed: set[str], jpegs: pipelines.Store) -> None:
    def said(device: torch.device, *words: str) -> str:
        asked: Config = load_config(None, words)
        return described(asked.data, settle(asked, [jpegs], device).data)

    assert said(CPU) == "loader     ffcv (data.pipeline = auto), decoding on CPU cores"
    assert said(CUDA) == "loader     dali (data.pipeline = auto), decoding on the GPU"
    words = ("data.pipeline=ffcv", "data.decode=gpu")
    assert said(CUDA, *words) == "loader     ffcv, decoding on the GPU, by dali"


@pytest.mark.slow
def test_a_run_by_auto_and_its_resume(
    tiny_beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is saved is what `auto` came to; another one later would be another run."""
    device = ["run.device=cpu", "data.pipeline=auto"]
    folder, _ = runs.run(tiny_beton, tmp_path, *device, "run.max_steps=10")
    best = pipelines.best_loader([], gpu=False)
    assert f"loader     {best} (data.pipeline = auto)" in capsys.readouterr().out
    named = [f"data.pipeline={best}", "run.device=cpu", "resume=auto"]
    runs.run(tiny_beton, tmp_path, *named, "run.max_steps=12")
    runs.run(tiny_beton, tmp_path, *device, "resume=auto", "run.max_steps=14")
    assert runs.steps_recorded(folder)[-1]["step"] == 14

    def other(*_: object, **__: object) -> str:
        return "reference"

    monkeypatch.setattr(pipelines, "best_loader", other)
    with pytest.raises(ValueError, match=f"data.pipeline: '{best}', now 'reference'"):
        runs.run(tiny_beton, tmp_path, *device, "resume=auto")


def test_imports_without_a_library_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV's decoder is there, and what it is linked with is not: that is an OSError."""

    def broken(name: str) -> type[Loader]:
        raise OSError("libopencv_core.so.406: cannot open shared object file")

    monkeypatch.setattr(loaders, "_loader_class", broken)
    assert not pipelines.imports("ffcv")
    assert not any(pipelines.imports(name) for name in BACK_ENDS)


@pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs DALI")
@pytest.mark.parametrize(("decode", "name"), [("gpu", "dali"), ("cpu", "ffcv")])
def test_the_decoder_gets_the_same_store_and_its_own_options(
    decode: str, name: str, jpegs: pipelines.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def opened(*arguments: object, **options: object) -> None:
        seen.append((*arguments, options))

    monkeypatch.setattr(pipelines, "open_loader", opened)
    words = ["data.pipeline=ffcv", f"data.decode={decode}", "data.threads=3"]
    words += ["data.hw_decoder_load=0.5", "data.prefetch=2", "data.size=64"]
    open_loader(load_config(None, words), jpegs, CUDA)
    options = {"size": 64, "device": CUDA, "threads": 3, "prefetch": 2}
    if decode == "gpu":
        options["hw_decoder_load"] = 0.5
    assert seen == [(name, jpegs, options)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs DALI")
def test_a_run_of_ffcv_that_the_gpu_decodes_for(
    jpeg_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.pipeline=ffcv", "data.decode=gpu", "data.crop=random_resized", "run.device=cuda"]
    folder, _ = runs.run(jpeg_beton, tmp_path, *words, "model.num_classes=4", "run.max_steps=3")
    assert "loader     ffcv, decoding on the GPU, by dali" in capsys.readouterr().out
    assert runs.steps_recorded(folder)[-1]["step"] == 3
