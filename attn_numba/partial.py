"""A call computed part by part: some rows of q against some rows of k, results added up as the parts come.

What holds the parts together is each row's sum of exponentials, kept in float64 whatever the dtype: outputs of parts
are averaged by it, and gradients of a part follow from that of the whole. Only a softmax can be computed so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from attn_numba.api import cpu_engine
from attn_numba.parallel import thread_count
from attn_numba.problem import Problem
from attn_numba.rules import Additive, Bilinear, Softmax
from attn_numba.rules.blocks import Block, learned_place
from attn_numba.rules.data import AnyArray
from attn_numba.rules.results import Learned

__all__ = [
    "LearnedSums",
    "Rows",
    "Stretch",
    "Sums",
    "add_attention",
    "add_gradients",
    "add_sink",
    "delta_of",
    "gradient_engine",
    "part_of",
    "pieces",
]

Stretch = tuple[int, int]  # first and end of neighboring rows of the whole sequence
PIECE = 500_000_000  # multiply-adds of a thread between two looks at anything else: about 10 ms
LEAST_ROWS = 512  # of a piece: they share the keys that are packed for it
LEAST_ROWS_OF_GRADIENTS = 2048  # they share one more pass over the sums by those keys


def gradient_engine() -> Any:
    """Return the module that computes gradients on the CPU."""
    cpu_engine()  # raises what there is to say where numba is missing
    from attn_numba.cpu import gradients

    return gradients


def pieces(rows: Stretch, keys: int, problem: Problem, gradients: bool = False) -> Iterator[Stretch]:
    """Yield pieces of a stretch of rows, none of which takes long against so many keys.

    Parameters
    ----------
    rows : (int, int)
        The stretch.
    keys : int
        Rows of k that they meet.
    problem : Problem
        The call.
    gradients : bool, default False
        Whether gradients are computed, not outputs.
    """
    s = problem.sizes
    least = LEAST_ROWS_OF_GRADIENTS if gradients else LEAST_ROWS
    of_row = max(1, s.B * s.H * keys * (s.D + s.E))
    step = max(least, PIECE * thread_count()[0] // of_row // least * least)
    for first in range(*rows, step):
        yield first, min(first + step, rows[1])


def part_of(whole: Problem, q: AnyArray, k: AnyArray, v: AnyArray, rows: Stretch, keys: Stretch) -> Problem:
    """Return the part of a call in which some rows of q meet some rows of k, without the sink.

    Parameters
    ----------
    whole : Problem
        The call as `engine.prepared` returns it, with the sizes of the whole; its arrays are not read.
    q, k, v : arrays (B, H, rows, D), (B, Hk, keys, D), (B, Hk, keys, E)
        Those of the part.
    rows, keys : (int, int)
        Which rows these are.

    Returns
    -------
    Problem
    """
    part = whole.in_block(Block.of_rows(rows, keys, whole.sizes))
    return part._replace(q=q, k=k, v=v, normalizer=Softmax())


class Rows(NamedTuple):
    """What is known of some rows once a part of their keys has been seen.

    Parameters
    ----------
    out : array (B, H, M, E)
        Their output, in the accumulator's dtype; 0 before the first part.
    facts : float64 array (B, H, M, ROW_FACTS)
        What `engine.attention` tells of rows. Scores are counted from the largest one and not from the lse, for far
        from 0 that has no digits left to tell weights apart.
    """

    out: AnyArray
    facts: AnyArray

    @classmethod
    def empty(cls, out: AnyArray) -> Rows:
        """Return rows that have seen nothing; `out` is set to 0."""
        engine = gradient_engine()
        out[...] = 0
        facts = np.zeros((*out.shape[:3], engine.ROW_FACTS))
        facts[..., engine.LARGEST] = facts[..., engine.LSE] = -np.inf
        facts[..., engine.INVERSE] = 1
        return cls(out, facts)

    def at(self, rows: slice) -> Rows:
        """Return some of the rows, a view of them."""
        return Rows(self.out[:, :, rows], self.facts[:, :, rows])

    @property
    def lse(self) -> AnyArray:
        """The lse of the rows in float64, once all parts and the sink have been added."""
        lse: AnyArray = self.facts[..., gradient_engine().LSE]
        return lse


def add_attention(part: Problem, rows: Rows) -> None:
    """Add a part to what other keys gave the same rows.

    Parameters
    ----------
    part : Problem
        As `part_of` returns it.
    rows : Rows
        Those of the part.
    """
    engine = gradient_engine()
    facts = np.empty_like(rows.facts)
    first = bool(np.isneginf(rows.lse).all())
    direct = first and rows.out.dtype == part.q.dtype
    own = rows.out if direct else np.empty(rows.out.shape, part.q.dtype)
    per_unit = cpu_engine().attention_of_prepared(part, own, row_facts=facts) * np.log(2.0)
    if first:
        facts[..., engine.INVERSE][np.isneginf(facts[..., engine.LSE])] = 1
        rows.facts[...] = facts
        if not direct:
            rows.out[...] = own
        return
    with np.errstate(all="ignore"):  # infinities and NaN of rows that see some
        sums = np.where(np.isneginf(facts[..., engine.LSE]), 0, 1 / facts[..., engine.INVERSE])
        before, added = _shares(rows.facts, facts[..., engine.LARGEST], sums, per_unit)
        rows.out[...] *= before.astype(rows.out.dtype)[..., np.newaxis]
        own = own.astype(rows.out.dtype, copy=False)
        own *= added.astype(own.dtype)[..., np.newaxis]
        rows.out[...] += own


def add_sink(problem: Problem, rows: Rows) -> None:
    """Add the sink of a call, if it has one, to what all keys gave.

    Parameters
    ----------
    problem : Problem
        The call, in whose dtype scores are computed.
    rows : Rows
        Rows that have seen all their keys.
    """
    if not isinstance(problem.normalizer, Softmax) or problem.normalizer.sink is None:
        return
    per_unit = _per_unit(problem)
    sink = np.asarray(problem.normalizer.sink_array(problem.sizes))[..., np.newaxis]
    with np.errstate(all="ignore"):
        at = (sink / per_unit).astype(problem.accumulator).astype(np.float64)  # a score that the kernels can write
        sums = np.where(np.isneginf(sink), 0, np.exp(sink - at * per_unit))
        before, _ = _shares(rows.facts, at, sums, per_unit)
        rows.out[...] *= before.astype(rows.out.dtype)[..., np.newaxis]


def _per_unit(part: Problem) -> float:
    """Return what a score in the units of a call's kernel is multiplied by to be that of its softmax."""
    from attn_numba.cpu.binding import bind

    return float(bind(part).factor * np.log(2.0))


