"""Run decode on a card: bring the pages that sequences hold there, start the two kernels, bring back the results."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba.gpu import decode, driver
from attn_numba.gpu.arrays import downloaded, empty_view, uploaded
from attn_numba.gpu.driver import THREAD_STREAM, Card
from attn_numba.gpu.engine import rules_of
from attn_numba.gpu.launch import ready
from attn_numba.gpu.stored import Stored
from attn_numba.gpu.target import SIMULATED
from attn_numba.problem import Problem
from attn_numba.rules.storage import CacheView

__all__ = ["run"]


def run(call: Problem, view: CacheView, out: np.ndarray, lse: np.ndarray | None, weights: np.ndarray | None) -> None:
    """Compute a call into `out` (B, H, M, E), `lse` (B, H, M) and `weights` (B, H, M, N), all in host memory.

    Of the call, q, sizes and rules are read; its keys and values are those of the cache's `view`. Pages that several
    sequences share travel once.
    """
    stored = Stored(view.key_code, call.sizes.D), Stored(view.value_code, call.sizes.E)
    inputs = (_bits(call.q), *_pages(view, stored), _table(view), view.lengths.astype(np.int32))
    results = (_bits(out), lse, weights)
    if SIMULATED:
        _start(call, view, stored, inputs, results, None, 0)
        return
    card, handle = driver.card(0), THREAD_STREAM
    with card.current():
        sent = tuple(uploaded(x, card, handle) for x in inputs)
        views = tuple(None if x is None else empty_view(x.shape, x.dtype.name, card, handle) for x in results)
        _start(call, view, stored, sent, views, card, handle)
        for found, array in zip(views, (out, lse, weights), strict=True):
            if found is not None and array is not None:
                downloaded(found, array, card, handle)


def _start(
    call: Problem, view: CacheView, stored: tuple[Stored, Stored], inputs: tuple[Any, ...], results: tuple[Any, ...],
    card: Card | None, handle: int,
) -> None:  # fmt: skip
    s, number = call.sizes, call.accumulator
    out, lse, weights = results
    rows = s.H // s.Hk * s.M
    rules = rules_of(call, card, handle)
    sink = rules.sink is not None
    options = decode.options_of(
        *stored, call.dtype, rows, sink=sink, lse=lse is not None, weights=weights is not None
    )  # fmt: skip
    splits = -(-s.N // options.cut.split)

    def room(count: int) -> Any:
        return np.empty(count, number) if card is None else empty_view((count,), number.name, card, handle)

    def flat(x: Any) -> Any:  # the simulator has no addresses
        return x.reshape(-1) if card is None and x is not None else x

    parts, facts = room(splits * s.B * s.H * s.M * s.E), room(2 * splits * s.B * s.H * s.M)
    stream = None if card is None else card.stream(handle)
    hooks, grid = rules.bound.hooks, decode.grid(options, s.B, s.Hk, rows, s.N)
    sizes = view.page, s.H // s.Hk, s.Hk, s.N
    arguments = *inputs, parts, facts, flat(weights), rules.entries, number.type(call.scale), *sizes
    ready(decode.splitting(hooks, rules.bound, options), card).start(grid, stream, arguments)
    ready(decode.merging(hooks, options), card).start(
        decode.merge_grid(s.B, s.H, s.M), stream,
        (parts, facts, inputs[-1], out, flat(lse), flat(weights), flat(rules.sink), s.N),
    )  # fmt: skip


def _held(view: CacheView) -> tuple[np.ndarray, np.ndarray]:
    """Return the pages that sequences hold, each once, and which entries of the table are held."""
    used = np.arange(view.table.shape[1]) < -(-view.lengths // view.page)[:, None]
    return np.unique(view.table[used]), used


def _table(view: CacheView) -> np.ndarray:
    """Return the pages of each sequence as numbers of those that travel, int32 (B, pages)."""
    pages, used = _held(view)
    table = np.zeros(view.table.shape, np.int32)
    table[used] = np.searchsorted(pages, view.table[used])
    return table


def _pages(view: CacheView, stored: tuple[Stored, Stored]) -> tuple[np.ndarray, ...]:
    """Return keys and values of the pages that travel, as flat arrays of what the kernels read."""
    pages = _held(view)[0].tolist()
    found = []
    for name, rows in zip(("keys", "values"), stored, strict=True):
        flat = np.stack([view.keep.part(name, page) for page in pages]).reshape(-1)
        found.append(flat.view(np.uint32) if rows.words else _bits(flat))
    return tuple(found)


def _bits(array: np.ndarray) -> np.ndarray:
    """Return an array as kernels see it: numbers of 16 bits as whole ones."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array
