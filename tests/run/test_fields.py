"""Every config field acts: one case per field.

Changing a field changes something that can be seen from outside. A field that is new must get a
case, or `test_every_field_has_a_case` fails. test_wiring.py compares what arrives, field by field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fap.cli import eval as eval_cli
from fap.cli import train as train_cli
from fap.config import make_config
from fap.run.train import Run
from tests.run.wiring import FIELDS, OF_DETECTION, Doubled, Seen, observe, value_of


@dataclass(frozen=True)
class Case:
    """`change` on top of `base` makes each of the aspects another one."""

    change: str
    aspects: tuple[str, ...]
    base: tuple[str, ...] = ()
    error: str = ""  # of the changed run; "" = it trains to its end


NO_GPU = ""  # a case's error where there is none
NO_GRAPH = ""
if not torch.cuda.is_available():
    NO_GPU = "sees no GPU"
    NO_GRAPH = "need a GPU"
SEPARATELY = (
    "method.name=decoupled",
    "method.eps_255=4",
    "method.attack_steps=2",
    "run.max_steps=2",
)
FIVE = ("data.train={five}", "data.val={five}", "model.num_classes=5")
PAD = ("data.crop=pad",)
DALI = ("data.pipeline=dali",)
BILINEAR = ("data.pipeline=ffcv", "data.filter=bilinear")
MIX = ("data.mix=mixup",)
CONSTANT = ("budget.milestones=null", "budget.lr_schedule=constant")
COSINE = ("budget.milestones=null", "budget.lr_schedule=cosine")
EITHER = ("data.mix=either",)
DIVERGES = ("optim.lr=1e30", "run.max_skipped=4")
ADAMW = ("optim.name=adamw",)
LAYERS = ("model.name=timm/test_resnet", "data.size=32", "data.resize=32", "run.max_steps=2")
ATTACK = ("adversarial", "weights")
WEIGHTS = ("row weights", "weights")
WINDOW = ("plan.window", "input.images")
RANDAUGMENT = ("data.augment=randaugment",)
PIXELS = ("plan.augment", "input.images", "weights")
CASES = {
    "name": Case("name=other", ("folder",)),
    "seed": Case("seed=5", ("folder", "start", "seeds", "plan.index", "plan.noise_key", "weights")),
    "task": Case("task=doubled", ("task", "weights")),
    "model.name": Case("model.name=cifar_resnet14", ("model",)),
    "model.num_classes": Case("model.num_classes=4", ("error",), FIVE, error="num_classes"),
    "model.drop_path": Case(
        "model.drop_path=0.9", ("weights",), (*LAYERS, "model.name=timm/resnet10t")
    ),
    "model.init": Case("model.init={weights}", ("start", "weights")),
    "method.name": Case("method.name=noise", ATTACK),
    "method.group_rows": Case("method.group_rows=8", ("plan.noise_key", *ATTACK)),
    "method.p_adv": Case("method.p_adv=1/2", ("passes", "row weights", "plan.shuffle", "steps")),
    "method.schedule": Case("method.schedule=pipelined", ("passes", "weights")),
    "method.eps_255": Case("method.eps_255=4", ATTACK),
    "method.step_255": Case("method.step_255=1.5", ATTACK),
    "method.attack_steps": Case("method.attack_steps=4", ATTACK, SEPARATELY),
    "method.random_start": Case("method.random_start=false", ATTACK),
    "method.targeted": Case("method.targeted=false", ATTACK, SEPARATELY),
    "method.attack_bn": Case("method.attack_bn=batch", ATTACK, SEPARATELY),
    "method.weight_clean": Case("method.weight_clean=2", WEIGHTS),
    "method.weight_noise": Case("method.weight_noise=1", WEIGHTS),
    "method.weight_adv": Case("method.weight_adv=1", WEIGHTS),
    "method.sync": Case("method.sync=false", WEIGHTS),
    "method.combine": Case("method.combine=mean", WEIGHTS),
    "method.aux": Case("method.aux=none", ("model", "passes", *WEIGHTS)),
    "method.shuffle": Case("method.shuffle=off", ("plan.shuffle", *ATTACK)),
    "data.train": Case("data.train={other}", ("loaders", "input.images", "weights")),
    "data.val": Case("data.val={other}", ("loaders", "evaluated", "accuracy")),
    "data.val_share": Case(
        "data.val_share=0.2",
        ("plan.index", "input.images", "evaluated", "weights"),
        ("data.val=null", "data.val_share=0.4"),
    ),
    "data.pipeline": Case("data.pipeline=dali", ("loaders",)),
    "data.decode": Case("data.decode=gpu", ("error",), BILINEAR, error="data.decode = 'gpu': "),
    "data.size": Case("data.size=9", ("input.images", "evaluated")),
    "data.sizes": Case("data.sizes=[[0,6],[3,8]]", ("loaders", "input.images", "weights")),
    "data.resize": Case("data.resize=13", ("eval.place", "evaluated")),
    "data.sampling": Case("data.sampling=balanced", ("plan.index", "input.images", "weights")),
    "data.repeats": Case("data.repeats=3", ("plan.index", "input.images", "weights")),
    "data.crop": Case("data.crop=pad", WINDOW),
    "data.filter": Case("data.filter=bilinear", ("input.images", "weights")),
    "data.eval_filter": Case("data.eval_filter=bicubic", ("evaluated",), ("data.resize=13",)),
    "data.scale": Case("data.scale=[0.5,1]", WINDOW),
    "data.ratio": Case("data.ratio=[1,1]", WINDOW),
    "data.pad": Case("data.pad=1", WINDOW, PAD),
    "data.flip": Case("data.flip=0", ("plan.flip", "input.images")),
    "data.augment": Case("data.augment=randaugment", PIXELS),
    "data.augment_ops": Case("data.augment_ops=4", PIXELS, RANDAUGMENT),
    "data.augment_magnitude": Case("data.augment_magnitude=20", PIXELS, RANDAUGMENT),
    "data.color_jitter": Case("data.color_jitter=[0.4,0.4,0.4,0.1]", PIXELS),
    "data.erase": Case("data.erase=0.5", PIXELS),
    "data.augment_on": Case("data.augment_on=clean", PIXELS, RANDAUGMENT),
    "data.mix": Case(
        "data.mix=cutmix", ("input.mix_lam", "input.mix_box", "input.mix_partner", "weights")
    ),
    "data.mix_alpha": Case("data.mix_alpha=0.1", ("plan.mix_lam", "input.mix_lam", "weights"), MIX),
    "data.cutmix_alpha": Case(
        "data.cutmix_alpha=0.1", ("plan.mix_box", "input.mix_box", "weights"), EITHER
    ),
    "data.mix_per": Case(
        "data.mix_per=row", ("plan.mix_lam", "input.mix_lam", "input.mix_box", "weights"), MIX
    ),
    "data.mix_on": Case(
        "data.mix_on=both", ("plan.mix_partner", "input.mix_partner", *ATTACK), MIX
    ),
    "data.mean": Case("data.mean=[0.1,0.5,0.5]", ("weights", "evaluations")),
    "data.std": Case("data.std=[0.5,0.5,0.1]", ("weights", "evaluations")),
    "data.threads": Case("data.threads=2", ("loaders",), DALI),
    "data.prefetch": Case("data.prefetch=1", ("loaders",), DALI),
    "data.hw_decoder_load": Case("data.hw_decoder_load=0", ("loaders",), DALI),
    "optim.clean_batch": Case("optim.clean_batch=16", ("steps", "rates", "passes", "input.images")),
    "optim.name": Case("optim.name=adamw", ("optimiser", "rates", "weights")),
    "optim.accumulate": Case("optim.accumulate=2", ("passes",)),
    "optim.lr": Case("optim.lr=0.2", ("rates", "weights")),
    "optim.momentum": Case("optim.momentum=0.5", ("optimiser", "weights")),
    "optim.nesterov": Case("optim.nesterov=true", ("optimiser", "weights")),
    "optim.betas": Case("optim.betas=[0.5,0.9]", ("optimiser", "weights"), ADAMW),
    "optim.eps": Case("optim.eps=0.01", ("optimiser", "weights"), ADAMW),
    "optim.weight_decay": Case("optim.weight_decay=0.1", ("optimiser", "weights")),
    "optim.decay_on": Case("optim.decay_on=weights", ("optimiser", "weights")),
    "optim.head_lr_scale": Case("optim.head_lr_scale=10", ("optimiser", "weights")),
    "optim.layer_decay": Case("optim.layer_decay=0.5", ("optimiser", "weights"), LAYERS),
    "optim.freeze": Case("optim.freeze=[conv1]", ("optimiser", "weights")),
    "optim.ema": Case("optim.ema=0.9", ("evaluations", "accuracy", "kept")),
    "optim.label_smoothing": Case("optim.label_smoothing=0.2", ("weights",)),
    "optim.class_weights": Case("optim.class_weights=[1,2,3,4]", ("weights",)),
    "optim.clip_norm": Case("optim.clip_norm=0.01", ("weights",)),
    "budget.epochs": Case("budget.epochs=8", ("steps",)),
    "budget.warmup_epochs": Case("budget.warmup_epochs=1", ("rates", "weights")),
    "budget.lr_schedule": Case("budget.lr_schedule=linear", ("rates", "weights"), CONSTANT),
    "budget.final_lr": Case("budget.final_lr=0.5", ("rates", "weights"), COSINE),
    "budget.milestones": Case("budget.milestones=[4]", ("rates", "weights")),
    "budget.gamma": Case("budget.gamma=0.5", ("rates", "weights")),
    "budget.same_budget": Case("budget.same_budget=false", ("steps",)),
    "run.dir": Case("run.dir={runs}/deeper", ("folder",)),
    "run.device": Case("run.device=cuda", ("device",), error=NO_GPU),
    "run.amp": Case("run.amp=bf16", ("weights", "evaluations")),
    "run.graph": Case("run.graph=on", ("runner",), error=NO_GRAPH),
    "run.norm_kernel": Case("run.norm_kernel=framework", ("kernel",)),
    "run.compile": Case("run.compile=true", ("compiled",)),
    "run.torch_threads": Case("run.torch_threads=2", ("threads",)),
    "run.max_steps": Case("run.max_steps=3", ("steps",)),
    "run.log_every": Case("run.log_every=2", ("log",), ("run.eval_every=9",)),
    "run.checkpoint_every": Case("run.checkpoint_every=1", ("checkpoints",)),
    "run.keep": Case("run.keep=1", ("checkpoints",)),
    "run.keep_best": Case("run.keep_best=false", ("checkpoints",)),
    "run.eval_every": Case("run.eval_every=1", ("evaluations", "evaluated")),
    "run.eval_batch": Case("run.eval_batch=7", ("eval.index",)),
    "run.max_skipped": Case("run.max_skipped=2", ("steps",), DIVERGES, error="2 non-finite"),
}
ELSEWHERE = {"resume", "paper"}  # the tests of these names below


@pytest.fixture(scope="module")
def bases(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, ...]], Seen]:
    """The runs without the changes, each made once."""
    made: dict[tuple[str, ...], Seen] = {}

    def base(words: tuple[str, ...]) -> Seen:
        if words not in made:
            made[words] = observe(words, files, tmp_path_factory.mktemp("base") / "runs")
        return made[words]

    return base


def test_every_field_has_a_case() -> None:
    missing = "give the new field a case in which changing it changes something"
    assert set(CASES) | ELSEWHERE | OF_DETECTION == set(FIELDS), missing
    for name, case in CASES.items():
        assert case.change.startswith(f"{name}="), "a case changes its own field, and no other"
        assert case.aspects


def test_the_same_run_shows_the_same(
    bases: Callable[[tuple[str, ...]], Seen], files: dict[str, Path], tmp_path: Path
) -> None:
    """Else the cases below would prove nothing."""
    assert observe((), files, tmp_path / "runs").aspects() == bases(()).aspects()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_changing_a_field_changes_what_it_is_about(
    name: str, bases: Callable[[tuple[str, ...]], Seen], files: dict[str, Path], tmp_path: Path
) -> None:
    case = CASES[name]
    base = bases(case.base)
    changed = observe((*case.base, case.change), files, tmp_path / "runs")
    assert value_of(changed.config, name) != value_of(base.config, name)
    if name != "run.max_skipped":
        assert base.error == ""
    assert case.error in changed.error
    assert bool(case.error) == bool(changed.error), changed.error
    before = base.aspects()
    after = changed.aspects()
    for aspect in case.aspects:
        assert aspect in before.keys() | after.keys()
        assert before.get(aspect) != after.get(aspect), f"{case.change} left {aspect} as it was"


def test_task(
    bases: Callable[[tuple[str, ...]], Seen], files: dict[str, Path], tmp_path: Path
) -> None:
    """Its model, its targets, its losses and its evaluator are the run's."""
    once = bases(())
    twice = observe(["task=doubled"], files, tmp_path / "runs")
    assert twice.run is not None
    assert isinstance(twice.run.task, Doubled)
    # From the same weights and images the same losses, but twice.
    for kind in ("clean", "noise"):
        assert twice.records[0][f"loss_{kind}"] == 2 * once.records[0][f"loss_{kind}"]
        assert twice.records[0][f"acc_{kind}"] == once.records[0][f"acc_{kind}"]
    resumed = observe(["task=doubled", "resume=auto"], files, tmp_path / "runs")
    assert resumed.error == ""
    refused = observe(["task=classification", "resume=auto"], files, tmp_path / "runs")
    assert "trained with other settings" in refused.error


