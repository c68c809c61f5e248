"""Named attention problems, their sizes frozen in one table, for benchmarks and comparisons.

Every size is that of a published model or paper, which `Workload.source` names, or says what it is; nothing is tuned to
make a backend look well. `Workload.small` shrinks one to a shape that runs in milliseconds under the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import Any

import numpy as np

from attn_numba.rules import (
    AdaptiveSpan,
    BlockSparse,
    Causal,
    Neighborhood,
    Padding,
    Places,
    SameDocument,
    Sizes,
    SlidingWindow,
    as_mask,
    as_modifiers,
    places_of,
)

__all__ = ["WORKLOADS", "Workload", "allowed_rows", "named_dtype", "places_of_rows"]


@dataclass(frozen=True)
class Workload:
    """One named problem.

    Parameters
    ----------
    name : str
        What it is called in tables.
    source : str
        Where its sizes come from.
    B, H, Hk, M, N, D, E : int
        Sequences, query heads, key heads, queries, keys, head size, value size.
    rules : callable
        Takes the workload, returns keyword arguments of `attn_numba.attention`.

    Examples
    --------
    >>> workload = WORKLOADS["gpt2"].small()
    >>> workload.sizes
    Sizes(B=1, H=2, Hk=2, M=64, N=64, D=64, E=64)
    >>> workload.visible_pairs == 2 * 64 * 65 // 2
    True
    """

    name: str
    source: str
    B: int
    H: int
    Hk: int
    M: int
    N: int
    D: int
    E: int
    rules: Callable[[Workload], dict[str, Any]]

    @property
    def sizes(self) -> Sizes:
        """The seven sizes as the rules take them."""
        return Sizes(self.B, self.H, self.Hk, self.M, self.N, self.D, self.E)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `attn_numba.attention` that this workload stands for."""
        return self.rules(self)

    def arrays(self, dtype: Any = np.float32, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return normally distributed q (B,H,M,D), k (B,Hk,N,D) and v (B,Hk,N,E).

        Parameters
        ----------
        dtype : numpy dtype
            Of all three.
        seed : int
            Of the generator.

        Returns
        -------
        tuple of numpy.ndarray
        """
        random = np.random.default_rng(seed)
        shapes = (
            (self.B, self.H, self.M, self.D),
            (self.B, self.Hk, self.N, self.D),
            (self.B, self.Hk, self.N, self.E),
        )
        q, k, v = (random.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes)
        return q, k, v

    def small(self) -> Workload:
        """Return the same rules at a sixteenth of the length and at most two sequences and two key heads."""
        heads = min(self.Hk, 2)
        return replace(
            self,
            name=f"{self.name}-smoke",
            B=min(self.B, 2),
            H=heads * (self.H // self.Hk),
            Hk=heads,
            M=max(1, self.M // 16),
            N=max(1, self.N // 16),
        )

    @property
    def visible_pairs(self) -> int:
        """How many (b, h, i, j) the mask and the modifiers leave."""
        return _visible_pairs(self)

    @property
    def flop(self) -> int:
        """Floating-point operations of the two products over the visible pairs: ``2 (D + E)`` each."""
        return 2 * (self.D + self.E) * self.visible_pairs


def places_of_rows(options: Mapping[str, Any], sizes: Sizes, rows: np.ndarray) -> Places:
    """Return the places of some query rows of a call.

    Parameters
    ----------
    options : mapping
        Keyword arguments of `attn_numba.attention`; ``query_offset`` and ``key_offset`` are read.
    sizes : Sizes
        Of the whole call.
    rows : numpy.ndarray
        Which query rows, int32.

    Returns
    -------
    Places
        Arrays that broadcast to (B, H, len(rows), N).
    """
    key_offset, query_offset = options.get("key_offset", 0), options.get("query_offset")
    places = places_of(sizes, key_offset if query_offset is None else query_offset, key_offset)
    return places._replace(i=places.i[:, :, rows], row_i=places.row_i[:, :, rows])


def allowed_rows(options: Mapping[str, Any], sizes: Sizes, rows: np.ndarray) -> np.ndarray | None:
    """Return which keys the mask and the modifiers of a call leave to some of its query rows.

    Parameters
    ----------
    options : mapping
        Keyword arguments of `attn_numba.attention`; mask, modifiers and offsets are read.
    sizes : Sizes
        Of the whole call.
    rows : numpy.ndarray
        Which query rows, int32.

    Returns
    -------
    numpy.ndarray or None
        Boolean, broadcasts to (B, H, len(rows), N); None where nothing is excluded.
    """
    places, mask = places_of_rows(options, sizes, rows), as_mask(options.get("mask"))
    result = None if mask is None else mask.evaluate(places, sizes)
    for modifier in as_modifiers(options.get("modifiers")):
        excluded = modifier.excluded(places, sizes)
        if excluded is not None:
            result = ~excluded if result is None else result & ~excluded
    return result


def named_dtype(name: str) -> np.dtype:
    """Return a dtype by its name, bfloat16 among them.

    Parameters
    ----------
    name : str
        As ``numpy.dtype.name`` gives it.

    Returns
    -------
    numpy.dtype

    Raises
    ------
    ImportError
        For bfloat16 where the package ``ml_dtypes`` is not installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from attn_numba.integrations.ml_dtypes import bfloat16
    except ImportError:
        raise ImportError("bfloat16 needs the package ml_dtypes (pip install ml_dtypes)") from None
    return bfloat16


@cache
def _visible_pairs(workload: Workload) -> int:
    options, sizes = workload.options(), workload.sizes
    step = max(1, 2**22 // sizes.N)
    count = 0
    for start in range(0, sizes.M, step):
        rows = np.arange(start, min(sizes.M, start + step), dtype=np.int32)
        pairs = sizes.B * sizes.H * rows.size * sizes.N
        allowed = allowed_rows(options, sizes, rows)
        # a mask that lacks an axis, or has it with size 1, counts once for each place along it
        count += pairs if allowed is None else int(allowed.sum()) * (pairs // allowed.size)
    return count


def _dense(workload: Workload) -> dict[str, Any]:
    return {}


def _causal(workload: Workload) -> dict[str, Any]:
    return {"mask": Causal()}


def _decode(workload: Workload) -> dict[str, Any]:
    return {"mask": Causal(), "query_offset": workload.N - workload.M}


def _window(workload: Workload) -> dict[str, Any]:
    return {"mask": SlidingWindow(workload.N // 32, 0)}


def _documents(workload: Workload) -> dict[str, Any]:
    """Return 16 documents in a row, of the same length."""
    documents = np.arange(workload.N, dtype=np.int32) * 16 // workload.N
    return {"mask": Causal() & SameDocument(np.broadcast_to(documents, (workload.B, workload.N)))}


def _padding(workload: Workload) -> dict[str, Any]:
    """Return lengths from an eighth to seven eighths, half on average."""
    return {"mask": Padding(np.rint(workload.N * np.linspace(1 / 8, 7 / 8, workload.B)).astype(np.int32))}


def _blocks(workload: Workload) -> dict[str, Any]:
    """Return blocks of 64 x 64, each head its own: the diagonal, and others at random up to a tenth of all."""
    count = workload.N // 64
    random = np.random.default_rng(4096)
    blocks = random.random((1, workload.H, count, count)) < (0.1 * count - 1) / max(1, count - 1)
    return {"mask": BlockSparse(blocks | np.eye(count, dtype=bool), tile=(64, 64))}


def _neighbors(workload: Workload) -> dict[str, Any]:
    side = isqrt(workload.N)
    return {"mask": Neighborhood((side, side), (13, 13))}


def _spans(workload: Workload) -> dict[str, Any]:
    """Return spans of a tenth of the length on average that swing from a fiftieth to nearly a fifth, head by head."""
    turns = np.arange(workload.H)[:, None] / workload.H + 3 * np.arange(workload.M) / workload.M
    span = workload.N / 10 * (1 + 0.8 * np.sin(2 * np.pi * turns))
    return {"mask": Causal(), "modifiers": AdaptiveSpan(span.astype(np.float32), 32.0)}


_TABLE: tuple[tuple[Any, ...], ...] = (
    # name, source                                                        B,  H, Hk,    M,     N,   D,   E, rules
    ("minilm", "all-MiniLM-L6-v2 at its 256 tokens (Wang 2020)",         16, 12, 12,   256,   256,  32,  32, _dense),
    ("padding", "BERT base at 512, half padding (Devlin 2018)",          8, 12, 12,   512,   512,  64,  64, _padding),
    ("gpt2", "GPT-2 small at its 1024 tokens (Radford 2019)",            1, 12, 12,  1024,  1024,  64,  64, _causal),
    ("dense-2048", "FlashAttention-2's row of 2048 (Dao 2023), 8 heads", 1,  8,  8,  2048,  2048,  64,  64, _dense),
    ("smollm2", "SmolLM2-135M at 2048 tokens (Allal 2025)",              1,  9,  3,  2048,  2048,  64,  64, _causal),
    ("llama3-8b", "Llama 3 8B at 2048 tokens (Dubey 2024)",              1, 32,  8,  2048,  2048, 128, 128, _causal),
    ("context-16k", "FlashAttention-2's row of 16384, 2 heads",          1,  2,  2, 16384, 16384,  64,  64, _causal),
    ("decode", "Llama 3 8B, the token after 4095 others",                1, 32,  8,     1,  4096, 128, 128, _decode),
    ("window-16k", "Longformer's window of 512 (Beltagy 2020)",          1,  4,  4, 16384, 16384,  64,  64, _window),
    ("documents", "16 packed documents of 512 tokens, causal",           1,  8,  8,  8192,  8192,  64,  64, _documents),
    ("block-sparse", "BigBird's 4096 in blocks of 64 (Zaheer 2020)",     1, 12, 12,  4096,  4096,  64,  64, _blocks),
    ("adaptive-span", "spans by query, ramp 32 (Sukhbaatar 2019)",       1,  8,  8,  8192,  8192,  64,  64, _spans),
    ("neighborhood", "NATTEN, 13 x 13 on 64 x 64 (Hassani 2023)",        1,  8,  8,  4096,  4096,  64,  64, _neighbors),
)  # fmt: skip

WORKLOADS: dict[str, Workload] = {row[0]: Workload(*row) for row in _TABLE}
"""Every workload by its name."""
