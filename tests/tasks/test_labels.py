"""Labels are matched by names wherever there are any, and by position only where it is allowed."""

from dataclasses import replace

import pytest
import torch

from fap.tasks.labels import ClassMap, compared, match_classes, match_labels


def test_each_class_is_found_by_its_name() -> None:
    assert match_classes(["d", "b"], ["a", "b", "c", "d"]).tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"1 of the 2 classes.*'n02'"):
        match_classes(["n00000003", "n02"], [f"n{i:08d}" for i in range(12)])
    for names, classes in ((["a", "a"], ["a", "b"]), (["a"], ["a", "b", "b"])):
        with pytest.raises(ValueError, match="twice"):
            match_classes(names, classes)


def test_labels_are_matched_by_name_wherever_there_are_names() -> None:
    numbers = tuple(str(i) for i in range(12))
    as_text = sorted(numbers)  # 0, 1, 10, 11, 2: how the folders stand
    found = match_labels(as_text, (0, 11), numbers, 12)
    assert found.label_map.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert found.how == "by name (12 of 12 classes)"
    assert not found.restrict
    assert match_labels(numbers, (0, 11), numbers, 12, by_position=True).how == "by name"
    with pytest.raises(ValueError, match="none of the model's 12 classes, the first being 'x'"):
        match_labels([*as_text[:11], "x"], (0, 11), numbers, 12, by_position=True)


def test_labels_by_position_only_where_nothing_else_is_known_or_it_is_asked_for() -> None:
    names = ("a", "b", "c")
    neither = "by position (neither side has class names)"
    assert match_labels(None, (0, 2), None, 3) == (neither, None, False, None)
    assert match_labels(None, (0, 1), None, 3).label_map is None
    for data, model, side in ((names, None, "the checkpoint"), (None, names, "the data")):
        with pytest.raises(ValueError, match=f"{side} has no class names.*--labels-by-position"):
            match_labels(data, (0, 2), model, 3)
        found = match_labels(data, (0, 2), model, 3, by_position=True)
        how = f"by position (allowed by --labels-by-position; {side} has no class names)"
        assert found == (how, None, False, None)
    with pytest.raises(ValueError, match="3 classes and the model 4"):
        match_labels(names, (0, 2), None, 4, by_position=True)


@pytest.mark.parametrize(("names", "labels", "classes"), [
    (None, (0, 3), None),
    (None, (-1, 2), None),
    (None, (0, 3), ("a", "b", "c")),
    (("a", "b"), (0, 2), ("a", "b", "c")),
    (("a", "b", "c"), (-1, 2), ("a", "b", "c")),
])  # fmt: skip
def test_labels_beyond_the_classes(
    names: tuple[str, ...] | None, labels: tuple[int, int], classes: tuple[str, ...] | None
) -> None:
    with pytest.raises(ValueError, match=f"its labels are {labels[0]} to {labels[1]}"):
        match_labels(names, labels, classes, 3, by_position=True)


# ---------------------------------------------------------------------- published maps

OBJECTS = ClassMap(
    "Objects", "by its map", {"clock": ("c1", "c2"), "fan": ("f",), "cup": ("k1", "k2", "k3")}
)
MODEL = ("x", "k2", "f", "c2", "k1", "y", "c1", "k3")


def renditions(restrict: bool) -> ClassMap:
    return ClassMap("Renditions", "by name", {name: (name,) for name in "abcd"}, restrict)


def test_the_mask_is_the_sets_whole_list_whatever_folders_are_there() -> None:
    """With two folders of four the logits of all four count: of two the number would be higher."""
    found = match_labels(("b", "d"), (0, 1), tuple("dxcbay"), 6, class_map=renditions(True))
    assert found.groups.tolist() == [[4], [3], [2], [0]]  # a, b, c, d among the model's
    assert found.label_map.tolist() == [1, 3]
    assert found.restrict
    assert found.how == "by name (2 of Renditions's 4 classes; only the logits of these 4 count)"
    everything = match_labels(("b", "d"), (0, 1), tuple("dxcbay"), 6, class_map=renditions(False))
    assert not everything.restrict
    assert everything.how == "by name (2 of Renditions's 4 classes; all 6 logits count)"


