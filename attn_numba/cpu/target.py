"""The processor that kernels are compiled for: vector length, register tile, and which conversions it has.

Numba compiles for the host unless `NUMBA_CPU_NAME` names another processor, so the answer is not asked of the host but
of the compiler: a few one-line functions are compiled for the same target and their assembly is read.
"""

from __future__ import annotations

import functools
import platform
from typing import NamedTuple

import llvmlite.binding as llvm
from numba.core import config
from numba.core.registry import cpu_target

# Numba 0.68 keeps the host's features when NUMBA_CPU_NAME names another processor, so that "haswell" would still mean
# AVX-512. An empty list leaves the features to the name; it takes effect if Numba has compiled nothing yet.
if config.CPU_NAME is not None and config.CPU_FEATURES is None:
    config.CPU_FEATURES = ""

PROBES = """
define <16 x float> @wide(<16 x float> %a, <16 x float> %b) {
  %r = fadd <16 x float> %a, %b
  ret <16 x float> %r
}
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
define <8 x float> @fused(<8 x float> %a) {
  %r = call <8 x float> @llvm.fma.v8f32(<8 x float> %a, <8 x float> %a, <8 x float> %a)
  ret <8 x float> %r
}
define <8 x float> @half(<8 x half> %a) {
  %r = fpext <8 x half> %a to <8 x float>
  ret <8 x float> %r
}
"""
BFLOAT_PROBE = """
define <16 x bfloat> @brain(<16 x float> %a) {
  %r = fptrunc <16 x float> %a to <16 x bfloat>
  ret <16 x bfloat> %r
}
"""
BYTES_PROBE = """
declare i32 @llvm.vector.reduce.add.v64i32(<64 x i32>)
define i32 @bytes(<64 x i8> %a, <64 x i8> %b) {
  %u = zext <64 x i8> %a to <64 x i32>
  %s = sext <64 x i8> %b to <64 x i32>
  %p = mul <64 x i32> %u, %s
  %r = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %p)
  ret i32 %r
}
"""


class Target(NamedTuple):
    """What the compiler may use on the processor that kernels are compiled for."""

    name: str
    vector_bytes: int  # 64, 32 or 16
    tile_rows: int  # rows of the register tile; it is always three vectors wide
    half: bool  # converts float16 in hardware
    bfloat_dot: bool  # multiplies pairs of bfloat16 numbers (AVX512_BF16)
    byte_dot: bool  # multiplies bytes four at a time (AVX512_VNNI)

    @property
    def vectors(self) -> str:
        """A short name of the vector unit, for reports."""
        return {64: "AVX-512", 32: "AVX2 with FMA", 16: "generic 128-bit vectors"}[self.vector_bytes]


def target_machine() -> llvm.TargetMachine:
    """Return a new LLVM target machine for the processor that Numba compiles for."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=3, jit=True)


def features() -> list[str]:
    """Return the names of the features that Numba compiles for, sorted; none where they follow from the name alone."""
    listed = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return sorted(name.removeprefix("+") for name in listed if name.startswith("+"))


def _assembly(machine: llvm.TargetMachine, text: str) -> str:
    return str(machine.emit_assembly(llvm.parse_assembly(text)))


@functools.cache
def target() -> Target:
    """Return the target's vectors, register tile and conversions, read once from what the compiler emits for it."""
    name = cpu_target.target_context.codegen().magic_tuple()[1]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return Target(name, 16, 8, False, False, False)  # NEON: 32 registers, fused multiply-add always
    machine = target_machine()
    code = _assembly(machine, PROBES)
    if "zmm" in code:
        bfloat_dot = "vcvtneps2bf16" in _assembly(machine, BFLOAT_PROBE)
        byte_dot = "vpdpbusd" in _assembly(machine, BYTES_PROBE)
        return Target(name, 64, 8, "vcvtph2ps" in code, bfloat_dot, byte_dot)
    if "vfmadd" in code:
        return Target(name, 32, 4, "vcvtph2ps" in code, False, False)
    return Target(name, 16, 4, False, False, False)
