"""Does Fast AdvProp pay, where, and how much? Arms at equal cost and at equal optimiser steps.

    python -m bench.evidence                     # make evidence
    python -m bench.evidence --seconds 3600      # as many seeds as fit
    python -m bench.evidence --seconds 0         # trains nothing: reports what is there
    python -m bench.evidence --parts saturation  # one question
    python -m bench.evidence --add-to bench/results/evidence_small.json    # more seeds to these

`fap-train` trains, `fap-eval` evaluates. Of the first seed every arm is trained, then the other
seeds of the headline, then those of the other parts: the seconds decide how many seeds there are,
never which results are shown. What is trained and measured is kept in `runs/`, so an interrupted
study goes on where it stopped. Writes OUT/evidence_small.json, .md and .png.
"""

from collections.abc import Sequence
from pathlib import Path

from bench.cifar import convert
from bench.common import ROOT, options
from bench.evidence.conduct import conduct, known_rows
from bench.evidence.cost import Costs, costs
from bench.evidence.measure import Measure
from bench.evidence.numbers import Rows
from bench.evidence.report import write
from bench.evidence.runs import Runs
from bench.evidence.studies import STUDIES
from fap.cli.output import survive
from pipelines.back_ends import BACK_ENDS

RUNS = ROOT / "runs"


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__, seconds=7200.0)
    parser.add_argument("--size", choices=tuple(STUDIES), default="small")
    parser.add_argument("--pipeline", choices=tuple(BACK_ENDS), default="memory")
    parser.add_argument(
        "--add-to", type=Path, metavar="FILE", help="a study's .json: its rows are not run again"
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", help="some of a study's questions")
    a = parser.parse_args(argv)
    survive()
    study = STUDIES[a.size]
    if a.parts is not None:
        if not set(a.parts) <= study.parts.keys():
            parser.error(f"--parts: must be some of {', '.join(map(repr, study.parts))}")
        study = study.only(a.parts)
    known = [] if a.add_to is None else known_rows(a.add_to, study)
    folder = RUNS / f"evidence_{a.size}"
    runs = Runs(
        folder,
        train={count: convert("train", count) for count in study.sizes()},
        test=convert("test", study.test),
        pipeline=a.pipeline,
        workers=study.side_by_side,
    )
    measure = Measure(runs, study, convert("test", study.corrupted), folder / "eval")
    found_costs: Costs = {}
    if study.methods is not None:
        found_costs = costs(runs, study.methods, folder / "costs.json")
    rows = conduct(study, runs, measure, a.seconds, known)
    out = a.out / f"evidence_{a.size}"
    print(f"\n{write(Rows(rows), study, out, found_costs)}\n\nfigure: {out}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
