"""Images of a tree with their labels: in class folders, or flat beside a file of labels."""

from collections import Counter

from pipelines.archives import names as by_name
from pipelines.archives.names import in_class_order, is_image
from pipelines.archives.tree import Tree
from pipelines.files import listed, readable
from pipelines.intake.collection import TreeCollection
from pipelines.intake.label_files import Labels

WITHOUT_LABEL = "images that the labels do not name"


def class_folders(tree: Tree, root: str = "") -> TreeCollection:
    """The images below the class folders of `root`, a folder of the tree ("" or "a/b/").

    Raises:
        ValueError: there are none.
    """
    try:
        found = by_name.class_folders(tree.names, root)
    except ValueError as error:
        raise ValueError(f"{readable(tree.path)}: {error}") from None
    return TreeCollection(
        tree,
        found.files,
        found.labels,
        found.classes,
        f"class folders in {tree.described_as}",
        dict(tree.passed_over + Counter(found.ignored)),
    )


def flat(tree: Tree, labels: Labels, root: str = "") -> TreeCollection:
    """The images of a folder of the tree whose labels stand in a file.

    Raises:
        ValueError: an image that the labels name is not there, or none is.
    """
    ignored = Counter(tree.passed_over)
    found: dict[str, int] = {}  # what the labels call an image, and its number
    for number, name in enumerate(tree.names):
        if not name.startswith(root) or not is_image(name):
            continue
        key = labels.key(name[len(root) :])
        if key not in labels.label_of:
            ignored[WITHOUT_LABEL] += 1
        elif key in found:
            raise ValueError(
                f"{readable(tree.path)}: {readable(tree.names[found[key]])} and {readable(name)}"
                f" are both {readable(key)} in {labels.described_as}"
            )
        else:
            found[key] = number
    missing = [key for key in labels.label_of if key not in found]
    if missing:
        raise ValueError(
            f"{readable(tree.path)}: {len(missing):,} of the {len(labels.label_of):,} images in"
            f" {labels.described_as} are not there: {listed(missing)}"
        )
    keys = list(found)
    numbers = [labels.label_of[key] for key in keys]
    order = in_class_order(numbers, [tree.names[found[key]] for key in keys])
    return TreeCollection(
        tree,
        [found[keys[place]] for place in order],
        [numbers[place] for place in order],
        labels.classes,
        f"images in {tree.described_as}, labels from {labels.described_as}",
        dict(+ignored),
    )