def _shares(facts: AnyArray, other: AnyArray, other_sum: AnyArray, per_unit: float) -> tuple[AnyArray, AnyArray]:
    """Put the facts of two sets of keys in place of those of the first; return the share that each has in the weights.

    The other one has sums of exponentials that are counted from a score, its largest.
    """
    engine = gradient_engine()
    mine = facts[..., engine.LARGEST]
    largest = np.maximum(mine, other)
    nothing = np.isneginf(largest)
    shift = np.where(nothing, 0, largest)
    seen = ~np.isneginf(facts[..., engine.LSE])
    own_sum = np.where(seen, np.exp((mine - shift) * per_unit) / facts[..., engine.INVERSE], 0)
    other_sum = np.exp((other - shift) * per_unit) * other_sum
    total = own_sum + other_sum
    facts[..., engine.LARGEST] = largest
    facts[..., engine.LSE] = shift * per_unit + np.log(total)
    total = np.where(total == 0, 1, total)
    facts[..., engine.INVERSE] = 1 / total
    return own_sum / total, other_sum / total


def delta_of(dout: AnyArray, out: AnyArray) -> AnyArray:
    """Return ``sum_e dout * out`` (B, H, M), which the gradients of every part need."""
    delta: AnyArray = np.einsum("bhme,bhme->bhm", dout, out)
    return delta


