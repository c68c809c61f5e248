"""What `test_mpi.py` starts under mpiexec: ``mpiexec -n 3 python -m mpi4py mpi_checks.py CHECK [WORD ...]``.

A check that fails raises, which ends all ranks; at its end rank 0 prints a line that begins with "passed".
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

import attn_numba as an
from attn_numba.rules import as_modifiers
from cases import CASES

COMM = MPI.COMM_WORLD
TOLERANCE = {"float64": 1e-13, "float32": 3e-6}  # of one process, relative to the largest number if that is above 1


def square(case):
    """Return a case with as many queries as keys."""
    z = case.sizes
    return case if z.M == z.N else replace(case, sizes=z._replace(M=z.N))


def built(case, dtype):
    """Return q, k, v, dout with four axes and the rules of a case; None if it has none with as many queries as keys."""
    try:
        q, k, v, rules = square(case).build(dtype)
        an.mask_array(None, (1, 1, q.shape[-2], 1))
        an.attention(q, k, v, **rules)
    except (AssertionError, ValueError):
        return None
    if q.shape[-2] == 0 or q.shape[-2] != k.shape[-2]:
        return None
    dout = np.random.default_rng(1).standard_normal((*q.shape[:-1], v.shape[-1])).astype(q.dtype)
    return q, k, v, dout, rules


def far(found, expected):
    """Return how far results are apart, over the largest if that is above 1; infinite where one is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    with np.errstate(invalid="ignore"):
        apart = np.where(found == expected, 0, np.abs(found - expected))
        unlike = np.isfinite(found) != np.isfinite(expected)
    apart = np.where(np.isfinite(apart), apart, np.where(unlike, np.inf, 0))
    size = np.abs(expected[np.isfinite(expected)]).max(initial=1)
    return float(apart.max(initial=0) / size)


def differentiable(rules):
    return all(m.differentiable for m in as_modifiers(rules.get("modifiers")))


def streams(rules):
    return isinstance(rules.get("normalizer") or an.Softmax(), an.Softmax)


def every_case(start="0", step="1", dtypes="float64,float32"):
    """Hold the ring to one process, and the gathered keys to its bits, in each layout."""
    worst = dict.fromkeys(TOLERANCE, 0.0)
    count = 0
    for number, case in enumerate(CASES):
        if number % int(step) != int(start):
            continue
        for dtype in dtypes.split(","):
            made = built(case, dtype)
            if made is None:
                continue
            count += 1
            layout = ("zigzag", "contiguous")[(count + number) % 2]
            error = compared(*made, layout, f"{case.name}, {dtype}, {layout}", dtype)
            worst[dtype] = max(worst[dtype], error)
    return f"{count} cases, errors {worst}"


def compared(q, k, v, dout, rules, layout, name, dtype):
    """Return the error of a case on the ring."""
    shard = an.mpi.Shard(q.shape[-2], layout=layout)
    mine = [shard.take(x) for x in (q, k, v, dout)]
    whole = an.attention(q, k, v, **rules, return_lse=streams(rules))
    whole = whole if streams(rules) else (whole,)
    exact = an.mpi.attention(*mine[:3], shard=shard, **rules, exchange="allgather", return_lse=streams(rules))
    for found, expected in zip(exact if streams(rules) else (exact,), whole, strict=True):
        axis = -2 if found.ndim == q.ndim else -1
        assert np.array_equal(found, shard.take(expected, axis), equal_nan=True), f"{name}: other bits"
    if not streams(rules):
        refused(lambda: an.mpi.attention(*mine[:3], shard=shard, **rules, exchange="ring"), NotImplementedError, "max")
        return gradients_apart(q, k, v, dout, rules, shard, mine, name, dtype, ("allgather",), None)
    ring = an.mpi.attention(*mine[:3], shard=shard, **rules, exchange="ring", return_lse=True)
    error = max(far(ring.out, shard.take(whole[0])), far(ring.lse, shard.take(whole[1], -1)))
    assert error <= TOLERANCE[dtype], f"{name}: {error}"
    spoiled = not np.isfinite(whole[0]).all()
    ways = () if spoiled else ("ring", "allgather")
    return max(error, gradients_apart(q, k, v, dout, rules, shard, mine, name, dtype, ways, ring))


def gradients_apart(q, k, v, dout, rules, shard, mine, name, dtype, ways, saved):
    """Return the error of gradients: by q, k, v and by the arrays of rules."""
    if not differentiable(rules):
        return 0.0
    expected = an.attention_vjp(q, k, v, dout, **rules)
    worst = 0.0
    for way in ways:
        for kept in (None, saved)[: 1 if saved is None else 2]:
            found = an.mpi.attention_vjp(*mine, shard=shard, **rules, exchange=way, saved=kept)
            errors = {x: far(getattr(found, x), shard.take(getattr(expected, x))) for x in "qkv"}
            learned = zip(found.learned, expected.learned, strict=True)
            for (rule, arrays), (same, others) in learned:
                assert rule is same
                assert arrays.keys() == others.keys()
                errors |= {f"{type(rule).__name__}.{x}": far(arrays[x], others[x]) for x in arrays}
            error = max(errors.values())
            assert error <= TOLERANCE[dtype], f"gradients of {name}, {way}: {errors}"
            worst = max(worst, error)
    return worst


def refused(call, kind, words):
    """Check that every rank raises."""
    with pytest.raises(kind, match=words):
        call()


if __name__ == "__main__":
    start = time.perf_counter()
    said = globals()[sys.argv[1]](*sys.argv[2:])
    COMM.Barrier()
    if COMM.rank == 0:
        print(f"passed on {COMM.size} ranks in {time.perf_counter() - start:.1f} s: {said}")
