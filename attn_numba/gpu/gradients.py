"""Gradients of one call on a card: what `engine` is for the forward pass.

Four passes, each of its own kernels: the facts of all queries (`backward_rows`); the gradients by the rows of q, k and
v that a score compares (`backward_general`); those by the arrays of modifiers (`backward_rules`); and the maps of the
score undone (`backward_sums`). A later pass needs the facts, and no other pass. Where tensor cores can, they compute
the gradients by q, k and v from facts of their own (`backward_mma_facts`, `backward_mma`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba import problem as problems
from attn_numba.gpu import (
    backward_general as general,
    backward_mma,
    backward_mma_facts,
    backward_rows,
    backward_rules,
    backward_sums as sums,
    driver,
    engine,
    maps,
)
from attn_numba.gpu.arrays import View, downloaded, empty_view, handle_of, kind_of, uploaded
from attn_numba.gpu.backward_tiles import FACTS, OTHER, SECOND
from attn_numba.gpu.driver import THREAD_STREAM, Card
from attn_numba.gpu.elements import element_name
from attn_numba.gpu.kept import Kept
from attn_numba.gpu.launch import Ready, ready
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import SIMULATED
from attn_numba.gpu.tensor_cores import misplaced
from attn_numba.problem import Problem
from attn_numba.rules import Bilinear, Cosine, Dot
from attn_numba.rules.arguments import check_differentiable, check_gradient, check_saved
from attn_numba.rules.results import Gradients

__all__ = ["attention_vjp"]

Grid = tuple[int, int, int]
# How far a row's weights may be from a sum of 1: at all, and for each unit of its lse.
LOSS = {"float64": (2.0**-26, 2.0**-40), "float32": (2.0**-7, 2.0**-16)}

_prepared: Kept[list[tuple[Ready, Grid] | None]] = Kept(engine.PREPARED)


class Learned(NamedTuple):
    """An array of a rule that has a gradient."""

    rule: Any
    name: str
    array: np.ndarray


class Results(NamedTuple):
    """Where gradients go: arrays with four axes, and for each of `learned_of` one of its own shape."""

    q: Any
    k: Any
    v: Any
    learned: list[Any]


# --- calls ---


def attention_vjp(q: Any, k: Any, v: Any, dout: Any, *, saved: Any, stream: Any, **rules: Any) -> Gradients:
    """Return the gradients of a call.

    Arrays on a card give arrays of q's kind, before they are computed: on `stream`, or else on q's own one. Host arrays
    give NumPy arrays. Of `saved` the lse is used, and held to the rows' weights where the arrays are the host's: those
    on a card would have to be waited for.

    Raises
    ------
    TypeError, ValueError
        As `problem.check` does, and for a `dout` or `saved` that does not fit, a modifier without slope, arrays on
        different cards and what is no stream.
    NotImplementedError
        If no kernel serves the call.
    MemoryError
        If the card has no room for the results.
    RuntimeError
        If the driver fails, or a kernel can neither be found nor compiled.
    """
    if problems.is_device_array(q):
        return _of_device_arrays((q, k, v, dout), saved, stream, rules)
    if stream is not None:
        raise ValueError(f"stream is {type(stream).__name__}; needed None for arrays in host memory")
    given = [problems.host_array(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v"), (dout, "dout"))]
    call = problems.check(*given[:3], **rules)
    lse = _checked(call, given[3], saved)
    if lse is not None:
        lse = np.asarray(lse)
    shapes = _shapes(call)
    dq, dk, dv = (np.empty(shape, call.q.dtype) for shape in shapes[:3])
    learned = [np.empty(x.array.shape, call.accumulator) for x in learned_of(call)]
    results = Results(dq, dk, dv, learned)
    if SIMULATED:
        facts = _run(engine._simulated(call), engine._bits(given[3].reshape(shapes[3])), _three(lse, shapes[3]),
                     _as_bits(results), None, 0, lse is not None)  # fmt: skip
    else:
        facts = _run_uploaded(call, given[3].reshape(shapes[3]), _three(lse, shapes[3]), results)
    if lse is not None:
        _require_same(_three(lse, shapes[3]), facts[..., OTHER], call, lse.ndim)
    dq, dk, dv = (x.reshape(y.shape) for x, y in zip((dq, dk, dv), given, strict=False))
    return Gradients(dq, dk, dv, _by_rule(call, learned))


def _of_device_arrays(arrays: tuple[Any, Any, Any, Any], saved: Any, stream: Any, rules: dict[str, Any]) -> Gradients:
    if SIMULATED:
        raise NotImplementedError("backend 'cuda' is simulated here, and arrays on a GPU cannot run there")
    kind = kind_of(arrays[0])
    placed = [kind_of(x).placed(x, name) for x, name in zip(arrays, ("q", "k", "v", "dout"), strict=True)]
    q, k, v, dout = (one.view for one in placed)
    call = problems.check(q, k, v, read=problems.device_view, **rules)
    lse = _checked(call, problems.device_view(dout, "dout"), saved)
    if lse is not None:
        if not problems.is_device_array(lse):
            raise TypeError(f"saved: lse is {type(lse).__name__} in host memory; q is on a GPU")
        placed.append(kind_of(lse).placed(lse, "saved: lse"))
    for one, name in zip(placed[1:], ("k", "v", "dout", "saved: lse"), strict=False):
        if one.card != placed[0].card:
            raise ValueError(f"{name} is on card {one.card}; q is on card {placed[0].card}")
    handle = placed[0].stream if stream is None else handle_of(stream)
    card = driver.card(placed[0].card)
    with card.current():
        shapes, number = _shapes(call), problems.dtype_name(call.accumulator)
        made = [kind.empty(arrays[0], x.shape, call.dtype, card, handle) for x in (q, k, v)]
        (dq, _), (dk, _), (dv, _) = made
        views = (view.reshape(shape).bits() for (_, view), shape in zip(made, shapes, strict=False))
        learned = [kind.empty(arrays[0], x.array.shape, number, card, handle) for x in learned_of(call)]
        on = card.stream(handle)
        for other in {one.stream for one in placed} - {handle}:
            card.order(card.stream(other), on)
        of_rows = None if lse is None else _three(placed[4].view, shapes[3])
        results = Results(next(views), next(views), next(views), [view for _, view in learned])
        _run(engine.as_bits(call), dout.reshape(shapes[3]).bits(), of_rows, results, card, handle)
        lent = tuple(one.view.owner for one in placed if one.lent or one.stream != handle)
        if lent:
            card.hold(on, lent)
    return Gradients(dq, dk, dv, _by_rule(call, [x for x, _ in learned]))


def _checked(call: Problem, dout: Any, saved: Any) -> Any:
    """Return the lse of a forward call as it came, None without one; all that can be asked of dout and saved holds."""
    check_differentiable(call.modifiers)
    needed = _shapes(call)[3][4 - call.rank :]
    check_gradient(tuple(dout.shape), problems.dtype_name(dout.dtype), needed, call.dtype)
    return check_saved(saved, call.normalizer, needed, call.dtype)[1]


def _shapes(call: Problem) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of q, k, v and dout with four axes."""
    s = call.sizes
    return tuple(call.q.shape), tuple(call.k.shape), tuple(call.v.shape), (s.B, s.H, s.M, s.E)


