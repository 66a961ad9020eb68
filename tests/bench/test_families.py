"""The table of model families: its lines, its page, and that the list is that of what is installed.

The table itself is not measured here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import timm
import torch
import torchvision
from timm.models import _registry as timm_registry
from torch import nn

from bench import families
from bench.common import RESULTS
from bench.families_list import FAMILIES, MOST_USED, OTHERS
from fap.nets.build import plain, prepare


@pytest.mark.parametrize(
    ("name", "norms", "stem"),
    [
        ("cifar_resnet8", {"BatchNorm2d": 9}, "fast"),
        ("timm/test_vit", {"LayerNorm": 13}, "fast"),
        ("timm/test_efficientnet", {"BatchNormAct2d": 13}, "fast"),
        ("squeezenet1_1", {}, "fast"),
    ],
)
def test_the_line_of_a_model_that_trains(name: str, norms: dict[str, int], stem: str) -> None:
    line = families.measure(name, (32,))
    n_parameters = sum(p.numel() for p in plain(name, families.CLASSES, 32).parameters())
    assert line.pop("bytes_per_row") > 3 * 32 * 32 * 4  # the image itself, at least
    assert line == {
        "side": 32,
        "parameters": n_parameters,
        "norms": norms,
        "stem": stem,
        "trains": True,
    }


def test_a_model_is_tried_at_the_next_size_until_it_accepts_one() -> None:
    line = families.measure("inception_v3", (8, 16))
    assert line["side"] == 16
    assert line["error"].startswith("data.size = 16")


def test_the_line_of_a_model_that_does_not_train_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(name: str, classes: int, size: int) -> nn.Module:
        model = plain(name, classes, size)
        nn.init.constant_(model.fc.bias, float("inf"))  # type: ignore[arg-type,union-attr]
        return model

    monkeypatch.setattr(families, "plain", poisoned)
    line = families.measure("cifar_resnet8", (32,))
    assert "trains" not in line
    assert line["error"] == "the gradient is not finite at random weights"


class Countable(nn.Module):
    """Its convolution keeps the image (3 channels), its norm what it is given (5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).mean((2, 3))


def test_bytes_per_row_are_those_of_saved_tensors() -> None:
    side = 40
    found = families._bytes_per_row(prepare(Countable(), size=side), side)
    images = (3 + 5) * side * side * 4
    assert images <= found <= 1.01 * images  # and a few statistics


def crash(name: str) -> NoReturn:
    faulthandler.disable()  # or its report would look like one of the tests themselves
    os.abort()


def hang(name: str) -> NoReturn:
    while True:
        time.sleep(1)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (crash, "the process ended with -6"),
        (hang, "no result in 1 s"),
        (lambda name: os._exit(3), "the process ended with 3"),
    ],
)
def test_a_crash_is_a_line(what: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "measure", what)
    assert families.in_a_process("any", seconds=1) == {"error": says}


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "families.json"
    asked: list[str] = []

    def measured(name: str) -> dict[str, Any]:
        asked.append(name)
        if name == "timm/dpn48b" and len(asked) == 2:
            raise KeyboardInterrupt
        return {"error": name}

    monkeypatch.setattr(families, "in_a_process", measured)
    some = {family: FAMILIES[family] for family in ("ResNet", "DPN", "TNT")}
    with pytest.raises(KeyboardInterrupt):
        families.run(some, out, again=False)
    lines = families.run(some, out, again=False)
    assert asked == ["resnet18", "timm/dpn48b", "timm/dpn48b", "timm/tnt_s_patch16_224"]
    assert lines == families.kept(out)
    assert list(lines) == list(some)
    families.run({"TNT": some["TNT"]}, out, again=True)
    assert list(families.kept(out)) == ["TNT"]
    report = json.loads(out.read_text())
    report["environment"]["timm"] = "0"
    out.write_text(json.dumps(report))
    assert families.kept(out) == {}


def test_the_page_and_what_makes_it_wrong(tmp_path: Path) -> None:
    out, docs = tmp_path / "families.json", tmp_path / "models.md"
    good = {
        "name": "resnet18",
        "side": 64,
        "parameters": 11_181_642,
        "norms": {"BatchNorm2d": 20},
        "stem": "fast",
        "bytes_per_row": 1_817_280,
        "trains": True,
    }
    lines: dict[str, Any] = {"ResNet": good}
    lines["TNT"] = {"name": FAMILIES["TNT"], "error": "a | b"}
    families.write_json(out, {"results": lines})
    docs.write_text(families.page(json.loads(out.read_text())))
    text = docs.read_text()
    assert "\n1 of 2 families that were tried train, 1 of them with the fast" in text
    assert "| ResNet | `resnet18` | 64 | yes | 20 BatchNorm2d | fast | 1.8 | 11.2 |\n" in text
    assert "| TNT | `timm/tnt_s_patch16_224` | – | no: a \\| b | – | – | – | – |\n" in text
    assert "| DPN | `timm/dpn48b` | – | not measured | – | – | – | – |\n" in text
    assert text.count("\n| ") == 2 + len(FAMILIES)
    check = ["--check", "--out", str(out), "--docs", str(docs)]
    assert families.main(check) == 0
    docs.write_text(text.replace("11.2", "11.3"))
    assert families.main(check) == 1
    lines["Nobody's"] = good
    lines["TNT"] = good
    families.write_json(out, {"results": lines})
    assert families.faults(out, docs)[:2] == [
        "not in the list: TNT by resnet18",
        "not in the list: Nobody's by resnet18",
    ]


def test_every_module_of_timm_and_torchvision_has_a_family() -> None:
    names = [*FAMILIES.values()]
    assert len(names) == len({*names}) == len(MOST_USED) + len(OTHERS)
    of_timm = [name.removeprefix("timm/") for name in names if name.startswith("timm/")]
    modules = timm_registry._model_to_module
    assert {modules[name] for name in of_timm} == {*modules.values()}
    models = torchvision.models
    of_torchvision = [name for name in names if "/" not in name]
    builder = models.get_model_builder
    every = {builder(name).__module__ for name in models.list_models(module=models)}
    assert {builder(name).__module__ for name in of_torchvision} == every
    assert all(timm.is_model(name) for name in of_timm)


def test_the_committed_page_is_what_the_results_give() -> None:
    assert families.faults(RESULTS / "families.json", families.DOCS) == []
    report = json.loads((RESULTS / "families.json").read_text())
    assert MOST_USED.keys() <= report["results"].keys()
