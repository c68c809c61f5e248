"""What both tensor-core kernels tell the host: which calls they serve, their parameters, how many blocks they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_numba.gpu.fragments import LOG2_E
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.layout import Layout
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import types
from attn_numba.problem import Problem
from attn_numba.rules import Softmax

__all__ = ["arguments", "grid_of", "misplaced", "program_of", "refusal_of_any"]

LARGEST = 256  # of head and value size


def refusal_of_any(problem: Problem) -> str:
    """Return why no tensor-core kernel can serve a call, whatever the card."""
    s = problem.sizes
    if problem.dtype not in ("float16", "bfloat16"):
        return f"it computes in 16 bits, and q has {problem.dtype}"
    if max(problem.q.dtype.itemsize, problem.k.dtype.itemsize) > 2:
        return "it multiplies numbers of 16 bits, and the maps of the score make more of q and k"
    if not isinstance(problem.normalizer, Softmax):
        return f"it computes softmax, and the normalizer is {type(problem.normalizer).__name__}"
    if max(s.D, s.E) > LARGEST:
        return f"it takes head and value sizes to {LARGEST}, and they are {s.D} and {s.E}"
    if not s.N:
        return "there are no keys"
    return next(filter(None, (misplaced(x, name) for x, name in zip(problem[:3], "qkv", strict=True))), "")


def misplaced(view: Any, name: str) -> str:
    """Return why the kernels cannot read or write an array where it lies; an empty text where they can."""
    steps = [stride for stride, size in zip(view.strides[:3], view.shape[:3], strict=True) if size > 1]
    together = view.strides[3] == view.dtype.itemsize and not view.shape[3] % 8
    if together and not view.pointer % 16 and not any(step % 16 for step in steps):
        return ""
    return f"it moves whole pieces of 16 bytes, and rows of {name} are not made of these"


def program_of(
    name: str, layout: Layout, bound: Bound, make: Callable[[Layout, Hooks], Any], resident: int, specific: bool
) -> Program:
    """Return a kernel; with lse and the rows' numbers or without them it is the same one."""
    hooks, block = bound.hooks, (layout.threads,)
    types_of = _signature(bound)
    return Program(
        name, tuple(layout), hooks, lambda: make(layout, hooks), types_of, block, resident, layout.shared, specific
    )


def _signature(bound: Bound) -> tuple[Any, ...]:
    """Return the types of the parameters of both tensor-core kernels."""
    number = types.int32
    return (
        *(types.uint64,) * 6, types.CPointer(types.float64), types.UniTuple(types.int64, 12), *(number,) * 4,
        types.float32, types.float32, bound.signature(),
    )  # fmt: skip


def grid_of(problem: Problem, layout: Layout) -> tuple[int, int, int]:
    """Return the number of blocks: all rows of a head, then the next head."""
    s = problem.sizes
    return s.B * s.H * -(-s.M // layout.rows), 1, 1


def arguments(
    problem: Problem, entries: tuple[Any, ...], out: Any, lse: Any = None, stats: Any = None, sink: Any = None
) -> tuple[Any, ...]:
    """Return the parameters of both tensor-core kernels; none of q, k, v and `out` is misplaced."""
    s, scale = problem.sizes, np.float32(problem.scale)
    strides = tuple(np.int64(x) for view in (problem.q, problem.k, problem.v, out) for x in view.strides[:3])
    return (
        problem.q, problem.k, problem.v, out, lse, stats, sink, strides, np.int32(s.M), np.int32(s.N), np.int32(s.H),
        np.int32(s.H // s.Hk), scale, np.float32(scale * LOG2_E), entries,
    )  # fmt: skip
