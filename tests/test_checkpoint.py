"""Checkpoints survive crashes and full disks, and damage never goes unnoticed."""

import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor

from fap.checkpoint import Checkpoints, DamagedCheckpoint, load, load_model, save
from fap.cli.export import main
from fap.config import make_config
from fap.models import build
from fap.norm import norms

META = {"config": {"model": "tiny", "lr": 1e-4}, "epoch": 3, "step": 77, "note": '"crc32":"deadbeef"'}


def awkward() -> dict[str, Tensor]:
    """Everything a trainer may hand over: views of one storage, layouts, dtypes, empty and 0-dim tensors."""
    flat = torch.randn(24)
    return {
        "flat.a": flat[:12].view(3, 4),
        "flat.b": flat[12:],
        "transposed": flat[:12].view(3, 4).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(4),
        "lr": torch.tensor(0.1),
        "count": torch.tensor(2**40),
        "rng": torch.get_rng_state(),
        "bf16": torch.randn(5).bfloat16(),
        "fp16": torch.randn(5).half(),
        "fp64": torch.randn(5, dtype=torch.float64),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "leaf": torch.randn(3, requires_grad=True),
    }


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    tensors = awkward()
    save(tmp_path / "a.safetensors", tensors, META)
    again, meta = load(tmp_path / "a.safetensors")
    assert meta == META
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].is_contiguous()
        assert torch.allclose(again[name], tensor, rtol=0, atol=0, equal_nan=True), name
    assert os.listdir(tmp_path) == ["a.safetensors"]
    # Any safetensors reader opens it, and what is loaded may be written to.
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == tensors.keys()
    again["flat.a"].add_(1)


def test_every_truncation_and_extension_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"w": torch.randn(7), "b": torch.randn(3)}, META)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors: truncated"):
            load(path)
    for tail in (b"\0", whole):
        path.write_bytes(whole + tail)
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors: wrong checksum"):
            load(path)


def test_every_bit_flip_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"w": torch.randn(5), "v": torch.randn(5)}, {"step": 7})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors"):
            load(path)


def test_foreign_and_garbled_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(DamagedCheckpoint, match="no checkpoint of this program"):
        load(path)
    safetensors.torch.save_file({"w": torch.ones(3)}, path, {"crc32": "0"})
    with pytest.raises(DamagedCheckpoint):
        load(path)
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(DamagedCheckpoint):
        load(path)
    rng = random.Random(0)
    nested = b'"crc32":"00000000"' + b"[" * 100_000  # JSON that overflows a naive parser
    for content in (b"", b"\0" * 100, len(nested).to_bytes(8, "little") + nested, rng.randbytes(5_000)):
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpoint):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_a_false_header_with_a_right_checksum_is_damage(tmp_path: Path) -> None:
    """The checksum is no signature: what passes it by design of an attacker must still not crash."""
    for text in (b"{%s}", b'{"__metadata__":{%s}}', b'{"w":1,%s}', b"[{%s}]", b'{"__metadata__":{"meta":"{",%s}}'):
        header = text % b'"crc32":"00000000"'
        blob = len(header).to_bytes(8, "little") + header
        (tmp_path / "a").write_bytes(blob.replace(b"00000000", b"%08x" % zlib.crc32(blob), 1))
        with pytest.raises(DamagedCheckpoint):
            load(tmp_path / "a")


def test_keeps_the_last_k_and_cleans_up(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "run", keep=2)
    assert kept.newest() is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".step_00000009.safetensors.tmp").write_bytes(b"stale")
    (tmp_path / "run" / "step_of_mine.safetensors").write_bytes(b"not ours")
    for step in (1, 2, 10, 9_999_999_999):
        assert kept.save(step, {"w": torch.full((3,), float(step))}, {"step": step}).exists()
    assert [p.name for p in kept.paths()] == ["step_00000010.safetensors", "step_9999999999.safetensors"]
    assert sorted(os.listdir(tmp_path / "run"))[-1] == "step_of_mine.safetensors"
    assert len(os.listdir(tmp_path / "run")) == 3
    path, tensors, meta = kept.newest() or pytest.fail("no checkpoint")
    assert path == kept.paths()[-1]
    assert meta == {"step": 9_999_999_999}
    assert tensors["w"].tolist() == [1e10] * 3
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_damaged_newest_falls_back_saying_so(tmp_path: Path) -> None:
    said: list[str] = []
    kept = Checkpoints(tmp_path, keep=3, say=said.append)
    for step in (1, 2, 3):
        kept.save(step, {"w": torch.randn(50)}, {"step": step})
    first, second, third = kept.paths()
    os.truncate(third, third.stat().st_size - 10)
    second.write_bytes(second.read_bytes().replace(b'step\\": 2', b'step\\": 5'))
    path, _, meta = kept.newest() or pytest.fail("no checkpoint")
    assert (path, meta) == (first, {"step": 1})
    assert len(said) == 2
    assert f"{third}: truncated" in said[0]
    assert f"{second}: wrong checksum" in said[1]
    # The run goes on from step 1: saving must neither count the damaged files as kept nor leave them behind.
    Checkpoints(tmp_path, keep=1).save(2, {"w": torch.zeros(1)}, {"step": 2})
    assert kept.paths() == [second]
    assert load(second)[1] == {"step": 2}
    second.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="all 1 are damaged"):
        kept.newest()


