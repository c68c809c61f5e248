"""Which rank holds which tokens, and what the ranks' queries see of each other's keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from attn_numba.problem import Problem
from attn_numba.rules import BlockSparse, Dense, Mask, Padding, PrefixLM, SameDocument, Sizes
from attn_numba.rules.data import AnyArray
from attn_numba.rules.sight import may_see

__all__ = ["LAYOUTS", "Stretch", "chosen_layout", "sight", "stretches_of"]

Stretch = tuple[int, int]

LAYOUTS = ("contiguous", "zigzag")
CELLS = 16  # of a rank, to estimate its work
MOST_CELLS = 2048  # of all ranks: the estimate looks at the square of this number
WORTH = 0.98  # a layout is taken in place of the contiguous one if its work is below this share of that one's


def stretches_of(n_tokens: int, ranks: int, layout: str) -> tuple[tuple[Stretch, ...], ...]:
    """Return the stretches of tokens of each rank: neighbors are one stretch, and none is empty.

    Parameters
    ----------
    n_tokens : int
        Tokens of the sequence.
    ranks : int
        How many hold them.
    layout : {"contiguous", "zigzag"}
        One stretch for each; or one of the first half and its mirror image of the second.

    Examples
    --------
    >>> stretches_of(10, 2, "contiguous"), stretches_of(10, 2, "zigzag")
    ((((0, 5),), ((5, 10),)), (((0, 3), (8, 10)), ((3, 8),)))
    """
    if layout == "contiguous":
        found: list[Sequence[Stretch]] = [[chunk] for chunk in _chunks(n_tokens, ranks)]
    else:
        chunks = _chunks(n_tokens, 2 * ranks)
        found = [(chunks[rank], chunks[-1 - rank]) for rank in range(ranks)]
    return tuple(_joined(chunks) for chunks in found)


def _chunks(n: int, count: int) -> list[Stretch]:
    """Cut n tokens into neighboring chunks that differ by one token at most, the longer ones first."""
    ends = [(n // count) * c + min(n % count, c) for c in range(count + 1)]
    return list(pairwise(ends))


def _joined(chunks: Sequence[Stretch]) -> tuple[Stretch, ...]:
    result: list[Stretch] = []
    for first, end in chunks:
        if first == end:
            continue
        if result and result[-1][1] == first:
            result[-1] = (result[-1][0], end)
        else:
            result.append((first, end))
    return tuple(result)


def sight(whole: Problem, rows: Sequence[Stretch], keys: Sequence[Stretch]) -> AnyArray:
    """Return whether the queries of each stretch may see keys of each stretch, a boolean array (rows, keys)."""
    if not rows or not keys:
        return np.zeros((len(rows), len(keys)), bool)
    some, _ = may_see(
        whole.mask, whole.modifiers, whole.sizes, whole.query_offset, whole.key_offset, _ends(rows), _ends(keys)
    )
    return some


def _ends(stretches: Sequence[Stretch]) -> tuple[AnyArray, AnyArray]:
    first, end = np.array(stretches, np.int64).reshape(-1, 2).T
    return first, end


def chosen_layout(n_tokens: int, ranks: int, mask: Mask | None) -> str:
    """Return the layout in which the ring takes the least time: of each of its steps the slowest rank counts.

    Contiguous where that does as well.
    """
    if mask is None or ranks == 1 or n_tokens < 2 * ranks:
        return "contiguous"
    times = {layout: ring_time(n_tokens, ranks, layout, mask) for layout in LAYOUTS}
    best = min(LAYOUTS, key=times.__getitem__)
    return best if times[best] < WORTH * times["contiguous"] else "contiguous"


def ring_time(n_tokens: int, ranks: int, layout: str, mask: Mask) -> float:
    """Return how long a ring takes in a layout, in pairs of query and key: the slowest rank of each step, summed."""
    work = work_of(n_tokens, ranks, layout, mask)
    rows = np.arange(ranks)
    return float(sum(work[rows, (rows - step) % ranks].max() for step in range(ranks)))


def work_of(n_tokens: int, ranks: int, layout: str, mask: Mask) -> AnyArray:
    """Return how many pairs the queries of each rank see among the keys of each rank, about: (ranks, ranks)."""
    cells, owners = [], []
    per_stretch = max(1, min(CELLS, MOST_CELLS // ranks) // 2)
    for rank, stretches in enumerate(stretches_of(n_tokens, ranks, layout)):
        for first, end in stretches:
            inner = [(first + a, first + b) for a, b in _chunks(end - first, per_stretch) if a < b]
            cells += inner
            owners += [rank] * len(inner)
    B, H = _leading_sizes(mask)
    sizes = Sizes(B, H, H, n_tokens, n_tokens, 1, 1)
    some, every = may_see(mask, (), sizes, 0, 0, _ends(cells), _ends(cells))
    lengths = np.array([end - first for first, end in cells], np.float64)
    seen = (some * 0.5 + every * 0.5) * lengths[:, None] * lengths  # a cell that is seen in part: half of it
    whose = np.zeros((ranks, len(cells)))
    whose[owners, np.arange(len(cells))] = 1
    result: AnyArray = whose @ seen @ whose.T
    return result


def _leading_sizes(mask: Mask) -> tuple[int, int]:
    """Return numbers of sequences and of query heads that the arrays of a mask are made for; 1 where it has none."""
    sizes = {"B": 1, "H": 1}
    for leaf in mask.leaves():
        for array, axes in _arrays_of(leaf):
            own = axes[len(axes) - array.ndim :] if len(axes) > array.ndim else axes
            for axis, length in zip(own, array.shape, strict=True):
                if axis in sizes:
                    sizes[axis] = max(sizes[axis], length)
    return sizes["B"], sizes["H"]


def _arrays_of(leaf: Any) -> list[tuple[AnyArray, str]]:
    """Return the arrays of a mask that have an axis of sequences or of heads, and their axes."""
    if isinstance(leaf, Dense):
        return [(leaf.array, "BHMN")]
    if isinstance(leaf, BlockSparse):
        return [(leaf.blocks, "BHMN")]
    if isinstance(leaf, SameDocument):
        return [(np.asarray(x), "BM") for x in (leaf.query_ids, leaf.key_ids) if x is not None]
    if isinstance(leaf, PrefixLM):
        return [(np.asarray(leaf.prefix_lengths), "B")]
    if isinstance(leaf, Padding):
        given = (leaf.key_lengths, leaf.key_starts, leaf.query_lengths)
        return [(np.asarray(x), "B") for x in given if x is not None]
    return []
