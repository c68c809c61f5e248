"""Gradients of one call on the CPU: what each row needs to know, the workers, and sums over what they leave apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attn_numba.cpu import backward, engine
from attn_numba.cpu.binding import Bound, bind
from attn_numba.cpu.choices import BACKWARD, chosen
from attn_numba.cpu.compilation import compile_worker
from attn_numba.cpu.engine import NORMALIZERS, address, call_record, multiply_adds, streams
from attn_numba.cpu.gradient_rows import INNER, MEAN, REST, ROW_NUMBERS, SECOND, SHIFT
from attn_numba.cpu.gradient_tiles import TERMS
from attn_numba.cpu.launch import Team
from attn_numba.cpu.learned import COLUMNS, PLACES, RECORD, ROWS
from attn_numba.cpu.plan import BackwardPlan, plan_of_backward, unit_of, up
from attn_numba.cpu.rows import ROW_FACTS
from attn_numba.cpu.state import Backward, WholeRows, borrow, give_back
from attn_numba.cpu.tiles import TILE_ROWS
from attn_numba.cpu.turns import HEADS, LINE, SEQUENCES
from attn_numba.parallel import thread_count
from attn_numba.problem import Problem, mapped
from attn_numba.rules import Additive, Bilinear, Softmax
from attn_numba.rules.data import gathered
from attn_numba.rules.results import Learned

SMALL = 500_000  # multiply-adds of a product below which a second thread costs more than it gives
LARGEST, INVERSE, LSE = 0, 1, 3  # of the facts of a row, see `rows.write_facts`
LARGEST_LSE = 64.0  # a larger one has lost digits in float32 that the weights need: it is computed again
SAME_CALL = 0.05  # by how much the sums of a row may miss, relative to what they are made of


class Sums(NamedTuple):
    """Sums by an array of a rule, as the workers leave them."""

    rule: Any
    name: str
    hook: int
    kind: int
    array: np.ndarray  # four axes, (B, H, M, N), those that the array has no elements along of size 1


class Found(NamedTuple):
    """Gradients of a call, or of a part of its keys."""

    q: np.ndarray  # by mapped q
    k: np.ndarray  # by mapped k
    v: np.ndarray
    hidden: dict[str, np.ndarray]  # by the hidden weights of `Additive`, by their name
    row_sums: np.ndarray  # (B, H, M, TERMS): of weights, and of gradients by scores times `scale`
    scale: float


def attention_vjp(
    problem: Problem, dout: np.ndarray, saved: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Learned]:
    """Return the gradients of a call by q, by k and by v, in the accumulator's dtype, and by its rules' arrays.

    Parameters
    ----------
    problem : Problem
        The call.
    dout : array (B, H, M, E)
        Gradient by the output.
    saved : pair of arrays (B, H, M, E), (B, H, M), optional
        Output and lse of the forward call, of `Softmax`. They are computed again if they are not given or have lost
        digits that gradients need: an output of 16 bits, or a lse far from 0.

    Raises
    ------
    ValueError
        If `saved` is of another call.
    """
    number = problem.accumulator
    wide = problem._replace(
        q=_contiguous(problem.q, number), k=_contiguous(problem.k, number), v=_contiguous(problem.v, number),
        dtype=number.name,
    )  # fmt: skip
    dout = _contiguous(dout, number)
    if 0 in (*dout.shape, problem.sizes.N):
        return _nothing(wide)
    if forward_is_lost(problem, saved):
        out, facts = np.empty(dout.shape, number), np.empty((*dout.shape[:3], ROW_FACTS))
        engine.attention(wide, out, row_facts=facts)
        if saved is not None:
            require_same(*saved, out, facts[..., LSE])
            saved = None
    else:
        out, facts = saved[0], None
    inner = mapped(wide)
    learned = Learned(number)
    with np.errstate(all="ignore"):  # rows that see nothing may hold anything
        dq, dk, dv, hidden = _run(inner, dout, out, facts, saved, learned)
        dq, dk, arrays = wide.score.pulled(wide.q, wide.k, dq, dk)
        learned.add(wide.score, arrays | hidden)
    return dq, dk, dv, learned


def prepare(dtype: str, every: bool = False) -> None:
    """Compile the worker of a dtype's plain gradients, or both workers, or load them from the disk cache."""
    name = unit_of(dtype, True).name
    for key, worker in backward.WORKERS.items():
        if key == (name, False) or (every and key[0] == name):
            compile_worker(worker)