def test_a_model_of_other_classes_is_masked_by_what_the_folder_holds_and_that_is_said() -> None:
    found = match_labels(("c", "z"), (0, 1), tuple("zxc"), 3, class_map=renditions(True))
    assert (found.label_map.tolist(), found.groups) == ([2, 0], None)
    assert found.restrict
    why = "only their logits count: the model lacks some of Renditions's"
    assert found.how == f"by name (2 of 3 classes), {why}"


def test_a_class_may_be_several_of_the_models() -> None:
    found = match_labels(("cup", "clock"), (0, 1), MODEL, 8, class_map=OBJECTS)
    assert found.groups.tolist() == [[6, 3, 6], [2, 2, 2], [4, 1, 7]]
    assert found.label_map.tolist() == [2, 0]
    several = "2 of Objects's 3 classes, which are 6 of the model's"
    assert found.how == f"by its map ({several}; all 8 logits count)"


def test_what_does_not_fit_a_map_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"1 of its 2 classes are none of Objects's 3.*'lamp'.*cup"
    ):
        match_labels(("cup", "lamp"), (0, 1), MODEL, 8, class_map=OBJECTS)
    with pytest.raises(ValueError, match=r"Objects's classes are ImageNet's, and 2 of those.*'c1'"):
        match_labels(("cup", "fan"), (0, 1), MODEL[:6], 6, class_map=OBJECTS)
    with pytest.raises(ValueError, match="none of the model's 3 classes"):
        match_labels(("a", "b"), (0, 1), tuple("axy"), 3, class_map=renditions(True))


@pytest.mark.parametrize(("names", "classes", "who"), [
    (None, None, "neither the checkpoint nor the data"),
    (("a", "b"), None, "the checkpoint has none"),
    (None, ("a", "b"), "the data has none"),
])  # fmt: skip
@pytest.mark.parametrize("class_map", [renditions(True), OBJECTS], ids=["names", "map"])
def test_a_published_map_needs_names(
    names: tuple[str, ...] | None, classes: tuple[str, ...] | None, who: str, class_map: ClassMap
) -> None:
    with pytest.raises(ValueError, match=f"class names say which.*{who}.*--classes imagenet"):
        match_labels(names, (0, 1), classes, 2, by_position=True, class_map=class_map)


def test_names_by_themselves_say_when_imagenets_may_be_meant() -> None:
    with pytest.raises(ValueError, match="--classes imagenet"):
        match_labels(("a",), (0, 0), None, 1000)
    with pytest.raises(ValueError, match=r"^((?!imagenet).)*$"):
        match_labels(("a",), (0, 0), None, 10)


@pytest.mark.parametrize("restrict", [False, True])
def test_what_counts_equals_the_twin(restrict: bool) -> None:
    """Row by row: is the best logit of the right class beaten by one of any other class?"""
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(40, 8, generator=generator)
    references = torch.randint(-1, 3, (40,), generator=generator)
    class_map = replace(OBJECTS, restrict=restrict)
    names = ("fan", "cup", "clock")
    matching = match_labels(names, (0, 2), MODEL, 8, class_map=class_map)
    logits, right = compared(outputs, references, matching)
    assert logits.shape[1] == (3 if restrict else 8)
    guesses = logits.argmax(1)
    n_right = 0
    for row, label in enumerate(references.tolist()):
        if label == -1:
            assert right[row] == -1
            continue
        mine = set(OBJECTS.meanings[names[label]])
        by_name = dict(zip(MODEL, outputs[row].tolist(), strict=True))
        if restrict:
            counted = {name for means in OBJECTS.meanings.values() for name in means}
            by_name = {name: value for name, value in by_name.items() if name in counted}
        best = max(by_name, key=lambda name: by_name[name])
        assert bool(guesses[row] == right[row]) == (best in mine)
        assert logits[row, right[row]].item() == max(by_name[name] for name in mine)
        n_right += best in mine
    assert 0 < n_right < 30
