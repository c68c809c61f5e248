"""Run one call on a card: read its arrays where they lie, choose a kernel, start it, hand back results of their kind.

What depends on the rules, sizes and strides of a call alone is prepared once and kept: a call that repeats binds no
rule, uploads nothing but its own host arrays and looks nothing up on disk.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from attn_numba import problem as problems
from attn_numba.gpu import driver, maps
from attn_numba.gpu.arrays import View, downloaded, empty_view, handle_of, kind_of, unplaced, uploaded
from attn_numba.gpu.driver import DEFAULT_STREAM, THREAD_STREAM, Card
from attn_numba.gpu.hooks import Bound, bind
from attn_numba.gpu.kept import Kept
from attn_numba.gpu.launch import Ready, ready
from attn_numba.gpu.target import SIMULATED
from attn_numba.gpu.tensor_cores import misplaced
from attn_numba.problem import Problem
from attn_numba.rules import Dot, Softmax
from attn_numba.rules.arguments import DTYPES, check_lse
from attn_numba.rules.results import Gradients

__all__ = ["attention", "attention_vjp", "kernels_of", "programs_of"]

Grid = tuple[int, int, int]
Results = tuple[Any, Any, Any]  # out, lse, weights; None for what was not asked for
BOUND, PREPARED = 64, 256  # rules, and calls, that are kept
BOUND_BYTES = 2**28  # of the arrays of kept rules, in a card's memory
TENSOR_CORES = ("wgmma", "mma")  # kernels on them


class Uploaded(NamedTuple):
    """The rules of a call with their arrays on a card."""

    bound: Bound
    entries: tuple[Any, ...]  # of `bound`
    sink: Any
    units: Any
    maps: list[Any]  # what the maps of its score uploaded, in their order
    keep: tuple[Any, ...]  # the rules, so that no other can take their place in memory
    shared: Card | None  # the card, where other streams use the arrays than the one that they are freed on

    @property
    def size(self) -> int:
        """Bytes on the card."""
        arrays = [x for x in (*self.entries, self.sink, self.units, *self.maps) if isinstance(x, (View, np.ndarray))]
        return sum(x.size * x.dtype.itemsize for x in arrays)

    def __del__(self) -> None:
        """Wait for all streams before shared arrays are freed: a kernel may still read them."""
        if self.shared is not None:
            with (
                contextlib.suppress(Exception),
                self.shared.current(),
            ):  # at the end of a process there may be no driver
                self.shared.synchronize()


class Prepared(NamedTuple):
    """A call but for its arrays: its rules, its kernels and what these are started with."""

    rules: Uploaded
    kernel: ModuleType
    main: Ready
    grid: Grid
    weights: Ready | None  # the kernel of a softmax' weights, which come from its scores' largest and sums
    weights_grid: Grid


_uploaded: Kept[Uploaded] = Kept(BOUND, BOUND_BYTES)
_prepared: Kept[Prepared] = Kept(PREPARED, BOUND_BYTES)


# --- calls ---


def attention(
    q: Any, k: Any, v: Any, *, stream: Any, out: Any, return_lse: bool, return_weights: bool, **rules: Any
) -> tuple[Any, Any, Any]:
    """Return output, lse and weights of a call, the last two None where they are not asked for.

    Arrays on a card give arrays of q's kind, before they are computed: on `stream`, or else on q's own one. Host arrays
    give NumPy arrays.

    Raises
    ------
    TypeError, ValueError
        As `problem.check` does, and for arrays on different cards and for what is no stream.
    MemoryError
        If the card has no room for the results.
    RuntimeError
        If the driver fails, or a kernel can neither be found nor compiled.
    """
    wanted = return_lse, return_weights
    if problems.is_device_array(q):
        return _of_device_arrays((q, k, v), stream, out, wanted, rules)
    if stream is not None:
        raise ValueError(f"stream is {type(stream).__name__}; needed None for arrays in host memory")
    call = problems.check(q, k, v, **rules)
    check_lse(return_lse, call.normalizer)
    target = None if out is None else problems.check_out(out, call)
    results = _host_results(call, target, *wanted)
    if SIMULATED:
        _run(_simulated(call), _each(_bits, results), None, 0)
    else:
        _run_uploaded(call, results)
    found, lse, weights = results
    return (_ranked(found, call.rank) if out is None else out), _ranked(lse, call.rank - 1), _ranked(weights, call.rank)


def attention_vjp(q: Any, k: Any, v: Any, dout: Any, **options: Any) -> Gradients:
    """Return the gradients of a call, as `gradients.attention_vjp` does."""
    from attn_numba.gpu import gradients

    return gradients.attention_vjp(q, k, v, dout, **options)


def _ranked(array: Any, rank: int) -> Any:
    """Without the leading axes of size 1 that `check` put in front."""
    return array if array is None or array.ndim == rank else array.reshape(array.shape[array.ndim - rank :])


def _shapes(call: Problem) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of output, lse and weights."""
    s = call.sizes
    return (s.B, s.H, s.M, s.E), (s.B, s.H, s.M), (s.B, s.H, s.M, s.N)


