"""What must be the same to resume, field by field, and how a difference is told."""

from pathlib import Path
from typing import Any

import pytest

from fap.config import load_config
from fap.run.resume import check_same_data, check_same_run

PATH = Path("step_1.safetensors")


def differences(saved: list[str], now: list[str]) -> list[str]:
    """The lines of the refusal, of settled configs."""
    settled = ["name=run", "data.pipeline=ffcv", "data.decode=cpu"]
    before = load_config(None, [*settled, *saved])
    after = load_config(None, [*settled, *now])
    try:
        check_same_run(before, after, PATH)
    except ValueError as error:
        first, *lines = str(error).splitlines()
        assert first.startswith("resume=auto: step_1.safetensors was trained with other settings")
        return [line.strip() for line in lines]
    return []


@pytest.mark.parametrize(
    "word",
    [
        "resume=auto", "paper.top1=1", "data.train=x", "data.val=x", "data.threads=3",
        "data.prefetch=7", "data.hw_decoder_load=0.5", "run.dir=elsewhere", "run.device=cpu",
        "run.graph=off", "run.norm_kernel=framework", "run.compile=true", "run.torch_threads=3",
        "run.max_steps=7", "run.log_every=7", "run.checkpoint_every=7", "run.keep=7",
        "run.keep_best=false",
        "run.eval_every=7", "run.eval_batch=7", "run.max_skipped=7",
        "data.pad=7", "data.mix_alpha=7",  # no padding, no mix: without a meaning here
        "data.most_boxes=7",  # no boxes
    ],
)  # fmt: skip
def test_where_a_run_runs_and_how_often_it_reports_may_change(word: str) -> None:
    assert differences([], [word]) == []


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ("name=x", "name: 'run', now 'x'"),
        ("seed=3", "seed: 0, now 3"),
        ("model.name=resnet18", "model.name: 'resnet50', now 'resnet18'"),
        ("method.p_adv=1/3", "method.p_adv: '1/5', now '1/3'"),
        ("method.shuffle=groups", "method.shuffle: 'ranks', now 'groups'"),
        ("data.pipeline=reference", "data.pipeline: 'ffcv', now 'reference'"),
        ("data.filter=bilinear", "data.filter: 'area', now 'bilinear'"),
        ("data.resize=300", "data.resize: 256, now 300"),
        ("data.scale=[0.2, 1]", "data.scale: [0.08, 1.0], now [0.2, 1.0]"),
        ("data.mix=mixup", "data.mix: None, now 'mixup'"),
        ("data.augment=autoaugment", "data.augment: None, now 'autoaugment'"),
        ("data.erase=0.1", "data.erase: 0.0, now 0.1"),
        ("data.sizes=[[0, 128], [6, 160]]", "data.sizes: None, now [[0, 128], [6, 160]]"),
        ("optim.weight_decay=0.1", "optim.weight_decay: 0.0001, now 0.1"),
        ("budget.milestones=[30, 60]", "budget.milestones: [30, 60, 90, 100], now [30, 60]"),
        ("run.amp=off", "run.amp: 'auto', now 'off'"),
        # And not the fields that follow: scale and ratio; a dozen of the method's.
        ("data.crop=pad", "data.crop: 'random_resized', now 'pad'"),
        ("method.name=vanilla", "method.name: 'fast_advprop', now 'vanilla'"),
        ("budget.lr_schedule=cosine", "budget.lr_schedule: 'milestones', now 'cosine'"),
    ],
)
def test_what_a_result_depends_on_may_not(now: str, says: str) -> None:
    assert differences([], [now]) == [says]


def test_filter_and_decoder_count_and_not_how_they_were_named() -> None:
    """Unset they are the loader's own, as in a checkpoint from before there were the fields."""
    assert differences([], ["data.filter=area"]) == []
    assert differences(["data.pipeline=dali"], ["data.pipeline=dali", "data.filter=bilinear"]) == []
    # A checkpoint of before data.decode has none, and CPU cores decoded.
    assert differences(["data.decode=null"], ["data.decode=cpu"]) == []
    bilinear = "data.filter=bilinear"
    assert differences([bilinear], [bilinear, "data.decode=gpu"]) == [
        "data.decode: 'cpu', now 'gpu'"
    ]
    # Of dali it follows from the device, which may change.
    dali = "data.pipeline=dali"
    assert differences([dali, "data.decode=gpu"], [dali, "data.decode=cpu"]) == []
    assert differences([], ["data.pipeline=dali"]) == [
        "data.pipeline: 'ffcv', now 'dali'",
        "data.filter: 'area', now 'bilinear'",
    ]


