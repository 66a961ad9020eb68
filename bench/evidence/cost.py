"""What a whole run of each arm costs, as a multiple of vanilla's: steps of all arms in turns.

A library of `bench.evidence`. Loading is left out, which the arms share, but for AugMix's.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.common import alternate, ratio
from bench.contestants import AMPS, GPU, Contestant
from bench.demo_measure import seconds_per_step
from bench.evidence.arms import BASE
from bench.evidence.runs import Runs, settings_of
from bench.evidence.studies import Part, Run
from fap.budget import budget
from fap.versions import versions

STEPS_PER_BLOCK = 3
ROUNDS = 20

Costs = Mapping[str, Mapping[str, float]]
"""By arm: `ratio`, `low` and `high` of its run over vanilla's, a 95% bootstrap interval."""


def costs(runs: Runs, part: Part, file: Path) -> Costs:
    """Of the arms of a part in its regime, in seconds of the processor, or of a GPU's clock.

    Measured in this process, and kept in `file` for the same arms on the same machine.
    """
    (regime,) = part.regimes
    stages = {arm: runs.stages(Run(regime, arm, 0)) for arm in part.arms}
    settings = {arm: [settings_of(config) for config in found] for arm, found in stages.items()}
    what = json.loads(json.dumps([settings, runs.threads, versions()]))
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["of"] == what:
            return kept["costs"]
    torch.set_num_threads(runs.threads)
    amp = AMPS[0] if GPU else "off"
    configs = [config for found in stages.values() for config in found]
    contestants = [Contestant(config, amp) for config in configs]
    per_step = alternate(
        lambda contestant: seconds_per_step(contestant, STEPS_PER_BLOCK), contestants, ROUNDS
    )
    per_stage = iter(per_step)
    seconds = {
        arm: sum(budget(config, regime.images).steps * next(per_stage) for config in found)
        for arm, found in stages.items()
    }
    found = {arm: ratio(seconds[arm], seconds[BASE]) for arm in stages}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"of": what, "costs": found}))
    return found
