"""Instructions that device code names: tensor cores, asynchronous copies, fast functions of float32.

Each is a line of PTX (NVIDIA, *Parallel Thread Execution ISA*; chapter "Warp level matrix multiply-accumulate" and
those after it). Addresses are numbers: into shared memory uint32, into global memory uint64, both in bytes. What a warp
or warpgroup does together has to be called by all of its threads.

In the simulator the names exist, and to call one is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from attn_numba.gpu.target import SIMULATED, intrinsic, ir, types

f32, u32, i32, u64 = types.float32, types.uint32, types.int32, types.uint64
LETTERS = {f32: "f", u32: "r", i32: "r", u64: "l"}  # of registers in inline assembly
NAMES = {"bfloat16": "bf16", "float16": "f16"}


class Registers(NamedTuple):
    """An operand that is a local array of the caller: all its elements are operands, in order."""

    count: int
    kind: Any
    written: bool  # whether they are results as well


def instruction(text: str, result: Any, *operands: Any, effects: bool = False) -> Callable[..., Any]:
    """Return a function for device code, made of a text of PTX and types.

    Parameters
    ----------
    text : str
        The instruction. ``$0`` and so on are its registers: those of the result or of written operands, then those of
        the operands, each in order.
    result : type, tuple type or None
        A scalar, some of one kind, or nothing.
    *operands : type, tuple type or Registers
        What the function takes.
    effects : bool
        Whether it does more than to give a result: it then stays where it is among others, and so does what reads or
        writes memory.
    """
    if SIMULATED:
        return _refuse

    def typed(_typing_context: Any, *given: Any) -> Any:
        takes = [g if isinstance(o, Registers) else o for o, g in zip(operands, given, strict=True)]
        return (types.void if result is None else result)(*takes), generate

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inputs, targets, constraints = [], [], []
        outputs = _kinds(result)
        for operand, kind, value in zip(operands, signature.args, args, strict=True):
            if isinstance(operand, Registers):
                places = _elements(context, builder, kind, value, operand.count)
                inputs += [builder.load(place) for place in places]
                if operand.written:
                    constraints += [str(len(outputs) + n) for n in range(operand.count)]
                    targets, outputs = targets + places, outputs + [operand.kind] * operand.count
                else:
                    constraints += [LETTERS[operand.kind]] * operand.count
            else:
                kinds = _kinds(operand)
                several = isinstance(operand, types.UniTuple)
                inputs += [builder.extract_value(value, n) for n in range(len(kinds))] if several else [value]
                constraints += [LETTERS[kind] for kind in kinds]
        found = _assemble(context, builder, text, outputs, inputs, constraints, effects)
        for place, value in zip(targets, found[len(_kinds(result)) :], strict=True):
            builder.store(value, place)
        if result is None:
            return context.get_dummy_value()
        return context.make_tuple(builder, result, found) if isinstance(result, types.UniTuple) else found[0]

    return _intrinsic(typed, len(operands))


def _refuse(*_operands: Any) -> Any:
    raise RuntimeError("an instruction of the device was called in the simulator: it needs a card")


def _intrinsic(typed: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return an intrinsic of so many operands."""
    names = ("typing_context", *(f"operand{n}" for n in range(count)))
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(typed)


def _kinds(kind: Any) -> list[Any]:
    """Return the kinds of the registers that a value of a type takes."""
    if kind is None:
        return []
    return [kind.dtype] * kind.count if isinstance(kind, types.UniTuple) else [kind]


def _elements(context: Any, builder: Any, kind: Any, array: Any, count: int) -> list[Any]:
    first = context.make_array(kind)(context, builder, array).data
    return [builder.gep(first, [ir.Constant(ir.IntType(32), n)]) for n in range(count)]


