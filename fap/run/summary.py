"""What a run is about to do, in words and numbers, printed before it does it."""

from __future__ import annotations

import math

from fap.budget import Budget, cost_per_image
from fap.config import Config
from fap.nets.dual import counted, divides_statistics, norms, undivided
from fap.nets.norm import DualBatchNorm, DualNorm
from fap.rates import Rates
from fap.sections import DataConfig, OptimConfig
from fap.sections.data import MAGNITUDES
from fap.step.flat import Flat
from fap.step.passes import passes_of
from fap.step.step import Step
from pipelines.sizes import sides_of, size_in_words

# Of `method.attack_loss`, where it is not the loss that is trained.
PARTIAL_LOSSES = {
    "cls": "by the loss of the classes alone",
    "box": "by the loss of the boxes alone",
    "max": "by each part of the loss, of which the worse image is trained",
}


def describe(
    config: Config,
    budget: Budget,
    step: Step,
    shuffle_groups: int,  # among which the rows of one change places
) -> str:
    """A few lines: method, model, passes, batch-norm groups, effective eps, shuffle, budget."""
    method = config.method
    shared, main, aux = step.network.flat.counts
    how: str = method.name
    if method.schedule is not None:
        how += f" {method.schedule}"
    size = size_in_words(config.data.size)
    # Batch norms alone are called BN, as in the paper.
    word = "norms"
    if _dual(step) and all(isinstance(norm, DualBatchNorm) for norm in _dual(step)):
        word = "BN"
    lines = [
        f"run        {config.name}, seed {config.seed}: {how}",
        f"model      {config.model.name}, {config.model.classes} classes, {size} px",
        f"images     {_images(config.data)}",
        *_augmentation(config),
        f"parameters shared {shared:,}, main {word} {main:,}, aux {word} {aux:,}",
        _norms(config, step),
        _optimiser(config.optim),
        *_settings(step.network.flat),
        _passes(step),
        _groups(config, step),
    ]
    if config.data.sampling != "shuffle" or config.data.repeats > 1:
        lines.append(_order(config.data))
    if config.data.mix is not None:
        lines.append(_mix(config.data))
    if method.eps_255 is not None:
        lines.append(_attack(config, step, method.eps_255))
    if method.shuffle is not None:
        lines.append(_shuffle(config, step, shuffle_groups))
    if config.data.sizes is not None:
        lines += _sizes(config, budget)
    lines.append(_budget(config, budget))
    lines += _rate(budget.rates, config.run.max_steps)
    return "\n".join(lines)


def _images(data: DataConfig) -> str:
    """How they are shown: in training, then in evaluation."""
    if data.crop == "letterbox":
        evaluation = "letterbox"
    else:
        evaluation = f"shorter side {data.resize}, centre {size_in_words(data.size)}"
    return (
        f"{data.crop}, {data.shown_filter} filter; "
        f"evaluation {evaluation}, {data.eval_filter} filter"
    )


def _augmentation(config: Config) -> list[str]:
    """What is done to training images, in order, and to which; no line where it is nothing."""
    data = config.data
    parts = []
    if data.augment is not None:
        policy: str = data.augment
        if data.shown_ops is not None:
            policy += f" of {data.shown_ops} operations"
        if data.shown_magnitude is not None:
            policy += f", magnitude {data.shown_magnitude} of {MAGNITUDES[data.augment].most}"
        parts.append(policy)
    if data.color_jitter is not None:
        kinds = ("brightness", "contrast", "saturation", "hue")
        amounts = zip(kinds, data.color_jitter, strict=True)
        shown = [f"{kind} {amount:g}" for kind, amount in amounts if amount]
        parts.append(f"colour jitter ({', '.join(shown)})")
    if data.erase:
        parts.append(f"{data.erase:.4g} erased")
    if not parts:
        return []
    rows = {"both": "all", "clean": "clean", "adv": "adversarial"}[data.augment_on]
    return [f"augment    {', then '.join(parts)}; on {rows} rows"]


def _order(data: DataConfig) -> str:
    """Which images an epoch shows, where it is not simply every one of them."""
    shown = "every class equally often"
    if data.sampling == "shuffle":
        shown = "images in random order"
    if data.repeats > 1:
        shown += f", each {data.repeats} times in a step: an epoch shows 1/{data.repeats} of them"
    return f"sampling   {data.sampling}: {shown}"


def _mix(data: DataConfig) -> str:
    alpha = f"alpha {data.mix_alpha:g}"
    if data.mix == "either":
        alpha = f"Mixup of alpha {data.mix_alpha:g} or CutMix of alpha {data.cutmix_alpha:g}"
    rows = {"clean": "clean", "adv": "adversarial", "both": "clean and adversarial"}
    return f"mix        {data.mix}, {alpha}, drawn per {data.mix_per}, of {rows[data.mix_on]} rows"


