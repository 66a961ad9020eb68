"""The table of runs: one row per file of this folder. `make configs` writes the files (make.py).

A row says what its run has otherwise than the recipe of its folder; the recipe says what it has
otherwise than the defaults in fap/config.py. Overrides are spelt as on a command line,
`section.field`. A row's paper numbers are percentages; those of ImageNet-C are errors.
"""

from dataclasses import dataclass, field
from typing import Any

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What all runs of one folder share."""

    images: int  # of the training set; only the cost in the header depends on it
    overrides: Overrides
    setting: str = ""  # closes the first line of every header
    task: str = "classification"
    paper_words: str = "percent; ImageNet-C is an error"
    notes: tuple[str, ...] = ()  # what is assumed in every run, a line of the header each
    more: str = ""  # what the command line needs beside the data


@dataclass(frozen=True)
class Row:
    file: str  # FOLDER/NAME; the run is called NAME
    title: str  # what it is, and where in the paper
    overrides: Overrides
    notes: tuple[str, ...] = ()  # what is assumed or read from the paper, a line of the header each
    paper: dict[str, float] = field(default_factory=dict)


RECIPES = {
    "imagenet": Recipe(
        images=1_281_167,
        overrides={"model.num_classes": 1000, "data.filter": "bilinear"},
        notes=(
            "Images are resized by Pillow's filter, in the authors' code by the bilinear one;"
            " data.filter=area is FFCV's way, and less work for a CPU.",
        ),
    ),
    "cifar10": Recipe(
        images=50_000,
        overrides={
            "model.name": "cifar_resnet18",
            "model.num_classes": 10,
            "data.size": 32,
            "data.resize": 32,
            "data.crop": "pad",
            "optim.weight_decay": 5e-4,
            "budget.epochs": 30,
            "budget.milestones": [15, 24, 28],
        },
        setting="ResNet-18 on CIFAR-10, 32 px; the recipe is ours.",
    ),
    "coco": Recipe(
        images=118_287,
        overrides={
            "model.name": "retinanet_resnet50_fpn",
            "model.num_classes": 80,
            "method.group_rows": 8,
            "data.size": [800, 1344],
            "data.crop": "letterbox",
            "data.filter": "bilinear",
            # Those that torchvision's ImageNet weights know.
            "data.mean": [0.485, 0.456, 0.406],
            "data.std": [0.229, 0.224, 0.225],
            "optim.clean_batch": 16,
            "optim.lr": 0.16,
            "optim.clip_norm": 35.0,
            "budget.warmup_epochs": 0.135,
            "budget.epochs": 24,
            "budget.milestones": [16, 22],
        },
        setting="RetinaNet, ResNet-50, COCO.",
        task="detection",
        paper_words="percent AP: map on COCO val2017, coco_c under COCO-C's 15 corruptions",
        notes=(
            "The paper states: RetinaNet, batch norm's running statistics not frozen, 24 epochs for"
            " the baseline and 20 for Fast AdvProp, COCO-C of 15 corruptions. All else is assumed:",
            "a ResNet-50 of ImageNet weights (model.init), batch norm in the backbone alone and"
            " trained, groups of 8 clean and 2 adversarial images; 16 clean images per step at rate"
            " 0.01, momentum 0.9, weight decay 1e-4, 1,000 steps of warm-up, rate / 10 after 16 and"
            " 22 of 24 epochs, gradients clipped at norm 35; focal loss (alpha 0.25, gamma 2) and"
            " L1, anchors of 3 scales and 3 ratios;",
            "images keep their aspect ratio on a canvas of 800 x 1344 (640 or 800 square is faster:"
            " data.size=640), black around them, resized by the bilinear filter; flips, no other"
            " augmentation.",
        ),
        more="model.init=resnet50.safetensors",
    ),
}

# What several rows share.
VANILLA: Overrides = {"method.name": "vanilla"}
FAST: Overrides = {"method.name": "fast_advprop"}
NOISE: Overrides = {"method.name": "noise"}
DECOUPLED: Overrides = {"method.name": "decoupled"}
PGD5: Overrides = {"method.name": "advprop"}
PGD1: Overrides = {"method.name": "advprop", "method.attack_steps": 1, "method.eps_255": 1.0}

MADRY: Overrides = {"method.name": "adversarial_training"}

NO_REBALANCE: Overrides = {"method.weight_noise": 1.0, "method.weight_adv": 1.0}
NO_SYNC: Overrides = {"method.sync": False}
MEAN: Overrides = {"method.combine": "mean", "method.sync": False}

# As many epochs as vanilla training, whatever they cost.
FULL_LENGTH: Overrides = {"budget.same_budget": False}

# Table 6 trains longer; the two alphas are those of the Mixup and CutMix papers for ImageNet.
MIXUP: Overrides = {
    "data.mix": "mixup",
    "data.mix_alpha": 0.2,
    "budget.epochs": 180,
    "budget.milestones": [60, 120],
}
AUGMIX: Overrides = {"data.augment": "augmix", "data.augment_magnitude": 3}
CUTMIX: Overrides = {
    "data.mix": "cutmix",
    "data.mix_alpha": 1.0,
    "budget.epochs": 210,
    "budget.milestones": [75, 150, 180],
}

READ_FROM_PAPER = (
    "Read from the paper (section 3.2.2), which states neither for this method: targeted attacks,"
    " through running statistics."
)
ASSUMED_PGD5 = (
    "Our assumptions: eps 4 and step 1 in grey levels (AdvProp paper; Fast AdvProp states none),"
    " weights 1 : 1, no update-speed sync."
)
ASSUMED_PGD1 = (
    "Our assumptions: eps 1 and step 1 in grey levels as for Fast AdvProp's PGD-1, weights 1 : 1,"
    " no update-speed sync."
)
ASSUMED_DECOUPLED = (
    "Our assumptions: 105 epochs, as the other rows of Table 2; weights 1 : 1, no update-speed"
    " sync."
)
ASSUMED_MADRY = (
    "Our assumptions: AdvProp's attack (eps 4, step 1, 5 steps), but untargeted, through running"
    " statistics."
)
ASSUMED_MIXUP = (
    "Our assumption: alpha 0.2 (the Mixup paper's value for ImageNet; this paper states none)."
)
ASSUMED_CUTMIX = (
    "Our assumption: alpha 1.0 (the CutMix paper's value for ImageNet; this paper states none)."
)

# ---------------------------------------------------------------------- recipes of today, ours
# What most people train with now, for vanilla training and at equal cost for Fast AdvProp, whose
# clean rows alone are mixed. Nothing here is a row of the paper.

# torchvision's "new recipe" (its ResNet50_Weights.IMAGENET1K_V2), as far as our fields go.
TORCHVISION: Overrides = {
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
    "data.augment": "trivialaugment",
    "data.erase": 0.1,
    "data.mix": "either",
    "data.mix_alpha": 0.2,
    "data.cutmix_alpha": 1.0,
    "data.repeats": 4,
    "optim.clean_batch": 1024,
    "optim.lr": 0.125,
    "optim.weight_decay": 2e-5,
    "optim.decay_on": "weights",
    "optim.label_smoothing": 0.1,
    "optim.ema": 0.99997,
    "budget.epochs": 600,
    "budget.lr_schedule": "cosine",
    "budget.warmup_epochs": 5,
}
# What DeiT, Swin and ConvNeXt have in common; ViT-S/16 is DeiT-S.
TRANSFORMER: Overrides = {
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
    "data.filter": "bicubic",
    "data.eval_filter": "bicubic",
    "data.augment": "randaugment",
    "data.augment_ops": 2,
    "data.augment_magnitude": 9,
    "data.erase": 0.25,
    "data.mix": "either",
    "data.mix_alpha": 0.8,
    "data.cutmix_alpha": 1.0,
    "optim.name": "adamw",
    "optim.clean_batch": 1024,
    "optim.lr": 2.5e-4,
    "optim.weight_decay": 0.05,
    "optim.decay_on": "weights",
    "optim.label_smoothing": 0.1,
    "optim.ema": 0.9999,
    "budget.epochs": 300,
    "budget.lr_schedule": "cosine",
}
# Trained at a smaller size than they are evaluated at.
RESNET50_MODERN = TORCHVISION | {"data.resize": 232, "data.sizes": [[0, 176]]}
EFFICIENTNETV2_S = TORCHVISION | {
    "model.name": "efficientnet_v2_s",
    "data.size": 384,
    "data.resize": 384,
    "data.sizes": [[0, 300]],
}
VIT_S16 = TRANSFORMER | {
    "model.name": "timm/vit_small_patch16_224",
    "model.drop_path": 0.1,
    "data.repeats": 3,
    "budget.warmup_epochs": 5,
}
CONVNEXT_T = TRANSFORMER | {
    "model.name": "timm/convnext_tiny",
    "model.drop_path": 0.1,
    "budget.warmup_epochs": 20,
}

ROWS_1024 = (
    "1,024 clean rows per step: 8 GPUs of 128 (torchrun), or optim.accumulate on fewer, which is"
    " the same step."
)
OF_TORCHVISION = (
    "torchvision's recipe, of its _V2 weights for ResNet-50, but for what we do otherwise: the"
    " average of weights is taken every step, images are mixed within batch-norm groups.",
    ROWS_1024,
)
OF_DEIT = (
    "DeiT-S's recipe (arXiv 2012.12877), but for RandAugment's noise on its magnitude.",
    ROWS_1024,
)
OF_CONVNEXT = (
    "ConvNeXt-T's recipe (arXiv 2201.03545), but for a batch of 4,096, from which the rate is"
    " scaled.",
    ROWS_1024,
)
NO_BATCH_NORM = (
    "A model of layer norms: their auxiliary twins are maps of their own, without statistics, so"
    " nothing is to be shuffled."
)
NO_CLAIM = "No number is claimed: not measured."


def both_ways(
    name: str,
    title: str,
    recipe: Overrides,
    notes: tuple[str, ...],
    *,
    has_batch_norms: bool = True,
) -> list[Row]:
    """A recipe for vanilla training, and at equal cost for Fast AdvProp."""
    fast = FAST | recipe
    notes_of_fast = notes
    if not has_batch_norms:
        fast |= {"method.shuffle": "off"}
        notes_of_fast += (NO_BATCH_NORM,)
    ours = "Ours, no row of the paper."
    return [
        Row(
            f"imagenet/{name}_vanilla",
            f"{title}, vanilla training. {ours}",
            VANILLA | recipe,
            (*notes, NO_CLAIM),
        ),
        Row(
            f"imagenet/{name}_fast_advprop",
            f"{title}, Fast AdvProp at equal cost. {ours}",
            fast,
            (*notes_of_fast, NO_CLAIM),
        ),
    ]


MODERN = [
    *both_ways("resnet50_modern", "ResNet-50, a recipe of today", RESNET50_MODERN, OF_TORCHVISION),
    *both_ways("vit_s16", "ViT-S/16", VIT_S16, OF_DEIT, has_batch_norms=False),
    *both_ways("convnext_t", "ConvNeXt-T", CONVNEXT_T, OF_CONVNEXT, has_batch_norms=False),
    *both_ways("efficientnetv2_s", "EfficientNetV2-S", EFFICIENTNETV2_S, OF_TORCHVISION),
]

IMAGENET = [
    # ---------------------------------------------------------------- Tables 1, 2 and 4: ResNet-50
    Row(
        "imagenet/vanilla",
        "Vanilla training, ResNet-50. Tables 1, 2, 3, 4 (p_adv = 0).",
        VANILLA,
        paper={"top1": 76.2, "imagenet_c": 58.5, "imagenet_r": 36.3, "stylized": 7.8},
    ),
    Row(
        "imagenet/advprop_pgd5",
        "AdvProp with PGD-5 at 7 times the cost. Tables 1, 2.",
        PGD5 | FULL_LENGTH,
        (ASSUMED_PGD5, READ_FROM_PAPER),
        {"top1": 77.0, "imagenet_c": 52.0, "imagenet_r": 42.3, "stylized": 12.0},
    ),
    Row(
        "imagenet/advprop_pgd5_15epochs",
        "15-epoch PGD-5 AdvProp, ResNet-50. Tables 1, 3.",
        PGD5,
        (ASSUMED_PGD5, READ_FROM_PAPER),
        {"top1": 66.8, "imagenet_c": 66.2, "imagenet_r": 31.7, "stylized": 8.6},
    ),
    Row(
        "imagenet/advprop_pgd1",
        "AdvProp with PGD-1 at 3 times the cost. Tables 1, 2.",
        PGD1 | FULL_LENGTH,
        (ASSUMED_PGD1, READ_FROM_PAPER),
        {"top1": 77.5, "imagenet_c": 54.3, "imagenet_r": 39.5, "stylized": 8.6},
    ),
    Row(
        "imagenet/advprop_pgd1_35epochs",
        "35-epoch PGD-1 AdvProp. Table 1.",
        PGD1,
        (ASSUMED_PGD1, READ_FROM_PAPER),
        {"top1": 73.9, "imagenet_c": 59.6, "imagenet_r": 36.5, "stylized": 9.3},
    ),
    Row(
        "imagenet/fast_advprop",
        "Fast AdvProp, ResNet-50. Tables 1, 3, 4 (p_adv = 0.20), 5 (both; 76.53).",
        FAST,
        paper={"top1": 76.5, "imagenet_c": 56.4, "imagenet_r": 38.2, "stylized": 8.3},
    ),
    Row(
        "imagenet/decoupled",
        "Decoupled training: 20% of the images are attacked, no gradient reuse."
        " Table 2 (1.2 N per epoch).",
        DECOUPLED | FULL_LENGTH,
        (ASSUMED_DECOUPLED, READ_FROM_PAPER),
        {"top1": 76.6, "imagenet_c": 56.8},
    ),
    Row(
        "imagenet/fast_advprop_p11",
        "Fast AdvProp, p_adv = 1/9. Table 4 (0.11).",
        FAST | {"method.p_adv": "1/9"},
        paper={"top1": 76.5},
    ),
    Row(
        "imagenet/fast_advprop_p33",
        "Fast AdvProp, p_adv = 1/3. Table 4 (0.33).",
        FAST | {"method.p_adv": "1/3"},
        paper={"top1": 76.0},
    ),
    Row(
        "imagenet/fast_advprop_p50",
        "Fast AdvProp, p_adv = 1/2. Table 4 (0.50).",
        FAST | {"method.p_adv": "1/2"},
        paper={"top1": 75.4},
    ),
    # ---------------------------------------------------------------- Table 3: deeper networks
    Row(
        "imagenet/resnet101_vanilla",
        "Vanilla training, ResNet-101. Table 3.",
        VANILLA | {"model.name": "resnet101"},
        paper={"top1": 77.8, "imagenet_c": 54.7, "imagenet_r": 40.1, "stylized": 9.1},
    ),
    Row(
        "imagenet/resnet101_advprop_pgd5_15epochs",
        "15-epoch PGD-5 AdvProp, ResNet-101. Table 3.",
        PGD5 | {"model.name": "resnet101"},
        (ASSUMED_PGD5, READ_FROM_PAPER),
        {"top1": 68.6, "imagenet_c": 61.8, "imagenet_r": 34.0, "stylized": 12.3},
    ),
    Row(
        "imagenet/resnet101_fast_advprop",
        "Fast AdvProp, ResNet-101. Table 3.",
        FAST | {"model.name": "resnet101"},
        paper={"top1": 77.8, "imagenet_c": 51.7, "imagenet_r": 41.0, "stylized": 10.8},
    ),
    Row(
        "imagenet/resnet152_vanilla",
        "Vanilla training, ResNet-152. Table 3.",
        VANILLA | {"model.name": "resnet152"},
        paper={"top1": 78.3, "imagenet_c": 52.3, "imagenet_r": 40.5, "stylized": 10.5},
    ),
    Row(
        "imagenet/resnet152_advprop_pgd5_15epochs",
        "15-epoch PGD-5 AdvProp, ResNet-152. Table 3.",
        PGD5 | {"model.name": "resnet152"},
        (ASSUMED_PGD5, READ_FROM_PAPER),
        {"top1": 69.0, "imagenet_c": 59.6, "imagenet_r": 36.2, "stylized": 13.2},
    ),
    Row(
        "imagenet/resnet152_fast_advprop",
        "Fast AdvProp, ResNet-152. Table 3.",
        FAST | {"model.name": "resnet152"},
        paper={"top1": 78.6, "imagenet_c": 49.8, "imagenet_r": 42.0, "stylized": 12.4},
    ),
    # ---------------------------------------------------------------- Table 5: weights and sync
    Row(
        "imagenet/fast_advprop_no_sync_no_rebalance",
        "Fast AdvProp, neither update-speed sync nor equal importance. Table 5, row 1.",
        FAST | NO_SYNC | NO_REBALANCE,
        paper={"top1": 76.2},
    ),
    Row(
        "imagenet/fast_advprop_no_sync",
        "Fast AdvProp without update-speed sync (same importance only). Table 5, row 2.",
        FAST | NO_SYNC,
        paper={"top1": 76.27},
    ),
    Row(
        "imagenet/fast_advprop_no_rebalance",
        "Fast AdvProp with weights 1 : 1 : 1 (sync only). Table 5, row 3.",
        FAST | NO_REBALANCE,
        paper={"top1": 76.35},
    ),
    # ---------------------------------------------------------------- Table 6: Mixup and CutMix
    Row(
        "imagenet/mixup_vanilla",
        "Mixup. Table 6.",
        VANILLA | MIXUP,
        (ASSUMED_MIXUP,),
        {"imagenet_c": 53.4, "imagenet_r": 41.0, "stylized": 10.0},
    ),
    Row(
        "imagenet/mixup_fast_advprop",
        "Mixup + Fast AdvProp (mixing clean rows only). Table 6.",
        FAST | MIXUP,
        (ASSUMED_MIXUP,),
        {"imagenet_c": 52.2, "imagenet_r": 41.7, "stylized": 10.9},
    ),
    Row(
        "imagenet/cutmix_vanilla",
        "CutMix. Table 6.",
        VANILLA | CUTMIX,
        (ASSUMED_CUTMIX,),
        {"imagenet_c": 58.9, "imagenet_r": 35.2, "stylized": 5.5},
    ),
    Row(
        "imagenet/cutmix_fast_advprop",
        "CutMix + Fast AdvProp (mixing clean rows only). Table 6.",
        FAST | CUTMIX,
        (ASSUMED_CUTMIX,),
        {"imagenet_c": 55.0, "imagenet_r": 36.5, "stylized": 7.0},
    ),
    Row(
        "imagenet/augmix_vanilla",
        "AugMix. Ours, no row of the paper; docs/evidence.md has it on CIFAR-10.",
        VANILLA | AUGMIX,
    ),
    Row(
        "imagenet/augmix_fast_advprop",
        "AugMix + Fast AdvProp. Ours, no row of the paper; docs/evidence.md has it on CIFAR-10.",
        FAST | AUGMIX,
    ),
    # ---------------------------------------------------------------- section 4.3, appendix A.1
    Row(
        "imagenet/fast_advprop_no_shuffle",
        "Fast AdvProp without shuffling BN. Section 4.3, Figure 2 (74.5 without, 75.1 with;"
        " adversarial training accuracy 88.0).",
        FAST | {"method.shuffle": "off"},
        paper={"top1": 74.5},
    ),
    Row(
        "imagenet/fast_advprop_fgsm",
        "Fast AdvProp without random start (FGSM). Appendix A.1.",
        FAST | {"method.random_start": False},
        paper={"top1": 76.46},
    ),
    # ---------------------------------------------------------------- ours
    Row(
        "imagenet/fast_advprop_sequential",
        "Fast AdvProp in the authors' order of three passes. Same results as fast_advprop, slower.",
        FAST | {"method.schedule": "sequential"},
        paper={"top1": 76.5, "imagenet_c": 56.4, "imagenet_r": 38.2, "stylized": 8.3},
    ),
    Row(
        "imagenet/fast_advprop_pipelined",
        "One pass per step, adversarial rows trained one step after they were crafted."
        " Ours, no row of the paper.",
        FAST | {"method.schedule": "pipelined"},
    ),
    Row(
        "imagenet/fast_advprop_mean",
        "Algorithm 1 to the letter: means of the three gradients with beta = 0.5."
        " No row of the paper: an ablation of ours.",
        FAST | MEAN,
    ),
    Row(
        "imagenet/noise",
        "Control: the passes of Fast AdvProp with a random sign instead of the gradient's."
        " Ours, no row of the paper.",
        NOISE,
    ),
    Row(
        "imagenet/adversarial_training",
        "Single-norm adversarial training (Madry et al., 2018) at equal cost."
        " Ours, no row of the paper.",
        MADRY,
        (ASSUMED_MADRY,),
    ),
]

CIFAR10 = [
    Row("cifar10/vanilla", "Vanilla training.", VANILLA),
    Row("cifar10/advprop_pgd5", "AdvProp with PGD-5 at equal cost.", PGD5, (READ_FROM_PAPER,)),
    Row("cifar10/advprop_pgd1", "AdvProp with PGD-1 at equal cost.", PGD1, (READ_FROM_PAPER,)),
    Row("cifar10/decoupled", "Decoupled training at equal cost.", DECOUPLED, (READ_FROM_PAPER,)),
    Row("cifar10/noise", "Control: random sign instead of the gradient's.", NOISE),
    Row(
        "cifar10/adversarial_training",
        "Single-norm adversarial training at equal cost.",
        MADRY,
        (ASSUMED_MADRY,),
    ),
    Row("cifar10/fast_advprop", "Fast AdvProp.", FAST),
    Row("cifar10/fast_advprop_p11", "Fast AdvProp, p_adv = 1/9.", FAST | {"method.p_adv": "1/9"}),
    Row("cifar10/fast_advprop_p33", "Fast AdvProp, p_adv = 1/3.", FAST | {"method.p_adv": "1/3"}),
    Row("cifar10/fast_advprop_p50", "Fast AdvProp, p_adv = 1/2.", FAST | {"method.p_adv": "1/2"}),
    Row("cifar10/fast_advprop_no_sync", "Fast AdvProp without update-speed sync.", FAST | NO_SYNC),
    Row(
        "cifar10/fast_advprop_no_rebalance",
        "Fast AdvProp with weights 1 : 1 : 1.",
        FAST | NO_REBALANCE,
    ),
    Row(
        "cifar10/fast_advprop_no_shuffle",
        "Fast AdvProp without shuffling BN.",
        FAST | {"method.shuffle": "off"},
    ),
    Row(
        "cifar10/fast_advprop_fgsm",
        "Fast AdvProp without random start.",
        FAST | {"method.random_start": False},
    ),
    Row(
        "cifar10/fast_advprop_pipelined",
        "Fast AdvProp, one pass per step.",
        FAST | {"method.schedule": "pipelined"},
    ),
    Row("cifar10/fast_advprop_mean", "Algorithm 1 to the letter.", FAST | MEAN),
    Row("cifar10/mixup_vanilla", "Mixup.", VANILLA | {"data.mix": "mixup"}),
    Row("cifar10/mixup_fast_advprop", "Mixup + Fast AdvProp.", FAST | {"data.mix": "mixup"}),
    Row("cifar10/cutmix_vanilla", "CutMix.", VANILLA | {"data.mix": "cutmix"}),
    Row("cifar10/cutmix_fast_advprop", "CutMix + Fast AdvProp.", FAST | {"data.mix": "cutmix"}),
    Row("cifar10/augmix_vanilla", "AugMix.", VANILLA | AUGMIX),
    Row(
        "cifar10/augmix_fast_advprop",
        "AugMix + Fast AdvProp (docs/evidence.md: a recipe).",
        FAST | AUGMIX,
    ),
]

# Steps of the warm-up are 1,000 of any method. A step of Fast AdvProp and of decoupled training
# takes 20 images of an epoch, and AdvProp's epochs are those of vanilla training divided by 3.
WARM_UP_OF_20: Overrides = {"budget.warmup_epochs": 0.2028}
WARM_UP_OF_PGD1: Overrides = {"budget.warmup_epochs": 0.405}

COCO = [
    Row("coco/vanilla", "Vanilla training. Table 7.", VANILLA, paper={"map": 35.8, "coco_c": 17.6}),
    Row(
        "coco/fast_advprop",
        "Fast AdvProp. Table 7.",
        FAST | WARM_UP_OF_20,
        paper={"map": 35.8, "coco_c": 19.0},
    ),
    Row(
        "coco/decoupled",
        "Decoupled training at equal cost. Ours, no row of the paper.",
        DECOUPLED | WARM_UP_OF_20,
        (READ_FROM_PAPER,),
    ),
    Row(
        "coco/advprop",
        "AdvProp with PGD-1 at equal cost; method.attack_loss=max makes it Det-AdvProp's attack."
        " Ours, no row of the paper.",
        PGD1 | WARM_UP_OF_PGD1,
        (ASSUMED_PGD1, READ_FROM_PAPER),
    ),
]

TABLE = [*IMAGENET, *MODERN, *CIFAR10, *COCO]
