"""Numba's CUDA module: the one file that imports it, and what generated code takes from it.

Where the environment has ``NUMBA_ENABLE_CUDASIM=1``, Numba runs kernels in Python, thread by thread: `SIMULATED`. Code
for the device then runs with NumPy's numbers and functions under the same names.

Device code is never compiled with ``fastmath=True``: it would flush small numbers, round quotients and assume that
nothing is NaN, in every function of a kernel. A kernel that wants a fast instruction names it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba import config

SIMULATED = bool(config.ENABLE_CUDASIM)


@contextlib.contextmanager
def _row_stack() -> Iterator[None]:
    """Give NumPy back a name that it had before 2.5, and that numba-cuda 0.30 reads while it is loaded."""
    names = vars(np)
    missing = "row_stack" not in names
    if missing:
        names["row_stack"] = np.vstack
    try:
        yield
    finally:
        if missing:
            del names["row_stack"]


with _row_stack():
    from numba import cuda

    if SIMULATED:
        from numba.core import types
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        ir = intrinsic = None  # there is no compiler
    else:
        import numba.cuda.np.arrayobj  # noqa: F401, loaded by the first compilation otherwise
        from llvmlite import ir
        from numba.cuda import dispatcher, libdevice, types
        from numba.cuda.extending import intrinsic

__all__ = [
    "SIMULATED", "cuda", "device", "in_simulator", "intrinsic", "ir", "language", "opaque", "parameter_type", "ptx_of",
    "types",
]  # fmt: skip


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that device code can call, compiled into its caller; the simulator calls it as it is.

    The simulator gives a kernel's module its threads: a function that asks for them stands in the same module.
    """
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def in_simulator(array: np.ndarray) -> Any:
    """Return an array as a simulated kernel takes it: without a copy, whatever its strides."""
    return FakeCUDAArray(array)


# --- what generated code computes with ---


def language(number: np.dtype[Any]) -> dict[str, Any]:
    """Return the names that code generated from formulas uses.

    Parameters
    ----------
    number : dtype
        float32 or float64: what floats of a formula are computed in.

    Returns
    -------
    dict
        The types ``number int32 int64 uint32 uint64``; ``exp log tanh sqrt absolute minimum maximum floor_divide
        remainder`` of floats, as NumPy has them; ``product``, which is not joined with a sum that follows;
        ``int_divide int_remainder ilog2`` of int32; ``unsigned``, the bits of an int32; and ``INF NAN``.
    """
    name = np.dtype(number).name
    kinds: Any = np if SIMULATED else types
    names = {kind: getattr(kinds, kind) for kind in ("int32", "int64", "uint32", "uint64")}
    names |= {"number": getattr(kinds, name), "INF": math.inf, "NAN": math.nan}
    return names | (_simulated() if SIMULATED else _compiled(name))


def _simulated() -> dict[str, Any]:
    same = ("exp", "log", "tanh", "sqrt", "absolute", "minimum", "maximum", "floor_divide", "remainder")
    return {name: getattr(np, name) for name in same} | {
        "product": np.multiply,
        "int_divide": np.floor_divide,
        "int_remainder": np.remainder,
        "ilog2": lambda x: np.int32(int(x).bit_length() - 1),
        "unsigned": lambda x: np.uint32(int(x) & 0xFFFFFFFF),
    }


def minimum(a, b):
    """Return the lesser of two floats; NaN if one is NaN."""
    return a if (a != a) | (a < b) else b


def maximum(a, b):
    """Return the greater of two floats; NaN if one is NaN."""
    return a if (a != a) | (a > b) else b


def remainder(a, b):
    """Return what is left of `a` after floor division by `b`, with the sign of `b`."""
    rest = math.fmod(a, b)
    if b == 0:
        return rest
    if rest == 0:
        return math.copysign(rest, b)
    return rest + b if (b < 0) != (rest < 0) else rest


def floor_divide_with(floor):
    """Return the function of two floats for the greatest whole number not above their quotient, free of its rounding.

    `floor` is that of one float. The result may be of a wider type than the floats, with no more in it.
    """

    def floor_divide(a, b):
        if b == 0:
            return a / b
        rest = math.fmod(a, b)
        quotient = (a - rest) / b
        if (rest != 0) & ((b < 0) != (rest < 0)):
            quotient = quotient - 1
        if quotient == 0:
            return math.copysign(quotient, a / b)
        whole = floor(quotient)
        return whole + 1 if quotient - whole > 0.5 else whole

    return floor_divide


