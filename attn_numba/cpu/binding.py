"""The rules of one call, bound: addresses of their hooks and the block of their parameters."""

from __future__ import annotations

import collections
import math
import os
import threading
from collections.abc import Hashable
from typing import NamedTuple

import llvmlite.ir as ir
import numpy as np

from attn_numba.cpu.choices import FULL, MASKED, RUNS
from attn_numba.cpu.dropout import dropout_parameters, emit_dropout
from attn_numba.cpu.emitter import settled, structure, words
from attn_numba.cpu.hooks import (
    compile_hooks,
    emit_edit,
    emit_gradient,
    emit_runs,
    emit_tile,
)
from attn_numba.cpu.tiles import DEPTH_CHAIN
from attn_numba.cpu.vectors import DOUBLE, FLOAT
from attn_numba.problem import Problem, is_light
from attn_numba.rules import SYMBOLS
from attn_numba.rules.chain import LEAST_SCALE, Derivatives, Formulas, derivatives_of, formulas_of
from attn_numba.rules.formula import Binder, Node, lift, symbol

KEPT = 64  # bound rules kept for calls that repeat; each holds the arrays of its rules


HOOKS = ("tile", "edit", "modify", "dropout", "runs")  # in the order of `Call`


class Bound(NamedTuple):
    """What a kernel needs of a call's rules. Addresses are 0 where there is nothing to do."""

    hooks: tuple[int, ...]  # those of HOOKS
    run_count: int  # stretches of keys that each query sees; 0 where the tile hook says what is seen
    address: int  # of the block of parameters
    factor: float  # what scores are multiplied by on their way into 2**x
    pull: int  # hook from gradients by final scores to those by products; 0 where the scale is all there is between
    learned: tuple[tuple[int, int], ...]  # modifiers whose arrays have gradients, and the hooks that give their terms
    keep: tuple  # arrays the block points into, and the rules

    @property
    def kind(self) -> str:
        """What the call's mask is like, for its shape class."""
        return RUNS if self.run_count else MASKED if self.hooks[0] else FULL


_bound: collections.OrderedDict[Hashable, Bound] = collections.OrderedDict()
_compiled: dict[tuple, dict[str, int]] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # else a forked child may find it held by a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def bind(problem: Problem, gradients: bool = False) -> Bound:
    """Return the bound rules of a call, from memory if a like one was bound before; with hooks for gradients or not."""
    if problem.mask is None and not problem.modifiers and problem.dropout is None and problem.scale >= LEAST_SCALE:
        return Bound(_NO_HOOKS, 0, 0, problem.scale / math.log(2), 0, (), ())
    with _lock:
        if problem.key is None:
            return _bind(problem, gradients)
        key = gradients, problem.key or (problem.scale, problem.sizes, problem.dtype)
        found = _bound.get(key)
        if found is not None:
            _bound.move_to_end(key)
            return found
        found = _bind(problem, gradients)
        if is_light((problem.mask, *problem.modifiers, problem.dropout)):
            _bound[key] = found
            if len(_bound) > KEPT:
                _bound.popitem(last=False)
    return found


MOST_RUNS = 512
_NO_HOOKS = (0,) * len(HOOKS)


def _bind(problem: Problem, gradients: bool) -> Bound:
    sizes, binder = problem.sizes, Binder()
    offsets = (problem.query_offset, problem.key_offset)  # not bound, for binding one array twice binds it once
    binder.params += [np.broadcast_to(np.asarray(x, np.int32), (sizes.B,)) for x in offsets]
    formulas = formulas_of(problem.mask, problem.modifiers, problem.scale, sizes, binder)
    runs = None if gradients else _runs(problem, binder)
    derivatives = None
    if gradients and formulas.score is not None:
        derivatives = derivatives_of(problem.modifiers, problem.scale, sizes, binder)
    drops = problem.dropout is not None and problem.dropout.rate > 0
    first_drop = len(binder.params)
    if drops:
        binder.params += dropout_parameters(problem.dropout, sizes)
    params = settled(binder.params, problem.accumulator)
    number = DOUBLE if problem.dtype == "float64" else FLOAT
    key = (number, structure(params), drops and first_drop, repr(formulas), repr(runs), repr(derivatives))
    if key not in _compiled:
        _compiled[key] = _compile(number, params, formulas, runs, first_drop if drops else None, derivatives)
    hooks = _compiled[key]
    scaled = formulas.score is not None and not formulas.partial  # by the hooks
    factor = (1 if scaled else problem.scale) / math.log(2)
    block = words(params)
    keep = (block, params, problem.mask, problem.modifiers, problem.dropout)
    addresses = tuple(hooks.get(name, 0) for name in HOOKS)
    learned = () if derivatives is None else tuple((n, hooks[_learned_name(n)]) for n, _ in derivatives.learned)
    run_count = 0 if runs is None else problem.mask.run_count
    return Bound(addresses, run_count, block.ctypes.data, factor, hooks.get("pull", 0), learned, keep)


def _runs(problem: Problem, binder: Binder) -> tuple[Node, Node] | None:
    """Return first and end of the stretches of keys that a query sees, where they alone say what is allowed."""
    mask = problem.mask
    if (
        mask is None
        or problem.sizes.D > DEPTH_CHAIN
        or not 0 < mask.run_count <= MOST_RUNS
        or any(m.excludes is not None or m.neutral is not None for m in problem.modifiers)
    ):
        return None
    p = binder.bind(mask.arguments(problem.sizes))
    first, end = mask.run(SYMBOLS.b, SYMBOLS.h, SYMBOLS.i if mask.positional else SYMBOLS.row_i, symbol("n"), p)
    return lift(first), lift(end)


def _learned_name(n: int) -> str:
    return f"learned_{n}"


def _compile(
    number: ir.Type, params: list, formulas: Formulas, runs, first_drop: int | None, derivatives: Derivatives | None
) -> dict[str, int]:
    seen, plain, score, partial = formulas
    module = ir.Module("hooks")
    if seen is not None:
        emit_tile(module, "tile", number, params, seen.allowed, plain, seen.certain, seen.possible)
        emit_edit(module, "edit", number, params, score, seen.allowed, seen.allowed & ~plain if partial else None)
    if score is not None and not partial:
        emit_edit(module, "modify", number, params, score, None)
    if runs is not None:
        emit_runs(module, "runs", number, params, *runs)
    if first_drop is not None:
        emit_dropout(module, "dropout", number, params, first_drop)
    if derivatives is not None:
        emit_gradient(module, "pull", number, params, derivatives.score)
        for n, term in derivatives.learned:
            emit_gradient(module, _learned_name(n), number, params, term)
    return compile_hooks(module)
