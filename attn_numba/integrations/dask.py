"""Attention over Dask arrays, block by block and lazily; needs the package ``dask``.

One task computes one block of queries with one block of keys, as ``attn_numba.attention`` does, and gives its output
and lse; those of a block of queries are merged as a tree. Pairs of blocks that the mask hides are no tasks. A task
depends on nothing but its blocks and its rules, so what a lost worker had is computed again elsewhere.

Examples
--------
>>> import dask.array as da
>>> import numpy as np
>>> import attn_numba as an
>>> x = da.from_array(np.random.default_rng(0).standard_normal((1, 2, 8, 4)), chunks=(1, 1, 2, 4))
>>> out = an.dask.attention(x, x, x, mask=an.Causal())
>>> out.numblocks
(1, 2, 4, 1)
>>> bool(np.allclose(out.compute(), an.attention(*[x.compute()] * 3, mask=an.Causal())))
True
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

try:
    import dask.array as da
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"attn_numba.dask needs {error.name}, which is not installed: pip install 'attn-numba[dask]'", name="dask"
    ) from error
from dask.base import is_dask_collection, tokenize
from dask.highlevelgraph import HighLevelGraph

from attn_numba import api, problem as problems
from attn_numba.problem import Problem
from attn_numba.rules import Softmax, as_mask
from attn_numba.rules.arguments import ACCUMULATORS, check_lse
from attn_numba.rules.blocks import Block
from attn_numba.rules.data import AnyArray, whole_number
from attn_numba.rules.results import result_of
from attn_numba.rules.sight import ALL, NONE, answer

__all__ = ["attention"]

MERGED_AT_ONCE = 8


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    backend: str = "auto",
    return_lse: bool = False,
    split_every: int = MERGED_AT_ONCE,
) -> Any:
    """Return the attention of queries over keys and values as a Dask array that is still to be computed.

    Parameters
    ----------
    q : dask array (B, H, M, D)
        Queries: float64, float32, float16 or bfloat16, in host memory. Missing leading axes count as 1. Chunks along B,
        H and M are those of the result; where a chunk holds parts of several groups of heads it is split between them.
    k : dask array (B, Hk, N, D)
        Keys, of q's dtype. Chunks along N are what a task sees of them; along B and Hk they are made to fit q's.
    v : dask array (B, Hk, N, E)
        Values, of q's dtype; their chunks are made to fit those of k.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset, dropout : optional
        The rules, as `attn_numba.attention` takes them, of the whole: positions, and the rows and heads of arrays, are
        those of q and k as if they were one array each. Arrays are NumPy's; a task gets its own part of them, but all
        `params` of a `CustomMask` or a `CustomModifier`.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes a task, as in `attn_numba.attention`.
    return_lse : bool
        Whether to return the lse beside the output.
    split_every : int
        How many partial results of a block of queries are merged at once, at least 2.

    Returns
    -------
    out : dask array (B, H, M, E)
        In the dtype and rank of `q`. With `return_lse`, a named tuple of (out, lse):
    lse : dask array (B, H, M)
        ``log sum_j exp(s_ij)`` over the allowed keys and the sink, natural; float64 for float64, else float32.

    Raises
    ------
    TypeError
        For arguments of the wrong kind, such as NumPy arrays for q, k and v, and Dask arrays for rules.
    ValueError
        For shapes and values that do not fit; for chunks of unknown size; and for a normalizer other than `Softmax`
        where k has several chunks along N, for what it makes of parts of the keys does not add up to the whole.
    NotImplementedError
        For a mask or modifier of a class of one's own, of which nobody knows what belongs to a block.

    See Also
    --------
    attn_numba.merge : What makes the whole of partial results.

    Notes
    -----
    ``lse = log sum_p exp(lse_p)`` and ``out = sum_p exp(lse_p - lse) out_p`` over the parts p of the keys. A sink is
    added once, at the root of the tree. Partial results stay in the dtype of the accumulator until then.

    A pair of blocks is left out where the rules tell by their formulas and by the least and greatest number of their
    arrays there that no query sees a key. Of one sequence's `Causal`, `SlidingWindow`, `Padding`, `PrefixLM`,
    `BlockSparse` and `Dense` that is exact. Where all pairs are seen, the task gets no mask.

    Inside a task one thread computes, unless `attn_numba.set_threads`, NUMBA_NUM_THREADS or OMP_NUM_THREADS say
    otherwise: the tasks side by side are what uses the cores. Weights are not returned: they are of the size of all
    scores.

    References
    ----------
    M. Milakov and N. Gimelshein (2018), "Online normalizer calculation for softmax", section 3. H. Liu, M. Zaharia and
    P. Abbeel (2023), "Ring attention with blockwise transformers for near-infinite context", section 3, for blocks of
    keys on several machines.

    Examples
    --------
    Eight blocks of queries by eight of keys, of which a window of 100 tokens leaves 15 pairs.

    >>> import dask.array as da
    >>> import numpy as np
    >>> import attn_numba as an
    >>> x = da.from_array(np.random.default_rng(0).standard_normal((1, 1, 1024, 8)), chunks=(1, 1, 128, 8))
    >>> found = an.dask.attention(x, x, x, mask=an.SlidingWindow(99, 0), return_lse=True)
    >>> sum(key[0].startswith("attention-part") for key in found.out.dask)
    15
    >>> found.lse.compute().shape
    (1, 1, 1024)
    """
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
    }  # fmt: skip
    arrays = [_checked(x, name) for name, x in (("q", q), ("k", k), ("v", v))]
    _require_known(rules)
    api.choose_backend(backend, cuda=True)
    width = whole_number("attention", "split_every", split_every)
    if width < 2:
        raise ValueError(f"split_every is {width}; needed at least 2")
    rules["mask"] = as_mask(mask, keep=True)  # tasks run later: an array that its owner may change by then is copied
    call = problems.check(*(problems.nothing(x.shape, x.dtype) for x in arrays), **rules)
    check_lse(return_lse, call.normalizer)
    _require_whole_rows(call, arrays[1])
    plan = _Plan(call, *_fitted(call, *arrays), backend, width, return_lse)
    found = plan.arrays(tokenize(*(x.name for x in arrays), rules, backend, width))
    out, lse = (x if x is None or call.rank == 4 else x[(0,) * (4 - call.rank)] for x in found)
    return result_of(out, lse) if return_lse else out


def _checked(x: Any, name: str) -> da.Array:
    if not isinstance(x, da.Array):
        raise TypeError(f"{name} is {type(x).__name__}; needed a Dask array, such as dask.array.from_array({name})")
    for axis, chunks in enumerate(x.chunks):
        if np.isnan(chunks).any():
            raise ValueError(
                f"{name} has chunks of unknown size along axis {axis}; needed known ones: {name}.compute_chunk_sizes()"
            )
    if problems.is_device_array(x._meta):
        raise TypeError(f"{name} is made of {type(x._meta).__name__} on a GPU; needed chunks in host memory")
    return x


def _require_known(rules: Mapping[str, Any]) -> None:
    for name, rule in rules.items():
        if is_dask_collection(rule):
            raise TypeError(f"{name} is a Dask {type(rule).__name__}; needed a rule or NumPy array: {name}.compute()")


def _require_whole_rows(call: Problem, k: da.Array) -> None:
    parts = len(k.chunks[-2])
    if parts > 1 and not call.normalizer.streams:
        raise ValueError(
            f"normalizer is {type(call.normalizer).__name__}, which does not merge results of parts of the keys, and k "
            f"has {parts} chunks of keys; needed Softmax(), or one chunk: k.rechunk({{{k.ndim - 2}: -1}})"
        )


def _fitted(call: Problem, q: da.Array, k: da.Array, v: da.Array) -> tuple[da.Array, da.Array, da.Array]:
    """Return the arrays with four axes and chunks that go together.

    They are those of q along sequences and queries, and of k along keys; along heads, each chunk of q reads one of k.
    """
    q, k, v = (x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x for x in (q, k, v))
    z = call.sizes
    group = z.H // z.Hk
    ends = {0, *itertools.accumulate(q.chunks[1])}
    ends |= {end - end % group + n for end in ends if end % group for n in (0, group)}
    key_ends = {end // group for end in ends if end % group == 0}
    sequences = q.chunks[0]
    return (
        q.rechunk((sequences, _lengths(ends), q.chunks[2], (z.D,))),
        k.rechunk((sequences, _lengths(key_ends), k.chunks[2], k.shape[3:])),
        v.rechunk((sequences, _lengths(key_ends), k.chunks[2], (z.E,))),
    )


def _lengths(ends: set[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in itertools.pairwise(sorted(ends)))


def _slices(lengths: tuple[int, ...]) -> list[slice]:
    ends = [0, *itertools.accumulate(lengths)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


class _Cell(NamedTuple):
    """Some sequences and some heads of a call: its sizes there and its rules, cut to them."""

    number: tuple[int, int, int]  # of the chunk along sequences, query heads and key heads
    block: Block
    call: Problem


class _Plan:
    """The tasks of one call.

    Parameters
    ----------
    call : Problem
        The whole, with arrays that hold nothing.
    q, k, v : dask arrays with four axes
        As `_fitted` returns them.
    backend : str
        Who computes.
    width : int
        How many partial results are merged at once.
    lse : bool
        Whether it is asked for.
    """

    def __init__(
        self, call: Problem, q: da.Array, k: da.Array, v: da.Array, backend: str, width: int, lse: bool
    ) -> None:
        self.call, self.inputs = call, (q, k, v)
        self.backend, self.width, self.lse = backend, width, lse
        self.rows, self.keys = _slices(q.chunks[2]), _slices(k.chunks[2])
        self._answers: dict[tuple[int, int], int] = {}

    def arrays(self, token: str) -> tuple[Any, Any]:
        """Return out and lse, which is None where it is not asked for."""
        inputs: list[Any] = [*self.inputs]  # in Dask's own words they are no collections
        q, _, v = inputs
        names = [f"attention-{what}{token}" for what in ("part-", "merge-", "rows-" if self.lse else "", "lse-")]
        tasks: dict[Any, Any] = {}
        for cell in self._cells():
            for n in range(len(self.rows)):
                tasks |= self._tasks_of_rows(names, cell, n)
        graph = HighLevelGraph.from_collections(names[2], tasks, dependencies=inputs)
        chunks = (*q.chunks[:3], v.chunks[3])
        kinds: tuple[Any, Any] = (self.call.q.dtype, self.call.accumulator)
        if not self.lse:
            return da.Array(graph, names[2], chunks, dtype=kinds[0], meta=np.empty((0,) * 4, kinds[0])), None
        both = []
        for part, (name, axes) in enumerate(((f"attention-{token}", 4), (names[3], 3))):
            numbers = itertools.product(*(range(len(x)) for x in chunks[:axes]))
            picked: dict[Any, Any] = {(name, *at): (_item, (names[2], *at[:3], 0), part) for at in numbers}
            layers = HighLevelGraph({**graph.layers, name: picked}, {**graph.dependencies, name: {names[2]}})
            empty = np.empty((0,) * axes, kinds[part])
            both.append(da.Array(layers, name, chunks[:axes], dtype=kinds[part], meta=empty))
        return both[0], both[1]

    def _cells(self) -> Iterator[_Cell]:
        q, k, _ = self.inputs
        z = self.call.sizes
        group = z.H // z.Hk
        key_heads = _slices(k.chunks[1])
        rows = (slice(0, z.M), slice(0, z.N))
        for (nb, b), (nh, h) in itertools.product(enumerate(_slices(q.chunks[0])), enumerate(_slices(q.chunks[1]))):
            nk, hk = next((n, x) for n, x in enumerate(key_heads) if x.start <= h.start // group < x.stop)
            block = Block(b, h, hk, *rows)
            yield _Cell((nb, nh, nk), block, self.call.in_block(block))

    def _tasks_of_rows(self, names: list[str], cell: _Cell, row: int) -> dict[Any, Any]:
        """Return the tasks of one block of queries of a cell: its parts, what merges them, and its result."""
        parts_name, merge_name, name, _ = names
        nb, nh, nk = cell.number
        q, k, v = (x.name for x in self.inputs)
        tasks: dict[Any, Any] = {}
        sink = getattr(cell.call.normalizer, "sink", None)
        for column in range(len(self.keys)):
            part = self._part_of_keys(cell, row, column)
            if part is not None:
                at = ((q, nb, nh, row, 0), (k, nb, nk, column, 0), (v, nb, nk, column, 0))
                tasks[(parts_name, nb, nh, row, column)] = (part, *at)
        parts, level = [*tasks], 0
        while len(parts) > self.width:
            together = [parts[n : n + self.width] for n in range(0, len(parts), self.width)]
            parts = [(merge_name, nb, nh, row, level, n) for n in range(len(together))]
            tasks |= {key: (_merged, some) for key, some in zip(parts, together, strict=True)}
            level += 1
        B, H, _, _, _ = cell.block.shape
        shape = (B, H, self.rows[row].stop - self.rows[row].start, self.call.sizes.E)
        tasks[(name, nb, nh, row, 0)] = (_Result(shape, self.call.q.dtype, sink, self.lse), parts)
        return tasks

    def _part_of_keys(self, cell: _Cell, row: int, column: int) -> _Part | None:
        """Return what computes a block of queries with a block of keys; None where the rules hide all of it."""
        z = cell.call.sizes
        rows, keys = self.rows[row], self.keys[column]
        call = cell.call.in_block(Block(slice(0, z.B), slice(0, z.H), slice(0, z.Hk), rows, keys))
        seen = self._seen(call, row, column)
        if seen == NONE:
            return None
        normalizer = Softmax() if isinstance(call.normalizer, Softmax) else call.normalizer  # a sink counts once, later
        rules = call.options() | {"normalizer": normalizer, "mask": None if seen == ALL else call.mask}
        return _Part(rules, self.backend)

    def _seen(self, call: Problem, row: int, column: int) -> int:
        """Return how many pairs of a block are seen; rules that are the same in all cells are asked once."""
        whole = self.call
        offsets = (call.query_offset, call.key_offset)
        same = call.mask is whole.mask and all(a is b for a, b in zip(call.modifiers, whole.modifiers, strict=True))
        key = (row, column) if same and all(isinstance(x, int) for x in offsets) else None
        if key is None or key not in self._answers:
            found = answer(call.mask, call.modifiers, call.sizes, *offsets)
            if key is None:
                return found
            self._answers[key] = found
        return self._answers[key]


Partial = tuple[AnyArray, Any]  # output and lse; None where the normalizer has none


@dataclass(frozen=True)
class _Part:
    """What computes one block of queries with one block of keys, and can be sent to another process."""

    rules: dict[str, Any]
    backend: str

    def __call__(self, q: AnyArray, k: AnyArray, v: AnyArray) -> Partial:
        streams = self.rules["normalizer"].streams
        found = api.attention(q, k, v, **self.rules, backend=self.backend, return_lse=streams)
        return (found.out, found.lse) if streams else (found, None)


@dataclass(frozen=True)
class _Result:
    """What makes the result of one block of queries from its partial results."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sink: Any
    lse: bool

    def __call__(self, parts: list[Partial]) -> Any:
        if not parts:
            dtype = ACCUMULATORS[self.dtype.name]
            parts = [(np.zeros(self.shape, self.dtype), np.full(self.shape[:-1], -np.inf, dtype))]
        out, lse = _merged(parts, self.sink)
        out = out.astype(self.dtype, copy=False)
        return (out, lse) if self.lse else out


def _merged(parts: list[Partial], sink: Any = None) -> Partial:
    """Return the partial result over the keys of several; the output of a sum is in the dtype of the accumulator."""
    if len(parts) == 1 and sink is None:
        return parts[0]
    lses = [lse for _, lse in parts]
    merged = api.merge([out.astype(lse.dtype, copy=False) for out, lse in parts], lses, sink)
    return merged.out, merged.lse


def _item(pair: tuple[Any, Any], n: int) -> Any:
    return pair[n]
