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
CANCELS = "old fill, divided by the size"  # the case that tests/reference/test_gradients.py excepts too


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
    """Hold the ring to one process, and the gathered keys to its bits: every so manieth case, layouts by turns.

    Of the dtypes named, or of one of the two by turns, "alternate".
    """
    worst = dict.fromkeys(TOLERANCE, 0.0)
    count = 0
    for number, case in enumerate(CASES):
        if number % int(step) != int(start):
            continue
        alternate = ("float64", "float32")[number // int(step) % 2 : number // int(step) % 2 + 1]
        for dtype in alternate if dtypes == "alternate" else dtypes.split(","):
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
            if name.startswith(CANCELS):  # the temperature's: of scores of -1e9, each rounded, that cancel
                assert errors.pop("Temperature.t") <= 5e9 * np.finfo(dtype).eps, f"gradients of {name}, {way}"
            # Sums over all rows: in float32 both are off, and one process by more than the ring, which sums in float64.
            wide = {x: error for x, error in errors.items() if "." in x and dtype == "float32"}
            assert max(wide.values(), default=0) <= 3 * TOLERANCE[dtype], f"gradients of {name}, {way}: {wide}"
            error = max(error for x, error in errors.items() if x not in wide)
            assert error <= TOLERANCE[dtype], f"gradients of {name}, {way}: {errors}"
            worst = max(worst, error)
    return worst


def refused(call, kind, words):
    """Check that every rank raises."""
    with pytest.raises(kind, match=words):
        call()


def raised(call, kind):
    """Return what a call says that raises; every rank must."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def arrays(n, dtype=np.float64, B=2, H=4, Hk=2, D=8, E=5):
    """Return q, k, v, dout of n tokens, the same on every rank."""
    random = np.random.default_rng(n)
    shapes = (B, H, n, D), (B, Hk, n, D), (B, Hk, n, E), (B, H, n, E)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def shards():
    """Every token is held once, and taken and gathered whole: many lengths, fewer tokens than ranks, any axis."""
    for n in (1, 2, 3, 7, 64, 101):
        for layout in ("contiguous", "zigzag"):
            shard = an.mpi.Shard(n, layout=layout)
            held = COMM.allgather(shard.positions)
            assert sorted(np.concatenate(held)) == list(range(n))
            assert max(map(len, held)) - min(map(len, held)) <= 2
            whole = np.arange(n * 6).reshape(2, n, 3)
            for root in (None, 0, COMM.size - 1):
                found = shard.gather(shard.take(whole), root=root)
                assert (found is None) == (root not in (None, COMM.rank))
                assert found is None or (found == whole).all()
            labels = np.array([n, 5, 7], bool)[whole % 3]
            found = shard.gather(shard.take(labels.swapaxes(0, 1), axis=0), axis=0, root=None)
            assert (found.swapaxes(0, 1) == labels).all()
            mine = shard.take(whole)
            mine[...] = -1
            assert whole.min() == 0
    auto = {
        "contiguous": (None, an.SlidingWindow(64, 0), an.SlidingWindow(30, 30), an.SameDocument(np.arange(512) // 32)),
        "zigzag": (an.Causal(), an.Causal() & an.Padding([512, 400]), np.tril(np.ones((512, 512), bool)) & an.Causal()),
    }
    for layout, masks in auto.items() if COMM.size > 1 else ():
        for mask in masks:
            assert an.mpi.Shard(512, mask=mask).layout == layout, mask
    return "dealt and gathered"


def agreement():
    """What is wrong on one rank is raised on all, and the ranks go on together."""
    last = COMM.size - 1
    q, k, v, dout = arrays(40)
    shard = an.mpi.Shard(40)
    mine = [shard.take(x) for x in (q, k, v, dout)]
    here = COMM.rank == last
    call = lambda *x, **rules: an.mpi.attention(*(x or mine[:3]), shard=shard, **rules)  # noqa: E731

    said = raised(lambda: call(mine[0][:, :, 1:] if here else mine[0], *mine[1:3]), ValueError)
    assert f"q has {len(shard.positions) - 1 if here else ''}" in said
    assert said.startswith("q has") if here else said.startswith(f"rank {last}: q has"), said
    said = raised(lambda: call(mask=np.ones((40, 40)) if here else None), TypeError)
    assert "boolean" in said
    said = raised(lambda: call(mask=an.Causal() if here else None), ValueError)
    assert said == f"mask differs between ranks: None on rank 0, ('Causal',) on rank {last}"
    said = raised(lambda: call(modifiers=an.SoftCap(2.0 + here)), ValueError)
    assert "modifiers differs between ranks" in said
    said = raised(lambda: call(exchange="ring" if here else "allgather"), ValueError)
    assert "exchange differs" in said
    for exchange in ("ring", "allgather"):
        out = call(exchange=exchange, return_lse=True)
        other = (out.out, out.lse + 3 * here)
        vjp = lambda saved: an.mpi.attention_vjp(*mine, shard=shard, exchange=exchange, saved=saved)  # noqa: E731, B023
        assert "of another call" in raised(lambda: vjp(other), ValueError)  # noqa: B023
        assert "saved" in raised(lambda: vjp(None if here else (out.out, out.lse)), ValueError)  # noqa: B023
        vjp((out.out, out.lse))
    said = raised(lambda: an.mpi.Shard(40 + here), ValueError)
    assert said == f"n_tokens differs between ranks: 40 on rank 0, 41 on rank {last}"
    assert "layout" in raised(lambda: an.mpi.Shard(40, layout="striped"), ValueError)
    assert "shard.gather" in raised(lambda: shard.gather(mine[0][:, :, :3] if here else mine[0]), ValueError).lower()
    assert "Sparsemax" in raised(lambda: call(normalizer=an.Sparsemax(), exchange="ring"), NotImplementedError)
    assert "RowMask" in raised(lambda: call(mask=RowMask()), NotImplementedError)
    assert far(call(), shard.take(an.attention(q, k, v))) < 1e-13
    return "raised together"


class RowMask(an.rules.Mask):
    """A mask of one's own that reads rows, whose parts nobody knows how to make."""

    @staticmethod
    def allowed(b, h, i, j, p):
        return i >= j


def kinds():
    """Dtypes, ranks of arrays, strides, `out`, threads, communicators; inputs stay, the same bits come twice."""
    import ml_dtypes

    for dtype, tolerance in ((np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2), (np.float32, 3e-6)):
        q, k, v, dout = arrays(70, dtype)
        exact = an.attention(*(x.astype(np.float64) for x in (q, k, v)), mask=an.Causal())
        of = an.attention_vjp(*(x.astype(np.float64) for x in (q, k, v, dout)), mask=an.Causal())
        for exchange in ("ring", "allgather"):
            shard = an.mpi.Shard(70, mask=an.Causal())
            mine = [shard.take(x) for x in (q, k, v, dout)]
            out = an.mpi.attention(*mine[:3], shard=shard, mask=an.Causal(), exchange=exchange)
            assert out.dtype == dtype
            assert far(out, shard.take(exact)) < tolerance
            found = an.mpi.attention_vjp(*mine, shard=shard, mask=an.Causal(), exchange=exchange)
            for name in "qkv":
                assert getattr(found, name).dtype == dtype
                assert far(getattr(found, name), shard.take(getattr(of, name))) < tolerance, (dtype, name)
    laid_out()
    return "right"


def laid_out():
    q, k, v, dout = arrays(90, np.float32, B=1, H=2, Hk=2, E=8)
    for comm in (COMM, COMM.Split(COMM.rank % 2), MPI.COMM_SELF):
        shard = an.mpi.Shard(90, comm, layout="zigzag")
        rules = {"shard": shard, "mask": an.SlidingWindow(20, 11), "exchange": "ring"}
        expected = shard.take(an.attention(q, k, v, mask=rules["mask"]))
        mine = [shard.take(x) for x in (q, k, v, dout)]
        swapped = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in mine]
        copies = [x.copy() for x in swapped]
        out = np.full(expected.shape, np.nan, np.float32)
        assert an.mpi.attention(*swapped[:3], **rules, out=out) is out
        assert far(out, expected) < 3e-6
        assert all((a == b).all() for a, b in zip(swapped, copies, strict=True))
        flat = an.mpi.attention(*(x[0] for x in mine[:3]), **rules, return_lse=True)
        assert flat.out.shape == expected.shape[1:]
        assert flat.lse.shape == flat.out.shape[:-1]
        assert (flat.out == out[0]).all()
        twice = []
        for threads in (1, 2, 2):
            with an.threads(threads):
                found = an.mpi.attention_vjp(*mine, **rules)
                twice.append([an.mpi.attention(*mine[:3], **rules), found.q, found.k, found.v])
        for other in twice[1:]:
            assert all((a == b).all() for a, b in zip(twice[0], other, strict=True))


