"""One attention call described by numbers and files, done in pieces so that its progress can be seen.

Pieces are cut over sequences, key heads and query rows, never over keys, so every result element is computed once and
has the bits that one call over the whole would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import and_
from typing import Any

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
from attn_numba.rules.blocks import Block

__all__ = ["NORMALIZERS", "SCORES", "Job", "RuleSet", "pairs_of"]

SCORES = {"dot": Dot, "cosine": Cosine}
NORMALIZERS = {"softmax": Softmax, "sparsemax": Sparsemax, "entmax15": Entmax15, "double-softmax": DoubleSoftmax}

ROWS = 1024
"""Query rows of a piece come in multiples of this many."""


@dataclass(frozen=True)
class RuleSet:
    """The rules of a call as the numbers and arrays they are made from.

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

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `attn_numba.attention`.

        Raises
        ------
        ValueError
            If there is a sink and the normalizer is not a softmax.
        """
        return {
            "mask": self._mask(),
            "modifiers": self._modifiers(),
            "score": SCORES[self.score](),
            "normalizer": self._normalizer(),
            "scale": self.scale,
            "query_offset": self.query_offset,
            "key_offset": self.key_offset,
        }

    def _mask(self) -> Mask | None:
        masks: list[Mask] = []
        if self.causal:
            masks.append(Causal())
        if self.window is not None:
            masks.append(SlidingWindow(*self.window))
        if self.neighborhood is not None:
            masks.append(Neighborhood(*self.neighborhood))
        if self.padding_lengths is not None:
            masks.append(Padding(self.padding_lengths))
        if self.prefix_lengths is not None:
            masks.append(PrefixLM(self.prefix_lengths))
        if self.documents is not None:
            masks.append(SameDocument(self.documents, self.documents))
        if self.mask is not None:
            masks.append(Dense(self.mask))
        return reduce(and_, masks) if masks else None

    def _normalizer(self) -> Normalizer:
        if self.sink is None:
            return NORMALIZERS[self.normalizer]()
        if self.normalizer != "softmax":
            raise ValueError(f"sink is {self.sink}, but the normalizer is {self.normalizer}; a sink needs softmax")
        return Softmax(sink=self.sink)

    def _modifiers(self) -> list[Modifier]:
        modifiers: list[Modifier] = []
        if self.alibi_slopes is not None:
            modifiers.append(ALiBi(self.alibi_slopes))
        if self.bias is not None:
            modifiers.append(Bias(self.bias))
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

    def pieces(self, pairs: int) -> list[Block]:
        """Return blocks that make up the call, each with all keys of its rows.

        Parameters
        ----------
        pairs : int
            About how many query-key pairs, allowed or not, a piece should have at most.

        Returns
        -------
        list of Block
            Empty for a call with nothing to compute.
        """
        sizes = self.problem.sizes
        if self.pairs == 0:
            return []
        group = sizes.H // sizes.Hk
        head = group * sizes.M * sizes.N
        return [
            Block(sequences, slice(group * heads.start, group * heads.stop), heads, rows, slice(0, sizes.N))
            for sequences in _slices(sizes.B, pairs // (head * sizes.Hk))
            for heads in _slices(sizes.Hk, pairs // head)
            for rows in _slices(sizes.M, max(1, pairs * sizes.M // head // ROWS) * ROWS)
        ]

    def part(self, piece: Block) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]:
        """Return the arrays of a piece and the keyword arguments that go with them.

        Parameters
        ----------
        piece : Block
            Some queries of the call, with all keys.

        Returns
        -------
        tuple of three numpy.ndarray, dict
            q, k, v, each with four axes, and the rules as `attn_numba.attention` takes them.
        """
        call, keys = self.problem, (piece.b, piece.hk)
        return (call.q[piece.b, piece.h, piece.i], call.k[keys], call.v[keys]), call.in_block(piece).options()

    def compute(
        self, attention: Callable[..., Any], piece: Block | None = None, lse: bool = False, weights: bool = False
    ) -> dict[str, np.ndarray]:
        """Return the results of a piece by name, or those of the call.

        Parameters
        ----------
        attention : callable
            `attn_numba.attention` or one that takes and returns the same.
        piece : Block, optional
            From `pieces`; None for the whole call.
        lse, weights : bool
            What is asked for beside ``out``.

        Returns
        -------
        dict of str to numpy.ndarray
            ``out`` and what else was asked for; those of a piece have all axes.
        """
        wanted = {"return_lse": lse, "return_weights": weights}
        arrays, rules = ((self.q, self.k, self.v), self.rules.options()) if piece is None else self.part(piece)
        return _by_name(attention(*arrays, **rules, **wanted))

    def joined(self, parts: Iterable[tuple[Block, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
        """Return the results of the call from those of all its pieces, of which there is at least one."""
        sizes = self.problem.sizes
        results: dict[str, np.ndarray] = {}
        for piece, arrays in parts:
            for name, part in arrays.items():
                if name not in results:
                    results[name] = np.empty((sizes.B, sizes.H, sizes.M, *part.shape[3:]), part.dtype)
                results[name][piece.b, piece.h, piece.i] = part
        return {name: array.reshape(self.q.shape[:-1] + array.shape[3:]) for name, array in results.items()}

    def run(
        self,
        attention: Callable[..., Any],
        pieces: Sequence[Block] = (),
        advance: Callable[[int], object] = lambda pairs: None,
        lse: bool = False,
        weights: bool = False,
    ) -> dict[str, np.ndarray]:
        """Return the results of the call by name.

        Parameters
        ----------
        attention : callable
            `attn_numba.attention` or one that takes and returns the same.
        pieces : sequence of Block
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
        if len(pieces) <= 1:
            return self.compute(attention, lse=lse, weights=weights)

        def computed() -> Iterable[tuple[Block, dict[str, np.ndarray]]]:
            for piece in pieces:
                yield piece, self.compute(attention, piece, lse, weights)
                advance(pairs_of(piece))

        return self.joined(computed())


def pairs_of(piece: Block) -> int:
    """Return how many query-key pairs a piece has, allowed or not.

    Parameters
    ----------
    piece : Block
        Some queries with all or some keys.

    Returns
    -------
    int
        Number of its pairs, over batch and heads.
    """
    B, H, _, M, N = piece.shape
    return B * H * M * N


def _by_name(answer: Any) -> dict[str, np.ndarray]:
    return dict(answer._asdict()) if hasattr(answer, "_asdict") else {"out": answer}


def _slices(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]
