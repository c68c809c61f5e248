"""Run one call on the CPU: bind its rules, plan its tiles, start the workers."""

from __future__ import annotations

import ctypes

import numpy as np

from attn_numba.cpu import forward, normalizers, whole_rows
from attn_numba.cpu.binding import Bound, bind
from attn_numba.cpu.choices import FORWARD, chosen
from attn_numba.cpu.compilation import compile_worker
from attn_numba.cpu.launch import Team
from attn_numba.cpu.plan import Unit, plan_of, plan_of_whole_rows, unit_of
from attn_numba.cpu.state import Call, WholeRows, borrow, give_back
from attn_numba.cpu.target import target
from attn_numba.cpu.tiles import SAME
from attn_numba.parallel import thread_count
from attn_numba.problem import Problem, mapped
from attn_numba.rules import Dot, DoubleSoftmax, Entmax15, Sizes, Softmax, Sparsemax

SMALL = 1_500_000  # multiply-adds below which a second thread costs more than it gives
NORMALIZERS = {
    Softmax: normalizers.SOFTMAX,
    Sparsemax: normalizers.SPARSEMAX,
    Entmax15: normalizers.ENTMAX15,
    DoubleSoftmax: normalizers.DOUBLE_SOFTMAX,
}


def attention(
    problem: Problem,
    out: np.ndarray,
    lse: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    row_facts: np.ndarray | None = None,
) -> None:
    """Compute a call into `out` (B, H, M, E) and, where they are given, into the others.

    Those are `lse` (B, H, M), `weights` (B, H, M, N, zeros on entry) and `row_facts` (B, H, M, ROW_FACTS), float64:
    what made each row's weights sum to 1, as `rows.write_facts` tells.

    Every element of the results is written by one worker.
    """
    inner = prepared(problem)
    result = out if inner.dtype == problem.dtype else np.empty(out.shape, inner.q.dtype)
    attention_of_prepared(inner, result, lse, weights, row_facts)
    if result is not out:
        out[...] = result


def attention_of_prepared(
    inner: Problem,
    out: np.ndarray,
    lse: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    row_facts: np.ndarray | None = None,
) -> float:
    """Do the same for a call, or a part of one, as `prepared` returns it, into an `out` of its dtype.

    Returns what scores are multiplied by on their way into 2**x: the unit of what `row_facts` holds of scores.
    """
    if streams(inner):
        return _stream(inner, out, lse, weights, row_facts)
    return _look_at_rows(inner, range(inner.sizes.M), out=out, lse=lse, weights=weights, row_facts=row_facts)


def explain(
    problem: Problem,
    rows: range,
    weights: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    top: tuple[np.ndarray, np.ndarray] | None = None,
    sums: np.ndarray | None = None,
) -> None:
    """Compute what explains some rows of q, none of it looking at v.

    Parameters
    ----------
    problem : Problem
        The call, as `prepared` returns it: what asks for rows one block after the other prepares it once.
    rows : range
        Rows of q, side by side.
    weights : array (B, H, rows, N), optional
        Zeros on entry.
    entropy : array (B, H, rows), optional
        In nats.
    top : pair of arrays (B, H, rows, count), optional
        Keys (int64) and weights of the largest weights, ``0 < count <= N``.
    sums : array (B, H, N), optional
        Of each key's weights over the rows.
    """
    _look_at_rows(problem, rows, weights=weights, entropy=entropy, top=top, sums=sums)


def streams(problem: Problem) -> bool:
    """Whether a call is of the kind that is computed tile by tile: the softmax of dot products."""
    return isinstance(problem.score, Dot) and isinstance(problem.normalizer, Softmax)


def prepared(problem: Problem) -> Problem:
    """Return the same call as kernels take it: q and k mapped by its score, in a dtype that the processor can read."""
    return mapped(_widened(problem))


def prepare(dtype: str, every: bool = False) -> None:
    """Compile the worker of a dtype's plain calls, or all workers of the dtype, or load them from the disk cache."""
    plain = unit_of(dtype, False).name
    compile_worker(forward.WORKERS[plain, False, False])
    if every:
        exact = unit_of(dtype, True).name
        for key, worker in forward.WORKERS.items():
            if key[0] in (plain, exact):
                compile_worker(worker)
        compile_worker(whole_rows.WORKERS[exact])


def _widened(problem: Problem) -> Problem:
    """Return the same call in float32 if it is of float16 and the processor cannot convert that."""
    if problem.dtype != "float16" or target().half:
        return problem
    q, k, v = (x.astype(np.float32) for x in (problem.q, problem.k, problem.v))
    return problem._replace(q=q, k=k, v=v, dtype="float32")


