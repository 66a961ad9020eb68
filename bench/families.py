"""Which families of timm's and torchvision's models train a step, with what stem, norms and memory?

    python -m bench.families            # what is not measured yet; then writes docs/models.md
    python -m bench.families --again    # everything anew
    python -m bench.families --only ViT Swin
    python -m bench.families --check    # do docs/models.md and bench/results/families.json agree?

Every model of bench/families_list.py, with random weights, takes one step of Fast AdvProp
(`fused`, two groups of 4 clean rows, p = 1/3) in a process of its own, at the smallest of SIDES
that it accepts. So a crash, a hang or too little memory is a line of the table and not its end.
Each line is kept in bench/results/families.json at once: an interrupted run goes on where it was.
One thread of a CPU, float32.

Memory per row is counted, not timed: the bytes that autograd keeps for the backward of a forward of
8 rows (saved tensors, each storage once, parameters left out), divided by 8.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import RESULTS, ROOT, environment, write_json
from bench.families_list import FAMILIES
from fap.config import make_config
from fap.distributed import ONE_RANK
from fap.nets.build import plain, prepare
from fap.nets.dual import norm_state, norms
from fap.nets.norm import Group
from fap.nets.stem import StemConv2d, StemLayer, stem_of
from fap.step.step import Step

SIDES = (64, 96, 128, 192, 224, 240, 256, 288, 384)
CLASSES = 10
GROUP_ROWS = 4
CLEAN_ROWS = 8
SECONDS = 300  # of the clock, for one model
MB = 1e6
NOT_MEASURED = "not measured"
MOST_SAID = 160  # characters of an error
DOCS = ROOT / "docs" / "models.md"
VERSIONS = ("torch", "torchvision", "timm")


# ------------------------------------------------------------------ one model


def measure(name: str, sides: Sequence[int] = SIDES) -> dict[str, Any]:
    """A line of the table. Without `trains` there is the error in its place."""
    found: dict[str, Any] = {}
    for side in sides:
        try:
            torch.manual_seed(0)
            model = prepare(plain(name, CLASSES, side), size=side)
        except Exception as error:  # the next size may be accepted
            found = {"side": side, "error": _said(error)}
            gc.collect()  # a large one that was refused must not be there beside the next
            if "data.size" in str(error):
                continue
            return found
        break
    else:
        return found
    found = {"side": side, "parameters": _n_parameters(model)}
    found |= {"norms": _norms(model), "stem": _stem(model)}
    try:
        found["bytes_per_row"] = _bytes_per_row(model, side)
        found["trains"] = _trains(model, side)
    except Exception as error:  # whatever it is, it is what the table tells
        found["error"] = _said(error)
    return found


def _said(error: Exception) -> str:
    words = f"{error}" or type(error).__name__
    first = " ".join(words.split())
    return first if len(first) <= MOST_SAID else first[: MOST_SAID - 1] + "…"


def _n_parameters(model: nn.Module) -> int:
    """Of the plain model: without the auxiliary norms."""
    auxiliary = {p for norm in norms(model) if norm.aux is not None for p in norm.aux.parameters()}
    return sum(p.numel() for p in model.parameters() if p not in auxiliary)


def _norms(model: nn.Module) -> dict[str, int]:
    """How many norms with an auxiliary twin there are, by their class in the plain model."""
    return dict(Counter(norm.plain_name for norm in norms(model) if norm.aux is not None))


def _stem(model: nn.Module) -> str:
    """`fast` where only the attacked rows get an input gradient, and how; else `whole batch`."""
    stem = stem_of(model)
    if stem is None:
        return "whole batch"
    readers = [m for m in model.modules() if isinstance(m, StemConv2d | StemLayer)]
    words = ["fast"]
    if len(readers) > 1:
        words.append(f"{len(readers)} layers")
    if not stem.direct:
        words.append("tied")
    if any(isinstance(reader, StemLayer) for reader in readers):
        words.append("rows apart")
    return ", ".join(words)


def _bytes_per_row(model: nn.Module, side: int) -> int:
    """What autograd keeps of a forward for its backward, parameters left out."""
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # also keeps them alive: no storage's place is taken by another

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x = torch.randn(CLEAN_ROWS, 3, side, side).to(memory_format=torch.channels_last)
    norm_state(model).groups = (Group("main", CLEAN_ROWS),)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.train()(x)
    del outputs
    others = [t.untyped_storage().nbytes() for place, t in kept.items() if place not in ours]
    return sum(others) // CLEAN_ROWS


def _trains(model: nn.Module, side: int) -> bool:
    """Did a step of Fast AdvProp change the weights, and were its gradients finite?"""
    config = make_config(
        {
            "model": {"num_classes": CLASSES},
            "method": {"group_rows": GROUP_ROWS, "p_adv": "1/3"},
            "data": {"size": side, "resize": side},
            "optim": {"clean_batch": CLEAN_ROWS},
        }
    )
    step = Step(model, config)
    inputs = step.inputs
    draws = {
        "shuffle": torch.randperm(step.n_adv),
        "noise_key": torch.arange(step.n_adv_groups, dtype=torch.int32),
    }
    images = torch.randint(0, 256, inputs.images.shape, dtype=torch.uint8)
    step.feed(images, torch.randint(0, CLASSES, (len(images),)), 0.01, **draws)
    before = step.network.flat.param.detach().clone()
    step()
    finite = not step.metrics.take(ONE_RANK)["skipped"]
    if not finite:
        raise RuntimeError("the gradient is not finite at random weights")
    return not torch.equal(before, step.network.flat.param)


# ------------------------------------------------------------------ all of them


def in_a_process(name: str, seconds: float = SECONDS) -> dict[str, Any]:
    """`measure` in a forked process, which may crash or hang."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    worker = fork.Process(target=_work, args=(theirs, name), daemon=True)
    worker.start()
    theirs.close()
    try:
        found = {"error": f"no result in {seconds:.0f} s"}
        if ours.poll(seconds):
            found = ours.recv()
    except EOFError:  # it ended without a word
        worker.join()
        found = {"error": f"the process ended with {worker.exitcode}"}
    worker.kill()
    worker.join()
    return found


