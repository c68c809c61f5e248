"""Kernels for the tensor cores on a CPU: every thread is a greenlet, instructions of warps gather all their lanes.

Runs where ``NUMBA_ENABLE_CUDASIM=1``, in which Numba leaves kernels as Python functions. `installed` puts Python into
`attn_numba.gpu.ptx` and a stand-in for Numba's CUDA module and types into the kernels' modules. Fragments, matrices of
shared memory and swizzles are those of NVIDIA's PTX ISA; floats are Python's, rounded where they become 16 bits or meet
a product.

An emulated kernel is held to more than its results:

- Addresses in global memory lie in arrays that are handed to it; it writes to results alone.
- Shared memory begins as NaN. A copy lands when its thread waits for it, and to read its place before is an error.
- What a thread writes to shared memory, other warps may read after a barrier, and the rest of its warp after one or
  after ``syncwarp``; what a warp has read, others may overwrite after a barrier.
- The tensor cores of a warpgroup read what was written, then fenced, then synchronized. Until a product is waited for,
  its sums and registers may not be touched and the memory that it reads not be overwritten.
"""

from __future__ import annotations

import collections
import contextlib
import math
import struct

import numpy as np
from greenlet import getcurrent

from attn_numba.gpu import (
    backward_fragments,
    backward_mma,
    backward_mma_facts,
    forward_mma,
    forward_wgmma,
    fragments,
    isolation,
    layout,
    ptx,
    walk,
)
from emulated_block import FIRST, SEVERAL, Cuda, require

MODULES = (
    layout, isolation, walk, fragments, forward_mma, forward_wgmma, backward_fragments, backward_mma,
    backward_mma_facts,
)  # fmt: skip


# --- numbers ---


def signed(bits):
    half, whole = 1 << (bits - 1), (1 << bits) - 1
    return lambda x: ((int(x) + half) & whole) - half


def unsigned(bits):
    whole = (1 << bits) - 1
    return lambda x: int(x) & whole


NUMBERS = {
    "int32": signed(32), "int64": signed(64), "uint32": unsigned(32), "uint64": unsigned(64), "float32": float,
}  # fmt: skip
PAIR, WORDS = struct.Struct("<ff"), struct.Struct("<II")
HALVES, WORD = struct.Struct("<ee"), struct.Struct("<I")
FLOATS, WORDS_OF_FLOATS = struct.Struct("<4f"), struct.Struct("<4I")
SMALLEST = -126.0


def ex2(x):
    x = float(x)
    if x < SMALLEST:
        return 0.0
    return math.inf if x >= 128 else 2.0**x


def lg2(x):
    return math.nan if x != x or x < 0 else -math.inf if x == 0 else math.inf if x == math.inf else math.log2(x)


def rcp(x):
    return math.copysign(math.inf, x) if x == 0 else 1.0 / x


def fmax(a, b):
    return a if b != b or a >= b else b


