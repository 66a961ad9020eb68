"""What a run is about to do, in words and numbers, printed before it does it."""

from fap.budget import Budget, cost_per_image
from fap.config import Config
from fap.step.step import Step


def describe(config: Config, budget: Budget, step: Step, shuffle_groups: int) -> str:
    """A few lines: method, passes, effective eps, batch-norm groups, budget, parameters, shuffle."""
    m, data, cost = config.method, config.data, float(cost_per_image(config.method))
    groups = config.optim.clean_batch // m.group_rows
    shown = " | ".join(
        " + ".join(f"{block.kind} {block.n_rows}" for block in one.blocks) for one in step.passes
    )
    lines = [
        f"run        {config.name}, seed {config.seed}: {m.name} {m.schedule or ''}".rstrip(),
        f"model      {config.model.name}, {config.model.classes} classes, {data.size} px",
        "parameters shared {:,}, main BN {:,}, aux BN {:,}".format(*step.network.flat.counts),
        f"step       {len(step.passes)} pass{'es' * (len(step.passes) > 1)} per device: {shown}",
        f"BN groups  {groups} main of {m.group_rows} rows"
        + (f", {groups} auxiliary of {m.adv_group_rows}" if m.adv_group_rows else ""),
    ]
    if m.eps_255 is not None:
        per_channel = ", ".join(f"{m.eps_255 / 255 / s:.5f}" for s in data.std)
        start = "random start" if m.random_start else "no random start (FGSM)"
        steps = f"{m.attack_steps} step(s) of {m.step_size_255:g}/255, {start}"
        if m.targeted is not None:  # an attack of its own
            aim = "towards a random wrong label" if m.targeted else "away from the true label"
            steps += f", {aim}, through {m.attack_bn} statistics"
        lines.append(
            f"attack     eps {m.eps_255:g}/255 = {per_channel} after normalisation; {steps}"
        )
        effect = f"adversarial rows change places among {shuffle_groups} groups"
        if shuffle_groups < 2:
            effect = (
                "WITHOUT EFFECT: one auxiliary group in reach; statistics may leak labels (section"
                " 4.3)"
            )
        lines.append(
            "shuffle    off" if m.shuffle == "off" else f"shuffle    {m.shuffle}: {effect}"
        )
    vanilla = budget.epochs * cost_per_image(m) / config.budget.epochs
    spent = (
        f"{budget.epochs} epochs of {budget.steps_per_epoch:,} steps at {cost:g} image passes per"
        " image"
    )
    lines.append(
        f"budget     {spent} = {budget.image_passes:,} image passes, {float(vanilla):.3f} x"
        " vanilla's"
    )
    return "\n".join([*lines, *_rate(budget, config.run.max_steps)])


def _rate(budget: Budget, max_steps: int | None) -> list[str]:
    """Every learning rate with the epoch and step, counted from 0, from which it holds; then the
    falls that never come.
    """
    first = f"lr {budget.base_lr:g}"
    if budget.warmup_steps:
        epochs = budget.warmup_steps / budget.steps_per_epoch
        first = (
            f"lr rises to {budget.base_lr:g} over {budget.warmup_steps:,} steps ({epochs:.4g}"
            " epochs)"
        )
        if max_steps is not None and max_steps < budget.warmup_steps:
            first += f", run.max_steps = {max_steps:,} ends the run before"
    rates = [first]
    after_the_end = []
    after_max_steps = []
    for fall in budget.falls:
        rate = f"{fall.lr:g} from epoch {fall.epoch} (step {fall.step:,})"
        if fall.milestones > 1:
            rate += f", {fall.milestones} falls at once"
        if fall.step < budget.warmup_steps:
            rate += ", within the warm-up"
        if fall.step >= budget.steps:
            after_the_end.append(rate)
        elif max_steps is not None and fall.step >= max_steps:
            after_max_steps.append(rate)
        else:
            rates.append(rate)
    lines = [f"rate       {'; '.join(rates)}"]
    if after_the_end:
        lines.append(
            f"           WITHOUT EFFECT, the run ends after {budget.epochs} epochs:"
            f" {'; '.join(after_the_end)}"
        )
    if after_max_steps:
        lines.append(
            f"           WITHOUT EFFECT, run.max_steps = {max_steps:,} ends the run before:"
            f" {'; '.join(after_max_steps)}"
        )
    return lines