def _optimiser(optim: OptimConfig) -> str:
    match optim.name:
        case "sgd":
            kind = "Nesterov momentum" if optim.nesterov else "momentum"
            parts = [f"SGD, {kind} {optim.momentum:g}"]
        case _:
            assert optim.betas is not None
            first, second = optim.betas
            words = {"adamw": "AdamW", "lamb": "LAMB"}
            parts = [f"{words[optim.name]}, betas {first:g} and {second:g}, eps {optim.eps:g}"]
    on = "all parameters"
    if optim.decay_on == "weights":
        on = "weights, none on norms and biases"
    parts.append(f"decay {optim.weight_decay:g} on {on}")
    if optim.clip_norm is not None:
        parts.append(f"gradient clipped at {optim.clip_norm:g}")
    if optim.ema is not None:
        parts.append(f"EMA {optim.ema:g} of the weights, which is what is evaluated")
    return f"optimiser  {', '.join(parts)}"


def _settings(flat: Flat) -> list[str]:
    """Rates of parts, and what is frozen, where not all parameters are trained alike."""
    lines = []
    n_values: dict[float, int] = {}
    n_frozen = 0
    for name, setting in flat.settings.items():
        n = flat.parameters[name].numel()
        if setting.trained:
            n_values[setting.lr_scale] = n_values.get(setting.lr_scale, 0) + n
        else:
            n_frozen += n
    if n_values.keys() != {1.0}:
        scales = [f"x {scale:.3g} on {n_values[scale]:,}" for scale in sorted(n_values)]
        lines.append(f"rates      {', '.join(scales)} values")
    if n_frozen:
        lines.append(f"frozen     {n_frozen:,} of {sum(flat.counts):,} values")
    return lines


def _passes(step: Step) -> str:
    """Before they are divided into parts."""
    shown = []
    for one in passes_of(step.method, step.inputs.n_clean):
        shown.append(" + ".join(f"{block.kind} {block.n_rows}" for block in one.blocks))
    passes = "pass"
    if len(shown) > 1:
        passes = "passes"
    parts = ""
    if step.accumulate > 1:
        parts = f", in {step.accumulate} parts"
        if len(shown) > 1:
            parts = f", each in {step.accumulate} parts"
    return f"step       {len(shown)} {passes} per device{parts}: {' | '.join(shown)}"


def _dual(step: Step) -> list[DualNorm]:
    return norms(step.network.model)


def _norms(config: Config, step: Step) -> str:
    """How many of each class, whether they have auxiliary twins, and what sees a whole pass."""
    dual = [norm for norm in _dual(step) if not norm.whole_batch]
    whole = undivided(step.network.model)
    parts: list[str] = []
    if dual:
        said = counted(norm.plain_name for norm in dual)
        if config.method.has_aux:
            said += " with auxiliary twins"
        elif config.method.aux == "none":
            said += " without auxiliary twins (method.aux = none)"
        parts.append(said)
    elif config.method.has_aux:
        parts.append("none, so all rows train the same parameters, and none are auxiliary")
    if whole:
        parts.append(f"{counted(whole)} that see a whole pass as one batch")
    return f"norms      {'; '.join(parts) or 'none'}"


def _groups(config: Config, step: Step) -> str:
    """Of the clean rows, then of the adversarial ones, where they are trained."""
    method = config.method
    n_groups = config.optim.clean_batch // method.group_rows
    words = {"main": "main ", "aux": "auxiliary "}
    if not _dual(step):
        words = {"main": "", "aux": ""}
    parts: list[str] = []
    if "clean" in method.norms:
        through = words[method.norms["clean"]]
        parts.append(f"{n_groups} {through}of {method.group_rows} rows")
    if "adv" in method.norms:
        through = words[method.norms["adv"]]
        parts.append(f"{n_groups} {through}of {method.adv_group_rows} rows")
    said = ", ".join(parts)
    if not divides_statistics(step.network.model):
        return f"groups     {said}; no statistics of a group are taken"
    return f"BN groups  {said}"


def _attack(config: Config, step: Step, eps_255: float) -> str:
    method = config.method
    per_channel = ", ".join(f"{eps_255 / 255 / std:.5f}" for std in config.data.std)
    start = "no random start (FGSM)"
    if method.random_start:
        start = "random start"
    steps = f"{method.attack_steps} step(s) of {method.step_size_255:g}/255, {start}"
    if method.targeted is not None:  # an attack of its own
        aim = "away from the true label"
        if method.targeted:
            aim = "towards a random wrong label"
        steps += f", {aim}"
        if divides_statistics(step.network.model):
            steps += f", through {method.attack_bn} statistics"
    if method.attack_loss in PARTIAL_LOSSES:
        steps += f", {PARTIAL_LOSSES[method.attack_loss]}"
    return f"attack     eps {eps_255:g}/255 = {per_channel} after normalisation; {steps}"


def _shuffle(config: Config, step: Step, shuffle_groups: int) -> str:
    scope = config.method.shuffle
    if scope == "off":
        return "shuffle    off"
    effect = f"adversarial rows change places among {shuffle_groups} groups"
    if not divides_statistics(step.network.model):
        effect = "WITHOUT EFFECT but for the order of rows: there are no statistics of groups"
    elif shuffle_groups < 2:
        effect = "WITHOUT EFFECT: one group in reach; statistics may leak labels (section 4.3)"
    return f"shuffle    {scope}: {effect}"


