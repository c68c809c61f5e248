"""Kernels with the vectors that every x86-64 processor has; AVX2 has a run of its own in `.ci/run`."""

import platform

import pytest

from processes import run_python

CHECKS = """
import sys
from attn_numba.cpu.target import target
from attn_numba.testing import check_attention
from cases import CASES

print(target().vectors)
for n, case in enumerate(CASES[::4]):
    q, k, v, kwargs = case.build(("float32", "float16")[n % 2])
    check_attention(q, k, v, "cpu", name=case.name, **kwargs)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are x86-64 processors")
def test_cases_on_any_of_them():
    assert run_python(CHECKS, NUMBA_CPU_NAME="x86-64") == "generic 128-bit vectors\n"