def test_resume(files: dict[str, Path], tmp_path: Path) -> None:
    half = observe(["run.max_steps=4"], files, tmp_path / "runs")
    assert len(half.inputs) == 4
    never = observe(["resume=never"], files, tmp_path / "runs")
    assert "never overwritten" in never.error
    assert never.inputs == []
    auto = observe(["resume=auto"], files, tmp_path / "runs")
    whole = observe(["resume=auto"], files, tmp_path / "another" / "runs")
    assert (len(auto.inputs), len(whole.inputs)) == (4, 8)
    assert torch.equal(auto.weights[-1], whole.weights[-1])


def test_a_run_is_not_resumed_with_another_filter(files: dict[str, Path], tmp_path: Path) -> None:
    """Named, or meant by another loader."""
    half = observe(["run.max_steps=4"], files, tmp_path / "runs")
    assert half.error == ""
    assert (
        "images     random_resized, area filter; evaluation shorter side 10, centre 8" in half.said
    )
    assert half.run is not None
    for change in ({"filter": "bilinear"}, {"pipeline": "dali"}):
        tree = half.config.model_dump()
        tree["data"] |= change
        with pytest.raises(ValueError, match=r"data\.filter: 'area', now 'bilinear'"):
            Run(make_config(tree | {"resume": "auto"}))


def test_a_filter_that_the_loader_lacks_is_refused(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_cli.main([f"data.train={files['data']}", "data.pipeline=dali", "data.filter=area"])
    assert "data.filter = 'area' with data.pipeline = 'dali'" in capsys.readouterr().err


def test_paper(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fap-eval shows the paper's number beside ours."""
    for number in (12.5, 67.0):
        words = [f"paper.top1={number}", "run.max_steps=1", f"name=n{number:.0f}"]
        seen = observe(words, files, tmp_path / "runs")
        assert seen.run is not None
        newest = seen.run.saving.checkpoints.paths()[-1]
        to = ["--device", "cpu", "--pipeline", "reference", "--out", str(tmp_path / "eval")]
        capsys.readouterr()
        eval_cli.main([str(newest), "--data", str(files["data"]), *to])
        assert f"(paper {number:g})" in capsys.readouterr().out