class LearnedSums:
    """Gradients by the arrays of a call's rules, as sums over parts; float64, in the shapes of the whole arrays.

    Parameters
    ----------
    whole : Problem
        The call, before its score was mapped.
    """

    def __init__(self, whole: Problem) -> None:
        self._whole = whole
        self._sums: dict[int, tuple[Any, dict[str, AnyArray]]] = {}
        for modifier in whole.modifiers:
            if modifier.learned is not None:
                self._begin(modifier, modifier.learned[0])
        if isinstance(whole.normalizer, Softmax) and whole.normalizer.sink is not None:
            self._begin(whole.normalizer, "sink")
        for name in {Bilinear: ("W",), Additive: ("Wq", "Wk", "w")}.get(type(whole.score), ()):
            self._begin(whole.score, name)

    @property
    def score(self) -> Any:
        """The score of the call."""
        return self._whole.score

    def _begin(self, rule: Any, name: str) -> None:
        self._sums.setdefault(id(rule), (rule, {}))[1][name] = np.zeros(np.shape(getattr(rule, name)))

    def add(self, rule: Any, arrays: Mapping[str, AnyArray], place: tuple[slice, ...] | None = None) -> None:
        """Add gradients by arrays of a rule, by name: by whole arrays, or by the part of them at a place."""
        for name, array in arrays.items():
            self._sums[id(rule)][1][name][... if place is None else place] += array

    def add_part(self, part: Problem, learned: Learned, rows: Stretch, keys: Stretch) -> None:
        """Add gradients by the arrays of the rules of a part."""
        originals = {id(p): m for p, m in zip(part.modifiers, self._whole.modifiers, strict=True)}
        for rule, arrays in learned.found():
            original = originals[id(rule)]
            self.add(original, arrays, learned_place(original, Block.of_rows(rows, keys, self._whole.sizes)))

    def arrays(self) -> list[AnyArray]:
        """Return the sums themselves, in an order that depends on the call alone."""
        return [array for _, arrays in self._sums.values() for array in arrays.values()]

    def found(self) -> list[tuple[Any, dict[str, AnyArray]]]:
        """Return what `Gradients` takes."""
        learned = Learned(self._whole.accumulator)
        for rule, arrays in self._sums.values():
            learned.add(rule, arrays)
        return learned.found()


class Sums(NamedTuple):
    """Gradients of a call's rows, as sums over parts."""

    q: AnyArray  # (B, H, M, D), by mapped q
    row_sums: AnyArray  # (B, H, M, 2), as `gradients.Found` has them
    learned: LearnedSums


def add_gradients(
    part: Problem,
    dout: AnyArray,
    lse: AnyArray,
    facts: AnyArray | None,
    delta: AnyArray,
    sums: Sums,
    rows: Stretch,
    keys: Stretch,
) -> tuple[AnyArray, AnyArray, float]:
    """Add the gradients of a part to the sums of its rows and return those by its keys.

    Parameters
    ----------
    part : Problem
        As `part_of` returns it, in a dtype of accumulators.
    dout : array (B, H, M, E)
        Gradient by the output.
    lse : float64 array (B, H, M)
        Of the whole call, its sink included.
    facts : float64 array (B, H, M, ROW_FACTS) or None
        Those of the rows of the whole call, its sink included, if they are known beside the lse.
    delta : array (B, H, M)
        What `delta_of` returns.
    sums : Sums
        Those of the rows of the part.
    rows, keys : (int, int)
        Which rows these are.

    Returns
    -------
    tuple of array (B, Hk, N, D), array (B, Hk, N, E), float
        By mapped k and by v; and the scale of the gradients among the row sums.
    """
    learned = Learned(part.accumulator)
    with np.errstate(all="ignore"):  # rows that see nothing may hold anything
        found = gradient_engine().gradients_of_prepared(part, dout, lse, delta, learned, facts)
    sums.q[...] += found.q
    sums.row_sums[...] += found.row_sums
    sums.learned.add_part(part, learned, rows, keys)
    if found.hidden:
        sums.learned.add(sums.learned.score, found.hidden)
    return found.k, found.v, found.scale
