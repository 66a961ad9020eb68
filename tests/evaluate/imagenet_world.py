"""A classifier of ImageNet's 1,000 classes and a miniature of each published set, as published.

Nobody trained the classifier. Its last layer is made such that its answers differ from image to
image, and each image is put where some answers are right and some are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fap import checkpoint
from fap.class_maps import imagenet, imagenet_a, sixteen_categories
from fap.evaluate.load import Trained, load_model
from fap.nets.build import build
from tests.evaluate.objectnet_files import MEANT
from tests.evaluate.world import tiny_config
from tests.hostile_meta import valid_meta

SIZE = 32
RESIZE = 36
RED = (255, 0, 0)
MODEL = "imagenet.safetensors"
# A run's classes may stand in any order: it is their names that count.
CLASSES = tuple(np.random.default_rng(0).permutation(imagenet()).tolist())


def pictures(count: int, sides: tuple[int, int], seed: int) -> list[Image.Image]:
    """Smooth ones, of width and height `sides`."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        found.append(small.resize(sides, Image.Resampling.BICUBIC))
    return found


def write_model(path: Path, classes: Sequence[str] = CLASSES) -> None:
    """A run's checkpoint; classes that the small sets have are more likely than others."""
    torch.manual_seed(4)
    model = build("cifar_resnet8", len(classes), aux=True, size=SIZE)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    features = []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        model.eval()(torch.stack([pixels(image) for image in pictures(32, (SIZE, SIZE), 9)]))
        hook.remove()
        spread = features[0].std(0).clamp(min=1e-3)
        last.weight.copy_(torch.randn_like(last.weight) / spread)
        last.bias.copy_(-last.weight @ features[0].mean(0))
        more = dict.fromkeys(imagenet_a(), 3.0)
        more |= {wnid: 3.0 for wnids in sixteen_categories().values() for wnid in wnids}
        more |= {wnid: 11.0 for wnids in MEANT.values() for wnid in wnids}  # few of 1,000
        last.bias += torch.tensor([more.get(name, 0.0) for name in classes])
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.save(path, state, valid_meta(tiny_config(len(classes)), classes))


def pixels(image: Image.Image) -> Tensor:  # float32 (3, H, W)
    """As the checkpoint's config normalises it: mean and std 0.5."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def cropped(image: Image.Image) -> Image.Image:
    """torchvision's Resize(36) and CenterCrop(32)."""
    width, height = image.size
    scale = RESIZE / min(width, height)
    width, height = int(width * scale), int(height * scale)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    return image.crop((left, top, left + SIZE, top + SIZE))


def logits(trained: Trained, images: Sequence[Image.Image]) -> list[dict[str, float]]:
    """Of each image by class name, one image at a time."""
    found = []
    with torch.inference_mode():
        for image in images:
            outputs = trained.model(pixels(image)[None])[0].double().tolist()
            found.append(dict(zip(CLASSES, outputs, strict=True)))
    return found


def best(by_name: dict[str, float], among: Sequence[str] | None = None) -> str:
    return max(among or by_name, key=lambda name: by_name[name])


def saved(image: Image.Image, path: Path) -> Image.Image:
    """The image as whoever reads the file sees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({} if path.suffix == ".png" else {"quality": 95}))
    return Image.open(path).convert("RGB")


def framed(image: Image.Image) -> Image.Image:
    """With ObjectNet's red border of two pixels."""
    whole = Image.new("RGB", (image.width + 4, image.height + 4), RED)
    whole.paste(image, (2, 2))
    return whole


def load(at: Path) -> Trained:
    return load_model(at / MODEL)