def _host_results(call: Problem, out: Any, lse: bool, weights: bool) -> Results:
    shapes, number = _shapes(call), call.accumulator
    return (
        np.empty(shapes[0], call.q.dtype) if out is None else out,
        np.empty(shapes[1], number) if lse else None,
        np.empty(shapes[2], number) if weights else None,
    )


def _each(change: Callable[[Any], Any], results: Iterable[Any]) -> Results:
    """Return results with each that is there changed."""
    out, lse, weights = (None if x is None else change(x) for x in results)
    return out, lse, weights


def _bits(array: np.ndarray) -> np.ndarray:
    """Return an array as kernels see it: numbers of 16 bits as whole ones."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _simulated(call: Problem) -> Problem:
    return call._replace(q=_bits(call.q), k=_bits(call.k), v=_bits(call.v))


def as_bits(call: Any) -> Problem:
    """Return a call of views as kernels see them."""
    if call.q.dtype.itemsize != 2:
        return call
    return call._replace(q=call.q.bits(), k=call.k.bits(), v=call.v.bits())


def _run_uploaded(call: Problem, results: Results) -> None:
    """Run a call of host arrays on the first card, and wait for it."""
    card, handle = driver.card(0), THREAD_STREAM
    with card.current():
        q, k, v = (uploaded(_bits(x), card, handle) for x in (call.q, call.k, call.v))
        views = _each(lambda x: empty_view(x.shape, _bits(x).dtype.name, card, handle), results)
        _run(call._replace(q=q, k=k, v=v), views, card, handle)  # type: ignore[arg-type]
        for view, array in zip(views, results, strict=True):
            if view is not None:
                downloaded(view, array, card, handle)


def _of_device_arrays(
    arrays: tuple[Any, Any, Any], stream: Any, out: Any, wanted: tuple[bool, bool], rules: dict[str, Any]
) -> Results:
    if SIMULATED:
        raise NotImplementedError("backend 'cuda' is simulated here, and arrays on a GPU cannot run there")
    kind = kind_of(arrays[0])
    placed = [kind_of(x).placed(x, name) for x, name in zip(arrays, "qkv", strict=True)]
    if out is not None:
        if not problems.is_device_array(out):
            raise TypeError(f"out is {type(out).__name__} in host memory; q is on a GPU")
        placed.append(kind_of(out).placed(out, "out"))
    for one, name in zip(placed[1:], ("k", "v", "out"), strict=False):
        if one.card != placed[0].card:
            raise ValueError(f"{name} is on card {one.card}; q is on card {placed[0].card}")
    handle = placed[0].stream if stream is None else handle_of(stream)
    q, k, v = (one.view for one in placed[:3])
    call = problems.check(q, k, v, read=problems.device_view, **rules)
    check_lse(wanted[0], call.normalizer)
    target = None if out is None else problems.check_out_view(placed[3].view, call)
    card = driver.card(placed[0].card)
    with card.current():
        shapes, number = _shapes(call), problems.dtype_name(call.accumulator)

        def new(shape: tuple[int, ...], rank: int, dtype: str) -> tuple[Any, Any]:
            result, view = kind.empty(arrays[0], shape[len(shape) - rank :], dtype, card, handle)
            return result, view.reshape(shape)

        results = [
            (out, target) if out is not None else new(shapes[0], call.rank, call.dtype),
            new(shapes[1], call.rank - 1, number) if wanted[0] else (None, None),
            new(shapes[2], call.rank, number) if wanted[1] else (None, None),
        ]
        on = card.stream(handle)
        for other in {one.stream for one in placed} - {handle}:
            card.order(card.stream(other), on)
        _run(as_bits(call), _each(View.bits, (view for _, view in results)), card, handle)
        lent = tuple(one.view.owner for one in placed if one.lent or one.stream != handle)
        if lent:
            card.hold(on, lent)
    return results[0][0], results[1][0], results[2][0]


# --- one call, its arrays in place ---


def _run(call: Problem, results: Results, card: Card | None, handle: int) -> None:
    """Start the kernels of a call on a stream of the current card; without one, in the simulator.

    Arrays are views in the card's memory, or NumPy arrays, with numbers of 16 bits as their bits.
    """
    if not (call.sizes.B and call.sizes.M):
        return
    out, lse, weights = results
    stream = None if card is None else card.stream(handle)
    rules_key = _rules_key(call, card)
    layouts = (_layout(call.q), _layout(call.k), _layout(call.v), _layout(out))
    key = rules_key and (rules_key, layouts, lse is not None, weights is not None)
    prepared = _prepared.get(key)
    rules = _rules_of(call, rules_key, card, handle) if prepared is None else prepared.rules
    inner = call if isinstance(call.score, Dot) else _mapped(call, rules, card, handle)
    if prepared is None:
        prepared = _prepare(call, inner, rules, results, card)
        _prepared.put(key, prepared, rules.size)
    stats = None
    if weights is not None and isinstance(call.normalizer, Softmax):
        stats = _empty((*_shapes(call)[1], 2), call.accumulator, card, handle)
    kernel = prepared.kernel
    arguments = kernel.arguments(inner, rules.entries, out, lse, stats, rules.sink, **_extra(kernel, rules, weights))
    prepared.main.start(prepared.grid, stream, arguments)
    if prepared.weights is not None and call.sizes.N:
        arguments = _weights_module().arguments(inner, rules.entries, weights, stats, rules.units)
        prepared.weights.start(prepared.weights_grid, stream, arguments)


def _empty(shape: tuple[int, ...], dtype: Any, card: Card | None, handle: int) -> Any:
    name = problems.dtype_name(np.dtype(dtype))
    return np.empty(shape, name) if card is None else empty_view(shape, name, card, handle)


def _mapped(call: Problem, rules: Uploaded, card: Card | None, handle: int) -> Problem:
    """Return a call with the maps of its score applied, their kernels started."""
    stream = None if card is None else card.stream(handle)
    return maps.mapped(
        call,
        _Uploads(rules.maps, card, handle),
        lambda shape, dtype: _empty(shape, dtype, card, handle),
        lambda program, grid, arguments: ready(program, card).start(grid, stream, arguments),
    )


def _extra(kernel: ModuleType, rules: Uploaded, weights: Any) -> dict[str, Any]:
    """Return what the general kernel takes beside the arguments of all."""
    if kernel.__name__.endswith("general"):
        streams = isinstance(rules.keep[0], Softmax)
        return {"weights": None if streams else weights, "units": rules.units}
    return {}


class _Uploads:
    """Uploads arrays of a call's score, or finds them where a like call did before."""

    def __init__(self, found: list[Any], card: Card | None, handle: int) -> None:
        self._found, self._card, self._handle, self._next = found, card, handle, 0

    def __call__(self, array: np.ndarray) -> Any:
        n, self._next = self._next, self._next + 1
        if n < len(self._found):
            return self._found[n]
        found = array if self._card is None else uploaded(array, self._card, self._handle)
        self._found.append(found)
        return found


