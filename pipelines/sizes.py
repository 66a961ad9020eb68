"""The size of what a model sees: a square, or a canvas of two sides."""

Size = int | tuple[int, int]  # pixels: the side of a square, or height and width


def sides_of(size: Size) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def size_in_words(size: Size) -> str:
    """`224`, or `800 x 1344`."""
    if isinstance(size, int):
        return str(size)
    return " x ".join(map(str, size))
