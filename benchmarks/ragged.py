"""Sequences of unequal lengths against what their visible pairs would take at the rate of long ones.

    python benchmarks/ragged.py                   one thread, about a minute
    python benchmarks/ragged.py rate --threads 2

Part: ``rate`` (time for each visible pair of 32 sequences of 10 to 1000 tokens, over that of a plain call of 1000
tokens with the same mask, 8 heads of 64 numbers in float32; and so for a loop of plain calls and for filling up). The
long sequence lies as the others do, (tokens, heads, size), or head by head, which makes any call some 10 % faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

import attn_numba as an
from timing import Row, interleave, ratio, run_parts

SEQUENCES, SHORTEST, LONGEST, HEADS, D = 32, 10, 1000, 8, 64


def rate(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield times of a visible pair over those of a long sequence."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, SEQUENCES)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    q, k, v = rng.standard_normal((3, starts[-1], HEADS, D), np.float32)
    alike = rng.standard_normal((3, LONGEST, HEADS, D), np.float32).swapaxes(1, 2)
    by_head = np.ascontiguousarray(alike)

    def one_by_one(mask: an.Causal | None) -> list[np.ndarray]:
        each = (slice(*starts[b : b + 2]) for b in range(SEQUENCES))
        return [an.attention(*(x[own].swapaxes(0, 1) for x in (q, k, v)), mask=mask) for own in each]

    def filled_up(mask: an.Causal | None) -> np.ndarray:
        padded, own = an.unpack(q, starts)
        arrays = (x.swapaxes(1, 2) for x in (padded, an.unpack(k, starts)[0], an.unpack(v, starts)[0]))
        out = an.attention(*arrays, mask=own if mask is None else own & mask)
        return an.pack(out.swapaxes(1, 2), lengths)[0]

    for name, mask in (("full", None), ("causal", an.Causal())):
        visible = float((lengths**2).sum() if mask is None else (lengths * (lengths + 1)).sum() / 2)
        dense = LONGEST**2 if mask is None else LONGEST * (LONGEST + 1) / 2
        calls = {
            "laid out alike": lambda mask=mask: an.attention(*alike, mask=mask),
            "head by head": lambda mask=mask: an.attention(*by_head, mask=mask),
            "ragged_attention": lambda mask=mask: an.ragged_attention(q, k, v, starts, starts, mask=mask),
            "one call for each": lambda mask=mask: one_by_one(mask),
            "filled up": lambda mask=mask: filled_up(mask),
        }
        times = interleave(calls, arguments.turns, arguments.seconds)
        for way in list(calls)[2:]:
            for long in list(calls)[:2]:
                found = ratio(times, way, long) * dense / visible
                yield f"{name}, {way}: time of a pair over that of a long sequence {long}", found, "times"


if __name__ == "__main__":
    run_parts(__doc__, "ragged", {"rate": rate})
