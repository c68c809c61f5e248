"""One attention call described by numbers and files, done in pieces so that its progress can be seen.

Pieces are cut over sequences, key heads and query rows, never over keys, so every result element is computed once and
has the bits that one call over the whole would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import and_
from typing import Any, NamedTuple

import numpy as np

from attn_numba.problem import Problem, check
from attn_numba.rules import (
    ALiBi,
    Bias,
    Causal,
    Cosine,
    Dense,
    Dot,
    DoubleSoftmax,
    Entmax15,
    Mask,
    Modifier,
    Neighborhood,
    Normalizer,
    Padding,
    PrefixLM,
    SameDocument,
    SlidingWindow,
    SoftCap,
    Softmax,
    Sparsemax,
)

__all__ = ["NORMALIZERS", "SCORES", "Job", "Piece", "RuleSet"]

SCORES = {"dot": Dot, "cosine": Cosine}
NORMALIZERS = {"softmax": Softmax, "sparsemax": Sparsemax, "entmax15": Entmax15, "double-softmax": DoubleSoftmax}

ROWS = 1024
"""Query rows of a piece come in multiples of this many."""


class Piece(NamedTuple):
    """A part of a call.

    Parameters
    ----------
    sequences, key_heads, rows : slice
        Of B, Hk and M, each with a start and a stop.
    """

    sequences: slice
    key_heads: slice
    rows: slice


@dataclass(frozen=True)
class RuleSet:
    """The rules of a call as the numbers and arrays they are made from, so that a piece of it can be given its part.

    Parameters
    ----------
    causal : bool
        `Causal`.
    window : tuple of int, optional
        `SlidingWindow`: left and right.
    neighborhood : tuple, optional
        `Neighborhood`: the grid's shape and the window's size, each a tuple of int.
    padding_lengths : numpy.ndarray, optional
        `Padding`: (B,).
    prefix_lengths : numpy.ndarray, optional
        `PrefixLM`: (B,).
    documents : numpy.ndarray, optional
        `SameDocument`: (B,N), for queries and keys alike.
    mask : numpy.ndarray, optional
        `Dense`: boolean, broadcasts to (B,H,M,N).
    soft_cap : float, optional
        `SoftCap`.
    bias : numpy.ndarray, optional
        `Bias`: broadcasts to (B,H,M,N).
    alibi_slopes : numpy.ndarray, optional
        `ALiBi`: (H,).
    score : str
        One of `SCORES`.
    normalizer : str
        One of `NORMALIZERS`.
    sink : float, optional
        Of `Softmax`.
    scale : float, optional
        As in `attn_numba.attention`.
    query_offset : int or numpy.ndarray, optional
        As in `attn_numba.attention`.
    key_offset : int or numpy.ndarray
        As in `attn_numba.attention`.
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    neighborhood: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    padding_lengths: np.ndarray | None = None
    prefix_lengths: np.ndarray | None = None
    documents: np.ndarray | None = None
    mask: np.ndarray | None = None
    soft_cap: float | None = None
    bias: np.ndarray | None = None
    alibi_slopes: np.ndarray | None = None
    score: str = "dot"
    normalizer: str = "softmax"
    sink: float | None = None
    scale: float | None = None
    query_offset: Any = None
    key_offset: Any = 0

    def options(self, piece: Piece | None = None, group: int = 1) -> dict[str, Any]:
        """Return the keyword arguments of `attn_numba.attention` for a call or a piece of it.

        Parameters
        ----------
        piece : Piece, optional
            None for the whole call.
        group : int
            Query heads per key head.

        Returns
        -------
        dict

        Raises
        ------
        ValueError
            If there is a sink and the normalizer is not a softmax.
        """
        sequences, key_heads, rows = piece or (slice(None), slice(None), slice(None))
        heads = key_heads if piece is None else _of_queries(key_heads, group)
        offset = self.query_offset
        return {
            "mask": self._mask(sequences, heads, rows),
            "modifiers": self._modifiers(sequences, heads, rows),
            "score": SCORES[self.score](),
            "normalizer": self._normalizer(),
            "scale": self.scale,
            "query_offset": offset if offset is None or piece is None else offset + rows.start,
            "key_offset": self.key_offset,
        }

    def _mask(self, sequences: slice, heads: slice, rows: slice) -> Mask | None:
        masks: list[Mask] = []
        if self.causal:
            masks.append(Causal())
        if self.window is not None:
            masks.append(SlidingWindow(*self.window))
        if self.neighborhood is not None:
            masks.append(Neighborhood(*self.neighborhood))
        if self.padding_lengths is not None:
            masks.append(Padding(_cut(self.padding_lengths, sequences)))
        if self.prefix_lengths is not None:
            masks.append(PrefixLM(_cut(self.prefix_lengths, sequences)))
        if (documents := self.documents) is not None:
            masks.append(SameDocument(_cut(documents, sequences, rows), _cut(documents, sequences, slice(None))))
        if self.mask is not None:
            masks.append(Dense(_cut(self.mask, sequences, heads, rows, slice(None))))
        return reduce(and_, masks) if masks else None

    def _normalizer(self) -> Normalizer:
        if self.sink is None:
            return NORMALIZERS[self.normalizer]()
        if self.normalizer != "softmax":
            raise ValueError(f"sink is {self.sink}, but the normalizer is {self.normalizer}; a sink needs softmax")
        return Softmax(sink=self.sink)

    def _modifiers(self, sequences: slice, heads: slice, rows: slice) -> list[Modifier]:
        modifiers: list[Modifier] = []
        if self.alibi_slopes is not None:
            modifiers.append(ALiBi(_cut(self.alibi_slopes, heads)))
        if self.bias is not None:
            modifiers.append(Bias(_cut(self.bias, sequences, heads, rows, slice(None))))
        if self.soft_cap is not None:
            modifiers.append(SoftCap(self.soft_cap))
        return modifiers


