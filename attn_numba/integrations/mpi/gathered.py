"""All keys and values on every rank, once: for sequences so short that a ring has nothing to gain.

Each row then meets all its keys in one call, so any normalizer will do, and results have the same bits as on one
machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba import api
from attn_numba.integrations.mpi.agreement import together
from attn_numba.integrations.mpi.layouts import Stretch
from attn_numba.integrations.mpi.shard import Shard
from attn_numba.partial import LearnedSums
from attn_numba.problem import Problem
from attn_numba.rules.blocks import Block, learned_place
from attn_numba.rules.data import AnyArray
from attn_numba.rules.results import Gradients

__all__ = ["attention_of_gathered", "gradients_of_gathered"]


def gathered(shard: Shard, part: AnyArray) -> AnyArray:
    """Return the rows (B, Hk, N, ...) of which each rank holds a part (B, Hk, tokens, ...), on every rank."""
    B, Hk, _, size = part.shape
    counts = shard.counts()
    whole = np.empty((B, Hk, shard.n_tokens, size), part.dtype)
    parts = np.empty(whole.size, part.dtype)
    lengths = [B * Hk * count * size * part.itemsize for count in counts]
    bits, kind = _bits(parts)
    shard.space.Allgatherv(_bits(np.ascontiguousarray(part)), [bits, lengths, kind])
    ends = np.cumsum([B * Hk * count * size for count in counts])
    for count, end, stretches in zip(counts, ends, shard.stretches, strict=True):
        block = parts[end - B * Hk * count * size : end].reshape(B, Hk, count, size)
        first = 0
        for stretch in stretches:
            length = stretch[1] - stretch[0]
            whole[:, :, slice(*stretch)] = block[:, :, first : first + length]
            first += length
    return whole


def _bits(array: AnyArray) -> list[Any]:
    from mpi4py import MPI

    return [array.reshape(-1).view(np.uint8), MPI.BYTE]


def attention_of_gathered(shard: Shard, call: Problem, out: AnyArray, lse: AnyArray | None) -> None:
    """Compute this rank's rows.

    Parameters
    ----------
    shard : Shard
        Who holds what.
    call : Problem
        With the arrays of this rank and the sizes of the whole.
    out : array (B, H, tokens, E)
        Written.
    lse : array (B, H, tokens), optional
        Written, in the accumulator's dtype.
    """
    k, v = gathered(shard, call.k), gathered(shard, call.v)

    def compute() -> None:
        for rows, at in shard.own_rows():
            q, place = call.q[:, :, at], out[:, :, at]
            rules = call.in_block(with_all_keys(call, rows)).options()
            found = api.attention(q, k, v, **rules, backend="cpu", out=place, return_lse=lse is not None)
            if lse is not None:
                lse[:, :, at] = found.lse

    together(shard.space, compute)


def with_all_keys(call: Problem, rows: Stretch) -> Block:
    """Return the block in which some rows meet all keys."""
    return Block.of_rows(rows, (0, call.sizes.N), call.sizes)


def gradients_of_gathered(
    shard: Shard, call: Problem, dout: AnyArray, saved: tuple[AnyArray, AnyArray] | None, learned: LearnedSums
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Return the gradients by this rank's q, k and v, in the accumulator's dtype, and add those by arrays of rules.

    Parameters
    ----------
    shard : Shard
        Who holds what.
    call : Problem
        With the arrays of this rank, in the accumulator's dtype, and the sizes of the whole.
    dout : array (B, H, tokens, E)
        Gradient by this rank's output.
    saved : pair of arrays (B, H, tokens, E), (B, H, tokens), optional
        What the forward call returned.
    learned : LearnedSums
        Where gradients by arrays of rules go: those by this rank's rows.
    """
    number = call.accumulator
    q, k, v = call.q, gathered(shard, call.k), gathered(shard, call.v)
    dq, dk, dv = np.zeros(q.shape, number), np.zeros(k.shape, number), np.zeros(v.shape, number)

    def compute() -> None:
        for rows, at in shard.own_rows():
            block = with_all_keys(call, rows)
            part = call.in_block(block)
            kept = None if saved is None else tuple(x[:, :, at] for x in saved)
            found = api.attention_vjp(q[:, :, at], k, v, dout[:, :, at], **part.options(), backend="cpu", saved=kept)
            dq[:, :, at] = found.q
            np.add(dk, found.k, out=dk)
            np.add(dv, found.v, out=dv)
            _add_learned(call, learned, found, part, block)

    together(shard.space, compute)
    return dq, _scattered(shard, dk), _scattered(shard, dv)


def _add_learned(call: Problem, learned: LearnedSums, found: Gradients, part: Problem, block: Block) -> None:
    modifiers = {id(cut): rule for cut, rule in zip(part.modifiers, call.modifiers, strict=True)}
    others = {id(part.score): call.score, id(part.normalizer): call.normalizer}
    for rule, arrays in found.learned:
        if id(rule) in modifiers:
            original = modifiers[id(rule)]
            learned.add(original, arrays, learned_place(original, block))
        else:
            learned.add(others[id(rule)], arrays)


def _scattered(shard: Shard, whole: AnyArray) -> AnyArray:
    """Return the sum over the ranks of this rank's rows, in the order of the ranks."""
    B, Hk, _, size = whole.shape
    counts, mine = shard.counts(), len(shard.positions)
    sent = [
        np.concatenate([whole[:, :, slice(*s)] for s in stretches] or [whole[:, :, :0]], axis=2).ravel()
        for stretches in shard.stretches
    ]
    received = np.empty((len(counts), B, Hk, mine, size), whole.dtype)
    word = whole.itemsize
    lengths = [array.size * word for array in sent]
    flat = np.concatenate(sent)
    (bits, kind), (into, _) = _bits(flat), _bits(received)
    shard.space.Alltoallv([bits, lengths, kind], [into, [B * Hk * mine * size * word] * len(counts), kind])
    total = received[0]
    for part in received[1:]:
        total += part
    return total
