"""The lists of classes are complete, in order, and what their libraries say."""

import re
from importlib.resources import files

import pytest
import torchvision

from fap import class_maps
from fap.class_maps import imagenet

WNID = re.compile(r"n\d{8}")


def of_timm(name: str) -> list[str]:
    return files("timm.data").joinpath("_info", name).read_text().splitlines()


def test_imagenets_classes_are_1000_wnids_in_sorted_order() -> None:
    wnids = imagenet()
    assert len(set(wnids)) == 1000
    assert list(wnids) == sorted(wnids) == of_timm("imagenet_synsets.txt")
    assert all(WNID.fullmatch(wnid) for wnid in wnids)


def test_the_order_is_that_of_published_weights() -> None:
    """torchvision's words for its outputs name the same things, one by one."""
    lemmas = dict(line.split("\t") for line in of_timm("imagenet_synset_to_lemma.txt"))
    words = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    other = [
        (word, lemmas[wnid])
        for word, wnid in zip(words, imagenet(), strict=True)
        if word.lower() not in lemmas[wnid].lower()
    ]
    # Two that torchvision made distinct: two cranes, two maillots.
    assert other == [("crane bird", "crane"), ("maillot tank suit", "maillot, tank suit")]


def test_every_imagenet_weight_of_torchvision_has_these_outputs() -> None:
    words = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    checked = 0
    for name in torchvision.models.list_models():
        for weights in torchvision.models.get_model_weights(name):
            categories = weights.meta.get("categories") or ()
            if weights.name.startswith("IMAGENET1K") and len(categories) == 1000:
                assert categories == words, weights
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_200_of_them(name: str) -> None:
    wnids = getattr(class_maps, name)()
    assert list(wnids) == sorted(wnids) == sorted(of_timm(f"{name}_synsets.txt"))
    assert len(set(wnids)) == 200
    assert set(wnids) < set(imagenet())


def test_sixteen_categories() -> None:
    categories = class_maps.sixteen_categories()
    assert list(categories) == sorted(categories)
    # The lengths of the authors' lists of numbers.
    assert {name: len(wnids) for name, wnids in categories.items()} == {
        "airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3,
        "cat": 6, "chair": 4, "clock": 3, "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1,
        "oven": 1, "truck": 8,
    }  # fmt: skip
    meant = [wnid for wnids in categories.values() for wnid in wnids]
    assert len(set(meant)) == len(meant) == 207
    assert set(meant) < set(imagenet())
    numbers = [imagenet().index(wnid) for wnid in categories["cat"]]
    assert numbers == [281, 282, 283, 284, 285, 286]
    numbers = [imagenet().index(wnid) for wnid in categories["truck"]]
    assert numbers == [555, 569, 656, 675, 717, 734, 864, 867]


def test_cifar100s_names_follow_the_alphabet() -> None:
    names = class_maps.cifar100()
    assert list(names) == sorted(set(names))
    assert len(names) == 100
    assert (names[0], names[99]) == ("apple", "worm")
