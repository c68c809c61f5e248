"""What caches of keys and values do: append, fork, free, trim, reorder; and what decoding reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from attn_numba import files
from attn_numba.caches.arguments import at_least, counts_of, indices_of
from attn_numba.caches.pool import PARTS, Pool
from attn_numba.caches.saved import KINDS, State, as_arrays, from_arrays
from attn_numba.problem import host_array
from attn_numba.rules.data import AnyArray
from attn_numba.rules.storage import CacheView, Code, codes_named

__all__ = ["Cache"]


class Cache:
    """A table of pages for each sequence, over one pool."""

    _kind: ClassVar[int]  # in files

    def __init__(
        self, sequences: int, key_heads: int, head_size: int, value_size: int | None, dtype: Any, page: int,
        limit: int | None,
    ) -> None:  # fmt: skip
        self._dtype, self._codes = codes_named(dtype)
        count = at_least("sequences", sequences, 0)
        self._key_heads, self._head_size = at_least("key_heads", key_heads, 1), at_least("head_size", head_size, 1)
        self._value_size = self._head_size if value_size is None else at_least("value_size", value_size, 1)
        self._pool = Pool(self._key_heads, page, (self._head_size, self._value_size), self._codes, limit)
        self._lengths = np.zeros(count, np.int64)
        self._table = np.zeros((count, 0), np.int64)  # pages of each sequence; those beyond its length mean nothing
        self._freed: list[int] = []  # sequences that `fork` may use again
        self._view: CacheView | None = None

    @property
    def lengths(self) -> AnyArray:
        """Tokens of each sequence, int64 ``(sequences,)``; a copy."""
        return self._lengths.copy()

    @property
    def dtype(self) -> str:
        """How numbers are stored: float64, float32, float16, bfloat16, int8 or int4."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, free ones among them."""
        return self._pool.nbytes

    def __len__(self) -> int:
        return len(self._lengths)

    def __repr__(self) -> str:
        held = f"{len(self)} sequences, {int(self._lengths.sum())} tokens, {self._key_heads} key heads of"
        sizes = f"{self._head_size} and {self._value_size}"
        return f"<{type(self).__name__} of {held} {sizes}, {self.dtype}, pages of {self._pool.page}>"

    def append(self, k: Any, v: Any, sequences: Any = None, lengths: Any = None) -> None:
        """Put tokens at the end of sequences.

        Parameters
        ----------
        k : array (B, Hk, n, D)
            Keys of any number of tokens: float64, float32, float16 or bfloat16. Missing leading axes count as 1.
        v : array (B, Hk, n, E)
            Their values.
        sequences : int array (B,), optional
            Which sequences the rows belong to, each once; without it, all in their order. A freed one begins anew.
        lengths : int array (B,), optional
            How many of the n tokens each sequence gets, from the first on; without it, all.

        Raises
        ------
        TypeError
            For arguments of the wrong kind.
        ValueError
            For shapes and numbers that do not fit.
        MemoryError
            If there are not enough pages; the cache is as it was.

        Notes
        -----
        Numbers are rounded to the cache's dtype. In int8 and int4 a row (a key or a value of one head) that holds NaN
        or an infinity is read back as NaN throughout.
        """
        chosen = self._chosen(sequences, distinct=True)
        k = self._checked("k", k, len(chosen), self._head_size)
        v = self._checked("v", v, len(chosen), self._value_size)
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"v has {v.shape[2]} tokens; needed {k.shape[2]}, as k has")
        counts = counts_of(lengths, len(chosen), k.shape[2])
        begins = self._lengths[chosen]
        ends = begins + counts
        self._prepare(chosen, begins, ends)
        self._write(
            chosen, begins, counts, {"keys": _encoded(self._codes.keys, k), "values": _encoded(self._codes.values, v)}
        )
        self._lengths[chosen] = ends
        if self._freed:
            self._freed = [i for i in self._freed if not self._lengths[i]]
        self._view = None

    def fork(self, i: int) -> int:
        """Begin a sequence with all that another one holds, whose pages it shares until either writes there.

        Parameters
        ----------
        i : int
            The other one.

        Returns
        -------
        int
            The new sequence: one that was freed, the lowest, if there is one, else the next number.
        """
        i = self._one(i)
        if self._freed:
            new = min(self._freed)
            self._freed.remove(new)
        else:
            new = len(self)
            self._lengths = np.append(self._lengths, 0)
            self._table = np.concatenate([self._table, np.zeros((1, self._table.shape[1]), np.int64)])
        self._table[new], self._lengths[new] = self._table[i], self._lengths[i]
        self._pool.hold(self._pages(i))
        self._view = None
        return new

    def free(self, i: int) -> None:
        """Empty a sequence and give back the pages that no other one holds.

        Its number stays, with length 0, and is used again by `append` and `fork`.

        Parameters
        ----------
        i : int
            The sequence.
        """
        i = self._one(i)
        self._pool.release(self._pages(i))
        self._lengths[i] = 0
        if i not in self._freed:
            self._freed.append(i)
        self._view = None

    def trim(self, i: int, last: int, sinks: int = 0) -> None:
        """Keep of a sequence the first `sinks` and the `last` tokens, which move up to follow them.

        Positions are places in the cache, so those of the last tokens become smaller. Where what is dropped are whole
        pages between whole pages, nothing is copied.

        Parameters
        ----------
        i : int
            The sequence.
        last : int
            Tokens kept at the end.
        sinks : int
            Tokens kept at the beginning (Xiao et al. 2023, "Efficient streaming language models with attention sinks").

        Raises
        ------
        MemoryError
            If pages are shared and there are not enough for copies; the cache is as it was.
        """
        i, page = self._one(i), self._pool.page
        last, sinks = at_least("last", last, 0), at_least("sinks", sinks, 0)
        length = int(self._lengths[i])
        dropped = length - sinks - last
        if dropped <= 0:
            return
        old = self._pages(i)
        if sinks % page == 0 and dropped % page == 0:
            gone = old[sinks // page : (sinks + dropped) // page]
            kept = np.concatenate([old[: sinks // page], old[(sinks + dropped) // page :]])
            self._pool.release(gone)
        else:
            kept = self._moved(old, [*range(sinks), *range(sinks + dropped, length)])
        self._table[i, : len(kept)] = kept
        self._lengths[i] = length - dropped
        self._view = None

    def reorder(self, indices: Any) -> None:
        """Let each sequence go on from another one's tokens, as beam search does.

        Parameters
        ----------
        indices : int array (sequences,)
            Sequence b becomes what ``indices[b]`` was. A number may be there several times (its pages are shared), or
            not at all (they are given back). Another number of indices than sequences makes as many of them.
        """
        chosen = indices_of("indices", indices, len(self), distinct=False)
        before = self._held(np.arange(len(self)))
        self._pool.hold(self._held(chosen))
        self._pool.release(before)
        freed = set(self._freed)
        self._freed = [b for b, source in enumerate(chosen.tolist()) if source in freed]
        self._table, self._lengths = self._table[chosen], self._lengths[chosen]
        self._view = None

    def view(self, sequences: Any = None) -> CacheView:
        """Return where `decode` finds what some sequences hold; it is valid until the cache is changed.

        Parameters
        ----------
        sequences : int array (B,), optional
            Which; without it, all.
        """
        if sequences is None:
            if self._view is None:
                self._view = self._view_of(np.arange(len(self)))
            return self._view
        return self._view_of(self._chosen(sequences))

    def arrays(self, sequences: Any = None) -> tuple[AnyArray, AnyArray]:
        """Return keys ``(B, Hk, N, D)`` and values ``(B, Hk, N, E)`` of some sequences as plain arrays.

        Parameters
        ----------
        sequences : int array (B,), optional
            Which; without it, all.

        Returns
        -------
        tuple of array
            The numbers that are stored: float64 of a cache of float64, else float32. N is the longest length; what lies
            beyond a sequence's own is 0.
        """
        chosen = self._chosen(sequences)
        lengths = self._lengths[chosen]
        shape, found = (len(chosen), self._key_heads, int(lengths.max(initial=0))), []
        for name, code, size in zip(PARTS, self._codes, (self._head_size, self._value_size), strict=True):
            out = np.zeros((*shape, size), np.float64 if self.dtype == "float64" else np.float32)
            for b, i in enumerate(chosen.tolist()):
                for page, first, end in self._stretches(i, 0, int(lengths[b])):
                    out[b, :, first:end] = code.decode(self._pool.part(name, page)[:, : end - first], size)
            found.append(out)
        return found[0], found[1]

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the cache to a ``.safetensors`` file, whole or not at all; `load` of its class reads it.

        Parameters
        ----------
        path : str or Path
            The file.
        overwrite : bool
            Whether a file that exists may be replaced.
        """
        files.check_output(path, overwrite, (".safetensors",))
        sizes = self._key_heads, self._head_size, self._value_size
        state = State(self._kind, self._dtype, sizes, self._pool, self._table, self._lengths, self._freed)
        files.write_arrays(path, as_arrays(state), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return a cache that `save` wrote, with the same sequences, lengths and sharing.

        Parameters
        ----------
        path : str or Path
            The file.

        Raises
        ------
        ValueError
            If it is damaged or holds something else, or a cache of another class.
        """
        state = from_arrays(files.read_arrays(path), str(path))
        if state.kind != cls._kind:
            raise ValueError(f"{path} holds a {KINDS[state.kind]}; needed a {cls.__name__}")
        cache = cls.__new__(cls)
        (cache._dtype, cache._codes), cache._pool = codes_named(state.dtype), state.pool
        cache._table, cache._lengths = state.table, state.lengths
        cache._key_heads, cache._head_size, cache._value_size = state.sizes
        cache._freed, cache._view = state.freed, None
        return cache

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_view": None}  # whose addresses mean nothing elsewhere

    # --- pages of sequences ---

    def _pages(self, i: int) -> AnyArray:
        return self._table[i, : -(-int(self._lengths[i]) // self._pool.page)]

    def _held(self, sequences: AnyArray) -> AnyArray:
        """Return the pages of some sequences, one after the other."""
        return np.concatenate([np.zeros(0, np.int64), *(self._pages(i) for i in sequences.tolist())])

    def _stretches(self, i: int, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Return the pages that hold tokens `begin` to `end`, with the first of these and the end of them in each."""
        page = self._pool.page
        return [
            (int(self._table[i, n]), max(begin, n * page), min(end, (n + 1) * page))
            for n in range(begin // page, -(-end // page))
        ]

    def _prepare(self, chosen: AnyArray, begins: AnyArray, ends: AnyArray) -> None:
        """Give sequences the pages for tokens to come: new ones, and copies of those that are shared."""
        page, pool = self._pool.page, self._pool
        have, need = -(-begins // page), -(-ends // page)
        writes = (begins % page > 0) & (ends > begins)  # into a page that is there
        lasts = self._table[chosen[writes], have[writes] - 1]
        copies = 0
        if (pool.holders[lasts] > 1).any():
            shared, writers = np.unique(lasts, return_counts=True)
            copies = int(np.minimum(writers, pool.holders[shared] - 1).sum())  # the last of all holders may keep it
        news = int((need - have).sum())
        if not news + copies:
            return
        pool.reserve(news + copies)
        most = int(need.max(initial=0))
        if most > self._table.shape[1]:
            more = max(most, 2 * self._table.shape[1]) - self._table.shape[1]
            self._table = np.concatenate([self._table, np.zeros((len(self), more), np.int64)], axis=1)
        for i, last in zip(chosen[writes].tolist(), (have[writes] - 1).tolist(), strict=True):
            if pool.holders[self._table[i, last]] > 1:
                self._table[i, last] = pool.copy(int(self._table[i, last]))
        for i, first, end in zip(chosen.tolist(), have.tolist(), need.tolist(), strict=True):
            for n in range(first, end):
                self._table[i, n] = pool.take()

    def _write(self, chosen: AnyArray, begins: AnyArray, counts: AnyArray, rows: dict[str, AnyArray]) -> None:
        """Write the first tokens of rows (B, Hk, n, ...) of each sequence to their places."""
        page, pool = self._pool.page, self._pool
        if counts.size and (counts == 1).all():  # as after each step of decoding: all sequences at once
            pages = self._table[chosen, begins // page]
            pool.write(pages, begins % page, {name: x[:, :, 0] for name, x in rows.items()})
            return
        for r, i in enumerate(chosen.tolist()):
            begin = int(begins[r])
            for held, first, end in self._stretches(i, begin, begin + int(counts[r])):
                at = slice(first % page, first % page + end - first)
                for name, x in rows.items():
                    pool.part(name, held)[:, at] = x[r, :, first - begin : end - begin]

    def _moved(self, old: AnyArray, tokens: list[int]) -> AnyArray:
        """Return new pages with some of the tokens of old ones, which are given back."""
        page, pool = self._pool.page, self._pool
        count = -(-len(tokens) // page)
        own = int((pool.holders[old] == 1).sum())
        places = np.array(tokens, np.int64)
        kept = {name: np.concatenate([pool.part(name, int(p)) for p in old], axis=1)[:, places] for name in PARTS}
        pool.reserve(max(0, count - own))
        pool.release(old)
        new = np.array([pool.take() for _ in range(count)], np.int64)
        for n, p in enumerate(new.tolist()):
            part = slice(n * page, min((n + 1) * page, len(tokens)))
            for name, x in kept.items():
                pool.part(name, p)[:, : part.stop - part.start] = x[:, part]
        return new

    def _view_of(self, chosen: AnyArray) -> CacheView:
        page, pool = self._pool.page, self._pool
        lengths = self._lengths[chosen]
        longest = int(lengths.max(initial=0))
        table = self._table[chosen, : max(1, -(-longest // page))]
        nothing = np.zeros(table.shape, np.uint64)
        keys, values = (pool.addresses[name][table] if len(pool) else nothing for name in PARTS)
        key, value = (shape[-1] * dtype.itemsize for shape, dtype in map(pool.stored, PARTS))
        shared = len(pool) > 0 and bool((pool.holders[table] > 1).any())  # what lies beyond a length may say so, too
        return CacheView(
            self._codes.keys.name, self._codes.values.name, lengths, longest, self._key_heads, self._head_size,
            self._value_size, page, keys, values, key, page * key, value, page * value, shared, table, pool,
        )  # fmt: skip

    # --- arguments ---

    def _chosen(self, sequences: Any, distinct: bool = False) -> AnyArray:
        if sequences is None:
            return np.arange(len(self))
        return indices_of("sequences", sequences, len(self), distinct)

    def _one(self, i: int) -> int:
        if not 0 <= (number := at_least("i", i, 0)) < len(self):
            raise ValueError(f"i is {i}; needed 0 to {len(self) - 1}, a sequence")
        return number

    def _checked(self, name: str, x: Any, sequences: int, size: int) -> AnyArray:
        array = host_array(x, name)
        if not 2 <= array.ndim <= 4:
            raise ValueError(f"{name} has {array.ndim} axes, shape {array.shape}; needed 2 to 4, (B, Hk, n, {size})")
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        B, heads, _, last = array.shape
        if (B, heads, last) != (sequences, self._key_heads, size):
            needed = f"({sequences}, {self._key_heads}, n, {size})"
            raise ValueError(f"{name} has shape {array.shape}; needed {needed}: sequences, key heads, tokens, size")
        return array


def _encoded(code: Code, x: AnyArray) -> AnyArray:
    """Return rows as they are stored: integers, which take NumPy many steps, by compiled code."""
    if not code.bits:
        return code.encode(x)
    from attn_numba.cpu.encode import encoded

    return encoded(code, x)