def test_padding_and_mixing_count_where_they_happen() -> None:
    assert differences(["data.crop=pad"], ["data.crop=pad", "data.pad=7"]) == ["data.pad: 4, now 7"]
    assert differences(["data.mix=mixup"], ["data.mix=mixup", "data.mix_alpha=2"]) == [
        "data.mix_alpha: 1.0, now 2.0"
    ]
    assert differences(["data.mix=mixup"], ["data.mix=mixup", "data.mix_per=row"]) == [
        "data.mix_per: 'batch', now 'row'"
    ]
    assert differences(["data.mix=either"], ["data.mix=either", "data.cutmix_alpha=2"]) == [
        "data.cutmix_alpha: 1.0, now 2.0"
    ]
    assert differences(["data.crop=pad"], ["data.crop=pad", "data.scale=[0.2, 1]"]) == []


def test_augmentation_counts_and_not_how_it_was_named() -> None:
    """Unset its numbers are the policy's own."""
    randaugment = "data.augment=randaugment"
    for word in ("data.augment_ops=2", "data.augment_magnitude=9"):
        assert differences([randaugment], [randaugment, word]) == []
    assert differences([randaugment], [randaugment, "data.augment_magnitude=10"]) == [
        "data.augment_magnitude: 9, now 10"
    ]
    assert differences(["data.erase=0.1"], ["data.erase=0.1", "data.augment_on=clean"]) == [
        "data.augment_on: 'both', now 'clean'"
    ]


def test_letterboxes_count_as_detection_has_them() -> None:
    letterbox = ["task=detection", "data.crop=letterbox", "data.size=[80, 128]"]
    for word in ("data.resize=7", "data.scale=[0.2, 1]", "data.ratio=[1, 1]", "data.pad=7"):
        assert differences(letterbox, [*letterbox, word]) == []
    for word, says in (
        ("data.size=[80, 96]", "data.size: [80, 128], now [80, 96]"),
        ("data.jitter=[0.5, 1]", "data.jitter: [1.0, 1.0], now [0.5, 1.0]"),
        ("data.most_boxes=7", "data.most_boxes: 100, now 7"),
    ):
        assert differences(letterbox, [*letterbox, word]) == [says]


def test_first_weights_may_have_moved_but_not_be_others() -> None:
    assert differences(["model.init=/a/w.safetensors"], ["model.init=/b/w.safetensors"]) == []
    assert len(differences(["model.init=/a/w.safetensors"], ["model.init=/a/v.safetensors"])) == 1
    assert len(differences(["model.init=/a/w.safetensors"], [])) == 1


def test_a_long_value_is_cut() -> None:
    (line,) = differences([], [f"model.init={'x' * 4000}"])
    assert len(line) < 400


SAME_COUNT = "as many images and the same classes"
IDENTITY = {"count": 1234, "classes": ["a", "b"], "content": "00000001"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 5}, "1,234 images, now 5."),
        ({"classes": ["b", "a"]}, "classes ['a', 'b'], now ['b', 'a']."),
        ({"classes": None}, "classes ['a', 'b'], now None."),
        ({"content": "00000002"}, f"{SAME_COUNT}, but another content (00000001, now 00000002)."),
    ],
)
def test_other_data_are_told_by_what_differs(change: dict[str, Any], says: str) -> None:
    check_same_data("data.train", IDENTITY, dict(IDENTITY), PATH)
    with pytest.raises(ValueError) as error:
        check_same_data("data.train", IDENTITY, IDENTITY | change, PATH)
    assert f"was trained with other data than data.train is now: {says}" in str(error.value)