def forward_is_lost(problem: Problem, saved: tuple[np.ndarray, np.ndarray] | None) -> bool:
    """Whether what is saved of the forward call, if anything is, has lost digits that gradients need."""
    return saved is None or problem.accumulator != problem.q.dtype or _largest(saved[1]) > LARGEST_LSE


def require_same(out: np.ndarray, lse: np.ndarray, found: np.ndarray, found_lse: np.ndarray) -> None:
    """Raise a ValueError if what was saved is not what was found, give or take what its dtype loses."""
    found, largest = found.astype(out.dtype), 1 + _largest(found_lse)
    for name, array, expected, size in (("lse", lse, found_lse, largest), ("out", out, found, _largest(found))):
        array, expected = array.astype(np.float64), expected.astype(np.float64)
        with np.errstate(invalid="ignore"):  # both minus infinity
            same = np.abs(array - expected) <= SAME_CALL * size
        same |= (array == expected) | (~np.isfinite(array) & ~np.isfinite(expected) & (array != -expected))
        if not same.all():
            at = tuple(int(n) for n in np.argwhere(~same)[0])
            raise ValueError(
                f"saved: {name} is {array[at]:.6g} at {at}; this call gives {expected[at]:.6g}: it is of another call"
            )


def _nothing(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, Learned]:
    """Return the gradients of a call without queries or without keys: zeros."""
    learned = Learned(problem.accumulator)
    for modifier in problem.modifiers:
        if modifier.learned is not None:
            name, _ = modifier.learned
            learned.add(modifier, {name: np.zeros(getattr(modifier, name).shape)})
    if isinstance(problem.normalizer, Softmax) and problem.normalizer.sink is not None:
        learned.add(problem.normalizer, {"sink": np.zeros(problem.normalizer.sink.shape)})
    names = {Bilinear: ("W",), Additive: ("Wq", "Wk", "w")}.get(type(problem.score), ())
    learned.add(problem.score, {name: np.zeros(getattr(problem.score, name).shape) for name in names})
    return np.zeros_like(problem.q), np.zeros_like(problem.k), np.zeros_like(problem.v), learned


def _contiguous(array: np.ndarray, number: np.dtype) -> np.ndarray:
    """Return an array of accumulators; its rows may lie anywhere."""
    return array if array.dtype == number else array.astype(number)


def _largest(lse: np.ndarray) -> float:
    """Return the largest finite size of a lse."""
    return float(np.abs(lse).max(initial=0, where=np.isfinite(lse)))


