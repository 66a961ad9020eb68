"""Labels are matched by names wherever there are any, and by position only where it is allowed."""

import pytest

from fap.tasks.labels import match_classes, match_labels


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
    some = match_labels(["3", "10"], (0, 1), numbers, 12, restrict=True)
    assert some.label_map.tolist() == [3, 10]
    assert some.how == "by name (2 of 12 classes)"
    assert some.restrict
    assert match_labels(numbers, (0, 11), numbers, 12, by_position=True).how == "by name"
    with pytest.raises(ValueError, match="none of the model's 12 classes, the first being 'x'"):
        match_labels([*as_text[:11], "x"], (0, 11), numbers, 12, by_position=True)


def test_labels_by_position_only_where_nothing_else_is_known_or_it_is_asked_for() -> None:
    names = ("a", "b", "c")
    neither = "by position (neither side has class names)"
    assert match_labels(None, (0, 2), None, 3) == (neither, None, False)
    assert match_labels(None, (0, 1), None, 3).label_map is None
    for data, model, side in ((names, None, "the checkpoint"), (None, names, "the data")):
        with pytest.raises(ValueError, match=f"{side} has no class names.*--labels-by-position"):
            match_labels(data, (0, 2), model, 3)
        found = match_labels(data, (0, 2), model, 3, by_position=True)
        how = f"by position (allowed by --labels-by-position; {side} has no class names)"
        assert found == (how, None, False)
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


@pytest.mark.parametrize(("names", "classes", "who"), [
    (None, None, "neither the checkpoint nor the data"),
    (("a", "b"), None, "the checkpoint has none"),
    (None, ("a", "b"), "the data has none"),
])  # fmt: skip
def test_imagenet_r_needs_names(
    names: tuple[str, ...] | None, classes: tuple[str, ...] | None, who: str
) -> None:
    with pytest.raises(ValueError, match=f"only the logits of its own classes count.*{who}"):
        match_labels(names, (0, 1), classes, 2, by_position=True, restrict=True)