def _three(lse: Any, shape: tuple[int, ...]) -> Any:
    return None if lse is None else lse.reshape(shape[:3])


def _as_bits(results: Results) -> Results:
    return results._replace(q=engine._bits(results.q), k=engine._bits(results.k), v=engine._bits(results.v))


def _run_uploaded(call: Problem, dout: np.ndarray, lse: Any, results: Results) -> Any:
    """Run a call of host arrays on the first card, and wait for it; return the facts of its queries if lse is given."""
    card, handle = driver.card(0), THREAD_STREAM
    with card.current():
        q, k, v, gradient = (uploaded(engine._bits(x), card, handle) for x in (call.q, call.k, call.v, dout))
        of_rows = None if lse is None else uploaded(lse, card, handle)
        arrays = [*map(engine._bits, results[:3]), *results.learned]
        views = [empty_view(x.shape, x.dtype.name, card, handle) for x in arrays]
        there = call._replace(q=q, k=k, v=v)  # type: ignore[arg-type]
        there_too = Results(views[0], views[1], views[2], list(views[3:]))
        facts = _run(there, gradient, of_rows, there_too, card, handle, lse is not None)
        for view, array in zip(views, arrays, strict=True):
            downloaded(view, array, card, handle)
        if lse is None:
            return None
        found = np.empty(facts.shape, call.accumulator)
        downloaded(facts, found, card, handle)
        return found