# --- what is prepared once ---


def _rules_key(call: Problem, card: Card | None) -> Any:
    """Return what tells the rules of a call from others; None if they are of this call alone."""
    if call.key is None:
        return None
    identities = problems.identity(call.score), problems.identity(call.normalizer)
    return (call.key, call.sizes, call.dtype, call.scale, *identities, None if card is None else card.index)


def rules_of(call: Problem, card: Card | None, handle: int) -> Uploaded:
    """Return the rules of a call with their arrays on the card."""
    return _rules_of(call, _rules_key(call, card), card, handle)


def _rules_of(call: Problem, key: Any, card: Card | None, handle: int, gradients: bool = False) -> Uploaded:
    """Return the rules of a call with their arrays on the card, from memory if a like call had them there.

    `key` tells rules with derivatives, `gradients`, from others.
    """
    found = _uploaded.get(key)
    if found is None:
        # What is kept is used on other streams: it is complete before anything starts.
        on = handle if key is None else DEFAULT_STREAM
        found = _upload_rules(call, card, on, gradients)
        if key is not None:
            if card is not None:
                card.synchronize(card.stream(on))
            _uploaded.put(key, found, found.size)
    return found


def _upload_rules(call: Problem, card: Card | None, handle: int, gradients: bool) -> Uploaded:
    from attn_numba.gpu.forward_general import units_of

    def upload(x: Any) -> Any:
        return uploaded(x, card, handle) if card is not None and isinstance(x, np.ndarray) else x

    bound = bind(call, gradients)
    sink = None
    if getattr(call.normalizer, "sink", None) is not None:
        values = call.normalizer.sink_array(call.sizes)  # type: ignore[attr-defined]
        sink = upload(np.ascontiguousarray(values, np.float64))
    found: list[Any] = []
    if call.key is not None:  # the maps' arrays are kept, so they are there before any stream or thread asks
        _collect_maps(call, card, handle, found)
    keep = (call.normalizer, call.score, call.mask, call.modifiers, call.dropout)
    shared = None if call.key is None else card
    return Uploaded(bound, tuple(map(upload, bound.entries)), sink, upload(units_of(call)), found, keep, shared)