def _assemble(
    context: Any, builder: Any, text: str, outputs: list[Any], inputs: list[Any], constraints: list[str], effects: bool
) -> list[Any]:
    """Write a call of inline assembly and return its results."""
    kinds = [context.get_value_type(kind) for kind in outputs]
    returned = ir.VoidType() if not kinds else kinds[0] if len(kinds) == 1 else ir.LiteralStructType(kinds)
    form = ",".join(["=" + LETTERS[kind] for kind in outputs] + constraints + ["~{memory}"] * effects)
    volatile = effects or not outputs
    value = builder.asm(ir.FunctionType(returned, [x.type for x in inputs]), text, form, inputs, volatile)
    return [value] if len(kinds) == 1 else [builder.extract_value(value, n) for n in range(len(kinds))]


# --- numbers ---

ex2 = instruction("ex2.approx.ftz.f32 $0, $1;", f32, f32)
lg2 = instruction("lg2.approx.ftz.f32 $0, $1;", f32, f32)
rcp = instruction("rcp.approx.ftz.f32 $0, $1;", f32, f32)
fmax = instruction("max.f32 $0, $1, $2;", f32, f32, f32)  # of a number and NaN: the number
udiv = instruction("div.u32 $0, $1, $2;", u32, u32, u32)
# A number as it is, of which the compiler does not know that it stays the same.
opaque = instruction("mov.b32 $0, $1;", u32, u32, effects=True)
# The first number goes to the lower half, which PTX names last.
pack_bfloat16 = instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", u32, f32, f32)
pack_float16 = instruction("cvt.rn.f16x2.f32 $0, $2, $1;", u32, f32, f32)
# What the lane has whose number differs in the bits of the mask.
shuffle_xor = instruction("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", f32, f32, i32, effects=True)
# The number of the first lane: one that the compiler knows to be the same in all lanes, and keeps once a warp.
uniform = instruction("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", u32, u32, effects=True)

# --- memory ---

FOUR = types.UniTuple(u32, 4)
# 16 bytes from global to shared memory, of which so many are read and the others are zero.
copy16 = instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", None, u32, u64, u32, effects=True)
copy_commit = instruction("cp.async.commit_group;", None, effects=True)
copy_wait0 = instruction("cp.async.wait_group 0;", None, effects=True)  # for all groups of copies
copy_wait1 = instruction("cp.async.wait_group 1;", None, effects=True)  # for all but the last one
load_shared = instruction("ld.shared.b32 $0, [$1];", u32, u32, effects=True)
store_shared = instruction("st.shared.b32 [$0], $1;", None, u32, u32, effects=True)
load_shared4 = instruction("ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];", FOUR, u32, effects=True)
FLOATS = types.UniTuple(f32, 4)
load_shared_floats = instruction("ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", FLOATS, u32, effects=True)
store_shared4 = instruction("st.shared.v4.b32 [$0], {$1,$2,$3,$4};", None, u32, u32, u32, u32, u32, effects=True)
or_shared = instruction("red.shared.or.b32 [$0], $1;", None, u32, u32, effects=True)
store_global4 = instruction("st.global.v4.b32 [$0], {$1,$2,$3,$4};", None, u64, u32, u32, u32, u32, effects=True)
store_global_f32 = instruction("st.global.f32 [$0], $1;", None, u64, f32, effects=True)
# Writes shared memory as others read it to the tensor cores, which read it another way.
fence_async = instruction("fence.proxy.async.shared::cta;", None, effects=True)
# Stores a number that is never negative nowhere: its computation stays before a wait that follows.
pin = instruction(
    "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p st.shared.f32 [$0], $1; }", None, u32, f32, effects=True
)


def _address_of_array(context: Any, builder: Any, kind: Any, array: Any, bits: int) -> Any:
    """Return the address of an array's first element: of 32 bits, within shared memory."""
    pointer = context.make_array(kind)(context, builder, array).data
    if bits == 32:
        pointer = builder.addrspacecast(pointer, ir.PointerType(pointer.type.pointee, 3))
    return builder.ptrtoint(pointer, ir.IntType(bits))


def _address(bits: int) -> Callable[..., Any]:
    if SIMULATED:
        return _refuse
    result = u32 if bits == 32 else u64

    def typed(_typing_context: Any, place: Any) -> Any:
        if isinstance(place, types.Integer):
            return result(result), lambda context, builder, signature, args: args[0]

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _address_of_array(context, builder, signature.args[0], args[0], bits)

        return result(place), generate

    return _intrinsic(typed, 1)


