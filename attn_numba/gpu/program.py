"""One kernel as it is compiled: what each kernel module hands to those that compile, keep and launch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from attn_numba.gpu.hooks import Hooks

__all__ = ["Program"]


class Program(NamedTuple):
    """One kernel as it is compiled; equal fields but for `make` are the same machine code."""

    name: str  # of the kernel: "general", "mma", "wgmma", "weights", "unit_rows", "products", "gradient", "sums", ...
    options: tuple[Any, ...]  # all that `make` depends on beside the rules; its repr is the same in every process
    hooks: Hooks | None  # the rules that are compiled in, told apart by `hooks.source` and `hooks.number`
    make: Callable[[], Callable[..., None]]  # returns the plain function; called where machine code is not at hand
    signature: tuple[Any, ...]  # Numba types of the parameters
    block: tuple[int, ...]  # threads (x,) or (x, y)
    resident: int  # blocks that a multiprocessor should hold at once, the second launch bound; 1: no matter
    shared: int  # bytes of dynamic shared memory
    specific: bool  # whether to compile for the architecture's own features: sm_90a, not sm_90