def _work(pipe: Connection, name: str) -> None:
    warnings.simplefilter("ignore")  # of models' own constructors
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    pipe.send(measure(name))


def run(families: Mapping[str, str], out: Path, *, again: bool) -> dict[str, dict[str, Any]]:
    """The lines by family, those in `out` included; each is written as soon as it is there."""
    lines = {} if again else kept(out)
    for number, (family, name) in enumerate(families.items(), 1):
        if lines.get(family, {}).get("name") == name:
            continue
        lines[family] = {"name": name} | in_a_process(name)
        print(f"{number}/{len(families)} {family}: {lines[family]}", flush=True)
        ordered = {key: lines[key] for key in FAMILIES if key in lines}
        ordered |= {key: line for key, line in lines.items() if key not in ordered}
        write_json(out, {"results": ordered})
    return lines


def kept(out: Path) -> dict[str, dict[str, Any]]:
    """The lines of an earlier run with the same versions."""
    if not out.exists():
        return {}
    report = json.loads(out.read_text())
    now = environment()
    if any(report["environment"][package] != now[package] for package in VERSIONS):
        return {}
    return report["results"]


# ------------------------------------------------------------------ the page

HEAD = """\
# Models

Which families of timm's and torchvision's models train here. `python -m bench.families` writes
this page and [`bench/results/families.json`](../bench/results/families.json); nobody edits it.

Every family is tried by a small member with random weights: one step of Fast AdvProp (`fused`,
groups of 4 rows) on a CPU, in float32, at the smallest of a few sizes that it accepts. "Trains"
says that this step ran and changed the weights, no more.

- **norms**: how many norms have an auxiliary twin, by their kind in the plain model. Where there is
  none, all rows train the same parameters.
- **input gradient**: *fast* is that of the attacked rows alone
  ([`fap/nets/stem.py`](../fap/nets/stem.py)), *whole batch* that of all rows. "n layers": so many
  read the image. "Tied": the image is padded, resized or cut before a layer reads it, or goes past
  it as well. "Rows apart": the layer computes the attacked rows by themselves, as it is neither a
  plain convolution nor one with TensorFlow's padding.
- **MB per row**: what autograd keeps of one image for the backward, at the size in the table (saved
  tensors, each storage once, without parameters).
"""


def page(report: Mapping[str, Any]) -> str:
    """docs/models.md, of what bench/results/families.json holds."""
    lines = report["results"]
    unmeasured = {f: {"name": name, "error": NOT_MEASURED} for f, name in FAMILIES.items()}
    good = [line for line in lines.values() if line.get("trains")]
    fast = [line for line in good if line["stem"] != "whole batch"]
    versions = ", ".join(f"{name} {report['environment'][name]}" for name in VERSIONS)
    parts = [
        HEAD,
        f"{len(good)} of {len(lines)} families that were tried train, {len(fast)} of them with the "
        f"fast input gradient ({versions}).\n",
        _row(
            "family", "tried by", "px", "trains", "norms", "input gradient", "MB per row", "M par."
        ),
        _row(*["---"] * 8),
        *(
            _row(family, f"`{line['name']}`", *_cells(line))
            for family, line in (unmeasured | lines).items()
        ),
    ]
    return "\n".join(parts) + "\n"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _cells(line: Mapping[str, Any]) -> list[str]:
    """From the size on. What was not reached is a dash."""
    trains = "yes"
    if line.get("error") == NOT_MEASURED:
        trains = NOT_MEASURED
    elif not line.get("trains"):
        trains = f"no: {line.get('error', 'no weight changed')}"
    norm_counts = ", ".join(f"{n} {kind}" for kind, n in line.get("norms", {}).items())
    megabytes = "–"
    if "bytes_per_row" in line:
        megabytes = f"{line['bytes_per_row'] / MB:.1f}"
    millions = "–"
    if "parameters" in line:
        millions = f"{line['parameters'] / 1e6:.1f}"
    return [
        str(line.get("side", "–")),
        trains.replace("|", "\\|"),
        norm_counts or "–",
        line.get("stem", "–"),
        megabytes,
        millions,
    ]


def faults(out: Path, docs: Path) -> list[str]:
    """What makes the page wrong: lines of another list, or another text than the results give."""
    report = json.loads(out.read_text())
    found = []
    for family, line in report["results"].items():
        if FAMILIES.get(family) != line["name"]:
            found.append(f"not in the list: {family} by {line['name']}")
    if docs.read_text() != page(report):
        found.append(f"{docs.name} is not what {out.name} gives")
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "families.json")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--check", action="store_true", help="measure nothing")
    options = parser.parse_args(words)
    if options.check:
        found = faults(options.out, options.docs)
        print("\n".join(found) or "the page is what the results give")
        return 1 if found else 0
    torch.set_num_threads(1)
    families = {family: FAMILIES[family] for family in options.only or FAMILIES}
    run(families, options.out, again=options.again)
    options.docs.write_text(page(json.loads(options.out.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