def _budget(config: Config, budget: Budget) -> str:
    cost = cost_per_image(config.method)
    vanilla = budget.epochs * cost / config.budget.epochs
    return (
        f"budget     {budget.epochs} epochs of {budget.steps_per_epoch:,} steps "
        f"at {float(cost):g} image passes per image = {budget.image_passes:,} image passes, "
        f"{float(vanilla):.3f} x vanilla's"
    )


def _sizes(config: Config, budget: Budget) -> list[str]:
    """Sizes of training and from where each holds; image passes are counted whatever their size."""
    whole = math.prod(config.data.sides)
    trained = [math.prod(sides_of(budget.size_in(epoch))) for epoch in range(budget.epochs)]
    share = sum(trained) / (whole * budget.epochs)
    (_, first), *later = budget.sizes
    told = [f"{share:.3f} x the pixels of {size_in_words(config.data.size)} px", f"{first} px"]
    changes = []
    for number, (epoch, size) in enumerate(later):
        step = epoch * budget.steps_per_epoch
        said = f"{size} px from epoch {epoch} (step {step:,})"
        if (epoch, size) != later[-1] and later[number + 1][0] == epoch:
            said += ", WITHOUT EFFECT: the next one begins there too"
        changes.append((epoch, said))
    return _in_time(
        "sizes", told, changes, budget.epochs, budget.steps_per_epoch, config.run.max_steps
    )


def _rate(rates: Rates, max_steps: int | None) -> list[str]:
    """Learning rates and from where each holds, counted from 0; then those that never come."""
    match rates.schedule:
        case "milestones":
            return _falls(rates, max_steps)
        case "cosine" | "linear":
            told = [_first_rate(rates, max_steps), *_course(rates, max_steps)]
            return [f"rate       {'; '.join(told)}"]
        case "constant":
            return [f"rate       {_first_rate(rates, max_steps)}, constant"]


def _falls(rates: Rates, max_steps: int | None) -> list[str]:
    changes = []
    for fall in rates.falls:
        rate = f"{fall.lr:g} from epoch {fall.epoch} (step {fall.step:,})"
        if fall.milestones > 1:
            rate += f", {fall.milestones} falls at once"
        if fall.step < rates.warmup_steps:
            rate += ", within the warm-up"
        changes.append((fall.epoch, rate))
    n_epochs = rates.steps // rates.steps_per_epoch
    first = _first_rate(rates, max_steps)
    return _in_time("rate", [first], changes, n_epochs, rates.steps_per_epoch, max_steps)


def _in_time(
    word: str,
    told: list[str],
    changes: list[tuple[int, str]],  # the epoch in which each would come, counted from 0
    n_epochs: int,
    steps_per_epoch: int,
    max_steps: int | None,
) -> list[str]:
    """A line of what is told and of the changes that come; lines of those that never do."""
    after_the_end = []
    after_max_steps = []
    for epoch, change in changes:
        if epoch >= n_epochs:
            after_the_end.append(change)
        elif max_steps is not None and epoch * steps_per_epoch >= max_steps:
            after_max_steps.append(change)
        else:
            told.append(change)
    lines = [f"{word:10} {'; '.join(told)}"]
    if after_the_end:
        lines.append(
            f"           WITHOUT EFFECT, the run ends after {n_epochs} epochs: "
            f"{'; '.join(after_the_end)}"
        )
    if after_max_steps:
        lines.append(
            f"           WITHOUT EFFECT, run.max_steps = {max_steps:,} ends the run before: "
            f"{'; '.join(after_max_steps)}"
        )
    return lines


def _first_rate(rates: Rates, max_steps: int | None) -> str:
    if not rates.warmup_steps:
        return f"lr {rates.peak:g}"
    epochs = rates.warmup_steps / rates.steps_per_epoch
    rate = f"lr rises to {rates.peak:g} over {rates.warmup_steps:,} steps ({epochs:.4g} epochs)"
    if max_steps is not None and max_steps < rates.warmup_steps:
        rate += f", run.max_steps = {max_steps:,} ends the run before"
    return rate


def _course(rates: Rates, max_steps: int | None) -> list[str]:
    """Of a rate that falls with every step: its shape, a few points, the last one."""
    shape = "a straight line"
    if rates.schedule == "cosine":
        shape = "half a cosine"
    told = [f"{shape} to {rates.peak * rates.final:g}"]
    last = rates.steps - 1
    cut = max_steps is not None and max_steps < rates.steps
    if cut:
        last = (max_steps or 0) - 1
    falling = rates.steps - rates.warmup_steps
    points = [rates.warmup_steps + quarter * falling // 4 for quarter in (1, 2, 3)]
    for step in sorted({*(point for point in points if point < last), last}):
        epoch = step // rates.steps_per_epoch
        told.append(f"{rates.at(step):.4g} in epoch {epoch} (step {step:,})")
    if cut:
        told[-1] += f", where run.max_steps = {max_steps:,} ends the run"
    return told