def in_new_process(script: str, folder: Path) -> str:
    run = [sys.executable, "-c", script, folder]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes a write fail part-way, as ENOSPC does, without filling a disk."""
    child = """
import os, resource, sys, torch
from fap.checkpoint import Checkpoints
kept = Checkpoints(sys.argv[1], keep=1)
kept.save(1, {"w": torch.ones(1000)}, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for step in (1, 2):  # over the old file as well as beside it
    try:
        kept.save(step, {"w": torch.zeros(1_000_000)}, {"step": step})
    except OSError as error:
        print("told:", error)
    assert os.listdir(sys.argv[1]) == ["step_00000001.safetensors"]
    _, tensors, meta = kept.newest()
    assert meta == {"step": 1} and tensors["w"].sum() == 1000
kept.save(3, {"w": torch.zeros(10)}, {"step": 3})
"""
    assert in_new_process(child, tmp_path).count("told: [Errno 27]") == 2
    assert os.listdir(tmp_path) == ["step_00000003.safetensors"]


@pytest.mark.slow
def test_kill_9_while_saving(tmp_path: Path) -> None:
    """At random moments of a loop of nothing but saves, the newest file is whole and the loop carries on."""
    child = """
import os, random, signal, sys, time, torch
from fap.checkpoint import Checkpoints
torch.set_num_threads(1)
rng, last, cut_off = random.Random(0), 0, 0
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        step = last
        while True:
            step += 1
            tensors = {f"w{i}": torch.full((50_000,), float(step)) for i in range(20)}
            Checkpoints(sys.argv[1]).save(step, tensors, {"step": step})
    time.sleep(rng.uniform(0.01, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kept = Checkpoints(sys.argv[1], say=sys.exit)  # sys.exit: a damaged file under the final name
    cut_off += any(name.endswith(".tmp") for name in os.listdir(sys.argv[1]))
    found = kept.newest()
    if found:
        _, tensors, meta = found
        assert meta["step"] >= last and all((t == meta["step"]).all() for t in tensors.values())
        assert len(kept.paths()) <= 3  # the two kept, and one whose removal was cut off
        last = meta["step"]
assert last > 0 and cut_off > 0, (last, cut_off)
Checkpoints(sys.argv[1]).save(last + 1, {}, {})
"""
    in_new_process(child, tmp_path)
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("name", ["resnet50", "timm/resnet10t"])
def test_export_loads_into_the_plain_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config({"name": "r", "model": {"name": name, "num_classes": 7}, "data": {"size": 64}})
    model = build(name, 7, size=64).eval()
    for norm in norms(model):  # main and auxiliary statistics differ, and neither is as initialised
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    state = {f"model.{k}": v for k, v in model.state_dict().items()} | {"momentum.fc.weight": torch.ones(3)}
    meta = {"config": config.model_dump(mode="json"), "step": 123, "epoch": 4}
    save(tmp_path / "c.safetensors", state, meta)

    x = torch.rand(2, 3, 64, 64)
    again, read, found = load_model(tmp_path / "c.safetensors")
    assert (read, found) == (config, meta)
    assert not again.training
    assert torch.equal(again(x), model(x))

    out = tmp_path / "plain.safetensors"
    assert main([str(tmp_path / "c.safetensors"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "[0.5, 0.5, 0.5]" in printed
    assert "123 steps" in printed
    if name == "resnet50":
        plain: torch.nn.Module = torchvision.models.resnet50(num_classes=7)
    else:
        plain = timm.create_model("resnet10t", num_classes=7)
    weights = safetensors.torch.load_file(out)
    plain.load_state_dict(weights, strict=True)
    torch.testing.assert_close(plain.eval()(x), model(x), rtol=1e-4, atol=1e-4)
    assert {int(v) for k, v in weights.items() if k.endswith("num_batches_tracked")} == {123}
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata().items() >= {"model": name, "num_classes": "7", "size": "64", "step": "123"}.items()

    before = out.read_bytes()
    assert main([str(tmp_path / "c.safetensors"), str(out)]) == 1
    assert "plain.safetensors exists" in capsys.readouterr().err
    assert main([str(out), str(tmp_path / "again.safetensors")]) == 1
    assert main([str(tmp_path / "none"), str(tmp_path / "again.safetensors")]) == 1
    assert out.read_bytes() == before
    assert not (tmp_path / "again.safetensors").exists()
    save(tmp_path / "other.safetensors", {}, {"step": 1})
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        load_model(tmp_path / "other.safetensors")


def test_a_vanilla_run_has_no_auxiliary_norms(tmp_path: Path) -> None:
    config = make_config({"model": {"name": "cifar_resnet8", "num_classes": 3}, "method": {"name": "vanilla"}})
    model = build("cifar_resnet8", 3, aux=False, size=32)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    save(tmp_path / "c", state, {"config": config.model_dump(mode="json"), "step": 1})
    assert load_model(tmp_path / "c")[0].state_dict().keys() == model.state_dict().keys()