def _stream(
    problem: Problem,
    out: np.ndarray,
    lse: np.ndarray | None,
    weights: np.ndarray | None,
    row_facts: np.ndarray | None,
) -> float:
    """Run a call tile by tile: the softmax of dot products; return its factor of scores."""
    threads = thread_count()[0] if multiply_adds(problem.sizes) > SMALL else 1
    with Team(threads - 1) as team:  # first: it takes them longer to wake than all of what follows
        bound = bind(problem)
        unit = unit_of(problem.dtype, problem.dropout is not None)
        choice = chosen(FORWARD, problem.dtype, problem.sizes, threads, bound.kind)
        plan = plan_of(unit, problem.sizes, threads, in_place(problem, unit), bound.run_count, choice)
        worker = compile_worker(forward.WORKERS[unit.name, bound.run_count > 0, weights is not None])
        sink = sink_of(problem)
        space = borrow(plan.part_bytes * plan.threads)
        space.write(call_record(problem, bound, space.parts, out, lse, row_facts, weights, sink), plan.layout)
        team.run(worker, space.state, plan.threads)
        give_back(space)
    return bound.factor


def _look_at_rows(
    problem: Problem,
    rows: range,
    out: np.ndarray | None = None,
    lse: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    row_facts: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    top: tuple[np.ndarray, np.ndarray] | None = None,
    sums: np.ndarray | None = None,
) -> float:
    """Run a call row by row: any score and any normalizer, for the output or (without `out`) for what explains it.

    Returns its factor of scores.
    """
    sizes = problem.sizes._replace(M=len(rows), E=0 if out is None else problem.sizes.E)
    threads = thread_count()[0] if multiply_adds(sizes) > SMALL else 1
    with Team(threads - 1) as team:
        bound = bind(problem)
        unit = unit_of(problem.dtype, True)
        plan = plan_of_whole_rows(unit, sizes, threads, in_place(problem, unit))
        worker = compile_worker(whole_rows.WORKERS[unit.name])
        sink = sink_of(problem)
        hidden = None if problem.score.dots else np.ascontiguousarray(problem.score.w, problem.accumulator)
        parts = None
        if sums is not None:  # each block of rows sums on its own
            parts = np.zeros((sizes.B, sizes.H, plan.blocks, plan.columns), problem.accumulator)
        space = borrow(plan.part_bytes * plan.threads)
        call = call_record(problem, bound, space.parts, out, lse, row_facts, weights, sink)
        keys, largest = (None, None) if top is None else top
        whole = WholeRows(
            NORMALIZERS[type(problem.normalizer)],
            address(hidden), 0 if hidden is None or hidden.ndim == 1 else hidden.strides[0],
            plan.keys_bytes, rows.start, rows.stop,
            address(entropy), address(keys), address(largest), 0 if keys is None else keys.shape[-1],
            address(parts), plan.columns,
        )  # fmt: skip
        space.write(call, plan.layout, whole)
        team.run(worker, space.state, plan.threads)
        give_back(space)
    if sums is not None:
        sums[...] = parts[..., : sizes.N].sum(axis=2, dtype=np.float64)
    return bound.factor


def call_record(
    problem: Problem, bound: Bound, parts: int, out=None, lse=None, row_facts=None, weights=None, sink=None
) -> Call:
    """Return the record of a call's arrays and hooks."""
    q, k, v = problem.q, problem.k, problem.v
    return Call(
        bound.factor, parts,
        address(q), *q.strides, address(k), *k.strides, address(v), *v.strides,
        address(out), *(out.strides if out is not None else (0,) * 4),
        address(lse), address(row_facts), address(weights), address(sink), *bound.hooks, bound.address,
    )  # fmt: skip


def multiply_adds(s: Sizes) -> int:
    """Return the multiply-adds of a call that sees all keys."""
    return s.B * s.H * s.M * s.N * (s.D + s.E)


def in_place(problem: Problem, unit: Unit) -> bool:
    """Whether register tiles can read V where it lies."""
    step, beside = problem.v.strides[2:]
    return unit.kind == SAME and beside == unit.word and problem.sizes.E % unit.lanes == 0 and step % unit.word == 0


def address(array: np.ndarray | None) -> int:
    """Return where an array's first element is; 0 for None."""
    if array is None:
        return 0
    return _word.from_address(_pointer(array.__array_struct__, None) + DATA).value or 0


# NumPy's array interface in C: half the time of `array.ctypes.data` and of `array.__array_interface__`.
DATA = 40  # bytes before the address of the data in the structure of that interface
_word = ctypes.c_void_p
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def sink_of(problem: Problem) -> np.ndarray | None:
    """Return the sink of each sequence and head, float64 (B, H), in units of log2; None if there is none."""
    if getattr(problem.normalizer, "sink", None) is None:
        return None
    sink = problem.normalizer.sink_array(problem.sizes)
    return np.ascontiguousarray(sink / np.log(2.0), np.float64)
