"""A kept set is built once, whole, and never taken for another."""

import json
import os
from pathlib import Path

import pytest

from fap.evaluate import kept
from pipelines import open_store
from tests.evaluate.world import WNIDS, command, counted, fresh, refused, run

KEEP = ["--corrupt", "fog", "jpeg_compression", "--pipeline", "reference"]


def kept_world(world: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    at = fresh(world, tmp_path, "val")
    return at, [*KEEP, "--keep", str(at / "kept")]


def kept_files(at: Path) -> list[Path]:
    return sorted((at / "kept").glob("*.beton"))


@pytest.mark.slow
def test_kept_sets_are_built_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, keep = kept_world(world, tmp_path)
    computed, _ = run(at, *KEEP, out="computed")
    first, _ = run(at, *keep, out="first")
    assert first["results"] == computed["results"]
    files = kept_files(at)
    assert [len(open_store(file)) for file in files] == [18, 18]
    assert open_store(files[0]).classes == tuple(WNIDS)
    monkeypatch.setattr(kept, "build", None)
    again, _ = run(at, *keep, "--batch", "5", out="again")
    for key, result in computed["results"].items():  # another batch sums in another order
        assert again["results"][key] == pytest.approx(result, rel=1e-12)
    calls = counted(monkeypatch)
    run(at, *keep, out="first")
    assert calls == []


def test_a_kept_set_has_the_labels_of_its_data(world: Path, tmp_path: Path) -> None:
    """Also where the last batch is filled up."""
    at, keep = kept_world(world, tmp_path)
    run(at, *keep, "--batch", "7")
    expected = open_store(at / "val").labels.tolist()
    for file in kept_files(at):
        assert open_store(file).labels.tolist() == expected


def test_a_kept_set_that_was_built_half_is_built_again(world: Path, tmp_path: Path) -> None:
    at, keep = kept_world(world, tmp_path)
    first, _ = run(at, *keep)
    one, other = kept_files(at)
    one.rename(f"{one}.part")  # killed before the renames
    os.rename(f"{one}.json", f"{one}.part.json")
    other.unlink()  # killed between them
    second, _ = run(at, *keep, out="second")
    assert second["results"] == first["results"]
    assert kept_files(at) == [one, other]
    assert [len(open_store(file)) for file in (one, other)] == [18, 18]


def test_a_kept_set_that_was_replaced_is_never_taken_for_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at, keep = kept_world(world, tmp_path)
    run(at, *keep)
    one, other = kept_files(at)
    for suffix in ("", ".json"):  # another corruption's images
        Path(f"{one}{suffix}").write_bytes(Path(f"{other}{suffix}").read_bytes())
    assert f"{one}: is not the set that it is named for" in refused(capsys, at, *keep)
    one.unlink()
    Path(f"{one}.json").unlink()
    run(at, *keep)
    one.write_bytes(one.read_bytes()[:-100])
    assert str(one) in refused(capsys, at, *keep)


@pytest.mark.slow
def test_two_commands_build_a_kept_set_once(world: Path, tmp_path: Path) -> None:
    at, keep = kept_world(world, tmp_path)
    processes = [command(at, *keep) for _ in range(2)]
    told = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert len(kept_files(at)) == 2
    (found,) = json.loads((at / "out" / "report.json").read_text())
    assert set(found["results"]) == {"clean", "computed/fog/3", "computed/jpeg_compression/3"}