shared_address = _address(32)  # of a shared array
address = _address(64)  # of an array; an address is one already


# --- products of matrices: a warp's ---

SUMS = FLOATS


def _mma(dtype: str) -> Callable[..., Any]:
    """Return (c, a0, a1, a2, a3, b0, b1) -> c + a b, for 16 x 16 times 16 x 8."""
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{NAMES[dtype]}.{NAMES[dtype]}.f32 "
        "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};"
    )
    return instruction(text, SUMS, SUMS, u32, u32, u32, u32, u32, u32)


mma_bfloat16, mma_float16 = _mma("bfloat16"), _mma("float16")
# Four 8 x 8 matrices of 16-bit numbers: the lanes of each eighth bring the addresses of one matrix's rows.
_LOAD = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
load_matrices = instruction(_LOAD.format(""), FOUR, u32, effects=True)
load_matrices_transposed = instruction(_LOAD.format(".trans"), FOUR, u32, effects=True)


# --- products of matrices: a warpgroup's (sm_90a) ---


def gemm(
    N: int,
    steps: int,
    offsets_a: Sequence[int] | None,
    offsets_b: Sequence[int],
    a_in_registers: bool = False,
    transposed_b: bool = False,
    zero: bool = False,
    dtype: str = "bfloat16",
) -> Callable[..., Any]:
    """Return (sums, a, b) that begins to add the product of 64 x 16 `steps` and 16 `steps` x N to the sums.

    It is one group of asynchronous work, and `wgmma_wait` waits for it: until then nobody may touch the sums, the
    registers or the shared memory that it reads. One text holds all steps, for the compiler does not unroll loops
    around so many operands.

    Parameters
    ----------
    N : int
        Columns, a multiple of 8 to 256.
    steps : int
        Products of 16 in depth.
    offsets_a, offsets_b : sequence of int
        What each step adds to the matrix descriptors, in units of 16 bytes.
    a_in_registers : bool
        Whether `a` is a local array of 4 `steps` uint32, and not a descriptor.
    transposed_b : bool
        Whether the columns of b lie together in memory, and not its depth.
    zero : bool
        Whether the sums begin at zero, whatever they were.
    dtype : str
        "bfloat16" or "float16".
    """
    count, words = N // 2, 4 * steps if a_in_registers else 1
    sums = _braces(0, count)
    first = 2 * count  # of the operands that follow the sums
    lines = ["{ .reg .pred p, q; .reg .u64 da, db; setp.ne.u32 p, 1, 0; setp.ne.u32 q, 1, 1;"]
    lines.append("wgmma.fence.sync.aligned;")
    for n in range(steps):
        lines.append(f"add.u64 db, ${first + words}, {offsets_b[n]};")
        if a_in_registers:
            a, form = _braces(first + 4 * n, 4), f"1, 1, {int(transposed_b)}"
        else:
            assert offsets_a is not None
            lines.append(f"add.u64 da, ${first}, {offsets_a[n]};")
            a, form = "da", f"1, 1, 0, {int(transposed_b)}"
        added = "q" if zero and n == 0 else "p"
        name = f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.{NAMES[dtype]}.{NAMES[dtype]}"
        lines.append(f"{name} {sums}, {a}, db, {added}, {form};")
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    left = Registers(words, u32, False) if a_in_registers else u64
    return instruction(" ".join(lines), None, Registers(count, f32, True), left, u64, effects=True)


def _braces(first: int, count: int) -> str:
    return "{" + ",".join(f"${n}" for n in range(first, first + count)) + "}"


def wgmma_wait(count: int, keep: int) -> Callable[..., Any]:
    """Return (sums) that waits for all products but the `keep` last: no use of the `count` sums comes before it."""
    return instruction(f"wgmma.wait_group.sync.aligned {keep};", None, Registers(count, f32, True), effects=True)