def learned_of(call: Problem) -> list[Learned]:
    """Return the arrays of a call's rules that have gradients, each once."""
    found = []
    for n, rule in enumerate(call.modifiers):
        if rule.learned is not None and not any(rule is other for other in call.modifiers[:n]):
            found.append(Learned(rule, rule.learned[0], getattr(rule, rule.learned[0])))
    if getattr(call.normalizer, "sink", None) is not None:
        found.append(Learned(call.normalizer, "sink", call.normalizer.sink))  # type: ignore[attr-defined]
    names = {"Bilinear": ("W",), "Additive": ("Wq", "Wk", "w")}.get(type(call.score).__name__, ())
    return found + [Learned(call.score, name, getattr(call.score, name)) for name in names]


def _by_rule(call: Problem, arrays: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    found: dict[int, tuple[Any, dict[str, Any]]] = {}
    for (rule, name, _), array in zip(learned_of(call), arrays, strict=True):
        found.setdefault(id(rule), (rule, {}))[1][name] = array
    return list(found.values())


def _require_same(lse: np.ndarray, total: np.ndarray, call: Problem, rank: int) -> None:
    """Raise a ValueError if the weights that an lse gives do not sum to 1, give or take what scores lose."""
    loss, by_size = LOSS[call.accumulator.name]
    with np.errstate(invalid="ignore"):
        same = np.abs(total - 1) <= loss + by_size * np.abs(lse)
    same = np.where(np.isfinite(lse), same, np.where(lse == -np.inf, total == 0, np.isnan(total)))
    if not same.all():
        at = tuple(int(n) for n in np.argwhere(~same)[0])
        raise ValueError(
            f"saved: lse is {lse[at]:.6g} at {at[3 - rank :]}, and the row's weights sum to {total[at]:.6g} with it; "
            "needed 1: it is of another call"
        )


# --- one call, its arrays in place ---


class _Starter:
    """Starts the kernels of a call one after another; those of a like call are remembered in their order."""

    def __init__(self, key: Any, card: Card | None, handle: int) -> None:
        self._key, self._card = key, card
        self._stream = None if card is None else card.stream(handle)
        self._known = _prepared.get(key)
        self._steps: list[tuple[Ready, Grid] | None] = [] if self._known is None else self._known
        self._next = 0

    def __call__(self, make: Callable[[], Program], grid: Callable[[], Grid], arguments: tuple[Any, ...]) -> None:
        if self._known is None:
            blocks = grid()
            self._steps.append(None if 0 in blocks else (ready(make(), self._card), blocks))
        step = self._steps[self._next]
        self._next += 1
        if step is not None:
            step[0].start(step[1], self._stream, arguments)

    def finish(self) -> None:
        """Remember the kernels."""
        if self._known is None:
            _prepared.put(self._key, self._steps)


class _Call(NamedTuple):
    """What the passes of a call share."""

    call: Problem
    inner: Problem  # with the maps of its score applied
    rules: engine.Uploaded
    dout: Any
    facts: Any
    start: _Starter
    empty: Callable[[tuple[int, ...]], Any]  # of the accumulator's dtype


def _run(
    call: Problem, dout: Any, lse: Any, results: Results, card: Card | None, handle: int, told: bool = False
) -> Any:
    """Start the kernels of a call on a stream of the current card, or in the simulator.

    Return the queries' facts, which hold nothing unless they are to be `told` or a kernel needs them. Arrays are views
    in the card's memory, or NumPy arrays, with numbers of 16 bits as their bits.
    """
    reason = maps.refusal(call) or general.refusal(call, (0, 0) if card is None else card.capability)
    if reason:
        raise NotImplementedError(
            f"backend 'cuda' has no gradients for this call: {reason}; 'cpu' and 'reference' serve it"
        )
    key = engine._rules_key(call, card)
    key = key and (key, "gradients")
    rules = engine._rules_of(call, key, card, handle, gradients=True)
    inner = call if isinstance(call.score, Dot) else engine._mapped(call, rules, card, handle)
    layouts = tuple(map(engine._layout, (call.q, call.k, call.v, dout)))

    def empty(shape: tuple[int, ...]) -> Any:
        return engine._empty(shape, call.accumulator, card, handle)

    s = call.sizes
    by_tensor_cores = _on_tensor_cores(inner, dout, results, card)
    start = _Starter(key and (key, layouts, lse is not None, told, by_tensor_cores), card, handle)
    facts = empty((s.B, s.H, s.M, FACTS))
    if not by_tensor_cores or told or results.learned:
        start(
            lambda: backward_rows.program(inner, rules.bound, lse is not None),
            lambda: backward_rows.grid(inner),
            backward_rows.arguments(inner, rules.entries, dout, facts, lse, rules.sink, rules.units),
        )
    this = _Call(call, inner, rules, dout, facts, start, empty)
    (_inputs_on_tensor_cores if by_tensor_cores else _inputs)(this, results)
    _arrays(this, results)
    start.finish()
    return facts


def _on_tensor_cores(call: Problem, dout: Any, results: Results, card: Card | None) -> bool:
    """Whether tensor cores compute the gradients by q, k and v: there is a card that has them, and pairs to compute."""
    if card is None or 0 in (call.sizes.B, call.sizes.M, call.sizes.N):
        return False
    placed = not any(misplaced(x, name) for x, name in zip(results[:3], ("dq", "dk", "dv"), strict=True))
    return placed and not backward_mma.refusal(call, dout, card.capability)


def _inputs_on_tensor_cores(this: _Call, results: Results) -> None:
    """Compute the gradients by q, k and v on tensor cores."""
    call, bound, entries = this.call, this.rules.bound, this.rules.entries
    facts = this.empty((*call.q.shape[:3], backward_mma_facts.FACTS))
    this.start(
        lambda: backward_mma_facts.program(call, bound),
        lambda: backward_mma_facts.grid(call),
        backward_mma_facts.arguments(call, entries, this.dout, facts, this.rules.sink),
    )
    for kind, *written in (("queries", results.q), ("keys", results.k, results.v)):
        this.start(
            lambda kind=kind: backward_mma.program(kind, call, bound),  # type: ignore[misc]
            lambda kind=kind: backward_mma.grid(kind, call),  # type: ignore[misc]
            backward_mma.arguments(kind, call, entries, this.dout, facts, *written),
        )


def _inputs(this: _Call, results: Results) -> None:
    """Compute the gradients by q, k and v, and those by the arrays of the score."""
    call, inner = this.call, this.inner
    if call.score.dots and inner.q is call.q:
        _gradient(this, general.QUERIES, results.q)
        _gradient(this, general.KEYS, results.k)
        _gradient(this, general.VALUES, results.v)
        return
    _gradient(this, general.VALUES, results.v)
    dq = this.empty(inner.q.shape)
    _gradient(this, general.QUERIES, dq)
    arrays = dict(zip(((id(x.rule), x.name) for x in learned_of(call)), results.learned, strict=True))
    of_score = {name: array for (rule, name), array in arrays.items() if rule == id(call.score)}
    if isinstance(call.score, Bilinear):
        _gradient(this, general.KEYS, results.k)
        _projected(this, dq, 0, results.q)
        _weights(this, call.q, dq, of_score["W"], (1, 2))
        return
    dk = this.empty(inner.k.shape)
    _gradient(this, general.KEYS, dk)
    if isinstance(call.score, Cosine):
        for rows, gradient, result in ((call.q, dq, results.q), (call.k, dk, results.k)):
            _unit_slopes(this, rows, gradient, result)
        return
    units = this.empty(inner.q.shape)
    _gradient(this, general.UNITS, units)
    _summed(this, units, (3,) if of_score["w"].ndim == 1 else (1, 3), of_score["w"])
    for n, rows, gradient, result, name in (
        (0, call.q, dq, results.q, "Wq"), (-1, call.k, dk, results.k, "Wk")
    ):  # fmt: skip
        _projected(this, gradient, n, result)
        _weights(this, rows, gradient, of_score[name], (2, 1))


def _gradient(this: _Call, of: str, result: Any) -> None:
    this.start(
        lambda: general.program(this.inner, this.rules.bound, of, element_name(result, this.call)),
        lambda: general.grid(this.inner, of),
        general.arguments(this.inner, this.rules.entries, this.dout, this.facts, this.rules.units, result),
    )


def _arrays(this: _Call, results: Results) -> None:
    """Compute the gradients by the arrays of modifiers and by the sink."""
    inner, bound = this.inner, this.rules.bound
    places = {(id(x.rule), x.name): n for n, x in enumerate(learned_of(this.call))}
    done = set()
    rules: list[Any] = [x for x in this.call.modifiers if x.learned is not None]
    for n, rule in enumerate(rules):  # in the order of `hooks.learned`
        name, axes = rule.learned
        place, shape = places[id(rule), name], getattr(rule, name).shape
        kind = backward_rules.kind_of(shape, axes)
        reason = backward_rules.refusal(inner, kind, shape)
        if reason:
            raise NotImplementedError(f"backend 'cuda': {reason}; 'cpu' and 'reference' serve it")
        target, wanted = results.learned[place], backward_rules.shape_of(inner, kind, shape)
        by_pair = kind == backward_rules.BY_PAIR
        sums_of = target.reshape(wanted) if by_pair else this.empty(wanted)
        this.start(
            lambda n=n, kind=kind: backward_rules.program(inner, bound, kind, n),  # type: ignore[misc]
            lambda kind=kind, shape=shape: backward_rules.grid(inner, kind, shape),  # type: ignore[misc]
            backward_rules.arguments(
                inner, this.rules.entries, this.dout, this.facts, this.rules.units, sums_of, place in done
            ),
        )
        if not by_pair:
            _summed(this, sums_of, _own_axes(shape, axes), target, place in done)
        done.add(place)
    sink = places.get((id(this.call.normalizer), "sink"))
    if sink is not None:
        shape = this.call.normalizer.sink.shape  # type: ignore[attr-defined]
        _summed(this, _column(this.facts, SECOND), _own_axes(shape, "BH"), results.learned[sink])


def _own_axes(shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
    """Return the axes of (B, H, M, N) along which an array that broadcasts to `axes` has elements of its own."""
    there = axes[len(axes) - len(shape) :]
    return tuple("BHMN".index(axis) for axis, size in zip(there, shape, strict=True) if size != 1)


# --- small kernels ---


def _summed(this: _Call, source: Any, kept: tuple[int, ...], result: Any, add: bool = False) -> None:
    """Sum an array of four axes over all but those kept, which come in this order."""
    rest = tuple(n for n in range(4) if n not in kept)
    count = math.prod(source.shape[n] for n in rest)
    permuted = _permuted(source, kept + rest)
    size = math.prod(result.shape)
    this.start(
        lambda: sums.sums_program(this.call.accumulator),
        lambda: sums.sums_grid(source.shape, size),
        (permuted, np.int64(count), np.int32(add), general.flat(result)),
    )


def _weights(this: _Call, rows: Any, gradient: Any, result: Any, order: tuple[int, int]) -> None:
    """Compute the gradient by matrices that rows were multiplied by, (D, E) in this order of axes 1 and 2."""
    number = this.call.accumulator
    found = this.empty((rows.shape[1], rows.shape[3], gradient.shape[3]))
    this.start(
        lambda: sums.outer_program(element_name(rows, this.call), number),
        lambda: sums.outer_grid(found.shape),
        (rows, gradient, found),
    )
    four = found.reshape((1, *found.shape))
    kept = (1,) if result.ndim == 3 else ()
    _summed(this, four, (*kept, *(n + 1 for n in order)), result)


def _projected(this: _Call, gradient: Any, which: int, result: Any) -> None:
    """Multiply gradients by matrices that made mapped rows, transposed: the first that were uploaded, or the last."""
    if 0 in result.shape:  # then none were
        return
    number = this.call.accumulator
    matrices = this.rules.maps[which]
    written = element_name(result, this.call)
    target = result if written == number.name else this.empty(result.shape)
    this.start(
        lambda: maps.product_program(number.name, number),
        lambda: maps.product_grid(result.shape),
        (gradient, _permuted(matrices, (0, 2, 1)), target),
    )
    if target is not result:
        this.start(
            lambda: sums.copies_program(number, written), lambda: sums.copies_grid(result.shape), (target, result)
        )


def _unit_slopes(this: _Call, rows: Any, gradient: Any, result: Any) -> None:
    names = element_name(rows, this.call), this.call.accumulator, element_name(result, this.call)
    this.start(
        lambda: sums.unit_slopes_program(*names),
        lambda: sums.unit_slopes_grid(rows.shape),
        (rows, gradient, result),
    )


def _permuted(x: Any, axes: tuple[int, ...]) -> Any:
    if isinstance(x, np.ndarray):
        return x.transpose(axes)
    shape, strides = (tuple(values[n] for n in axes) for values in (x.shape, x.strides))
    return View(x.pointer, shape, strides, x.dtype, x.owner, x.readonly)


def _column(x: Any, n: int) -> Any:
    """Return one column of an array as an array of as many axes."""
    if isinstance(x, np.ndarray):
        return x[..., n : n + 1]
    at = x.pointer + n * x.strides[-1]
    return View(at, (*x.shape[:-1], 1), x.strides, x.dtype, x.owner, x.readonly)