def _run(
    problem: Problem, dout: np.ndarray, out: np.ndarray, facts: np.ndarray | None, saved: Any, learned: Learned
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    delta = np.einsum("bhme,bhme->bhm", dout, out)
    lse = saved[1].astype(np.float64) if facts is None else facts[..., LSE]
    found = gradients_of_prepared(problem, dout, lse, delta, learned, facts)
    if saved is not None:
        require_consistent(problem, lse, found.row_sums, dout, out, delta, found.scale)
    learned.add(problem.normalizer, sink_gradient(problem, lse, delta, found.row_sums))
    return found.q, found.k, found.v, found.hidden


def gradients_of_prepared(
    problem: Problem, dout: np.ndarray, lse: np.ndarray, delta: np.ndarray, learned: Learned,
    facts: np.ndarray | None,
) -> Found:  # fmt: skip
    """Return gradients of a call as `engine.prepared` returns it; if of `Softmax`, it may be a part of the keys.

    Parameters
    ----------
    problem : Problem
        The call or the part, in a dtype of accumulators.
    dout : array (B, H, M, E)
        Gradient by the output.
    lse : float64 array (B, H, M)
        Of the whole call, its sink included.
    delta : array (B, H, M)
        ``sum_e dout * out``, of the whole call.
    learned : Learned
        Where gradients by arrays of modifiers go. That by the sink does not, see `sink_gradient`.
    facts : float64 array (B, H, M, ROW_FACTS) or None
        What `engine.attention` tells of the rows, or all parts together do; of None it is made of the lse.

    Returns
    -------
    Found
    """
    sizes, number = problem.sizes, problem.accumulator
    B, H, Hk, M, N, D, E = sizes
    threads = thread_count()[0] if multiply_adds(sizes) > SMALL else 1
    with Team(threads - 1) as team:
        bound = bind(problem, gradients=True)
        sums = [_sums_of(problem, n, hook, number) for n, hook in bound.learned]
        unit = unit_of(problem.dtype, True)
        choice = chosen(BACKWARD, problem.dtype, sizes, threads, bound.kind)
        plan = plan_of_backward(unit, sizes, threads, bool(sums), choice)
        worker = compile_worker(backward.WORKERS[unit.name, not streams(problem)])
        if facts is None:
            facts = _facts_of(lse, bound, number)
        rows = _row_numbers(problem, bound, facts, delta)
        dq = np.zeros((B, H, up(M, TILE_ROWS), plan.depth), number)
        dk, dv = np.zeros((B, Hk, N, D), number), np.zeros((B, Hk, N, E), number)
        hidden_sums = None
        if isinstance(problem.score, Additive):
            hidden_sums = np.zeros((B, H, plan.key_blocks, D), number)
        work = _Work(team, worker, problem, bound, plan, dout, rows, sums, dq, dk, dv, hidden_sums)
        if not isinstance(problem.normalizer, Softmax):  # a first pass for the means
            slopes, products = np.moveaxis(work.run(sums_only=True), -1, 0)
            rows[..., MEAN] = np.where(slopes == 0, 0, products / slopes) * work.scale
        row_sums = work.run()
    for part in sums:
        learned.add(part.rule, {part.name: _gathered(part)})
    hidden = {}
    if hidden_sums is not None:
        hidden["w"] = gathered(hidden_sums.sum(axis=(0, 2), dtype=np.float64), problem.score.w.shape)
    return Found(np.ascontiguousarray(dq[:, :, :M, :D]), dk, dv, hidden, row_sums, work.scale)


def sink_gradient(problem: Problem, lse: np.ndarray, delta: np.ndarray, row_sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradient by the sink, by its name, if the call has one; what is given is of the whole call."""
    sink = getattr(problem.normalizer, "sink", None)
    if sink is None:
        return {}
    of_sink = np.exp(problem.normalizer.sink_array(problem.sizes)[..., None] - lse)
    unseen = row_sums[..., 0] == 0  # a row that sees no key may have any dout
    by_head = 0 - np.where(unseen, 0, of_sink * delta).sum(axis=2, dtype=np.float64)
    return {"sink": gathered(by_head, sink.shape)}


class _Work:
    """One call's records, to be run once or twice."""

    def __init__(
        self, team: Team, worker: int, problem: Problem, bound: Bound, plan: BackwardPlan, dout: np.ndarray,
        rows: np.ndarray, sums: Sequence[Sums], dq: np.ndarray, dk: np.ndarray, dv: np.ndarray,
        hidden_sums: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.team, self.worker, self.problem, self.bound, self.plan = team, worker, problem, bound, plan
        self.dout, self.rows, self.sums, self.hidden_sums = dout, rows, sums, hidden_sums
        self.dq, self.dk, self.dv = dq, dk, dv
        self.scale = 1.0 if bound.pull else problem.scale
        self.hidden = None if hidden_sums is None else np.ascontiguousarray(problem.score.w, problem.accumulator)
        self.records = np.array([_record(s) for s in sums], np.int64).reshape(-1, RECORD)
        self.shared = _shared(sums, problem)

    def run(self, sums_only: bool = False) -> np.ndarray:
        """Run the workers; return the sums of rows (B, H, M, TERMS)."""
        s, plan, dq, hidden = self.problem.sizes, self.plan, self.dq, self.hidden
        row_sums = np.zeros((s.B, s.H, s.M, TERMS), self.problem.accumulator)
        progress = np.zeros(max(plan.items, 1) * LINE // 8, np.int64)
        space = borrow(plan.part_bytes * plan.threads)
        whole = WholeRows(*[0] * len(WholeRows._fields))._replace(
            normalizer=NORMALIZERS[type(self.problem.normalizer)], hidden=address(hidden),
            hidden_h=0 if hidden is None or hidden.ndim == 1 else hidden.strides[0],
        )  # fmt: skip
        mine = Backward(
            self.scale, address(self.dout), *self.dout.strides, address(dq), dq.shape[2], address(self.dk),
            address(self.dv), address(self.rows), address(row_sums), address(progress), int(sums_only),
            address(self.hidden_sums), self.bound.pull, address(self.records), len(self.sums), self.shared,
            plan.row_blocks, **plan.places,
        )  # fmt: skip
        space.write(call_record(self.problem, self.bound, space.parts), plan.layout, whole, mine)
        self.team.run(self.worker, space.state, plan.threads)
        give_back(space)
        return row_sums


def _row_numbers(problem: Problem, bound: Bound, facts: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Return what `gradient_rows.py` reads of each row (B, H, M, ROW_NUMBERS)."""
    rows = np.zeros((*delta.shape, ROW_NUMBERS), problem.accumulator)
    rows[..., SHIFT] = np.where(facts[..., LARGEST] == -np.inf, 0, facts[..., LARGEST])
    rows[..., REST], rows[..., SECOND] = facts[..., INVERSE], facts[..., 2]
    rows[..., MEAN] = delta * (1.0 if bound.pull else problem.scale)
    rows[..., INNER] = delta
    return rows


def _facts_of(lse: np.ndarray, bound: Bound, number: np.dtype) -> np.ndarray:
    """Return what is known of rows of a softmax (B, H, M, ROW_FACTS) from its lse alone.

    Scores are counted from the lse, which cannot be written in their units exactly; a factor makes up for it.
    """
    facts = np.zeros((*lse.shape, ROW_FACTS))
    per_unit = bound.factor * math.log(2.0)
    shift = np.where(lse == -np.inf, 0, lse / per_unit).astype(number).astype(np.float64)
    facts[..., LARGEST], facts[..., LSE] = shift, lse
    facts[..., INVERSE] = np.where(lse == -np.inf, 1, np.exp(shift * per_unit - lse))
    return facts


def _sums_of(problem: Problem, n: int, hook: int, number: np.dtype) -> Sums:
    """Return zeros for the gradient by the array of modifier n."""
    s, modifier = problem.sizes, problem.modifiers[n]
    name, axes = modifier.learned
    shape = getattr(modifier, name).shape
    own = dict(zip(axes[len(axes) - len(shape) :], shape, strict=True))
    by_query, by_key = own.get("M", 1) > 1, own.get("N", 1) > 1
    if by_query and by_key:
        places = (own.get("B", 1), own.get("H", 1), s.M, s.N)
        return Sums(modifier, name, hook, PLACES, np.zeros(places, number))
    places = (s.B, s.H, 1, s.N) if by_key else (s.B, s.H, s.M, 1)
    return Sums(modifier, name, hook, COLUMNS if by_key else ROWS, np.zeros(places, number))


def _record(sums: Sums) -> tuple[int, ...]:
    """Return what `learned.py` reads: hook, kind, address, steps in bytes, 0 along axes of one element."""
    steps = (0 if n == 1 else step for n, step in zip(sums.array.shape[:3], sums.array.strides[:3], strict=True))
    return sums.hook, sums.kind, address(sums.array), *steps


def _shared(sums: Sequence[Sums], problem: Problem) -> int:
    """Return along which axes several items share elements of the sums that have one for each query and key."""
    s, shared = problem.sizes, 0
    for part in sums:
        if part.kind == PLACES:
            shared |= SEQUENCES if part.array.shape[0] < s.B else 0
            shared |= HEADS if part.array.shape[1] < s.H else 0
    return shared


def _gathered(part: Sums) -> np.ndarray:
    """Return the gradient by an array of a modifier, in its shape."""
    name, axes = part.rule.learned
    shape = getattr(part.rule, name).shape
    sums = part.array.astype(np.float64)
    sums = sums.sum(axis=tuple(n for n, axis in enumerate("BHMN") if axis not in axes))
    return gathered(sums, shape)


def require_consistent(
    problem: Problem, lse: np.ndarray, row_sums: np.ndarray, dout: np.ndarray, out: np.ndarray, delta: np.ndarray,
    scale: float,
) -> None:  # fmt: skip
    """Raise a ValueError if weights that a lse gives do not sum to 1, or gradients that an output gives not to 0."""
    weights, gradients = np.moveaxis(row_sums.astype(np.float64), -1, 0)
    if problem.normalizer.sink is not None:
        of_sink = np.exp(problem.normalizer.sink_array(problem.sizes)[..., None] - lse)
        weights, gradients = weights + of_sink, gradients - scale * delta * of_sink
    wrong = np.isfinite(weights) & (np.abs(weights - (lse > -np.inf)) > SAME_CALL)
    if wrong.any():
        at = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise ValueError(
            f"saved: lse is {lse[at]:.6g} at {at}, with which the weights of that row sum to {weights[at]:.6g}, not 1: "
            "it is of another call"
        )
    # in float64: the squares of an output that a sink leaves little of are 0 in float32
    squares = (np.einsum("bhme,bhme->bhm", x, x, dtype=np.float64) for x in (dout, out))
    sizes = np.sqrt(math.prod(squares) / out.shape[-1])
    known = np.isfinite(gradients) & np.isfinite(sizes)
    missed = np.sqrt((gradients[known] ** 2).sum())
    if missed > SAME_CALL * abs(scale) * np.sqrt((sizes[known].astype(np.float64) ** 2).sum()):
        raise ValueError("saved: out is not what this call gives with its lse: it is of another call")
