"""Gradients of a call that all ranks make together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from attn_numba import problem as problems
from attn_numba.integrations.mpi.agreement import agree, together
from attn_numba.integrations.mpi.gathered import gradients_of_gathered
from attn_numba.integrations.mpi.local_call import RING, checked, exchange_of, facts_of
from attn_numba.integrations.mpi.ring import Ring, on_ring
from attn_numba.integrations.mpi.shard import Shard
from attn_numba.partial import LearnedSums, Sums, delta_of, gradient_engine
from attn_numba.problem import Problem
from attn_numba.rules import Softmax
from attn_numba.rules.arguments import check_differentiable, check_gradient, check_saved
from attn_numba.rules.data import AnyArray
from attn_numba.rules.results import Gradients

__all__ = ["gradients_together"]

Saved = tuple[AnyArray, AnyArray]
Three = tuple[AnyArray, AnyArray, AnyArray]


class Given(NamedTuple):
    """What one rank's share of the call comes to, all of it checked."""

    own: Problem  # with the sizes of this rank
    wide: Problem  # in the accumulator's dtype, with the sizes of the whole
    dout: AnyArray  # (B, H, tokens, E)
    saved: Saved | None
    ring: Ring | None


def gradients_together(
    shard: Shard, arrays: tuple[Any, Any, Any], dout: Any, rules: Mapping[str, Any], saved: Any, exchange: Any
) -> Gradients:
    """Return the gradients; arguments are those of `attention_vjp`, checked here, by all ranks before any computes."""

    def prepare() -> tuple[Given, dict[str, Any]]:
        given, found = _given(shard, arrays, dout, rules, saved, exchange)
        lost = gradient_engine().forward_is_lost(given.own, given.saved)
        facts = facts_of(given.wide, found, rules) | {"dtype of q, k, v": given.own.dtype}
        return given, facts | {"saved": saved is not None, "lost?": lost}

    given, facts = agree(shard.space, prepare)
    lost = any(rank["lost?"] for rank in facts)
    learned = LearnedSums(given.wide)
    if given.ring is None:
        kept = None if lost else given.saved
        dq, dk, dv = gradients_of_gathered(shard, given.wide, given.dout, kept, learned)
    else:
        dq, dk, dv = _on_ring(shard, given, given.ring, lost, learned)
    _add_ranks(shard, learned)
    dtype, shapes = given.own.q.dtype, (problems.host_array(x, "q, k, v").shape for x in arrays)
    with np.errstate(all="ignore"):
        dq, dk, dv = (x.reshape(y).astype(dtype, copy=False) for x, y in zip((dq, dk, dv), shapes, strict=True))
    return Gradients(dq, dk, dv, learned.found())


def _given(
    shard: Shard, arrays: tuple[Any, Any, Any], dout: Any, rules: Mapping[str, Any], saved: Any, exchange: Any
) -> tuple[Given, str]:
    own, whole = checked(shard, *arrays, rules)
    check_differentiable(own.modifiers)
    s, number = own.sizes, own.accumulator
    given = problems.host_array(dout, "dout")
    shape = (s.B, s.H, s.M, s.E)
    check_gradient(given.shape, problems.dtype_name(given.dtype), shape[4 - own.rank :], own.dtype)
    out, lse = check_saved(saved, own.normalizer, shape[4 - own.rank :], own.dtype)
    kept = None if saved is None else (np.asarray(out).reshape(shape), np.asarray(lse).reshape(shape[:3]))
    found = exchange_of(exchange, whole)
    q, k, v = (x.astype(number, copy=False) for x in (whole.q, whole.k, whole.v))
    wide = whole._replace(q=q, k=k, v=v, dtype=number.name)
    ring = Ring(shard, problems.mapped(wide), gradients=True) if found == RING else None
    return Given(own, wide, given.reshape(shape).astype(number, copy=False), kept, ring), found


def _on_ring(shard: Shard, given: Given, ring: Ring, lost: bool, learned: LearnedSums) -> Three:
    """Return the gradients by this rank's q, k and v, and add those by arrays of rules."""
    wide, dout = given.wide, given.dout
    engine = gradient_engine()
    out, lse, facts = _forward(shard, given, ring, lost)
    delta = delta_of(dout, out)
    inner = ring.whole
    sums = Sums(np.zeros(inner.q.shape, inner.q.dtype), np.zeros((*lse.shape, 2), inner.q.dtype), learned)
    dk, dv, scale = ring.gradients(dout, lse, facts, delta, sums)
    local = given.own._replace(q=out, k=out, v=out)  # for sizes and sink alone
    if given.saved is not None and not lost:
        together(
            shard.space,
            lambda: engine.require_consistent(local, lse, sums.row_sums, dout, out, delta, scale),
        )
    with np.errstate(all="ignore"):
        if isinstance(wide.normalizer, Softmax):
            learned.add(wide.normalizer, engine.sink_gradient(local, lse, delta, sums.row_sums))
        dq, dk, arrays = wide.score.pulled(wide.q, wide.k, sums.q, dk)
    learned.add(wide.score, arrays)
    return dq, dk, dv


def _forward(shard: Shard, given: Given, ring: Ring, lost: bool) -> tuple[AnyArray, AnyArray, AnyArray | None]:
    """Return the output, the lse in float64 and the facts of rows: what was saved, which has no facts, or found anew.

    All ranks compute it again if one has lost it.
    """
    if given.saved is not None and not lost:
        return given.saved[0], given.saved[1].astype(np.float64), None
    forward = together(shard.space, lambda: Ring(shard, ring.whole))
    rows = on_ring(forward, np.empty(given.dout.shape, given.dout.dtype))
    if given.saved is not None:
        saved_out, saved_lse = given.saved
        together(shard.space, lambda: gradient_engine().require_same(saved_out, saved_lse, rows.out, rows.lse))
    return rows.out, rows.lse, rows.facts


def _add_ranks(shard: Shard, learned: LearnedSums) -> None:
    """Put the sum over all ranks in place of each rank's sums; on rank 0 first, so that all get the same bits."""
    for array in learned.arrays():
        total = np.empty_like(array)
        shard.space.Reduce(array, total, root=0)
        shard.space.Bcast(total, root=0)
        array[...] = total