def _collect_maps(call: Problem, card: Card | None, handle: int, found: list[Any]) -> None:
    """Upload the arrays of a score's maps, by a walk through its maps that starts no kernel."""
    maps.mapped(
        call,
        _Uploads(found, card, handle),
        unplaced,
        lambda program, grid, arguments: None,
    )


def _layout(x: Any) -> tuple[Any, ...]:
    """Return what kernels depend on of where an array lies."""
    return x.strides, x.dtype.itemsize, x.pointer % 16 if isinstance(x, View) else 0


def _prepare(call: Problem, inner: Problem, rules: Uploaded, results: Results, card: Card | None) -> Prepared:
    """Return the kernels of a call, found or compiled."""
    out, lse, weights = results
    capability = (0, 0) if card is None else card.capability
    asked = lse is not None, weights is not None
    kernel, *programs = programs_of(inner, rules.bound, out, capability, *asked)
    main, *others = (ready(program, card) for program in programs)
    second = _weights_module().grid(inner) if others else (0, 0, 0)
    return Prepared(rules, kernel, main, kernel.grid(inner), others[0] if others else None, second)


# --- which kernel serves what ---


@functools.cache
def _kernels() -> dict[str, ModuleType]:
    """Return the kernels by name, in the order in which they are asked."""
    from attn_numba.gpu import forward_general

    if SIMULATED:
        return {"general": forward_general}
    from attn_numba.gpu import forward_mma, forward_wgmma

    return {"wgmma": forward_wgmma, "mma": forward_mma, "general": forward_general}


def _weights_module() -> ModuleType:
    from attn_numba.gpu import weights

    return weights


def kernels_of(problem: Problem, out: Any, capability: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Yield the kernels by name and why each does not serve a call, in the order in which they are asked.

    The reason is empty for one that serves it; the first of these is started.
    """
    for name, kernel in _kernels().items():
        reason = kernel.refusal(problem, capability)
        if not reason and name in TENSOR_CORES and out is not None:
            reason = misplaced(out, "out")
        yield name, reason


def programs_of(
    problem: Problem,
    bound: Bound,
    out: Any,
    capability: tuple[int, int],
    lse: bool,
    weights: bool,
) -> tuple[Any, ...]:
    """Return the module of the kernel that serves a call, and the programs that it takes.

    Parameters
    ----------
    problem : Problem
        The call, its score's maps applied.
    bound : Bound
        Its rules.
    out : view
        Where the output goes.
    capability : (int, int)
        Of the card.
    lse, weights : bool
        What is asked for beside the output.

    Raises
    ------
    NotImplementedError
        If no kernel serves it; names each with its reason.
    """
    reasons: list[str] = []
    for name, reason in kernels_of(problem, out, capability):
        if not reason:
            break
        reasons.append(f"{name}: {reason}")
    else:
        raise NotImplementedError(f"backend 'cuda' has no kernel for this call: {'; '.join(reasons)}; 'cpu' serves it")
    kernel = _kernels()[name]
    streams = isinstance(problem.normalizer, Softmax)
    options = {"weights": True} if weights and not streams and name == "general" else {}
    programs = [kernel.program(problem, bound, lse=lse, stats=weights and streams, **options)]
    if weights and streams:
        module = _weights_module()
        reason = module.refusal(problem, capability)
        if reason:
            raise NotImplementedError(f"backend 'cuda' cannot return the weights: {reason}; 'cpu' can")
        programs.append(module.program(problem, bound))
    return (kernel, *programs)


def served(capability: tuple[int, int]) -> dict[str, tuple[str, str]]:
    """Return for each dtype the kernel of its plain softmax on a card, and why not those that are asked before it."""
    found = {}
    for dtype in DTYPES:
        reasons: list[str] = []
        for name, reason in kernels_of(sample(dtype), None, capability):
            if not reason:
                found[dtype] = (name, "; ".join(reasons) or "the first that is asked")
                break
            reasons.append(f"not {name}: {reason}")
    return found


def sample(dtype: str, D: int = 64, E: int = 64, **rules: Any) -> Problem:
    """Return a call of a dtype without arrays, to ask what would serve it or to compile that."""
    q, k, v = (unplaced((1, 1, 128, size), dtype) for size in (D, D, E))
    return as_bits(problems.check(q, k, v, read=problems.device_view, **rules))
