"""Numbers as arrays hold them: those of 16 bits travel as bits and are computed with in float32.

numba-cuda's own numbers of 16 bits call external functions, and the simulator has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_numba.gpu.target import SIMULATED, device, types
from attn_numba.problem import Problem

if not SIMULATED:
    from attn_numba.gpu.target import libdevice

__all__ = ["element_name", "element_type", "reader", "writer"]

HALVES = ("float16", "bfloat16")


def element_name(array: Any, problem: Problem) -> str:
    """Return the name of what an array of a call holds: its own dtype, or for 16 bits that of the call."""
    dtype = np.dtype(array.dtype)
    return problem.dtype if dtype.itemsize == 2 else dtype.name


def element_type(name: str) -> Any:
    """Return the Numba type of an array's elements in a kernel."""
    return types.uint16 if name in HALVES else getattr(types, name)


@functools.cache
def reader(name: str) -> Callable[..., Any]:
    """Return the device function from an array's element to the number that is computed with."""
    return {"float16": _from_float16, "bfloat16": _from_bfloat16}.get(name, _same)


@functools.cache
def writer(name: str) -> Callable[..., Any]:
    """Return the device function from a number to an array's element: the nearest, even of two; NaN stays NaN."""
    return {"float16": _to_float16, "bfloat16": _to_bfloat16}.get(name, _same)


if SIMULATED:

    def uint32(x):
        return np.uint32(int(x) & 0xFFFFFFFF)

    def float_of(bits):
        return np.uint32(bits).view(np.float32)

    def bits_of(x):
        return np.float32(x).view(np.uint32)

    def _from_float16(x):
        return np.float32(np.uint16(x).view(np.float16))

    def _to_float16(x):
        return np.float16(x).view(np.uint16)

    uint16 = np.uint16

else:
    uint32, uint16 = types.uint32, types.uint16

    @device
    def float_of(bits):
        return libdevice.int_as_float(types.int32(bits))

    @device
    def bits_of(x):
        return types.uint32(libdevice.float_as_int(types.float32(x)))

    @device
    def _from_float16(x):
        return libdevice.half2float(types.int16(x))

    @device
    def _to_float16(x):
        return uint16(libdevice.float2half_rn(types.float32(x)))


@device
def _same(x):
    return x


@device
def _from_bfloat16(x):
    return float_of(uint32(uint32(x) << 16))


@device
def _to_bfloat16(x):
    bits = bits_of(x)
    if x != x:
        return uint16(uint32(bits >> 16) | 0x40)
    return uint16(uint32(bits + uint32(0x7FFF) + uint32(uint32(bits >> 16) & 1)) >> 16)