def _bfloat16(bits):
    return 0x7FFF if bits & 0x7FFFFFFF > 0x7F800000 else (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def pack_bfloat16(low, high):
    try:
        a, b = WORDS.unpack(PAIR.pack(low, high))
    except OverflowError:
        return int(bfloat16_bits(low)) | int(bfloat16_bits(high)) << 16
    return _bfloat16(a) | _bfloat16(b) << 16


def pack_float16(low, high):
    try:
        return WORD.unpack(HALVES.pack(low, high))[0]
    except OverflowError:
        with np.errstate(over="ignore"):
            return int(np.array([low, high]).astype(np.float32).astype(np.float16).view(np.uint32)[0])


def bfloat16_bits(x):
    """Return float32 numbers rounded to bfloat16, as uint16."""
    with np.errstate(over="ignore"):
        u = np.asarray(x).astype(np.float32).view(np.uint32)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return np.where(u & 0x7FFFFFFF > 0x7F800000, 0x7FFF, rounded).astype(np.uint16)


def bits_of(x, dtype):
    """Return numbers in a 16-bit dtype, as uint16."""
    with np.errstate(over="ignore"):
        return bfloat16_bits(x) if dtype == "bfloat16" else np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def numbers_of(bits, dtype):
    """Return the float32 numbers of a 16-bit dtype's bits."""
    bits = np.ascontiguousarray(bits, np.uint16)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


# --- memory ---


def shared_address(block):
    return FIRST


def address(place):
    return int(place) if isinstance(place, (int, np.integer)) else place.__array_interface__["data"][0]


def copy16(to, source, count):
    thread = getcurrent()
    block = thread.block
    require(count in (0, 16), f"a copy reads {count} bytes")
    place = block.place(to, 16)
    block.check_write(thread, place)
    require(not block.coming[place].any(), "two copies to the same shared memory are under way")
    block.coming[place] = True
    thread.copies.append((place, bytes(block.launch.place(source, 16)) if count else bytes(16)))


def copy_commit():
    thread = getcurrent()
    thread.groups_of_copies.append(thread.copies)
    thread.copies = []


def _wait_for_copies(keep):
    def wait():
        thread = getcurrent()
        block = thread.block
        while len(thread.groups_of_copies) > keep:
            for place, content in thread.groups_of_copies.pop(0):
                block.bytes[4 * place.start : 4 * place.stop] = content
                block.coming[place] = False
                block.wrote(thread, place)

    return wait


def load_shared(at):
    thread = getcurrent()
    place = thread.block.place(at, 4)
    thread.block.check_read(thread.warp, place, thread)
    return thread.block.words[place.start]


def load_shared4(at):
    thread = getcurrent()
    place = thread.block.place(at, 16)
    thread.block.check_read(thread.warp, place, thread)
    return tuple(thread.block.words[place])


def load_shared_floats(at):
    return FLOATS.unpack(WORDS_OF_FLOATS.pack(*load_shared4(at)))


def store_shared(at, word):
    _store(at, (word,))


def store_shared4(at, *words):
    _store(at, words)


def _store(at, words):
    thread = getcurrent()
    block = thread.block
    place = block.place(at, 4 * len(words))
    require(not block.coming[place].any(), "shared memory is written while a copy to it is under way")
    block.check_write(thread, place)
    for n, word in enumerate(words):
        block.words[place.start + n] = word
    block.wrote(thread, place)


def or_shared(at, bits):
    """Join bits: many threads may do so between two barriers, and read them after the second."""
    thread = getcurrent()
    block = thread.block
    n = block.place(at, 4).start
    joined = block.written[n] == block.time and block.writer[n] == SEVERAL
    require(joined or block.written[n] < block.time, "bits are joined to what was written since the last barrier")
    require(block.read[n] < block.time, "bits are joined to what was read since the last barrier")
    block.words[n] |= int(bits)
    block.written[n], block.writer[n], block.written_in_warp[n] = block.time, SEVERAL, thread.warp.time


def store_global4(at, *words):
    getcurrent().block.launch.place(at, 16, writing=True)[:] = struct.pack("<4I", *words)


def store_global_f32(at, x):
    with np.errstate(over="ignore"):
        getcurrent().block.launch.place(at, 4, writing=True)[:] = np.float32(x).tobytes()


# --- what a warp does together: PTX ISA, "Matrix fragments for mma.m16n8k16", "ldmatrix" ---

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, 2 * (LANE % 4)


def shuffle_xor(x, mask):
    thread = getcurrent()
    return thread.warp.gather(thread, "shuffle", (x, mask), _shuffle)


def _shuffle(values):
    return [values[n ^ mask][0] for n, (_, mask) in enumerate(values)]


def uniform(x):
    thread = getcurrent()
    return thread.warp.gather(thread, "uniform", x, _first)


def _first(values):
    require(len(set(values)) == 1, f"a number that is to be the same in all lanes is one of {set(values)}")
    return values


def _load_matrices(transposed):
    def load(at):
        thread = getcurrent()
        block, warp = thread.block, thread.warp

        def action(addresses):
            first = np.array(addresses, np.int64) - FIRST
            require(
                (first >= 0).all() and (first + 16 <= len(block.bytes)).all(), "a matrix lies outside shared memory"
            )
            require(not (first % 16).any(), "a matrix's row is not aligned")
            block.check_read(warp, (first[:, None] // 4 + np.arange(4)).ravel())
            matrices = block.halves[first[:, None] // 2 + np.arange(8)].reshape(4, 8, 8)
            if transposed:
                matrices = matrices.transpose(0, 2, 1)
            words = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32)
            return [tuple(x) for x in words.T.tolist()]

        return warp.gather(thread, f"load_matrices {transposed}", at, action)

    return load


def left_factor(words, dtype):
    """Return the 16 x 16 matrix of the lanes' four words (32, 4)."""
    matrix = np.empty((16, 16), np.float32)
    numbers = numbers_of(words.view(np.uint16), dtype)  # (32, 8)
    for n in range(8):
        matrix[ROW + 8 * (n // 2 % 2), COLUMN + n % 2 + 8 * (n // 4)] = numbers[:, n]
    return matrix


def _mma(dtype):
    def action(values):
        a = left_factor(np.array([x[1:5] for x in values], np.uint32), dtype)
        words = numbers_of(np.array([x[5:7] for x in values], np.uint32).view(np.uint16), dtype)
        b = np.empty((16, 8), np.float32)
        for n in range(4):
            b[COLUMN + n % 2 + 8 * (n // 2), ROW] = words[:, n]
        product = a @ b
        sums = np.array([x[0] for x in values])
        for n in range(4):
            sums[:, n] += product[ROW + 8 * (n // 2), COLUMN + n % 2]
        return [tuple(x) for x in sums.tolist()]

    def mma(sums, *words):
        thread = getcurrent()
        return thread.warp.gather(thread, "mma", (sums, *words), action)

    return mma


# --- what a warpgroup does together: PTX ISA, "Asynchronous warpgroup level matrix instructions" ---

GROUP_ROW = np.arange(128) // 32 * 16 + np.arange(128) % 32 // 4
GROUP_COLUMN = 2 * (np.arange(128) % 4)


def _operand(block, descriptor, rows, columns_lead, dtype):
    """Return a `rows` x 16 operand in shared memory (its rows run along M or N) and its words."""
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    require(descriptor >> 62 == 1, "a matrix descriptor does not say that its pieces are of 128 bytes")
    row, depth = np.arange(rows)[:, None], np.arange(16)
    if columns_lead:
        linear = start + row // 64 * leading + depth // 8 * stride + depth % 8 * 128 + row % 64 * 2
    else:
        linear = start + row // 8 * stride + row % 8 * 128 + depth * 2
    at = (linear ^ ((linear >> 7 & 7) << 4)) - FIRST
    require((at >= 0).all() and (at < len(block.bytes)).all(), "an operand lies outside shared memory")
    return numbers_of(block.halves[at // 2], dtype), np.unique(at // 4)


def gemm(
    N, steps, offsets_a, offsets_b, a_in_registers=False, transposed_b=False, zero=False, dtype="bfloat16"
):  # fmt: skip
    count = N // 2
    column = 8 * (np.arange(count) // 4) + np.arange(count) % 2
    row = 8 * (np.arange(count) // 2 % 2)
    at = GROUP_ROW[:, None] + row, GROUP_COLUMN[:, None] + column

    def begin(group, block, values):
        for name, operands in (("left", [x[1] for x in values]), ("right", [x[2] for x in values])):
            same = (name == "left" and a_in_registers) or len(set(operands)) == 1
            require(same, f"threads of a warpgroup differ in the descriptor of the {name} factor")
        product, places = np.zeros((64, N), np.float32), []
        registers = np.array([x[1] for x in values], np.uint32) if a_in_registers else None
        for n in range(steps):
            b, words = _operand(block, values[0][2] + offsets_b[n], N, transposed_b, dtype)
            places.append(words)
            if a_in_registers:
                mine = registers[:, 4 * n : 4 * n + 4]
                a = np.concatenate(
                    [left_factor(np.ascontiguousarray(mine[w : w + 32]), dtype) for w in range(0, 128, 32)]
                )
            else:
                a, words = _operand(block, values[0][1] + offsets_a[n], 64, False, dtype)
                places.append(words)
            product += a @ b.T
        place = np.unique(np.concatenate(places))
        block.begin_product(group, place)
        found = product[at].astype(np.float64)
        if not zero:
            found += np.array([x[0] for x in values])
        for sums, *_ in values:
            require(
                not any(sums is other for work in group.under_way for other in work.sums), "sums are not waited for"
            )
            sums[:] = [math.nan] * count
        kept = [(x[1], list(x[1])) for x in values] if a_in_registers else []
        group.under_way.append(Product([x[0] for x in values], found.tolist(), place, kept))

    def multiply(sums, a, b):
        thread = getcurrent()
        group, block = thread.group, thread.block
        require(len(sums) == count, f"{len(sums)} sums for a product of {N} columns")
        group.gather(thread, "product", (sums, a, b), lambda values: begin(group, block, values))

    return multiply


class Product(collections.namedtuple("Product", "sums found place kept")):
    """One group of products that is under way."""


def wgmma_wait(count, keep):
    def finish(group, block, values):
        while len(group.under_way) > keep:
            done = group.under_way.pop(0)
            block.busy[done.place] -= 1
            for sums, found in zip(done.sums, done.found, strict=True):
                require(all(x != x for x in sums), "sums were written while a product was under way")
                sums[:] = found
            require(all(now == then for now, then in done.kept), "registers were written while a product read them")

    def wait(sums):
        thread = getcurrent()
        group, block = thread.group, thread.block
        require(len(sums) == count, f"{len(sums)} sums where {count} are waited for")
        group.gather(thread, f"wait {keep}", None, lambda values: finish(group, block, values))

    return wait


def fence_async():
    thread = getcurrent()
    for place in thread.landed:
        thread.block.unfenced[place] = False
    thread.landed = []


def pin(at, x):
    require(not x < 0, "a pinned number is negative")


INSTRUCTIONS = {
    "ex2": ex2,
    "lg2": lg2,
    "rcp": rcp,
    "fmax": fmax,
    "udiv": lambda a, b: a // b,
    "opaque": lambda x: x,
    "pack_bfloat16": pack_bfloat16,
    "pack_float16": pack_float16,
    "shuffle_xor": shuffle_xor,
    "uniform": uniform,
    "copy16": copy16,
    "copy_commit": copy_commit,
    "copy_wait0": _wait_for_copies(0),
    "copy_wait1": _wait_for_copies(1),
    "shared_address": shared_address,
    "address": address,
    "load_shared": load_shared,
    "store_shared": store_shared,
    "load_shared4": load_shared4,
    "load_shared_floats": load_shared_floats,
    "store_shared4": store_shared4,
    "or_shared": or_shared,
    "store_global4": store_global4,
    "store_global_f32": store_global_f32,
    "mma_bfloat16": _mma("bfloat16"),
    "mma_float16": _mma("float16"),
    "load_matrices": _load_matrices(False),
    "load_matrices_transposed": _load_matrices(True),
    "gemm": gemm,
    "wgmma_wait": wgmma_wait,
    "fence_async": fence_async,
    "pin": pin,
}


class Types:
    """Numba's types as kernels use them: functions that make numbers of a width."""

    int32, int64, uint32, uint64, float32, uint16 = (*(NUMBERS[x] for x in NUMBERS), unsigned(16))


@contextlib.contextmanager
def installed(module_of_cuda=Cuda, **changes):
    """Put Python into the modules of the kernels; `changes` are put in place of instructions."""
    unknown = set(changes) - set(INSTRUCTIONS)
    assert not unknown, f"no instructions {unknown}"
    new = [(ptx, {**INSTRUCTIONS, **changes})]
    names = {"cuda": module_of_cuda, "types": Types, **NUMBERS}
    new += [(module, {name: x for name, x in names.items() if name in vars(module)}) for module in MODULES]
    before = [(module, {name: vars(module)[name] for name in found}) for module, found in new]
    try:
        for module, found in new:
            vars(module).update(found)
        yield
    finally:
        for module, found in before:
            vars(module).update(found)
