"""Numbers as text in the reports of the demo and of the study: tables, differences.

A library: it measures nothing by itself.
"""

from collections.abc import Sequence

from fap.evaluate.compare import Difference


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up, so that it also reads well in a terminal."""
    widths = [max(len(text) for text in column) for column in zip(head, *lines, strict=True)]
    rule = ["-" * widths[0]]  # the first column is words, the others are numbers
    for width in widths[1:]:
        rule.append("-" * (width - 1) + ":")
    out = []
    for texts in (head, rule, *lines):
        cells = [texts[0].ljust(widths[0])]
        for text, width in zip(texts[1:], widths[1:], strict=True):
            cells.append(text.rjust(width))
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def with_interval(found: Difference, digits: int = 1) -> str:
    """`+1.2 [+0.8, +1.6]`; without an interval, as of one seed, the mean alone."""
    mean = f"{found.mean:+.{digits}f}"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
