"""Compile kernels before they are needed, for cards that need not be here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from attn_numba.gpu import engine, maps
from attn_numba.gpu.arrays import unplaced
from attn_numba.gpu.hooks import bind
from attn_numba.gpu.launch import write_code
from attn_numba.gpu.program import Program
from attn_numba.problem import Problem
from attn_numba.rules import Causal, Softmax

__all__ = ["capability_of", "compile_ahead", "plain_calls"]


def capability_of(architecture: str) -> tuple[int, int]:
    """Return the compute capability of an architecture such as sm_90a.

    Raises
    ------
    ValueError
        If it is none.
    """
    found = re.fullmatch(r"sm_(\d+)(\d)[af]?", architecture)
    if found is None:
        raise ValueError(f"architecture is {architecture!r}; needed one such as sm_80 or sm_90a")
    return int(found[1]), int(found[2])


def plain_calls(dtypes: Iterable[str], head_sizes: Iterable[int]) -> list[Problem]:
    """Return calls of dot products and softmax, with and without a causal mask, of each dtype and head size."""
    masks = (None, Causal())
    return [engine.sample(d, size, size, mask=mask) for d in dtypes for size in head_sizes for mask in masks]


def compile_ahead(
    architecture: str, folder: str, calls: Iterable[Problem], told: Callable[[Program], object] | None = None
) -> int:
    """Compile into a folder what calls need on cards of an architecture: alone, with lse, and with weights.

    Parameters
    ----------
    architecture : str
        Such as sm_90a; what only that architecture has is used whether or not the letter is there.
    folder : str
        Where to write; machines find it by the environment variable ``ATTN_NUMBA_CUDA_CODE``.
    calls : iterable of Problem
        As `engine.sample` makes them.
    told : callable, optional
        Is told of each kernel that was compiled.

    Returns
    -------
    int
        How many kernels were compiled; those that are in the folder already are not.

    Raises
    ------
    ValueError
        If the architecture is none.
    OSError
        If the folder cannot be written.
    RuntimeError
        If a kernel cannot be compiled.
    """
    capability = capability_of(architecture)
    programs: list[Program] = []
    for call in calls:
        inner = maps.mapped(
            call,
            lambda array: unplaced(array.shape, array.dtype),
            unplaced,
            lambda program, grid, arguments: programs.append(program),
        )
        bound, is_softmax = bind(call), isinstance(call.normalizer, Softmax)
        for lse in (False, True) if is_softmax else (False,):
            for weights in (False, True):
                # The output has the place of q's rows: contiguous, as results are.
                out = engine.sample(call.dtype, call.sizes.E, call.sizes.E).q
                programs.extend(engine.programs_of(inner, bound, out, capability, lse, weights)[1:])
    return write_code(programs, capability, folder, told)
