"""The passes of a step: which rows are trained together, and through which batch norms.

A pass is one forward and backward over contiguous blocks of rows. Methods and schedules differ in
nothing but their passes and weights:

    vanilla                   [clean]
    advprop, decoupled        attack (input gradients only), then [clean, adv]
    adversarial_training      attack, then [adv]
    fast_advprop, sequential  [clean]  [noise] -> adv  [adv]           the authors' order
    fast_advprop, parallel    the same, [clean] on a second stream beside [noise] -> adv  [adv]
    fast_advprop, fused       [clean A, noise] -> adv  [clean B, adv]  two equally large passes
    fast_advprop, pipelined   [clean, noise joined with adv of the step before]  -> adv of the next

`optim.accumulate` divides every pass into parts of whole groups, passes of their own that follow
each other: the same rows, groups and weights, and the activations of one part at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from fap.methods import KINDS, Kind
from fap.nets.norm import Bn, Group
from fap.sections import MethodConfig

BlockKind = Kind | Literal["joined"]
"""`joined`: every group holds noise rows and as many adversarial ones (`pipelined`)."""


class Block(NamedTuple):
    """Consecutive rows of one kind inside a pass."""

    kind: BlockKind
    start: int
    """Rows [start, stop) of all those of this kind that the device holds."""
    stop: int
    first_row: int
    """Where they begin in the pass."""
    groups: tuple[Group, ...]

    @property
    def n_rows(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """Their rows in the pass."""
        return slice(self.first_row, self.first_row + self.n_rows)


class Pass(NamedTuple):
    """One forward and backward."""

    blocks: tuple[Block, ...]
    crafting: Block | None
    """The block whose input gradient makes adversarial rows."""
    crafts_last: bool
    """Is it the last of those rows? Only then are adversarial rows made, of all noise rows."""

    @property
    def n_rows(self) -> int:
        return sum(block.n_rows for block in self.blocks)

    @property
    def joins(self) -> bool:
        return any(block.kind == "joined" for block in self.blocks)

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for block in self.blocks for group in block.groups)


class _Span(NamedTuple):
    """A block before its place and its groups are known."""

    kind: BlockKind
    start: int
    stop: int


def rows_of(method: MethodConfig, n_clean: int) -> dict[Kind, int]:
    """Rows of each kind that are trained on a device with `n_clean` clean rows loaded."""
    n_adv = n_clean // method.group_rows * method.adv_group_rows
    n_rows: dict[Kind, int] = {"clean": n_clean, "noise": n_adv, "adv": n_adv}
    return {kind: n_rows[kind] if kind in method.entry.norms else 0 for kind in KINDS}


def passes_of(method: MethodConfig, n_clean: int, accumulate: int = 1) -> list[Pass]:
    """The passes of a step on one device with `n_clean` clean rows, whole groups of them.

    Each is divided into `accumulate` parts. Raises ValueError unless that divides the groups.
    """
    n_groups = n_clean // method.group_rows
    if n_groups % accumulate:
        possible = [str(parts) for parts in range(1, n_groups + 1) if n_groups % parts == 0]
        raise ValueError(
            f"optim.accumulate = {accumulate}: a device has {n_groups} groups of "
            f"{method.group_rows} clean rows, which do not divide into so many equal parts; "
            f"must be {_or(possible)}"
        )
    parts: list[list[_Span]] = []
    for spans in _spans(method, n_clean):
        parts += _divided(spans, method, accumulate)
    return _numbered(parts, method)


def _divided(spans: Sequence[_Span], method: MethodConfig, n_parts: int) -> list[list[_Span]]:
    """A pass as `n_parts` passes, with as many whole groups of each of its blocks.

    Only the halves of the clean groups that `fused` makes may not divide: then some parts have one
    group more.
    """
    parts: list[list[_Span]] = []
    for part in range(n_parts):
        own: list[_Span] = []
        for kind, start, stop in spans:
            group_rows = _group_rows(kind, method)
            n_groups = (stop - start) // group_rows
            first = start + n_groups * part // n_parts * group_rows
            end = start + n_groups * (part + 1) // n_parts * group_rows
            if first < end:
                own.append(_Span(kind, first, end))
        parts.append(own)
    return parts


def _or(values: Sequence[str]) -> str:
    """`1, 2 or 4`."""
    *rest, last = values
    return f"{', '.join(rest)} or {last}" if rest else last


def _spans(method: MethodConfig, n_clean: int) -> list[list[_Span]]:
    n_rows = rows_of(method, n_clean)
    clean = _Span("clean", 0, n_rows["clean"])
    noise = _Span("noise", 0, n_rows["noise"])
    adv = _Span("adv", 0, n_rows["adv"])
    match method.schedule:
        case None:
            return [[span for span in (clean, noise, adv) if span.stop]]
        case "sequential" | "parallel":
            return [[clean], [noise], [adv]]
        case "pipelined":
            return [[clean, _Span("joined", 0, noise.stop + adv.stop)]]
        case "fused":
            # Clean groups are divided so that both passes are equally large; of an odd number of
            # groups the first pass gets one more.
            n_groups = n_clean // method.group_rows
            middle = (n_groups + 1) // 2 * method.group_rows
            second = [_Span("clean", middle, n_clean), adv]
            if middle == n_clean:
                second = [adv]
            return [[_Span("clean", 0, middle), noise], second]


def _numbered(passes: Sequence[Sequence[_Span]], method: MethodConfig) -> list[Pass]:
    """Give every block its place and its groups.

    The groups of one kind are numbered over all passes of the step: together they move the running
    statistics once, by the mean over the groups. So auxiliary norms, through which two kinds go,
    are moved twice (`noise`, then `adv`, as in the authors' code).
    """
    n_seen: dict[BlockKind, int] = {}
    n_all: dict[BlockKind, int] = {}
    n_rows: dict[BlockKind, int] = {}
    for spans in passes:
        for span in spans:
            n_rows[span.kind] = span.stop  # the last one's: they follow each other
            n_groups = (span.stop - span.start) // _group_rows(span.kind, method)
            average = _average(span.kind, method)
            n_all[average] = n_all.get(average, 0) + n_groups

    numbered: list[Pass] = []
    for spans in passes:
        blocks: list[Block] = []
        crafting: Block | None = None
        first_row = 0
        for kind, start, stop in spans:
            group_rows = _group_rows(kind, method)
            average = _average(kind, method)
            first_call = n_seen.get(average, 0)
            n_seen[average] = first_call + (stop - start) // group_rows
            groups = tuple(
                Group(_bn(kind, method), group_rows, call, n_all[average])
                for call in range(first_call, n_seen[average])
            )
            block = Block(kind, start, stop, first_row, groups)
            blocks.append(block)
            first_row += block.n_rows
            if kind in ("noise", "joined"):
                crafting = block
        crafts_last = crafting is not None and crafting.stop == n_rows[crafting.kind]
        numbered.append(Pass(tuple(blocks), crafting, crafts_last))
    return numbered


def _group_rows(kind: BlockKind, method: MethodConfig) -> int:
    match kind:
        case "clean":
            return method.group_rows
        case "noise" | "adv":
            return method.adv_group_rows
        case "joined":
            return 2 * method.adv_group_rows


def _bn(kind: BlockKind, method: MethodConfig) -> Bn:
    if kind == "joined":  # noise and adv, which go through the same norms
        return method.norms["adv"]
    return method.norms[kind]


def _average(kind: BlockKind, method: MethodConfig) -> BlockKind:
    """Under which kind the groups of `kind` are numbered: each number is a call of one average.

    Of what goes through the clean rows' norms there is one for all, because `fused` trains clean
    rows before and after the others.
    """
    clean = method.norms.get("clean")
    return "clean" if _bn(kind, method) == clean else kind