@dataclass(frozen=True, eq=False)
class Job:
    """One attention call: its arrays and its rules.

    Parameters
    ----------
    q, k, v : numpy.ndarray
        As in `attn_numba.attention`; memory maps are read piece by piece.
    rules : RuleSet
        Everything else.

    Examples
    --------
    >>> q = k = v = np.random.default_rng(0).standard_normal((2, 4, 2048, 16))
    >>> job = Job(q, k, v, RuleSet(causal=True))
    >>> pieces = job.pieces(pairs=2**22)
    >>> len(pieces)
    8
    >>> from attn_numba import attention
    >>> results = job.run(attention, pieces, lse=True)
    >>> results["out"].shape, results["lse"].shape
    ((2, 4, 2048, 16), (2, 4, 2048))
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    rules: RuleSet = RuleSet()

    @cached_property
    def problem(self) -> Problem:
        """The whole call, checked; raises what `attn_numba.attention` raises for bad arguments."""
        return check(self.q, self.k, self.v, **self.rules.options())

    @property
    def pairs(self) -> int:
        """How many query-key pairs the call has, allowed or not."""
        sizes = self.problem.sizes
        return sizes.B * sizes.H * sizes.M * sizes.N

    def pieces(self, pairs: int) -> list[Piece]:
        """Return pieces that make up the call.

        Parameters
        ----------
        pairs : int
            About how many query-key pairs, allowed or not, a piece should have at most.

        Returns
        -------
        list of Piece
            Empty for a call with nothing to compute.
        """
        sizes = self.problem.sizes
        if self.pairs == 0:
            return []
        head = sizes.H // sizes.Hk * sizes.M * sizes.N
        return [
            Piece(sequences, key_heads, rows)
            for sequences in _slices(sizes.B, pairs // (head * sizes.Hk))
            for key_heads in _slices(sizes.Hk, pairs // head)
            for rows in _slices(sizes.M, max(1, pairs * sizes.M // head // ROWS) * ROWS)
        ]

    def part(self, piece: Piece) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]:
        """Return the arrays of a piece and the keyword arguments that go with them.

        Parameters
        ----------
        piece : Piece
            A part of the call.

        Returns
        -------
        tuple of three numpy.ndarray, dict
            q, k, v, each with four axes, and the rules as `attn_numba.attention` takes them.
        """
        q, k, v, sizes = self.problem[:4]
        group = sizes.H // sizes.Hk
        keys = (piece.sequences, piece.key_heads)
        queries = (piece.sequences, _of_queries(piece.key_heads, group), piece.rows)
        rules = replace(self.rules, query_offset=self.problem.query_offset)  # None would mean another in a piece
        return (q[queries], k[keys], v[keys]), rules.options(piece, group)

    def run(
        self,
        attention: Callable[..., Any],
        pieces: Sequence[Piece] = (),
        advance: Callable[[int], object] = lambda pairs: None,
        lse: bool = False,
        weights: bool = False,
    ) -> dict[str, np.ndarray]:
        """Return the results of the call by name.

        Parameters
        ----------
        attention : callable
            `attn_numba.attention` or one that takes and returns the same.
        pieces : sequence of Piece
            From `pieces`; none for one call over the whole.
        advance : callable
            Takes the number of query-key pairs done since it was last called.
        lse, weights : bool
            What is asked for beside ``out``.

        Returns
        -------
        dict of str to numpy.ndarray
            ``out`` and what else was asked for.
        """
        wanted = {"return_lse": lse, "return_weights": weights}
        sizes = self.problem.sizes
        if len(pieces) <= 1:
            return _by_name(attention(self.q, self.k, self.v, **self.rules.options(), **wanted))
        results: dict[str, np.ndarray] = {}
        for piece in pieces:
            arrays, options = self.part(piece)
            parts = _by_name(attention(*arrays, **options, **wanted))
            place = (piece.sequences, _of_queries(piece.key_heads, sizes.H // sizes.Hk), piece.rows)
            for name, part in parts.items():
                if name not in results:
                    results[name] = np.empty((sizes.B, sizes.H, sizes.M, *part.shape[3:]), part.dtype)
                results[name][place] = part
            advance(parts["out"][..., 0].size * sizes.N)
        return {name: array.reshape(self.q.shape[:-1] + array.shape[3:]) for name, array in results.items()}


def _by_name(answer: Any) -> dict[str, np.ndarray]:
    return dict(answer._asdict()) if hasattr(answer, "_asdict") else {"out": answer}


def _slices(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]


def _of_queries(key_heads: slice, group: int) -> slice:
    """Return the query heads that read these key heads."""
    return slice(key_heads.start * group, key_heads.stop * group)


def _cut(array: np.ndarray, *places: slice) -> np.ndarray:
    """Return a part of an array that broadcasts along the axes it lacks or has with size 1."""
    places = places[-array.ndim :]
    return array[tuple(place if size > 1 else slice(None) for size, place in zip(array.shape, places, strict=False))]
