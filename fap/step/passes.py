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


def passes_of(method: MethodConfig, n_clean: int) -> list[Pass]:
    """The passes of a step on one device with `n_clean` clean rows, whole groups of them."""
    return _numbered(_spans(method, n_clean), method)


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
    for spans in passes:
        for span in spans:
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
        numbered.append(Pass(tuple(blocks), crafting))
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