def early_end():
    """A window sends blocks to its neighbors alone, a causal mask none to ranks before."""
    from attn_numba.integrations.mpi import transfers

    sent = []
    send = transfers.Requests.send
    transfers.Requests.send = lambda self, array, target, tag: (
        sent.append((target, tag)),
        send(self, array, target, tag),
    )
    shard = an.mpi.Shard(400, layout="contiguous")
    mine = [shard.take(x) for x in arrays(400)]
    counts = {}
    masks = {"left": an.SlidingWindow(50, 0), "both": an.SlidingWindow(50, 50), "causal": an.Causal(), "full": None}
    for name, mask in masks.items():
        sent.clear()
        an.mpi.attention(*mine[:3], shard=shard, mask=mask, exchange="ring")
        counts[name] = sum(COMM.allgather(len(sent))) // 2  # keys and values
    P = COMM.size
    assert counts == {"left": P - 1, "both": 2 * (P - 1), "causal": P * (P - 1) // 2, "full": P * (P - 1)}, counts
    return str(counts)


def warm():
    """Rank 0 compiles and the others load."""
    from attn_numba.cpu import compilation

    found = COMM.allgather((list(an.mpi.warm_up("float32")), [worker.cache_hits for worker in compilation._keep]))
    assert [names for names, _ in found] == [["float32"]] * COMM.size
    assert [hits for _, hits in found] == [[0], *[[1]] * (COMM.size - 1)], found
    said = raised(lambda: an.mpi.warm_up("float32" if COMM.rank else "float8"), ValueError)
    assert "float8" in said
    return "compiled once"


def memory():
    """The peak of each rank, beyond an idle one's, over its share of q, k, v, out and two blocks of k and v."""
    from pathlib import Path

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    def take(n):
        shard = an.mpi.Shard(n, mask=an.Causal())
        random = np.random.default_rng(COMM.rank)
        made = [random.standard_normal((1, 8, len(shard.positions), 64), dtype=np.float32) for _ in range(3)]
        out = an.mpi.attention(*made, shard=shard, mask=an.Causal(), exchange="ring")
        return sum(x.nbytes for x in (*made, out)) + 2 * sum(x.nbytes for x in made[1:])

    take(256)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    share = take(16384)
    over = max(COMM.allgather((status("VmHWM") - before) / share))
    assert over < 1.3, over
    return f"{over:.3f} of what it holds"


def fails(how):
    """Rank 1 fails in the middle of a call while the others wait for it."""
    import os
    import signal

    from attn_numba.integrations.mpi import ring

    shard = an.mpi.Shard(64)
    mine = [shard.take(x) for x in arrays(64)[:3]]
    an.mpi.attention(*mine, shard=shard, exchange="ring")
    if COMM.rank == 1:
        fate = {"raise": lambda *_: 1 / 0, "kill": lambda *_: os.kill(os.getpid(), signal.SIGKILL)}
        ring.add_attention = fate[how]
    an.mpi.attention(*mine, shard=shard, exchange="ring")


if __name__ == "__main__":
    start = time.perf_counter()
    said = globals()[sys.argv[1]](*sys.argv[2:])
    COMM.Barrier()
    if COMM.rank == 0:
        print(f"passed on {COMM.size} ranks in {time.perf_counter() - start:.1f} s: {said}")
