"""The evaluation of data.val while a run trains."""

from pathlib import Path

import pytest
import torch

from fap.config import load_config
from fap.run.train import Run
from fap.run.validation import in_words
from fap.tasks import make_task
from tests.run.test_data import image_folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose data.val has two of the four classes."""
    train = image_folder(tmp_path / "train", ["ant", "bee", "cat", "dog"])
    val = image_folder(tmp_path / "rare", ["bee", "dog"])
    words = [
        f"data.train={train}", f"data.val={val}", f"run.dir={tmp_path / 'runs'}", "data.size=32",
        "data.resize=36", "data.pipeline=reference", "model.name=cifar_resnet8",
        "optim.clean_batch=8", "method.group_rows=4", "method.p_adv=1/3", "budget.epochs=2",
        "budget.milestones=[1]", "run.device=cpu", "run.eval_batch=5",
    ]  # fmt: skip
    return Run(load_config(None, words))


def test_validation_scores_the_class_of_the_name(run: Run) -> None:
    """A model that always says `dog`, its class 3 and val's class 1, is right for half of them."""
    assert run.config.model.num_classes == 4
    *_, head = (m for m in run.model.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    batches = []
    result = run.validate(run.model, lambda: batches.append(1))
    assert result["top1"] == 0.5
    assert "count" not in result
    assert len(batches) == 4  # 16 images
    run.run_folder.release()


def test_a_result_in_words() -> None:
    task = make_task(load_config(None, ["model.num_classes=7"]))
    result = {"loss": 0.96123, "top1": 0.762, "top5": 0.93}
    assert in_words(result, task) == "top-1 76.20%, top-5 93.00%, loss 0.9612"
