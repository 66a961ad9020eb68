"""fap-convert's words, messages and exit codes; what is left of a conversion that is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fap.cli.convert import main
from pipelines import convert_boxes as convert_boxes_module
from pipelines import open_store
from pipelines.convert_boxes import convert_boxes
from pipelines.sources.beton_writer import BetonWriter
from pipelines.sources.sidecar import sidecar_path
from tests.pipelines.annotated_trees import coco_content, coco_tree, write_image, write_json
from tests.pipelines.samples import no_trace

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Path]:
    return coco_tree(tmp_path)


def test_messages_and_exit_codes(tree: tuple[Path, Path], tmp_path: Path, capfd: Capture) -> None:
    images, labels = (str(path) for path in tree)
    dst = str(tmp_path / "out.beton")

    def said(*words: str) -> str:
        assert main(list(words)) == 1
        message = capfd.readouterr().err
        assert "Traceback" not in message
        return message

    assert "missing: no such folder; expected" in said("coco", f"{images}/missing", labels, dst)
    assert "readme.txt: no such folder" in said("coco", f"{images}/readme.txt", labels, dst)
    missing = said("coco", images, f"{labels}.missing", dst)
    assert "json.missing: no such file or folder; expected COCO's instances_*.json" in missing
    assert "readme.txt: is no JSON" in said("coco", images, f"{images}/readme.txt", dst)
    assert "no XML files" in said("coco", images, images, dst)
    empty = write_json(tmp_path / "empty.json", coco_content() | {"annotations": []})
    assert "empty.json: 0 boxes: must be 1 to 30,000,000" in said("coco", images, str(empty), dst)
    assert no_trace(tmp_path)
    assert main(["coco", images, labels, dst]) == 0
    before = Path(dst).read_bytes()
    capfd.readouterr()
    assert "exists and is not overwritten" in said("coco", images, labels, dst)
    assert Path(dst).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coco"], "coco takes three more: IMAGES ANNOTATIONS DST"),
        (["coco", "a"], "coco takes three more"),
        (["coco", "a", "b"], "coco takes three more"),
        (["coco", "a", "b", "c", "d"], "coco takes three more"),
        (["a", "b", "c"], "3 words: give SRC and DST, or coco IMAGES ANNOTATIONS DST"),
        (["a", "b", "c", "d"], "4 words: give SRC and DST"),
        (["a"], "give SRC and DST, or coco IMAGES ANNOTATIONS DST, or --check FILE"),
        ([], "give SRC and DST"),
        (["coco", "a", "b", "c", "--check", "d"], "or --check FILE"),
        (
            ["coco", "a", "b", "c", "--allow-odd-classes"],
            "--allow-odd-classes does not go with coco",
        ),
        (["coco", "a", "b", "c", "--limit", "3"], "--limit does not go with coco"),
        (["coco", "a", "b", "c", "--threads", "0"], "--threads 0: must be at least 1"),
    ],
)
def test_words_that_do_not_go_together(words: list[str], message: str, capfd: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert message in capfd.readouterr().err


def test_words_stand_on_both_sides_of_options(tree: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = (str(path) for path in tree)
    dst = str(tmp_path / "out.beton")
    assert main(["coco", "--threads", "1", images, "--raw", labels, dst]) == 0


def test_images_may_lie_in_a_folder_called_as_a_keyword(
    tree: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = tree
    monkeypatch.chdir(tmp_path)
    images.rename("cifar10")
    assert main(["coco", "cifar10", str(labels), "out.beton", "--skip-bad", "--raw"]) == 0
    Path("coco/cat").mkdir(parents=True)
    write_image(Path("coco/cat/1.JPEG"), 1, 20, 20)
    assert main(["coco", "2.beton", "--allow-odd-classes"]) == 0
    assert open_store("2.beton").annotations is None


def test_check_covers_the_annotations(
    tree: tuple[Path, Path], tmp_path: Path, capfd: Capture
) -> None:
    images, labels = tree
    dst = tmp_path / "out.beton"
    convert_boxes(images, labels, dst)
    assert main(["--check", str(dst)]) == 0
    side = sidecar_path(dst)
    content = json.loads(side.read_text())
    assert content["annotations"]["crowd"] == "AAAAAAE="  # the last of five
    content["annotations"]["crowd"] = "AAAAAAA="
    side.write_text(json.dumps(content))
    assert main(["--check", str(dst)]) == 1
    assert "its content is not that of its checksum" in capfd.readouterr().out


# ------------------------------------------------------------------ stopped, full, no memory


def test_a_signal_leaves_nothing(
    tree: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    add = BetonWriter.add

    def told_to_end(*arguments: Any) -> None:
        add(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(BetonWriter, "add", told_to_end)
    images, labels = tree
    assert main(["coco", str(images), str(labels), str(tmp_path / "out.beton")]) == 143
    assert "stopped by SIGTERM; nothing was written" in capfd.readouterr().err
    assert no_trace(tmp_path)


def test_no_memory_is_not_the_images_fault(
    tree: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(convert_boxes_module, "unturned_sides", refuse)
    images, labels = tree
    assert main(["coco", str(images), str(labels), str(tmp_path / "o.beton"), "--skip-bad"]) == 1
    assert "not enough memory; fewer --threads" in capfd.readouterr().err
    assert not list(tmp_path.glob("o.beton*"))


@pytest.mark.slow
def test_disk_full(tree: tuple[Path, Path], tmp_path: Path) -> None:
    """A limit on the file's size stands in for a full disk: write(2) fails half-way."""
    code = """
import resource, sys
from pipelines.sources.beton_writer import PAGE_BYTES
from fap.cli.convert import main
resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES + 3000, PAGE_BYTES + 3000))
sys.exit(main(sys.argv[1:]))
"""
    words = ["coco", *(str(path) for path in tree), str(tmp_path / "out.beton")]
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert no_trace(tmp_path)
