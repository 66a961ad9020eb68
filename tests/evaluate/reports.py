"""Reports made by hand, of results that nobody computed."""

from collections.abc import Mapping

from fap.evaluate.published import SEVERITIES
from fap.evaluate.work import Report
from fap.tasks import make_task
from fap.tasks.base import Result, Task
from pipelines.corrupt import NAMES
from tests.evaluate.world import tiny_config


def result(top1: float = 0.5, count: int = 50) -> Result:
    return {"loss": 1.0, "top1": top1, "top5": 1.0, "ece": 0.1, "count": count}


def report_of(
    results: dict[str, Result],
    name: str = "tiny",
    step: int = 5,
    paper: Mapping[str, float] | None = None,
    small: bool = False,
    task: Task | None = None,
) -> Report:
    return Report(
        task=task or make_task(tiny_config()),
        checkpoint=f"{name}.safetensors",
        name=name,
        seed=0,
        step=step,
        paper=dict(paper or {}),
        small=small,
        settings={"data": "x", "bn": "main"},
        labels=dict.fromkeys(results, "by name"),
        unused=[],
        results=results,
    )


def complete(top1: float = 0.5) -> dict[str, Result]:
    """Every set of ImageNet-C."""
    results = {"clean": result(top1)}
    for name in NAMES:
        for severity in SEVERITIES:
            results[f"imagenet_c/{name}/{severity}"] = result(top1)
    return results
