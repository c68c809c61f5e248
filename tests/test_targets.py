"""Kernels for other processors of this machine's kind: AVX2, and vectors that every x86-64 processor has."""

import platform

import pytest

from processes import run_python

CHECKS = """
import sys
from attn_numba.cpu.target import target
from attn_numba.testing import check_attention
from cases import CASES

print(target().vectors)
for case in CASES[::4]:
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        try:
            q, k, v, kwargs = case.build(dtype)
        except ImportError:  # no bfloat16 here
            continue
        check_attention(q, k, v, "cpu", name=case.name, **kwargs)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are x86-64 processors")
@pytest.mark.parametrize(("name", "vectors"), [("haswell", "AVX2 with FMA"), ("x86-64", "generic 128-bit vectors")])
def test_cases_on(name, vectors):
    assert run_python(CHECKS, NUMBA_CPU_NAME=name) == f"{vectors}\n"