def tanh_with(number, exp, divide):
    """Return tanh of float32 in some twenty operations without a branch, to about 2e-7 of its value.

    It is a polynomial near 0 (S. L. Moshier, Cephes, tanhf) and ``1 - 2 / (exp(2 x) + 1)`` elsewhere; it computes both.
    """

    def tanh(x):
        size, square = math.fabs(x), number(x * x)
        near = number(square * number(-5.70498872745e-3) + number(2.06390887954e-2))
        near = number(square * near + number(-5.37397155531e-2))
        near = number(square * near + number(1.33314422036e-1))
        near = number(square * near + number(-3.33332819422e-1))
        near = number(x * square * near + x)
        far = number(number(1) - divide(number(2), number(exp(number(number(2) * size)) + number(1))))
        return near if size < number(0.625) else math.copysign(far, x)

    return tanh


if not SIMULATED:

    def _int32_operation(emit: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Callable[..., Any]:
        """Return an intrinsic of two int32: as plain arithmetic Numba would compute in 64 bits."""

        @intrinsic
        def operation(typing_context, a, b):
            def generate(context, builder, signature, args):
                return emit(builder, *args)

            return types.int32(types.int32, types.int32), generate

        return operation

    def _rest(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the remainder with the sign of `a`, and whether `b` has the other sign."""
        rest, zero = builder.srem(a, b), ir.Constant(a.type, 0)
        other = builder.icmp_signed("<", builder.xor(rest, b), zero)
        return rest, builder.and_(builder.icmp_signed("!=", rest, zero), other)

    def _divided(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        _, other = _rest(builder, a, b)
        return builder.sub(builder.sdiv(a, b), builder.zext(other, a.type))

    def _left(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        rest, other = _rest(builder, a, b)
        return builder.add(rest, builder.select(other, b, ir.Constant(a.type, 0)))

    int_divide, int_remainder = _int32_operation(_divided), _int32_operation(_left)

    @intrinsic
    def opaque(typing_context, x):
        """Return an int64 as it is, hidden from the compiler: what is computed from it stays where it is written."""

        def generate(context, builder, signature, args):
            word = ir.IntType(64)
            return builder.asm(ir.FunctionType(word, [word]), "", "=l,0", args, side_effect=True)

        return types.int64(types.int64), generate

else:

    def opaque(x):
        """Return an integer as it is."""
        return x


def _compiled(number: str) -> dict[str, Any]:
    single = number == "float32"
    fast = libdevice.fast_expf, libdevice.fast_fdividef

    def ilog2(x):
        return types.int32(31 - cuda.clz(types.int32(x)))

    return {
        "exp": math.exp,
        "log": math.log,
        "tanh": device(tanh_with(types.float32, *fast)) if single else math.tanh,
        "sqrt": math.sqrt,
        "absolute": math.fabs,
        "minimum": device(minimum),
        "maximum": device(maximum),
        "floor_divide": device(floor_divide_with(libdevice.floorf if single else libdevice.floor)),
        "remainder": device(remainder),
        "product": libdevice.fmul_rn if single else libdevice.dmul_rn,
        "int_divide": int_divide,
        "int_remainder": int_remainder,
        "ilog2": device(ilog2),
        "unsigned": types.uint32,
    }


# --- compilation ---


def parameter_type(entry: Any) -> Any:
    """Return the type of a kernel's parameter: an address for an array, which takes 8 bytes, or a number's own type."""
    if isinstance(entry, np.ndarray):
        return types.CPointer(getattr(types, entry.dtype.name))
    return getattr(types, np.dtype(type(entry)).name)


class _Device:
    """Stands in for the current device, of which the compiler asks what it can do while it compiles functions."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.compute_capability = capability


def ptx_of(kernel: Callable[..., Any], signature: Any, capability: tuple[Any, ...], **options: Any) -> str:
    """Return the PTX of a kernel, compiled for an architecture whether or not there is a device.

    Parameters
    ----------
    kernel : function
        A plain Python function; what it calls may be made by `device`.
    signature : tuple of Numba types, or a signature
        Types of its parameters.
    capability : (int, int) or (int, int, str)
        The architecture: ``(8, 0)`` is sm_80, ``(9, 0, "a")`` is sm_90a.
    **options : object
        Passed to ``cuda.compile``, such as `launch_bounds`.
    """
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: _Device(capability[:2])
    try:
        text, _ = cuda.compile(kernel, signature, device=False, abi="numba", cc=capability, **options)
    finally:
        dispatcher.get_current_device = asked
    return text
