"""The model card of an exported folder: what it is, what it reached, how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from fap.evaluate.load import Plain
from fap.nets.norm import Bn
from fap.nets.weights.names import TIMM, spelt
from pipelines.files import readable
from pipelines.sizes import size_in_words

TASKS = {"classification": "image-classification", "detection": "object-detection"}
NORMS: dict[Bn, str] = {"main": "main", "aux": "auxiliary"}


def model_card(plain: Plain, library: str, load: Sequence[str]) -> str:
    """Markdown, with the front matter that the Hub reads."""
    config = plain.config
    title = f"{spelt(config.model.name).removeprefix(TIMM)}, {config.method.name}"
    front = ["---"]
    if library == "timm":
        front.append("library_name: timm")
    front += ["tags:", *(f"- {tag}" for tag in tags(plain, library)), "---"]
    rows = [f"| {name} | {value} |" for name, value in _rows(plain)]
    code = ["```python", f"import {_imports(library)}", "", *load, "```"]
    return "\n".join(
        [
            *front,
            "",
            f"# {title}",
            "",
            f"Trained with `fap` (method `{config.method.name}`). The weights are a plain state "
            f"dict, that of the {NORMS[plain.bn]} norms.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            *code,
            "",
        ]
    )


def tags(plain: Plain, library: str) -> list[str]:
    found = [TASKS.get(plain.config.task, plain.config.task)]
    if library == "timm":
        found.append("timm")
    return found


def _imports(library: str) -> str:
    if library == "timm":
        return "timm"
    if library == "torchvision":
        return "safetensors.torch, torchvision"
    return "safetensors.torch, fap.nets.build, fap.nets.retinanet"


def _rows(plain: Plain) -> list[tuple[str, str]]:
    config = plain.config
    meta = plain.meta
    data = config.data
    rows = [
        ("run", f"{config.name}, seed {config.seed}, {meta.step:,} steps, {meta.closed} epochs"),
        ("method", f"{config.method.name}"),
    ]
    if config.method.eps_255 is not None:
        rows.append(("attack", f"eps {config.method.eps_255:g}/255"))
    if config.model.init is not None:
        rows.append(("started from", f"`{readable(config.model.init)}`"))
    rows += [
        ("classes", f"{config.model.classes:,}"),
        ("trained on", f"{meta.train.count:,} images (content {meta.train.content})"),
        ("input", f"RGB, {size_in_words(data.size)} px, mean {list(data.mean)}, "
                  f"std {list(data.std)}"),
    ]  # fmt: skip
    if data.crop != "letterbox":
        rows.append(
            ("evaluation", f"shorter side {data.resize} px, {data.eval_filter}, centre cut out")
        )
    if plain.which == "ema":
        rows.append(("weights", f"exponential average of training's, decay {config.optim.ema:g}"))
    elif config.optim.ema is not None:
        rows.append(("weights", "those of the last step; the numbers are of their average"))
    if plain.bn == "aux":
        rows.append(
            ("norms", "auxiliary, trained on adversarial images; the numbers are of the main ones")
        )
    for name, words in plain.task.percents.items():
        if name in meta.last:
            on = f"{meta.val.count:,} images of validation"
            if meta.last_step is None:
                on += ", when it was last evaluated"
            elif meta.last_step != meta.step:
                on += f", after step {meta.last_step:,}"
            rows.append((words, f"{meta.last[name]:.2%} on {on}"))
    rows.append(("versions", _versions(plain)))
    return [(name, _cell(value)) for name, value in rows]


def _versions(plain: Plain) -> str:
    known = {name: text for name, text in plain.meta.versions.items() if text is not None}
    wanted = ("fap", "commit", "torch", "torchvision", "timm", "python")
    return ", ".join(f"{name} {known[name]}" for name in wanted if name in known) or "unknown"


def _cell(text: str) -> str:
    """Of a table: names in a checkpoint may be anyone's."""
    return readable(text).replace("|", "\\|")
